r"""Figures: embeddings on the Poincaré disk, and a hierarchy as a disk, a dendrogram or a page.

Needs ``pip install "hierloss[plot]"``. Conventions of this file
    - Every picture of the disk is of the unit disk: a point at hyperbolic distance ``d`` from the origin, in
      a ball of curvature ``-c``, is drawn at radius ``tanh(sqrt(c) d / 2)``. Trees are drawn with c = 1.
    - Functions take and return matplotlib axes; nothing is shown or saved, and no style is set globally.
    - Images are ``(N, H, W)`` or ``(N, H, W, channels)``, or a list of such; tensors of four dimensions are
      ``(N, channels, H, W)``, as torch has them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import poincare
from ._checks import check_embeddings, to_numpy
from ._layout import BRANCH, GREY, Leaves, geodesic, name_of, prune, sarkar, styles
from .distances import PoincareDistance
from .hierarchy import Hierarchy
from .page import write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dendrogram", "plot_disk", "plot_embeddings", "write_html"]

_INK, _FAINT = "#333333", "#D9D9D9"
_LEGEND_ROWS = 20


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
        for style, (name, rows) in zip(styles(), groups.items(), strict=False):
            color, marker = style if labels is not None else (GREY, "o")
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

    look = Leaves(tree, labels, class_names, names, images)
    small, members = prune(tree, max_leaves)
    points, scale = sarkar(small)
    ends, inner = points[: small.num_leaves], points[small.num_leaves :]
    ax.add_patch(Circle((0, 0), 1, fc="#FAFAFA", ec=_FAINT, lw=1, zorder=0))
    edges = [geodesic(points[above], points[node]) for node, above in enumerate(small.parents[:-1])]
    lines = [np.stack([edge.real, edge.imag], 1) for edge in edges]
    ax.add_collection(LineCollection(lines, colors=BRANCH, lw=0.9, zorder=1))
    ax.scatter(inner.real, inner.imag, s=10, color=_INK, linewidths=0, zorder=2)
    _draw_leaves(ax, np.stack([ends.real, ends.imag], 1), members, look)

    # Names and images are spaced evenly, in the middle of the leaves' arcs.
    around, reach = np.exp(2j * math.pi * small.spans[: len(ends)].mean(1) / len(ends)), 1.05
    ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    ax.set_axis_off()
    if look.images is not None:
        side = min(0.28, 0.86 * 2 * math.pi * 1.1 / len(ends))
        width = side / 2 / (reach + 1.35 * side) * _width_in_points(ax)
        for end, rows in zip(around * (reach + 0.62 * side), members, strict=True):
            _draw_image(ax, look, rows, (end.real, end.imag), width)
        reach += 1.35 * side
    shown = "" if len(ends) == tree.num_leaves else f"{tree.num_leaves} leaves in {len(ends)} branches; "
    if look.names is not None:
        names, notice = look.thinned_names(members)
        shown += notice
        for end, name in zip(around, names, strict=True):
            angle = math.degrees(math.atan2(end.imag, end.real))
            left = abs(angle) > 90
            ax.text(reach * end.real, reach * end.imag, name, fontsize=7.5, color=_INK,
                    rotation=angle + 180 * left, rotation_mode="anchor", va="center",
                    ha="right" if left else "left")  # fmt: skip
        reach += 0.02 * min(24, max(map(len, names)))
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    ax.text(0.5, 0, f"{shown}length of an edge = {scale:.3g} × difference of heights", fontsize=7, color=GREY,
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
    from scipy.cluster.hierarchy import dendrogram

    look = Leaves(tree, labels, class_names, names, images)
    small, members = prune(tree, max_leaves)
    drawn = dendrogram(small.to_linkage(), link_color_func=lambda _: BRANCH, no_labels=True, ax=ax)
    from matplotlib.patches import Rectangle

    stems = len(ax.collections)
    members = [members[leaf] for leaf in drawn["leaves"]]
    lowest, highest = small.heights[small.num_leaves], small.heights[-1]
    bottom = max(0.0, lowest - 0.15 * (highest - lowest))
    x = 5 + 10.0 * np.arange(len(members))
    _draw_leaves(ax, np.stack([x, np.full(len(x), bottom)], 1), members, look, _width_in_points(ax) / len(x))
    if look.names is not None:
        names, notice = look.thinned_names(members)
        ax.set_xticks(x, names, rotation=90, fontsize=7.5)
        ax.tick_params(axis="x", length=0)
        ax.set_title(notice, fontsize=7, color=GREY, loc="right")
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


def _draw_leaves(
    ax: "Axes", xy: np.ndarray, members: list[np.ndarray], look: Leaves, widest: float = math.inf
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


def _draw_image(ax: "Axes", look: Leaves, rows: np.ndarray, xy: tuple[float, float], width: float) -> None:
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
            ax.text(0, radius, f"{k * step:g}", color=GREY, fontsize=7, ha="center", va="center",
                    zorder=1, bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"})  # fmt: skip
    if clip_radius is not None:
        radius = math.tanh(root * clip_radius)
        ax.add_patch(Circle((0, 0), radius, fill=False, color=GREY, lw=0.8, ls=(0, (4, 3)), zorder=0))
    ax.add_patch(Circle((0, 0), 1, fill=False, color=_INK, lw=1, zorder=0))
    ax.plot(0, 0, marker="+", color=GREY, ms=6, zorder=0)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.set_axis_off()


# --- labels, colours, legends -------------------------------------------------------------------------------


def _groups(
    labels: Tensor | None, count: int, class_names: Sequence[str] | Mapping[int, str] | None
) -> dict[str, np.ndarray]:
    """Rows of each label, by its name, in the order of the labels."""
    if labels is None:
        return {"embeddings": np.arange(count)}
    values = to_numpy(labels)
    return {name_of(label, class_names): np.flatnonzero(values == label) for label in np.unique(values)}


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
