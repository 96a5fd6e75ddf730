r"""The learned hierarchy as an object: an immutable tree to query, cut and export.

Conventions of this file
    - A tree has ``N`` leaves, numbered ``0 .. N-1``, and up to ``N - 1`` inner nodes, numbered from ``N`` by
      increasing height. Parents have larger numbers than their children; the root is last.
    - Heights are hyperbolic distances, in the units of `PoincareDistance`; leaves are at height 0.
    - Distances have shape ``(N, P)``: of N samples, or classes, from P proxies.

The ancestor of a set :math:`A` is the proxy whose distance from the farthest member of the set is smallest, as in
HIERLoss. This distance is the height of the set,

.. math:: h(A) = \min_p \max_{a \in A} d(a, \rho_p),

the radius of the smallest ball around a proxy that contains :math:`A`. `Hierarchy.from_distances` merges the two
clusters of lowest joint height at each step: minimax linkage (Bien, Tibshirani 2011) with proxies as prototypes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ._checks import check_count, check_number, to_numpy
from .linkage import check_size, minimax_linkage, nodes_of_merges

if TYPE_CHECKING:
    import networkx

__all__ = ["Hierarchy"]

_ROUNDING = 1e-6
"""Distances in float32 with a smaller relative difference count as equal."""


@dataclass(frozen=True, eq=False)
class Hierarchy:
    r"""A tree over samples or classes, whose inner nodes are proxies.

    ``HIERLoss.hierarchy``, `from_distances` and `from_linkage` build trees. A node has more than two children
    where several clusters meet at exactly the same height below the same proxy.

    Attributes:
        parents: parent of each node, -1 for the root, shape ``(num_nodes,)``.
        heights: height of each node: the distance of its farthest leaf from its proxy. 0 for leaves.
        proxies: proxy of each inner node, and the nearest proxy of each leaf; -1 in trees without proxies.
        leaf_labels: label of each leaf, shape ``(num_leaves,)``, or ``None``.

    Example:
        >>> distances = torch.tensor([[1.0, 4.0, 9.0], [2.0, 4.0, 9.0], [5.0, 4.0, 1.0]])
        >>> tree = Hierarchy.from_distances(distances)
        >>> tree.parents, tree.heights, tree.proxies
        (array([ 3,  3,  4,  4, -1]), array([0., 0., 0., 2., 4.]), array([0, 0, 2, 0, 1]))
        >>> tree.to_newick()
        "(2:4.0,(0:2.0,1:2.0)'proxy 0':2.0)'proxy 1';"

    Source: the ancestor is that of Kim, Jeong, Kwak, "HIER" (CVPR 2023), section 3.2, without noise.
    """

    parents: np.ndarray
    heights: np.ndarray
    proxies: np.ndarray
    leaf_labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, dtype in [("parents", np.int64), ("heights", np.float64), ("proxies", np.int64)]:
            given = np.asarray(getattr(self, name))
            array = given.astype(dtype)
            if dtype is np.int64 and (array != given).any():
                raise ValueError(f"{name} must be whole numbers, got {given[array != given][0]}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.leaf_labels is not None:
            labels = np.array(self.leaf_labels)
            labels.setflags(write=False)
            object.__setattr__(self, "leaf_labels", labels)
        count = len(self.parents)
        if not self.parents.shape == self.heights.shape == self.proxies.shape == (count,) or count < 3:
            raise ValueError(
                "parents, heights and proxies must be vectors of one length, at least 3 (2 leaves, a root), "
                f"got shapes {self.parents.shape}, {self.heights.shape}, {self.proxies.shape}"
            )
        inner, below = self.parents[:-1], np.arange(count - 1)
        if self.parents[-1] != -1 or (inner <= below).any() or (inner >= count).any():
            raise ValueError("parents must be -1 for the last node, and larger than the node for all others")
        degrees = np.bincount(inner, minlength=count)
        if (degrees[: self.num_leaves] != 0).any() or (degrees[self.num_leaves :] < 2).any():
            raise ValueError("parents must give each inner node two children, and number the leaves first")
        if not np.isfinite(self.heights).all() or (self.heights[self.parents[:-1]] < self.heights[:-1]).any():
            raise ValueError("heights must be finite, and those of parents at least those of their children")
        if self.leaf_labels is not None and self.leaf_labels.shape != (self.num_leaves,):
            raise ValueError(f"leaf_labels must have shape ({self.num_leaves},), got {self.leaf_labels.shape}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hierarchy):
            return NotImplemented
        return all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in ("parents", "heights", "proxies", "leaf_labels")
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        distinct = len(set(self.proxies[self.num_leaves :].tolist()) - {-1})
        return (
            f"Hierarchy(num_leaves={self.num_leaves}, num_nodes={self.num_nodes}, "
            f"num_ancestors={distinct}, height={self.heights[-1]:g})"
        )

    @classmethod
    def from_distances(cls, distances: Tensor, labels: Any = None, *, per_class: bool = False) -> "Hierarchy":
        r"""Minimax linkage of samples, or of classes, through the proxies; see the top of this file.

        Ties go to the lower proxy index, then to the lower leaf index. Exact, in time ``O(NP log N)`` and memory
        ``O(NP)``.

        Args:
            distances: shape ``(N, P)``, of the samples from the proxies: ``HIERLoss.proxy_distances(embeddings)``.
            labels: label of each sample, shape ``(N,)``, tensor or array; kept as ``leaf_labels``.
            per_class: ``True`` makes one leaf of each class, in the order of ``numpy.unique(labels)``. Its
                distance from a proxy is the mean over its samples, which a single outlier changes little.

        Raises:
            TypeError, ValueError: distances that are not a finite matrix of two or more leaves and proxies;
                labels that do not fit; more than 50,000 leaves, or 10^8 distances.

        Example:
            >>> distances = torch.tensor([[1.0, 5.0, 9.0], [2.0, 5.0, 9.0], [6.0, 5.0, 1.0], [8.0, 5.0, 2.0]])
            >>> Hierarchy.from_distances(distances, torch.tensor([7, 7, 8, 8]), per_class=True).heights
            array([0., 0., 5.])

        Source: Bien, Tibshirani, "Hierarchical Clustering With Prototypes via Minimax Linkage" (JASA 2011), whose
        prototypes are the samples themselves.
        """
        if not isinstance(distances, Tensor):
            raise TypeError(f"distances must be a torch.Tensor, got {type(distances).__name__}")
        if distances.ndim != 2:
            raise ValueError(
                "distances must have shape (num_samples, num_proxies), samples from proxies, "
                f"got shape {tuple(distances.shape)}"
            )
        values: Any = None if labels is None else _labels(labels, len(distances))
        rows = to_numpy(distances).astype(np.float64)
        if not np.isfinite(rows).all():
            raise ValueError("distances must be finite, got NaN or infinity; check the embeddings for them")
        if per_class:
            if values is None:
                raise ValueError("labels must be given when per_class is True: they say which samples make a leaf")
            values, index = np.unique(values, return_inverse=True)
            sums = np.zeros((len(values), rows.shape[1]))
            np.add.at(sums, index, rows)
            rows = sums / np.bincount(index)[:, None]
        check_size(len(rows), rows.shape[1], "classes" if per_class else "samples")
        return cls(*nodes_of_merges(*minimax_linkage(rows), rows.argmin(1)), values)

    @classmethod
    def from_linkage(cls, linkage: np.ndarray, labels: Any = None) -> "Hierarchy":
        """A tree of another method, without proxies, from a SciPy linkage matrix.

        A merge at exactly the same height as its parent is joined with the parent into one node.

        Args:
            linkage: shape ``(N - 1, 4)``, from ``scipy.cluster.hierarchy.linkage``, without inversions.
            labels: label of each leaf, shape ``(N,)``.

        Example:
            >>> from scipy.cluster.hierarchy import linkage
            >>> Hierarchy.from_linkage(linkage([[0.0], [1.0], [5.0]], "average")).heights
            array([0. , 0. , 0. , 1. , 4.5])
        """
        from scipy.cluster.hierarchy import is_valid_linkage

        matrix = np.asarray(linkage, np.float64)
        is_valid_linkage(matrix, throw=True, name="linkage")
        order = np.argsort(matrix[:, 2], kind="stable")
        if (order != np.arange(len(order))).any():
            raise ValueError("linkage must have heights that do not decrease; use average, complete or Ward")
        leaves = len(matrix) + 1
        none = np.full(2 * leaves - 1, -1)
        nodes = nodes_of_merges(matrix[:, :2].astype(int), matrix[:, 2], none[leaves:], none[:leaves])
        return cls(*nodes, None if labels is None else _labels(labels, leaves))

    @property
    def num_nodes(self) -> int:
        """Number of nodes, leaves included."""
        return len(self.parents)

    @cached_property
    def num_leaves(self) -> int:
        """Number of leaves: the first nodes, up to the first that has children."""
        return int(self.parents[self.parents >= 0].min())

    @property
    def root(self) -> int:
        """The node above all others."""
        return self.num_nodes - 1

    def parent(self, node: int) -> int | None:
        """The node above, ``None`` for the root."""
        above = int(self.parents[self._node(node)])
        return None if above < 0 else above

    def children(self, node: int) -> tuple[int, ...]:
        """The nodes right below, in the order of their numbers; none for a leaf."""
        return tuple(self._children[self._node(node)])

    def depth(self, node: int) -> int:
        """Number of edges from the root."""
        depth = 0
        while (above := self.parent(node)) is not None:
            node, depth = above, depth + 1
        return depth

    def leaves(self, node: int) -> np.ndarray:
        """The leaves under a node, in increasing order; for a leaf, the leaf itself."""
        start, stop = self.spans[self._node(node)]
        return np.sort(self.leaf_order[start:stop])

    def lowest_common_ancestor(self, nodes: Iterable[int]) -> int:
        """The lowest node whose subtree contains all given nodes; its proxy is ``proxies[node]``.

        Args:
            nodes: leaves or other nodes, at least one. A single node is its own ancestor.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> node = tree.lowest_common_ancestor([0, 2])
            >>> node, int(tree.proxies[node])
            (4, 1)
        """
        chosen = [self._node(node) for node in nodes]
        if not chosen:
            raise ValueError("nodes must hold at least one node, got none")
        start, stop = self.spans[chosen, 0].min(), self.spans[chosen, 1].max()
        ancestor = max(chosen)
        while self.spans[ancestor, 0] > start or self.spans[ancestor, 1] < stop:
            ancestor = int(self.parents[ancestor])
        return ancestor

    def cut(self, num_groups: int | None = None, *, height: float | None = None) -> np.ndarray:
        """Cut the tree into groups of leaves, ``(num_leaves,)``, numbered from 0 by first appearance.

        Args:
            num_groups: the number of groups; there can be fewer if a node has more than two children, or if
                several nodes have the same height.
            height: in place of the number: leaves with a common node up to this height form a group.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> tree.cut(2)
            array([0, 0, 1])
            >>> tree.cut(height=4.0)
            array([0, 0, 0])
        """
        from scipy.cluster.hierarchy import fcluster

        if (num_groups is None) == (height is None):
            got = "neither" if height is None else "both"
            raise ValueError(f"cut() expects one of num_groups and height, got {got}")
        if num_groups is not None:
            if check_count("num_groups", num_groups) > self.num_leaves:
                raise ValueError(f"num_groups must be at most num_leaves={self.num_leaves}, got {num_groups}")
            groups = fcluster(self.to_linkage(), num_groups, "maxclust")
        else:
            groups = fcluster(self.to_linkage(), check_number("height", height, positive=False), "distance")
        _, first, index = np.unique(groups, return_index=True, return_inverse=True)
        numbered: np.ndarray = np.argsort(np.argsort(first))[index]
        return numbered

    def lowest_containing_node(self, distances: Tensor) -> np.ndarray:
        r"""The inner node of smallest height that contains each of ``M`` embeddings, the root if none does.

        A node with proxy :math:`\rho` contains an embedding ``x`` if :math:`d(x, \rho)` is at most its height,
        up to rounding in float32.

        Args:
            distances: of the new embeddings from all proxies, shape ``(M, P)``:
                ``HIERLoss.proxy_distances(embeddings)``.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> tree.lowest_containing_node(torch.tensor([[1.5, 9.0], [3.0, 3.0]]))
            array([3, 4])
        """
        inner = self.proxies[self.num_leaves :]
        if (inner < 0).any():
            raise ValueError("the tree has no proxies: it comes from from_linkage; use HIERLoss.hierarchy")
        if distances.ndim != 2 or distances.shape[1] <= self.proxies.max():
            raise ValueError(
                "distances must have shape (M, P), with all the proxies that the tree was built with, "
                f"more than {self.proxies.max()}, got shape {tuple(distances.shape)}"
            )
        if distances.isnan().any():
            raise ValueError("distances must not be NaN; check the embeddings for NaN and infinity")
        held = to_numpy(distances)[:, inner] <= self.heights[self.num_leaves :] * (1 + _ROUNDING)
        held[:, -1] = True
        nodes: np.ndarray = held.argmax(1) + self.num_leaves
        return nodes

    def to_linkage(self) -> np.ndarray:
        """The tree as a SciPy linkage matrix, shape ``(num_leaves - 1, 4)``.

        A node with more than two children becomes several merges of the same height.

        Example:
            >>> Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]])).to_linkage()
            array([[0., 1., 2., 2.],
                   [2., 3., 4., 3.]])
        """
        merges: list[tuple[float, float, float, float]] = []
        cluster, sizes = list(range(self.num_nodes)), [1] * self.num_leaves
        for node in range(self.num_leaves, self.num_nodes):
            left, *rest = (cluster[child] for child in self._children[node])
            for right in rest:
                sizes.append(sizes[left] + sizes[right])
                merges.append((min(left, right), max(left, right), float(self.heights[node]), sizes[-1]))
                left = len(sizes) - 1
            cluster[node] = left
        return np.array(merges, np.float64)

    def to_networkx(self) -> "networkx.DiGraph":
        """The tree as a ``networkx.DiGraph``, edges from parents to children.

        Nodes have the attributes ``height``, ``proxy`` and, leaves with labels, ``label``; edges have the
        attribute ``length``, the difference of the heights.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError('to_networkx needs networkx: pip install "hierloss[hierarchy]"') from error
        graph = networkx.DiGraph()
        for node, above in reversed(list(enumerate(self.parents.tolist()))):
            graph.add_node(node, height=float(self.heights[node]), proxy=int(self.proxies[node]))
            if self.leaf_labels is not None and node < self.num_leaves:
                graph.nodes[node]["label"] = self.leaf_labels[node].item()
            if above >= 0:
                graph.add_edge(above, node, length=float(self.heights[above] - self.heights[node]))
        return graph

    def to_newick(self, names: Sequence[str] | None = None) -> str:
        """The tree in Newick format; branch lengths are differences of heights.

        Args:
            names: name of each leaf; default its label, if all are different, else its number. Inner nodes are
                named after their proxies.

        """
        if names is None:
            names = [str(label) for label in ([] if self.leaf_labels is None else self.leaf_labels.tolist())]
            if len(set(names)) < self.num_leaves:
                names = [str(leaf) for leaf in range(self.num_leaves)]
        elif len(names) != self.num_leaves:
            raise ValueError(f"names must be {self.num_leaves}, one for each leaf, got {len(names)}")
        parts = [name if name.isdecimal() else "'" + str(name).replace("'", "''") + "'" for name in names]
        for node in range(self.num_leaves, self.num_nodes):
            below = (
                f"{parts[child]}:{float(self.heights[node] - self.heights[child])!r}"
                for child in self._children[node]
            )
            name = "" if self.proxies[node] < 0 else f"'proxy {self.proxies[node]}'"
            parts.append(f"({','.join(below)}){name}")
            for child in self._children[node]:
                parts[child] = ""  # now part of the parent's text
        return parts[-1] + ";"

    def to_json(self) -> str:
        """The tree as JSON, which `from_json` reads back exactly."""
        fields = ("parents", "heights", "proxies", "leaf_labels")
        arrays = {name: getattr(self, name) for name in fields}
        return json.dumps({name: None if array is None else array.tolist() for name, array in arrays.items()})

    @classmethod
    def from_json(cls, text: str) -> "Hierarchy":
        """Read a tree from the output of `to_json`.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> Hierarchy.from_json(tree.to_json()) == tree
            True
        """
        fields = json.loads(text)
        expected = {"parents", "heights", "proxies", "leaf_labels"}
        if not isinstance(fields, dict) or set(fields) != expected:
            raise ValueError(f"text must be a JSON object with the fields {sorted(expected)}, as of to_json")
        return cls(**fields)

    def _node(self, node: Any) -> int:
        """The node as a Python number; an error if there is no such node."""
        if not isinstance(node, (int, np.integer)) or not 0 <= node < self.num_nodes:
            raise ValueError(f"node must be a whole number from 0 to {self.num_nodes - 1}, got {node!r}")
        return int(node)

    @cached_property
    def _children(self) -> list[list[int]]:
        lists: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, above in enumerate(self.parents[:-1].tolist()):
            lists[above].append(node)
        return lists

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of leaves under each node, shape ``(num_nodes,)``."""
        sizes = np.zeros(self.num_nodes, np.int64)
        sizes[: self.num_leaves] = 1
        for node, above in enumerate(self.parents[:-1].tolist()):
            sizes[above] += sizes[node]
        sizes.setflags(write=False)
        return sizes

    @cached_property
    def spans(self) -> np.ndarray:
        """The positions of each node's leaves in `leaf_order`: start and stop, shape ``(num_nodes, 2)``."""
        spans = np.zeros((self.num_nodes, 2), np.int64)
        spans[-1, 1] = self.num_leaves
        for node in range(self.num_nodes - 1, self.num_leaves - 1, -1):
            start = spans[node, 0]
            for child in self._children[node]:
                spans[child] = start, start + self.sizes[child]
                start += self.sizes[child]
        return spans

    @cached_property
    def leaf_order(self) -> np.ndarray:
        """The leaves from left to right, such that the leaves under each node are contiguous."""
        order = np.argsort(self.spans[: self.num_leaves, 0])
        order.setflags(write=False)
        return order


def _labels(labels: Any, count: int) -> np.ndarray:
    """Labels as an array of shape ``(count,)``."""
    values = to_numpy(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one for each sample, got shape {values.shape}")
    return values
