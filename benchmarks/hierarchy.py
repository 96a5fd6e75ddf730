"""Is the hidden hierarchy discovered? Purity of the learned tree, beside that of other trees.

    python -m benchmarks.hierarchy --data PATH

Models are trained on flat class labels; the trees are over classes, and are scored by dendrogram purity
against superclasses that training never saw. Data: a random tree of 3 levels (4 x 3 x 3 classes, see
tests/trees.py), and, from the folder ``--data``, TREC questions (50 classes in 6 superclasses; Li and Roth 2002,
as embedded by all-MiniLM-L6-v2: ``trec_questions.npz``) and handwritten characters (136 in 5 alphabets; Lake,
Salakhutdinov, Tenenbaum 2015: ``omniglot_small1.zip``, which is images_background_small1.zip of
github.com/brendenlake/omniglot). Three models for each seed, from the same initial
weights and batches: without HIER (its proxies are drawn from the data after training), with HIER and proxies
in random directions at first, and with HIER and proxies initialized from data (`HIERLoss.init_proxies`).

Trees: minimax linkage is `Hierarchy`; "nearest proxy" joins classes that have the same nearest proxy, and these
groups by average linkage of their proxies; average and Ward linkage are of the class means of the same
embeddings. The table holds the mean over the seeds with its 95% confidence interval.
"""

import argparse
import io
import platform
import time
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytorch_metric_learning
import torch
from PIL import Image
from pytorch_metric_learning import losses
from scipy.cluster.hierarchy import linkage
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm
from trees import sample_tree

import hierloss
from hierloss import HIERLoss, ReciprocalNeighborMiner, poincare
from hierloss.hierarchy import Hierarchy
from hierloss.metrics import dendrogram_purity

STARTS = ("no HIER", "random start", "data start")
SUBSET = 1000
"""Samples that proxies are started from."""


def load_trec(folder: Path) -> tuple[Tensor, Tensor]:
    """Features and labels (fine, coarse) of the TREC questions."""
    with np.load(folder / "trec_questions.npz", allow_pickle=True) as file:
        features, names = torch.from_numpy(file["embeddings"].astype(np.float32)), file["label"]
    return features, _numbered(names, [name.split(":")[0] for name in names])


