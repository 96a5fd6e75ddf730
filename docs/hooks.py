"""Formulas of the site: TeX becomes MathML while it is built, which browsers draw without scripts or network."""

import html
import re
from textwrap import dedent
from typing import Any

import griffe
from latex2mathml.converter import convert


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with each page, in which pymdownx.arithmatex has marked the formulas."""
    marked = r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>'
    return re.sub(marked, lambda found: mathml(html.unescape(found[2]), found[1] == "div"), content, flags=re.S)


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
