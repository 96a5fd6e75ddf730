"""HIERLoss in every place that a PML loss can be put."""

import copy
import io
import math
import pickle
import warnings

import geoopt
import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, reducers
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

import hierloss
from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner, ToPoincare, functional, poincare

P, D, B = 24, 8, 32


def batch(seed=0, n=B, dim=D):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator).requires_grad_(), torch.arange(n) % 6


def small(**kwargs):
    """Called alone mostly, where there is no ratio to other gradients."""
    torch.manual_seed(0)
    return HIERLoss(**{"num_proxies": P, "embedding_size": D, "gradient_ratio": None} | kwargs)


def value(loss_func, *args, seed=0):
    torch.manual_seed(seed)
    return loss_func(*args)


def assert_trains(loss_func, loss, embeddings):
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert loss_func.proxies.grad.isfinite().all()
    assert loss_func.proxies.grad.abs().max() > 0


# --- the loss itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_embeddings", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_proxy_distances(dtype, normalize_embeddings, monkeypatch):
    """Proxies are tangent vectors whatever the embeddings are, and chunks make no difference."""
    loss_func = small(distance=PoincareDistance(c=0.3, normalize_embeddings=normalize_embeddings))
    embeddings = batch()[0].detach().to(dtype) / 4
    x = embeddings.double()
    x = poincare.exp_map0(x, 0.3, 2.3) if normalize_embeddings else x
    rho = poincare.exp_map0(loss_func.proxies.double(), 0.3, 2.3)
    expected = poincare.distance(x[:, None], rho, 0.3).to(torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(loss_func.proxy_distances(embeddings), expected)
    monkeypatch.setattr(hierloss.losses, "_CHUNK_ROWS", 5)
    torch.testing.assert_close(loss_func.proxy_distances(embeddings), expected)
    with pytest.raises(RuntimeError, match="HIERLoss has no proxies before its first batch"):
        HIERLoss(num_proxies=P).proxy_distances(embeddings)
    with pytest.raises(ValueError, match="embeddings must have 8 columns"):
        loss_func.proxy_distances(embeddings[:, :5])


@pytest.mark.parametrize("with_labels", [True, False])
def test_loss_is_the_sum_of_both_means(with_labels):
    """HIERLoss is the functional layer applied to mapped embeddings and proxies, random numbers included."""
    loss_func = small(miner=ReciprocalNeighborMiner(num_neighbors=4, triplets_per_anchor=7))
    embeddings, labels = batch()
    labels = labels if with_labels else None
    x, rho = (poincare.exp_map0(poincare.clip_norm(v.double(), 2.3), 0.1) for v in (embeddings, loss_func.proxies))
    distances = poincare.pairwise_distance(torch.cat([x, rho]), rho, 0.1, dtype=torch.float32)
    torch.manual_seed(5)
    kwargs = {"num_neighbors": 4, "triplets_per_anchor": 7}
    samples = functional.reciprocal_triplets(PoincareDistance()(embeddings).detach(), labels, **kwargs)
    proxies = functional.reciprocal_triplets(distances[B:].detach(), **kwargs)
    samples, proxies = (torch.stack(t[:3])[:, t[3]] for t in (samples, proxies))
    triplets = torch.cat([samples, proxies + B], 1)
    per_triplet = functional.hierarchical_triplet_loss(distances, triplets).losses
    expected = per_triplet[: samples.shape[1]].mean() + per_triplet[samples.shape[1] :].mean()
    assert 0 < samples.shape[1] < B * 7 or with_labels
    actual = value(loss_func, embeddings, labels, seed=5)
    torch.testing.assert_close(actual, expected)
    grads = []
    for loss in (actual, expected):
        torch.manual_seed(6)  # the backward pass draws noise of its own
        grads.append(torch.autograd.grad(loss, (embeddings, loss_func.proxies)))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("proxy_batch_size", [None, 10])
def test_eval_mode_leaves_the_generator_alone(proxy_batch_size):
    loss_func = small(proxy_batch_size=proxy_batch_size).eval()
    embeddings, labels = batch()
    state = torch.get_rng_state()
    first = loss_func(embeddings, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(17)
    assert torch.equal(loss_func(embeddings, labels), first)


def test_triplets_and_ancestors_of_eval_mode():
    """The most probable ancestor, and evenly spread triplets."""
    kwargs = {"num_neighbors": 4, "triplets_per_anchor": 20}
    loss_func = small(miner=ReciprocalNeighborMiner(**kwargs), reducer=reducers.DoNothingReducer()).eval()
    embeddings, labels = batch()
    info = loss_func(embeddings, labels)["sample_loss"]
    mined = functional.reciprocal_triplets(PoincareDistance()(embeddings).detach(), labels, **kwargs, random=False)
    triplets = torch.stack(mined[:3])[:, mined[3]]
    assert torch.equal(torch.stack(info["indices"]), triplets)
    x, rho = (poincare.exp_map0(poincare.clip_norm(v.double(), 2.3), 0.1) for v in (embeddings, loss_func.proxies))
    expected, _ = functional.hierarchical_triplet_loss(
        poincare.pairwise_distance(x, rho, 0.1).float(), triplets, noise=torch.zeros(2, triplets.shape[1], P)
    )
    torch.testing.assert_close(info["losses"], expected)


@pytest.mark.parametrize(
    ("distance", "radius"),
    [
        (PoincareDistance(), 2.3),
        (PoincareDistance(c=4.0, clip_radius=None), 0.5),  # 1 / sqrt(c), beyond which tanh is almost 1
    ],
)
def test_start_of_the_proxies(distance, radius):
    proxies = small(num_proxies=2000, embedding_size=64, distance=distance).proxies
    torch.testing.assert_close(proxies.std().item(), 0.9 * radius / 8, rtol=0.02, atol=0)
    torch.testing.assert_close(proxies.norm(dim=1).mean().item(), 0.9 * radius, rtol=0.02, atol=0)


@pytest.mark.parametrize("sized", [False, True])
def test_made_and_first_used_in_inference_mode(sized):
    """As a sanity check before training does: the proxies must still be trainable."""
    embeddings, labels = batch()
    with torch.inference_mode():
        loss_func = HIERLoss(num_proxies=P, embedding_size=D if sized else None)
        loss_func(embeddings, labels)
    restored = HIERLoss(num_proxies=P)
    with torch.inference_mode():
        restored.load_state_dict(loss_func.state_dict())
    for each in (loss_func, restored):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        before = each.proxies.detach().clone()
        each(embeddings.detach().requires_grad_(), labels).backward()
        optimizer.step()
        assert (each.proxies != before).any()


def test_an_error_in_the_first_batch_leaves_the_loss_as_it_was():
    loss_func = HIERLoss(num_proxies=P)
    embeddings, _ = batch()
    with pytest.raises(RuntimeError, match="HIERLoss cannot get a size within"):
        torch.func.grad(loss_func)(embeddings.detach())
    assert loss_func.embedding_size is None
    assert loss_func(embeddings).isfinite()


# --- with other losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_miners", [False, True])
@pytest.mark.parametrize("kind", [list, dict])
def test_multiple_losses(kind, with_miners):
    base, loss_func = losses.MultiSimilarityLoss(), small()
    embeddings, labels = batch()
    both, weights, own_miners = [base, loss_func], [1, 0.5], [miners.MultiSimilarityMiner(), None]
    if kind is dict:
        both, weights = {"base": base, "hier": loss_func}, {"base": 1, "hier": 0.5}
        own_miners = {"base": own_miners[0]}
    combined = losses.MultipleLosses(both, miners=own_miners if with_miners else None, weights=weights)
    pairs = miners.MultiSimilarityMiner()(embeddings, labels) if with_miners else None
    expected = base(embeddings, labels, pairs) + 0.5 * value(loss_func, embeddings, labels)
    torch.testing.assert_close(value(combined, embeddings, labels), expected)
    assert_trains(loss_func, value(combined, embeddings, labels), embeddings)


@pytest.mark.parametrize("mined_by", [miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
def test_shared_indices_tuple_is_ignored(mined_by):
    base, loss_func = losses.TripletMarginLoss(), small()
    embeddings, labels = batch()
    indices = mined_by(embeddings, labels)
    combined = losses.MultipleLosses([base, loss_func])
    expected = base(embeddings, labels, indices) + value(loss_func, embeddings, labels)
    torch.testing.assert_close(value(combined, embeddings, labels, indices), expected)


def test_as_embedding_regularizer():
    loss_func = small()
    base = losses.MultiSimilarityLoss()
    regularized = losses.MultiSimilarityLoss(embedding_regularizer=loss_func, embedding_reg_weight=0.5)
    embeddings, labels = batch()
    expected = base(embeddings, labels) + 0.5 * value(loss_func, embeddings)
    torch.testing.assert_close(value(regularized, embeddings, labels), expected)
    assert_trains(loss_func, value(regularized, embeddings, labels), embeddings)
    assert [name for name, _ in regularized.named_parameters()] == ["embedding_regularizer.proxies"]


def test_with_a_weight_regularizer_of_its_own():
    from pytorch_metric_learning.regularizers import LpRegularizer

    embeddings, labels = batch()
    plain = value(small(), embeddings, labels)
    regularized = value(small(embedding_regularizer=LpRegularizer(), embedding_reg_weight=2), embeddings, labels)
    torch.testing.assert_close(regularized - plain, 2 * embeddings.norm(dim=1).mean())


def test_distributed_loss_wrapper_in_one_process():
    loss_func = small()
    embeddings, labels = batch()
    with pytest.warns(UserWarning, match="non-distributed"):
        wrapped = value(DistributedLossWrapper(loss_func), embeddings, labels)
    torch.testing.assert_close(wrapped, value(loss_func, embeddings, labels))


@pytest.mark.parametrize(
    ("reducer", "reduce"),
    [
        (reducers.SumReducer(), lambda x: x.sum()),
        (reducers.AvgNonZeroReducer(), lambda x: x[x > 0].mean()),
        (reducers.ThresholdReducer(low=0.15), lambda x: x[x > 0.15].mean()),
        (reducers.ClassWeightedReducer(torch.arange(6.0)), None),
    ],
)
@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_reducers(reducer, reduce, fixed_shapes, monkeypatch):
    """Every reducer sees the losses of the valid triplets, and their indices into the batch; also on a GPU."""
    if fixed_shapes:
        monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)
    kwargs = {"miner": ReciprocalNeighborMiner(num_neighbors=4, triplets_per_anchor=7)}
    embeddings, labels = batch()
    plain = small(reducer=reducers.DoNothingReducer(), **kwargs)
    info = value(plain, embeddings, labels)
    sample = info["sample_loss"]
    assert sample["reduction_type"] == "triplet"
    per_triplet, (anchors, positives, negatives) = sample["losses"], sample["indices"]
    assert len(per_triplet) == len(anchors) == len(positives) == len(negatives) < B * 7
    assert max(i.max() for i in sample["indices"]) < B
    expected = (per_triplet * labels[anchors]).mean() if reduce is None else reduce(per_triplet)
    loss_func = small(reducer=reducer, **kwargs)
    actual = value(loss_func, embeddings, labels)
    torch.testing.assert_close(actual, expected + info["proxy_loss"]["losses"])
    assert_trains(loss_func, actual, embeddings)


def test_other_miners():
    """Any PML miner of triplets, or of pairs that make triplets, in place of the reciprocal neighbours."""
    embeddings, labels = batch()
    for miner in (
        miners.TripletMarginMiner(margin=5.0, distance=PoincareDistance(c=1.0)),  # may be another than the loss's
        miners.BatchHardMiner(),
        miners.MultiSimilarityMiner(),
    ):
        loss_func = small(miner=miner, reducer=reducers.DoNothingReducer())
        anchors, positives, negatives = value(loss_func, embeddings, labels)["sample_loss"]["indices"]
        assert len(anchors) > 0
        assert (labels[anchors] == labels[positives]).all()
        assert (labels[anchors] != labels[negatives]).all()
    nothing = small(miner=miners.TripletMarginMiner(margin=-100.0))
    loss = value(nothing, embeddings, labels)
    assert_trains(nothing, loss, embeddings)
    with pytest.raises(ValueError, match="labels are None, but the miner TripletMarginMiner needs them"):
        nothing(embeddings)


def spy_on_triplets(monkeypatch):
    """A list that gets the arguments and the result of every call of the functional layer."""
    original, calls = functional.hierarchical_triplet_loss, []

    def spy(distances, triplets, **kwargs):
        result = original(distances, triplets, **kwargs)
        calls.append((distances.detach(), triplets, result))
        return result

    monkeypatch.setattr(functional, "hierarchical_triplet_loss", spy)
    return calls


@pytest.mark.parametrize(
    ("reducer", "keeps_all"),
    [
        (None, True),
        (reducers.AvgNonZeroReducer(), False),
        (reducers.MultipleReducers({"proxy_loss": reducers.AvgNonZeroReducer()}), True),
        (reducers.MultipleReducers({"sample_loss": reducers.AvgNonZeroReducer()}), False),
        (reducers.MultipleReducers({}, default_reducer=reducers.AvgNonZeroReducer()), False),
        (reducers.MultipleReducers({"sample_loss": reducers.MeanReducer()}, reducers.SumReducer()), True),
    ],
)
def test_invalid_triplets_are_kept_on_an_accelerator_where_a_mean_can_leave_them_out(
    reducer, keeps_all, monkeypatch
):
    """Or the host would wait for the device to count them, in every step. Loss and gradient are those of a CPU."""
    loss_func = small(
        miner=ReciprocalNeighborMiner(num_neighbors=4, triplets_per_anchor=7), reducer=reducer
    ).eval()
    embeddings, labels = batch()
    expected = value(loss_func, embeddings, labels)
    gradient = torch.autograd.grad(expected, loss_func.proxies)
    calls = spy_on_triplets(monkeypatch)
    monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)
    actual = value(loss_func, embeddings, labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, loss_func.proxies), gradient, rtol=1e-4, atol=1e-6)
    count = calls[0][1].shape[1]
    assert (count == 7 * (B + P)) == keeps_all
    assert count > 7 * P


def test_a_single_triplet():
    triplet = torch.tensor([[0], [6], [9]])

    class Miner(miners.BaseMiner):
        def mine(self, embeddings, labels, ref_emb, ref_labels):
            return triplet.unbind()

    loss_func = small(miner=Miner(), margin=2.0).eval()
    embeddings, labels = batch()
    distances = PoincareDistance()(embeddings, loss_func.proxies)
    noise = torch.zeros(2, 1, P)
    expected, _ = functional.hierarchical_triplet_loss(distances, triplet, margin=2.0, noise=noise)
    actual = loss_func.compute_loss(embeddings, labels)["sample_loss"]["losses"]
    assert expected > 0
    torch.testing.assert_close(actual, expected)


def test_subclasses_are_not_bypassed():
    class Miner(ReciprocalNeighborMiner):
        def sample(self, distances, labels=None, random=True):
            one = torch.zeros(1, dtype=torch.long)
            return one, one + 1, one + 2, one == 0

    class Sum(reducers.MeanReducer):
        def triplet_reduction(self, losses, *_):
            return losses.sum()

    embeddings, labels = batch()
    info = value(small(miner=Miner(), reducer=reducers.DoNothingReducer()), embeddings, labels)
    assert [index.tolist() for index in info["sample_loss"]["indices"]] == [[0], [1], [2]]
    plain = value(small(reducer=reducers.SumReducer()), embeddings, labels)
    torch.testing.assert_close(value(small(reducer=Sum()), embeddings, labels), plain)


def test_a_miner_with_another_distance_uses_it():
    seen = []

    class Miner(ReciprocalNeighborMiner):
        def sample(self, distances, labels=None, random=True):
            seen.append(distances)
            return super().sample(distances, labels, random)

    embeddings, labels = batch()
    small(miner=Miner(distance=LpDistance()))(embeddings, labels)
    torch.testing.assert_close(seen[0], LpDistance()(embeddings))


def test_numbers_of_numpy_are_numbers():
    distance = PoincareDistance(c=np.float64(0.2))
    assert HIERLoss(num_proxies=np.int64(5), margin=np.float32(0.5), distance=distance)(batch()[0]).isfinite()


def test_a_miner_of_the_proxies():
    """Beside any miner of the embeddings, their triplets have settings of their own."""
    embeddings, labels = batch()
    for miner in (ReciprocalNeighborMiner(num_neighbors=6), miners.BatchHardMiner()):
        counts = {}
        for triplets_per_anchor in (3, 30):
            proxy_miner = ReciprocalNeighborMiner(num_neighbors=6, triplets_per_anchor=triplets_per_anchor)
            loss_func = small(miner=miner, proxy_miner=proxy_miner, collect_stats=True)
            value(loss_func, embeddings, labels)
            samples = small(miner=miner, reducer=reducers.DoNothingReducer())
            own = len(value(samples, embeddings, labels)["sample_loss"]["losses"])
            counts[triplets_per_anchor] = loss_func.num_triplets - own
        assert counts[30] == 10 * counts[3] > 0
    with pytest.raises(TypeError, match=r"proxy_miner must be a ReciprocalNeighborMiner, got BatchHardM"):
        small(proxy_miner=miners.BatchHardMiner())


def test_triplets_of_many_proxies_are_limited():
    """By default, in training; their mean loss is that of all."""
    embeddings, labels = batch(n=30)
    means = []
    for miner, of_proxies in ((None, 10), (ReciprocalNeighborMiner(), 50)):
        loss_func = small(num_proxies=512, proxy_miner=miner, collect_stats=True)
        found = []
        for seed in range(15):
            value(loss_func, embeddings, labels, seed=seed)
            found.append(loss_func.proxy_loss)
        means.append(np.mean(found))
        assert loss_func.num_triplets == pytest.approx(50 * 30 + of_proxies * 512, rel=0.03)  # few are not valid
        loss_func.eval()(embeddings, labels)
        assert loss_func.num_triplets == pytest.approx(50 * 30 + 50 * 512, rel=0.03)
    assert means[0] == pytest.approx(means[1], rel=0.02)


def test_limited_triplets_are_of_all_anchors():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    mined = functional.reciprocal_triplets(torch.cdist(points, points))
    for at_most, most in ((40, 1), (300, 8), (1999, 25), (2000, 50)):
        (anchors, *_), valid = functional.drop_invalid(mined, at_most=at_most)
        counts = anchors[valid].bincount(minlength=40)[mined[3].view(40, 50)[:, 0]]
        assert len(anchors) <= at_most
        assert most - 1 <= counts.min() <= counts.max() == most


# --- sizes and optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        pytest.param(
            lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
            marks=pytest.mark.skipif(torch.__version__ < "2.4", reason="fused on a CPU since torch 2.4"),
        ),
        lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    ],
)
def test_optimizer_built_before_the_first_batch_trains_the_proxies(make):
    loss_func = HIERLoss(num_proxies=P)
    optimizer = make(loss_func.parameters())
    embeddings, labels = batch()
    assert loss_func.embedding_size is None
    loss_func(embeddings, labels).backward()
    assert loss_func.embedding_size == D
    before = loss_func.proxies.detach().clone()
    optimizer.step()
    assert (loss_func.proxies != before).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_proxies_follow_the_first_batch(dtype):
    loss_func = HIERLoss(num_proxies=P)
    loss_func(batch()[0].to(dtype))
    assert loss_func.proxies.shape == (P, D)
    assert loss_func.proxies.dtype == dtype


