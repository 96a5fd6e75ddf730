r"""Figures: embeddings on the Poincaré disk, and a hierarchy as a disk, a dendrogram or a page.

Needs ``pip install "hierloss[plot]"``. Conventions of this file
    - Every picture of the disk is of the unit disk: a point at hyperbolic distance ``d`` from the origin, in
      a ball of curvature ``-c``, is drawn at radius ``tanh(sqrt(c) d / 2)``. Trees are drawn with c = 1.
    - Functions take and return matplotlib axes; nothing is shown or saved, and no style is set globally.
    - Images are ``(N, H, W)`` or ``(N, H, W, channels)``, or a list of such; tensors of four dimensions are
      ``(N, channels, H, W)``, as torch has them.
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.cluster.hierarchy import dendrogram
from torch import Tensor

from . import poincare
from ._checks import check_count, check_embeddings
from .distances import PoincareDistance
from .hierarchy import Hierarchy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dendrogram", "plot_disk", "plot_embeddings", "write_html"]

_COLORS = (
    *("#332288", "#CC6677", "#117733", "#88CCEE", "#DDAA33"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#6E6E6E"),
)
"""Paul Tol's muted palette, told apart by colour-blind readers; past its end, the marker changes too."""

_MARKERS = "os^DvPX*"
_INK, _FAINT, _NO_LABEL = "#333333", "#D9D9D9", "#777777"
_BRANCH = "#8C8C8C"
_LEGEND_ROWS = 20
_MOST_NAMES = 80
"""More names than this would overlap, and are left out."""

_LEAF_DISTANCE = 5.0
"""Hyperbolic distance of the leaves from the root, along the edges: 0.987 of the radius."""

_OPEN_AT_FIRST = 80
"""Leaves that a page shows before anything is clicked."""

_PLOTLY_SYMBOLS = dict(
    zip(
        _MARKERS,
        ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"],
        strict=True,
    )
)


