"""What must hold for all input: axioms of a metric, symmetries of the ball, the order of a batch."""

import math
import os

import geoopt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner, functional, poincare

# The same examples each time in CI; elsewhere others, and a failure is printed with the line that repeats it.
several = settings(max_examples=40, deadline=None, derandomize="CI" in os.environ, database=None, print_blob=True)

SEEDS = st.integers(0, 2**32 - 1)
CURVATURES = st.floats(-6, 3).map(lambda exponent: 10**exponent)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def points(draw, count, farthest=0.999, least=0.0):
    """A curvature and sets of points on its ball: at drawn radii, in random directions; in float64."""
    c, dim, n = draw(CURVATURES), draw(st.integers(1, 8)), draw(st.integers(1, 6))
    radii = st.lists(st.just(0.0) | st.floats(least, farthest), min_size=n, max_size=n)
    sets = []
    for _ in range(count):
        v = torch.randn(n, dim, dtype=torch.float64, generator=generator(draw(SEEDS)))
        radius = torch.tensor(draw(radii), dtype=torch.float64).unsqueeze(1)
        sets.append(v / v.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius / math.sqrt(c))
    return c, *sets


def geoopt_ball(c):
    """A ball, and its curvature: geoopt's softplus rounds a small c in the tenth digit."""
    assume(c <= 100)  # beyond 700, that softplus makes it infinite
    ball = geoopt.PoincareBall(c=torch.tensor(c, dtype=torch.float64))
    return ball, ball.c.item()


# --- the distance -------------------------------------------------------------------------------------------


def check_axioms(d, x, y, z, c):
    xy, yz, xz = d(x, y), d(y, z), d(x, z)
    assert torch.equal(d(x, x.clone()), torch.zeros_like(xy))
    assert (xy[(x - y).norm(dim=1) > 1e-6 * c**-0.5] > 0).all()
    torch.testing.assert_close(d(y, x), xy, rtol=1e-13, atol=0)
    assert (xz <= (xy + yz) * (1 + 1e-12)).all()


@several
@given(points(3))
def test_axioms_of_a_metric(case):
    c, x, y, z = case
    check_axioms(lambda a, b: poincare.distance(a, b, c), x, y, z, c)


@several
@given(points(3, least=1e-3), st.sampled_from([1.0, 1e-6, 1e-100]))
def test_axioms_of_a_metric_in_a_matrix(case, scale):
    """Norms differ by up to a thousand: points much closer than the largest coordinate count as equal."""
    c, *sets = case
    sets = [points * scale for points in sets]
    check_axioms(lambda a, b: poincare.pairwise_distance(a, b, c).diagonal(), *sets, c)
    check_axioms(lambda a, b: PoincareDistance(c, normalize_embeddings=False)(a, b).diagonal(), *sets, c)


@several
@given(points(2), SEEDS)
def test_rotations_and_reflections_keep_distances(case, seed):
    c, x, y = case
    dim = x.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator(seed)))
    for function in (poincare.distance, poincare.pairwise_distance):
        torch.testing.assert_close(
            function(x @ rotation, y @ rotation, c), function(x, y, c), rtol=1e-9, atol=1e-11 * c**-0.5
        )


@several
@given(points(3, farthest=0.9))
def test_moebius_translations_keep_distances(case):
    """They are the translations of hyperbolic space: all of it looks the same from everywhere."""
    c, x, y, offset = case
    ball, c = geoopt_ball(c)
    moved = [ball.mobius_add(offset[:1], t, project=False) for t in (x, y)]
    torch.testing.assert_close(
        poincare.distance(*moved, c), poincare.distance(x, y, c), rtol=1e-9, atol=1e-11 * c**-0.5
    )
    # Points count as equal if they are closer than 1e-10 of the coordinates; near the boundary, that is 2e-8.
    actual, expected = poincare.pairwise_distance(*moved, c), poincare.pairwise_distance(x, y, c)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=2e-8 * c**-0.5)


@several
@given(points(2))
def test_curvature_is_a_choice_of_unit(case):
    """d_c(x, y) = d_1(sqrt(c) x, sqrt(c) y) / sqrt(c)."""
    c, x, y = case
    root = math.sqrt(c)
    for function in (poincare.distance, poincare.pairwise_distance):
        torch.testing.assert_close(
            function(x, y, c), function(root * x, root * y, 1.0) / root, rtol=1e-11, atol=1e-13 / root
        )


@several
@given(points(2), st.integers(4, 12))
def test_small_curvature_is_flat_space(case, digits):
    """2|x - y|, off by at most the order of c |x|^2."""
    c, x, y = case
    x, y, flat = x * math.sqrt(c), y * math.sqrt(c), 10.0**-digits  # of norm below 1
    distance = poincare.distance(x, y, flat)
    torch.testing.assert_close(distance, 2 * (x - y).norm(dim=1), rtol=2 * flat, atol=1e-15)
    torch.testing.assert_close(poincare.pairwise_distance(x, y, flat).diagonal(), distance, rtol=1e-9, atol=1e-9)


