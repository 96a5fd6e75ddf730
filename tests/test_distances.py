"""PoincareDistance in everything of PML that takes a distance."""

import inspect
import math

import geoopt
import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BatchedDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, MatchFinder

from hierloss import PoincareDistance, poincare

# The losses of PML that assert a distance of their own: their formulas are made of cosines, or of its range.
REFUSING_LOSSES = {
    "AngularLoss",
    "ArcFaceLoss",
    "CircleLoss",
    "CosFaceLoss",
    "DynamicSoftMarginLoss",
    "FastAPLoss",
    "HistogramLoss",
    "InstanceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "PNPLoss",
    "SignalToNoiseRatioContrastiveLoss",
    "SmoothAPLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
    "ThresholdConsistentMarginLoss",
    "TupletMarginLoss",
}
# Those that never ask a distance.
WITHOUT_DISTANCE = {"VICRegLoss"}
WRAPPERS = {
    "BaseLossWrapper",
    "BaseMetricLossFunction",
    "CrossBatchMemory",
    "EmbeddingRegularizerMixin",
    "GenericPairLoss",
    "MultipleLosses",
    "SelfSupervisedLoss",
    "WeightRegularizerMixin",
}
REFUSING_MINERS = {"AngularMiner", "DistanceWeightedMiner"}
BASE_MINERS = {
    "BaseMiner",
    "BaseSubsetBatchMiner",
    "BaseTupleMiner",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "MaximumLossMiner",
}


def classes_of(module, left_out):
    return sorted(n for n, k in inspect.getmembers(module, inspect.isclass) if n not in left_out)


