r"""Figures: embeddings on the Poincaré disk, and a hierarchy as a disk, a dendrogram or a page.

Needs ``pip install "hierloss[plot]"``. Functions that plot return matplotlib axes, and change no global settings.
The disk is the unit disk: a point at hyperbolic distance ``d`` from the origin, in a ball of curvature ``-c``, is
drawn at radius ``tanh(sqrt(c) d / 2)``. Trees are drawn with c = 1.
"""

import base64
import gzip
import importlib
import io
import json
import math
import re
import string
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from . import poincare
from ._checks import check_count, check_finite, check_names, to_numpy, to_vector
from .distances import PoincareDistance
from .hierarchy import Hierarchy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_dendrogram", "plot_disk", "plot_embeddings", "write_html"]

Names = Sequence[str] | Mapping[Any, str] | None
_FONT, _LINE = 7, 7.6  # size of names, and the room that each needs, in points
_CIRCLE = np.exp(2j * math.pi * np.linspace(0, 1, 181))
# Paul Tol's bright palette, which colour-blind readers can tell apart, and four more; clear on white and on black.
_COLORS = "4477AA EE6677 228833 CCBB44 66CCEE AA3377 EE7733 009988 9977CC AA7744"
_STYLES = [("#" + color, marker) for marker in "os^DvPX*" for color in _COLORS.split()]
_GREY = "#8C8C8C"
_LEAF_DISTANCE = 3.0  # hyperbolic distance of leaves from the root: 0.905 of the radius


def plot_embeddings(
    embeddings: Tensor, labels: Tensor | None = None, proxies: Tensor | None = None, *,
    distance: PoincareDistance | None = None, class_names: Names = None, ax: "Axes | None" = None,
) -> "Axes":  # fmt: skip
    r"""Draw embeddings, and the proxies of a loss, on the Poincaré disk.

    Radii are exact: the hyperbolic distances from the origin. Angles are those of the tangent vectors, minus
    their mean, in the plane of the two principal axes (of the class means, if there are three or more). So
    distances between points are not preserved. Circles are labelled with their distances; the clip radius is
    dashed.

    Args:
        embeddings: shape ``(N, D)``, as they go into the loss.
        labels: shape ``(N,)``, for the colours.
        proxies: shape ``(P, D)``, ``HIERLoss.proxies``.
        distance: gives curvature and clip radius, ``loss_func.distance``; default ``PoincareDistance()``.
        class_names: the name of each label, for the legend.
        ax: where to draw; ``None`` makes a new figure.

    Example:
        >>> ax = plot_embeddings(torch.randn(20, 8), torch.arange(20) % 4, torch.randn(5, 8))
    """
    check_finite("embeddings", embeddings)
    groups, index = _grouped(labels, len(embeddings), class_names, "embedding")
    distance = PoincareDistance() if distance is None else distance
    on_ball = [distance.maybe_normalize(embeddings)]
    if proxies is not None:
        check_finite("proxies", proxies)
        if (width := embeddings.shape[1]) != proxies.shape[1]:
            raise ValueError(f"proxies must have {width} columns, as the embeddings, got {proxies.shape[1]}")
        on_ball.append(distance.normalize(proxies))
    tangents = [poincare.log_map0(x.detach().double(), distance.c).detach().cpu().numpy() for x in on_ball]
    points, every = tangents[0], np.concatenate(tangents)
    means = points if len(groups) < 3 else np.stack([points[index == g].mean(0) for g in range(len(groups))])
    center, root = means.mean(0), math.sqrt(poincare.as_number(distance.c))
    axes = np.linalg.svd(np.pad(means - center, ((0, 1), (0, 1))), full_matrices=False)[2][:2, :-1]
    axes *= np.sign(np.take_along_axis(axes, abs(axes).argmax(1)[:, None], 1))  # the SVD's own sign is arbitrary
    flat, norms = (every - center) @ axes.T, np.linalg.norm(every, axis=1, keepdims=True)
    flat[np.linalg.norm(flat, axis=1) <= 1e-9 * norms.max()] = 1, 0  # a direction for what has none
    xy = np.tanh(root * norms) * flat / np.linalg.norm(flat, axis=1, keepdims=True)

    ax = _new_axes(7, 7.5) if ax is None else ax
    _draw_points(ax, xy[: len(index)], index, groups, np.full(len(index), 14), alpha=0.75)
    if proxies is not None:
        x, y = xy[len(index) :].T
        ax.scatter(x, y, s=24, c="black", marker="P", ec="white", lw=0.5, label="proxies", zorder=4)
    if labels is not None or proxies is not None:
        _draw_legend(ax)
    clip = 2 * (distance.clip_radius or math.inf)
    ticks = _imported("matplotlib.ticker").MaxNLocator(6).tick_values(0, 2 * norms.max())[1:-1]
    for far in [*ticks, clip, math.inf]:
        radius, dashed = math.tanh(root * far / 2), far == clip < math.inf
        ax.plot(*_xy(radius * _CIRCLE), color=_GREY, lw=0.7, ls="--" if dashed else "-", zorder=0)
        if far in ticks and not dashed:
            ax.text(0, radius, f"{far:g}", color=_GREY, fontsize=_FONT, ha="center")
    limit = min(1.0, 1.08 * math.tanh(root * norms.max()) or 1.0)
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    ax.set_axis_off()
    return ax


