"""Train HIER on handwritten digits, and look at the hierarchy it finds among images never seen.

A small network learns the digits from half of scikit-learn's images, with flat labels. The tree over other images
is scored by how well its subtrees separate the digits, and written as pictures and as a page to hover over and
fold. A tree of the pixels is scored for comparison.

``--features FILE.npz`` draws the classes of other data instead, by their mean features, without training: the file
has ``features`` (N, D), ``label`` (N,) and superclasses (N,), whose name is ``--superclass``.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from pytorch_metric_learning import losses
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from hierloss import Hierarchy, HIERLoss
from hierloss.metrics import ami_per_level, dendrogram_purity
from hierloss.plotting import plot_dendrogram, plot_disk, write_html

EMBEDDING_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=300, help="number of images in the tree")
    parser.add_argument("--output", type=Path, default=Path("hierarchy"), help="folder for pictures and page")
    parser.add_argument("--features", type=Path, help="draw the classes in this .npz file instead of digits")
    parser.add_argument("--superclass", default="family", help="name of the superclasses in that file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.features is not None:
        draw_classes(np.load(args.features), args.superclass, args.output, args.features.stem)
        return
    torch.manual_seed(args.seed)

    data, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(data).float().view(-1, 1, 8, 8) / 16
    digits = torch.from_numpy(targets)
    shuffled = torch.randperm(len(digits))
    seen, chosen = shuffled[: len(digits) // 2], shuffled[len(digits) // 2 :][: args.samples]
    model, hier = train(images[seen], digits[seen], args.epochs)
    with torch.no_grad():
        embeddings = model.eval()(images[chosen])
    labels = digits[chosen]
    tree = hier.hierarchy(embeddings, labels)

    trees = {f"HIER, {kind} linkage": hier.hierarchy(embeddings, linkage=kind) for kind in ("average", "ward")}
    trees["pixels, average linkage"] = Hierarchy.from_embeddings(images[chosen].flatten(1))
    table = Table("tree", "dendrogram purity", "AMI of 10 groups", title=f"{len(labels)} images never seen")
    for name, other in trees.items():
        table.add_row(
            name, f"{dendrogram_purity(other, labels):.3f}", f"{ami_per_level(other, labels[:, None])[0]:.3f}"
        )
    Console().print(table)

    pictures = np.repeat(np.repeat(1 - images[chosen].squeeze(1).numpy(), 4, 1), 4, 2)
    names = {digit: f"digit {digit}" for digit in range(10)}
    plot_disk(tree, labels=labels, class_names=names, images=pictures, max_leaves=100)
    plt.savefig(args.output / "disk.png", dpi=110)
    plot_dendrogram(tree, labels=labels, class_names=names, max_leaves=100)
    plt.savefig(args.output / "dendrogram.png", dpi=110)
    page = args.output / "hierarchy.html"
    write_html(tree, page, labels=labels, class_names=names, images=pictures, max_leaves=100)
    print(f"Wrote disk.png, dendrogram.png and hierarchy.html to {args.output}")


def draw_classes(data: Mapping[str, np.ndarray], superclass: str, folder: Path, name: str) -> None:
    features, labels = torch.from_numpy(data["features"]).float(), data["label"]
    tree = Hierarchy.from_embeddings(features, labels, per_class=True)
    classes, first = np.unique(labels, return_index=True)
    names = [str(label).split(".")[-1].replace("_", " ") for label in classes.tolist()]
    superclasses = data[superclass][first]
    for kind, plot in {"disk": plot_disk, "dendrogram": plot_dendrogram}.items():
        plot(tree, labels=superclasses, names=names)
        plt.savefig(folder / f"{name}-{kind}.png", dpi=90)
        Image.open(folder / f"{name}-{kind}.png").quantize().save(folder / f"{name}-{kind}.png")  # half the size
    write_html(tree, folder / f"{name}.html", labels=superclasses, names=names, title=name)
    print(f"Wrote {name}-disk.png, {name}-dendrogram.png and {name}.html to {folder}")


def train(images: Tensor, labels: Tensor, epochs: int) -> tuple[nn.Module, HIERLoss]:
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
        nn.Linear(64 * 16, EMBEDDING_SIZE),
    )
    hier = HIERLoss(num_proxies=128, embedding_size=EMBEDDING_SIZE)
    loss_func = losses.MultipleLosses([losses.MultiSimilarityLoss(), hier])
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    for epoch in tqdm(range(epochs), unit="epoch"):
        model.train()
        for batch in torch.randperm(len(labels)).split(90):
            optimizer.zero_grad()
            loss_func(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch == 0:  # embeddings mean something now: start the proxies from them
            with torch.no_grad():
                hier.init_proxies(model.eval()(images))
    return model, hier


if __name__ == "__main__":
    main()
