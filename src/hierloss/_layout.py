"""Where the nodes of a drawn tree are, and what its leaves look like; shared by figures and page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ._checks import check_count, to_numpy
from .hierarchy import Hierarchy

COLORS = (
    *("#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#6E6E6E"),
)
"""Paul Tol's muted palette, which colour-blind readers can tell apart; after its end, the marker changes too."""

MARKERS = "os^DvPX*"
GREY, BRANCH = "#777777", "#8C8C8C"
LEAF_DISTANCE = 5.0
"""Hyperbolic distance of the leaves from the root, along the edges: 0.987 of the radius."""

MOST_NAMES = 80
"""More names would overlap: of more, every second, third, ... is drawn, and a notice says so."""


class Leaves:
    """What is known of the leaves: groups (by label), names, images; checked, with defaults filled in."""

    def __init__(self, tree: Hierarchy, labels: Any, class_names: Any, names: Any, images: Any) -> None:
        own, count = tree.leaf_labels, tree.num_leaves
        own_are_names = own is not None and len(np.unique(own)) == count
        if labels is None and not own_are_names:
            labels = own
        elif labels is None and names is None and own is not None:
            names = [name_of(label, class_names) for label in own.tolist()]
        if names is not None and len(names) != count:
            raise ValueError(f"names must be {count}, one for each leaf, got {len(names)}")
        self.names: Sequence[str] | None = names
        self.labelled = labels is not None
        values = np.zeros(count, int) if labels is None else to_numpy(labels)
        if values.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), one for each leaf, got {values.shape}")
        distinct, self.index = np.unique(values, return_inverse=True)
        self.groups = [name_of(v, class_names) for v in distinct.tolist()] if self.labelled else ["leaves"]
        self.images = None if images is None else as_images(images, count)

    def style(self, group: int) -> tuple[str, str]:
        """Colour and marker of a group."""
        possible = styles()
        return possible[group % len(possible)] if self.labelled else ("#4477AA", "o")

    def leaf_names(self) -> list[str]:
        """The name of each leaf, its number if there are none."""
        return [str(n) for n in (range(len(self.index)) if self.names is None else self.names)]

    def thinned_names(self, members: list[np.ndarray]) -> tuple[list[str], str]:
        """A title for each drawn leaf, empty where there is no room for it, and a notice of those left out."""
        step = math.ceil(len(members) / MOST_NAMES)
        titles = [self.leaf_names()[rows[0]] if len(rows) == 1 else f"{len(rows)} leaves" for rows in members]
        notice = "" if step == 1 else f"1 of {step} names is shown; "
        return [title if row % step == 0 else "" for row, title in enumerate(titles)], notice

    def group(self, rows: np.ndarray) -> int:
        """The most frequent group of some leaves."""
        return int(np.bincount(self.index[rows]).argmax())


def prune(tree: Hierarchy, max_leaves: int) -> tuple[Hierarchy, list[np.ndarray]]:
    """The top of a tree, with at most so many leaves, and the leaves that each of them stands for."""
    first, count = tree.num_nodes, 1
    while first > tree.num_leaves:
        count += len(tree.children(first - 1)) - 1
        if count > max(check_count("max_leaves", max_leaves, minimum=2), len(tree.children(tree.root))):
            break
        first -= 1
    ends = np.flatnonzero((tree.parents >= first) & (np.arange(tree.num_nodes) < first))
    kept = np.append(ends, np.arange(first, tree.num_nodes))
    heights = np.where(kept < first, 0, tree.heights[kept])
    parents = np.append(np.searchsorted(kept, tree.parents[kept[:-1]]), -1)
    return Hierarchy(parents, heights, tree.proxies[kept]), [tree.leaves(int(end)) for end in ends]


def sarkar(tree: Hierarchy) -> tuple[np.ndarray, float]:
    """Points of the unit disk, complex, for all nodes; and hyperbolic length per unit of height."""
    scale = _scale(tree)
    middles = np.exp(2j * math.pi * tree.spans.mean(1) / tree.num_leaves)
    points = np.zeros(tree.num_nodes, complex)
    for node in range(tree.num_nodes - 2, -1, -1):
        above = int(tree.parents[node])
        start, length = points[above], scale * float(tree.heights[above] - tree.heights[node])
        # Seen from the parent, the middle of the arc is in this direction; geodesics from 0 are straight.
        toward = (middles[node] - start) / (1 - np.conj(start) * middles[node])
        step = math.tanh(length / 2) * toward / abs(toward)
        points[node] = (start + step) / (1 + np.conj(start) * step)
    return points, scale


def _scale(tree: Hierarchy) -> float:
    """Hyperbolic length, on the disk, per unit of height."""
    return LEAF_DISTANCE / float(tree.heights[-1]) if tree.heights[-1] > 0 else 1.0


def geodesic(start: complex, stop: complex, count: int = 24) -> np.ndarray:
    """Points along the geodesic of the unit disk, evenly spaced in hyperbolic length."""
    step = (stop - start) / (1 - np.conj(start) * stop)
    reach = np.tanh(np.arctanh(min(abs(step), 1 - 1e-15)) * np.linspace(0, 1, count))
    along = reach * (step / abs(step) if step else 0)
    points: np.ndarray = (start + along) / (1 + np.conj(start) * along)
    return points


def styles() -> list[tuple[str, str]]:
    """Colour and marker for each label, in order; they repeat after all combinations."""
    return [(color, marker) for marker in MARKERS for color in COLORS]


def name_of(label: Any, class_names: Sequence[str] | Mapping[int, str] | None) -> str:
    """The name of a label, or the label itself."""
    if class_names is None:
        return str(label)
    try:
        if isinstance(class_names, Sequence) and label < 0:  # would count from the end
            raise IndexError
        return str(class_names[label])
    except (KeyError, IndexError):
        raise ValueError(f"class_names must have a name for each label, got none for {label}") from None


def as_images(images: Any, count: int) -> list[np.ndarray]:
    """One array of bytes for each leaf, ``(H, W)`` or ``(H, W, channels)``."""
    if isinstance(images, Tensor):
        images = (images.movedim(1, -1) if images.ndim == 4 else images).detach().cpu().numpy()
    if len(images) != count:
        raise ValueError(f"images must be {count}, one for each leaf, got {len(images)}")
    arrays = [np.asarray(image) for image in images]
    arrays = [array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array for array in arrays]
    for array in arrays:
        if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
            raise ValueError(f"images must be (H, W) or (H, W, 3 or 4) each, got shape {array.shape}")
    if all(array.dtype == np.uint8 for array in arrays):
        return arrays
    low, high = min(a.min() for a in arrays), max(a.max() for a in arrays)
    span = (high - low) or 1
    return [((array - low) / span * 255).astype(np.uint8) for array in arrays]