@several
@given(points(2, farthest=0.9))
def test_agrees_with_geoopt(case):
    """As far as geoopt goes: Möbius addition loses near pairs."""
    c, x, y = case
    ball, c = geoopt_ball(c)
    expected, atol = ball.dist(x, y), 1e-7 * c**-0.5
    torch.testing.assert_close(poincare.distance(x, y, c), expected, rtol=1e-8, atol=atol)
    torch.testing.assert_close(poincare.pairwise_distance(x, y, c).diagonal(), expected, rtol=1e-8, atol=atol)
    v = x * 3
    torch.testing.assert_close(poincare.exp_map0(v, c), ball.expmap0(v, project=False), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(poincare.log_map0(x, c), ball.logmap0(x), rtol=1e-8, atol=1e-12 * c**-0.5)


@several
@given(SEEDS, st.floats(-6, 1), st.floats(-3, 2), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_features_are_at_most_four_clip_radii_apart(seed, log_c, scale, dtype):
    c = 10**log_c
    v = (torch.randn(8, 5, dtype=torch.float64, generator=generator(seed)) * 10**scale).to(dtype)
    mat = PoincareDistance(c)(v)
    assert torch.equal(mat.diagonal(), torch.zeros(8, dtype=mat.dtype))
    torch.testing.assert_close(mat, mat.T, rtol=1e-6, atol=0)
    assert ((mat >= 0) & (mat <= 4 * 2.3 * (1 + 1e-6))).all()
    lengths = v.double().norm(dim=1).clamp_max(2.3)
    origin = PoincareDistance(c)(v, torch.zeros_like(v[:1])).squeeze(1).double()
    torch.testing.assert_close(origin, 2 * lengths, rtol=1e-6, atol=0)


# --- order does not matter ----------------------------------------------------------------------------------


@st.composite
def batches(draw):
    """Embeddings without ties, labels or none, and another order of them."""
    n, seed = draw(st.integers(3, 14)), draw(SEEDS)
    v = torch.randn(n, 4, dtype=torch.float64, generator=generator(seed)) * draw(st.floats(0.1, 3))
    labels = (
        torch.randint(draw(st.integers(1, 5)), (n,), generator=generator(seed + 1))
        if draw(st.booleans())
        else None
    )
    return v, labels, torch.randperm(n, generator=generator(seed + 2))


def relation(embeddings, labels, num_neighbors, order):
    """Pairs (anchor, positive) and (anchor, negative) that can be drawn, by the rows' names in ``order``."""
    anchors, positives, negatives, valid = functional.reciprocal_triplets(
        PoincareDistance()(embeddings), labels, num_neighbors=num_neighbors, triplets_per_anchor=60, random=False
    )
    names = [[int(order[i]) for i in t[valid]] for t in (anchors, positives, negatives)]
    return set(zip(names[0], names[1], strict=True)), set(zip(names[0], names[2], strict=True))


@several
@given(batches(), st.integers(3, 8))
def test_who_is_related_depends_on_neither_order_nor_names(batch, num_neighbors):
    v, labels, order = batch
    unchanged = torch.arange(len(v))
    expected = relation(v, labels, num_neighbors, unchanged)
    assert relation(v[order], None if labels is None else labels[order], num_neighbors, order) == expected
    if labels is not None:
        renamed = torch.tensor([70, -3, 2**40, 0, 5])[labels]
        assert relation(v, renamed, num_neighbors, unchanged) == expected


@several
@given(batches(), SEEDS)
def test_losses_follow_their_triplets_points_and_proxies(batch, seed):
    """With the noise given, every order gives the same losses and gradients, in that order."""
    v, _, order = batch
    gen = generator(seed)
    proxies = torch.randn(6, 4, dtype=torch.float64, generator=gen)
    distances = PoincareDistance()(v, proxies)
    triplets = torch.randint(len(v), (3, 20), generator=gen)
    noise = -torch.log(-torch.log(torch.rand(2, 20, 6, dtype=torch.float64, generator=gen).clamp(1e-9)))

    def run(distances, triplets, noise):
        distances = distances.detach().requires_grad_()
        losses, ancestors = functional.hierarchical_triplet_loss(distances, triplets, noise=noise)
        return losses.detach(), ancestors, *torch.autograd.grad(losses.sum(), distances)

    losses, ancestors, grad = run(distances, triplets, noise)
    assert (losses >= 0).all()
    shuffled = torch.randperm(20, generator=gen)
    other = run(distances, triplets[:, shuffled], noise[:, shuffled])
    torch.testing.assert_close(other, (losses[shuffled], ancestors[:, shuffled], grad))
    other = run(distances[order], order.argsort()[triplets], noise)
    torch.testing.assert_close(other, (losses, ancestors, grad[order]))
    columns = torch.randperm(6, generator=gen)
    other = run(distances[:, columns], triplets, noise[..., columns])
    torch.testing.assert_close(other, (losses, columns.argsort()[ancestors], grad[:, columns]))


@several
@given(batches(), st.booleans())
def test_the_loss_does_not_know_names_of_classes_nor_is_it_negative(batch, training):
    v, labels, _ = batch
    labels = torch.zeros(len(v), dtype=torch.long) if labels is None else labels
    torch.manual_seed(0)
    loss_func = HIERLoss(8, 4, miner=ReciprocalNeighborMiner(4, 5)).train(training)
    results = []
    for names in (labels, torch.tensor([70, -3, 2**40, 0, 5])[labels]):
        torch.manual_seed(1)
        embeddings = v.clone().requires_grad_()
        loss = loss_func(embeddings, names)
        grads = torch.autograd.grad(loss, (embeddings, loss_func.proxies))
        assert loss >= 0
        assert all(grad.isfinite().all() for grad in grads)
        results.append((loss, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_depends_on_the_order_of_the_batch_by_some_percent_only(training):
    """Triplets are drawn, or in eval mode spread, by position: another order is another sample of them."""
    gen = generator(0)
    v, labels = torch.randn(90, 16, generator=gen), torch.arange(90) % 45
    torch.manual_seed(0)
    loss_func = HIERLoss(64, 16).train(training)
    with torch.no_grad():
        values = []
        for _ in range(20):
            order = torch.randperm(90, generator=gen)
            values.append(float(loss_func(v[order], labels[order])))
    values = torch.tensor(values)
    assert 0 < values.std() < 0.05 * values.mean()