def plot_disk(
    tree: Hierarchy, *, labels: Any = None, class_names: Names = None, names: Any = None, images: Any = None,
    max_leaves: int = 200, ax: "Axes | None" = None,
) -> "Axes":  # fmt: skip
    r"""Draw a hierarchy on the Poincaré disk, the root in the middle.

    The hyperbolic distance of a node from the root is proportional to the difference of their heights; the factor
    is written in the corner. Leaves are evenly spaced. An edge goes along the circle of the parent, and then
    straight outwards. A branch has the colour of the label of more than half of its leaves, grey if there is none.

    Args:
        tree: what to draw.
        labels: of each leaf, for the colours; default ``tree.leaf_labels``, unless all are different. For a
            tree of classes, give their superclasses.
        class_names: the name of each label.
        names: of each leaf; default the leaf labels, if all are different. If there is too little room, only every
            n-th name is drawn, and a notice says so.
        images: of each leaf, arrays ``(H, W)`` or ``(H, W, channels)``, or a tensor ``(N, channels, H, W)``.
        max_leaves: if there are more, each of the lowest branches is drawn as one leaf at height 0, whose size
            grows with its number of leaves. It has the most frequent label, and the first image.
        ax: where to draw; ``None`` makes a new figure.

    Example:
        >>> ax = plot_disk(Hierarchy.from_embeddings(torch.randn(20, 8)), labels=torch.arange(20) % 4)
    """
    leaves = _Leaves(tree, labels, class_names, names)
    pictures = [] if images is None else _as_images(images, tree.num_leaves)
    small, members = _prune(tree, max_leaves)
    points, edges, scale = _on_disk(small)
    count, width = len(members), max(7.5, 4.5 + 0.032 * len(members))  # inches: room for all names
    ax = _new_axes(width, width + 0.03 * len(leaves.groups)) if ax is None else ax
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    below = [*members, *leaves.below[1 - count : -1]]  # the inner nodes are those of the tree, without the root
    colors, widths = [*map(leaves.color, below)], [0.7 + 0.2 * math.log2(len(rows)) for rows in below]
    ax.add_collection(LineCollection([np.transpose(_xy(edge)) for edge in edges], colors=colors, lw=widths))
    ax.plot(*_xy(_CIRCLE), color=_GREY, lw=0.8, zorder=0)
    ax.scatter(*_xy(points[count:]), s=4, color=_GREY, zorder=2)
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.set_axis_off()
    _draw_leaves(ax, np.transpose(_xy(points[:count])), members, leaves)

    # A line leads outwards from each leaf to its image and name.
    places = small.spans[:count, 0]
    around = np.exp(2j * math.pi * (places + 0.5) / count)
    side = min(0.28, 0.86 * 2 * math.pi * 1.1 / count) if pictures else 0.0
    start, half = 1.04 + 1.35 * side, min(_size(ax)) / 2
    longest = max(len(_plain(leaves.title(rows))) for rows in members) if leaves.named else 0
    unit = max(half - 0.6 * _FONT * longest, half / 3) / start
    titles, notice = _titles(leaves, members, places, 2 * math.pi * unit)
    if pictures or leaves.named:
        leads = [np.transpose(_xy([leaf, 1.02 * end])) for leaf, end in zip(points, around, strict=False)]
        ax.add_collection(LineCollection(leads, colors=_GREY, lw=0.4, alpha=0.5, zorder=0))
    for rows, at, title in zip(members, around, titles, strict=True):
        if pictures:
            image, (color, _) = pictures[rows[0]], _style(leaves.group(rows))
            frame = {"ec": color, "lw": max(0.6, side * unit / 20)}
            zoom = 0.88 * side * unit / max(image.shape[:2])
            box = OffsetImage(image, zoom=zoom, cmap="gray", norm=Normalize(0, 255))
            ax.add_artist(AnnotationBbox(box, _xy(at * (1.03 + 0.62 * side)), pad=0.04, bboxprops=frame))
        left = at.real < 0
        ax.text(*_xy(at * start), title, fontsize=_FONT, rotation=np.angle(at, deg=True) + 180 * left,
                rotation_mode="anchor", va="center", ha="right" if left else "left")  # fmt: skip
    pruned = f"{tree.num_leaves} leaves in {count} branches" * (count < tree.num_leaves)
    notes = filter(None, [notice, pruned, f"distance from the root =\n{scale:.3g} × difference of height"])
    ax.text(0, 0, "\n".join(notes), fontsize=_FONT, color=_GREY, transform=ax.transAxes)
    ax.set(xlim=(-half / unit, half / unit), ylim=(-half / unit, half / unit))
    return ax