CLASSIFIER = {"num_classes": 4, "embedding_size": 8}
ARGUMENTS = {
    **dict.fromkeys(
        ["ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "NormalizedSoftmaxLoss", "ProxyAnchorLoss"],
        CLASSIFIER,
    ),
    **dict.fromkeys(["ProxyNCALoss", "SoftTripleLoss", "SphereFaceLoss", "SubCenterArcFaceLoss"], CLASSIFIER),
    "ManifoldLoss": {"l": 8, "K": 4},
    "P2SGradLoss": {"descriptors_dim": 8, "num_classes": 4},
    "RankedListLoss": {"margin": 0.5, "Tn": 1.0},
}


def build(kind, **kwargs):
    return kind(**ARGUMENTS.get(kind.__name__, {}), **kwargs)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(16, 8, generator=generator).requires_grad_(), torch.arange(16) % 4


@pytest.mark.parametrize("name", classes_of(losses, REFUSING_LOSSES | WITHOUT_DISTANCE | WRAPPERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_pml_loss(name, dtype, batch):
    embeddings, labels = batch
    loss_func = build(getattr(losses, name), distance=PoincareDistance())
    loss_func.to(dtype)
    loss = loss_func(embeddings.to(dtype), None if name == "ManifoldLoss" else labels)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("name", sorted(REFUSING_LOSSES & set(dir(losses))))  # older PML has fewer
def test_losses_that_refuse(name, batch):
    """They say so themselves, when they are built or, HistogramLoss, when a value leaves [-1, 1]."""

    def use():
        loss_func = build(getattr(losses, name), distance=PoincareDistance())
        assert isinstance(loss_func.distance, PoincareDistance)  # SubCenterArcFaceLoss drops it before PML 2.9
        loss_func(*batch)

    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        use()


def test_weights_are_not_mapped_to_the_ball_twice(batch):
    """NormalizedSoftmaxLoss normalizes its weights, columns of a matrix, before it asks for distances."""
    loss_func = losses.NormalizedSoftmaxLoss(4, 8, distance=PoincareDistance())
    with pytest.raises(ValueError, match=r"dim must be the last dimension, got 0.* use ProxyNCALoss"):
        loss_func(*batch)


def test_a_curvature_set_to_a_whole_number():
    distance, embeddings = PoincareDistance(), torch.randn(6, 4)
    distance.curvature = 1
    torch.testing.assert_close(distance(embeddings), PoincareDistance(1.0)(embeddings))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_curvature_of_one_element_of_any_shape(shape):
    """Its gradient has that shape."""
    ball = geoopt.PoincareBall(c=torch.full(shape, 0.3), learnable=True)
    embeddings = torch.randn(6, 4)
    distances = PoincareDistance(ball)(embeddings)
    torch.testing.assert_close(distances, PoincareDistance(0.3)(embeddings))
    distances.sum().backward()
    assert ball.isp_c.grad.shape == shape
    assert ball.isp_c.grad.abs().sum() > 0


def test_several_curvatures_are_refused():
    x = torch.zeros(2, 4)
    for function in (poincare.exp_map0, poincare.project, poincare.log_map0):
        with pytest.raises(ValueError, match=r"c must have one element, .* got shape \(2, 1\)"):
            function(x, torch.tensor([[0.1], [0.2]]))


@pytest.mark.parametrize("name", classes_of(miners, REFUSING_MINERS | BASE_MINERS))
def test_every_pml_miner(name, batch):
    embeddings, labels = batch
    mined = build(getattr(miners, name), distance=PoincareDistance())(embeddings, labels)
    assert sum(len(indices) for indices in mined) > 0


@pytest.mark.parametrize("name", sorted(REFUSING_MINERS))
def test_miners_that_refuse(name, batch):
    with pytest.raises(AssertionError):
        build(getattr(miners, name), distance=PoincareDistance())(*batch)


def test_triplet_margin_loss_has_the_value_of_the_formula(batch):
    embeddings, labels = batch
    loss_func = losses.TripletMarginLoss(margin=0.3, distance=PoincareDistance(c=0.4, clip_radius=1.0))
    x = poincare.exp_map0(poincare.clip_norm(embeddings.double(), 1.0), 0.4)
    d = poincare.distance(x[:, None], x[None], 0.4).tolist()
    values = [
        max(0.0, d[a][p] - d[a][n] + 0.3)
        for a in range(16)
        for p in range(16)
        for n in range(16)
        if a != p and labels[a] == labels[p] != labels[n]
    ]
    expected = sum(values) / sum(v > 0 for v in values)  # PML averages over those above 0
    assert abs(float(loss_func(embeddings, labels)) - expected) < 1e-5


def test_hyp_baseline_is_pairwise_cross_entropy():
    """NTXentLoss with this distance and temperature 0.2 is the loss of Ermolov et al. (CVPR 2022)."""
    embeddings = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 6
    loss_func = losses.NTXentLoss(temperature=0.2, distance=PoincareDistance())
    logits = (-PoincareDistance()(embeddings) / 0.2).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(logits, (torch.arange(12) + 6) % 12)
    assert abs(float(loss_func(embeddings, labels)) - float(expected)) < 1e-5


def test_knn_and_accuracy_calculator_use_the_hyperbolic_order():
    """Two rays: cosine similarity ranks by direction, the ball by where the points are."""
    reference = torch.tensor([[2.2, 0.0], [0.1, 0.02]])
    query = torch.tensor([[0.2, 0.0]])
    knn = CustomKNN(PoincareDistance())
    distances, indices = knn(query, 1, reference)
    assert indices.tolist() == [[1]]
    torch.testing.assert_close(distances, PoincareDistance()(query, reference)[:, 1:])
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1, knn_func=knn)
    accuracy = calculator.get_accuracy(query, torch.tensor([5]), reference, torch.tensor([4, 5]))
    assert accuracy == {"precision_at_1": 1.0}
    cosine = AccuracyCalculator(include=("precision_at_1",), k=1)
    query, reference = (torch.nn.functional.normalize(t) for t in (query, reference))
    accuracy = cosine.get_accuracy(query, torch.tensor([5]), reference, torch.tensor([4, 5]))
    assert accuracy == {"precision_at_1": 0.0}


def test_batched_distance_and_match_finder():
    embeddings = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = PoincareDistance()(embeddings), torch.zeros(10, 10)

    def keep(mat, start, end):
        parts[start:end] = mat

    BatchedDistance(PoincareDistance(), iter_fn=keep, batch_size=3)(embeddings)
    torch.testing.assert_close(parts, whole)
    threshold = float(whole[0, 1] + whole[0, 2]) / 2
    finder = MatchFinder(PoincareDistance(), threshold=threshold)
    nearer, farther = (1, 2) if whole[0, 1] < whole[0, 2] else (2, 1)
    assert finder.is_match(embeddings[:1], embeddings[nearer : nearer + 1])
    assert not finder.is_match(embeddings[:1], embeddings[farther : farther + 1])


def test_points_on_the_ball_are_taken_as_they_are():
    x = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    d = PoincareDistance(c=1.0, normalize_embeddings=False)(x)
    torch.testing.assert_close(d, torch.tensor([[0.0, 3.0], [3.0, 0.0]]).log().clamp(min=0))


@pytest.mark.parametrize("norm", [3.0, 6.0, 9.0])
def test_nothing_is_rounded_on_the_way_to_the_boundary(norm):
    """In float32 a vector of norm 9 is mapped onto the boundary itself; its distance from the origin is 18."""
    v = torch.zeros(3, 4)
    v[0, 0], v[1, 1] = norm, norm
    d = PoincareDistance(c=1.0, clip_radius=None)(v)
    torch.testing.assert_close(d[0, 2].item(), 2 * norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(d[0, 1].item(), math.acosh(math.cosh(2 * norm) ** 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    """Geometry does not lose digits to autocast, and half precision embeddings give float32 distances."""
    v = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = PoincareDistance()(v.double()).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = PoincareDistance()(v)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert PoincareDistance()(v, v.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"c": 0}, r"c must be a finite positive number, got 0"),
        ({"c": -1.0}, r"c must be a finite positive number, got -1.0"),
        ({"c": float("nan")}, r"c must be a finite positive number, got nan"),
        ({"c": "0.1"}, r"c must be a positive number or a geoopt.PoincareBall, got str"),
        ({"c": geoopt.PoincareBall(c=1e3, learnable=True)}, r"c of the geoopt.PoincareBall must be .* got inf"),
        ({"c": geoopt.PoincareBall(c=torch.tensor([0.1, 0.2]))}, r"must have one element, got shape \(2,\)"),
        ({"c": geoopt.Euclidean()}, r"c must be .* got Euclidean"),
        ({"clip_radius": 0}, r"clip_radius must be a finite positive number, got 0"),
        ({"clip_radius": True}, r"clip_radius must be a positive number, got True of type bool"),
        ({"is_inverted": True}, r"is_inverted must be False"),
        ({"p": 1}, r"p must be 2: .* got 1"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        PoincareDistance(**kwargs)