def plot_embeddings(
    embeddings: Tensor,
    labels: Tensor | None = None,
    proxies: Tensor | None = None,
    *,
    distance: PoincareDistance | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Draw embeddings, and the proxies of a loss, on the Poincaré disk.

    Radii are exact, angles are a projection: a point is drawn at its own hyperbolic distance from the origin,
    in the direction in which its tangent vector lies from their mean, in the plane of the two principal axes
    (of the class means if there are labels, else of all embeddings). Distances between two points are
    therefore not kept. Grey circles are at the hyperbolic distances written on them, the dashed circle at
    that of the clip radius.

    Args:
        embeddings: Euclidean features, shape ``(N, D)``, as they come from the network.
        labels: shape ``(N,)``, for the colours; ``None`` draws all in one.
        proxies: shape ``(P, D)``, ``HIERLoss.proxies``; ``None`` draws none.
        distance: gives curvature and clip radius, ``loss_func.distance``; default ``PoincareDistance()``.
        class_names: the name of each label, for the legend.
        ax: where to draw; ``None`` makes a new figure.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: shapes that do not fit together, or values that are not finite.

    Example:
        >>> ax = plot_embeddings(torch.randn(20, 8), torch.arange(20) % 4, torch.randn(5, 8))
        >>> ax.figure.savefig("embeddings.png")  # doctest: +SKIP
    """
    check_embeddings("embeddings", embeddings)
    if labels is not None and labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels must have shape ({len(embeddings)},), one for each embedding, got {tuple(labels.shape)}"
        )
    if proxies is not None:
        check_embeddings("proxies", proxies)
        if proxies.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"proxies must have {embeddings.shape[1]} columns, as the embeddings, got {proxies.shape[1]}"
            )
    distance = PoincareDistance() if distance is None else distance
    with torch.no_grad():
        root = math.sqrt(float(distance.c))
        points = _tangent(distance.maybe_normalize(embeddings), distance)
        inner = None if proxies is None else _tangent(distance.normalize(proxies), distance)
        mean, axes = _principal_axes(points, labels)
        ax = _new_axes((7.5, 6)) if ax is None else ax
        farthest = max(float(v.norm(dim=1).max()) for v in (points, inner) if v is not None and len(v))
        _draw_grid(ax, 2 * farthest, root, distance.clip_radius)
        xy = _on_disk(points, mean, axes, root)
        groups = _groups(labels, len(xy), class_names)
        for style, (name, rows) in zip(_styles(), groups.items(), strict=False):
            color, marker = style if labels is not None else (_NO_LABEL, "o")
            x, y = xy[rows].T
            ax.scatter(x, y, s=14, color=color, marker=marker, alpha=0.75, linewidths=0, label=name, zorder=2)
        if inner is not None:
            x, y = _on_disk(inner, mean, axes, root).T
            ax.scatter(x, y, s=22, marker="P", color="black", ec="white", lw=0.5, label="proxies", zorder=3)
        if labels is not None or inner is not None:
            _draw_legend(ax)
    return ax


# --- trees --------------------------------------------------------------------------------------------------


def plot_disk(
    tree: Hierarchy,
    *,
    labels: Any = None,
    class_names: Sequence[str] | Mapping[Any, str] | None = None,
    names: Sequence[str] | None = None,
    images: Any = None,
    max_leaves: int = 100,
    ax: "Axes | None" = None,
) -> "Axes":
    r"""Draw a hierarchy on the Poincaré disk, the root in the middle.

    Sarkar's construction: every edge is a geodesic whose hyperbolic length (of curvature -1) is in proportion
    to the difference of the two heights. The factor stands below the picture; it puts leaves at a distance of
    5 from the root, along the edges. The cone of a node is an arc of the boundary, as wide as its share of
    the leaves, and the node lies on the way from its parent to the middle of that arc, so that edges
    never cross. The distance of two leaves on the page is at most that of the way through the tree, and the
    less so the narrower the angle at which the ways part.

    Args:
        tree: what to draw.
        labels: of each leaf, for the colours; default ``tree.leaf_labels``, unless all are different. For a
            tree of classes, give their superclasses.
        class_names: the name of each label.
        names: of each leaf, written around the disk; default the leaf labels, if all are different.
        images: of each leaf, drawn around the disk.
        max_leaves: if there are more, the lowest branches are drawn as one leaf each, whose size grows with
            the number it stands for; it has their most frequent label, and the first image.
        ax: where to draw; ``None`` makes a new figure.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: labels, names or images are not one for each leaf.

    Example:
        >>> tree = Hierarchy.from_distances(torch.rand(20, 8))
        >>> ax = plot_disk(tree, labels=torch.arange(20) % 4)

    Source: Sarkar, "Low Distortion Delaunay Embedding of Trees in Hyperbolic Plane" (Graph Drawing 2011).
    """
    ax = _new_axes((8.5, 7.5)) if ax is None else ax
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    look = _Leaves(tree, labels, class_names, names, images)
    small, members = _prune(tree, max_leaves)
    points, scale = _sarkar(small)
    ends, inner = points[: small.num_leaves], points[small.num_leaves :]
    ax.add_patch(Circle((0, 0), 1, fc="#FAFAFA", ec=_FAINT, lw=1, zorder=0))
    edges = [_geodesic(points[above], points[node]) for node, above in enumerate(small.parents[:-1])]
    lines = [np.stack([edge.real, edge.imag], 1) for edge in edges]
    ax.add_collection(LineCollection(lines, colors=_BRANCH, lw=0.9, zorder=1))
    ax.scatter(inner.real, inner.imag, s=10, color=_INK, linewidths=0, zorder=2)
    _draw_leaves(ax, np.stack([ends.real, ends.imag], 1), members, look)

    # Names and images are spaced evenly, in the middle of the leaves' arcs.
    around, reach = np.exp(2j * math.pi * small._spans[: len(ends)].mean(1) / len(ends)), 1.05
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_axis_off()
    if look.images is not None:
        side = min(0.28, 0.86 * 2 * math.pi * 1.1 / len(ends))
        width = side / 2 / (reach + 1.35 * side) * _width_in_points(ax)
        for end, rows in zip(around * (reach + 0.62 * side), members, strict=True):
            _draw_image(ax, look, rows, (end.real, end.imag), width)
        reach += 1.35 * side
    names = look.names
    if names is not None and len(ends) <= _MOST_NAMES:
        for end, rows in zip(around, members, strict=True):
            angle = math.degrees(math.atan2(end.imag, end.real))
            left = abs(angle) > 90
            ax.text(reach * end.real, reach * end.imag, _title(names, rows), fontsize=7.5, color=_INK,
                    rotation=angle + 180 * left, rotation_mode="anchor", va="center",
                    ha="right" if left else "left")  # fmt: skip
        reach += 0.02 * min(24, max(len(_title(names, rows)) for rows in members))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    shown = "" if len(ends) == tree.num_leaves else f"{tree.num_leaves} leaves in {len(ends)} branches; "
    ax.text(0.5, 0, f"{shown}length of an edge = {scale:.3g} × difference of heights", fontsize=7, color=_NO_LABEL,
            ha="center", va="top", transform=ax.transAxes)  # fmt: skip
    return ax


def plot_dendrogram(
    tree: Hierarchy,
    *,
    labels: Any = None,
    class_names: Sequence[str] | Mapping[Any, str] | None = None,
    names: Sequence[str] | None = None,
    images: Any = None,
    max_leaves: int = 100,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw a hierarchy as a dendrogram, by SciPy; the vertical axis is the height.

    The axis begins a little below the lowest merge that is drawn: leaves are at height 0, often far below.

    Args:
        tree: what to draw.
        labels: as in `plot_disk`.
        class_names: as in `plot_disk`.
        names: as in `plot_disk`; they stand below.
        images: as in `plot_disk`; they stand below.
        max_leaves: as in `plot_disk`.
        ax: as in `plot_disk`.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: labels, names or images are not one for each leaf.

    Example:
        >>> tree = Hierarchy.from_distances(torch.rand(20, 8))
        >>> ax = plot_dendrogram(tree, labels=torch.arange(20) % 4)

    Source: ``scipy.cluster.hierarchy.dendrogram``.
    """
    ax = _new_axes((11, 4.8)) if ax is None else ax
    look = _Leaves(tree, labels, class_names, names, images)
    small, members = _prune(tree, max_leaves)
    drawn = dendrogram(small.to_linkage(), link_color_func=lambda _: _BRANCH, no_labels=True, ax=ax)
    from matplotlib.patches import Rectangle

    stems = len(ax.collections)
    members = [members[leaf] for leaf in drawn["leaves"]]
    lowest, highest = small.heights[small.num_leaves], small.heights[-1]
    bottom = max(0.0, lowest - 0.15 * (highest - lowest))
    x = 5 + 10.0 * np.arange(len(members))
    _draw_leaves(ax, np.stack([x, np.full(len(x), bottom)], 1), members, look, _width_in_points(ax) / len(x))
    names = look.names
    if names is not None and len(x) <= _MOST_NAMES:
        ax.set_xticks(x, [_title(names, rows) for rows in members], rotation=90, fontsize=7.5)
        ax.tick_params(axis="x", length=0)
    ax.set_ylabel("height", color=_INK, fontsize=9)
    ax.tick_params(labelsize=8, colors=_INK)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    # Room below the leaves, in points, for the images.
    image = 0.0 if look.images is None else min(60.0, 0.92 * _width_in_points(ax) / len(x))
    share = (14 + image) / _height_in_points(ax)
    span = 1.03 * (highest - bottom)
    ax.set(xlim=(0, 10 * len(x)), ylim=(bottom - span * share / (1 - share), bottom + span))
    ax.set_yticks([tick for tick in ax.get_yticks() if bottom <= tick <= bottom + span])
    ax.spines["left"].set_bounds(bottom, bottom + span)
    for branches in ax.collections[:stems]:
        branches.set_linewidth(1.0)
        branches.set_clip_path(Rectangle((0, bottom), 10 * len(x), span, transform=ax.transData))
    if look.images is not None:
        below = bottom - span / (1 - share) * (10 + image / 2) / _height_in_points(ax)
        for at, rows in zip(x, members, strict=True):
            _draw_image(ax, look, rows, (at, below), image)
    return ax


def write_html(
    tree: Hierarchy,
    path: str | os.PathLike[str],
    *,
    images: Any = None,
    texts: Sequence[str] | None = None,
    labels: Any = None,
    class_names: Sequence[str] | Mapping[Any, str] | None = None,
    names: Sequence[str] | None = None,
    title: str = "Hierarchy",
) -> None:
    """Write a hierarchy as one self-contained page, to pan, zoom, hover over and fold.

    The layout is that of `plot_disk`, and is made anew when a click folds or unfolds a branch, so that what
    is open has the room. Hovering shows the image, text and label of a leaf, or a few of the images and texts
    below a branch. The page needs no network. At first, the lowest branches are folded such that it shows at
    most 80 leaves.

    Args:
        tree: what to draw.
        path: the file, overwritten if it exists.
        images: of each leaf; they are kept in the page as PNG.
        texts: of each leaf.
        labels: as in `plot_disk`.
        class_names: as in `plot_disk`.
        names: as in `plot_disk`.
        title: heading of the page.

    Raises:
        ImportError: plotly or matplotlib is not installed.
        ValueError: labels, names, images or texts are not one for each leaf.

    Example:
        >>> import tempfile
        >>> tree = Hierarchy.from_distances(torch.rand(20, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_html(tree, f"{folder}/tree.html", labels=torch.arange(20) % 4)
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('pages need plotly: pip install "hierloss[plot]"') from error
    look = _Leaves(tree, labels, class_names, names, images)
    if texts is not None and len(texts) != tree.num_leaves:
        raise ValueError(f"texts must be {tree.num_leaves}, one for each leaf, got {len(texts)}")
    top, _ = _prune(tree, _OPEN_AT_FIRST)
    data = {
        "title": title,
        "scale": _scale(tree),
        "parents": tree.parents.tolist(),
        "heights": tree.heights.tolist(),
        "proxies": tree.proxies.tolist(),
        "sizes": tree.sizes.tolist(),
        "firstOpen": tree.num_nodes - (top.num_nodes - top.num_leaves),
        "groups": [
            {"name": name, "color": look.style(group)[0], "symbol": _PLOTLY_SYMBOLS[look.style(group)[1]]}
            for group, name in enumerate(look.groups)
        ],
        "labelled": look.labelled,
        "group": look.index.tolist(),
        "names": None if look.names is None else list(map(str, look.names)),
        "texts": None if texts is None else list(map(str, texts)),
        "images": None if look.images is None else [_data_uri(image) for image in look.images],
    }
    # "<" could end the script element that the data is in.
    text = json.dumps(data).replace("<", "\\u003c")
    page = Template(_PAGE).substitute(title=html.escape(title), plotly=get_plotlyjs(), data=text)
    Path(path).write_text(page, encoding="utf-8")


class _Leaves:
    """What is known of the leaves: groups (by label), names, images; checked, with defaults filled in."""

    def __init__(self, tree: Hierarchy, labels: Any, class_names: Any, names: Any, images: Any) -> None:
        own, count = tree.leaf_labels, tree.num_leaves
        own_are_names = own is not None and len(np.unique(own)) == count
        if labels is None and not own_are_names:
            labels = own
        elif labels is None and names is None and own is not None:
            names = [_name(label, class_names) for label in own.tolist()]
        if names is not None and len(names) != count:
            raise ValueError(f"names must be {count}, one for each leaf, got {len(names)}")
        self.names: Sequence[str] | None = names
        self.labelled = labels is not None
        values = np.zeros(count, int) if labels is None else _array(labels)
        if values.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), one for each leaf, got {values.shape}")
        distinct, self.index = np.unique(values, return_inverse=True)
        self.groups = [_name(v, class_names) for v in distinct.tolist()] if self.labelled else ["leaves"]
        self.images = None if images is None else _images(images, count)

    def style(self, group: int) -> tuple[str, str]:
        """Colour and marker of a group."""
        styles = _styles()
        return styles[group % len(styles)] if self.labelled else ("#4477AA", "o")

    def group(self, rows: np.ndarray) -> int:
        """The most frequent group of some leaves."""
        return int(np.bincount(self.index[rows]).argmax())


def _prune(tree: Hierarchy, max_leaves: int) -> tuple[Hierarchy, list[np.ndarray]]:
    """The top of a tree, with at most so many leaves, and the leaves that each of them stands for."""
    first, count = tree.num_nodes, 1
    while first > tree.num_leaves:
        count += len(tree._children[first - 1]) - 1
        if count > max(check_count("max_leaves", max_leaves, minimum=2), len(tree._children[tree.root])):
            break
        first -= 1
    ends = np.flatnonzero((tree.parents >= first) & (np.arange(tree.num_nodes) < first))
    kept = np.append(ends, np.arange(first, tree.num_nodes))
    heights = np.where(kept < first, 0, tree.heights[kept])
    parents = np.append(np.searchsorted(kept, tree.parents[kept[:-1]]), -1)
    return Hierarchy(parents, heights, tree.proxies[kept]), [tree.leaves(int(end)) for end in ends]


def _sarkar(tree: Hierarchy) -> tuple[np.ndarray, float]:
    """Points of the unit disk, complex, for all nodes; and hyperbolic length per unit of height."""
    scale = _scale(tree)
    middles = np.exp(2j * math.pi * tree._spans.mean(1) / tree.num_leaves)
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
    return _LEAF_DISTANCE / float(tree.heights[-1]) if tree.heights[-1] > 0 else 1.0


def _geodesic(start: complex, stop: complex, count: int = 24) -> np.ndarray:
    """Points along the geodesic of the unit disk, evenly spaced in hyperbolic length."""
    step = (stop - start) / (1 - np.conj(start) * stop)
    reach = np.tanh(np.arctanh(min(abs(step), 1 - 1e-15)) * np.linspace(0, 1, count))
    along = reach * (step / abs(step) if step else 0)
    points: np.ndarray = (start + along) / (1 + np.conj(start) * along)
    return points


def _draw_leaves(
    ax: "Axes", xy: np.ndarray, members: list[np.ndarray], look: _Leaves, widest: float = math.inf
) -> None:
    """Markers of the leaves, by label, as large as the number of leaves they stand for; and the legend."""
    of_group = np.array([look.group(rows) for rows in members])
    sizes = np.array([min(26 * (1 + math.log2(len(rows))), widest**2) for rows in members])
    for group in np.unique(of_group):
        color, marker = look.style(int(group))
        x, y = xy[of_group == group].T
        ax.scatter(x, y, s=sizes[of_group == group], color=color, marker=marker, ec="white", lw=0.6,
                   zorder=3, clip_on=False)  # fmt: skip
        ax.scatter([], [], s=26, color=color, marker=marker, label=look.groups[group])
    if look.labelled:
        _draw_legend(ax)


def _draw_image(ax: "Axes", look: _Leaves, rows: np.ndarray, xy: tuple[float, float], width: float) -> None:
    """The image of the first of some leaves, so many points wide, framed in the colour of their group."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    assert look.images is not None
    image = look.images[rows[0]]
    box = OffsetImage(image, zoom=0.88 * width / max(image.shape[:2]), cmap="gray", interpolation="nearest")
    color = look.style(look.group(rows))[0] if look.labelled else _FAINT
    frame = {"edgecolor": color, "linewidth": max(0.6, min(1.2, width / 16))}
    artist = AnnotationBbox(box, xy, pad=0.005 * width, bboxprops=frame, annotation_clip=False)
    ax.add_artist(artist).set_zorder(2.5)


def _width_in_points(ax: "Axes") -> float:
    """Width of the axes as they will be laid out."""
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    return float(ax.get_window_extent().width * 72 / ax.figure.dpi)


def _height_in_points(ax: "Axes") -> float:
    """Height of the axes as they were last laid out."""
    return float(ax.get_window_extent().height * 72 / ax.figure.dpi)


def _title(names: Sequence[str], rows: np.ndarray) -> str:
    """The name of a leaf, or how many leaves there are."""
    return str(names[rows[0]]) if len(rows) == 1 else f"{len(rows)} leaves"


def _images(images: Any, count: int) -> list[np.ndarray]:
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


def _data_uri(image: np.ndarray) -> str:
    """The image as a PNG in a data URI."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _array(values: Any) -> np.ndarray:
    """Tensor, array or list as an array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


# --- the disk -----------------------------------------------------------------------------------------------


def _tangent(points: Tensor, distance: PoincareDistance) -> Tensor:
    """Tangent vectors, in float64 on the CPU, of points of the ball."""
    v = poincare.log_map0(points.detach().double(), distance.c).cpu()
    if not bool(torch.isfinite(v).all()):
        raise ValueError("embeddings and proxies must be finite, got NaN or infinity")
    return v


def _principal_axes(points: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean, ``(D,)``, and the two principal axes, ``(D, 2)``, with a fixed choice of sign."""
    if labels is not None:
        points = torch.stack([points[labels.cpu() == label].mean(0) for label in torch.unique(labels.cpu())])
    mean = points.mean(0)
    directions = torch.linalg.svd(points - mean, full_matrices=False).Vh[:2].T
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    return mean, torch.nn.functional.pad(directions, (0, 2 - directions.shape[1]))


def _on_disk(points: Tensor, mean: Tensor, axes: Tensor, root: float) -> np.ndarray:
    """Coordinates in the unit disk: direction by projection, hyperbolic distance from the origin kept."""
    flat = torch.nn.functional.normalize((points - mean) @ axes, dim=1)
    xy: np.ndarray = (flat * (root * points.norm(dim=1, keepdim=True)).tanh()).numpy()
    return xy


def _draw_grid(ax: "Axes", farthest: float, root: float, clip_radius: float | None) -> None:
    """The boundary, circles of equal distance from the origin, and the circle of the clip radius."""
    from matplotlib.patches import Circle

    edge = math.tanh(root * farthest / 2)
    limit = min(1.0, 1.08 * edge) if edge > 0 else 1.0
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 50, 100, math.inf) if farthest / s <= 6)
    for k in range(1, 7):
        if k * step <= farthest * 1.02:
            radius = math.tanh(root * k * step / 2)
            ax.add_patch(Circle((0, 0), radius, fill=False, color=_FAINT, lw=0.7, zorder=0))
            ax.text(0, radius, f"{k * step:g}", color=_NO_LABEL, fontsize=7, ha="center", va="center",
                    zorder=1, bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"})  # fmt: skip
    if clip_radius is not None:
        radius = math.tanh(root * clip_radius)
        ax.add_patch(Circle((0, 0), radius, fill=False, color=_NO_LABEL, lw=0.8, ls=(0, (4, 3)), zorder=0))
    ax.add_patch(Circle((0, 0), 1, fill=False, color=_INK, lw=1, zorder=0))
    ax.plot(0, 0, marker="+", color=_NO_LABEL, ms=6, zorder=0)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.set_axis_off()


# --- labels, colours, legends -------------------------------------------------------------------------------


def _styles() -> list[tuple[str, str]]:
    """Colour and marker for each label, in order; they repeat after all combinations."""
    return [(color, marker) for marker in _MARKERS for color in _COLORS]


def _groups(
    labels: Tensor | None, count: int, class_names: Sequence[str] | Mapping[int, str] | None
) -> dict[str, np.ndarray]:
    """Rows of each label, by its name, in the order of the labels."""
    if labels is None:
        return {"embeddings": np.arange(count)}
    values = labels.detach().cpu().numpy()
    return {_name(label, class_names): np.flatnonzero(values == label) for label in np.unique(values)}


def _name(label: Any, class_names: Sequence[str] | Mapping[int, str] | None) -> str:
    """The name of a label, or the label itself."""
    if class_names is None:
        return str(label)
    try:
        return str(class_names[label])
    except (KeyError, IndexError):
        raise ValueError(f"class_names must have a name for each label, got none for {label}") from None


def _draw_legend(ax: "Axes") -> None:
    """A legend beside the axes, in columns of `_LEGEND_ROWS`."""
    handles, names = ax.get_legend_handles_labels()
    ax.legend(
        handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8,
        ncols=math.ceil(len(handles) / _LEGEND_ROWS), markerscale=1.3, handletextpad=0.3, labelcolor=_INK,
    )  # fmt: skip


def _new_axes(figsize: tuple[float, float]) -> "Axes":
    """Axes of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "hierloss[plot]"') from error
    axes: Axes = plt.subplots(figsize=figsize, layout="constrained")[1]
    return axes


# --- the page -----------------------------------------------------------------------------------------------

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  html, body { height: 100%; margin: 0; background: #fff; color: #333; }
  body { display: flex; flex-direction: column; font: 14px/1.45 system-ui, sans-serif; }
  header { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; padding: 10px 16px 6px; }
  h1 { font-size: 17px; font-weight: 600; margin: 0; }
  #hint { color: #666; flex: 1; min-width: 260px; font-size: 13px; }
  button { font: inherit; font-size: 13px; color: #333; background: #fff; border: 1px solid #bbb;
           border-radius: 5px; padding: 2px 10px; cursor: pointer; }
  button:hover, button:focus-visible { border-color: #333; }
  #plot { flex: 1; min-height: 0; }
  #card { position: fixed; display: none; max-width: 300px; padding: 8px 10px; background: #fff; z-index: 9;
          pointer-events: none; border: 1px solid #bbb; border-radius: 6px;
          box-shadow: 0 3px 12px rgb(0 0 0 / .16); }
  #card b { display: block; }
  #card img { width: 112px; image-rendering: pixelated; border: 1px solid #ddd; margin-top: 6px; }
  #card .row { display: flex; flex-wrap: wrap; gap: 4px; margin-top: 6px; }
  #card .row img { width: 44px; margin: 0; }
  #card p { margin: 4px 0 0; overflow-wrap: anywhere; }
  #card .dim { color: #666; font-size: 12.5px; }
</style>
</head>
<body>
<header>
  <h1></h1>
  <span id="hint"></span>
  <button id="open">Unfold all</button>
  <button id="fold">Fold all</button>
  <button id="reset">Reset view</button>
</header>
<div id="plot"></div>
<div id="card"></div>
<script id="data" type="application/json">$data</script>
<script>$plotly</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const count = D.parents.length, leaves = D.group.length, root = count - 1;
const children = Array.from({length: count}, () => []);
for (let n = 0; n < root; n++) children[D.parents[n]].push(n);
const folded = new Set();
for (let n = leaves; n < D.firstOpen; n++) folded.add(n);

document.querySelector("h1").textContent = D.title;
document.getElementById("hint").textContent =
  "Click a branch to fold or unfold it, scroll to zoom, drag to pan. " +
  "Length of an edge = " + D.scale.toPrecision(3) + " \\u00d7 difference of heights.";

// The leaves below each node are side by side in this order, from start[n] on.
const start = new Array(count).fill(0), order = new Array(leaves);
for (let n = root, at; n >= leaves; n--) {
  at = start[n];
  for (const child of children[n]) { start[child] = at; at += D.sizes[child]; }
}
for (let n = 0; n < leaves; n++) order[start[n]] = n;
const under = n => order.slice(start[n], start[n] + D.sizes[n]);

// Complex numbers are [x, y]; move(a, w) = (a + w) / (1 + conj(a) w) takes 0 to a.
function move(a, w) {
  const x = a[0] + w[0], y = a[1] + w[1];
  const u = 1 + a[0] * w[0] + a[1] * w[1], v = a[0] * w[1] - a[1] * w[0], s = u * u + v * v;
  return [(x * u + y * v) / s, (y * u - x * v) / s];
}
function layout() {  // the nodes that are not below a folded one, and their places
  const nodes = [root], widths = new Map(), place = new Map(), starts = new Map();
  for (let i = 0; i < nodes.length; i++) if (!folded.has(nodes[i])) nodes.push(...children[nodes[i]]);
  for (const n of nodes.slice().reverse()) {
    const inside = folded.has(n) ? [] : children[n];
    widths.set(n, inside.length ? inside.reduce((sum, child) => sum + widths.get(child), 0) : 1);
  }
  place.set(root, [0, 0]);
  starts.set(root, 0);
  for (const n of nodes) if (!folded.has(n)) {
    let at = starts.get(n);
    for (const child of children[n]) {
      const angle = 2 * Math.PI * (at + widths.get(child) / 2) / widths.get(root), from = place.get(n);
      const toward = move([-from[0], -from[1]], [Math.cos(angle), Math.sin(angle)]);
      const height = folded.has(child) ? 0 : D.heights[child];  // a folded branch is drawn as a leaf
      const length = Math.tanh(D.scale * (D.heights[n] - height) / 2) / Math.hypot(...toward);
      place.set(child, move(from, [toward[0] * length, toward[1] * length]));
      starts.set(child, at);
      at += widths.get(child);
    }
  }
  return {nodes, place};
}
function geodesic(from, to) {
  const step = move([-from[0], -from[1]], to), size = Math.hypot(...step), points = [];
  for (let i = 0; i <= 12; i++) {
    const part = size ? Math.tanh(Math.atanh(Math.min(size, 1 - 1e-15)) * i / 12) / size : 0;
    points.push(move(from, [step[0] * part, step[1] * part]));
  }
  return points;
}
function majority(n) {
  const tally = D.groups.map(() => 0);
  under(n).forEach(m => tally[D.group[m]]++);
  return tally;
}
let current;
function traces() {
  current = layout();
  const {nodes, place} = current, x = [], y = [];
  for (const n of nodes) if (n !== root) {
    for (const point of [...geodesic(place.get(D.parents[n]), place.get(n)), [null, null]]) {
      x.push(point[0]);
      y.push(point[1]);
    }
  }
  const dots = (some, extra) => Object.assign({
    x: some.map(n => place.get(n)[0]), y: some.map(n => place.get(n)[1]), customdata: some,
    mode: "markers", hoverinfo: "none", showlegend: false,
  }, extra);
  const inner = nodes.filter(n => n >= leaves), closed = inner.filter(n => folded.has(n));
  const color = n => { const tally = majority(n); return D.groups[tally.indexOf(Math.max(...tally))].color; };
  return [
    {x, y, mode: "lines", line: {color: "#8c8c8c", width: 1}, hoverinfo: "skip", showlegend: false},
    ...D.groups.map(g => ({x: [null], y: [null], mode: "markers", name: g.name, showlegend: D.labelled,
      marker: {color: g.color, symbol: g.symbol, size: 10}, hoverinfo: "skip"})),
    ...D.groups.map((g, i) => dots(nodes.filter(n => n < leaves && D.group[n] === i), {
      marker: {color: g.color, symbol: g.symbol, size: 9, line: {color: "#fff", width: 1}}})),
    dots(inner.filter(n => !folded.has(n)), {marker: {color: "#333", size: 7}}),
    dots(closed, {
      mode: "markers+text", text: closed.map(n => String(D.sizes[n])), textposition: "middle center",
      textfont: {size: 10, color: "#222"},
      marker: {color: "#fff", opacity: 1, size: closed.map(n => 15 + 2.2 * Math.log2(D.sizes[n])),
               line: {color: closed.map(color), width: 3}}}),
  ];
}
const plot = document.getElementById("plot"), card = document.getElementById("card");
const axis = () => ({range: [-1.06, 1.06], showgrid: false, zeroline: false, showticklabels: false});
const view = {
  xaxis: axis(), yaxis: Object.assign({scaleanchor: "x"}, axis()), uirevision: 1,
  margin: {l: 10, r: 10, t: 0, b: 10}, dragmode: "pan", hovermode: "closest", hoverdistance: 12,
  legend: {font: {size: 13}, itemclick: false, itemdoubleclick: false}, plot_bgcolor: "#fff",
  shapes: [{type: "circle", x0: -1, y0: -1, x1: 1, y1: 1, layer: "below", fillcolor: "#fafafa",
            line: {color: "#d9d9d9", width: 1}}],
};
const config = {scrollZoom: true, responsive: true, displayModeBar: false, doubleClick: false};
const draw = () => Plotly.react(plot, traces(), view, config);

function add(parent, tag, text, name) {
  const element = document.createElement(tag);
  if (tag === "img") element.src = text; else element.textContent = text;
  if (name) element.className = name;
  return parent.appendChild(element);
}
function describe(n) {
  card.replaceChildren();
  if (n < leaves) {
    add(card, "b", D.names ? D.names[n] : "leaf " + n);
    if (D.labelled) add(card, "span", D.groups[D.group[n]].name, "dim");
    if (D.images) add(add(card, "div", ""), "img", D.images[n]);
    if (D.texts) add(card, "p", D.texts[n]);
    return;
  }
  add(card, "b", D.sizes[n] + " leaves");
  add(card, "span", (D.proxies[n] < 0 ? "" : "proxy " + D.proxies[n] + ", ") + "height " +
      D.heights[n].toPrecision(3), "dim");
  if (D.labelled) {
    const tally = majority(n).map((k, i) => [k, D.groups[i].name]).filter(t => t[0]);
    const most = tally.sort((a, b) => b[0] - a[0]).slice(0, 4).map(t => t[0] + " \\u00d7 " + t[1]);
    add(card, "p", most.join(", ") + (tally.length > 4 ? ", \\u2026" : ""));
  }
  const all = under(n), some = k => all.length <= k ? all : Array.from({length: k}, (_, i) =>
    all[Math.floor((i + .5) * all.length / k)]);
  const row = add(card, "div", "", "row");
  if (D.images) some(10).forEach(m => add(row, "img", D.images[m]));
  if (D.texts) some(5).forEach(m => add(card, "p", "\\u2022 " + D.texts[m], "dim"));
  if (!D.texts && !D.images && D.names) add(card, "p", some(8).map(m => D.names[m]).join(", "), "dim");
}
draw().then(() => {
  plot.on("plotly_hover", event => {
    const n = event.points[0].customdata;
    if (n === undefined) return;
    describe(n);
    card.style.display = "block";
    const {clientX: x, clientY: y} = event.event, {offsetWidth: w, offsetHeight: h} = card;
    card.style.left = Math.max(4, x + 16 + w > innerWidth ? x - 16 - w : x + 16) + "px";
    card.style.top = Math.max(4, Math.min(y + 12, innerHeight - h - 8)) + "px";
  });
  plot.on("plotly_unhover", () => { card.style.display = "none"; });
  plot.on("plotly_click", event => {
    const n = event.points[0].customdata;
    if (n === undefined || n < leaves) return;
    if (!folded.delete(n)) folded.add(n);
    card.style.display = "none";
    draw();
  });
  document.getElementById("open").onclick = () => { folded.clear(); draw(); };
  document.getElementById("fold").onclick = () => {
    for (let n = leaves; n < root; n++) folded.add(n);
    draw();
  };
  document.getElementById("reset").onclick = () => Plotly.relayout(plot,
    {"xaxis.range": axis().range, "yaxis.range": axis().range});
  plot.dataset.ready = "yes";
});
</script>
</body>
</html>
"""