def run_without_optimizer(loss_func, steps):
    embeddings, labels = batch()
    for _ in range(steps):
        loss_func(embeddings, labels).backward()


def test_forgotten_optimizer_is_reported_once():
    with pytest.warns(UserWarning, match="proxies of HIERLoss") as caught:
        run_without_optimizer(small(), 250)
    assert len(caught) == 1
    assert "torch.optim.Adam([*model.parameters(), *loss_func.parameters()])" in str(caught[0].message)


def test_forgotten_optimizer_is_reported_after_100_steps_also_of_fixed_embeddings():
    """As of a frozen network, whose embeddings have no gradient."""
    loss_func, (embeddings, labels) = small(), batch()

    def run(steps):
        for _ in range(steps):
            loss_func(embeddings.detach(), labels).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(100)
    with pytest.warns(UserWarning, match="proxies of HIERLoss did not change in 100 training steps"):
        run(2)


@pytest.mark.parametrize(
    ("change", "steps"),  # loading and initialization start the count again
    [
        (torch.nn.Module.double, 100),  # proxies are compared with those of another dtype, or of another device
        (lambda loss_func: loss_func.load_state_dict(small().state_dict()), 110),
        (lambda loss_func: loss_func.init_proxies(batch()[0]), 110),
    ],
    ids=["moved", "loaded", "initialized by data"],
)
def test_forgotten_optimizer_is_reported_whatever_else_changed_the_proxies(change, steps):
    loss_func = small()
    loss_func.proxies.data.fill_(0.25)  # without rounding in their sum
    run_without_optimizer(loss_func, 3)
    change(loss_func)
    with pytest.warns(UserWarning, match="proxies of HIERLoss did not change in 100 training steps"):
        run_without_optimizer(loss_func, steps)


