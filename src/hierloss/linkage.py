"""Minimax linkage with proxies as candidate prototypes, on NumPy arrays."""

import numpy as np

__all__ = ["check_size", "minimax_linkage", "nodes_of_merges"]

_MAX_LEAVES, _MAX_CELLS = 50_000, 10**8
"""Limits of the tree size: larger inputs raise an error instead of exhausting the memory."""


def check_size(leaves: int, proxies: int, kind: str) -> None:
    """Raise unless there are enough leaves and proxies for a tree, and the tree fits into memory."""
    if leaves < 2:
        raise ValueError(f"distances must hold at least 2 {kind} to make a tree, got {leaves}")
    if proxies < 2:
        raise ValueError(
            f"distances must come with at least 2 proxies, got {proxies}: below a single proxy, the only tree "
            "is the order of distances from it; use a larger num_proxies"
        )
    most = min(_MAX_LEAVES, _MAX_CELLS // proxies)
    if leaves > most:
        raise ValueError(
            f"distances must make at most {most} leaves with {proxies} proxies, got {leaves} {kind}; give labels "
            "and per_class=True for a tree of classes, or a random subsample, for instance "
            f"embeddings[torch.randperm({leaves})[:10_000]]"
        )


def minimax_linkage(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Merge, at each step, the two clusters of lowest joint height, until one is left.

    The height of a set is :math:`h(A) = \min_p \max_{a \in A} d(a, \rho_p)`. The distance of a cluster from a
    proxy is the largest distance of its members. So the lowest joint height is the minimum, over the columns of
    all proxies, of the second smallest entry. The pair is the two clusters nearest to its proxy. A merge removes
    the smaller of the two entries from every column. So each column is sorted once and kept as a linked list, and
    pairs of clusters are never enumerated. Time is ``O(NP log N)``, memory ``O(NP)``.

    Takes distances ``(N, P)``; returns merges ``(N - 1, 2)`` in SciPy's numbering, their heights and proxies.

    Example:
        >>> minimax_linkage(np.array([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
        (array([[0, 1],
               [3, 2]]), array([2., 4.]), array([0, 1]))

    Source: Bien, Tibshirani, "Hierarchical Clustering With Prototypes via Minimax Linkage" (JASA 2011), whose
    prototypes are the samples themselves; here they are the proxies.
    """
    leaves, width = rows.shape
    columns = np.arange(width, dtype=np.int32)
    # Entries are numbered place * width + column; place 0 is the head of a list, leaves + 1 its end.
    order = np.argsort(rows, axis=0, kind="stable").astype(np.int32)
    values = np.full((leaves + 2, width), np.inf)
    values[1:-1] = np.take_along_axis(rows, order, 0)
    entry = np.empty((leaves, width), np.int32)  # of each cluster, in every column
    places = np.arange(1, leaves + 1, dtype=np.int32)[:, None] * width + columns
    np.put_along_axis(entry, order, places, 0)
    every = np.arange((leaves + 2) * width, dtype=np.int32).reshape(leaves + 2, width)
    after = np.minimum(every + width, every[-1])
    before = np.maximum(every - width, columns)
    flat_values, flat_order, flat_after, flat_before = (a.reshape(-1) for a in (values, order, after, before))

    merges = np.empty((leaves - 1, 2), np.int64)
    heights = np.empty(leaves - 1)
    proxies = np.empty(leaves - 1, np.int64)
    row_of, cluster_of = list(range(leaves)), list(range(leaves))  # sample -> row of `entry` -> cluster

    def find(sample: int) -> int:
        while row_of[sample] != sample:
            row_of[sample] = sample = row_of[row_of[sample]]
        return sample

    for step in range(leaves - 1):
        first = after[0]
        second = flat_after[first]
        candidates = flat_values[second]
        proxy = int(candidates.argmin())
        a = find(int(flat_order[first[proxy] - width]))
        b = find(int(flat_order[second[proxy] - width]))
        merges[step] = cluster_of[a], cluster_of[b]
        heights[step], proxies[step] = candidates[proxy], proxy
        row_of[b], cluster_of[a] = a, leaves + step
        gone = np.minimum(entry[a], entry[b])
        np.maximum(entry[a], entry[b], out=entry[a])
        left, right = flat_before[gone], flat_after[gone]
        flat_after[left], flat_before[right] = right, left
    return merges, heights, proxies


def nodes_of_merges(
    merges: np.ndarray,
    heights: np.ndarray,
    proxies: np.ndarray,
    leaf_proxies: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parents, heights and proxies of nodes; a node is joined with a parent of the same height and proxy."""
    leaves, count = len(merges) + 1, 2 * len(merges) + 1
    parents = np.full(count, -1)
    parents[merges] = np.arange(leaves, count)[:, None]
    heights, proxies = np.append(np.zeros(leaves), heights), np.append(leaf_proxies, proxies)
    same = np.zeros(count, bool)
    inner = slice(leaves, count - 1)
    above = parents[inner]
    same[inner] = (heights[inner] == heights[above]) & (proxies[inner] == proxies[above])
    for node in range(count - 2, -1, -1):  # from the top: the parent's own parent is already final
        if same[parents[node]]:
            parents[node] = parents[parents[node]]
    number = np.cumsum(~same) - 1
    parents = np.append(number[parents[:-1]], -1)[~same]
    return parents, heights[~same], proxies[~same]
