"""What `plotting` draws: groups and names of the leaves, the top of the tree, points on the disk."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ._checks import check_count, check_names, to_numpy, to_vector
from .hierarchy import Hierarchy

Names = Sequence[str] | Mapping[Any, str] | None
# Paul Tol's bright palette, which colour-blind readers can tell apart, and four more; clear on white and on black.
COLORS = "4477AA EE6677 228833 CCBB44 66CCEE AA3377 EE7733 009988 9977CC AA7744"
STYLES = [("#" + color, marker) for marker in "os^DvPX*" for color in COLORS.split()]
GREY = "#8C8C8C"
LEAF_DISTANCE = 3.0  # hyperbolic distance of leaves from the root: 0.905 of the radius


class Leaves:
    """Groups (by label) and names of the leaves, checked, with defaults filled in."""

    def __init__(self, tree: Hierarchy, labels: Any = None, class_names: Any = None, names: Any = None) -> None:
        own, count = tree.leaf_labels, tree.num_leaves
        repeated = own is not None and len(np.unique(own)) < count
        if labels is None and repeated:
            labels = own
        elif names is None and own is not None and not repeated:
            groups, index = grouped(own, count, class_names if labels is None else None, "leaf")
            names = [groups[group] for group in index]
        self.named, self.labelled = names is not None, labels is not None
        self.names = check_names(range(count) if names is None else names, count)
        self.groups, self.index = grouped(labels, count, class_names, "leaf")
        self.below = [tree.leaf_order[start:stop] for start, stop in tree.spans]

    def group(self, rows: np.ndarray) -> int:
        """The most frequent group of some leaves."""
        return int(np.bincount(self.index[rows]).argmax())

    def color(self, rows: np.ndarray) -> str:
        """The colour of a branch: that of the group of more than half of its leaves, else grey."""
        group = self.group(rows)
        return style(group)[0] if self.labelled and (self.index[rows] == group).mean() > 0.5 else GREY

    def title(self, rows: np.ndarray) -> str:
        """The name of a leaf, or the most frequent group and the number of leaves of a branch."""
        if len(rows) == 1 or not self.labelled:
            return self.names[rows[0]] if len(rows) == 1 else f"{len(rows)} leaves"
        group = self.group(rows)
        return f"{self.groups[group]}: {(self.index[rows] == group).sum()} of {len(rows)}"


def grouped(labels: Any, count: int, class_names: Names, kind: str) -> tuple[list[str], np.ndarray]:
    """Names of the distinct labels, in their order, and the index of the name of each leaf or embedding."""
    if labels is None:
        return ["all"], np.zeros(count, int)
    distinct, index = np.unique(to_vector(labels, count, kind), return_inverse=True)
    if class_names is None:
        return [str(label) for label in distinct.tolist()], index
    known = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
    for label in distinct.tolist():
        if label not in known:
            raise ValueError(f"class_names must have a name for each label, got none for {label!r}")
    return [str(known[label]) for label in distinct.tolist()], index


def style(group: int) -> tuple[str, str]:
    """Colour and marker of a group; they repeat after all combinations."""
    return STYLES[group % len(STYLES)]


def as_images(images: Any, count: int) -> list[np.ndarray]:
    """One array of bytes for each leaf, ``(H, W)`` or ``(H, W, 3 or 4)``."""
    if isinstance(images, Tensor):
        images = to_numpy(images.movedim(1, -1) if images.ndim == 4 else images)
    if len(images) != count:
        raise ValueError(f"images must be {count}, one for each leaf, got {len(images)}")
    arrays = [array[..., 0] if array.shape[2:] == (1,) else array for array in map(np.asarray, images)]
    for shape in (array.shape for array in arrays):
        if len(shape) < 2 or shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"images must be (H, W) or (H, W, 1, 3 or 4) each, got shape {shape}")
    if all(array.dtype == np.uint8 for array in arrays):
        return arrays
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    return [((array - low) / ((high - low) or 1) * 255).astype(np.uint8) for array in arrays]


def prune(tree: Hierarchy, max_leaves: int) -> tuple[Hierarchy, list[np.ndarray]]:
    """The top of a tree, with at most ``max_leaves`` leaves, and the original leaves under each of them."""
    from scipy.cluster.hierarchy import from_mlab_linkage

    count = min(check_count("max_leaves", max_leaves, minimum=2), tree.num_leaves)
    first, top = tree.num_nodes - count + 1, tree.linkage[1 - count :]
    ends = np.flatnonzero(tree.parents[:first] >= first)
    children = np.searchsorted(np.append(ends, np.arange(first, tree.num_nodes)), top[:, :2])
    linkage = from_mlab_linkage(np.column_stack([children + 1, top[:, 2]]))  # counts the leaves of each node
    return Hierarchy(linkage), [tree.leaves(int(end)) for end in ends]


def on_disk(tree: Hierarchy) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Points of the unit disk for all nodes, edges to their parents, and the hyperbolic length per unit of height.

    An edge goes along the circle of the parent to the angle of the node, then straight outwards: no edges cross.
    """
    scale = LEAF_DISTANCE / float(tree.heights[-1] or 1.0)
    radii = np.tanh(scale * (tree.heights[-1] - tree.heights) / 2)
    angles = 2 * math.pi * tree.spans.mean(1) / tree.num_leaves
    points = radii * np.exp(1j * angles)
    turns = np.linspace(angles[tree.parents[:-1]], angles[:-1], 20, axis=1)
    arcs = radii[tree.parents[:-1], None] * np.exp(1j * turns)
    return points, list(np.column_stack([arcs, points[:-1]])), scale