@pytest.mark.filterwarnings("error")
def test_no_report_of_frozen_proxies():
    trunk, (inputs, labels) = torch.nn.Linear(D, D), batch()
    loss_func, optimizer = small().requires_grad_(False), torch.optim.SGD(trunk.parameters(), lr=0.01)
    for _ in range(110):
        loss_func(trunk(inputs), labels).backward()
        optimizer.step()


def test_a_model_with_its_own_autograd_function():
    """Its attributes are its own business, also one named as that of torch's gradient accumulators."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.variable = 3
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    embeddings, labels = batch()
    assert_trains(loss_func := small(), loss_func(Same.apply(embeddings), labels), embeddings)


def test_the_report_points_at_the_training_loop():
    with pytest.warns(UserWarning, match="proxies of HIERLoss") as caught:
        run_without_optimizer(small(), 110)
    assert caught[0].filename == __file__
    loss_func = small()
    with pytest.warns(UserWarning, match="no triplets of embeddings") as caught:
        [loss_func(*batch(n=20)) for _ in range(10)]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("sizes", "reported"), [([20] * 10, True), ([20] * 9 + [21, 20], False)])
def test_batches_that_are_too_small_are_reported(sizes, reported):
    """All embeddings of such a batch are neighbours of each other, so there is no negative."""
    loss_func = small(collect_stats=True)
    others = [small().eval(), small(miner=miners.BatchHardMiner())]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in sizes:
            loss_func(*batch(n=size)).backward()
            assert (loss_func.sample_loss > 0) == (size > 20)
            for other in others:
                other(*batch(n=size)).backward()
        if reported:
            loss_func(*batch(n=20))
    assert len(caught) == reported
    if reported:
        assert "their number (20 in the last) was at most num_neighbors=20" in str(caught[0].message)


@pytest.mark.parametrize("few", [{"num_proxies": 20}, {"num_proxies": 30, "proxy_batch_size": 20}])
def test_too_few_proxies_are_reported(few):
    loss_func = small(collect_stats=True, **few)
    with pytest.warns(UserWarning, match=r"no triplets of proxies: .* \(20 in the last\)"):
        [loss_func(*batch()) for _ in range(10)]
    assert loss_func.proxy_loss == 0


def test_forgotten_optimizer_is_reported_inside_a_model_that_clears_gradients():
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(D, D), "loss": small()})
    optimizer = torch.optim.SGD(model["trunk"].parameters(), lr=0.1)
    embeddings, labels = batch()

    def train():
        for _ in range(110):
            model.zero_grad()
            model["loss"](model["trunk"](embeddings), labels).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="proxies of HIERLoss did not change in 100 training steps"):
        train()


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("accumulate", [1, 30])
@pytest.mark.filterwarnings("error")
def test_no_report_when_the_proxies_are_trained(through_data, accumulate):
    loss_func = small()
    embeddings, labels = batch()
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    for step in range(150):
        loss_func(embeddings, labels).backward()
        if step % accumulate == accumulate - 1:
            if through_data:  # as old optimizers do, unseen by autograd
                loss_func.proxies.data.sub_(0.1 * loss_func.proxies.grad)
            else:
                optimizer.step()


@pytest.mark.filterwarnings("error")
def test_no_report_when_gradients_are_accumulated_for_long():
    """Neither the proxies nor the model change meanwhile."""
    loss_func, trunk, (embeddings, labels) = small(), torch.nn.Linear(D, D), batch()
    for _ in range(250):
        loss_func(trunk(embeddings), labels).backward()


@pytest.mark.filterwarnings("error")
def test_no_report_when_gradients_are_only_looked_at():
    loss_func, (embeddings, labels) = small(), batch()
    for _ in range(150):
        torch.autograd.grad(loss_func(embeddings, labels), embeddings)


@pytest.mark.filterwarnings("error")
def test_no_report_without_gradients():
    loss_func = small()
    embeddings, labels = batch()
    loss_func(embeddings, labels).backward()
    with torch.no_grad():
        for _ in range(150):
            loss_func(embeddings, labels)
    loss_func.eval()
    for _ in range(150):
        loss_func(embeddings, labels)


# --- state --------------------------------------------------------------------------------------------------


def saved(loss_func):
    buffer = io.BytesIO()
    torch.save(loss_func.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_dict_may_keep_the_parameter_itself():
    loss_func = small()
    assert loss_func.state_dict(keep_vars=True)["proxies"] is loss_func.proxies
    assert not loss_func.state_dict()["proxies"].requires_grad


@pytest.mark.parametrize(("saved_as", "loaded_as"), [("double", torch.float64), ("half", torch.float32)])
def test_state_dict_changes_the_dtype_to_float64_alone(saved_as, loaded_as):
    source, loss_func = getattr(small(), saved_as)(), HIERLoss(num_proxies=P)
    loss_func.load_state_dict(saved(source))
    assert loss_func.proxies.dtype == loaded_as
    assert torch.equal(loss_func.proxies, source.proxies.to(loaded_as))


@pytest.mark.parametrize("target", [None, D])
def test_state_dict_before_the_first_batch(target):
    state = saved(HIERLoss(num_proxies=P))
    assert state["proxies"].shape == (P, 0)
    loss_func = HIERLoss(num_proxies=P, embedding_size=target)
    assert loss_func.load_state_dict(state) == ([], [])
    assert loss_func.embedding_size == target
    assert value(loss_func, *batch()).isfinite()


@pytest.mark.parametrize("target", [None, D, 5])
def test_state_dict_of_another_size(target):
    state = saved(small(num_proxies=P + 1))
    expected = rf"size mismatch for proxies: .*\({P + 1}, {D}\), expected \({P}, {target or 'embedding_size'}\)"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=expected):
            HIERLoss(num_proxies=P, embedding_size=target).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(clone, sized):
    loss_func = HIERLoss(num_proxies=P, embedding_size=D if sized else None)
    other = clone(loss_func)
    embeddings, labels = batch()
    if sized:
        torch.testing.assert_close(value(other, embeddings, labels), value(loss_func, embeddings, labels))
    value(other, embeddings, labels).backward()
    assert loss_func.embedding_size == (D if sized else None)
    assert other.proxies.grad is not None


@pytest.mark.parametrize("sized", [False, True])
def test_half(sized):
    loss_func = HIERLoss(num_proxies=P, embedding_size=D if sized else None).half()
    embeddings, labels = batch()
    half = embeddings.detach().half().requires_grad_()
    loss = value(loss_func, half, labels)
    assert loss_func.proxies.dtype == torch.float16
    assert_trains(loss_func, loss, half)


def test_proxies_on_another_device_are_refused():
    with pytest.raises(ValueError, match=r"embeddings are on cpu, but the proxies .* on meta"):
        small().to("meta")(*batch())


def test_the_meta_device_needs_a_size():
    with torch.device("meta"):
        made_there = HIERLoss(num_proxies=P)
    for loss_func, device in ((HIERLoss(P), "meta"), (HIERLoss(P).to("meta"), "cpu"), (made_there, "cpu")):
        with pytest.raises(RuntimeError, match="HIERLoss cannot get a size on the meta device; give"):
            loss_func(batch()[0].to(device))
    assert small().to("meta").embedding_size == D


def test_frozen_before_the_first_batch():
    model = torch.nn.ModuleDict({"loss": HIERLoss(num_proxies=P)}).requires_grad_(False)
    embeddings, labels = batch()
    model["loss"](embeddings, labels).backward()
    assert not model["loss"].proxies.requires_grad
    assert embeddings.grad.abs().sum() > 0
    assert model.requires_grad_(True)["loss"].proxies.requires_grad


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch can tell since 2.7")
def test_export_is_refused():
    with pytest.raises(RuntimeError, match="HIERLoss cannot be exported"):
        torch.export.export(small(), (batch()[0].detach(),), strict=False)


@pytest.mark.parametrize("proxy_batch_size", [None, 10])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_the_default_device_does_not_matter(sized, training, proxy_batch_size):
    """All that is made on the way is made where the embeddings are."""
    loss_func = HIERLoss(P, D if sized else None, proxy_batch_size=proxy_batch_size).train(training)
    restored = HIERLoss(P, D if sized else None)
    embeddings, labels = batch()
    with torch.device("meta"):
        loss = loss_func(embeddings, labels)
        restored.load_state_dict(loss_func.state_dict())
        loss.backward()
    assert torch.equal(restored.proxies, loss_func.proxies)
    assert loss.isfinite()
    assert loss_func.proxies.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype(dtype):
    """Low precision embeddings lose what their digits lose, and nothing in the loss."""
    embeddings, labels = batch()
    low = embeddings.detach().to(dtype).requires_grad_()
    loss_func = small()
    loss = value(loss_func, low, labels)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    if dtype != torch.float64:  # which draws other random numbers
        torch.testing.assert_close(loss.float(), value(loss_func, low.detach().float(), labels), rtol=1e-2, atol=0)
    assert_trains(loss_func, loss, low)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    embeddings, labels = batch()
    loss_func = small()
    expected = value(loss_func, embeddings, labels)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(value(loss_func, embeddings, labels), expected)


def test_autocast_does_not_reach_other_miners():
    """A matrix product in bfloat16 would mine other triplets."""
    embeddings, labels = batch()
    miner = miners.TripletMarginMiner(margin=0.2, distance=CosineSimilarity())
    loss_func = small(miner=miner, reducer=reducers.DoNothingReducer())
    expected = miner(embeddings.detach(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(miner(embeddings.detach(), labels)[0]) != len(expected[0])
        actual = value(loss_func, embeddings, labels)["sample_loss"]["indices"]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# --- curvature ----------------------------------------------------------------------------------------------


def test_learned_curvature_has_a_gradient():
    loss_func = small(distance=PoincareDistance(c=geoopt.PoincareBall(c=0.3, learnable=True)))
    value(loss_func, *batch()).backward()
    assert dict(loss_func.named_parameters())["distance.curvature.isp_c"].grad.abs() > 0


@pytest.mark.filterwarnings("error")
def test_learned_curvature_warns_of_nothing():
    """torch warns, once per process unless told otherwise, of a number made from a tensor with gradient."""
    torch.set_warn_always(True)
    try:
        distance = PoincareDistance(c=geoopt.PoincareBall(c=0.3, learnable=True), clip_radius=None)
        loss_func = small(distance=distance)
        loss_func(*batch()).backward()
        assert "c=0.3" in repr(loss_func)
    finally:
        torch.set_warn_always(False)


def test_two_losses_with_different_curvature():
    embeddings, labels = batch()
    flat, curved = (small(distance=PoincareDistance(c=c)) for c in (0.01, 1.0))
    alone = [value(loss_func, embeddings, labels) for loss_func in (flat, curved)]
    both = losses.MultipleLosses([flat, curved])
    both(embeddings, labels)
    assert abs(alone[0] - alone[1]) > 1e-3
    assert [value(loss_func, embeddings, labels) for loss_func in (flat, curved)] == alone


def test_points_already_on_the_ball():
    """With normalize_embeddings=False a ToPoincare layer before the loss gives the same loss."""
    embeddings, labels = batch()
    head = ToPoincare(c=0.3, clip_radius=1.5)
    raw = small(distance=PoincareDistance(c=0.3, clip_radius=1.5))
    on_ball = small(distance=PoincareDistance(c=0.3, clip_radius=1.5, normalize_embeddings=False))
    expected = value(raw, embeddings, labels)
    torch.testing.assert_close(value(on_ball, head(embeddings), labels), expected, rtol=1e-4, atol=0)


# --- statistics ---------------------------------------------------------------------------------------------


def test_stats():
    loss_func = small(collect_stats=True)
    info = value(small(reducer=reducers.DoNothingReducer()), *batch())
    value(loss_func, *batch())
    assert loss_func.sample_loss == pytest.approx(float(info["sample_loss"]["losses"].mean()))
    assert loss_func.proxy_loss == pytest.approx(float(info["proxy_loss"]["losses"]))
    assert set(loss_func._record_these_stats) == {
        "sample_loss",
        "proxy_loss",
        "num_triplets",
        "fraction_active",
        "num_ancestors",
        "fraction_clipped",
        "unscaled_gradient_ratio",
    }
    assert not hasattr(small(), "num_triplets")


@pytest.mark.parametrize(
    ("miner", "invalid"),
    [(None, 0), (miners.TripletMarginMiner(), 0), (miners.TripletMarginMiner(margin=-100.0), 1)],
)
def test_stats_of_the_triplets(miner, invalid, monkeypatch):
    """The last miner finds none, in whose place a triplet is that is not valid."""
    calls = spy_on_triplets(monkeypatch)
    loss_func = small(collect_stats=True, miner=miner)
    value(loss_func, *batch())
    _, _, (per_triplet, ancestors) = calls[0]
    per_triplet, ancestors = per_triplet[invalid:], ancestors[:, invalid:]
    assert loss_func.num_triplets == len(per_triplet)
    assert loss_func.fraction_active == pytest.approx((per_triplet > 0).double().mean().item())
    assert loss_func.num_ancestors == len(ancestors.unique())
    assert (per_triplet > 1).sum() != (per_triplet > 0).sum()


def test_stats_of_a_batch_without_triplets():
    loss_func = small(num_proxies=2, collect_stats=True)
    value(loss_func, *batch(n=3))
    assert (loss_func.num_triplets, loss_func.fraction_active, loss_func.num_ancestors) == (0, 0, 0)


def test_fraction_clipped_is_of_norms_from_the_radius_on():
    embeddings = torch.zeros(B, D)
    embeddings[:, 0] = 2.0
    embeddings[:3, 0] = 1.9
    for on_ball, expected in ((False, (B - 3) / B), (True, 0)):  # points of the ball are not clipped
        distance = PoincareDistance(clip_radius=2.0, normalize_embeddings=not on_ball)
        loss_func = small(distance=distance, collect_stats=True)
        value(loss_func, embeddings)
        assert loss_func.fraction_clipped == expected


# --- awkward batches and bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("embeddings", "labels"),
    [
        (torch.randn(1, D), torch.zeros(1, dtype=torch.long)),
        (torch.randn(2, D), torch.tensor([0, 1])),
        (torch.randn(5, D), torch.arange(5)),  # fewer than num_neighbors
        (torch.randn(B, D), torch.zeros(B, dtype=torch.long)),  # one class
        (torch.randn(B, D), None),
        (torch.zeros(B, D), torch.arange(B) % 4),
        (torch.ones(B, D), torch.arange(B) % 4),
        (torch.ones(B, D) * 1e30, torch.arange(B) % 4),
        (torch.full((B, D), 1e-30), None),
    ],
)
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("reducer", [None, reducers.AvgNonZeroReducer()])
def test_awkward_batches_are_finite(embeddings, labels, fixed_shapes, reducer, monkeypatch):
    if fixed_shapes:
        monkeypatch.setattr(functional, "shapes_may_depend_on_values", lambda _: False)
    loss_func = small(reducer=reducer)
    embeddings = embeddings.clone().requires_grad_()
    loss = value(loss_func, embeddings, labels)
    assert_trains(loss_func, loss, embeddings)


def test_nothing_reciprocal_keeps_every_proxy_in_the_graph():
    """A zero loss must still have a gradient for every parameter, or DDP waits for it."""
    loss_func = small(num_proxies=2)
    embeddings, labels = batch(n=3)
    loss = loss_func(embeddings, labels)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(loss_func.proxies.grad, torch.zeros(2, D))
    assert torch.equal(embeddings.grad, torch.zeros(3, D))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["embeddings", "proxies"])
def test_non_finite_input_gives_a_non_finite_loss(bad, where):
    loss_func = small()
    embeddings, labels = batch()
    with torch.no_grad():
        (embeddings if where == "embeddings" else loss_func.proxies)[3, 2] = bad
    loss = value(loss_func, embeddings, labels)
    loss.backward()
    assert loss.isnan()
    assert not loss_func.proxies.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f, e, y: f(e[0], y[:1]),
            r"embeddings must have shape \(batch_size, embedding_size\), got shape \(8,\)",
        ),
        (lambda f, e, y: f(e[None], y[:1]), r"embeddings must have shape .* got shape \(1, 32, 8\)"),
        (lambda f, e, y: f(e[:, :5], y), r"embeddings must have 8 columns, .* got shape \(32, 5\)"),
        (lambda f, e, y: f(e.detach().long(), y), r"embeddings must be floating point, got torch.int64"),
        (lambda f, e, y: f(e[:, :0], y), r"embeddings must have at least one column, got shape \(32, 0\)"),
        (lambda f, e, y: f([1.0], y), r"embeddings must be a torch.Tensor, got list"),
        (lambda f, e, y: f(e[:0], y[:0]), r"embeddings must have at least one row, got shape \(0, 8\)"),
        (lambda f, e, y: f(e, y[:-1]), r"labels must have shape \(32,\), .* got shape \(31,\)"),
        (lambda f, e, y: f(e, y[:, None]), r"labels must have shape \(32,\), .* got shape \(32, 1\)"),
        (lambda f, e, y: f(e, [0] * 32), r"labels must be a torch.Tensor, got list"),
        (lambda f, e, y: f(e, y, ref_emb=e), r"ref_emb and ref_labels are not supported"),
        (lambda f, e, y: f(e, y, ref_labels=y), r"ref_emb and ref_labels are not supported"),
    ],
)
def test_bad_input(call, message):
    loss_func = small()
    embeddings, labels = batch()
    before = loss_func.proxies.detach().clone()
    with pytest.raises((TypeError, ValueError), match=message):
        call(loss_func, embeddings, labels)
    assert torch.equal(loss_func.proxies, before)
    lazy = HIERLoss(num_proxies=P)
    if "must have 8 columns" not in message:
        with pytest.raises((TypeError, ValueError)):
            call(lazy, embeddings, labels)
        assert lazy.embedding_size is None  # bad input must not decide the size


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_proxies": 1}, "num_proxies must be at least 2, got 1"),
        ({"num_proxies": 2.5}, "num_proxies must be a whole number, got 2.5 of type float"),
        ({"embedding_size": -1}, "embedding_size must be at least 1, got -1"),
        ({"margin": -0.1}, "margin must be a finite non-negative number, got -0.1"),
        ({"temperature": 1e-38}, "temperature must be at least 1e-30, got 1e-38"),
        ({"temperature": 0}, "temperature must be a finite positive number, got 0"),
        ({"temperature": math.inf}, "temperature must be a finite positive number, got inf"),
        ({"proxy_batch_size": 1}, "proxy_batch_size must be at least 2, got 1"),
        ({"distance": "poincare"}, "distance must be a hierloss.PoincareDistance, got str"),
        ({"distance": CosineSimilarity()}, "distance must be a hierloss.PoincareDistance, got CosineSimilarity"),
        ({"miner": "hard"}, "miner must be a miner of pytorch_metric_learning, got str"),
        ({"miner": losses.TripletMarginLoss()}, "miner must be a miner .* got TripletMarginLoss"),
        (
            {"distance": PoincareDistance(c=1.0), "miner": ReciprocalNeighborMiner(num_neighbors=5)},
            r"distances of miner and loss must agree, got PoincareDistance\(c=0.1.* and PoincareDistance\(c=1,",
        ),
        (
            {"miner": ReciprocalNeighborMiner(num_neighbors=5, distance=type("Other", (PoincareDistance,), {})())},
            r"distances of miner and loss must agree, got Other\(c=0.1.* and PoincareDistance\(c=0.1,",
        ),
        ({"distance": PoincareDistance(power=2)}, "the power of the distance must be 1 for HIERLoss, got 2"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        HIERLoss(**kwargs)


def test_defaults_are_the_papers_and_on_record():
    """PML's record-keeper asks for what is in the list."""
    loss_func = HIERLoss(embedding_size=D)
    assert loss_func.proxies.shape == (512, D)
    assert (loss_func.num_proxies, loss_func.margin, loss_func.temperature) == (512, 0.1, 0.1)
    assert loss_func.gradient_ratio == 0.1
    assert {"num_proxies", "margin", "temperature", "gradient_ratio"} <= set(loss_func._record_these)
    assert loss_func.sub_loss_names() == ["sample_loss", "proxy_loss"]


