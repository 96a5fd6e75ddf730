"""Formulas of the site become MathML while it is built, which browsers draw without scripts or network.

Pictures that are too wide for a phone are marked, so that style.css can let them scroll. Names of classes become
links to the API.
"""

import html
import posixpath
import re
import struct
from pathlib import Path
from textwrap import dedent
from typing import Any

import griffe
from latex2mathml.converter import convert


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """MkDocs calls this with each page: the first mention of a class in its prose becomes a link to the API."""
    api = Path(config["docs_dir"], "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (hierloss\.(?:\w+\.)*([A-Z]\w+))$", api, flags=re.M)
    targets = {} if page.file.src_uri == "api.md" else {name: target for target, name in found}
    skipped = r"^```.*?^```|^#[^\n]*|\[[^\]]*\]\([^)]*\)"  # blocks of code, headings, links

    def link(found: re.Match[str]) -> str:
        target = targets.pop(found[1], None)
        return f"[{found[0]}][{target}]" if target else found[0]

    names = "|".join(name for _, name in found)
    return re.sub(rf"{skipped}|`({names})(?:\([^`\n]*\))?`", link, markdown, flags=re.S | re.M)


def on_page_content(content: str, page: Any, config: Any, **_: Any) -> str:
    """MkDocs calls this with each page, in which pymdownx.arithmatex has marked the formulas."""
    marked = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    content = re.sub(marked, lambda found: mathml(html.unescape(found[2]), found[1] == "div"), content, flags=re.S)

    def mark_if_wide(found: re.Match[str]) -> str:
        file = Path(config["docs_dir"], posixpath.normpath(posixpath.join(page.url, found[1])))
        if not file.is_file():  # MkDocs warns
            return found[0]
        width, height = struct.unpack(">II", file.read_bytes()[16:24])  # in the header of a PNG
        return found[0].replace("<img", '<img class="wide"') if width > 1.6 * height else found[0]

    return re.sub(r'<img [^>]*src="([^":]*\.png)"[^>]*>', mark_if_wide, content)


def mathml(tex: str, block: bool) -> str:
    bar = '<mo stretchy="false">&#x0007C;</mo>'  # of a norm; browsers would space it as an operator
    return convert(tex, display="block" if block else "inline").replace(
        bar, bar.replace(" ", ' lspace="0" rspace="0" ')
    )


class Docstrings(griffe.Extension):
    """Formulas, lists and examples of docstrings as Markdown and griffe want them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = re.sub(
            r":math:`(.*?)`", lambda found: f"${' '.join(found[1].split())}$", obj.docstring.value, flags=re.S
        )
        text = re.sub(r"^\.\. math:: (.*?)(?=\n\n|\Z)", r"$$\n\1\n$$", text, flags=re.S | re.M)
        text = re.sub(
            r"^(Conventions of .*)\n((?:    .*\n?)+)",
            lambda found: f"{found[1]}:\n\n{dedent(found[2])}",
            text,
            flags=re.M,
        )
        obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
