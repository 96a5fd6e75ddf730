"""Train with and without HIER on handwritten digits, retrieve among digits never seen, and draw the disk.

The data are scikit-learn's 1,797 digits, which need no download. A small convolutional network learns from the
digits 0 to 4, with ProxyAnchorLoss alone and with HIERLoss added through MultipleLosses; both start from the
same weights and see the same batches. Retrieval is tested among the digits 5 to 9.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from pytorch_metric_learning import losses, samplers
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from rich.console import Console
from rich.table import Table
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from hierloss import HIERLoss
from hierloss.plotting import plot_embeddings

EMBEDDING_SIZE = 64
METRICS = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of repetitions")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--gradient-ratio", type=float, default=0.3, help="gradient of HIER over the base loss's")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    args = parser.parse_args()

    images, digits = load_digits(return_X_y=True)
    images = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    digits = torch.from_numpy(digits)
    seen = digits < 5
    train_set, test_set = (images[seen], digits[seen]), (images[~seen], digits[~seen])

    methods = {"ProxyAnchor": False, "ProxyAnchor + HIER": True}
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    with tqdm(total=args.seeds * len(methods) * args.epochs, unit="epoch") as progress:
        for seed in range(args.seeds):
            for name, with_hier in methods.items():
                torch.manual_seed(seed)
                model = make_model()
                base = losses.ProxyAnchorLoss(num_classes=5, embedding_size=EMBEDDING_SIZE)
                hier = HIERLoss(num_proxies=128, gradient_ratio=args.gradient_ratio)
                # The one line that adds HIER to a loss.
                both = losses.MultipleLosses([base, hier])
                progress.set_description(f"seed {seed}, {name}")
                train(model, both if with_hier else base, *train_set, seed, args.epochs, progress)
                scores[name].append(retrieve(model, *test_set))

    Console().print(table_of(scores))
    with torch.no_grad():
        embeddings = model.eval()(test_set[0])
    plot_embeddings(
        embeddings,
        test_set[1],
        hier.proxies,
        distance=hier.distance,
        class_names={digit: f"digit {digit}" for digit in range(5, 10)},
    )
    plt.savefig(args.output, dpi=120, bbox_inches="tight")
    print(f"Digits never seen in training, and the proxies that HIER learned: {args.output}")


def make_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 16, EMBEDDING_SIZE),
    )


def train(
    model: nn.Module,
    loss_func: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
    epochs: int,
    progress: "tqdm[int]",
) -> None:
    # The parameters of the losses are trained too, proxies faster than the network.
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    np.random.seed(seed)  # noqa: NPY002  (PML's sampler draws from it)
    sampler = samplers.MPerClassSampler(labels, m=18, length_before_new_iter=len(labels))
    loader = DataLoader(TensorDataset(images, labels), batch_size=90, sampler=sampler, drop_last=True)
    for _ in range(epochs):
        for batch, targets in loader:
            optimizer.zero_grad()
            loss_func(model(batch), targets).backward()
            optimizer.step()
        progress.update()


def retrieve(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    with torch.no_grad():
        embeddings = model.eval()(images)
    calculator = AccuracyCalculator(include=tuple(METRICS), knn_func=CustomKNN(CosineSimilarity()))
    accuracy: dict[str, float] = calculator.get_accuracy(embeddings, labels)
    return {name: 100 * accuracy[key] for key, name in METRICS.items()}


def table_of(scores: dict[str, list[dict[str, float]]]) -> Table:
    """Means and standard deviations, and the paired difference with its 95% confidence interval."""
    seeds = len(next(iter(scores.values())))
    table = Table(
        "", *METRICS.values(), title=f"Retrieval among digits never seen, in %, mean ± sd of {seeds} seeds"
    )
    values = {
        name: np.array([[run[metric] for metric in METRICS.values()] for run in runs])
        for name, runs in scores.items()
    }
    for name, runs in values.items():
        table.add_row(name, *(f"{m:.1f} ± {s:.1f}" for m, s in zip(runs.mean(0), spread(runs), strict=True)))
    without, with_hier = values.values()
    difference = with_hier - without
    half_width = stats.t.ppf(0.975, max(seeds - 1, 1)) * spread(difference) / math.sqrt(seeds)
    table.add_row(
        "difference (95% interval)",
        *(f"{m:+.1f} ± {h:.1f}" for m, h in zip(difference.mean(0), half_width, strict=True)),
    )
    return table


def spread(runs: "np.ndarray") -> "np.ndarray":
    return runs.std(0, ddof=1) if len(runs) > 1 else np.full(runs.shape[1], math.nan)


if __name__ == "__main__":
    main()
