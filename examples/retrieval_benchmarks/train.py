"""Train and evaluate on the benchmarks of the HIER paper (CUB-200-2011, Cars-196, SOP, In-Shop) or on any images.

On one GPU "python train.py ...", on two "torchrun --nproc-per-node 2 train.py ...". The output folder gets
log.jsonl, one line per epoch, and checkpoint.pt, from which --resume goes on. Settings start from the paper's
recipe for the dataset and backbone (settings.py); options below change them.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from backbones import make_backbone, pixels_of
from data import BENCHMARKS, ImageFolders, eval_transform, read_taxonomy, train_transform
from pytorch_metric_learning import losses, miners, samplers
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.utils import common_functions
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from pytorch_metric_learning.utils.inference import CustomKNN
from settings import BACKBONES, Settings, settings_for
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from hierloss import HIERLoss, PoincareDistance, PoincareKNN, ReciprocalNeighborMiner
from hierloss.metrics import hierarchical_average_precision

# Number of classes, embedding size, distance on the ball.
BASE_LOSSES: dict[str, Callable[[int, int, PoincareDistance], nn.Module]] = {
    "proxy_anchor": lambda classes, size, _: losses.ProxyAnchorLoss(classes, size, margin=0.1, alpha=32),
    "multi_similarity": lambda *_: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
    "supcon": lambda *_: losses.SupConLoss(temperature=0.1),
    "soft_triple": lambda classes, size, _: losses.SoftTripleLoss(classes, size, centers_per_class=10),
    "proxy_nca": lambda classes, size, _: losses.ProxyNCALoss(classes, size),
    "hyp": lambda _classes, _size, distance: losses.NTXentLoss(temperature=0.2, distance=distance),
}
STATEFUL = ("model", "criteria", "optimizer", "scaler")
MOST_RANKED = 5000
"""Images, drawn at random, among which the scores of a taxonomy are computed: their time grows with its square."""
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


# --- options ------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", choices=BENCHMARKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset, see docs/benchmarks.md")
    parser.add_argument("--random-split", action="store_true", help="folder: draw the training classes, by --seed")
    parser.add_argument("--taxonomy", type=Path, help="folder: JSON file {class: superclass}, for more scores")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--base-loss", choices=BASE_LOSSES, default="proxy_anchor")
    parser.add_argument("--output", type=Path, required=True, help="folder for log and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=224, help="width and height (default 224)")
    parser.add_argument("--no-pretrained", action="store_true", help="start from random weights")
    parser.add_argument("--precision", choices=AUTOCAST, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that load images (default 8)")
    parser.add_argument("--eval-every", type=int, default=1, help="epochs between evaluations (default 1)")
    parser.add_argument("--eval-first", action="store_true", help="evaluate before training too, as epoch 0")
    recipe = parser.add_argument_group("settings", "default: the recipe of the dataset and backbone, settings.py")
    for field in dataclasses.fields(Settings):
        kind: dict[str, Any] = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        option = "--" + field.name.replace("_", "-")
        recipe.add_argument(option, default=argparse.SUPPRESS, help=field.metadata["help"], **kind)
    args = parser.parse_args(argv)
    if args.dataset != "folder" and (args.random_split or args.taxonomy):
        parser.error("--random-split and --taxonomy are for --dataset folder")
    changes = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Settings) if field.name in args
    }
    if args.precision is None:
        args.precision = "fp16" if args.device == "cuda" else "fp32"
    return args, settings_for(args.dataset, args.backbone, **changes)


# --- model, losses, optimizer -------------------------------------------------------------------------------


class EmbeddingModel(nn.Module):
    """Backbone, layer norm without weights, linear head; images ``(N, 3, H, W)`` to embeddings ``(N, D)``."""

    def __init__(self, settings: Settings, image_size: int, pretrained: bool) -> None:
        super().__init__()
        backbone = make_backbone(settings.model, image_size, pretrained, settings.frozen_blocks)
        self.backbone = freeze_batch_norm_2d(backbone) if settings.freeze_batch_norm else backbone
        self.norm = nn.LayerNorm(backbone.num_features, elementwise_affine=False)
        self.head = nn.Linear(backbone.num_features, settings.embedding_size)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.head(self.norm(self.backbone(images)))
        return embeddings


def make_criteria(base_loss: str, num_classes: int, settings: Settings) -> nn.ModuleDict:
    """The base loss and, unless its weight is 0, HIER."""
    distance = PoincareDistance(c=settings.c, clip_radius=settings.clip_radius)
    criteria = nn.ModuleDict({"base": BASE_LOSSES[base_loss](num_classes, settings.embedding_size, distance)})
    if settings.hier_weight:
        miner = ReciprocalNeighborMiner(settings.num_neighbors, settings.triplets_per_anchor, distance=distance)
        criteria["hier"] = HIERLoss(
            num_proxies=settings.num_proxies,
            embedding_size=settings.embedding_size,
            margin=settings.margin,
            temperature=settings.temperature,
            miner=miner,
            proxy_miner=miner,  # the paper's number of triplets; by default, there are fewer of 512 proxies
            distance=distance,
            gradient_ratio=settings.gradient_ratio or None,
        )
    return criteria


def weighted_sum(criteria: nn.ModuleDict, hier_weight: float, distributed: bool) -> losses.MultipleLosses:
    """The loss of a batch; of the joint batch of all processes, if there are several."""
    parts: dict[str, nn.Module] = dict(criteria.items())
    weights = {"base": 1.0, "hier": hier_weight}
    mined: dict[str, nn.Module] = {}
    if isinstance(parts["base"], losses.MultiSimilarityLoss):
        mined["base"] = miners.MultiSimilarityMiner(epsilon=0.1)
    if distributed:
        parts = {name: DistributedLossWrapper(part) for name, part in parts.items()}
        mined = {name: DistributedMinerWrapper(miner) for name, miner in mined.items()}
    return losses.MultipleLosses(parts, miners=mined or None, weights={name: weights[name] for name in parts})


def make_optimizer(model: EmbeddingModel, criteria: nn.ModuleDict, settings: Settings) -> torch.optim.AdamW:
    factors = {"base": settings.class_lr_factor, "hier": settings.hier_lr_factor}
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad], "lr": settings.lr},
        {"params": [*model.head.parameters()], "lr": settings.lr * settings.head_lr_factor},
        *({"params": [*c.parameters()], "lr": settings.lr * factors[name]} for name, c in criteria.items()),
    ]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


# --- training -----------------------------------------------------------------------------------------------


def batches_of_epoch(labels: Sequence[int], settings: Settings, rank: int, world_size: int) -> list[list[int]]:
    """This process's part of every joint batch; all processes draw the same joint batches."""
    joint = settings.batch_size * world_size
    most = settings.images_per_class * len(set(labels))
    if joint > min(most, len(labels)):
        raise ValueError(
            f"batch_size is {settings.batch_size}, times {world_size} processes {joint}; the training set has "
            f"{len(labels)} images and room for {most} in a batch with {settings.images_per_class} of a class: "
            "lower --batch-size, or raise --images-per-class"
        )
    sampler = samplers.MPerClassSampler(labels, settings.images_per_class, joint, len(labels))
    indices = [int(i) for i in sampler]
    starts = range(rank * settings.batch_size, len(indices), joint)
    return [indices[start : start + settings.batch_size] for start in starts]


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Make an epoch's random numbers a function of its number, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0]))
    # PML's sampler draws from this one.
    common_functions.NUMPY_RANDOM = np.random.default_rng([seed, epoch])