def plot_dendrogram(
    tree: Hierarchy, *, labels: Any = None, class_names: Names = None, names: Any = None,
    max_leaves: int = 200, ax: "Axes | None" = None,
) -> "Axes":  # fmt: skip
    """Draw a hierarchy as a dendrogram, by SciPy: the root at the left, the leaves at the right.

    The arguments are those of `plot_disk`, without images. The axis ends a little below the lowest merge that
    is drawn, because leaves are at height 0, often far below.

    Example:
        >>> ax = plot_dendrogram(Hierarchy.from_embeddings(torch.randn(20, 8)), labels=torch.arange(20) % 4)

    Source: ``scipy.cluster.hierarchy.dendrogram``.
    """
    scipy, leaves = _imported("scipy.cluster.hierarchy"), _Leaves(tree, labels, class_names, names)
    count = min(check_count("max_leaves", max_leaves, minimum=2), tree.num_leaves)
    row = _LINE / 72 if leaves.named else 0.05  # inches
    ax = _new_axes(9, max(4.5, 1.5 + 0.03 * len(leaves.groups) + row * count)) if ax is None else ax
    drawn = scipy.dendrogram(tree.linkage.copy(), count, "lastp", orientation="left", no_labels=True, ax=ax,
                             link_color_func=lambda node: leaves.color(leaves.below[node]))  # fmt: skip
    members = [leaves.below[node] for node in drawn["leaves"]]
    low, high = tree.linkage[-count + 1, 2], tree.linkage[-1, 2] or 1.0
    end = max(0.0, 1.1 * low - 0.1 * high) if low < high else 0.0
    xy = np.stack([np.full(count, end), 5 + 10 * np.arange(count)], 1)
    _draw_leaves(ax, xy, members, leaves, above=True)
    titles, notice = _titles(leaves, members, range(count), _size(ax)[1])
    ax.set(xlabel="height", xlim=(1.02 * high - 0.02 * end, end))
    ax.set_yticks(xy[:, 1], titles)
    ax.tick_params(axis="y", left=False, labelleft=False, labelright=True, pad=6, labelsize=_FONT)
    ax.spines[["top", "left", "right"]].set_visible(False)
    ax.text(1.01, 0, notice, fontsize=_FONT, color=_GREY, va="top", transform=ax.transAxes)
    return ax