def load_omniglot(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of 28 x 28 and labels (character, alphabet)."""
    images, alphabets, characters = [], [], []
    with zipfile.ZipFile(folder / "omniglot_small1.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png") and "__MACOSX" not in n):
            *_, alphabet, character, _ = name.split("/")
            image = Image.open(io.BytesIO(archive.read(name))).convert("L").resize((28, 28), Image.Resampling.BOX)
            images.append(1 - np.asarray(image, np.float32) / 255)
            alphabets.append(alphabet)
            characters.append(f"{alphabet}/{character}")
    return torch.from_numpy(np.stack(images)).unsqueeze(1), _numbered(characters, alphabets)


def _numbered(*levels: "list[str] | np.ndarray") -> Tensor:
    """Names as numbers, in alphabetical order."""
    return torch.from_numpy(np.stack([np.unique(names, return_inverse=True)[1] for names in levels], 1))


def trunk(features: Tensor) -> torch.nn.Module:
    """Layers from the features to 128 numbers: convolutions for images, one linear layer for vectors."""
    if features.ndim == 2:
        return torch.nn.Sequential(torch.nn.Linear(features.shape[1], 128), torch.nn.ReLU())
    layers: list[torch.nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.GroupNorm(8, outputs)]
        layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 9, 128), torch.nn.ReLU())


def train(
    features: Tensor, labels: Tensor, start: str, seed: int, options: argparse.Namespace
) -> tuple[Tensor, HIERLoss]:
    """Train on flat labels. Returns all embeddings, and the loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(128, options.dim)
    torch.nn.init.orthogonal_(head.weight)
    torch.nn.init.zeros_(head.bias)
    norm = torch.nn.LayerNorm(128, elementwise_affine=False)  # as in the paper; norms end at the clip radius
    model = torch.nn.Sequential(trunk(features), norm, head)
    base = losses.ProxyAnchorLoss(int(labels.max()) + 1, options.dim)
    miner = ReciprocalNeighborMiner(triplets_per_anchor=options.triplets)
    hier = HIERLoss(options.proxies, options.dim, miner=miner)

    def start_from_data() -> None:
        with torch.no_grad():
            subset = features[torch.randperm(len(features), generator=generator)[:SUBSET]]
            hier.init_proxies(model(subset))

    optimizer = torch.optim.Adam(
        [
            {"params": model.parameters(), "lr": options.lr * (10 if features.ndim == 4 else 1)},
            {"params": [*base.parameters(), *hier.parameters()], "lr": options.lr_proxies},
        ]
    )
    batches = torch.Generator().manual_seed(seed)
    for step in range(options.steps):
        if start == "data start" and step == options.start_after:
            start_from_data()
        rows = torch.randint(len(features), (90,), generator=batches)
        embeddings = model(features[rows])
        loss = base(embeddings, labels[rows])
        if start != "no HIER":
            loss = loss + options.weight * hier(embeddings, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if start == "no HIER":
        start_from_data()
    with torch.no_grad():
        return model(features), hier


def trees(embeddings: Tensor, hier: HIERLoss, labels: Tensor, seed: int) -> dict[str, Hierarchy]:
    """All trees over the classes, by name."""
    classes = int(labels.max()) + 1
    clipped = poincare.clip_norm(embeddings, hier.distance.clip_radius)
    means = torch.stack([clipped[labels == k].mean(0) for k in range(classes)])
    chance = torch.Generator().manual_seed(seed)
    nearest = hier.proxy_distances(means).argmin(1)
    proxies = hier.proxies.detach()
    return {
        "minimax linkage": hier.hierarchy(embeddings, labels, per_class=True),
        "nearest proxy": Hierarchy.from_linkage(linkage(proxies[nearest].double().numpy(), "average")),
        "average linkage": Hierarchy.from_linkage(linkage(means.double().numpy(), "average")),
        "Ward linkage": Hierarchy.from_linkage(linkage(means.double().numpy(), "ward")),
        "random tree": Hierarchy.from_distances(torch.rand(classes, 64, generator=chance)),
    }


def interval(values: list[float]) -> str:
    """Mean and half-width of its 95% confidence interval."""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with trec_questions.npz and omniglot_small1.zip; without it, synthetic only",
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--proxies", type=int, default=256)
    parser.add_argument("--triplets", type=int, default=10, help="triplets per anchor")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--weight", type=float, default=1.0, help="of HIER")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the network; ten times that for convolutions")
    parser.add_argument("--start-after", type=int, default=0, help="steps before proxies start at data")
    parser.add_argument("--lr-proxies", type=float, default=1e-2, help="of class proxies and hierarchical proxies")
    options = parser.parse_args()

    load = {"synthetic": None} | ({"TREC": load_trec, "Omniglot": load_omniglot} if options.data else {})
    loaded = {name: function(options.data) for name, function in load.items() if function}
    names = list(load)
    scores: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    began = time.perf_counter()
    for name, seed in tqdm([(name, seed) for name in names for seed in range(options.seeds)], unit="seed"):
        features, taxonomy = loaded.get(name) or sample_tree(torch.Generator().manual_seed(seed))
        labels = taxonomy[:, 0]
        upper = torch.stack([taxonomy[labels == k][0, 1:] for k in range(int(labels.max()) + 1)])
        for start in STARTS:
            embeddings, hier = train(features, labels, start, seed, options)
            for kind, tree in trees(embeddings, hier, labels, seed).items():
                for level, of_level in enumerate(upper.T, 1):
                    scores[name, f"level {level}", kind, start].append(dendrogram_purity(tree, of_level))

    print(f"\nDendrogram purity, {options.seeds} seeds, mean ± 95% interval")
    print(f"{vars(options)}")
    for name in names:
        for level in sorted({key[1] for key in scores if key[0] == name}):
            print(f"\n{name}, {level} above the classes\n\n| tree | " + " | ".join(STARTS) + " |")
            print("| --- " * (1 + len(STARTS)) + "|")
            for kind in dict.fromkeys(key[2] for key in scores):
                cells = [interval(scores[name, level, kind, start]) for start in STARTS]
                print(f"| {kind} | " + " | ".join(cells) + " |")
            ours = np.array(scores[name, level, "minimax linkage", "data start"])
            for kind, start in [
                ("minimax linkage", "random start"),
                ("minimax linkage", "no HIER"),
                ("average linkage", "data start"),
                ("Ward linkage", "data start"),
            ]:
                difference = interval(list(ours - np.array(scores[name, level, kind, start])))
                print(f"paired, minimax linkage with data start less {kind}, {start}: {difference}")
    print(
        f"\n{time.perf_counter() - began:.0f} s on {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"pytorch-metric-learning {pytorch_metric_learning.__version__}, hierloss {hierloss.__version__}"
    )


if __name__ == "__main__":
    main()
