"""A hierarchy as one page for a browser; needs ``pip install "hierloss[plot]"``."""

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._layout import BRANCH, GREY, MARKERS, Leaves, geodesic, prune, sarkar
from .hierarchy import Hierarchy

__all__ = ["write_html"]

_SYMBOLS = dict(
    zip(
        MARKERS, ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star"], strict=True
    )
)
"""Plotly's names of the markers."""


def write_html(
    tree: Hierarchy,
    path: str | os.PathLike[str],
    *,
    images: Any = None,
    texts: Sequence[str] | None = None,
    labels: Any = None,
    class_names: Sequence[str] | Mapping[Any, str] | None = None,
    names: Sequence[str] | None = None,
    max_leaves: int = 100,
    title: str = "Hierarchy",
) -> None:
    """Write a hierarchy as one self-contained page: the disk, and an icicle plot of the whole tree to fold.

    The disk is that of `plot_disk`, to zoom and pan. In the icicle plot, a click on a branch shows that branch
    alone, and a click on the bar above it goes back. Names are written on the bars. Hovering shows the name, the
    label and the text of a leaf, or the number of leaves, the height and the proxy of a branch. Plotly draws both.
    The page needs no network; plotly's own script is most of its 5 MB.

    Args:
        tree: what to draw.
        path: the file, overwritten if it exists.
        images: of each leaf, drawn around the disk.
        texts: of each leaf, shown when hovering.
        labels: as in `plot_disk`.
        class_names: as in `plot_disk`.
        names: as in `plot_disk`.
        max_leaves: as in `plot_disk`, for the disk.
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
        from plotly.graph_objects import Figure, Icicle, Scatter
    except ImportError as error:
        raise ImportError('pages need plotly: pip install "hierloss[plot]"') from error
    look = Leaves(tree, labels, class_names, names, images)
    if texts is not None and len(texts) != tree.num_leaves:
        raise ValueError(f"texts must be {tree.num_leaves}, one for each leaf, got {len(texts)}")

    # Plotly reads a part of HTML in all of its texts.
    escaped = [html.escape(str(name), quote=False) for name in look.leaf_names()]
    groups = [html.escape(name, quote=False) for name in look.groups]
    hover = [f"<b>{name}</b>" + (f"<br>{groups[g]}" if look.labelled else "")
             for name, g in zip(escaped, look.index.tolist(), strict=True)]  # fmt: skip
    if texts is not None:
        hover = [
            f"{line}<br>{html.escape(str(text), quote=False)}" for line, text in zip(hover, texts, strict=True)
        ]
    for node in range(tree.num_leaves, tree.num_nodes):
        escaped.append(f"{tree.sizes[node]} leaves")
        proxy = "" if tree.proxies[node] < 0 else f", proxy {tree.proxies[node]}"
        hover.append(f"<b>{escaped[-1]}</b><br>height {tree.heights[node]:.3g}{proxy}")
    colors = [look.style(look.group(tree.leaves(node)))[0] for node in range(tree.num_nodes)]
    above = ["" if parent < 0 else str(parent) for parent in tree.parents.tolist()]
    icicle = Icicle(
        ids=[str(node) for node in range(tree.num_nodes)], parents=above, labels=escaped, hovertext=hover,
        values=tree.sizes, branchvalues="total", sort=False, maxdepth=6, hoverinfo="text",
        marker={"colors": colors, "line": {"width": 0.5, "color": "white"}}, tiling={"orientation": "h"},
    )  # fmt: skip

    small, members = prune(tree, max_leaves)
    points, _ = sarkar(small)
    # The nodes of the pruned tree that are inner nodes keep their order, and are the last ones.
    whole = [rows[0] if len(rows) == 1 else tree.lowest_common_ancestor(rows) for rows in members]
    whole += range(tree.num_nodes - (small.num_nodes - small.num_leaves), tree.num_nodes)
    lines = [np.append(geodesic(points[p], points[node]), np.nan) for node, p in enumerate(small.parents[:-1])]
    line = np.concatenate(lines)
    traces = [Scatter(x=line.real, y=line.imag, mode="lines", line={"color": BRANCH, "width": 1},
                      hoverinfo="skip", showlegend=False)]  # fmt: skip
    names_drawn, notice = look.thinned_names(members)
    titles = [html.escape(name, quote=False) for name in names_drawn] + [""] * (small.num_nodes - small.num_leaves)
    of_group = np.array([look.group(rows) for rows in members] + [-1] * (small.num_nodes - small.num_leaves))
    for group in np.unique(of_group):
        rows = np.flatnonzero(of_group == group)
        color, marker = (GREY, "o") if group < 0 else look.style(int(group))
        size = 5 if group < 0 else [8 + 2 * math.log2(len(members[row])) for row in rows]
        beside = ["middle right" if points[row].real >= 0 else "middle left" for row in rows]
        traces.append(
            Scatter(x=points[rows].real, y=points[rows].imag, hoverinfo="text", cliponaxis=False,
                    mode="markers" if look.names is None or group < 0 else "markers+text", textposition=beside,
                    text=[titles[row] for row in rows], textfont={"size": 9},
                    hovertext=[hover[whole[row]] for row in rows], name=groups[group] if group >= 0 else "",
                    marker={"color": color, "symbol": _SYMBOLS[marker], "size": size},
                    showlegend=bool(look.labelled and group >= 0))
        )  # fmt: skip
    pictures = []
    if look.images is not None:
        side = min(0.28, 2 * math.pi * 1.1 / len(members))
        for point, rows in zip(points, members, strict=False):
            at = point / abs(point) * (1.04 + side / 2)
            pictures.append({"source": _data_uri(look.images[rows[0]]), "x": at.real, "y": at.imag, "xref": "x",
                             "yref": "y", "sizex": side, "sizey": side, "xanchor": "center",
                             "yanchor": "middle"})  # fmt: skip
    reach = 1.06 + (0.0 if look.images is None else side) + (0.0 if look.names is None else 0.3)
    axis = {"visible": False, "range": [-reach, reach]}
    disk = {"type": "circle", "x0": -1, "y0": -1, "x1": 1, "y1": 1, "line": {"color": GREY, "width": 1}}
    layout: dict[str, Any] = {"margin": {"l": 8, "r": 8, "t": 28, "b": 8}, "paper_bgcolor": "rgba(0,0,0,0)",
              "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": GREY}}  # fmt: skip
    figures = [
        Figure(traces, {**layout, "xaxis": axis, "yaxis": {**axis, "scaleanchor": "x"}, "shapes": [disk],
                        "images": pictures, "dragmode": "pan", "legend": {"orientation": "h"},
                        "title": {"text": notice if look.names is not None else "", "font": {"size": 10}}}),
        Figure(icicle, layout),
    ]  # fmt: skip
    config = {"scrollZoom": True, "responsive": True, "displayModeBar": False}
    parts = [
        figure.to_html(config, full_html=False, include_plotlyjs=first, default_height="100%")
        for figure, first in zip(figures, (True, False), strict=True)
    ]
    page = _PAGE.format(title=html.escape(title), disk=parts[0], icicle=parts[1])
    Path(path).write_text(page, encoding="utf-8")


_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ margin: 0; padding: 8px; font: 15px system-ui, sans-serif; color: #333; background: #fff; }}
  main {{ display: flex; flex-wrap: wrap; gap: 8px; }}
  main > div {{ width: calc(50% - 4px); height: 88vh; min-height: 340px; }}
  @media (max-width: 900px) {{ main > div {{ width: 100%; }} }}
  @media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #16181c; }} }}
</style>
<h1 style="font-size: 18px; margin: 4px 8px">{title}</h1>
<main><div>{disk}</div><div>{icicle}</div></main>
</html>
"""


def _data_uri(image: np.ndarray) -> str:
    """The image as a PNG in a data URI."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, cmap="gray", vmin=0, vmax=255, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