def write_html(
    tree: Hierarchy, path: str | Path, *, texts: Any = None, title: str = "Hierarchy", **disk: Any
) -> None:
    """Write a hierarchy as one self-contained page: the disk, and an icicle plot of the whole tree.

    In the icicle plot, a click on a branch shows that branch alone, and a click on the bar before it goes back.
    Hovering shows the name, label and text of a leaf, or the number of leaves, height and proxy of a branch.
    The page needs no network, and a browser of 2023 or later.

    Args:
        tree: what to draw.
        path: the file, overwritten if it exists.
        texts: of each leaf, shown when hovering.
        title: heading of the page.
        disk: all other arguments of `plot_disk`, ``labels=`` for instance.

    Example:
        >>> import tempfile
        >>> write_html(Hierarchy.from_embeddings(torch.randn(20, 8)), f"{tempfile.mkdtemp()}/tree.html")
    """
    texts = None if texts is None else check_names("texts", texts, tree.num_leaves)
    plotly, pyplot, svg = _imported("plotly.offline"), _imported("matplotlib.pyplot"), io.StringIO()
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "", "font.sans-serif": ["DejaVu Sans"]}):
        figure: Any = plot_disk(tree, **disk).figure.canvas.figure
        figure.savefig(svg, format="svg", transparent=True, dpi=150, metadata={"Date": None})
        if disk.get("ax") is None:
            pyplot.close(figure)
    # Two decimals of a point are enough for a path, and half the size.
    short = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg.getvalue())
    icicle = _icicle(tree, _Leaves(tree, *map(disk.get, ("labels", "class_names", "names"))), texts)
    shown = json.dumps(short[short.index("<svg") :]), plotly.get_plotlyjs(), json.dumps(icicle)
    script = "disk.innerHTML = {};\n{}\nPlotly.newPlot('tree', {})".format(*shown)
    packed = gzip.compress(script.encode(), mtime=0)
    text = base64.b85encode(packed, pad=True).decode()  # base64 would need 7% more
    page = string.Template(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    Path(path).write_text(page.substitute(title=escape(title), packed=text, size=len(packed)), encoding="utf-8")


class _Leaves:
    """Groups (by label) and names of the leaves, checked, with defaults filled in."""

    def __init__(self, tree: Hierarchy, labels: Any = None, class_names: Any = None, names: Any = None) -> None:
        own, count = tree.leaf_labels, tree.num_leaves
        repeated = own is not None and len(np.unique(own)) < count
        if labels is None and repeated:
            labels = own
        elif names is None and own is not None and not repeated:
            groups, index = _grouped(own, count, class_names if labels is None else None, "leaf")
            names = [groups[group] for group in index]
        self.named, self.labelled = names is not None, labels is not None
        self.names = check_names("names", range(count) if names is None else names, count)
        self.groups, self.index = _grouped(labels, count, class_names, "leaf")
        self.below = [tree.leaf_order[start:stop] for start, stop in tree.spans]

    def group(self, rows: np.ndarray) -> int:
        """The most frequent group of some leaves."""
        return int(np.bincount(self.index[rows]).argmax())

    def color(self, rows: np.ndarray) -> str:
        """The colour of a branch: that of the group of more than half of its leaves, else grey."""
        group = self.group(rows)
        return _style(group)[0] if self.labelled and (self.index[rows] == group).mean() > 0.5 else _GREY

    def title(self, rows: np.ndarray) -> str:
        """The name of a leaf, or the most frequent group and the number of leaves of a branch."""
        if len(rows) == 1 or not self.labelled:
            return self.names[rows[0]] if len(rows) == 1 else f"{len(rows)} leaves"
        group = self.group(rows)
        return f"{self.groups[group]}: {(self.index[rows] == group).sum()} of {len(rows)}"


def _grouped(labels: Any, count: int, class_names: Names, kind: str) -> tuple[list[str], np.ndarray]:
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


def _style(group: int) -> tuple[str, str]:
    """Colour and marker of a group; they repeat after all combinations."""
    return _STYLES[group % len(_STYLES)]


def _as_images(images: Any, count: int) -> list[np.ndarray]:
    """One array of bytes for each leaf, ``(H, W)`` or ``(H, W, 3 or 4)``."""
    if isinstance(images, Tensor):
        images = to_numpy(images.movedim(1, -1) if images.ndim == 4 else images)
    if len(images) != count:
        raise ValueError(f"images must be {count}, one for each leaf, got {len(images)}")
    arrays = [array[..., 0] if array.shape[2:] == (1,) else array for array in map(np.asarray, images)]
    for array in arrays:
        if array.ndim < 2 or array.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"images must be (H, W) or (H, W, 1, 3 or 4) each, got shape {array.shape}")
    if all(array.dtype == np.uint8 for array in arrays):
        return arrays
    arrays = [array.astype(np.float64) for array in arrays]
    low, high = min(array.min() for array in arrays), max(array.max() for array in arrays)
    return [((array - low) / ((high - low) or 1) * 255).astype(np.uint8) for array in arrays]