def average_gradients(criteria: nn.Module, world_size: int) -> None:
    """Give every process the same gradient of the losses' own parameters, that of the joint batch.

    A process knows the part of the model's gradient that is due to its own images. DistributedDataParallel takes
    the mean of the parts, and DistributedLossWrapper multiplies by the number of processes to make it a sum. Of
    the gradient of class and hierarchical proxies, every process knows the whole, times that number.
    """
    for parameter in criteria.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= world_size**2


class Trainer:
    """What a run changes, and saves: model, losses, optimizer, and the log so far."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args, self.settings = args, settings
        self.device = torch.device(args.device)
        self.distributed = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        self.what = {
            name: getattr(args, name)
            for name in ("dataset", "random_split", "base_loss", "image_size", "precision", "seed")
        }
        self.what |= {"processes": self.world_size, **dataclasses.asdict(settings)}
        self.benchmark = BENCHMARKS[args.dataset]
        if args.random_split:
            self.benchmark = dataclasses.replace(self.benchmark, dataset=partial(ImageFolders, seed=args.seed))
        self.superclasses = read_taxonomy(args.taxonomy, args.data) if args.taxonomy else None
        mean, std, _ = pixels_of(settings.model)
        self.pixels: dict[str, Any] = {"size": args.image_size, "mean": mean, "std": std}
        self.train_set = self.benchmark.train_set(args.data, train_transform(**self.pixels))
        num_classes = len(set(self.train_set.labels))

        torch.manual_seed(args.seed)  # all processes start alike
        pretrained = not (args.no_pretrained or args.resume)
        model = EmbeddingModel(settings, args.image_size, pretrained)
        # Convolutions are faster in this layout.
        self.model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.criteria = make_criteria(args.base_loss, num_classes, settings).to(self.device)
        self.optimizer = make_optimizer(self.model, self.criteria, settings)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.log: list[dict[str, Any]] = []
        if args.resume:
            self.load()
        self.loss_func = weighted_sum(self.criteria, settings.hier_weight, self.distributed)
        self.parallel = DistributedDataParallel(self.model) if self.distributed else self.model

    def run(self) -> None:
        if self.args.eval_first and not self.log:
            start = time.perf_counter()
            self.record({"epoch": 0, **self.evaluate()}, start)
        done = self.log[-1]["epoch"] if self.log else 0
        for epoch in range(done + 1, self.settings.epochs + 1):
            start = time.perf_counter()
            row = {"epoch": epoch, "loss": self.train_epoch(epoch)}
            if epoch % self.args.eval_every == 0 or epoch == self.settings.epochs:
                row |= self.evaluate()
            self.record(row, start)

    def record(self, row: dict[str, Any], start: float) -> None:
        self.log.append({**row, "seconds": round(time.perf_counter() - start, 1)})
        if self.rank == 0:
            self.save()
            tqdm.write(json.dumps(self.log[-1]))

    def train_epoch(self, epoch: int) -> float:
        """Mean loss."""
        settings = self.settings
        seed_epoch(self.args.seed, epoch, self.rank)
        batches = batches_of_epoch(self.train_set.labels, settings, self.rank, self.world_size)
        loader = DataLoader(self.train_set, batch_sampler=batches, **self.loading())
        parameters = [*self.model.parameters(), *self.criteria.parameters()]
        self.parallel.train()
        total = 0.0
        title = f"epoch {epoch}/{settings.epochs}"
        with tqdm(loader, desc=title, unit="batch", disable=self.rank > 0) as progress:
            for images, labels in progress:
                self.optimizer.zero_grad()
                with self.autocast():
                    embeddings = self.parallel(images.to(self.device, non_blocking=True))
                # In float32, because PML turns its proxies into the dtype of the embeddings.
                loss = self.loss_func(embeddings.float(), labels.to(self.device, non_blocking=True))
                self.scaler.scale(loss).backward()
                if self.distributed:
                    average_gradients(self.criteria, self.world_size)
                if epoch <= settings.warmup_epochs:
                    # Dropped here rather than not computed, because DistributedDataParallel expects them.
                    self.model.backbone.zero_grad()
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_value_(parameters, settings.clip_grad)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                value = loss.item() / self.world_size
                total += value
                progress.set_postfix(loss=f"{value:.3f}")
        return total / len(batches)

    def evaluate(self) -> dict[str, Any]:
        """R@k in both spaces, scores of the taxonomy if there is one, and the share of clipped embeddings."""
        if self.distributed:
            for buffer in self.model.buffers():  # statistics of batch norm differ between processes
                dist.broadcast(buffer, 0)
        query = self.embed(self.benchmark.query)
        gallery = self.embed(self.benchmark.gallery) if self.benchmark.gallery else (None, None)
        cosine = CosineSimilarity()
        poincare = PoincareDistance(c=self.settings.c, clip_radius=self.settings.clip_radius)
        result: dict[str, Any] = {
            "cosine": recall(CustomKNN(cosine, batch_size=1000), self.benchmark.recall_at, *query, *gallery),
            "poincare": recall(PoincareKNN(poincare), self.benchmark.recall_at, *query, *gallery),
        }
        if self.superclasses is not None:
            for space, distance in {"cosine": cosine, "poincare": poincare}.items():
                result[space] |= taxonomy_scores(distance, *query, self.superclasses)
        result["clipped"] = float((query[0].norm(dim=1) >= self.settings.clip_radius).double().mean())
        return result

    @torch.no_grad()
    def embed(self, split: str) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of a split, which the processes share out among themselves."""
        dataset = self.benchmark.dataset(str(self.args.data), split, eval_transform(**self.pixels))
        part = Subset(dataset, range(self.rank, len(dataset), self.world_size))
        loader = DataLoader(part, batch_size=self.settings.batch_size, **self.loading())
        self.model.eval()
        embeddings, labels = [], []
        for images, targets in tqdm(loader, desc=split, unit="batch", disable=self.rank > 0, leave=False):
            with self.autocast():
                embeddings.append(self.model(images.to(self.device, non_blocking=True)).float())
            labels.append(targets)
        own = torch.cat(embeddings).cpu(), torch.cat(labels)
        parts: list[Any] = [own] * self.world_size
        if self.distributed:
            dist.all_gather_object(parts, own)
        embedded, of_class = (torch.cat(tensors).to(self.device) for tensors in zip(*parts, strict=True))
        return embedded, of_class

    def loading(self) -> dict[str, Any]:
        return {"num_workers": self.args.workers, "pin_memory": self.args.device == "cuda"}

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.args.precision]
        return torch.autocast(self.args.device, dtype, enabled=dtype != torch.float32)

    def save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        checkpoint = self.args.output / "checkpoint.pt"
        torch.save({"what": self.what, "log": self.log, **parts}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)  # whole, or not at all
        (self.args.output / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.log))

    def load(self) -> None:
        checkpoint = torch.load(self.args.output / "checkpoint.pt", map_location="cpu", weights_only=True)
        before = checkpoint["what"]
        changed = [name for name in self.what if name != "epochs" and before[name] != self.what[name]]
        if changed:
            raise ValueError(
                "a run can be resumed with other epochs alone; got "
                + ", ".join(f"{name} {self.what[name]!r}, expected {before[name]!r}" for name in changed)
            )
        for name in STATEFUL:
            getattr(self, name).load_state_dict(checkpoint[name])
        self.log = checkpoint["log"]


