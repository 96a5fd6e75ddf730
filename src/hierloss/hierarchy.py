r"""The learned hierarchy as an object: an immutable tree that one can query, cut and export.

Conventions of this file
    - A tree has ``N`` leaves, numbered ``0 .. N-1``, and up to ``N - 1`` inner nodes, numbered on from ``N``
      by increasing height, so that parents have larger numbers than their children and the root is last.
    - Heights are hyperbolic distances, in the units of `PoincareDistance`; leaves are at height 0.
    - Distances have shape ``(N, P)``: of N samples, or classes, from P proxies.

The tree is built from what HIERLoss calls an ancestor. The ancestor of a set :math:`A` is the proxy that is
nearest to its farthest member, and their distance is the height of the set,

.. math:: h(A) = \min_p \max_{a \in A} d(a, \rho_p),

the smallest radius at which a ball around a proxy holds all of :math:`A`. "LCA linkage" merges, at each step,
the two clusters of lowest joint height.
"""

import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.cluster.hierarchy import is_valid_linkage
from torch import Tensor

from . import poincare
from ._checks import check_count, check_embeddings, check_number
from .distances import PoincareDistance

if TYPE_CHECKING:
    import os

    import networkx
    from matplotlib.axes import Axes

__all__ = ["Hierarchy", "initial_proxies"]

_MAX_LEAVES, _MAX_CELLS = 50_000, 10**8
"""The largest tree: more leaves or distances are refused rather than exhausting memory."""

_CHUNK_ROWS = 4096
"""Embeddings whose distances from the proxies are worked on at a time."""


