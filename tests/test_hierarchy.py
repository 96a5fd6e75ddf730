"""The tree: against a brute-force transcription, and read back by independent readers."""

import copy
import io
import itertools
import json
import math
import pickle

import numpy as np
import pytest
import torch
from numpy.linalg import norm
from pytorch_metric_learning import losses
from scipy import stats
from scipy.cluster.hierarchy import cophenet, leaves_list, linkage
from trees import sample_tree

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner
from hierloss.hierarchy import Hierarchy
from hierloss.metrics import dendrogram_purity

# --- brute force --------------------------------------------------------------------------------------------

JOINT_HEIGHT = {
    "average": lambda a, b: np.mean([1 - x @ y for x in a for y in b]),
    "complete": lambda a, b: max(1 - x @ y for x in a for y in b),
    "ward": lambda a, b: (2 * len(a) * len(b) / (len(a) + len(b))) ** 0.5 * norm(np.mean(a, 0) - np.mean(b, 0)),
}


def greedy(points, method):
    """Merge the pair of clusters of lowest joint height, looking at all pairs. Returns [(leaf set, height)]."""
    clusters, merges = [frozenset([i]) for i in range(len(points))], []
    while len(clusters) > 1:
        heights = {
            (a, b): JOINT_HEIGHT[method](points[list(a)], points[list(b)])
            for a, b in itertools.combinations(clusters, 2)
        }
        a, b = min(heights, key=heights.get)
        clusters = [c for c in clusters if c not in (a, b)] + [a | b]
        merges.append((a | b, heights[a, b]))
    return merges


def random_tree(leaves, seed, proxies=7):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(leaves, 3, generator=generator)
    distances = PoincareDistance()(embeddings, torch.randn(proxies, 3, generator=generator))
    return Hierarchy.from_embeddings(embeddings, distances=distances), embeddings, distances


@pytest.mark.parametrize("method", JOINT_HEIGHT)
@pytest.mark.parametrize("seed", range(5))
def test_topology_and_heights_equal_brute_force(seed, method):
    embeddings = torch.randn(4 + 3 * seed, 3, generator=torch.Generator().manual_seed(seed))
    tree = Hierarchy.from_embeddings(embeddings, linkage=method)
    unit = torch.nn.functional.normalize(embeddings.double()).numpy()
    merges = greedy(unit, method)
    assert [frozenset(tree.leaves(node)) for node in range(tree.num_leaves, tree.num_nodes)] == [
        m[0] for m in merges
    ]
    np.testing.assert_allclose(tree.heights[tree.num_leaves :], [height for _, height in merges], atol=1e-12)
    scaled = embeddings * 2.0 ** torch.arange(len(embeddings)).unsqueeze(1)
    assert tree == Hierarchy.from_embeddings(scaled, linkage=method)  # norms do not matter, as on the ball


@pytest.mark.parametrize("seed", range(5))
def test_ancestor_is_the_proxy_nearest_to_the_farthest_leaf(seed):
    tree, _, distances = random_tree(30, seed)
    for node in range(tree.num_nodes):
        farthest = distances[tree.leaves(node)].amax(0)
        assert tree.proxies[node] == farthest.argmin()
        assert tree.radii[node] == farthest.min()
    assert (tree.radii[tree.parents[:-1]] >= tree.radii[:-1]).all()
    assert len(set(tree.proxies)) > 2


def test_class_leaf_is_the_mean_of_its_scaled_embeddings():
    _, embeddings, distances = random_tree(40, 0)
    labels = torch.arange(40) % 5 * 10
    tree = Hierarchy.from_embeddings(embeddings, labels, per_class=True, distances=distances)
    unit = torch.nn.functional.normalize(embeddings.double())
    rows = [labels == label for label in labels.unique()]
    means = torch.nn.functional.normalize(torch.stack([unit[row].mean(0) for row in rows]))
    far = torch.stack([distances[row].double().mean(0) for row in rows])
    expected = Hierarchy.from_embeddings(means, distances=far)
    np.testing.assert_allclose(tree.linkage, expected.linkage, atol=1e-12)
    np.testing.assert_array_equal(tree.proxies, expected.proxies)
    np.testing.assert_allclose(tree.radii, expected.radii)
    assert tree.leaf_labels.tolist() == [0, 10, 20, 30, 40]


