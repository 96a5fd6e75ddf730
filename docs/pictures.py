"""Draws the pictures of docs/how-it-works.md and docs/choosing.md: python docs/pictures.py, from a clone."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pytorch_metric_learning import losses
from torch import Tensor, nn

from hierloss import Hierarchy, HIERLoss, PoincareDistance, ReciprocalNeighborMiner
from hierloss.plotting import plot_disk, plot_embeddings

FOLDER = Path(__file__).parent / "images" / "concepts"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, figure in {"room": room(), "ancestors": ancestors(), **training(), **parameters()}.items():
        figure.savefig(FOLDER / f"{name}.png", dpi=100, bbox_inches="tight")
        plt.close(figure)


def room() -> Figure:
    """A regular tree of 2^6 leaves, whose levels are evenly spaced."""
    matrix, first = [], 0
    for level in range(6):
        width = 2 ** (6 - level)
        matrix += [[first + i, first + i + 1, level + 1, 2 ** (level + 1)] for i in range(0, width, 2)]
        first += width
    tree = Hierarchy(matrix)
    _, ax = plt.subplots(figsize=(6, 6))
    plot_disk(tree, labels=np.arange(64) // 16, class_names=["first", "second", "third", "fourth"], ax=ax)
    ax.get_legend().remove()
    return ax.figure


def ancestors() -> Figure:
    """Three points and the chance of each proxy to be their lowest common ancestor."""
    points = torch.tensor([[1.1, 0.7], [1.1, -0.7], [-2.2, 0.0]])
    directions = torch.arange(12) * (2 * torch.pi / 12)
    rings = [
        radius * torch.stack([directions[::step].cos(), directions[::step].sin()], 1)
        for radius, step in ((0.15, 3), (0.8, 2), (1.6, 1))
    ]
    proxies = torch.cat(rings)
    distance = PoincareDistance()
    to_proxies = distance(points, proxies)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.6))
    for ax, members, title in zip(
        axes,
        ([0, 1], [0, 1, 2]),
        ("lowest common ancestor of i and j", "lowest common ancestor of i, j and k"),
        strict=True,
    ):
        chance = (-to_proxies[members].amax(0) / 0.1).softmax(0)
        plot_embeddings(points, torch.arange(3), proxies, class_names="ijk", distance=distance, ax=ax)
        *dots, crosses = ax.collections
        for dot in dots:
            dot.set(sizes=[70], alpha=1)
        crosses.set_sizes((22 + 500 * chance).tolist())
        ax.get_legend().remove()
        for name, dot in zip("ijk", dots, strict=True):
            ax.annotate(
                name, dot.get_offsets()[0], (9, 6), textcoords="offset points", fontsize=14, style="italic"
            )
        ax.set_title(title, fontsize=12)
    return figure


def training() -> dict[str, Figure]:
    """A small network before and after training on nine classes in three groups, and the tree that was learned."""
    torch.manual_seed(0)
    groups = 4 * torch.randn(3, 1, 1, 16)
    classes = groups + 2 * torch.randn(3, 3, 1, 16)
    samples = (classes + 0.7 * torch.randn(3, 3, 20, 16)).flatten(0, 2)
    labels = torch.arange(9).repeat_interleave(20)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    distance = PoincareDistance()
    base = losses.ProxyAnchorLoss(9, 8)
    miner = ReciprocalNeighborMiner(triplets_per_anchor=10, distance=distance)
    hier = HIERLoss(num_proxies=48, embedding_size=8, miner=miner, distance=distance, gradient_ratio=0.3)
    loss_func = losses.MultipleLosses([base, hier], weights=[1, 1])
    optimizer = torch.optim.Adam(
        [{"params": model.parameters(), "lr": 3e-4}, {"params": loss_func.parameters(), "lr": 3e-3}]
    )
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.6))
    names = [f"class {group}{letter}" for group in "ABC" for letter in "123"]

    def draw(ax: plt.Axes, title: str) -> None:
        plot_embeddings(model(samples).detach(), labels, hier.proxies, class_names=names, distance=distance, ax=ax)
        ax.set_title(title, fontsize=12)

    draw(axes[0], "before training")
    axes[0].get_legend().remove()
    for step in range(300):
        if step == 50:  # embeddings mean something by now
            hier.init_proxies(model(samples))
        batch = torch.randperm(len(samples))[:90]
        optimizer.zero_grad()
        loss_func(model(samples[batch]), labels[batch]).backward()
        optimizer.step()
    draw(axes[1], "after 300 steps")
    tree = hier.hierarchy(model(samples).detach(), labels)
    _, ax = plt.subplots(figsize=(7.5, 6))
    plot_disk(tree, class_names=names, max_leaves=60, ax=ax)
    return {"training": figure, "tree": ax.figure}


def parameters() -> dict[str, Figure]:
    """The same features for other curvatures and clip radii."""
    directions = torch.arange(6) * (2 * torch.pi / 6)
    torch.manual_seed(0)
    norms = 0.3 + 3.2 * torch.rand(6, 25, 1)
    angles = directions[:, None] + 0.16 * torch.randn(6, 25)
    features = (norms * torch.stack([angles.cos(), angles.sin()], 2)).flatten(0, 1)
    labels = torch.arange(6).repeat_interleave(25)
    return {
        "c": _row(features, labels, [(f"c = {c}", PoincareDistance(c=c)) for c in (0.01, 0.1, 1.0)]),
        "clip-radius": _row(
            features,
            labels,
            [(f"clip_radius = {radius}", PoincareDistance(clip_radius=radius)) for radius in (1.0, 2.3, 5.0)],
        ),
    }


def _row(features: Tensor, labels: Tensor, panels: list[tuple[str, PoincareDistance]]) -> Figure:
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4.8))
    for ax, (title, distance) in zip(axes, panels, strict=True):
        plot_embeddings(features, labels, distance=distance, ax=ax)
        ax.get_legend().remove()
        ax.set_title(title, fontsize=12)
    return figure


if __name__ == "__main__":
    main()
