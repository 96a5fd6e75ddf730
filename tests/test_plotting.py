"""Pictures: what is drawn where; and the page, in a real browser."""

import base64
import io
import itertools
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hierloss import PoincareDistance
from hierloss.hierarchy import Hierarchy

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.offsetbox import AnnotationBbox  # noqa: E402

from hierloss import _layout as layout  # noqa: E402
from hierloss import page as html_page  # noqa: E402
from hierloss import plotting  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


DRAW = {"disk": plotting.plot_disk, "dendrogram": plotting.plot_dendrogram}


def make_tree(leaves=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(leaves, 4, generator=generator)
    proxies = points[torch.randint(leaves, (60,), generator=generator)] * torch.rand(60, 1, generator=generator)
    return Hierarchy.from_distances(PoincareDistance()(points, proxies), torch.arange(leaves) % 4)


def drawn_points(ax, skip_empty=True):
    """Coordinates of all markers."""
    offsets = [
        np.asarray(c.get_offsets()) for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes())
    ]
    return [o for o in offsets if len(o)]


def disk_distance(x, y):
    """Of complex points of the unit disk, curvature -1."""
    return 2 * np.arctanh(abs((x - y) / (1 - np.conj(x) * y)))


# --- embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 1.0])
def test_embeddings_keep_their_distance_from_the_origin(c):
    distance = PoincareDistance(c=c, clip_radius=2.0)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(50, 6, generator=generator)
    proxies = torch.randn(7, 6, generator=generator) / 3
    ax = plotting.plot_embeddings(embeddings, torch.zeros(50), proxies, distance=distance)
    points, ancestors = drawn_points(ax)
    for drawn, vectors in [(points, embeddings), (ancestors, proxies)]:
        expected = distance(vectors, torch.zeros(1, 6))[:, 0].numpy()
        radius = 2 * np.arctanh(np.linalg.norm(drawn, axis=1)) / math.sqrt(c)
        np.testing.assert_allclose(radius, expected, rtol=1e-5)


def test_embeddings_of_a_plane_keep_their_angles():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(5, 2, generator=generator)).Q
    angles = torch.arange(12) * math.pi / 6
    flat = torch.stack([angles.cos() * 2, angles.sin()], 1)
    (points,) = drawn_points(plotting.plot_embeddings(flat @ plane.T))
    expected = PoincareDistance().normalize(flat).numpy() * math.sqrt(0.1)
    differences = [np.linalg.norm(points[0] - points, axis=1), np.linalg.norm(expected[0] - expected, axis=1)]
    np.testing.assert_allclose(*differences, atol=1e-6)


