"""Every loss of pytorch-metric-learning alone and with HIER, in one table.

Each trains a small network on scikit-learn's digits 0 to 4, from the same weights and on the same batches, and is
judged by retrieval among the digits 5 to 9. This shows that HIER can be added to all of them, and how; it is one
short run of each, with PML's default settings, and says little about which is better. The first row is the network
before training: on pictures as easy as these, learning five digits mostly makes retrieval among the others worse.
"""

import argparse
import inspect
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning import losses, samplers
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from hierloss import HIERLoss

NUM_CLASSES, EMBEDDING_SIZE, BATCH_SIZE = 5, 64, 60
METRICS = {"R@1": "precision_at_1", "MAP@R": "mean_average_precision_at_r"}

CLASSES = {"num_classes": NUM_CLASSES, "embedding_size": EMBEDDING_SIZE}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ArcFaceLoss": CLASSES,
    "CosFaceLoss": CLASSES,
    "CrossBatchMemory": {
        "loss": losses.MultiSimilarityLoss(),
        "embedding_size": EMBEDDING_SIZE,
        "memory_size": 2 * BATCH_SIZE,
    },
    "HistogramLoss": {"n_bins": 50},
    "LargeMarginSoftmaxLoss": CLASSES,
    "ManifoldLoss": {"l": EMBEDDING_SIZE},
    "NormalizedSoftmaxLoss": CLASSES,
    "P2SGradLoss": {"num_classes": NUM_CLASSES, "descriptors_dim": EMBEDDING_SIZE},
    "ProxyAnchorLoss": CLASSES,
    "ProxyNCALoss": CLASSES,
    "RankedListLoss": {"margin": 0.4, "Tn": 10, "alpha": 1.2},
    "SoftTripleLoss": CLASSES,
    "SphereFaceLoss": CLASSES,
    "SubCenterArcFaceLoss": CLASSES,
}
WITHOUT_LABELS = {"ManifoldLoss"}  # it refuses them; HIER does without them too
NOT_TRAINED = {
    "BaseLossWrapper": "a base class",
    "BaseMetricLossFunction": "a base class",
    "DynamicSoftMarginLoss": "fails in its second training step, also alone, for it keeps the graph of the first",
    "GenericPairLoss": "a base class",
    "MultipleLosses": "the sum itself, here of each loss and HIER",
    "SelfSupervisedLoss": "compares two views, and MultipleLosses hands on one; put HIER inside, as the "
    "embedding_regularizer of the loss it wraps",
    "VICRegLoss": "compares two views, and MultipleLosses hands on one; add HIER of the concatenated views to it",
}


def main() -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="training steps of each loss")
    parser.add_argument("--gradient-ratio", type=float, default=0.1, help="gradient of HIER over the base loss's")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--losses", nargs="+", metavar="NAME", help="only these; all if not given")
    args = parser.parse_args()

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < NUM_CLASSES

    kinds = {name: kind for name, kind in vars(losses).items() if inspect.isclass(kind)}
    modules = {name for name, kind in kinds.items() if issubclass(kind, nn.Module)}
    names = sorted(args.losses or modules - NOT_TRAINED.keys())
    # Percentages of R@1 and MAP@R, alone and with HIER.
    scores: dict[str, np.ndarray] = {}
    for name in (progress := tqdm(names, unit="loss")):
        progress.set_description(name)
        runs = []
        for with_hier in (False, True):
            torch.manual_seed(args.seed)
            model = make_model()
            base = getattr(losses, name)(**ARGUMENTS.get(name, {}))
            # The one line that adds HIER to a loss, whichever it is.
            hier = HIERLoss(num_proxies=64, gradient_ratio=args.gradient_ratio)
            both = losses.MultipleLosses([base, hier])
            loss_func = both if with_hier else base
            train(model, loss_func, images[seen], labels[seen], name not in WITHOUT_LABELS, args.steps, args.seed)
            runs.append(retrieve(model, images[~seen], labels[~seen]))
        scores[name] = np.array(runs)
    torch.manual_seed(args.seed)
    untrained = retrieve(make_model(), images[~seen], labels[~seen])

    title = f"Retrieval among digits never seen, in %, after {args.steps} steps, one run of each"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for metric in METRICS:
        for column in (metric, "+ HIER", "diff."):
            table.add_column(column, justify="right", no_wrap=True)
    table.add_row("untrained network", f"{untrained[0]:.1f}", "", "", f"{untrained[1]:.1f}")
    for name, (alone, with_hier) in scores.items():
        columns = zip(alone, with_hier, with_hier - alone, strict=True)
        table.add_row(name, *(cell for a, b, d in columns for cell in (f"{a:.1f}", f"{b:.1f}", f"{d:+.1f}")))
    console = Console()
    console.print(table)
    console.print("Not in the table:")
    for name in sorted(NOT_TRAINED.keys() & modules):
        console.print(f"- {name}: {NOT_TRAINED[name]}")
    return scores


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE))


def train(
    model: nn.Module, loss_func: nn.Module, images: Tensor, labels: Tensor, has_labels: bool, steps: int, seed: int
) -> None:
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    np.random.seed(seed)  # noqa: NPY002  (PML's sampler draws from it)
    sampler = samplers.MPerClassSampler(labels, BATCH_SIZE // NUM_CLASSES, BATCH_SIZE, steps * BATCH_SIZE)
    for batch, targets in DataLoader(TensorDataset(images, labels), BATCH_SIZE, sampler=sampler):
        optimizer.zero_grad()
        loss_func(model(batch), targets if has_labels else None).backward()
        optimizer.step()


def retrieve(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    with torch.no_grad():
        embeddings = model.eval()(images)
    calculator = AccuracyCalculator(include=tuple(METRICS.values()), knn_func=CustomKNN(CosineSimilarity()))
    accuracy = calculator.get_accuracy(embeddings, labels)
    return [100 * float(accuracy[key]) for key in METRICS.values()]


if __name__ == "__main__":
    main()