# --- queries ------------------------------------------------------------------------------------------------


@pytest.fixture
def tree():
    # 8 is the root, above 7 = {0, 1} and 6 = {5 = {2, 3}, 4}
    matrix = [[2, 3, 1, 2], [4, 5, 1, 3], [0, 1, 2, 2], [6, 7, 5, 5]]
    return Hierarchy(matrix, None, [0, 0, 1, 1, 1, 1, 1, 0, 2], [0, 0, 0, 0, 0, 2.0, 2.0, 3.0, 4.0])


def test_queries(tree):
    assert (tree.num_leaves, tree.num_nodes, tree.root) == (5, 9, 8)
    assert tree.parents.tolist() == [7, 7, 5, 5, 6, 6, 8, 8, -1]
    assert tree.heights.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 5]
    assert [tree.children(node) for node in (0, 5, 6, 8)] == [(), (2, 3), (4, 5), (6, 7)]
    assert tree.sizes.tolist() == [1, 1, 1, 1, 1, 2, 3, 2, 5]
    assert [tree.leaves(node).tolist() for node in (3, 6, 7, 8)] == [[3], [2, 3, 4], [0, 1], [0, 1, 2, 3, 4]]
    assert tree.leaf_order.tolist() == leaves_list(tree.linkage.copy()).tolist() == [4, 2, 3, 0, 1]
    cases = [([3], 3), ([3, 4], 6), ([0, 1], 7), ([0, 1, 0], 7), ([1, 2], 8), ([5, 2], 5), (range(5), 8)]
    for nodes, ancestor in cases:
        assert tree.lowest_common_ancestor(nodes) == ancestor
        assert tree.lowest_common_ancestor(torch.tensor(nodes)) == ancestor


def test_common_ancestor_equals_smallest_node_that_holds_the_set():
    tree, *_ = random_tree(60, 3)
    generator = np.random.default_rng(0)
    for _ in range(50):
        leaves = generator.choice(60, generator.integers(1, 6), replace=False)
        holding = [n for n in range(tree.num_nodes) if set(leaves) <= set(tree.leaves(n).tolist())]
        assert tree.lowest_common_ancestor(leaves) == min(holding)


def test_cut(tree):
    assert tree.cut(1).tolist() == [0] * 5
    assert tree.cut(2).tolist() == [0, 0, 1, 1, 1]
    assert tree.cut(3).tolist() == [0, 1, 2, 2, 2]
    assert tree.cut(4).tolist() == [0, 1, 2, 2, 2]  # two nodes of the same height fall apart at once
    assert tree.cut(5).tolist() == [0, 1, 2, 3, 4]
    assert tree.cut(height=0).tolist() == [0, 1, 2, 3, 4]
    assert tree.cut(height=1.0).tolist() == [0, 1, 2, 2, 2]
    assert tree.cut(height=4.99).tolist() == [0, 0, 1, 1, 1]
    for num_groups in range(1, 31):
        assert len(set(random_tree(30, 2)[0].cut(num_groups).tolist())) == num_groups


def test_the_scale_of_embeddings_does_not_matter():
    embeddings = torch.randn(12, 4, dtype=torch.float64)
    trees = [Hierarchy.from_embeddings(embeddings * 2.0**power).linkage for power in (0, -400, 400)]
    np.testing.assert_array_equal(trees, [trees[0]] * 3)


