"""Margins and temperatures to start from, for base losses of PML with `PoincareDistance`.

    python -m benchmarks.margins --data PATH

A linear head on the frozen features of `python -m benchmarks.evidence` is trained for 200 steps with each loss and
value, and scored on validation classes, by hyperbolic distance. Mean of three seeds. Cosine distance with PML's
default is in the first row of each loss.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from rich.progress import track

from hierloss import PoincareDistance, PoincareKNN

from . import report
from .evidence import data, training

EMBEDDING_SIZE = training.EMBEDDING_SIZE
CLASSES = 67  # of CUB's training part; more than there are elsewhere

Make = Callable[..., Any]
LOSSES: dict[str, tuple[Make, tuple[Any, ...]]] = {
    "NTXentLoss(temperature)": (
        lambda value, **d: losses.NTXentLoss(temperature=value, **d),
        (0.07, 0.2, 0.5, 1.0),
    ),
    "SupConLoss(temperature)": (
        lambda value, **d: losses.SupConLoss(temperature=value, **d),
        (0.1, 0.2, 0.5, 1.0),
    ),
    "TripletMarginLoss(margin)": (
        lambda value, **d: losses.TripletMarginLoss(margin=value, **d),
        (0.05, 0.2, 0.5, 1.0, 2.0),
    ),
    "ContrastiveLoss(neg_margin)": (
        lambda value, **d: losses.ContrastiveLoss(neg_margin=value, **d),
        (1.0, 2.0, 4.0, 6.0),
    ),
    "ProxyNCALoss(softmax_scale)": (
        lambda value, **d: losses.ProxyNCALoss(CLASSES, EMBEDDING_SIZE, softmax_scale=value, **d),
        (1.0, 2.0, 5.0, 10.0),
    ),
}
COSINE: dict[str, Any] = {
    "NTXentLoss(temperature)": 0.07,
    "SupConLoss(temperature)": 0.1,
    "TripletMarginLoss(margin)": 0.05,
    "ContrastiveLoss(neg_margin)": 0.5,
    "ProxyNCALoss(softmax_scale)": 10.0,
}


def score(
    split: data.Split, make: Make, value: float, distance: BaseDistance | None, seed: int, steps: int
) -> float:
    """MAP@R of validation classes, in percent; without a distance, that of the loss's default and cosine."""
    torch.manual_seed(seed)
    labels = split.train.taxonomy[:, 0].unique(return_inverse=True)[1]
    head = training.make_head(split.train.features.shape[1])
    base = make(value, **({} if distance is None else {"distance": distance}))
    groups = [{"params": head.parameters(), "lr": training.LR}, {"params": [*base.parameters()], "lr": 1e-2}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    batches = training.make_batches(labels, seed)
    for _ in range(steps):
        rows = next(batches)
        optimizer.zero_grad()
        base(head(split.train.features[rows]), labels[rows]).backward()
        optimizer.step()
    knn = CustomKNN(CosineSimilarity()) if distance is None else PoincareKNN(distance)
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), knn_func=knn)
    with torch.no_grad():
        embeddings = head(split.validation.features)
    accuracy = calculator.get_accuracy(embeddings, split.validation.taxonomy[:, 0])
    return 100 * float(accuracy["mean_average_precision_at_r"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables of features")
    parser.add_argument("--datasets", nargs="+", choices=data.TABLES, default=list(data.TABLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, help="folder for the JSON (default: benchmarks/results)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = {name: data.load(name, args.data) for name in args.datasets}
    todo = [
        (loss, distance, value)
        for loss, (_, values) in LOSSES.items()
        for distance, value in [("cosine", COSINE[loss]), *(("Poincaré", value) for value in values)]
    ]
    rows = []
    for loss, distance, value in track(todo, description="margins"):
        row: dict[str, Any] = {"loss": loss, "distance": distance, "value": value}
        for name, table in tables.items():
            ball = PoincareDistance() if distance == "Poincaré" else None
            scores = [
                score(data.split(table, 100 + seed), LOSSES[loss][0], value, ball, seed, args.steps)
                for seed in range(args.seeds)
            ]
            row[f"MAP@R, {name}"] = round(float(np.mean(scores)), 1)
        rows.append(row)
    report.show(f"MAP@R of validation classes after {args.steps} steps, n = {args.seeds}", rows)
    report.write("margins", torch.device("cpu"), rows, None, args.output)


if __name__ == "__main__":
    main()