@dataclass(frozen=True, eq=False)
class Hierarchy:
    r"""A tree over samples or classes, whose inner nodes are proxies.

    Build one with `from_embeddings` (or ``HIERLoss.hierarchy``), `from_distances` or `from_linkage`. Nodes
    are whole numbers: leaves ``0 .. N-1`` in the order they came, then inner nodes by increasing height, the
    root last. A node has two or more children; more than two where several clusters meet at exactly the
    same height below the same proxy.

    Attributes:
        parents: parent of each node, -1 for the root, shape ``(num_nodes,)``.
        heights: height of each node: how far its farthest leaf is from its proxy. 0 for leaves.
        proxies: index of the proxy that is the node's ancestor, for a leaf the nearest proxy; -1 where there
            is none, in trees from `from_linkage`.
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
            object.__setattr__(self, name, np.array(getattr(self, name), dtype))
        if self.leaf_labels is not None:
            object.__setattr__(self, "leaf_labels", np.array(self.leaf_labels))
        self._check()
        for array in (self.parents, self.heights, self.proxies, self.leaf_labels):
            if array is not None:
                array.setflags(write=False)

    def _check(self) -> None:
        """Raise unless the arrays are a tree as described above."""
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

    # --- building -------------------------------------------------------------------------------------------

    @classmethod
    def from_distances(cls, distances: Tensor, labels: Any = None, *, per_class: bool = False) -> "Hierarchy":
        r"""LCA linkage of samples, or of classes, from their distances to the proxies.

        The height of a set is :math:`h(A) = \min_p \max_{a \in A} d(a, \rho_p)`, its ancestor the proxy that
        attains it; the two clusters of lowest joint height are merged until one is left. Heights never
        decrease. Where two pairs tie, the lower proxy index goes first, then the lower leaf index; clusters
        that meet at one height below one proxy become children of one node. Exact, in time
        ``O(NP log N)`` and memory ``O(NP)``: 10,000 x 1,000 take seconds.

        Args:
            distances: shape ``(N, P)``, of the samples from the proxies.
            labels: label of each sample, shape ``(N,)``, tensor or array; kept as ``leaf_labels``.
            per_class: ``True`` makes one leaf of each class, in the order of ``numpy.unique(labels)``. Its
                distance from a proxy is the mean over its samples; the largest, which the height of the set
                of samples would call for, hangs on a single outlier.

        Returns:
            The tree.

        Raises:
            TypeError, ValueError: distances that are not a finite matrix of two or more leaves and proxies;
                labels that do not fit; more than 50,000 leaves, or 10^8 distances.

        Example:
            >>> distances = torch.tensor([[1.0, 5.0, 9.0], [2.0, 5.0, 9.0], [6.0, 5.0, 1.0], [8.0, 5.0, 2.0]])
            >>> Hierarchy.from_distances(distances, torch.tensor([7, 7, 8, 8]), per_class=True).heights
            array([0., 0., 5.])

        Source: agglomeration with a linkage of ours; see the head of the file.
        """
        if not isinstance(distances, Tensor):
            raise TypeError(f"distances must be a torch.Tensor, got {type(distances).__name__}")
        if distances.ndim != 2:
            raise ValueError(
                "distances must have shape (num_samples, num_proxies), samples from proxies, "
                f"got shape {tuple(distances.shape)}"
            )
        classes, index = _check_leaves("distances", len(distances), distances.shape[1], labels, per_class)
        rows = distances.detach().float().cpu()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("distances must be finite, got NaN or infinity; check the embeddings for them")
        if per_class:
            rows = _class_means([rows], index, len(classes))
        return _from_merges(*_lca_linkage(rows.numpy()), rows.argmin(1).numpy(), classes)

    @classmethod
    def from_embeddings(
        cls,
        embeddings: Tensor,
        proxies: Tensor,
        distance: PoincareDistance | None = None,
        labels: Any = None,
        *,
        per_class: bool = False,
    ) -> "Hierarchy":
        """LCA linkage of embeddings and the proxies of a loss; see `from_distances`.

        With ``per_class`` the number of embeddings is not limited: memory is ``O(classes * P)``.

        Args:
            embeddings: shape ``(N, D)``, as they go into the loss.
            proxies: tangent vectors, shape ``(P, D)``: ``HIERLoss.proxies``.
            distance: that of the loss, default ``PoincareDistance()``.
            labels: label of each sample, shape ``(N,)``.
            per_class: one leaf for each class instead of each sample.

        Returns:
            The tree.

        Raises:
            TypeError, ValueError: as `from_distances`.

        Example:
            >>> generator = torch.Generator().manual_seed(0)
            >>> embeddings, proxies = torch.randn(100, 8, generator=generator), torch.eye(8)
            >>> Hierarchy.from_embeddings(embeddings, proxies, labels=torch.arange(100) // 20, per_class=True)
            Hierarchy(num_leaves=5, num_nodes=9, num_ancestors=2, height=5.0739)
        """
        check_embeddings("embeddings", embeddings)
        check_embeddings("proxies", proxies, embeddings.shape[1])
        classes, index = _check_leaves("embeddings", len(embeddings), len(proxies), labels, per_class)
        distance = PoincareDistance() if distance is None else distance
        with torch.no_grad():
            centers = distance.normalize(proxies)
            chunks = (
                distance.compute_mat(distance.maybe_normalize(chunk), centers).float().cpu()
                for chunk in torch.split(embeddings.detach(), _CHUNK_ROWS)
            )
            if not per_class:
                return cls.from_distances(torch.cat(list(chunks)), labels)
            rows = _class_means(chunks, index, len(classes))
        return cls.from_distances(rows, classes)

    @classmethod
    def from_linkage(cls, linkage: np.ndarray, labels: Any = None) -> "Hierarchy":
        """A tree of another method, from a SciPy linkage matrix, to query, score and draw it alike.

        Merges at exactly the height of the merge above become one node with more children.

        Args:
            linkage: shape ``(N - 1, 4)``, from ``scipy.cluster.hierarchy.linkage``, without inversions.
            labels: label of each leaf, shape ``(N,)``.

        Returns:
            The tree, with -1 for all proxies.

        Raises:
            ValueError: not a linkage matrix, or one with inversions (centroid and median linkage have them).

        Example:
            >>> from scipy.cluster.hierarchy import linkage
            >>> Hierarchy.from_linkage(linkage([[0.0], [1.0], [5.0]], "average")).heights
            array([0. , 0. , 0. , 1. , 4.5])
        """
        matrix = np.asarray(linkage, np.float64)
        is_valid_linkage(matrix, throw=True, name="linkage")
        order = np.argsort(matrix[:, 2], kind="stable")
        if (order != np.arange(len(order))).any():
            raise ValueError("linkage must have heights that do not decrease; use average, complete or Ward")
        leaves = len(matrix) + 1
        none = np.full(leaves - 1, -1)
        leaf_labels = None if labels is None else _labels(labels, leaves)
        return _from_merges(matrix[:, :2].astype(int), matrix[:, 2], none, np.full(leaves, -1), leaf_labels)

    # --- queries --------------------------------------------------------------------------------------------

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
        return int(self._depths[self._node(node)])

    def leaves(self, node: int) -> np.ndarray:
        """The leaves under a node, in increasing order; of a leaf, itself."""
        start, stop = self._spans[self._node(node)]
        return np.sort(self.leaf_order[start:stop])

    def lowest_common_ancestor(self, nodes: Iterable[int]) -> int:
        """The lowest node that all the given nodes are under; its proxy is ``proxies[node]``.

        Args:
            nodes: leaves or other nodes, at least one. A single node is its own ancestor.

        Returns:
            The node.

        Raises:
            ValueError: no nodes, or a number that is no node.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> node = tree.lowest_common_ancestor([0, 2])
            >>> node, int(tree.proxies[node])
            (4, 1)
        """
        heap = sorted({self._node(node) for node in nodes})
        if not heap:
            raise ValueError("nodes must hold at least one node, got none")
        # A parent has the larger number: lift the smallest until all have met.
        while len(heap) > 1:
            above = int(self.parents[heapq.heappop(heap)])
            if above not in heap:
                heapq.heappush(heap, above)
        return heap[0]

    def cut(self, num_groups: int | None = None, *, height: float | None = None) -> np.ndarray:
        """Cut the tree into groups of leaves.

        Args:
            num_groups: the number of groups; fewer come out where a node has more than two children, or where
                several nodes have the same height.
            height: instead of the number, the height up to which leaves are together.

        Returns:
            Group of each leaf, shape ``(num_leaves,)``, numbered from 0 by first appearance.

        Raises:
            TypeError, ValueError: none or both given; ``num_groups`` below 1 or above the number of leaves.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> tree.cut(2)
            array([0, 0, 1])
            >>> tree.cut(height=4.0)
            array([0, 0, 0])
        """
        if (num_groups is None) == (height is None):
            got = "neither" if height is None else "both"
            raise ValueError(f"cut() expects one of num_groups and height, got {got}")
        if num_groups is not None:
            if check_count("num_groups", num_groups) > self.num_leaves:
                raise ValueError(f"num_groups must be at most num_leaves={self.num_leaves}, got {num_groups}")
            inner = self.heights[self.num_leaves :]
            degrees = np.bincount(self.parents[:-1])[self.num_leaves :]
            # Groups when all nodes from this one on are gone, where it is higher than the one before.
            groups = 1 + np.cumsum(degrees[::-1] - 1)[::-1]
            possible = (groups <= num_groups) & (np.diff(inner, prepend=-1.0) > 0)
            kept = self.num_leaves + int(possible.argmax() if possible.any() else len(inner))
        else:
            assert height is not None
            kept = int(np.searchsorted(self.heights, check_number("height", height, positive=False), "right"))
        # Nodes are ordered by height: those from `kept` on are gone, and the highest ones left are the groups.
        top = np.arange(self.num_nodes)
        for node in range(kept - 1, -1, -1):
            above = self.parents[node]
            if 0 <= above < kept:
                top[node] = top[above]
        _, first, index = np.unique(top[: self.num_leaves], return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[index]

    def nearest_ancestor(self, distances: Tensor) -> np.ndarray:
        r"""The place in the tree of embeddings that it was not built from.

        It is the lowest inner node whose ball holds the embedding: the one of smallest height with
        :math:`d(x, \rho) \le` height, :math:`\rho` being its proxy; the root if no ball does.

        Args:
            distances: of the new embeddings from all proxies, shape ``(M, P)``:
                ``loss_func.distance(embeddings, loss_func.proxies)``.

        Returns:
            Nodes, shape ``(M,)``.

        Raises:
            ValueError: the distances are not a matrix, or lack columns; the tree has no proxies.

        Example:
            >>> tree = Hierarchy.from_distances(torch.tensor([[1.0, 4.0], [2.0, 4.0], [5.0, 4.0]]))
            >>> tree.nearest_ancestor(torch.tensor([[1.5, 9.0], [3.0, 3.0]]))
            array([3, 4])
        """
        inner = self.proxies[self.num_leaves :]
        if (inner < 0).any():
            raise ValueError("the tree has no proxies: it comes from from_linkage; use from_embeddings")
        if distances.ndim != 2 or distances.shape[1] <= self.proxies.max():
            raise ValueError(
                "distances must have shape (M, P), with all the proxies that the tree was built with, "
                f"more than {self.proxies.max()}, got shape {tuple(distances.shape)}"
            )
        held = distances.detach().double().cpu().numpy()[:, inner] <= self.heights[self.num_leaves :]
        held[:, -1] = True
        nodes: np.ndarray = held.argmax(1) + self.num_leaves
        return nodes

    # --- export ---------------------------------------------------------------------------------------------

    def to_linkage(self) -> np.ndarray:
        """The tree as a SciPy linkage matrix, which ``scipy.cluster.hierarchy.dendrogram`` draws.

        A node with more than two children becomes several merges of the same height.

        Returns:
            Float array of shape ``(num_leaves - 1, 4)``: the two clusters, their height, their leaves.

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

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError('to_networkx needs networkx: pip install "hierloss[plot]"') from error
        graph = networkx.DiGraph()
        for node in range(self.num_nodes):
            graph.add_node(node, height=float(self.heights[node]), proxy=int(self.proxies[node]))
        if self.leaf_labels is not None:
            for leaf, label in enumerate(self.leaf_labels.tolist()):
                graph.nodes[leaf]["label"] = label
        for node, above in enumerate(self.parents[:-1].tolist()):
            graph.add_edge(above, node, length=float(self.heights[above] - self.heights[node]))
        return graph

    def to_newick(self, names: Sequence[str] | None = None) -> str:
        """The tree in Newick format; branch lengths are differences of heights.

        Args:
            names: name of each leaf; default its label, if all are different, else its number. Inner nodes are
                named after their proxies.

        Returns:
            One line that ends with a semicolon.

        Raises:
            ValueError: not one name for each leaf.
        """
        parts = _check_names(names, self)
        for node in range(self.num_leaves, self.num_nodes):
            below = (
                f"{parts[child]}:{float(self.heights[node] - self.heights[child])!r}"
                for child in self._children[node]
            )
            name = "" if self.proxies[node] < 0 else f"'proxy {self.proxies[node]}'"
            parts.append(f"({','.join(below)}){name}")
            for child in self._children[node]:
                parts[child] = ""  # the text is in the parent's now
        return parts[-1] + ";"

    def to_json(self) -> str:
        """The tree as JSON, which `from_json` reads back exactly."""
        fields = ("parents", "heights", "proxies", "leaf_labels")
        arrays = {name: getattr(self, name) for name in fields}
        return json.dumps({name: None if array is None else array.tolist() for name, array in arrays.items()})

    @classmethod
    def from_json(cls, text: str) -> "Hierarchy":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not JSON, or not that of a tree.

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

    # --- pictures -------------------------------------------------------------------------------------------

    def plot(self, kind: str = "disk", **kwargs: Any) -> "Axes":
        """Draw the tree with matplotlib, on the Poincaré disk or as a dendrogram.

        Args:
            kind: ``"disk"`` or ``"dendrogram"``.
            **kwargs: ``labels``, ``class_names``, ``names``, ``images``, ``max_leaves`` and ``ax``: see
                `hierloss.plotting.plot_disk`.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: another kind; what is given of the leaves does not fit them.

        Example:
            >>> ax = Hierarchy.from_distances(torch.rand(20, 8)).plot("dendrogram")
        """
        from . import plotting

        kinds = {"disk": plotting.plot_disk, "dendrogram": plotting.plot_dendrogram}
        if kind not in kinds:
            raise ValueError(f"kind must be one of {sorted(kinds)}, got {kind!r}")
        return kinds[kind](self, **kwargs)

    def to_html(self, path: "str | os.PathLike[str]", **kwargs: Any) -> None:
        """Write the tree as one self-contained page, to pan, zoom, hover over and fold.

        Args:
            path: the file, overwritten if it exists.
            **kwargs: ``images``, ``texts``, ``labels``, ``class_names``, ``names`` and ``title``: see
                `hierloss.plotting.write_html`.

        Raises:
            ImportError: plotly or matplotlib is not installed.
            ValueError: what is given of the leaves does not fit them.
        """
        from . import plotting

        plotting.write_html(self, path, **kwargs)

    # --- derived --------------------------------------------------------------------------------------------

    def _node(self, node: Any) -> int:
        """The node, as a Python number, if it is one."""
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
    def _depths(self) -> np.ndarray:
        depths = np.zeros(self.num_nodes, np.int64)
        for node in range(self.num_nodes - 2, -1, -1):
            depths[node] = depths[self.parents[node]] + 1
        return depths

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
    def _spans(self) -> np.ndarray:
        """The places in `leaf_order` of each node's leaves: start and stop, shape ``(num_nodes, 2)``."""
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
        """The leaves from left to right, such that those under any node stand side by side."""
        order = np.argsort(self._spans[: self.num_leaves, 0])
        order.setflags(write=False)
        return order


# --- where proxies start ------------------------------------------------------------------------------------


def initial_proxies(
    embeddings: Tensor,
    num_proxies: int,
    distance: PoincareDistance | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""A start for the proxies of HIERLoss from which they become ancestors: data, pulled towards the origin.

    .. math:: \rho_p = u_p \cdot \mathrm{clip}_r(v_{i(p)}), \qquad u_p \sim U(0, 1)

    with ``i(p)`` drawn without replacement, as long as there are enough embeddings. Every region of the data
    has proxies above it, specific ones near it and general ones near the origin. Random directions, the
    default of HIERLoss, are almost orthogonal to all data in many dimensions. docs/hierarchy.md has
    what the difference is, measured: on a synthetic tree better one level above the classes and a little worse
    two levels above them, on real data none that is certain.

    Args:
        embeddings: shape ``(N, D)``, as they go into the loss: of the first batch, or better of some thousand
            samples.
        num_proxies: ``P``.
        distance: that of the loss, for its clip radius; default ``PoincareDistance()``.
        generator: source of the random numbers; ``None`` is torch's default.

    Returns:
        Tangent vectors of shape ``(P, D)``, with the dtype and device of the embeddings.

    Raises:
        TypeError, ValueError: the embeddings are not a finite matrix with one row or more.

    Example:
        >>> proxies = initial_proxies(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), num_proxies=5)
        >>> torch.nn.functional.normalize(proxies)[0]
        tensor([0.6000, 0.8000])
    """
    check_embeddings("embeddings", embeddings)
    check_count("num_proxies", num_proxies)
    if not bool(torch.isfinite(embeddings).all()):
        raise ValueError("embeddings must be finite, got NaN or infinity")
    distance = PoincareDistance() if distance is None else distance
    v = embeddings.detach()
    v = v if distance.normalize_embeddings else poincare.log_map0(v, distance.c)
    rounds = -(-num_proxies // len(v))
    device = v.device if generator is None else generator.device
    chosen = torch.cat([torch.randperm(len(v), generator=generator, device=device) for _ in range(rounds)])
    shares = torch.rand(num_proxies, 1, generator=generator, device=device)
    chosen, shares = chosen[:num_proxies].to(v.device), shares.to(v.device)
    return (poincare.clip_norm(v[chosen], distance.clip_radius) * shares).to(v.dtype)


# --- LCA linkage --------------------------------------------------------------------------------------------


def _lca_linkage(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges ``(N-1, 2)``, heights and proxies of LCA linkage of ``(N, P)`` distances.

    The distance of a cluster from a proxy is the largest of its members', so the lowest joint height of all
    pairs is the smallest, over the proxies, of the second smallest entry of the proxy's column, and the pair
    is the two clusters nearest to that proxy. Merging two clusters removes, from every column, the smaller of
    their two entries, and changes nothing else. So: sort the columns once, keep each as a linked list, and no
    pair of clusters is ever looked at.
    """
    leaves, width = rows.shape
    columns = np.arange(width, dtype=np.int32)
    # Entries are numbered place * width + column; place 0 is the head of a list, leaves + 1 its end.
    order = np.argsort(rows, axis=0, kind="stable").astype(np.int32)
    values = np.full((leaves + 2, width), np.inf, np.float32)
    values[1:-1] = np.take_along_axis(rows, order, 0)
    entry = np.empty((leaves, width), np.int32)  # of each cluster, in every column
    places = np.arange(1, leaves + 1, dtype=np.int32)[:, None] * width + columns
    np.put_along_axis(entry, order, places, 0)
    every = np.arange((leaves + 2) * width, dtype=np.int32).reshape(leaves + 2, width)
    after = np.minimum(every + width, every[-1])
    before = np.maximum(every - width, columns)
    flat_values, flat_order, flat_after, flat_before = (a.reshape(-1) for a in (values, order, after, before))

    merges = np.empty((leaves - 1, 2), np.int64)
    heights = np.empty(leaves - 1, np.float32)
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


def _from_merges(
    merges: np.ndarray,
    heights: np.ndarray,
    proxies: np.ndarray,
    leaf_proxies: np.ndarray,
    leaf_labels: np.ndarray | None,
) -> Hierarchy:
    """The tree of a sequence of merges; a node is joined with its parent if they share height and proxy."""
    leaves, count = len(merges) + 1, 2 * len(merges) + 1
    parents = np.full(count, -1)
    parents[merges] = np.arange(leaves, count)[:, None]
    heights, proxies = np.append(np.zeros(leaves), heights), np.append(leaf_proxies, proxies)
    same = np.zeros(count, bool)
    inner = slice(leaves, count - 1)
    above = parents[inner]
    same[inner] = (heights[inner] == heights[above]) & (proxies[inner] == proxies[above])
    for node in range(count - 2, -1, -1):  # from the top: the parent's own parent is settled
        if same[parents[node]]:
            parents[node] = parents[parents[node]]
    number = np.cumsum(~same) - 1
    parents = np.append(number[parents[:-1]], -1)[~same]
    return Hierarchy(parents, heights[~same], proxies[~same], leaf_labels)


# --- checks -------------------------------------------------------------------------------------------------


def _check_leaves(name: str, samples: int, proxies: int, labels: Any, per_class: bool) -> tuple[Any, Tensor]:
    """Labels of the leaves (or ``None``) and, per class, the leaf of each sample; raise if no tree is."""
    values = None if labels is None else _labels(labels, samples)
    if per_class and values is None:
        raise ValueError("labels must be given when per_class is True: they say which samples make a leaf")
    leaves, index, kind = samples, torch.empty(0), "samples"
    if per_class and values is not None:
        values, inverse = np.unique(values, return_inverse=True)
        leaves, index, kind = len(values), torch.from_numpy(inverse), "classes"
    if leaves < 2:
        raise ValueError(f"{name} must hold at least 2 {kind} to make a tree, got {leaves}")
    if proxies < 2:
        raise ValueError(
            f"{name} must come with at least 2 proxies, got {proxies}: below a single proxy, the only tree "
            "is the order of distances from it; use a larger num_proxies"
        )
    most = min(_MAX_LEAVES, _MAX_CELLS // proxies)
    if leaves > most:
        raise ValueError(
            f"{name} must make at most {most} leaves with {proxies} proxies, got {leaves} {kind}; give "
            "labels and per_class=True for a tree of classes, or a random subsample, for instance "
            f"{name}[torch.randperm({leaves})[:10_000]]"
        )
    return values, index


def _labels(labels: Any, count: int) -> np.ndarray:
    """Labels as an array of shape ``(count,)``."""
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one for each sample, got shape {values.shape}")
    return values


def _class_means(chunks: Iterable[Tensor], index: Tensor, classes: int) -> Tensor:
    """The mean distances of each class, from rows that come in chunks."""
    sums, start = torch.zeros(0), 0
    for chunk in chunks:
        if start == 0:
            sums = torch.zeros(classes, chunk.shape[1], dtype=torch.float64)
        sums.index_add_(0, index[start : (start := start + len(chunk))], chunk.double())
    return (sums / index.bincount(minlength=classes)[:, None]).float()


def _check_names(names: Sequence[str] | None, tree: Hierarchy) -> list[str]:
    """Leaf names, quoted as Newick wants it."""
    if names is None:
        labels = range(tree.num_leaves) if tree.leaf_labels is None else tree.leaf_labels.tolist()
        names = [str(label) for label in labels]
        if len(set(names)) < len(names):
            names = [str(leaf) for leaf in range(tree.num_leaves)]
        return [name if name.isalnum() else _quoted(name) for name in names]
    if len(names) != tree.num_leaves:
        raise ValueError(f"names must be {tree.num_leaves}, one for each leaf, got {len(names)}")
    return [_quoted(str(name)) for name in names]


def _quoted(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