# --- evaluation ---------------------------------------------------------------------------------------------


def recall(
    knn_func: Any,
    recall_at: Sequence[int],
    query: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
) -> dict[str, float]:
    """R@k in %: how many queries have one of their class among their k nearest.

    Without a gallery, queries are searched for among the other queries.
    """
    alone = gallery is None or gallery_labels is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    most = min(max(recall_at), len(gallery) - alone)
    _, neighbors = knn_func(query, most, gallery, ref_includes_query=alone)
    hits = gallery_labels[neighbors] == query_labels[:, None]
    return {f"R@{k}": 100 * float(hits[:, :k].any(1).double().mean()) for k in recall_at}


def taxonomy_scores(
    distance: BaseDistance, embeddings: Tensor, labels: Tensor, superclasses: Tensor
) -> dict[str, float]:
    """MAP@R of the classes, precision at 20 of their superclasses, and H-AP, in %."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:MOST_RANKED]
    embeddings, labels = embeddings.cpu()[drawn], labels.cpu()[drawn]
    superclass = superclasses[labels]
    knn_func = CustomKNN(distance, batch_size=1000)
    calculator = AccuracyCalculator(
        ("mean_average_precision_at_r",), k="max_bin_count", knn_func=knn_func, device=torch.device("cpu")
    )
    _, nearest = knn_func(embeddings, min(20, len(labels) - 1), embeddings, ref_includes_query=True)
    matrix = distance(embeddings)
    taxonomy = torch.stack([labels, superclass], 1)
    return {
        "MAP@R": 100 * calculator.get_accuracy(embeddings, labels)["mean_average_precision_at_r"],
        "superclass P@20": 100 * float((superclass[nearest] == superclass[:, None]).double().mean()),
        "H-AP": 100 * hierarchical_average_precision(-matrix if distance.is_inverted else matrix, taxonomy),
    }


# --- program ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    args, settings = parse(argv)
    if (args.output / "checkpoint.pt").exists() != args.resume:
        raise SystemExit(
            f"{args.output} has no checkpoint.pt to resume from"
            if args.resume
            else f"{args.output} has a checkpoint.pt: pass --resume to go on from it, or another --output"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    distributed = "LOCAL_RANK" in os.environ  # set by torchrun
    if distributed:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        Trainer(args, settings).run()
    finally:
        if distributed:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
