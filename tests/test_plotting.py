"""Pictures: what is drawn where; and the page, in a real browser."""

import itertools
import math
import re
import shutil
import subprocess
import sys

import geoopt
import numpy as np
import pytest
import torch

from hierloss import PoincareDistance
from hierloss.hierarchy import Hierarchy

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.offsetbox import AnnotationBbox  # noqa: E402

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
    return Hierarchy.from_embeddings(
        points, torch.arange(leaves) % 4, distances=PoincareDistance()(points, proxies)
    )


def drawn_points(ax):
    """Coordinates of all markers."""
    markers = [c for c in ax.collections if hasattr(c, "get_sizes") and len(c.get_sizes())]
    return [np.asarray(c.get_offsets()) for c in markers if len(c.get_offsets())]


def written(ax):
    """All texts at the leaves, and the notices."""
    return [text.get_text() for text in [*ax.texts, *ax.get_yticklabels()]]


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


def test_embeddings_without_a_direction_keep_their_distance_too():
    """Equal embeddings, one, the one in the middle, and those of one class whose first dimensions are 0."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, -1, 0]])
    of_one_class = torch.randn(20, 6, generator=generator) * torch.tensor([0, 0, 1, 1, 1, 1])
    for embeddings in (torch.ones(5, 3), torch.ones(1, 3), middle, of_one_class, 1e-20 * middle):
        points = drawn_points(plotting.plot_embeddings(embeddings, torch.zeros(len(embeddings))))[0]
        expected = PoincareDistance().normalize(embeddings).norm(dim=1) * math.sqrt(0.1)
        np.testing.assert_allclose(np.linalg.norm(points, axis=1), expected, rtol=1e-6)


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


def test_embeddings_circles_are_at_their_distances():
    ax = plotting.plot_embeddings(torch.randn(5, 3))
    (clip,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(np.hypot(*clip.get_data()), math.tanh(math.sqrt(0.1) * 2.3))
    assert ax.texts
    for text in ax.texts:
        expected = math.tanh(math.sqrt(0.1) * float(text.get_text()) / 2)
        assert text.get_position()[1] == pytest.approx(expected)


def test_embeddings_legend_and_axes():
    _, ax = plt.subplots()
    embeddings, labels = torch.randn(30, 3), torch.arange(30) % 3 + 5
    assert plotting.plot_embeddings(embeddings, labels, class_names={5: "a", 6: "b", 7: "c"}, ax=ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
    faces = {tuple(c.get_facecolor()[0]) for c in ax.collections}
    assert len(faces) == 3
    assert plotting.plot_embeddings(embeddings).get_legend() is None
    assert len({*plotting._STYLES}) == 80


def test_embeddings_of_a_learnable_curvature(recwarn):
    distance = PoincareDistance(geoopt.PoincareBall(0.1, learnable=True))
    plotting.plot_embeddings(torch.randn(5, 3), distance=distance)
    assert not recwarn.list


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


@pytest.mark.parametrize("seed", range(3))
def test_disk_shows_heights_as_distances_from_the_middle_and_no_edges_cross(seed):
    tree = make_tree(24, seed)
    points, edges, scale = plotting._on_disk(tree)
    assert scale == pytest.approx(3 / tree.heights[-1])
    np.testing.assert_allclose(disk_distance(points, 0), scale * (tree.heights[-1] - tree.heights), atol=1e-12)
    leaves = np.angle(points[tree.leaf_order]) % (2 * math.pi)
    np.testing.assert_allclose(leaves, 2 * math.pi * (np.arange(24) + 0.5) / 24)
    for node, (edge, above) in enumerate(zip(edges, tree.parents[:-1], strict=True)):
        np.testing.assert_allclose([edge[0], edge[-1]], [points[above], points[node]], atol=1e-12)
        np.testing.assert_allclose(abs(edge[:-1]), abs(points[above]))  # along the circle of the parent
        below = tree.spans[node].mean() * 2 * math.pi / 24
        np.testing.assert_allclose(edge[-2:], abs(edge[-2:]) * np.exp(1j * below), atol=1e-12)
    assert crossings([edge[1:] for edge in edges]) == 0  # edges of one node do meet there


def test_disk_draws_each_leaf_in_its_colour():
    tree = make_tree(40)
    ax = plotting.plot_disk(tree, class_names=["a", "b", "c", "d"])
    inner, *groups = drawn_points(ax)
    points, *_ = plotting._on_disk(tree)
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
    pair_of_pairs = Hierarchy([[0, 1, 1, 2], [2, 3, 2, 2], [4, 5, 3, 4]])
    ax = plotting.plot_disk(pair_of_pairs, images=images[:4].astype(np.uint8), max_leaves=2)
    boxes = [artist.offsetbox.get_data() for artist in ax.artists if isinstance(artist, AnnotationBbox)]
    assert [int(np.asarray(box)[0, 0]) for box in boxes] == [0, 2]  # the first of each branch


def test_class_leaves_are_named_and_coloured_by_superclass():
    tree = make_tree(12)
    tree = Hierarchy(tree.linkage, np.arange(12) * 2)
    names = {2 * i: f"class {i}" for i in range(12)}
    assert "class 11" in {text.get_text() for text in plotting.plot_disk(tree, class_names=names).texts}
    assert plotting.plot_disk(tree).get_legend() is None
    ax = plotting.plot_disk(
        tree, labels=torch.arange(12) % 2, names=list(names.values()), class_names=["even", "odd"]
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["even", "odd"]


def test_leaves_coloured_by_superclass_keep_their_own_labels_as_names():
    tree = Hierarchy(make_tree(12).linkage, np.arange(12) * 2)
    for plot in DRAW.values():
        ax = plot(tree, labels=torch.arange(12) % 2)
        ax.figure.draw_without_rendering()
        assert "22" in written(ax)


@pytest.mark.parametrize("heights", [[1.0], [1.0, 1.0], [0.0, 0.0]])
def test_dendrogram_of_one_height_has_room(heights):
    matrix = [[0, 1, heights[0], 2], [2, 3, heights[-1], 3]][: len(heights)]
    left, right = plotting.plot_dendrogram(Hierarchy(matrix)).get_xlim()
    assert left > 1
    assert right == 0


def overlaps(ax):
    """How many pairs of neighbouring names overlap, by their rotated boxes as they are drawn."""
    ax.figure.draw_without_rendering()
    renderer = ax.figure.canvas.get_renderer()
    texts = [t for t in [*ax.texts, *ax.get_yticklabels()] if t.get_text().startswith("name")]
    boxes = []
    for text in texts:
        x, y = text.get_transform().transform(text.get_position()) if text in ax.texts else (0, 0)
        box = text.get_window_extent(renderer)
        size = text.get_fontsize() * ax.figure.dpi / 72
        boxes.append((x, y) if text in ax.texts else (box.x0, (box.y0 + box.y1) / 2))
    distances = [math.dist(a, b) / size for a, b in itertools.pairwise(sorted(boxes, key=lambda p: order(ax, p)))]
    return sum(distance < 1 for distance in distances)


def order(ax, point):
    """Place along the circle, or along the axis."""
    x, y = ax.transAxes.inverted().transform(point)
    return math.atan2(y - 0.5, x - 0.5) if ax.get_aspect() == 1 else y


@pytest.mark.parametrize("kind", ["disk", "dendrogram"])
def test_names_of_many_leaves_are_thinned_with_a_notice(kind):
    """All have room in a figure of their own; in a small one every so many is written."""
    tree, names = make_tree(200), [f"name {i}" for i in range(200)]
    for leaves, small in ((80, False), (200, False), (200, True)):
        ax = plt.subplots(figsize=(5, 5))[1] if small else None
        ax = DRAW[kind](tree, names=names, max_leaves=leaves, ax=ax)
        shown = [text for text in written(ax) if text in names or re.fullmatch(r"\d: \d+ of \d+", text)]
        (step,) = [int(t[5]) for t in "\n".join(written(ax)).split("\n") if "names is shown" in t] or [1]
        assert (step > 1) == small
        assert len(shown) == leaves // step
        assert overlaps(ax) == 0


@pytest.mark.parametrize("kind", ["disk", "dendrogram"])
def test_names_are_drawn_as_they_are(kind):
    """No mathematics between dollars, no second line, no end."""
    names = ["$x^2$ and $y$", "cost: 5$", r"a\$b", "two\nlines", "long " * 50, "_under", "7", "8"]
    labels = ["$a$", "_b"] * 4
    tree = make_tree(8)
    ax = DRAW[kind](tree, names=names, labels=labels)
    ax.figure.draw_without_rendering()
    texts = [*ax.texts, *ax.get_yticklabels(), *ax.get_legend().get_texts()]
    drawn = {text._preprocess_math(text.get_text()) for text in texts}
    expected = {"$x^2$ and $y$", "cost: 5$", r"a\$b", "two lines", " _under", "$a$", " _b"}
    assert {(text, False) for text in expected} <= drawn
    assert max(len(text) for text, _ in drawn) <= 50


def test_branches_have_the_colour_of_most_of_their_leaves():
    matrix = [[0, 1, 1, 2], [4, 2, 2, 3], [5, 3, 3, 4]]
    tree = Hierarchy(matrix, [0, 0, 1, 1])
    edges = plotting.plot_disk(tree).collections[0].get_colors()
    a, b = (matplotlib.colors.to_rgba(plotting._STYLES[group][0]) for group in (0, 1))
    np.testing.assert_allclose(edges, [a, a, b, b, a, a])
    tree = Hierarchy(matrix, [0, 1, 0, 1])
    links = [c for c in plotting.plot_dendrogram(tree).collections if hasattr(c, "get_segments")]
    colors = {tuple(c.get_colors()[0]): len(c.get_segments()) for c in links}
    assert colors == {matplotlib.colors.to_rgba(plotting._GREY): 2, a: 1}


def test_legend_of_many_groups_covers_no_picture():
    """35 superclasses have a colour and marker each, and a legend outside the axes."""
    tree, labels = make_tree(70), np.arange(70) % 35
    for plot in DRAW.values():
        ax = plot(tree, labels=labels, names=[f"a rather long name {i}" for i in range(70)])
        ax.figure.draw_without_rendering()
        legend, axes = ax.get_legend().get_window_extent(), ax.get_window_extent()
        assert legend.y1 <= axes.y0 + 1 or legend.y0 >= axes.y1 - 1
        whole = ax.figure.bbox
        assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
        assert whole.y0 <= legend.y0 < legend.y1 <= whole.y1
        handles = ax.get_legend().legend_handles
        looks = {(tuple(h.get_facecolor()[0]), h.get_paths()[0].vertices.tobytes()) for h in handles}
        assert len(looks) == 35


@pytest.mark.parametrize("kind", ["disk", "dendrogram"])
def test_large_trees_are_pruned(kind):
    tree = make_tree(300)
    ax = DRAW[kind](tree, max_leaves=20)
    groups = drawn_points(ax)[1 if kind == "disk" else 0 :]
    assert sum(map(len, groups)) == 20
    small, members = plotting._prune(tree, 20)
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
    tops = sorted(path[:, 0].max() for path in branches)
    np.testing.assert_allclose(tops, np.sort(tree.heights[15:]))
    assert sorted(label.get_text() for label in ax.get_yticklabels()) == sorted(f"n{i}" for i in range(15))
    high, low = ax.get_xlim()
    assert low < tree.heights[15] < tree.heights[-1] < high


def test_dendrogram_puts_name_and_marker_at_their_leaf():
    tree = make_tree(15)
    ax = plotting.plot_dendrogram(tree, names=[f"n{i}" for i in range(15)])
    at = {label.get_position()[1]: int(label.get_text()[1:]) for label in ax.get_yticklabels()}
    for label, points in enumerate(drawn_points(ax)):
        assert {int(tree.leaf_labels[at[y]]) for _, y in points} == {label}
    lowest = int(tree.children(15)[0]), int(tree.children(15)[1])
    y = sorted(y for y, leaf in at.items() if leaf in lowest)
    assert y[1] - y[0] == 10


def test_plot_errors():
    tree = make_tree(10)
    with pytest.raises(ValueError, match=r"labels must have shape \(10,\)"):
        plotting.plot_disk(tree, labels=[1, 2])
    with pytest.raises(ValueError, match="names must be 10"):
        plotting.plot_disk(tree, names=["a"])
    with pytest.raises(TypeError, match="names must be a sequence in the order of the leaves, got a mapping"):
        plotting.plot_disk(tree, names=dict(enumerate("abcdefghij")))
    with pytest.raises(ValueError, match="images must be 10"):
        plotting.plot_disk(tree, images=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=r"images must be \(H, W\)"):
        plotting.plot_disk(tree, images=np.zeros((10, 4, 4, 7)))
    with pytest.raises(ValueError, match="max_leaves must be at least 2"):
        plotting.plot_disk(tree, max_leaves=1)
    with pytest.raises(ValueError, match="max_leaves must be at least 2"):
        plotting.plot_dendrogram(tree, max_leaves=1)
    for names in (["a", "b"], np.array(["a", "b"])):  # -1 is not the last one
        with pytest.raises(ValueError, match="class_names must have a name for each label, got none for -1"):
            plotting.plot_disk(tree, labels=np.arange(10) % 2 - 1, class_names=names)
    with pytest.raises(ValueError, match="class_names must have a name for each label, got none for 'x'"):
        plotting.plot_dendrogram(tree, labels=["x"] * 10, class_names=["a", "b"])


def test_missing_packages_are_named(tmp_path):
    """In a process of its own, which has loaded none of them."""
    code = (
        "import sys\n"
        "from hierloss.hierarchy import Hierarchy\n"
        "from hierloss.plotting import plot_dendrogram, plot_disk, write_html\n"
        "tree = Hierarchy([[0, 1, 1.0, 2]])\n"
        f"page = lambda: write_html(tree, {str(tmp_path / 'x.html')!r})\n"
        "calls = [('plotly', page), ('matplotlib', page), ('matplotlib', lambda: plot_disk(tree)),\n"
        "         ('matplotlib', lambda: plot_dendrogram(tree)), ('scipy', lambda: plot_dendrogram(tree))]\n"
        "for package, call in calls:\n"
        "    loaded = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split('.')[0] == package}\n"
        "    sys.modules[package] = None\n"
        "    try: call()\n"
        "    except ImportError as error: print(error)\n"
        "    sys.modules.pop(package)\n"
        "    sys.modules.update(loaded)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    packages = ("plotly", "matplotlib", "matplotlib", "matplotlib", "scipy")
    expected = [f'pictures need {package}: pip install "hierloss[plot]"' for package in packages]
    assert done.stdout.splitlines() == expected, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_images_of_all_shapes():
    gray = np.random.default_rng(0).random((3, 6, 4))
    colour = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 3), dtype=np.uint8)
    as_bytes = ((gray - gray.min()) / (gray.max() - gray.min()) * 255).astype(np.uint8)
    for images, expected in [
        (gray, as_bytes),
        (torch.from_numpy(gray)[:, None], as_bytes),
        (gray > 0.5, 255 * (gray > 0.5)),
        (np.array([[[-32768, 0, 32767]]] * 3, np.int16), [[[0, 127, 255]]] * 3),
        (list(gray), as_bytes),
        (colour, colour),
        (torch.from_numpy(colour).movedim(-1, 1), colour),
    ]:
        for image, array in zip(plotting._as_images(images, 3), expected, strict=True):
            np.testing.assert_array_equal(image, array)


def test_grey_images_keep_their_values():
    tree = Hierarchy([[0, 1, 1.0, 2]])
    ax = plotting.plot_disk(tree, images=np.array([[[100, 110]], [[0, 255]]], np.uint8))
    boxes = [artist.offsetbox.image for artist in ax.artists if isinstance(artist, AnnotationBbox)]
    drawn = [box.to_rgba(box.get_array(), bytes=True)[0, :, 0].tolist() for box in boxes]
    assert drawn == [[100, 110], [0, 255]]


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
        *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1200,900"),
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


class Page:
    """The page in the browser, where the icicle has been drawn."""

    def __init__(self, browser, path):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self.wait = browser, WebDriverWait(browser, 60)
        browser.get(f"file://{path}")
        self.until("return document.querySelectorAll('#tree g.slice').length > 0")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, script, *arguments):
        self.wait.until(lambda _: self.run(script, *arguments))


EVIL = '<a href="https://example.org">leaf {}</a> $x^2$ &amp; <img src=x onerror="window.evil = 1">{{}}'


@pytest.fixture(scope="module")
def written_page(tmp_path_factory):
    tree = make_tree(40)
    look = {
        "images": np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8),
        "names": [EVIL.format(i) for i in range(40)],
        "class_names": ["a", "<b>b</b>", "c", "</svg><script>window.evil = 1</script>"],
    }
    path = tmp_path_factory.mktemp("page") / "tree.html"
    texts = [f"</script><b>text {i}</b>" for i in range(40)]
    plotting.write_html(tree, path, texts=texts, title="A <tree> {}", **look)
    return tree, look, path


@pytest.fixture
def page(browser, written_page):
    tree, look, path = written_page
    return tree, look, Page(browser, path)


@pytest.mark.slow
def test_page_draws_the_tree_of_python(page, browser):
    tree, _, shown = page
    assert browser.title == "A <tree> {}"
    assert browser.find_element("tag name", "h2").text == "A <tree> {}"
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert shown.run("return performance.getEntriesByType('resource').some(e => /^http/.test(e.name))") is False
    drawn = shown.run("const {parents, values, ids} = tree._fullData[0]; return {parents, values, ids}")
    assert drawn["parents"] == ["" if parent < 0 else str(parent) for parent in tree.parents]
    assert drawn["ids"] == [str(node) for node in range(tree.num_nodes)]
    assert drawn["values"] == tree.sizes.tolist()
    assert len(browser.find_elements("css selector", "#disk svg image")) == 40


@pytest.mark.slow
def test_page_has_the_very_picture_of_plot_disk(page, browser):
    """The points of the edges and the colours of the markers, in the units of the picture."""
    tree, look, shown = page
    ax = plotting.plot_disk(tree, **look)
    ax.figure.dpi = 72
    ax.figure.draw_without_rendering()
    height = ax.figure.bbox.height
    expected = [ax.transData.transform(edge)[[0, -1]] for edge in ax.collections[0].get_segments()]
    paths = shown.run(
        "return Array.from(document.querySelectorAll('#disk [id^=LineCollection_] path'), p => ["
        "p.getPointAtLength(0), p.getPointAtLength(p.getTotalLength())].map(q => [q.x, q.y]))"
    )
    found = {tuple(np.round(np.ravel(path), 0)) for path in paths}
    for edge in expected:
        edge = edge * [1, -1] + [0, height]
        assert any(np.abs(np.ravel(edge) - path).max() < 1.5 for path in found)
    assert len(paths) == 2 * tree.num_leaves + (tree.num_nodes - tree.num_leaves - 1)  # edges, and lines to images


@pytest.mark.slow
def test_page_shows_names_as_text_and_never_as_markup(page, browser):
    _, look, shown = page
    for selector in ("#disk a", "#tree a", "img", "#disk script", "#disk b"):
        assert not browser.find_elements("css selector", selector), selector
    assert shown.run("return window.evil === undefined")
    texts = shown.run("return Array.from(document.querySelectorAll('#disk text'), e => e.textContent)")
    assert {name[:39] + "…" for name in look["names"]} <= set(texts)
    assert {"a", "<b>b</b>", "c", "</svg><script>window.evil = 1</script>"} <= set(texts)
    hover = shown.run("return tree._fullData[0].hovertext[7]")
    assert "&lt;/script&gt;&lt;b&gt;text 7" in hover
    assert "&lt;a href" in shown.run("return tree._fullData[0].labels[7]")


def hovered(shown, node):
    """The text that plotly shows while the mouse is over a bar."""
    from selenium.webdriver.common.action_chains import ActionChains

    bars = shown.browser.find_elements("css selector", "#tree g.slice")
    ids = shown.run("return Array.from(document.querySelectorAll('#tree g.slice'), e => e.__data__.data.data.id)")
    ActionChains(shown.browser).move_to_element(bars[ids.index(str(node))]).perform()
    shown.until("return document.querySelectorAll('#tree .hovertext').length == 1")
    lines = "return Array.from(document.querySelectorAll('#tree .hovertext .nums tspan'), e => e.textContent)"
    return shown.run(lines) or [shown.run("return document.querySelector('#tree .hovertext .nums').textContent")]


@pytest.mark.slow
def test_page_hover_shows_what_is_known(browser, tmp_path):
    matrix = [[0, 1, 1, 2], [4, 2, 2, 3], [5, 3, 3.25, 4]]
    tree = Hierarchy(matrix, [0, 0, 1, 1], range(7))
    path = tmp_path / "tree.html"
    names, texts = ["n<0>", "n1", "n2", "n3"], ["t<b>0</b>", "t1", "t2", "t3"]
    plotting.write_html(tree, path, names=names, texts=texts, class_names=["A", "B<br>"])
    shown = Page(browser, path)
    assert hovered(shown, 0) == ["n<0>", "A", "t<b>0</b>"]
    assert hovered(shown, 3) == ["n3", "B<br>", "t3"]
    assert hovered(shown, 5) == ["A: 2 of 3", "3 leaves, height 2, proxy 5"]
    bars = shown.run("return Array.from(document.querySelectorAll('#tree .slicetext'), e => e.textContent)")
    assert {"n<0>", "n1", "n2", "n3", "A: 2 of 2"} <= set(bars)


@pytest.mark.slow
def test_page_click_folds_to_a_branch(page, browser):
    tree, _, shown = page
    branch = min((n for n in tree.children(tree.root) if n >= tree.num_leaves), key=lambda n: tree.sizes[n])
    ids = "return Array.from(document.querySelectorAll('#tree g.slice'), e => e.__data__.data.data.id)"
    before = shown.run(ids)
    browser.find_elements("css selector", "#tree g.slice")[before.index(str(branch))].click()

    def under(node):
        return {str(node)} | {m for child in tree.children(node) for m in under(child)}

    shown.wait.until(lambda _: set(shown.run(ids)) <= under(branch) | {str(tree.root)})
    assert str(branch) in shown.run(ids)


@pytest.mark.slow
def test_page_fits_a_phone(page, browser):
    """The two figures are one below the other, and no wider than the page."""
    _, _, shown = page
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        for figure in ("#disk svg", "#tree .main-svg"):
            width = f"document.querySelector('{figure}').getBoundingClientRect().width"
            shown.until(f"return {width} <= 374 && {width} > 320")
        assert shown.run("return tree.getBoundingClientRect().y >= disk.getBoundingClientRect().bottom - 1")
        assert shown.run("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_page_can_be_read_in_light_and_dark_mode(page, browser, mode):
    """Texts of the disk contrast with the page, which shows through the picture."""
    _, _, shown = page
    features = [{"name": "prefers-color-scheme", "value": mode}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        style = "return getComputedStyle(document.querySelector('{}')).{}"
        shades = [shown.run(style.format(*what)) for what in (("body", "backgroundColor"), ("#disk text", "fill"))]
        ground, text = (np.mean([int(v) for v in re.findall(r"\d+", shade)[:3]]) / 255 for shade in shades)
        assert (ground > 0.9) == (mode == "light")
        assert abs(ground - text) > 0.6
        grounds = "document.querySelectorAll('#disk svg > g > g > path')"
        assert {*shown.run(f"return Array.from({grounds}, e => getComputedStyle(e).fill)")} == {"none"}
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_page_of_a_large_tree_draws_its_top_on_the_disk_and_all_of_it_to_fold(browser, tmp_path):
    tree = make_tree(400)
    path = tmp_path / "tree.html"
    plotting.write_html(tree, path)
    shown = Page(browser, path)
    edges = shown.run("return document.querySelectorAll('#disk [id^=LineCollection_] path').length")
    assert edges == plotting._prune(tree, 200)[0].num_nodes - 1
    assert shown.run("return tree._fullData[0].ids.length") == tree.num_nodes
    assert path.stat().st_size < 2_000_000


def test_page_leaves_axes_of_the_user_open(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    figure, ax = plt.subplots()
    plotting.write_html(make_tree(10), tmp_path / "x.html", ax=ax)
    assert plt.get_fignums() == [figure.number]


def test_blank_labels_have_a_legend():
    ax = plotting.plot_disk(make_tree(12), labels=[""] * 6 + [" "] * 6)
    assert len(ax.get_legend().get_texts()) == 2


def test_page_errors(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    with pytest.raises(ValueError, match="texts must be 10, one for each leaf, got 1"):
        plotting.write_html(make_tree(10), tmp_path / "x.html", texts=["a"])
    with pytest.raises(TypeError, match="texts must be a sequence in the order of the leaves, got a mapping"):
        plotting.write_html(make_tree(10), tmp_path / "x.html", texts=dict.fromkeys(range(10), "a"))
    assert list(tmp_path.iterdir()) == []


def test_equal_embeddings_have_names_all_around_the_disk():
    """All heights are 0, and all leaves in the middle: their directions are those of their places."""
    ax = plotting.plot_disk(Hierarchy.from_embeddings(torch.ones(6, 3)), names=list("abcdef"))
    angles = [np.angle(complex(*text.get_position())) for text in ax.texts if text.get_text() in "abcdef"]
    assert np.diff(np.sort(angles)) == pytest.approx(np.full(5, np.pi / 3))
