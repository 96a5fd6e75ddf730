"""The page of `plotting.write_html`: a picture of the disk, and plotly's foldable icicle plot of the tree."""

import base64
import gzip
import json
import re
import string
import textwrap
from html import escape
from typing import Any

from ._layout import Leaves
from .hierarchy import Hierarchy


def render(tree: Hierarchy, leaves: Leaves, texts: Any, title: str, svg: str, plotly: str) -> str:
    """The page. User text in the icicle plot is escaped, because plotly interprets some HTML in texts."""
    below = [tree.leaf_order[start:stop] for start, stop in tree.spans]
    hover = [[leaves.title(rows)] for rows in below]
    for node, lines in enumerate(hover):
        if node < tree.num_leaves:
            lines += [leaves.groups[leaves.index[node]]] if leaves.labelled else []
            lines += [] if texts is None else textwrap.wrap(str(texts[node]), 60)
        else:
            proxy = "" if tree.proxies is None else f", proxy {tree.proxies[node]}"
            lines += [f"{tree.sizes[node]} leaves, height {tree.heights[node]:.3g}{proxy}"]
    shown = [[escape(line, quote=False) for line in lines] for lines in hover]
    icicle = {
        "type": "icicle", "ids": [str(node) for node in range(tree.num_nodes)],
        "parents": ["" if above < 0 else str(above) for above in tree.parents],
        "labels": [lines[0] for lines in shown], "hovertext": ["<br>".join(lines) for lines in shown],
        "values": tree.sizes.tolist(), "branchvalues": "total", "sort": False, "maxdepth": 5, "hoverinfo": "text",
        "marker": {"colors": [leaves.color(rows) for rows in below], "line": {"width": 0.5, "color": "white"}},
        "outsidetextfont": {"color": "white"},
    }  # fmt: skip
    layout = {"margin": {"l": 0, "r": 0, "t": 24, "b": 0}, "paper_bgcolor": "rgba(0,0,0,0)"}
    config = {"responsive": True, "displayModeBar": False}
    # Two decimals of a point are enough for a path, and half the size.
    short = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    disk = json.dumps(short[short.index("<svg") :])
    tree_plot = json.dumps({"data": [icicle], "layout": layout, "config": config})
    script = f"disk.innerHTML = {disk};\n{plotly}\nPlotly.newPlot('tree', {tree_plot})"
    packed = gzip.compress(script.encode(), mtime=0)
    text = base64.b85encode(packed, pad=True).decode()
    return _PAGE.format(title=escape(title), packed=text, size=len(packed), digits=_DIGITS)


# Of Python's b85.
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase + "!#$%&()*+-;<=>?@^_`{|}~"

# Plotly has 5 MB, compressed and as text 1.8 MB. The browser decompresses it, and loads nothing from the network.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  body {{ margin: 8px; font: 15px system-ui, sans-serif; color: #333; background: #fff; overflow-wrap: anywhere; }}
  main {{ display: grid; grid-template-columns: 3fr 2fr; gap: 8px; }}
  #disk svg {{ width: 100%; height: auto; }}
  #disk text {{ fill: currentColor !important; }}
  #tree {{ height: 88vh; }}
  @media (max-width: 900px) {{ main {{ grid-template-columns: 100%; }} }}
  @media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #16181c; }} }}
</style>
<h2>{title}</h2>
<main><div id="disk"></div><div id="tree"></div></main>
<script>
const text = "{packed}", words = new DataView(new ArrayBuffer(text.length / 5 * 4));
for (let word = 0, i = 0; i < text.length; i++) {{
  word = word * 85 + "{digits}".indexOf(text[i]);
  if (i % 5 == 4) {{ words.setUint32((i - 4) / 5 * 4, word); word = 0; }}
}}
const packed = new Blob([words.buffer.slice(0, {size})]);
new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text().then((code) =>
  document.head.append(Object.assign(document.createElement("script"), {{ textContent: code }})));
</script>
"""