def test_repr_shows_the_settings():
    text = repr(HIERLoss(num_proxies=P))
    assert "num_proxies=24, embedding_size=None, margin=0.1, temperature=0.1, gradient_ratio=0.1" in text
    assert "PoincareDistance(c=0.1, clip_radius=2.3)" in text
    assert "ReciprocalNeighborMiner" in text


# --- many proxies -------------------------------------------------------------------------------------------


def test_proxy_batch_draws_triplets_among_some_of_the_proxies(monkeypatch):
    """The triplets of a step are among proxy_batch_size proxies, other ones each time; ancestors are any."""
    calls = spy_on_triplets(monkeypatch)
    loss_func = small(proxy_batch_size=10)
    embeddings, labels = batch()
    whole = poincare.pairwise_distance(*(loss_func.distance.normalize(loss_func.proxies),) * 2, 0.1).float()
    chosen = set()
    for seed in range(30):
        value(loss_func, embeddings, labels, seed=seed)
        rows = calls[-1][0][B:]
        assert rows.shape == (10, P)
        own = [int((whole - row).abs().sum(1).argmin()) for row in rows]
        torch.testing.assert_close(rows, whole[own])
        chosen |= {tuple(sorted(own))}
    assert len(chosen) == 30
    assert len(torch.cat([result.ancestors.unique() for *_, result in calls]).unique()) == P


def test_proxy_batch_of_all_is_the_whole_loss():
    whole, batch_of_all = (value(small(proxy_batch_size=size), *batch()) for size in (None, P))
    assert torch.equal(batch_of_all, whole)


@pytest.mark.parametrize(("options", "rows"), [({}, 512), ({"proxy_batch_size": None}, 520)])
def test_triplets_are_among_512_proxies_by_default(options, rows, monkeypatch):
    calls = spy_on_triplets(monkeypatch)
    value(HIERLoss(520, D, gradient_ratio=None, **options), *batch(), seed=0)
    assert calls[-1][0][B:].shape == (rows, 520)