def _prune(tree: Hierarchy, max_leaves: int) -> tuple[Hierarchy, list[np.ndarray]]:
    """The top of a tree, with at most ``max_leaves`` leaves, and the original leaves under each of them."""
    from scipy.cluster.hierarchy import from_mlab_linkage

    count = min(check_count("max_leaves", max_leaves, minimum=2), tree.num_leaves)
    first, top = tree.num_nodes - count + 1, tree.linkage[1 - count :]
    ends = np.flatnonzero(tree.parents[:first] >= first)
    children = np.searchsorted(np.append(ends, np.arange(first, tree.num_nodes)), top[:, :2])
    linkage = from_mlab_linkage(np.column_stack([children + 1, top[:, 2]]))  # counts the leaves of each node
    return Hierarchy(linkage), [tree.leaves(int(end)) for end in ends]


def _on_disk(tree: Hierarchy) -> tuple[np.ndarray, np.ndarray, float]:
    """Points of the unit disk for all nodes, edges to their parents, and hyperbolic length per unit of height."""
    scale = _LEAF_DISTANCE / float(tree.heights[-1] or 1.0)
    radii = np.tanh(scale * (tree.heights[-1] - tree.heights) / 2)
    angles = 2 * math.pi * tree.spans.mean(1) / tree.num_leaves
    points = radii * np.exp(1j * angles)
    turns = np.linspace(angles[tree.parents[:-1]], angles[:-1], 20, axis=1)
    arcs = radii[tree.parents[:-1], None] * np.exp(1j * turns)
    return points, np.column_stack([arcs, points[:-1]]), scale


def _icicle(tree: Hierarchy, leaves: _Leaves, texts: Any) -> dict[str, Any]:
    """Plotly's foldable icicle plot. User text is escaped, because plotly interprets some HTML in texts."""
    hover = [[leaves.title(rows)] for rows in leaves.below]
    for node, lines in enumerate(hover):
        if node < tree.num_leaves:
            lines += [leaves.groups[leaves.index[node]]] if leaves.labelled else []
            lines += [] if texts is None else textwrap.wrap(texts[node], 60)
        else:
            proxy = "" if tree.proxies is None else f", proxy {tree.proxies[node]}"
            lines += [f"{tree.sizes[node]} leaves, height {tree.heights[node]:.3g}{proxy}"]
    shown = [[escape(line, quote=False) for line in lines] for lines in hover]
    trace = {
        "type": "icicle", "ids": [str(node) for node in range(tree.num_nodes)],
        "parents": ["" if above < 0 else str(above) for above in tree.parents],
        "labels": [lines[0] for lines in shown], "hovertext": ["<br>".join(lines) for lines in shown],
        "values": tree.sizes.tolist(), "branchvalues": "total", "sort": False, "maxdepth": 5, "hoverinfo": "text",
        "marker": {"colors": list(map(leaves.color, leaves.below)), "line": {"width": 0.5, "color": "white"}},
        "outsidetextfont": {"color": "white"},
    }  # fmt: skip
    layout = {"margin": {"l": 0, "r": 0, "t": 24, "b": 0}, "paper_bgcolor": "rgba(0,0,0,0)"}
    return {"data": [trace], "layout": layout, "config": {"responsive": True, "displayModeBar": False}}