def test_distances_of_other_types():
    """Arrays, and tensors in half precision."""
    embeddings, labels, generator = torch.randn(12, 4), torch.arange(12) // 3, torch.Generator().manual_seed(0)
    distances = torch.randint(1, 9, (12, 3), generator=generator).float()  # exact in half precision
    backwards = distances.flip(0).numpy()[::-1]
    for per_class in (False, True):
        given = {"labels": labels, "per_class": per_class}
        trees = [
            Hierarchy.from_embeddings(embeddings, **given, distances=d)
            for d in (distances, distances.numpy(), distances.bfloat16(), distances.half(), backwards)
        ]
        assert all(tree == trees[0] for tree in trees)
    assert trees[0].place(torch.rand(2, 4).bfloat16()).shape == (2,)


def test_place_goes_up_from_the_nearest_leaf_to_a_node_as_high_as_the_distance(tree):
    near_3 = np.array([5.0, 5.0, 4.0, 0.0, 4.0])
    placed = tree.place(near_3 + np.array([[0.0], [0.5], [1.0], [1.1], [5.0], [99.0]]))
    assert placed.tolist() == [3, 5, 5, 8, 8, 8]
    large, embeddings, _ = random_tree(50, 5)
    unit = torch.nn.functional.normalize(embeddings.double())
    assert large.place((1 - unit @ unit.T).float()).tolist() == list(range(50))  # 0 but for rounding


