"""Scores: against scikit-learn, and definitions written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import linkage
from sklearn.metrics import adjusted_mutual_info_score, average_precision_score

from hierloss import metrics
from hierloss.hierarchy import Hierarchy


def random_tree(leaves, seed, ties):
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 9, (leaves, 1)) if ties else generator.random((leaves, 2))
    return Hierarchy(linkage(points, "single"))


def holding(tree, i, j):
    """The leaves of the largest node, among those at the height at which both meet, that holds both."""
    nodes = [n for n in range(tree.num_nodes) if {i, j} <= set(tree.leaves(n))]
    height = min(tree.heights[nodes])
    return max((set(tree.leaves(n).tolist()) for n in nodes if tree.heights[n] == height), key=len)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_dendrogram_purity_equals_definition(seed, ties):
    tree = random_tree(14, seed, ties)
    if ties:
        assert len(set(tree.heights)) < 8  # several merges at the same height are one node
    labels = np.random.default_rng(seed).integers(0, 4, 14)
    purities = []
    for i, j in itertools.combinations(range(14), 2):
        if labels[i] == labels[j]:
            leaves = holding(tree, i, j)
            purities.append(np.mean([labels[leaf] == labels[i] for leaf in leaves]))
    assert metrics.dendrogram_purity(tree, torch.from_numpy(labels)) == pytest.approx(np.mean(purities), abs=1e-12)


def test_dendrogram_purity_of_known_trees():
    points = np.array([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1]])
    matrix = linkage(points, "average")
    assert metrics.dendrogram_purity(matrix, [0, 0, 1, 1, 2, 2]) == 1
    assert metrics.dendrogram_purity(matrix, list("aabbbb")) == 1
    # One node over all: the purity of a class is its share.
    star = [[0, 1, 1, 2], [2, 4, 1, 3], [3, 5, 1, 4]]
    assert metrics.dendrogram_purity(star, [0, 0, 0, 1]) == 0.75
    with pytest.raises(ValueError, match="different label for each leaf"):
        metrics.dendrogram_purity(star, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\).*\(3,\)"):
        metrics.dendrogram_purity(star, [0, 1, 2])


def test_ami_per_level():
    generator = np.random.default_rng(0)
    points = np.repeat([0.0, 3.0, 10.0, 13.0], 5)[:, None] + generator.random((20, 1))
    taxonomy = np.stack([np.repeat([3, 1, 2, 0], 5), np.repeat([8, 9], 10)], 1)
    matrix = linkage(points, "average")
    assert metrics.ami_per_level(matrix, taxonomy) == pytest.approx([1, 1])
    swapped = taxonomy.copy()
    swapped[[0, 19]] = swapped[[19, 0]]
    expected = [adjusted_mutual_info_score(taxonomy[:, level], swapped[:, level]) for level in (0, 1)]
    assert metrics.ami_per_level(matrix, torch.from_numpy(swapped)) == pytest.approx(expected)
    assert 0 < expected[0] < expected[1] + 1 < 2
    with pytest.raises(ValueError, match=r"taxonomy must have shape \(20, L\)"):
        metrics.ami_per_level(matrix, taxonomy[:10])
    assert metrics.ami_per_level(matrix, swapped[:, 0]) == pytest.approx(expected[:1])  # a single level


# --- rankings -----------------------------------------------------------------------------------------------


def random_ranking(seed, samples=24, levels=3):
    generator = np.random.default_rng(seed)
    fine = generator.integers(0, 8, samples)
    points = torch.from_numpy(generator.normal(size=(samples, 3)))
    return torch.cdist(points, points), np.stack([fine // 2**level for level in range(levels)], 1)


def hierarchical_ap_by_definition(distances, taxonomy, alpha):
    count, depth = taxonomy.shape
    scores = []
    for query in range(count):
        others = sorted((o for o in range(count) if o != query), key=lambda o: distances[query, o])
        level = {o: int((taxonomy[o] == taxonomy[query]).sum()) for o in others}
        sizes = {n: sum(v == n for v in level.values()) for n in range(depth + 1)}
        relevance = {o: (level[o] / depth) ** alpha / sizes[level[o]] if level[o] else 0.0 for o in others}
        score = 0.0
        for rank, k in enumerate(others, 1):
            if relevance[k]:
                score += sum(min(relevance[j], relevance[k]) for j in others[:rank]) / rank
        if sum(relevance.values()):
            scores.append(score / sum(relevance.values()))
    return np.mean(scores)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("seed", range(3))
def test_hierarchical_average_precision_equals_definition(seed, alpha):
    distances, taxonomy = random_ranking(seed)
    expected = hierarchical_ap_by_definition(distances, taxonomy, alpha)
    assert metrics.hierarchical_average_precision(distances, taxonomy, alpha) == pytest.approx(expected, abs=1e-12)


def test_hierarchical_average_precision_of_one_level_is_scikit_learns():
    distances, taxonomy = random_ranking(0)
    fine, expected = taxonomy[:, 0], []
    for query in range(len(fine)):
        others = np.arange(len(fine)) != query
        relevant = fine[others] == fine[query]
        if relevant.any():
            expected.append(average_precision_score(relevant, -distances[query][others]))
    assert metrics.hierarchical_average_precision(distances, fine[:, None]) == pytest.approx(np.mean(expected))


def test_hierarchical_average_precision_of_good_and_bad_order():
    taxonomy = np.array([[0, 0], [0, 0], [1, 0], [1, 0], [2, 1], [2, 1]])
    shared = (taxonomy[:, None] == taxonomy[None]).sum(2)
    perfect = metrics.hierarchical_average_precision(2.0 - shared, taxonomy)
    assert perfect == 1.0
    assert metrics.hierarchical_average_precision(shared * 1.0, taxonomy) < 0.5
    with pytest.raises(ValueError, match="anything relevant"):
        metrics.hierarchical_average_precision(np.ones((3, 3)), np.arange(3)[:, None])


@pytest.mark.parametrize("k", [1, 4])
def test_hierarchical_recall_equals_definition(k):
    distances, taxonomy = random_ranking(1)
    taxonomy[0] = 99, 99, 99  # alone at every level: does not count
    expected = []
    for level in taxonomy.T:
        hits = []
        for query in range(1, len(level)):
            if (level == level[query]).sum() > 1:
                others = sorted((o for o in range(len(level)) if o != query), key=lambda o: distances[query, o])
                hits.append(any(level[o] == level[query] for o in others[:k]))
        expected.append(np.mean(hits))
    assert metrics.hierarchical_recall_at_k(distances, taxonomy, k) == pytest.approx(expected)
    assert expected[0] < expected[2]


def test_the_diagonal_is_not_used():
    distances = np.random.default_rng(0).random((12, 12))
    masked = distances.copy()
    np.fill_diagonal(masked, np.inf)
    taxonomy = np.arange(12)[:, None] // [2, 6]
    for score in (metrics.hierarchical_average_precision, metrics.hierarchical_recall_at_k):
        assert score(masked, taxonomy) == score(distances, taxonomy)
    assert masked[0, 0] == np.inf


def test_recall_without_another_superclass():
    assert math.isnan(metrics.hierarchical_recall_at_k(np.ones((3, 3)), [[0, 7], [1, 7], [2, 7]])[0])


def test_bad_rankings():
    distances, taxonomy = random_ranking(0)
    with pytest.raises(ValueError, match="k must be at most 23"):
        metrics.hierarchical_recall_at_k(distances, taxonomy, 24)
    with pytest.raises(ValueError, match=r"shape \(N, N\), got shape \(3, 24\)"):
        metrics.hierarchical_recall_at_k(distances[:3], taxonomy)
    with pytest.raises(ValueError, match="finite"):
        metrics.hierarchical_recall_at_k(distances / 0, taxonomy)
    with pytest.raises(ValueError, match="alpha"):
        metrics.hierarchical_average_precision(distances, taxonomy, -1.0)
