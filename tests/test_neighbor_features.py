"""Neighbours among other features than the embeddings: whose, for how long, and what is refused."""

import copy
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance

from hierloss import HIERLoss, ReciprocalNeighborMiner, functional

B, D, P = 30, 8, 16


def make_hier(**kwargs):
    """In eval mode, where nothing is drawn and values can be compared."""
    torch.manual_seed(0)
    return HIERLoss(P, D, **{"miner": ReciprocalNeighborMiner(num_neighbors=6)} | kwargs).eval()


@pytest.fixture
def embeddings():
    return torch.randn(B, D, requires_grad=True)


@pytest.fixture
def features():
    return torch.randn(B, 5)


def test_the_loss_is_that_of_triplets_mined_among_the_features(embeddings, features):
    hier = make_hier()
    total, of_proxies = 0, hier.distance(hier.proxies)
    for distances, to_proxies in (
        (torch.cdist(features.double(), features.double()), hier.proxy_distances(embeddings)),
        (of_proxies.detach(), of_proxies),
    ):
        *triplets, valid = functional.reciprocal_triplets(distances, num_neighbors=6, random=False)
        triplets = torch.stack(triplets)[:, valid]
        noise = torch.zeros(()).expand(2, triplets.shape[1], P)
        total = total + functional.hierarchical_triplet_loss(to_proxies, triplets, noise=noise).losses.mean()
    actual = hier(embeddings, neighbor_features=features)
    torch.testing.assert_close(actual, total)
    assert not torch.isclose(actual, hier(embeddings))
    with hier.neighbors_from(features):
        assert torch.equal(hier(embeddings), actual)


def test_labels_count_as_before(embeddings, features):
    """They come first in the similarity, whatever the features are."""
    hier, labels = make_hier(), torch.arange(B) // 6
    with_labels = hier(embeddings, labels, neighbor_features=features)
    expected = hier(embeddings, labels, neighbor_features=torch.zeros(B, 1) + labels[:, None])
    assert not torch.isclose(with_labels, hier(embeddings, neighbor_features=features))
    torch.testing.assert_close(with_labels, expected)


def test_features_far_from_the_origin(embeddings):
    """Where distances from inner products lose their digits unless the features are centred."""
    features = torch.rand(B, 5)
    hier = make_hier()
    expected = hier(embeddings, neighbor_features=features.double())
    shifted = features.double() + 1e8
    torch.testing.assert_close(hier(embeddings, neighbor_features=shifted), expected)


def test_in_multiple_losses_and_until_the_block_ends(embeddings, features):
    hier, labels = make_hier(), torch.arange(B) % 10  # 3 of a class, fewer than neighbours
    both = losses.MultipleLosses([losses.SupConLoss(), hier])
    without = both(embeddings, labels)
    with hier.neighbors_from(features):
        inside = [both(embeddings, labels) for _ in range(2)]
    assert torch.equal(*inside)
    assert not torch.isclose(inside[0], without)
    assert torch.equal(both(embeddings, labels), without)
    with pytest.raises(KeyError), hier.neighbors_from(features):
        raise KeyError
    assert torch.equal(both(embeddings, labels), without)


def test_a_block_without_a_call_is_reported(embeddings, features):
    hier = make_hier()
    message = "ended without a call of its HIERLoss that used its features"
    with pytest.warns(UserWarning, match=message) as caught, hier.neighbors_from(features):
        hier(embeddings, neighbor_features=features)  # has features of its own
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hier.neighbors_from(features):
            hier(embeddings)
        with pytest.raises(KeyError), hier.neighbors_from(features):
            raise KeyError


def test_nested_blocks_and_two_losses(embeddings, features):
    first, second, other = make_hier(), make_hier(), torch.randn(B, 3)
    plain = first(embeddings)
    of_features, of_other = (first(embeddings, neighbor_features=f) for f in (features, other))
    with first.neighbors_from(features):
        assert torch.equal(second(embeddings), plain)
        with first.neighbors_from(other), second.neighbors_from(features):
            assert torch.equal(first(embeddings), of_other)
            assert torch.equal(second(embeddings), of_features)
            assert torch.equal(first(embeddings, neighbor_features=features), of_features)
        assert torch.equal(first(embeddings), of_features)
        assert torch.equal(second(embeddings), plain)
    assert torch.equal(first(embeddings), plain)


def test_a_copy_made_in_a_block_has_no_features(embeddings, features):
    """They would stay in a saved or an averaged model."""
    hier = make_hier()
    expected = hier(embeddings)
    with hier.neighbors_from(features):
        copies = copy.deepcopy(hier), pickle.loads(pickle.dumps(hier))
        hier(embeddings)
    for other in copies:
        assert torch.equal(other(embeddings), expected)


def test_each_thread_has_its_own(embeddings):
    hier, barrier = make_hier(), threading.Barrier(3, timeout=60)
    of_threads = torch.randn(2, B, 4)

    def work(features):
        with hier.neighbors_from(features):
            barrier.wait()
            found = hier(embeddings)
            barrier.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        results = pool.map(work, of_threads)
        barrier.wait()
        of_main_thread = hier(embeddings)
        barrier.wait()
    assert torch.equal(of_main_thread, hier(embeddings))
    for found, features in zip(results, of_threads, strict=True):
        assert torch.equal(found, hier(embeddings, neighbor_features=features))


@pytest.mark.parametrize("miner", [ReciprocalNeighborMiner(6, distance=LpDistance()), miners.BatchHardMiner()])
def test_other_miners_mine_among_the_features_too(miner, embeddings, features):
    hier, labels = make_hier(miner=miner), torch.arange(B) % 10
    with_features = hier(embeddings, labels, neighbor_features=features)
    assert with_features.isfinite()
    assert not torch.isclose(with_features, hier(embeddings, labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_gradient_flows_to_features_of_any_dtype(dtype, embeddings, features):
    features = features.to(dtype).requires_grad_()
    make_hier()(embeddings, neighbor_features=features).backward()
    assert embeddings.grad.abs().sum() > 0
    assert features.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_give_a_loss_that_is_not(bad, embeddings, features):
    features[3, 2] = bad
    assert make_hier()(embeddings, neighbor_features=features).isnan()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(B - 1, 5), r"neighbor_features must have shape \(30, F\), .* got shape \(29, 5\); gather"),
        (torch.zeros(B), r"features must have shape .* got shape \(30,\)"),
        (torch.zeros(B, 5, dtype=torch.long), "features must be floating point, got torch.int64"),
        ([[1.0]] * B, r"features must be a torch.Tensor, got list"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, message, embeddings):
    hier = HIERLoss(P)
    with pytest.raises((TypeError, ValueError), match=message):
        hier(embeddings, neighbor_features=features)
    with pytest.raises((TypeError, ValueError), match=message), hier.neighbors_from(features):
        hier(embeddings)
    assert hier.embedding_size is None
    assert hier(embeddings).isfinite()