@pytest.mark.parametrize("clone", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_immutable(tree, clone):
    original, tree = tree, clone(tree)
    assert tree == original
    arrays = ["linkage", "parents", "heights", "proxies", "radii", "sizes", "leaf_order", "spans"]
    for array in (getattr(tree, name) for name in arrays):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        tree.linkage = tree.linkage
    source = np.array([[0.0, 1, 1, 2]])
    built = Hierarchy(source)
    source[:] = 0
    assert built.linkage.tolist() == [[0, 1, 1, 2]]


# --- export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "ward", "complete", "single"])
def test_linkage_of_scipy_is_kept(method):
    matrix = linkage(np.random.default_rng(0).normal(size=(25, 3)), method)
    tree = Hierarchy.from_linkage(matrix, np.arange(25))
    np.testing.assert_array_equal(tree.linkage, matrix)
    assert tree.proxies is tree.radii is None
    heights = iter(cophenet(matrix))
    for a, b in itertools.combinations(range(25), 2):
        assert next(heights) == tree.heights[tree.lowest_common_ancestor([a, b])]


def test_networkx(tree):
    networkx = pytest.importorskip("networkx")
    tree = Hierarchy(tree.linkage, ["a", "b", "c", "d", "e"], tree.proxies, tree.radii)
    graph = tree.to_networkx()
    assert networkx.is_arborescence(graph)
    assert networkx.lowest_common_ancestor(graph, 2, 4) == 6
    assert sorted(networkx.descendants(graph, 7)) == [0, 1]
    for name, values in {"height": tree.heights, "proxy": tree.proxies, "radius": tree.radii}.items():
        assert [graph.nodes[node][name] for node in range(9)] == values.tolist()
    assert [graph.nodes[node].get("label") for node in range(6)] == ["a", "b", "c", "d", "e", None]
    assert graph.edges[8, 6]["length"] == 4.0
    assert networkx.shortest_path_length(graph, 8, 3, weight="length") == 5.0
    assert set(Hierarchy(tree.linkage).to_networkx().nodes[8]) == {"height"}
    objects = Hierarchy(tree.linkage, np.array([*"abcde"], object))
    assert objects.to_networkx().nodes[1]["label"] == "b"
    assert objects.to_newick(range(5)) == Hierarchy(tree.linkage).to_newick()


def test_newick_is_read_by_biopython():
    phylo = pytest.importorskip("Bio.Phylo", reason="Biopython is not installed")
    tree, *_ = random_tree(30, 4)
    names = [f"it's leaf ({i}); a, b: c" for i in range(30)]
    read = phylo.read(io.StringIO(tree.to_newick(names)), "newick")

    def sets(clade, depth):
        """(leaves, depth from the root, name) of all inner nodes below."""
        depth += clade.branch_length or 0.0
        if clade.is_terminal():
            assert depth == pytest.approx(tree.heights[-1])  # leaves are at height 0
            return {clade.name}, []
        leaves, found = set(), []
        for child in clade.clades:
            below, more = sets(child, depth)
            leaves |= below
            found += more
        return leaves, [*found, (frozenset(leaves), round(tree.heights[-1] - depth, 4), clade.name)]

    _, found = sets(read.root, 0.0)
    expected = {
        (frozenset(names[i] for i in tree.leaves(n)), round(tree.heights[n], 4), f"proxy {tree.proxies[n]}")
        for n in range(30, 59)
    }
    assert set(found) == expected


def test_json(tree):
    for labels in (None, np.arange(5), np.array(list("abcde"))):
        labelled = Hierarchy(tree.linkage, labels, tree.proxies, tree.radii)
        assert Hierarchy.from_json(labelled.to_json()) == labelled != Hierarchy(tree.linkage, labels)
    mixed = np.array([1, "a", 2.5, np.int64(3), True], object)
    assert Hierarchy.from_json(Hierarchy(tree.linkage, mixed).to_json()).leaf_labels.tolist() == mixed.tolist()
    assert json.loads(tree.to_json())["linkage"][3] == [6, 7, 5, 5]
    random, *_ = random_tree(30, 4)
    assert Hierarchy.from_json(random.to_json()) == random
    with pytest.raises(ValueError, match="fields"):
        Hierarchy.from_json("{}")


# --- errors -------------------------------------------------------------------------------------------------

GOOD = torch.rand(6, 3)


@pytest.mark.parametrize(
    ("embeddings", "kwargs", "error", "message"),
    [
        (GOOD[:0], {}, ValueError, "embeddings must have at least one row"),
        (GOOD[:1], {}, ValueError, "2 to 20000 leaves, got 1 samples"),
        (GOOD[0], {}, ValueError, r"embeddings must have shape .* got shape \(3,\)"),
        (GOOD / 0, {}, ValueError, "embeddings must be finite"),
        (GOOD.numpy(), {}, TypeError, "embeddings must be a torch.Tensor, got ndarray"),
        (GOOD, {"linkage": "minimax"}, ValueError, '"complete" or "ward", got \'minimax\''),
        (GOOD, {"labels": torch.zeros(5)}, ValueError, r"labels must have shape \(6,\).* got shape \(5,\)"),
        (GOOD, {"per_class": True}, ValueError, "labels must be given when per_class"),
        (GOOD, {"labels": torch.zeros(6), "per_class": True}, ValueError, "leaves, got 1 classes$"),
        (torch.ones(1).expand(20_001, 3), {}, ValueError, "per_class=True .* subsample"),
        (GOOD, {"distances": GOOD[:5]}, ValueError, r"a row for each of 6 embeddings, got shape \(5, "),
        (GOOD, {"distances": GOOD[:, 0]}, ValueError, r"a row for each of 6 embeddings, got shape \(6,\)"),
        (GOOD, {"distances": GOOD / 0}, ValueError, r"finite, of shape \(6, num_proxies\)"),
        (GOOD, {"distances": GOOD[:, :0]}, ValueError, r"of shape \(6, num_proxies\), got shape \(6, 0\)"),
    ],
)
def test_bad_input(embeddings, kwargs, error, message):
    with pytest.raises(error, match=message):
        Hierarchy.from_embeddings(embeddings, **kwargs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([[[0, 1, 1.0, 2], [0, 2, 2.0, 2]]], "[Ll]inkage .* more than once"),
        ([[[0, 1, 2.0, 2], [2, 3, 1.0, 3]]], "do not decrease"),
        ([[[0, 1, np.nan, 2]]], "finite heights"),
        ([[[0, 1, 1.0, 2], [2, 3, 2.0, 2]]], "the number of leaves of each inner node"),
        ([np.zeros((0, 4))], "[Ll]inkage"),
        ([[[0, 1, 1.0, 2]], [1, 2, 3]], r"leaf_labels must have shape \(2,\), got shape \(3,\)"),
        ([[[0, 1, 1.0, 2]], None, [1, 2]], r"proxies must have shape \(3,\), got shape \(2,\)"),
        ([[[0, 1, 1.0, 2]], None, [0.5, 0, 0]], "proxies must be whole numbers, got 0.5"),
        ([[[0, 1, 1.0, 2]], None, torch.tensor([0, 0])], r"proxies must have shape \(3,\), got shape \(2,\)"),
    ],
)
def test_bad_tree(fields, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(*fields)


def test_bad_queries(tree):
    for node in (-1, 9):
        with pytest.raises(ValueError, match="node must be a whole number from 0 to 8"):
            tree.children(node)
    with pytest.raises(ValueError, match="node must be a whole number from 0 to 8, got True"):
        tree.lowest_common_ancestor([True, False, True, False, False])  # a mask
    for arguments in ({}, {"num_groups": 2, "height": 1.0}):
        with pytest.raises(ValueError, match="one of num_groups and height"):
            tree.cut(**arguments)
    with pytest.raises(ValueError, match="num_groups must be at most num_leaves=5, got 6"):
        tree.cut(6)
    with pytest.raises(ValueError, match="at least one node"):
        tree.lowest_common_ancestor([])
    with pytest.raises(ValueError, match="names must be 5"):
        tree.to_newick(["a"])
    with pytest.raises(TypeError, match="names must be a sequence in the order of the leaves, got a mapping"):
        tree.to_newick(dict(enumerate("abcde")))
    for distances in (torch.zeros(4, 2), torch.full((2, 5), math.nan)):
        with pytest.raises(ValueError, match=r"distances must have shape \(M, 5\), without NaN"):
            tree.place(distances)


# --- the whole way: from a known tree, through training, and back -------------------------------------------


def trained_tree(seed):
    """Train a small network on flat labels; the tree of its classes, their upper levels, and the first proxies."""
    features, taxonomy = sample_tree(torch.Generator().manual_seed(seed))
    labels = taxonomy[:, 0]
    upper = torch.stack([taxonomy[labels == label][0, 1:] for label in range(36)])
    torch.manual_seed(seed)
    head = torch.nn.Linear(128, 32, bias=False)
    torch.nn.init.orthogonal_(head.weight)
    norm = torch.nn.LayerNorm(128, elementwise_affine=False)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.ReLU(), norm, head)
    base = losses.ProxyAnchorLoss(36, 32)
    hier = HIERLoss(256, 32, miner=ReciprocalNeighborMiner(triplets_per_anchor=10))
    first = copy.deepcopy(hier)
    optimizer = torch.optim.Adam(
        [
            {"params": model.parameters(), "lr": 1e-4},
            {"params": [*base.parameters(), *hier.parameters()], "lr": 3e-3},
        ]
    )
    for _ in range(150):
        rows = torch.randint(len(features), (90,))
        embeddings = model(features[rows])
        loss = base(embeddings, labels[rows]) + hier(embeddings, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        trees = [loss.hierarchy(model(features), labels, per_class=True) for loss in (hier, first)]
    return *trees, upper


@pytest.mark.parametrize("seed", range(3))
def test_training_recovers_a_known_tree_and_moves_the_proxies_to_its_nodes(seed):
    tree, with_first_proxies, upper = trained_tree(seed)
    assert [dendrogram_purity(tree, level) >= 0.95 for level in upper.T] == [True, True]
    inner = slice(tree.num_leaves, None)
    # 0.93 to 0.95; exactly 1 if HIER does not move the proxies
    assert tree.radii[inner].mean() < 0.97 * with_first_proxies.radii[inner].mean()


# --- methods of the loss ------------------------------------------------------------------------------------


def test_the_hierarchy_of_a_loss_is_that_of_its_proxies_and_distance():
    generator = torch.Generator().manual_seed(1)
    embeddings, labels = torch.randn(30, 4, generator=generator), torch.arange(30) % 6
    distance = PoincareDistance(c=1.0, clip_radius=1.5)
    loss_func = HIERLoss(8, 4, distance=distance)
    distances = loss_func.proxy_distances(embeddings).detach()
    of_samples, of_classes = (
        Hierarchy.from_embeddings(embeddings, labels, per_class=per_class, distances=distances)
        for per_class in (False, True)
    )
    assert of_samples != of_classes
    assert loss_func.hierarchy(embeddings, labels) == of_samples
    assert loss_func.hierarchy(embeddings, labels, per_class=True) == of_classes
    assert (
        loss_func.hierarchy(embeddings) == Hierarchy.from_embeddings(embeddings, distances=distances) != of_samples
    )
    ward = Hierarchy.from_embeddings(embeddings, labels, linkage="ward", distances=distances)
    assert loss_func.hierarchy(embeddings, labels, linkage="ward") == ward != of_samples


@pytest.mark.parametrize("on_ball", [False, True])
def test_init_proxies_draws_data_towards_the_origin(on_ball):
    """Each embedding is drawn as often as any other, and its clipped norm times a uniform factor is left."""
    embeddings = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    distance = PoincareDistance(clip_radius=1.5, normalize_embeddings=not on_ball)
    given = PoincareDistance(clip_radius=None).normalize(embeddings).float() if on_ball else embeddings
    loss_func = HIERLoss(500, 5, distance=distance)
    torch.manual_seed(1)
    loss_func.init_proxies(given)
    proxies = loss_func.proxies.detach()
    cosines = torch.nn.functional.normalize(proxies) @ torch.nn.functional.normalize(embeddings).T
    nearest = cosines.max(1)
    torch.testing.assert_close(nearest.values, torch.ones(500))
    counts = nearest.indices.bincount(minlength=200)
    assert (counts.min(), counts.max()) == (2, 3)  # without replacement
    clipped = embeddings.norm(dim=1).clamp_max(1.5)[nearest.indices]
    shares = proxies.norm(dim=1) / clipped
    assert stats.kstest(shares.numpy(), "uniform").pvalue > 0.01
    torch.manual_seed(1)
    loss_func.init_proxies(given)
    assert torch.equal(loss_func.proxies, proxies)


@pytest.mark.parametrize("sized", [False, True])
def test_init_proxies_keeps_the_parameter_and_its_optimizer(sized):
    embeddings = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    loss_func = HIERLoss(8, 4 if sized else None)
    parameter, optimizer = loss_func.proxies, torch.optim.SGD(loss_func.parameters(), lr=0.1)
    loss_func.init_proxies(embeddings)
    assert loss_func.proxies is parameter
    before = parameter.detach().clone()
    loss_func(embeddings).backward()
    optimizer.step()
    assert (parameter != before).any()


@pytest.mark.parametrize("sized", [False, True])
def test_init_proxies_with_bad_embeddings_leaves_the_proxies(sized):
    loss_func = HIERLoss(8, 4 if sized else None)
    before = loss_func.proxies.detach().clone() if sized else None
    with pytest.raises(ValueError, match="embeddings must be finite"):
        loss_func.init_proxies(torch.full((9, 4), math.nan))
    loss_func.distance.curvature = math.nan  # as a learnable one that diverged
    with pytest.raises(ValueError, match="c of the distance must be a finite positive number, got nan"):
        loss_func.init_proxies(torch.ones(9, 4))
    if sized:
        with pytest.raises(ValueError, match=r"embeddings must have 4 columns, .* got shape \(9, 3\)"):
            loss_func.init_proxies(torch.ones(9, 3))
        assert torch.equal(loss_func.proxies, before)
    assert loss_func.embedding_size == (4 if sized else None)
