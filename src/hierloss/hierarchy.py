r"""The learned hierarchy as an object: an immutable tree to query, cut and export.

Conventions of this file
    - A tree has ``N`` leaves, numbered ``0 .. N-1``, and ``N - 1`` inner nodes with two children each, numbered
      from ``N`` by increasing height: SciPy's numbering of clusters. The root is last. Leaves are at height 0.
    - The ancestor of a set of leaves :math:`A` is the proxy whose distance from the farthest leaf is smallest, as
      in HIERLoss without noise. This distance, :math:`\min_p \max_{a \in A} d(a, \rho_p)`, is the set's radius.
"""

import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ._checks import check_count, check_finite, check_names, check_number, to_numpy, to_vector

if TYPE_CHECKING:
    import networkx

_MAX_LEAVES = 20_000  # the distances of all pairs of more, and a copy, would take over 3 GB
_ROUNDING = 1e-6  # largest error of a cosine distance in float32


@dataclass(frozen=True, eq=False)
class Hierarchy:
    r"""A tree over samples or classes. Each node has a proxy, its ancestor.

    ``HIERLoss.hierarchy``, `from_embeddings` and `from_linkage` build trees. Arrays are read-only.

    Attributes:
        linkage: SciPy's, shape ``(num_leaves - 1, 4)``: children, height and number of leaves of each inner node.
        leaf_labels: label of each leaf, shape ``(num_leaves,)``, or ``None``.
        proxies: the ancestor of each node, shape ``(num_nodes,)``, for a leaf its nearest proxy; or ``None``.
        radii: hyperbolic distance of each node's farthest leaf from its ancestor, shape ``(num_nodes,)``; or
            ``None``. Radii never decrease towards the root.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
        >>> distances = torch.tensor([[1.0, 4.0], [9.0, 2.0], [9.0, 3.0]])  # from two proxies
        >>> tree = Hierarchy.from_embeddings(embeddings, distances=distances)
        >>> tree.parents, tree.proxies, tree.radii
        (array([ 4,  3,  3,  4, -1]), array([0, 1, 1, 1, 1]), array([1., 2., 3., 3., 4.]))

    Source: the ancestor is that of Kim, Jeong, Kwak, "HIER" (CVPR 2023), section 3.2, without noise.
    """

    linkage: np.ndarray
    leaf_labels: np.ndarray | None = None
    proxies: np.ndarray | None = None
    radii: np.ndarray | None = None

    def __post_init__(self) -> None:
        from scipy.cluster.hierarchy import is_valid_linkage

        is_valid_linkage(matrix := np.array(self.linkage, np.float64), throw=True, name="linkage")
        if not np.isfinite(matrix).all() or (np.diff(matrix[:, 2]) < 0).any():
            raise ValueError("linkage must have finite heights that do not decrease; use average or Ward linkage")
        object.__setattr__(self, "linkage", _read_only(matrix))
        if (self.sizes[self._merges].sum(1) != matrix[:, 3]).any():
            raise ValueError("linkage must have the number of leaves of each inner node in its last column")
        sizes = {"leaf_labels": self.num_leaves, "proxies": self.num_nodes, "radii": self.num_nodes}
        for name, size in sizes.items():
            if (given := getattr(self, name)) is not None:
                given = to_numpy(given)
                array = np.array(given, {"proxies": np.int64, "radii": np.float64}.get(name))
                if name == "proxies" and (array != given).any():
                    raise ValueError(f"proxies must be whole numbers, got {given[array != given][0]}")
                if array.shape != (size,):
                    raise ValueError(f"{name} must have shape ({size},), got shape {array.shape}")
                object.__setattr__(self, name, _read_only(array))

    def __reduce__(self) -> tuple[Any, ...]:  # a copy is read-only too
        return type(self), astuple(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hierarchy):
            return NotImplemented
        return all(map(np.array_equal, astuple(self), astuple(other)))

    def __repr__(self) -> str:
        ancestors = "" if self.proxies is None else f", num_ancestors={len(set(self.proxies[self.num_leaves :]))}"
        return f"Hierarchy(num_leaves={self.num_leaves}{ancestors}, height={self.heights[-1]:g})"

    @classmethod
    def from_embeddings(
        cls, embeddings: Tensor, labels: Any = None, *,
        per_class: bool = False, linkage: str = "average", distances: Tensor | np.ndarray | None = None,
    ) -> "Hierarchy":  # fmt: skip
        """Agglomerative clustering of 2 to 20,000 embeddings or classes by cosine similarity, in ``8 N^2`` bytes.

        Args:
            embeddings: shape ``(N, D)``; Euclidean features, or points on the ball; scaled to norm 1.
            labels: label of each sample, shape ``(N,)``, tensor or array; kept as ``leaf_labels``.
            per_class: ``True`` makes one leaf of each class, in the order of ``numpy.unique(labels)``: the mean of
                its samples, again scaled to norm 1. Its distance from a proxy is the mean over its samples.
            linkage: ``"average"`` or ``"complete"``: heights are the mean or largest cosine distance ``1 - cos``
                between the leaves of the two children; ``"ward"``: as in SciPy.
            distances: of the samples from proxies, shape ``(N, P)``: ``HIERLoss.proxy_distances(embeddings)``.

        Example:
            >>> Hierarchy.from_embeddings(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])).linkage
            array([[1., 2., 0., 2.],
                   [0., 3., 1., 3.]])

        Source: Müllner, "Modern Hierarchical, Agglomerative Clustering Algorithms" (2011), by SciPy.
        """
        from scipy.cluster import hierarchy
        from scipy.spatial.distance import pdist

        check_finite("embeddings", embeddings)
        if linkage not in ("average", "complete", "ward"):
            raise ValueError(f'linkage must be "average", "complete" or "ward", got {linkage!r}')
        values: Any = None if labels is None else to_vector(labels, len(embeddings), "sample")
        unit = torch.nn.functional.normalize(embeddings.detach().cpu().double(), eps=1e-300)
        if distances is not None and (distances.ndim != 2 or len(distances) != len(unit)):
            shape = tuple(distances.shape)
            raise ValueError(f"distances must have a row for each of {len(unit)} embeddings, got shape {shape}")
        if per_class:
            if values is None:
                raise ValueError("labels must be given when per_class is True: they say which samples make a leaf")
            values, index = np.unique(values, return_inverse=True)
            unit = torch.nn.functional.normalize(_class_means(unit, index, len(values)))
            if distances is not None:
                rows = torch.from_numpy(to_numpy(distances).astype(np.float64))
                distances = _class_means(rows, index, len(values))
        if not 2 <= len(unit) <= _MAX_LEAVES:
            got = f"{len(unit)} {'classes' if per_class else 'samples'}"
            more = "; use per_class=True or a random subsample" * (len(unit) > 1)
            raise ValueError(f"embeddings must make 2 to {_MAX_LEAVES} leaves, got {got}{more}")
        gaps = pdist(unit.numpy(), "euclidean" if linkage == "ward" else "sqeuclidean")
        if linkage != "ward":
            gaps /= 2  # |x - y|^2 / 2 = 1 - cos; in place, because there are many
        return cls.from_linkage(hierarchy.linkage(gaps, linkage), values, distances)

    @classmethod
    def from_linkage(
        cls, linkage: np.ndarray, labels: Any = None, distances: Tensor | np.ndarray | None = None
    ) -> "Hierarchy":
        """A tree from a SciPy linkage matrix without inversions, with proxies as ancestors if there are distances.

        Args:
            linkage: shape ``(N - 1, 4)``, from ``scipy.cluster.hierarchy.linkage``.
            labels: label of each leaf, shape ``(N,)``.
            distances: of the leaves from proxies, shape ``(N, P)``.

        Example:
            >>> from scipy.cluster.hierarchy import linkage
            >>> Hierarchy.from_linkage(linkage([[0.0], [1.0], [5.0]], "average")).heights
            array([0. , 0. , 0. , 1. , 4.5])
        """
        tree = cls(linkage, None if labels is None else to_vector(labels, len(linkage) + 1, "leaf"))
        if distances is None:
            return tree
        rows = to_numpy(distances).astype(np.float64)
        if rows.ndim != 2 or len(rows) != tree.num_leaves or rows.size == 0 or not np.isfinite(rows).all():
            expected = f"({tree.num_leaves}, num_proxies)"
            raise ValueError(f"distances must be finite, of shape {expected}, got shape {rows.shape}")
        farthest = np.concatenate([rows, np.empty_like(rows[1:])])
        for node, (left, right) in enumerate(tree._merges, tree.num_leaves):
            farthest[node] = np.maximum(farthest[left], farthest[right])
        return cls(tree.linkage, tree.leaf_labels, farthest.argmin(1), farthest.min(1))

    @property
    def num_leaves(self) -> int:
        """Number of leaves."""
        return len(self.linkage) + 1

    @property
    def num_nodes(self) -> int:
        """Number of nodes, leaves included."""
        return 2 * len(self.linkage) + 1

    @property
    def root(self) -> int:
        """The node above all others."""
        return self.num_nodes - 1

    @cached_property
    def heights(self) -> np.ndarray:
        """Height of each node, shape ``(num_nodes,)``, 0 for leaves."""
        return _read_only(np.concatenate([np.zeros(self.num_leaves), self.linkage[:, 2]]))

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of leaves under each node, shape ``(num_nodes,)``."""
        return _read_only(np.concatenate([np.ones(self.num_leaves), self.linkage[:, 3]]).astype(np.int64))

    @cached_property
    def parents(self) -> np.ndarray:
        """Parent of each node, -1 for the root, shape ``(num_nodes,)``."""
        parents = np.full(self.num_nodes, -1)
        parents[self._merges] = np.arange(self.num_leaves, self.num_nodes)[:, None]
        return _read_only(parents)

    @cached_property
    def leaf_order(self) -> np.ndarray:
        """The leaves from left to right, such that the leaves under each node are contiguous."""
        from scipy.cluster.hierarchy import leaves_list

        # A copy, here and elsewhere: before version 1.14, SciPy refuses read-only arrays.
        return _read_only(leaves_list(self.linkage.copy()).astype(np.int64))

    @cached_property
    def spans(self) -> np.ndarray:
        """The positions of each node's leaves in `leaf_order`: start and stop, shape ``(num_nodes, 2)``."""
        starts = np.argsort(self.leaf_order).tolist()
        for left in self._merges[:, 0]:
            starts.append(starts[left])
        return _read_only(np.stack([starts, starts + self.sizes], 1))

    @cached_property
    def _merges(self) -> np.ndarray:
        """The two children of each inner node."""
        return self.linkage[:, :2].astype(np.int64)

    def children(self, node: int) -> tuple[int, ...]:
        """The two nodes right below; none for a leaf."""
        inner = self._node(node) - self.num_leaves
        return () if inner < 0 else tuple(self._merges[inner].tolist())

    def leaves(self, node: int) -> np.ndarray:
        """The leaves under a node, in increasing order; for a leaf, the leaf itself."""
        start, stop = self.spans[self._node(node)]
        return np.sort(self.leaf_order[start:stop])

    def lowest_common_ancestor(self, nodes: Iterable[int]) -> int:
        """The lowest node whose subtree contains all given nodes, one or more; its proxy is ``proxies[node]``.

        Example:
            >>> tree = Hierarchy.from_embeddings(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]]))
            >>> tree.lowest_common_ancestor([0, 2])
            4
        """
        chosen = [self._node(node) for node in nodes]
        if not chosen:
            raise ValueError("nodes must hold at least one node, got none")
        starts, stops = self.spans.T
        holding = (starts <= starts[chosen].min()) & (stops >= stops[chosen].max())
        return int(holding.argmax())  # a node has a lower number than those above it

    def cut(self, num_groups: int | None = None, *, height: float | None = None) -> np.ndarray:
        """Cut the tree into groups of leaves, ``(num_leaves,)``, numbered from 0 by first appearance.

        Args:
            num_groups: the number of groups; there are fewer if several nodes have the same height.
            height: in place of the number: leaves with a common node up to this height form a group.

        Example:
            >>> Hierarchy.from_embeddings(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 3.0]])).cut(2)
            array([0, 1, 1])
        """
        from scipy.cluster.hierarchy import fcluster

        if (num_groups is None) == (height is None):
            raise ValueError(f"cut() expects one of num_groups and height, got {num_groups} and {height}")
        if num_groups is not None:
            if (count := check_count("num_groups", num_groups)) > self.num_leaves:
                raise ValueError(f"num_groups must be at most num_leaves={self.num_leaves}, got {num_groups}")
            # Not criterion="maxclust": before version 1.15, SciPy often makes fewer groups.
            limit = self.linkage[-count, 2] if count < self.num_leaves else -1.0  # below all heights
        else:
            limit = check_number("height", height, positive=False)
        groups = fcluster(self.linkage.copy(), limit, "distance")
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.tolist()))}
        return np.array([numbers[group] for group in groups.tolist()])

    def place(self, distances: Any) -> np.ndarray:
        """The nodes to which ``M`` new samples belong, shape ``(M,)``.

        From the nearest leaf, go up to the first node whose height is at least the distance from that leaf, up to
        rounding in float32, or to the root.

        Args:
            distances: of the new samples from the leaves, shape ``(M, num_leaves)``, in the unit of the heights:
                cosine distances, for a tree of `from_embeddings` by average or complete linkage.

        Example:
            >>> tree = Hierarchy.from_embeddings(torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]]))
            >>> tree.place([[0.0, 0.2, 2.0], [0.1, 0.1, 1.9], [1.0, 1.0, 1.0]])
            array([0, 3, 4])
        """
        gaps = to_numpy(distances)
        if gaps.ndim != 2 or gaps.shape[1] != self.num_leaves or np.isnan(gaps).any():
            raise ValueError(f"distances must have shape (M, {self.num_leaves}), without NaN, got {gaps.shape}")
        nodes: np.ndarray = gaps.argmin(1)
        nearest = gaps.min(1)
        while (low := (self.heights[nodes] + _ROUNDING < nearest) & (nodes < self.root)).any():
            nodes = np.where(low, self.parents[nodes], nodes)
        return nodes

    def to_networkx(self) -> "networkx.DiGraph":
        """The tree as a ``networkx.DiGraph``, edges from parents to children.

        Nodes have the attributes ``height`` and, where the tree has them, ``proxy``, ``radius`` and ``label``;
        edges have the attribute ``length``, the difference of the heights.
        """
        import networkx

        above, graph = self.parents[:-1], networkx.DiGraph()
        lengths = self.heights[above] - self.heights[:-1]
        edges = zip(above.tolist(), range(self.root), lengths.tolist(), strict=True)
        graph.add_weighted_edges_from(edges, weight="length")
        columns = {"height": self.heights, "proxy": self.proxies, "radius": self.radii, "label": self.leaf_labels}
        for name, values in columns.items():
            if values is not None:
                networkx.set_node_attributes(graph, dict(enumerate(values.tolist())), name)
        return graph

    def to_newick(self, names: Sequence[str] | None = None) -> str:
        """The tree in Newick format; branch lengths are differences of heights, inner nodes are named by proxies.

        ``names`` has the name of each leaf; default its label, if all are different, else its number.
        """
        if names is None:
            names = [] if self.leaf_labels is None else [str(label) for label in self.leaf_labels.tolist()]
            names = names if len(set(names)) == self.num_leaves else [str(leaf) for leaf in range(self.num_leaves)]
        names = check_names("names", names, self.num_leaves)
        parts = [name if name.isdecimal() else "'" + name.replace("'", "''") + "'" for name in names]
        lengths = (self.heights[self.parents] - self.heights).tolist()
        for node, children in enumerate(self._merges.tolist(), self.num_leaves):
            below = ",".join(f"{parts[child]}:{lengths[child]}" for child in children)
            parts.append(f"({below})" + ("" if self.proxies is None else f"'proxy {self.proxies[node]}'"))
            for child in children:
                parts[child] = ""  # now part of the parent's text
        return parts[-1] + ";"

    def to_json(self) -> str:
        """The tree as JSON, which `from_json` reads back exactly."""
        return json.dumps(asdict(self), default=operator.methodcaller("tolist"))

    @classmethod
    def from_json(cls, text: str) -> "Hierarchy":
        """Read a tree from the output of `to_json`.

        Example:
            >>> tree = Hierarchy.from_embeddings(torch.randn(9, 4))
            >>> Hierarchy.from_json(tree.to_json()) == tree
            True
        """
        fields, expected = json.loads(text), cls.__dataclass_fields__
        if not isinstance(fields, dict) or set(fields) != set(expected):
            raise ValueError(f"text must be a JSON object with the fields {sorted(expected)}, as of to_json")
        if len(set(map(type, fields["leaf_labels"] or ()))) > 1:  # NumPy would make texts of all of them
            fields["leaf_labels"] = np.array(fields["leaf_labels"], object)
        return cls(**fields)

    def _node(self, node: Any) -> int:
        """The node as a Python number; an error if there is no such node."""
        try:
            number = -1 if isinstance(node, bool) else operator.index(node)  # of tensors too
        except TypeError:
            number = -1
        if not 0 <= number < self.num_nodes:
            raise ValueError(f"node must be a whole number from 0 to {self.num_nodes - 1}, got {node!r}")
        return number


def _class_means(rows: Tensor, index: np.ndarray, count: int) -> Tensor:
    """The mean of the rows of each class."""
    groups = torch.from_numpy(index)
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, groups, rows) / groups.bincount()[:, None]


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
