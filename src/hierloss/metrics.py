r"""Scores of a hierarchy, or of a ranking, against a known taxonomy.

Conventions of this file
    - A tree is a `Hierarchy` or a SciPy linkage matrix; its ``N`` leaves are in the order of the labels.
    - ``labels`` has shape ``(N,)``. A taxonomy is a matrix ``(N, L)`` with one column for each level, **from
      fine to coarse**; samples with equal fine labels are assumed to agree on coarser levels too. A vector
      ``(N,)`` is a taxonomy of one level.
    - ``distances`` are those of all pairs, shape ``(N, N)``; the diagonal is not used. Each sample is a query for
      all others; equal distances rank in the order of the samples.
    - Labels and matrices are tensors or arrays; other shapes raise a `ValueError`.
    - Scores are Python numbers, at most 1, and larger is better; a list has a score for each level.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ._checks import check_count, check_number, to_numpy, to_vector
from .hierarchy import Hierarchy

__all__ = ["ami_per_level", "dendrogram_purity", "hierarchical_average_precision", "hierarchical_recall_at_k"]


def dendrogram_purity(tree: Hierarchy | np.ndarray, labels: Any) -> float:
    r"""Mean purity of the subtrees that join pairs of leaves of the same class.

    .. math:: \mathrm{DP} = \frac{1}{|W|} \sum_{(i, j) \in W}
        \frac{|\mathrm{lvs}(\mathrm{lca}(i, j)) \cap C(i)|}{|\mathrm{lvs}(\mathrm{lca}(i, j))|}

    over all pairs ``W`` of leaves of one class; there must be at least one such pair. It is 1 if and only if each
    class is a subtree. Exact, in time ``O(N * classes)``. Nested merges at equal height count as one node.

    Example:
        >>> dendrogram_purity([[0, 1, 1.0, 2], [2, 3, 2.0, 3]], labels=[1, 2, 1])
        0.6666666666666666

    Source: Heller, Ghahramani, "Bayesian Hierarchical Clustering" (ICML 2005), section 5, as an exact mean
    over all pairs as in Monath et al., "Gradient-based Hierarchical Clustering" (KDD 2019).
    """
    tree = tree if isinstance(tree, Hierarchy) else Hierarchy(tree)
    index = np.unique(to_vector(labels, tree.num_leaves, "leaf"), return_inverse=True)[1]
    starts, stops = tree.spans.T
    node = np.arange(tree.num_nodes)
    for child in range(tree.root - 1, tree.num_leaves - 1, -1):
        if tree.heights[child] == tree.heights[tree.parents[child]]:
            node[child] = node[tree.parents[child]]
    total, pairs = 0.0, 0
    for group in range(index.max() + 1):
        running = np.append(0, (index[tree.leaf_order] == group).cumsum())
        counts = running[stops] - running[starts]
        met = counts * (counts - 1) // 2
        np.subtract.at(met, tree.parents[:-1], met[:-1].copy())  # pairs that meet at the node, not below it
        total += float(met @ (counts / tree.sizes)[node])
        pairs += int(met.sum())
    if pairs == 0:
        raise ValueError("labels must give some class two leaves or more, got a different label for each leaf")
    return total / pairs


def ami_per_level(tree: Hierarchy | np.ndarray, taxonomy: Any) -> list[float]:
    """Agreement of the tree, cut into as many groups as a level has, with that level.

    The score is the mutual information adjusted for chance: 1 for the same groups, about 0 for random ones.

    Example:
        >>> linkage = [[0, 1, 1.0, 2], [2, 3, 2.0, 2], [4, 5, 3.0, 4]]
        >>> ami_per_level(linkage, [[0, 7], [0, 7], [1, 7], [2, 7]])
        [1.0, 1.0]

    Source: Vinh, Epps, Bailey, "Information theoretic measures for clusterings comparison" (JMLR 2010), by
    ``sklearn.metrics.adjusted_mutual_info_score``.
    """
    # Imported here: the import is slow, and in new versions it draws from Python's random generator.
    from sklearn.metrics import adjusted_mutual_info_score

    tree = tree if isinstance(tree, Hierarchy) else Hierarchy(tree)
    levels = _taxonomy(taxonomy, tree.num_leaves)
    return [float(adjusted_mutual_info_score(level, tree.cut(int(level.max()) + 1))) for level in levels.T]


def hierarchical_recall_at_k(distances: Any, taxonomy: Any, k: int = 1) -> list[float]:
    """Recall@k at each level: the share of samples that have an equal label among their ``k`` nearest others.

    ``k`` is at most ``N - 1``. Samples that are alone in their class at a level do not count for it; if all are,
    the share is NaN.

    Example:
        >>> distances = torch.tensor([[0.0], [1.0], [2.5], [3.0]])
        >>> hierarchical_recall_at_k(torch.cdist(distances, distances), [[0, 7], [1, 7], [1, 7], [0, 7]])
        [0.0, 1.0]

    Source: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search" (PAMI 2011) for
    recall@k as metric learning uses it, applied to each level.
    """
    rankings = _rankings(distances)
    levels = _taxonomy(taxonomy, len(distances))
    if check_count("k", k) >= len(levels):
        raise ValueError(f"k must be at most {len(levels) - 1}, the other samples, got {k}")
    nearest = np.stack([order[:k] for order in rankings])
    shares = []
    for level in levels.T:
        hit, counted = (level[nearest] == level[:, None]).any(1), np.bincount(level)[level] > 1
        shares.append(float(hit[counted].mean()) if counted.any() else math.nan)
    return shares


def hierarchical_average_precision(distances: Any, taxonomy: Any, alpha: float = 1.0) -> float:
    r"""H-AP: average precision with partial credit for coarse matches, averaged over all queries.

    For a query, let :math:`\Omega^{(l)}` be the samples that share exactly ``l`` of its ``L`` levels, and
    :math:`\mathrm{rel}(k) = (l / L)^\alpha / |\Omega^{(l)}|` for :math:`k \in \Omega^{(l)}`, but 0 for
    ``l = 0``. Then

    .. math:: \text{H-AP} = \frac{1}{\sum_k \mathrm{rel}(k)} \sum_{k: \mathrm{rel}(k) > 0}
        \frac{\sum_{j: \mathrm{rank}(j) \le \mathrm{rank}(k)} \min(\mathrm{rel}(j), \mathrm{rel}(k))}
        {\mathrm{rank}(k)}

    It is 1 if all rankings go from fine matches to coarse ones. Queries without relevant samples do not count.
    With one level, this is the mean average precision. Larger ``alpha``, at least 0, favours finer levels; 0 gives
    all levels the same sum of relevances.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [5.0], [6.5]])
        >>> hierarchical_average_precision(torch.cdist(points, points), [[0, 0], [0, 0], [1, 0], [1, 0]])
        1.0

    Source: Ramzi, Audebert, Thome, Rambour, Bitot, "Hierarchical Average Precision Training for Pertinent
    Image Retrieval" (ECCV 2022), section 3.1, with the relevances of its experiments.
    """
    rankings = _rankings(distances)
    levels = _taxonomy(taxonomy, len(distances))
    alpha = check_number("alpha", alpha, positive=False)
    found = average_precisions(levels, (levels[order] for order in rankings), alpha)
    if not len(found):
        raise ValueError("taxonomy must give some sample another of its class, got none with anything relevant")
    return float(found.mean())


def average_precisions(query: np.ndarray, ranked: Iterable[np.ndarray], alpha: float = 1.0) -> np.ndarray:
    """H-AP of each query of taxonomy ``(N, L)`` with relevant samples in its ranking, of taxonomy ``(M, L)``."""
    levels = np.arange(query.shape[1] + 1)
    weights = (levels / levels[-1]) ** alpha * (levels > 0)
    scores = []
    for own, others in zip(query, ranked, strict=True):
        shared = (others == own).sum(1)
        of_level = weights / np.maximum(np.bincount(shared, minlength=len(levels)), 1)
        relevance = of_level[shared]
        # min(rel(j), rel(k)) depends on the two levels alone: sum over j, level by level
        gained = (np.minimum.outer(of_level, relevance) * (shared == levels[:, None]).cumsum(1)).sum(0)
        if relevance.any():
            scores.append((gained / np.arange(1, len(shared) + 1)).sum() / relevance.sum())
    return np.array(scores)


def _taxonomy(values: Any, count: int) -> np.ndarray:
    """The taxonomy, the labels of each level numbered from 0."""
    array = to_numpy(values)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] != count or array.shape[1] == 0:
        raise ValueError(f"taxonomy must have shape ({count}, L), from fine to coarse, got shape {array.shape}")
    return np.stack([np.unique(level, return_inverse=True)[1] for level in array.T], 1)


def _rankings(distances: Any) -> Iterator[np.ndarray]:
    """The other samples in the order of their distance from each sample; sorted one by one, to save memory."""
    matrix = to_numpy(distances).astype(np.float64)  # a copy
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2:
        raise ValueError(f"distances must be of 2 samples or more, shape (N, N), got shape {matrix.shape}")
    np.fill_diagonal(matrix, 0)
    if not np.isfinite(matrix).all():
        raise ValueError("distances must be finite, got NaN or infinity")
    np.fill_diagonal(matrix, np.inf)
    return (np.argsort(row, kind="stable")[:-1] for row in matrix)