def test_embeddings_already_on_the_ball_are_drawn_where_they_are():
    vectors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    distance, on_ball = PoincareDistance(), PoincareDistance(normalize_embeddings=False)
    (a,) = drawn_points(plotting.plot_embeddings(vectors, distance=distance))
    (b,) = drawn_points(plotting.plot_embeddings(distance.normalize(vectors), distance=on_ball))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_embeddings_legend_and_axes():
    _, ax = plt.subplots()
    embeddings, labels = torch.randn(30, 3), torch.arange(30) % 3 + 5
    assert plotting.plot_embeddings(embeddings, labels, class_names={5: "a", 6: "b", 7: "c"}, ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
    faces = {tuple(c.get_facecolor()[0]) for c in ax.collections}
    assert len(faces) == 3
    assert plotting.plot_embeddings(embeddings).get_legend() is None
    assert len({*layout.styles()}) == 80


def test_embeddings_errors():
    good = torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\).*\(5,\)"):
        plotting.plot_embeddings(good, torch.zeros(5))
    with pytest.raises(ValueError, match="proxies must have 3 columns, as the embeddings, got 2"):
        plotting.plot_embeddings(good, proxies=good[:, :2])
    with pytest.raises(ValueError, match="finite"):
        plotting.plot_embeddings(good * math.nan)
    with pytest.raises(ValueError, match="class_names must have a name for each label, got none for 2"):
        plotting.plot_embeddings(good, torch.arange(6) // 2, class_names=["a", "b"])
    with pytest.raises(ValueError, match="embeddings must have at least one row"):
        plotting.plot_embeddings(good[:0])
    with pytest.raises(ValueError, match="class_names must have a name for each label, got none for -1"):
        plotting.plot_embeddings(good, torch.arange(6) % 2 - 1, class_names=["a", "b"])


# --- disk ---------------------------------------------------------------------------------------------------


def crossings(segments):
    """How many of the polylines cross another one properly."""

    def side(a, b, p):
        return np.sign((b.real - a.real) * (p.imag - a.imag) - (b.imag - a.imag) * (p.real - a.real))

    owner = np.repeat(np.arange(len(segments)), [len(line) - 1 for line in segments])
    a, b = (np.concatenate([line[part] for line in segments]) for part in (slice(-1), slice(1, None)))
    row, column = (a[:, None], b[:, None]), (a[None], b[None])
    apart = side(*row, column[0]) * side(*row, column[1]) < 0
    return int((apart & apart.T & (owner[:, None] != owner)).sum() // 2)


def test_sarkar_edges_have_their_length_and_do_not_cross():
    tree = make_tree(24)
    points, scale = layout.sarkar(tree)
    assert scale == pytest.approx(5 / tree.heights[-1])
    assert points[-1] == 0
    edges = []
    for node, above in enumerate(tree.parents[:-1]):
        length = disk_distance(points[node], points[above])
        assert length == pytest.approx(scale * (tree.heights[above] - tree.heights[node]), abs=1e-9)
        edge = layout.geodesic(points[above], points[node], 40)
        assert edge[0] == points[above]
        assert edge[-1] == pytest.approx(points[node])
        steps = disk_distance(edge[1:], edge[:-1])
        np.testing.assert_allclose(steps, length / 39, atol=1e-9)
        edges.append(edge[1:-1])  # edges of one node do meet there
    assert crossings(edges) == 0


def test_sarkar_distances_are_about_those_of_the_tree():
    tree = make_tree(30)
    points, scale = layout.sarkar(tree)
    pairs = list(itertools.combinations(range(30), 2))
    through = [2 * scale * tree.heights[tree.lowest_common_ancestor(pair)] for pair in pairs]
    drawn = [disk_distance(*points[[*pair]]) for pair in pairs]
    shares = np.array(drawn) / through
    assert shares.max() <= 1 + 1e-9  # the geodesic is the shortest way
    assert shares.mean() > 0.7
    flat = [abs(points[a] - points[b]) for a, b in pairs]
    assert np.corrcoef(drawn, through)[0, 1] > max(0.7, np.corrcoef(flat, through)[0, 1])


def test_disk_draws_each_leaf_in_its_colour():
    tree = make_tree(40)
    ax = plotting.plot_disk(tree, class_names=["a", "b", "c", "d"])
    inner, *groups = drawn_points(ax)
    points, _ = layout.sarkar(tree)
    np.testing.assert_allclose(inner, np.stack([points.real, points.imag], 1)[40:])
    for label, group in enumerate(groups):
        np.testing.assert_allclose(group[:, 0], points[:40].real[tree.leaf_labels == label])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c", "d"]


def test_disk_names_and_images():
    tree = make_tree(12)
    images = np.arange(12)[:, None, None] * np.ones((12, 5, 5))
    ax = plotting.plot_disk(tree, names=[f"leaf {i}" for i in range(12)], images=images)
    assert {f"leaf {i}" for i in range(12)} <= {text.get_text() for text in ax.texts}
    boxes = [artist for artist in ax.artists if isinstance(artist, AnnotationBbox)]
    assert len(boxes) == 12
    for box, leaf in zip(boxes, range(12), strict=True):
        assert int(np.asarray(box.offsetbox.get_data())[0, 0]) == int(leaf * 255 / 11)
    assert all(0 < np.hypot(*box.xy) < ax.get_xlim()[1] for box in boxes)


def test_class_leaves_are_named_and_coloured_by_superclass():
    tree = make_tree(12)
    tree = Hierarchy(tree.parents, tree.heights, tree.proxies, np.arange(12) * 2)
    names = {2 * i: f"class {i}" for i in range(12)}
    assert "class 11" in {text.get_text() for text in plotting.plot_disk(tree, class_names=names).texts}
    assert plotting.plot_disk(tree).get_legend() is None
    ax = plotting.plot_disk(
        tree, labels=torch.arange(12) % 2, names=list(names.values()), class_names=["even", "odd"]
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["even", "odd"]


@pytest.mark.parametrize("kind", ["disk", "dendrogram"])
def test_names_of_many_leaves_are_thinned_with_a_notice(kind):
    tree, names = make_tree(200), [f"name {i}" for i in range(200)]
    for leaves, step in ((80, 1), (200, 3)):
        ax = DRAW[kind](tree, names=names, max_leaves=leaves)
        texts = [t.get_text() for t in [*ax.texts, *ax.get_xticklabels()]] + [ax.get_title("right")]
        shown = [text for text in texts if text in names or re.fullmatch(r"\d+ leaves", text)]
        assert len(shown) == math.ceil(leaves / step)
        assert any("1 of 3 names is shown" in text for text in texts) == (step == 3)


@pytest.mark.parametrize("kind", ["disk", "dendrogram"])
def test_large_trees_are_pruned(kind):
    tree = make_tree(300)
    ax = DRAW[kind](tree, max_leaves=20)
    groups = drawn_points(ax)[1 if kind == "disk" else 0 :]
    assert sum(map(len, groups)) == 20
    small, members = layout.prune(tree, 20)
    assert sorted(itertools.chain(*members)) == list(range(300))
    assert small.num_leaves == 20
    np.testing.assert_array_equal(small.heights[20:], tree.heights[-19:])
    for a, b in itertools.combinations(range(20), 2):
        together = tree.lowest_common_ancestor([*members[a], *members[b]])
        assert tree.heights[together] == small.heights[small.lowest_common_ancestor([a, b])]


def test_dendrogram_has_the_heights_of_the_tree():
    tree = make_tree(15)
    ax = plotting.plot_dendrogram(tree, names=[f"n{i}" for i in range(15)])
    branches = [path for c in ax.collections if hasattr(c, "get_segments") for path in c.get_segments()]
    tops = sorted(path[:, 1].max() for path in branches)
    np.testing.assert_allclose(tops, np.sort(tree.heights[15:]))
    assert sorted(label.get_text() for label in ax.get_xticklabels()) == sorted(f"n{i}" for i in range(15))
    low, high = ax.get_ylim()
    assert low < tree.heights[15] < tree.heights[-1] < high
    assert plotting.plot_dendrogram(tree, images=np.zeros((15, 4, 4, 3), np.uint8)).artists


def test_plot_errors():
    tree = make_tree(10)
    with pytest.raises(ValueError, match=r"labels must have shape \(10,\)"):
        plotting.plot_disk(tree, labels=[1, 2])
    with pytest.raises(ValueError, match="names must be 10"):
        plotting.plot_disk(tree, names=["a"])
    with pytest.raises(ValueError, match="images must be 10"):
        plotting.plot_disk(tree, images=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=r"images must be \(H, W\)"):
        plotting.plot_disk(tree, images=np.zeros((10, 4, 4, 7)))
    with pytest.raises(ValueError, match="max_leaves must be at least 2"):
        plotting.plot_disk(tree, max_leaves=1)


@pytest.mark.parametrize("package", ["matplotlib", "plotly"])
def test_missing_packages_are_named(package, tmp_path):
    call = "plot_disk(tree)" if package == "matplotlib" else f"write_html(tree, {str(tmp_path / 'x.html')!r})"
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from hierloss.hierarchy import Hierarchy\n"
        "from hierloss.plotting import plot_disk, write_html\n"
        "tree = Hierarchy([2, 2, -1], [0, 0, 1], [0, 0, 0])\n"
        f"try: {call}\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'need {package}: pip install "hierloss[plot]"' in done.stdout, done.stderr


def test_images_of_all_shapes():
    gray = np.random.default_rng(0).random((3, 6, 4))
    colour = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
    as_bytes = ((gray - gray.min()) / (gray.max() - gray.min()) * 255).astype(np.uint8)
    for images, expected in [
        (gray, as_bytes),
        (torch.from_numpy(gray)[:, None], as_bytes),
        (list(gray), as_bytes),
        (colour, colour),
        (torch.from_numpy(colour).movedim(-1, 1), colour),
    ]:
        for image, array in zip(layout.as_images(images, 3), expected, strict=True):
            np.testing.assert_array_equal(image, array)
            data = html_page._data_uri(image).removeprefix("data:image/png;base64,")
            read = imread(io.BytesIO(base64.b64decode(data)))[..., :3]
            wanted = array / 255 if array.ndim == 3 else np.repeat(array[..., None] / 255, 3, 2)
            np.testing.assert_allclose(read, wanted, atol=1 / 255)


# --- the page -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    pytest.importorskip("plotly", reason="plotly is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs Chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--window-size=1200,900"),
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


class Page:
    """The page in the browser, where both figures have been drawn."""

    def __init__(self, browser, path):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.wait = browser, WebDriverWait(browser, 60)
        browser.get(f"file://{path}")
        self.until("return document.querySelectorAll('g.slice').length > 0")
        self.run(
            "[window.disk, window.icicle] = document.querySelectorAll('.plotly-graph-div');"
            "disk.id = 'disk'; icicle.id = 'icicle'"
        )

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script, *arguments):
        self.wait.until(lambda _: self.run(script, *arguments))


@pytest.fixture
def page(browser, tmp_path):
    tree = make_tree(40)
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    texts = [f"</script><b>text {i}</b>" for i in range(40)]
    names = [f'<a href="https://example.org">leaf {i}</a>' for i in range(40)]
    path = tmp_path / "tree.html"
    classes = ["a", "<b>b</b>", "c", "d"]
    plotting.write_html(tree, path, images=images, texts=texts, names=names, class_names=classes, title="A <tree>")
    return tree, images, Page(browser, path)


def test_page_draws_the_tree_of_python(page, browser):
    tree, images, shown = page
    points, _ = layout.sarkar(tree)
    drawn = shown.run(
        "return disk._fullData.filter(t => (t.mode || '').includes('markers'))"
        ".flatMap(t => Array.from(t.x, (x, i) => [x, t.y[i]]))"
    )
    expected = sorted([round(z.real, 6), round(z.imag, 6)] for z in points)
    np.testing.assert_allclose(sorted([round(x, 6), round(y, 6)] for x, y in drawn), expected, atol=2e-6)
    assert browser.title == "A <tree>"
    assert browser.find_element("tag name", "h1").text == "A <tree>"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert shown.run("return performance.getEntriesByType('resource').some(e => /^http/.test(e.name))") is False
    parents = shown.run("return icicle._fullData[0].parents")
    assert parents == ["" if parent < 0 else str(parent) for parent in tree.parents]
    sources = shown.run("return disk.layout.images.map(image => image.source)")
    for source, image in zip(sources, images, strict=True):
        read = imread(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))[..., :3]
        np.testing.assert_allclose(read * 255, image, atol=1)


def test_page_shows_names_as_text_and_never_as_markup(page, browser):
    _, _, shown = page
    assert not browser.find_elements("css selector", "svg a")
    texts = shown.run("return Array.from(document.querySelectorAll('#disk .textpoint'), e => e.textContent)")
    assert sorted(texts) == sorted(f'<a href="https://example.org">leaf {i}</a>' for i in range(40))
    legend = shown.run("return Array.from(document.querySelectorAll('.legendtext'), e => e.textContent)")
    assert legend == ["a", "<b>b</b>", "c", "d"]
    hover = shown.run("return icicle._fullData[0].hovertext[7]")
    assert "&lt;/script&gt;&lt;b&gt;text 7" in hover


def test_page_click_folds_to_a_branch(page, browser):
    tree, _, shown = page
    branch = min((n for n in tree.children(tree.root) if n >= tree.num_leaves), key=lambda n: tree.sizes[n])
    ids = "return Array.from(document.querySelectorAll('#icicle g.slice'), e => e.__data__.data.data.id)"
    before = shown.run(ids)
    browser.find_elements("css selector", "#icicle g.slice")[before.index(str(branch))].click()

    def under(node):
        return {str(node)} | {m for child in tree.children(node) for m in under(child)}

    shown.wait.until(lambda _: set(shown.run(ids)) <= under(branch) | {str(tree.root)})
    assert str(branch) in shown.run(ids)


def test_page_fits_a_phone(page, browser):
    """The two figures are one below the other, and no wider than the page."""
    _, _, shown = page
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for figure in ("disk", "icicle"):
            width = f"{figure}.querySelector('.main-svg').getBoundingClientRect().width"
            shown.until(f"return {width} <= 374 && {width} > 320")
        assert shown.run("return icicle.getBoundingClientRect().y >= disk.getBoundingClientRect().bottom - 1")
        assert shown.run("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_of_a_large_tree_draws_its_top_on_the_disk_and_all_of_it_to_fold(browser, tmp_path):
    tree = make_tree(400)
    path = tmp_path / "tree.html"
    plotting.write_html(tree, path)
    shown = Page(browser, path)
    drawn = shown.run("return disk._fullData.filter(t => (t.mode || '').includes('markers')).map(t => t.x.length)")
    assert sum(drawn) == layout.prune(tree, 100)[0].num_nodes
    assert shown.run("return icicle._fullData[0].ids.length") == tree.num_nodes
    assert path.stat().st_size < 6_000_000


def test_page_errors(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    with pytest.raises(ValueError, match="texts must be 10, one for each leaf, got 1"):
        plotting.write_html(make_tree(10), tmp_path / "x.html", texts=["a"])
    assert list(tmp_path.iterdir()) == []
