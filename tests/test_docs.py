"""The site builds without warnings, shows formulas and examples, names all that is public, has no dead links."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hierloss

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODULES = ("functional", "gradient_ratio", "metrics", "plotting", "poincare", "vector_stores")


class Page(HTMLParser):
    """The text of a page outside code, the ids in it, and what it links to or loads."""

    def __init__(self, path):
        super().__init__()
        self.text, self.ids, self.links, self._inside = "", set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        is_link = tag != "link" or attrs.get("rel") not in ("canonical", "next", "prev")
        self.links |= {attrs[name] for name in ("href", "src") if is_link and attrs.get(name)}
        if tag in ("code", "script"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(name, reason="the site needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not re.search("WARNING|ERROR", result.stderr), result.stderr
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pages(site):
    return {name: Page(path) for name, path in site.items() if name.endswith(".html") and name != "404.html"}


def test_every_page_of_the_navigation_is_built(pages):
    sources = {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")
    }
    assert {name.removesuffix("index.html").rstrip("/") or "index" for name in pages} == sources
    menu = {urlsplit(link).path.rstrip("/") for link in pages["index.html"].links}
    assert sources - {"index"} <= menu


def test_formulas_are_shown_as_formulas(site, pages):
    for name, page in pages.items():
        found = re.search(r":math:|\.\. math::|\\frac|\\rho|\\\(|\\\[|\$", page.text)
        assert not found, f"{name}: {page.text[found.start() - 60 : found.end() + 60]}"
    api = site["api/index.html"].read_text(encoding="utf-8")
    assert api.count("<math") > 30
    assert "<mo>arsinh</mo>" in api


def test_examples_of_docstrings_are_shown_as_code(site):
    api = site["api/index.html"].read_text(encoding="utf-8")
    assert "<blockquote>" not in api  # what Markdown makes of >>>
    assert api.count('<span class="gp">&gt;&gt;&gt;') > 50


def test_every_public_name_is_in_the_api_page(pages):
    public = {f"hierloss.{name}" for name in hierloss.__all__ if name not in MODULES}
    for module in MODULES:
        public |= {f"hierloss.{module}.{name}" for name in importlib.import_module(f"hierloss.{module}").__all__}
    assert len(public) >= 30
    assert public <= pages["api/index.html"].ids


def test_first_mention_of_a_class_links_to_the_api(site):
    page = site["faq/index.html"].read_text(encoding="utf-8")
    assert page.count('href="../api/#hierloss.HIERLoss"') == 1
    before, after = page.split('href="../api/#hierloss.HIERLoss"')
    assert "<code>HIERLoss" not in before.split("<article")[1]
    assert "<code>HIERLoss" in after
    assert "#hierloss.HIERLoss</a>" not in site["api/index.html"].read_text(encoding="utf-8")


def test_links_inside_the_site_lead_somewhere(site, pages):
    checked = 0
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path))) if parts.path else name
            )
            target = target if target in site else os.path.normpath(f"{target}/index.html")
            assert target in site, f"{name} links to {link}, which is not there"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{name}: no such place as {link}"
            checked += 1
    assert checked > 300


def test_nothing_is_loaded_from_elsewhere(site):
    for name, path in site.items():
        if name.endswith(".html"):
            loaded = re.findall(
                r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)', path.read_text(encoding="utf-8")
            )
            loaded += re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="(https?:[^"]*)', path.read_text("utf-8"))
            assert not loaded, f"{name} loads {loaded}"
