"""PoincareKNN against all distances, sorted; in everything of PML that takes a knn_func."""

import sys

import faiss
import geoopt
import pytest
import torch
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel

from hierloss import PoincareDistance, PoincareKNN, poincare, retrieval


@pytest.fixture(params=["faiss", "torch"])
def library(request, monkeypatch):
    """The search with FAISS, and as it is where FAISS is not installed."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "faiss", None)
    return request.param


def sorted_distances(query, reference, distance=None):
    """All distances from differences of float64 coordinates, sorted, with the lower index first."""
    distance = distance or PoincareDistance()
    x, y = (distance.maybe_normalize(t) for t in (query, reference))
    rows = [poincare.distance(row, y, distance.c).sort(stable=True) for row in x]
    return torch.stack([row.values for row in rows]), torch.stack([row.indices for row in rows])


def assert_nearest(found, query, reference, distance=None, rtol=1e-6):
    distances, indices = sorted_distances(query, reference, distance)
    k = found[0].shape[1]
    torch.testing.assert_close(found[1], indices[:, :k], rtol=0, atol=0)
    torch.testing.assert_close(found[0].double(), distances[:, :k].double(), rtol=rtol, atol=1e-12)


# --- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance",
    [
        PoincareDistance(),
        PoincareDistance(c=1.0, clip_radius=1.0),
        PoincareDistance(c=0.01, clip_radius=None),
        PoincareDistance(geoopt.PoincareBall(c=2.0, learnable=True)),
    ],
)
def test_neighbors_are_those_of_all_distances(library, distance):
    query, reference = torch.randn(30, 16), torch.randn(500, 16)
    found = PoincareKNN(distance)(query, 7, reference)
    assert_nearest(found, query, reference, distance)
    assert not found[0].requires_grad
    double = PoincareKNN(distance)(query.double(), 7, reference.double())
    assert double[0].dtype == torch.float64
    assert_nearest(double, query.double(), reference.double(), distance, rtol=1e-12)


def test_faiss_alone_decides_on_ordinary_data(monkeypatch):
    """What makes it fast: no second search."""
    monkeypatch.setattr(retrieval._References, "_search_products", None)
    query, reference = torch.randn(50, 128) * 0.2, torch.randn(2000, 128) * 0.2
    assert_nearest(PoincareKNN()(query, 10, reference), query, reference)


def test_points_near_the_boundary(library):
    """Inner products of 1e8 and more, of which float32 keeps seven digits; distances differ in the next ones."""
    distance = PoincareDistance(c=1.0, clip_radius=None)
    centers = torch.nn.functional.normalize(torch.randn(5, 8))
    reference = (centers.repeat(80, 1) + 1e-4 * torch.randn(400, 8)) * (5 + torch.rand(400, 1))
    query = reference[:40] + 1e-4 * torch.randn(40, 8)
    points = distance.normalize(query), distance.normalize(reference)
    scores = poincare.lift_queries(points[0], 1.0).float() @ poincare.lift_references(points[1], 1.0).float().T
    naive = scores.topk(5).indices
    assert (naive != sorted_distances(query, reference, distance)[1][:, :5]).float().mean() > 0.2
    assert_nearest(PoincareKNN(distance)(query, 5, reference), query, reference, distance)


def test_points_held_at_the_boundary(library):
    """Beyond what even float64 can tell from the boundary."""
    distance = PoincareDistance(c=1.0, clip_radius=None)
    query, reference = torch.randn(10, 4) * 20, torch.randn(200, 4) * 20
    assert_nearest(PoincareKNN(distance)(query, 5, reference), query, reference, distance)


def test_points_on_the_ball(library):
    """Also outside of it: such points are projected as PoincareDistance does, by their own dtype."""
    distance = PoincareDistance(c=0.5, normalize_embeddings=False)
    points = poincare.exp_map0(torch.randn(300, 6) * torch.linspace(0.1, 4, 300).unsqueeze(1), 0.5)
    points[30::30] *= 1.1
    found = PoincareKNN(distance)(points[:100:3], 6, points)
    assert_nearest(found, points[:100:3], points, distance)
    torch.testing.assert_close(
        found[0], distance(points[:100:3], points).sort().values[:, :6], atol=1e-6, rtol=1e-6
    )


def test_one_far_reference_costs_the_others_nothing(monkeypatch):
    """The bound on errors is that of the references within reach, not of the longest vector of all."""
    monkeypatch.setattr(retrieval._References, "_search_products", None)
    distance = PoincareDistance(c=1.0, clip_radius=None)
    query, reference = torch.randn(20, 8) * 0.3, torch.randn(400, 8) * 0.3
    reference[7] *= 15 / reference[7].norm()
    assert_nearest(PoincareKNN(distance)(query, 5, reference), query, reference, distance)


def test_near_references_keep_their_order(library):
    query = torch.randn(1, 16)
    reference = query + torch.randn(300, 16) * torch.logspace(-6, -3, 300)[torch.randperm(300)].unsqueeze(1)
    assert_nearest(PoincareKNN()(query, 20, reference), query, reference)


def test_chunks_change_nothing(library, monkeypatch):
    query, reference = torch.randn(23, 8), torch.randn(211, 8)
    reference[100:150] = reference[0]
    queries = torch.cat([query, reference[:1]])  # the last needs all distances
    expected = PoincareKNN()(queries, 5, reference)
    for cells in (1, 211 * 3, 211 * 8):
        monkeypatch.setattr(retrieval, "_CHUNK_CELLS", cells)
        torch.testing.assert_close(PoincareKNN()(queries, 5, reference), expected, rtol=0, atol=0)


# --- ties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, 40, 60])
def test_of_equal_distances_the_lower_index_comes_first(library, k):
    """Also where equal references are more than the candidates: 50 of 300."""
    reference = torch.randn(300, 8)
    equal = torch.randperm(300)[:50]
    reference[equal] = reference[equal[0]].clone()
    query = torch.cat([reference[equal[:1]] + 0.01, torch.randn(5, 8)])
    found = PoincareKNN()(query, k, reference)
    assert_nearest(found, query, reference)
    assert found[1][0, : min(k, 50)].tolist() == sorted(equal.tolist())[: min(k, 50)]


def test_collapsed_embeddings(library):
    found = PoincareKNN()(torch.ones(4, 3), 5, torch.ones(200, 3))
    assert found[1].tolist() == [[0, 1, 2, 3, 4]] * 4
    assert (found[0] == 0).all()


# --- references that include the query ----------------------------------------------------------------------


def test_no_query_is_its_own_neighbor(library):
    query, others = torch.randn(40, 8), torch.randn(60, 8)
    reference = torch.cat([query, others])
    distances, indices = PoincareKNN()(query, 4, reference, ref_includes_query=True)
    expected = CustomKNN(PoincareDistance())(query, 4, reference, ref_includes_query=True)
    torch.testing.assert_close(indices, expected[1], rtol=0, atol=0)
    torch.testing.assert_close(distances, expected[0])


def test_duplicates_of_a_query_are_neighbors(library):
    reference = torch.randn(100, 8)
    reference[[3, 5, 9]] = reference[3].clone()
    distances, indices = PoincareKNN()(reference[:10], 2, reference, ref_includes_query=True)
    assert indices[[3, 5, 9]].tolist() == [[5, 9], [3, 9], [3, 5]]
    assert (distances[[3, 5, 9]] == 0).all()
    # More of them than neighbours: query 9 itself is not among those found, and the last of these goes.
    assert PoincareKNN()(reference[:10], 1, reference, ref_includes_query=True)[1][9].tolist() == [3]


def test_no_neighbors_where_no_two_labels_are_equal():
    """AccuracyCalculator asks for k = 0 there."""
    calculator = AccuracyCalculator(
        include=("precision_at_1",), k="max_bin_count", knn_func=PoincareKNN(), device=torch.device("cpu")
    )
    assert calculator.get_accuracy(torch.randn(9, 4), torch.arange(9))["precision_at_1"] != 1
    distances, indices = PoincareKNN()(torch.randn(9, 4), 0, torch.randn(9, 4), ref_includes_query=True)
    assert distances.shape == indices.shape == (9, 0)


# --- in PML -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, "max_bin_count", 5])
@pytest.mark.parametrize("own_reference", [False, True])
def test_accuracies_equal_those_of_customknn(library, k, own_reference):
    labels = torch.arange(120) % 6
    embeddings = torch.randn(6, 8)[labels] + torch.randn(120, 8)
    data = (embeddings[:50], labels[:50], embeddings[50:], labels[50:]) if own_reference else (embeddings, labels)
    ours, expected = (
        AccuracyCalculator(
            exclude=("NMI", "AMI"), k=k, knn_func=knn_func, device=torch.device("cpu")
        ).get_accuracy(*data)
        for knn_func in (PoincareKNN(), CustomKNN(PoincareDistance()))
    )
    assert ours == expected
    assert 0.2 < ours["precision_at_1"] < 1
    assert len(ours) == 5


def test_tester():
    labels = torch.arange(60) % 3
    embeddings = torch.randn(3, 8)[labels] + torch.randn(60, 8)
    dataset = torch.utils.data.TensorDataset(embeddings, labels)
    accuracies = [
        GlobalEmbeddingSpaceTester(
            normalize_embeddings=False,
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            accuracy_calculator=AccuracyCalculator(
                include=("mean_average_precision",), knn_func=knn_func, device=torch.device("cpu")
            ),
        ).test({"test": dataset}, 0, torch.nn.Identity())["test"]["mean_average_precision_level0"]
        for knn_func in (PoincareKNN(), CustomKNN(PoincareDistance()))
    ]
    assert accuracies[0] == accuracies[1] < 1


def test_inference_model(library, tmp_path):
    first, second, query = (torch.randn(n, 8) for n in (80, 70, 5))
    knn_func = PoincareKNN()
    model = InferenceModel(
        torch.nn.Identity(), knn_func=knn_func, normalize_embeddings=False, data_device=torch.device("cpu")
    )
    model.train_knn(torch.randn(9, 8))
    model.train_knn(first)
    assert_nearest(model.get_nearest_neighbors(query, 3), query, first)
    model.add_to_knn(second)
    both = torch.cat([first, second])
    assert_nearest(model.get_nearest_neighbors(query, 3), query, both)
    assert_nearest(knn_func(query, 3, second), query, second)
    assert_nearest(knn_func(query, 3), query, both)  # what is given is not stored
    with pytest.raises(RuntimeError, match="no references to save"):
        PoincareKNN().save(tmp_path / "references.pt")
    model.save_knn_func(tmp_path / "references.pt")
    knn_func.train(first)
    model.load_knn_func(tmp_path / "references.pt")
    assert_nearest(model.get_nearest_neighbors(query, 3), query, both)


def test_stored_references_follow_a_curvature_that_learns(library):
    ball = geoopt.PoincareBall(c=1.0, learnable=True)
    distance = PoincareDistance(ball)
    query, reference = torch.randn(5, 4), torch.randn(100, 4)
    knn_func = PoincareKNN(distance)
    knn_func.train(stored := reference.clone())
    stored.zero_()  # the memory of the caller
    before = knn_func(query, 3)
    assert_nearest(before, query, reference, distance)
    with torch.no_grad():
        ball.isp_c.fill_(-2.0)
    after = knn_func(query, 3)
    assert_nearest(after, query, reference, distance)
    assert not torch.equal(before[0], after[0])
    with torch.no_grad():
        ball.isp_c.fill_(torch.nan)
    with pytest.raises(ValueError, match="c of the distance must be a finite positive number, got nan"):
        knn_func(query, 3)


@pytest.mark.parametrize("change", [{"clip_radius": 10.0}, {"normalize_embeddings": False}])
def test_stored_references_follow_the_map_onto_the_ball(change):
    distance, query, reference = PoincareDistance(), torch.randn(5, 4), torch.randn(100, 4)
    knn_func = PoincareKNN(distance)
    knn_func.train(reference)
    before = knn_func(query, 3)
    for name, value in change.items():
        setattr(distance, name, value)
    after = knn_func(query, 3)
    torch.testing.assert_close(after, PoincareKNN(PoincareDistance(**change))(query, 3, reference))
    assert not torch.equal(before[0], after[0])


def test_references_saved_on_a_gpu_load_on_a_cpu(monkeypatch, tmp_path):
    reference = torch.randn(10, 4)
    knn_func = PoincareKNN()
    knn_func.train(reference)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    knn_func.save(tmp_path / "references.pt")
    other = PoincareKNN()
    other.load(tmp_path / "references.pt")
    assert_nearest(other(reference, 3), reference, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(library, dtype):
    query, reference = torch.randn(10, 8, dtype=dtype), torch.randn(200, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PoincareKNN()(query, 5, reference)
    assert found[0].dtype == torch.float32
    assert_nearest(found, query, reference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("index", [None, "Flat"])
def test_on_a_gpu(index):
    query, reference = torch.randn(50, 16, device="cuda"), torch.randn(2000, 16, device="cuda")
    found = PoincareKNN(index=index)(query, 7, reference)
    assert found[0].device.type == found[1].device.type == "cuda"
    assert_nearest(tuple(t.cpu() for t in found), query.cpu(), reference.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_stored_references_follow_the_device_of_the_queries():
    query, reference, knn_func = torch.randn(5, 4), torch.randn(100, 4), PoincareKNN()
    knn_func.train(reference)
    expected = knn_func(query, 3)
    found = knn_func(query.cuda(), 3)
    torch.testing.assert_close(tuple(t.cpu() for t in found), expected)


# --- approximate search -------------------------------------------------------------------------------------


def inverted_lists(size):
    index = faiss.index_factory(size, "IVF50,Flat", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = 10
    return index


@pytest.mark.parametrize("index", ["HNSW32", inverted_lists])
def test_an_approximate_index_finds_most_and_orders_exactly(index):
    reference = torch.randn(3000, 8)
    query = reference[:200] + 0.1 * torch.randn(200, 8)
    distances, indices = PoincareKNN(index=index)(query, 10, reference)
    exact = PoincareKNN()(query, 10, reference)[1]
    recall = (indices.unsqueeze(2) == exact.unsqueeze(1)).any(1).float().mean()
    assert 0.85 < recall < 1
    x, y = (PoincareDistance().normalize(t) for t in (query, reference))
    torch.testing.assert_close(distances, poincare.distance(x.unsqueeze(1), y[indices], 0.1).float())
    assert (distances.diff(dim=1) >= 0).all()


def test_an_index_that_finds_too_few_is_made_up_for():
    """Ten lists of about 20 references, of which one is searched: not 180."""

    def index(size):
        return faiss.index_factory(size, "IVF10,Flat", faiss.METRIC_INNER_PRODUCT)

    query, reference = torch.randn(20, 4), torch.randn(200, 4)
    found = PoincareKNN(index=index)(query, 180, reference)
    assert_nearest(found, query, reference)


def test_a_flat_index_is_exact():
    query, reference = torch.ones(2, 4), torch.ones(100, 4)
    assert PoincareKNN(index="Flat")(query, 3, reference)[1].tolist() == [[0, 1, 2]] * 2


# --- inner products -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 1.0, torch.tensor(3.0)])
@pytest.mark.parametrize("max_distance", [None, 8.0])
def test_inner_products_of_lifted_points_give_the_distance(c, max_distance):
    x, y = (poincare.exp_map0(torch.randn(n, 5, dtype=torch.float64), c) for n in (6, 8))
    stored = poincare.lift_references(y, c, max_distance)
    scores = poincare.lift_queries(x, c) @ stored.T
    distances = poincare.pairwise_distance(x, y, c)
    torch.testing.assert_close((-scores).acosh() / c**0.5, distances, rtol=1e-6, atol=1e-6)
    length = stored.norm(dim=1)
    torch.testing.assert_close(length, length[:1].expand(8))
    assert (
        poincare.lift_references(y.float(), c).dtype == poincare.lift_queries(x.half(), c).dtype == torch.float32
    )


def test_a_graph_of_lifted_references_finds_more_than_one_of_plain_points():
    """Why docs/search.md says so: points of the hyperboloid differ in length, by which a graph goes astray."""
    points = PoincareDistance().normalize(torch.randn(4000, 24) * torch.linspace(0.05, 0.5, 4000).unsqueeze(1))
    exact = poincare.pairwise_distance(points[::10], points, 0.1).topk(10, largest=False).indices
    lifted, queries = (
        poincare.lift_references(points, 0.1).float(),
        poincare.lift_queries(points[::10], 0.1).float(),
    )
    recall = []
    for width in (26, 25):  # without the last coordinate they are plain points
        index = faiss.IndexHNSWFlat(width, 16, faiss.METRIC_INNER_PRODUCT)
        index.add(lifted[:, :width].contiguous().numpy())
        found = torch.from_numpy(index.search(queries[:, :width].contiguous().numpy(), 10)[1])
        recall.append((exact.unsqueeze(2) == found.unsqueeze(1)).any(2).double().mean())
    assert recall[0] > recall[1] + 0.1


def test_references_stored_in_parts_have_one_length():
    """The length is that of a point at the largest distance, which needs no padding."""
    c, clip_radius = 0.1, 2.3
    distance = PoincareDistance(c, clip_radius)
    parts = [poincare.lift_references(distance.normalize(torch.randn(9, 4) * s), c, 4.6) for s in (0.1, 1, 9)]
    lengths = torch.cat(parts).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(27))
    assert parts[2][0, -1] < 1e-3 * lengths[0]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, r"query must be a torch.Tensor, got list"),
        ({"query": torch.ones(3)}, ValueError, r"query must have shape .* got shape \(3,\)"),
        ({"reference": torch.ones(4, 2).long()}, TypeError, r"reference must be floating point"),
        ({"reference": torch.ones(4, 3)}, ValueError, r"number of columns, got shapes \(2, 2\) and \(4, 3\)"),
        ({"reference": None}, ValueError, r"reference must be given, or stored by train"),
        ({"k": 0}, ValueError, r"k must be at least 1, got 0"),
        ({"k": 5}, ValueError, r"k must be at most 4, the number of references, got 5"),
        ({"k": 4, "ref_includes_query": True}, ValueError, r"at most 3, .* besides the query itself, got 4"),
        ({"k": 1.0}, TypeError, r"k must be a whole number, got 1.0"),
        (
            {"query": torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])},
            ValueError,
            r"query must be finite, got NaN or infinity in row 1",
        ),
        ({"reference": torch.full((4, 2), torch.inf)}, ValueError, r"reference must be finite, .* in row 0"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    arguments = {"query": torch.ones(2, 2), "k": 1, "reference": torch.ones(4, 2), **arguments}
    with pytest.raises(error, match=message):
        PoincareKNN()(**arguments)


def test_wrong_options(monkeypatch):
    with pytest.raises(TypeError, match="distance must be a PoincareDistance, got float"):
        PoincareKNN(0.1)
    with pytest.raises(TypeError, match=r"index must be a factory string of FAISS, or a function .* got int"):
        PoincareKNN(index=32)
    with pytest.raises(ValueError, match=r"empty index of 6 dimensions, .* got one of 6 dimensions by metric 1"):
        PoincareKNN(index=faiss.IndexFlatL2)(torch.ones(1, 4), 1, torch.ones(2, 4))
    with pytest.raises(ValueError, match="got one of 5 dimensions"):
        PoincareKNN(index=lambda size: faiss.IndexFlatIP(size - 1))(torch.ones(1, 4), 1, torch.ones(2, 4))
    with pytest.raises(ValueError, match="embeddings must be finite"):
        PoincareKNN().train(torch.full((2, 2), torch.nan))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="index needs FAISS: install faiss-cpu"):
        PoincareKNN(index="HNSW32")