def _draw_leaves(ax: "Axes", xy: Any, members: list[np.ndarray], leaves: _Leaves, above: bool = False) -> None:
    """Markers of the leaves, by label, that grow with the number of leaves they stand for; and the legend."""
    index = np.array([leaves.group(rows) for rows in members])
    sizes = 16 + 10 * np.log2([len(rows) for rows in members])
    _draw_points(ax, xy, index, leaves.groups, sizes, clip_on=False)
    if leaves.labelled:
        _draw_legend(ax, above)


def _draw_points(ax: Any, xy: Any, index: np.ndarray, groups: list[str], sizes: Any, **options: Any) -> None:
    """Points in the colour and marker of their group."""
    for group in np.unique(index):
        rows, (color, marker), name = index == group, _style(group), _plain(groups[group])
        s = sizes[rows] if np.ptp(sizes[rows]) else sizes[rows][:1]  # SVG stores markers of one size only once
        ax.scatter(*xy[rows].T, s=s, color=color, marker=marker, lw=0, zorder=3, label=name, **options)


def _draw_legend(ax: Any, above: bool = False) -> None:
    """A legend below or above the axes."""
    handles, names = ax.get_legend_handles_labels()
    columns = min(len(names), max(1, 110 // (max(map(len, names)) + 5)))
    place = {"loc": "lower center" if above else "upper center", "bbox_to_anchor": (0.5, float(above))}
    legend = ax.legend(handles, names, ncols=columns, fontsize=_FONT, frameon=False, columnspacing=1, **place)
    for handle in legend.legend_handles:
        handle.set(sizes=[26])


def _titles(leaves: _Leaves, members: Any, places: Any, room: float) -> tuple[list[str], str]:
    """The text at each drawn leaf, empty if there is no room or no name; and a notice of the omitted names."""
    step = max(1, math.ceil(len(members) * _LINE / room)) if leaves.named else 1
    # On a circle, the first name is next to the last.
    shown = [leaves.named and place % step == 0 and place + step <= len(members) for place in places]
    titles = [_plain(leaves.title(rows)) if show else "" for rows, show in zip(members, shown, strict=True)]
    return titles, f"1 of {step} names is shown" if step > 1 else ""


def _plain(name: str) -> str:
    """A name that matplotlib draws literally, not as a formula; in one line, of at most 40 characters."""
    name = " " * name.startswith("_") + " ".join(name.split()) or " "  # legends leave out "" and "_..."
    return (name if len(name) <= 40 else name[:39] + "…").replace("$", r"\$")


def _size(ax: Any) -> Any:
    """Width and height of the axes, in points, as they will be laid out."""
    ax.figure.canvas.figure.draw_without_rendering()
    return ax.get_window_extent().size * 72 / ax.figure.dpi


def _xy(points: Any) -> tuple[Any, Any]:
    """Complex numbers as coordinates."""
    return np.real(points), np.imag(points)


def _new_axes(width: float, height: float) -> Any:
    """Axes of a new figure, of that many inches."""
    return _imported("matplotlib.pyplot").subplots(figsize=(width, height), layout="constrained")[1]


def _imported(name: str) -> Any:
    """A module of the extra ``plot``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'pictures need {name.split(".")[0]}: pip install "hierloss[plot]"') from error
