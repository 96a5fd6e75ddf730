"""ReciprocalNeighborMiner as a PML miner."""

import pytest
import reference
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.distributed import DistributedMinerWrapper

from hierloss import PoincareDistance, ReciprocalNeighborMiner


@pytest.fixture
def batch():
    return torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 5


@pytest.mark.parametrize("distance", [None, PoincareDistance(c=1.0), LpDistance()])
def test_triplets_are_those_of_the_definition(distance, batch):
    embeddings, labels = batch
    miner = ReciprocalNeighborMiner(num_neighbors=6, triplets_per_anchor=200, distance=distance)
    anchors, positives, negatives = miner(embeddings, labels)
    distances = (distance or PoincareDistance())(embeddings).double()
    related = reference.reciprocal_neighbors(distances, labels.tolist(), 6)
    with_triplets = [i for i in range(24) if len(related[i]) >= 2]
    assert anchors.bincount(minlength=24).tolist() == [200 * (i in with_triplets) for i in range(24)]
    for i in with_triplets:
        assert set(positives[anchors == i].tolist()) == related[i]
        assert set(negatives[anchors == i].tolist()) == set(range(24)) - related[i] - {i}


def test_in_a_loss_and_in_multiple_losses(batch):
    embeddings, labels = batch
    miner = ReciprocalNeighborMiner(num_neighbors=6, triplets_per_anchor=5)
    base = losses.TripletMarginLoss()
    torch.manual_seed(0)
    expected = base(embeddings, labels, miner(embeddings, labels))
    torch.manual_seed(0)
    combined = losses.MultipleLosses([base], miners=[miner])
    assert torch.equal(combined(embeddings, labels), expected)
    assert isinstance(DistributedMinerWrapper(miner).miner, miners.BaseMiner)


def test_no_gradient_and_statistics(batch):
    embeddings, labels = batch
    miner = ReciprocalNeighborMiner(num_neighbors=6, triplets_per_anchor=5, collect_stats=True)
    mined = miner(embeddings.requires_grad_(), labels)
    assert not any(t.requires_grad for t in mined)
    assert miner.num_triplets == len(mined[0]) > 0


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_small_batches(n):
    """All are neighbours of all, so that there is nothing to be told apart: no triplets."""
    mined = ReciprocalNeighborMiner()(torch.randn(n, 4), torch.arange(n))
    assert [len(t) for t in mined] == [0, 0, 0]


def test_bad_arguments(batch):
    with pytest.raises(ValueError, match="num_neighbors must be at least 3, got 2"):
        ReciprocalNeighborMiner(num_neighbors=2)
    with pytest.raises(TypeError, match=r"triplets_per_anchor must be a whole number, got 2.0 of type float"):
        ReciprocalNeighborMiner(triplets_per_anchor=2.0)
    with pytest.raises(
        ValueError, match="distance must grow with dissimilarity, got the inverted CosineSimilarity"
    ):
        ReciprocalNeighborMiner(distance=CosineSimilarity())
    embeddings, labels = batch
    with pytest.raises(ValueError, match=r"ref_emb is not supported .* got ref_emb of shape \(24, 6\)"):
        ReciprocalNeighborMiner()(embeddings, labels, embeddings.clone(), labels)


def test_defaults_are_the_papers_and_on_record(batch):
    """PML's record-keeper asks for what is in these lists."""
    miner = ReciprocalNeighborMiner()
    assert (miner.num_neighbors, miner.triplets_per_anchor) == (20, 50)
    assert {"num_neighbors", "triplets_per_anchor"} <= set(miner._record_these)
    assert not hasattr(miner, "_record_these_stats")
    distances = miner.distance(batch[0])
    drawn = [torch.stack(miner.sample(distances)[:3]) for _ in range(2)]
    assert not torch.equal(*drawn)  # random, unless told otherwise
    even = [torch.stack(miner.sample(distances, random=False)[:3]) for _ in range(2)]
    assert torch.equal(*even)
