"""Train with and without HIER on data with a hidden hierarchy, and draw the tree that HIER found.

The data are made here: 64 classes, in 16 families, in 4 orders. Training uses the samples and labels of half of
the classes, and never families and orders. Retrieval is among the other half. Each base loss is trained alone and
with HIER, from the same initial weights, with the same batches.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from hierloss import HIERLoss
from hierloss.metrics import hierarchical_average_precision
from hierloss.plotting import plot_disk

EMBEDDING_SIZE, SAMPLES = 64, 20
BASES = {
    "ProxyAnchor": lambda: losses.ProxyAnchorLoss(num_classes=64, embedding_size=EMBEDDING_SIZE),
    "MultiSimilarity": losses.MultiSimilarityLoss,
}
METRICS = ("R@1", "MAP@R", "H-AP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions, with other data each")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--gradient-ratio", type=float, default=0.1, help="gradient of HIER over the base loss's")
    parser.add_argument("--output", type=Path, default=Path("quickstart.png"), help="where the picture goes")
    args = parser.parse_args()

    scores: dict[str, list[list[float]]] = {name + hier: [] for name in BASES for hier in ("", " + HIER")}
    with tqdm(total=args.seeds * len(scores), unit="run") as progress:
        for seed in range(args.seeds):
            features, taxonomy = make_data(seed)
            seen = torch.isin(taxonomy[:, 0], torch.randperm(64)[:32])
            for name, make_base in BASES.items():
                for with_hier in (True, False):
                    torch.manual_seed(seed)
                    model, base = make_model(), make_base()
                    hier = HIERLoss(64, EMBEDDING_SIZE, gradient_ratio=args.gradient_ratio)
                    # The one line that adds HIER to a loss.
                    both = losses.MultipleLosses([base, hier])
                    train(model, both if with_hier else base, features[seen], taxonomy[seen, 0], args.steps)
                    with torch.no_grad():
                        embeddings = model(features[~seen])
                    scores[name + " + HIER" * with_hier].append(score(embeddings, taxonomy[~seen]))
                    progress.update()
                    if with_hier and seed == 0 and name == "ProxyAnchor":
                        draw(hier, embeddings, taxonomy[~seen], args.output)

    Console().print(table_of(scores))
    print(f"The tree of the classes that training never saw, coloured by their hidden orders: {args.output}")


def make_data(seed: int) -> tuple[Tensor, Tensor]:
    """128 numbers for each sample, of which 32 have the tree, turned; labels of class, family and order."""
    torch.manual_seed(seed)
    means = torch.zeros(1, 32)
    for scale in (0.53, 0.37, 0.27):
        means = means.repeat_interleave(4, 0)
        means = means + scale * torch.randn(means.shape)
    labels = torch.arange(64).repeat_interleave(SAMPLES)
    signal = means[labels] + 0.6 * torch.randn(len(labels), 32)
    features = torch.cat([signal, 0.8 * torch.randn(len(labels), 96)], 1)
    turn = torch.linalg.qr(torch.randn(128, 128))[0]
    return features @ turn, torch.stack([labels, labels // 4, labels // 16], 1)


def make_model() -> nn.Module:
    head = nn.Linear(128, EMBEDDING_SIZE)
    nn.init.orthogonal_(head.weight)
    return nn.Sequential(nn.LayerNorm(128, elementwise_affine=False), head)


def train(model: nn.Module, loss_func: nn.Module, features: Tensor, labels: Tensor, steps: int) -> None:
    # The parameters of the losses are trained too.
    optimizer = torch.optim.Adam(
        [{"params": model.parameters(), "lr": 3e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    rng, classes = np.random.default_rng(0), labels.unique()  # the same batches for all
    for _ in range(steps):
        chosen = torch.from_numpy(rng.permutation(classes.numpy())[:18])  # 18 classes, 5 samples of each
        rows = torch.cat([torch.where(labels == c)[0][rng.permutation(SAMPLES)[:5]] for c in chosen])
        loss = loss_func(model(features[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def score(embeddings: Tensor, taxonomy: Tensor) -> list[float]:
    """R@1 and MAP@R of the classes, and H-AP, which ranks samples of one family and of one order before others."""
    metrics = ("precision_at_1", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=metrics, knn_func=CustomKNN(CosineSimilarity()))
    accuracy = calculator.get_accuracy(embeddings, taxonomy[:, 0])
    similarity = CosineSimilarity()(embeddings)
    return [100 * accuracy[m] for m in metrics] + [100 * hierarchical_average_precision(-similarity, taxonomy)]


def draw(hier: HIERLoss, embeddings: Tensor, taxonomy: Tensor, path: Path) -> None:
    tree = hier.hierarchy(embeddings, taxonomy[:, 0], per_class=True)
    classes = taxonomy[:, 0].unique()
    names = [f"order {c // 16}, family {c // 4}" for c in classes.tolist()]
    plot_disk(tree, labels=classes // 16, class_names=[f"order {k}" for k in range(4)], names=names)
    plt.savefig(path, dpi=110, bbox_inches="tight")


def table_of(scores: dict[str, list[list[float]]]) -> Table:
    """Means and standard deviations, and the paired differences with their 95% confidence intervals."""
    seeds = len(next(iter(scores.values())))
    table = Table("", *METRICS, title=f"Retrieval among classes never seen, in %, mean of {seeds} seeds")
    for name in BASES:
        alone, both = (np.array(scores[name + hier]) for hier in ("", " + HIER"))
        for title, runs in ((name, alone), (f"{name} + HIER", both)):
            table.add_row(title, *(f"{mean:.1f}" for mean in runs.mean(0)))
        spread = (both - alone).std(0, ddof=1) if seeds > 1 else np.full(len(METRICS), math.nan)
        half_width = stats.t.ppf(0.975, max(seeds - 1, 1)) * spread / math.sqrt(seeds)
        means = zip((both - alone).mean(0), half_width, strict=True)
        table.add_row("difference (95% interval)", *(f"{m:+.1f} ± {h:.1f}" for m, h in means))
    return table


if __name__ == "__main__":
    main()
