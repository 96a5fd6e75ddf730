"""The loss against its slow reference, and its random draws against their distributions."""

import math
import random

import pytest
import reference
import torch
from conditions import needs_compiler
from scipy import stats

from hierloss import functional, poincare


@pytest.fixture(
    params=["eager", "kernels", pytest.param("compiled kernels", marks=[pytest.mark.slow, needs_compiler])]
)
def compiled(request, monkeypatch):
    """Whether to compile; "kernels" are those of compiled code, in eager mode."""
    if request.param == "kernels":
        monkeypatch.setattr(functional, "_compile", lambda kernel: kernel)
    return request.param != "eager"


def gumbel(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return -torch.log(-torch.log(torch.rand(*shape, dtype=torch.float64, generator=generator).clamp(1e-12)))


def points(n, dim=5, seed=0, scale=1.5):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def distance_matrix(v, w, c=0.1, clip_radius=2.3):
    x, y = (poincare.exp_map0(poincare.clip_norm(t, clip_radius), c) for t in (v, w))
    return poincare.pairwise_distance(x, y, c)


def random_triplets(n, count, seed=0):
    rng = random.Random(seed)
    return [tuple(rng.sample(range(n), 3)) for _ in range(count)]


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zero_noise", [False, True])
def test_equals_reference_in_value_and_gradient(seed, zero_noise):
    """Same triplets, same noise: 1e-10 in float64, to embeddings and to proxies, with duplicates among them."""
    embeddings, proxies = points(9, seed=seed), points(7, seed=seed + 100)
    embeddings[1] = embeddings[0] * 3  # beyond the clip radius, both
    proxies[2] = embeddings[2]
    embeddings.requires_grad_()
    proxies.requires_grad_()
    noise = [gumbel(2, 40, 7, seed=seed), gumbel(2, 30, 7, seed=seed + 1)]
    if zero_noise:  # not among the proxies: i and j themselves are then equally near as their own ancestors
        noise[0] = torch.zeros_like(noise[0])
    triplets = [random_triplets(9, 40, seed), random_triplets(7, 30, seed)]

    expected = reference.hier(embeddings, proxies, *triplets, *noise)
    expected_grads = torch.autograd.grad(expected, (embeddings, proxies))

    actual = 0
    for v, t, n in zip((embeddings, proxies), triplets, noise, strict=True):
        result = functional.hierarchical_triplet_loss(
            distance_matrix(v, proxies), torch.tensor(t).T, margin=0.1, temperature=0.1, noise=n
        )
        actual = actual + result.losses.mean()
    grads = torch.autograd.grad(actual, (embeddings, proxies))

    assert expected > 0.05
    assert abs(actual - expected) < 1e-10
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert expected_grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-10)


def test_noise_of_another_dtype_and_triplets_as_three_tensors():
    distances = distance_matrix(points(9), points(7, seed=1)).float().requires_grad_()
    triplets, noise = torch.tensor(random_triplets(9, 50)).T, gumbel(2, 50, 7)
    results = []
    for given in (noise, noise.float()):
        losses = functional.hierarchical_triplet_loss(distances, tuple(triplets), noise=given).losses
        results.append((losses, *torch.autograd.grad(losses.sum(), distances)))
    torch.testing.assert_close(*results)


def test_chunks_do_not_change_the_result(monkeypatch):
    distances = distance_matrix(points(9), points(7, seed=1)).requires_grad_()
    triplets, noise = torch.tensor(random_triplets(9, 50)).T, gumbel(2, 50, 7)
    results = []
    for cells in (1, 30, 10**6):
        monkeypatch.setattr(functional, "_CHUNK_CELLS", cells)
        losses, ancestors = functional.hierarchical_triplet_loss(distances, triplets, noise=noise)
        (grad,) = torch.autograd.grad((losses * torch.arange(50)).sum(), distances)
        results.append((losses, ancestors, grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


def test_straight_through_equals_torch_gumbel_softmax():
    """One draw written with torch.nn.functional.gumbel_softmax(hard=True), on the same random numbers."""
    distances = distance_matrix(points(3), points(6, seed=1)).requires_grad_()
    triplets = torch.tensor([[0], [1], [2]])
    for seed in range(20):
        torch.manual_seed(seed)
        pair = torch.maximum(distances[0], distances[1])
        triple = torch.maximum(pair, distances[2])
        one_hots = [torch.nn.functional.gumbel_softmax(-m / 0.1, hard=True, dim=0) for m in (pair, triple)]
        torch.manual_seed(seed)
        noise = torch.stack([-torch.empty(6, dtype=torch.float64).exponential_().log() for _ in range(2)])
        ij, ijk = ((distances * one_hot).sum(1) for one_hot in one_hots)
        gap = (ij - ijk) * torch.tensor([1.0, 1.0, -1.0])
        expected = torch.relu(gap + 0.1).sum() * (one_hots[0].argmax() != one_hots[1].argmax())
        losses, _ = functional.hierarchical_triplet_loss(distances, triplets, noise=noise.unsqueeze(1))
        assert abs(losses[0] - expected) < 1e-12
        torch.testing.assert_close(
            torch.autograd.grad(losses.sum(), distances)[0],
            torch.autograd.grad(expected, distances)[0],
            rtol=1e-10,
            atol=1e-12,
        )


def test_free_draws_have_the_mean_of_the_reference():
    """Loss and gradient, averaged over many draws, against the same average with explicit Gumbel noise."""
    torch.manual_seed(0)
    distances = distance_matrix(points(6), points(8, seed=1)).requires_grad_()
    repeats = 20_000
    triplets = torch.tensor(random_triplets(6, 4)).T.repeat_interleave(repeats, dim=1)

    def sample(noise):
        losses, _ = functional.hierarchical_triplet_loss(distances, triplets, noise=noise, temperature=0.5)
        # One gradient for every hundredth part of the draws, to know its spread.
        parts = losses.view(4, 100, -1).mean((0, 2))
        grads = torch.stack([torch.autograd.grad(part, distances, retain_graph=True)[0] for part in parts])
        return parts.detach(), grads

    free, explicit = sample(None), sample(gumbel(2, triplets.shape[1], 8))
    for a, b in zip(free, explicit, strict=True):
        error = ((a.var(0) + b.var(0)) / 100).sqrt()
        assert b.mean(0).abs().max() > 20 * error.max()  # there is something to see
        z = (a.mean(0) - b.mean(0)) / error.clamp_min(1e-9)
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("table_size", [2**14, 2**20])  # with a table of noise, and without
def test_gradient_given_the_ancestor_has_the_distribution_of_gumbel_softmax(table_size, compiled, monkeypatch):
    """The second random number: soft probabilities conditional on the draw, by a two-sample KS test."""
    monkeypatch.setattr(functional, "_TABLE_SIZE", table_size)
    torch.manual_seed(1)
    repeats = 5_000
    distances = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.4, 0.3], [0.4, 0.35, 0.2]], dtype=torch.float64)
    triplets = torch.arange(3).unsqueeze(1).expand(3, repeats)
    # Every triplet has its own copy of the distances, so that its gradient can be told from the others'.
    copies = distances.repeat(repeats, 1).requires_grad_()
    own = triplets + 3 * torch.arange(repeats)
    samples = []
    for noise in (None, gumbel(2, repeats, 3)):
        losses, ancestors = functional.hierarchical_triplet_loss(
            copies, own, noise=noise, margin=1.0, compiled=compiled
        )
        (grad,) = torch.autograd.grad(losses.sum(), copies)
        chosen = (ancestors[0] == 0) & (ancestors[1] == 1)
        samples.append(grad.view(repeats, 9)[chosen])
    assert min(len(s) for s in samples) > 200
    for cell in range(9):
        a, b = (s[:, cell].numpy() for s in samples)
        assert stats.ks_2samp(a, b).pvalue > 1e-4, cell


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ancestors_follow_the_softmax(dtype, compiled):
    """Chi-square over 200,000 draws for both ancestors, which must be independent of each other."""
    torch.manual_seed(0)
    draws = 200_000
    distances = distance_matrix(points(3, scale=0.4), points(12, seed=1, scale=0.4)).to(dtype)
    triplets = torch.tensor([[1], [2], [0]]).expand(3, draws)  # 0 is the farthest from most proxies
    _, ancestors = functional.hierarchical_triplet_loss(distances, triplets, temperature=0.3, compiled=compiled)
    pair = torch.softmax(-distances[1:].amax(0).double() / 0.3, 0)
    triple = torch.softmax(-distances.amax(0).double() / 0.3, 0)
    joint = torch.outer(pair, triple).flatten() * draws
    observed = torch.bincount(ancestors[0] * 12 + ancestors[1], minlength=144)
    kept = joint > 5
    assert kept.sum() > 50
    pooled = [torch.cat([t[kept].double(), t[~kept].sum().double().view(1)]) for t in (observed, joint)]
    assert stats.chisquare(*(p.numpy() for p in pooled)).pvalue > 1e-3


def test_draws_are_independent_between_triplets():
    torch.manual_seed(0)
    distances = distance_matrix(points(3, scale=0.4), points(4, seed=1, scale=0.4))
    triplets = torch.arange(3).unsqueeze(1).expand(3, 100_000)
    first = functional.hierarchical_triplet_loss(distances, triplets, temperature=1.0).ancestors[0]
    table = torch.bincount(first[::2] * 4 + first[1::2], minlength=16).view(4, 4)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3


def test_a_seed_makes_draws_reproducible():
    distances = distance_matrix(points(9), points(7, seed=1)).requires_grad_()
    triplets = torch.tensor(random_triplets(9, 50)).T

    def run(seed):
        torch.manual_seed(seed)
        losses, ancestors = functional.hierarchical_triplet_loss(distances, triplets)
        return losses, ancestors, *torch.autograd.grad(losses.sum(), distances)

    torch.testing.assert_close(run(3), run(3), rtol=0, atol=0)
    assert not torch.equal(run(3)[1], run(4)[1])


def test_zero_noise_takes_the_most_probable_ancestor():
    distances = torch.tensor([[1.0, 0.5, 2.0], [0.2, 0.9, 2.0], [3.0, 2.0, 1.9]])
    one = {"triplets": torch.tensor([[0], [1], [2]]), "noise": torch.zeros(2, 1, 3)}
    losses, ancestors = functional.hierarchical_triplet_loss(distances, **one, margin=0.25)
    # max over i, j: (1.0, 0.9, 2.0); over i, j, k: (3.0, 2.0, 2.0), a tie that the first wins
    assert ancestors.flatten().tolist() == [1, 1]
    assert losses.item() == 0
    distances[2, 2] = 1.5
    distances[:2, 2] = 1.6
    # [0.5 - 1.6 + 0.25]+ + [0.9 - 1.6 + 0.25]+ + [1.5 - 2.0 + 0.25]+ are 0; a margin of 0.8 leaves 0.1 and 0.3
    losses, ancestors = functional.hierarchical_triplet_loss(distances, **one, margin=0.8)
    assert ancestors.flatten().tolist() == [1, 2]
    torch.testing.assert_close(losses, torch.tensor([0.1 + 0.3]))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 10.0, 1e3, 1e30])
def test_any_scale_of_distances_gives_finite_results(scale):
    """The largest weight of a row is 1; without that every weight underflows and nothing can be drawn."""
    distances = (distance_matrix(points(6), points(8, seed=1)) * scale).float().requires_grad_()
    losses, ancestors = functional.hierarchical_triplet_loss(distances, torch.tensor(random_triplets(6, 200)).T)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert distances.grad.isfinite().all()
    assert 0 <= ancestors.min() <= ancestors.max() < 8
    if scale == 1e30:
        closest = torch.maximum(distances[0], distances[1]).argmin()
        ancestor = functional.hierarchical_triplet_loss(distances, torch.tensor([[0], [1], [2]])).ancestors[0]
        assert ancestor.item() == closest


def test_the_first_arrival_is_at_a_finite_time(monkeypatch):
    """A uniform number may be 0; without the smallest one in its place, no proxy would ever arrive."""
    weights, ancestors = torch.rand(50, 8) + 0.1, torch.arange(50) % 8
    first = torch.full((50, 1), torch.finfo(torch.float32).tiny).log()
    soft = functional._soft_choice(weights, True, ancestors, first, functional._delay_table(weights)[:50].clone())
    assert soft.isfinite().all()
    assert torch.equal(soft.argmin(1), ancestors)  # they are negative
    distances = distance_matrix(points(9), points(7, seed=1)).requires_grad_()
    losses, _ = functional.hierarchical_triplet_loss(distances, torch.tensor(random_triplets(9, 50)).T, margin=5.0)
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    (gradient,) = torch.autograd.grad(losses.sum(), distances)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_exponentials_in_place_of_logits_change_nothing_but_rounding(temperature, monkeypatch):
    """On a CPU, softmaxes are replaced by exponentials of all distances, as long as these fit float32."""
    distances = distance_matrix(points(9), points(7, seed=1)).float().requires_grad_()
    triplets = torch.tensor(random_triplets(9, 200)).T

    def run():
        torch.manual_seed(0)
        losses, ancestors = functional.hierarchical_triplet_loss(distances, triplets, temperature=temperature)
        return ancestors, torch.autograd.grad(losses.sum(), distances)[0]

    fast = run()
    monkeypatch.setattr(functional, "_WEIGHTS_SPAN", 0)
    torch.testing.assert_close(fast, run(), rtol=1e-4, atol=1e-5)


def test_exponentials_do_not_underflow():
    """Each point is near another proxy; the ancestor is drawn among probabilities of e^-138 and e^-139."""
    distances = torch.tensor([[0.0, 13.9, 13.8], [13.9, 0.0, 13.8], [0.0, 0.0, 0.0]])
    triplets = torch.arange(3).unsqueeze(1).expand(3, 10_000)
    first = functional.hierarchical_triplet_loss(distances, triplets, temperature=0.1).ancestors[0]
    shares = torch.softmax(torch.tensor([-139.0, -139.0, -138.0], dtype=torch.float64), 0)
    assert stats.chisquare(first.bincount().numpy(), 10_000 * shares.numpy()).pvalue > 1e-3


def test_a_given_noise_needs_no_random_numbers():
    distances = distance_matrix(points(9), points(7, seed=1)).requires_grad_()
    triplets = torch.tensor(random_triplets(9, 50)).T
    losses, _ = functional.hierarchical_triplet_loss(distances, triplets, noise=torch.zeros(2, 50, 7), margin=5.0)
    before = torch.get_rng_state()
    losses.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shared_table_of_noise():
    """Its rows are exponential, and their values independent."""
    torch.manual_seed(0)
    table = -functional._delay_table(torch.zeros(3, 50))
    assert stats.kstest(table[::50].flatten().numpy(), "expon").pvalue > 1e-3
    correlation = torch.corrcoef(table[::50, :9].T)[~torch.eye(9, dtype=torch.bool)]
    assert float(correlation.abs().max()) < 4.5 / len(table[::50]) ** 0.5


def test_memory_layout_does_not_matter():
    """Backward of transposed or expanded distances once failed."""
    distances, triplets = distance_matrix(points(6), points(8, seed=1)), torch.tensor(random_triplets(6, 50)).T
    noise = gumbel(2, 50, 8)
    for same in (distances, distances[:1].expand(6, 8)):
        results = []
        for d in (same.contiguous(), same.T.contiguous().T, same, same.repeat_interleave(2, 0)[::2]):
            d = d.detach().requires_grad_()
            losses, _ = functional.hierarchical_triplet_loss(d, triplets, noise=noise, margin=5.0)
            results.append((losses, torch.autograd.grad(losses.sum(), d)[0]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_distance_that_is_not_finite_spoils_every_loss(bad):
    """Draws from such weights mean nothing; -inf was once taken for a very near proxy."""
    distances = distance_matrix(points(6), points(8, seed=1))
    distances[5, 3] = bad
    for noise in (None, torch.zeros(2, 1, 8)):
        losses, _ = functional.hierarchical_triplet_loss(distances, torch.tensor([[0], [1], [2]]), noise=noise)
        assert losses.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_noise_that_is_not_finite_spoils_its_triplet(bad, side):
    distances, noise = distance_matrix(points(6), points(8, seed=1)), gumbel(2, 3, 8)
    noise[side, 1, 4] = bad
    triplets = torch.tensor([[0, 1, 2], [1, 2, 3], [2, 3, 4]])
    losses, _ = functional.hierarchical_triplet_loss(distances, triplets, noise=noise)
    assert losses.isnan().tolist() == [False, True, False]


def test_noise_of_minus_infinity_keeps_a_proxy_from_being_drawn():
    distances, noise = distance_matrix(points(6), points(8, seed=1)).requires_grad_(), gumbel(2, 50, 8)
    noise[..., :5] = -math.inf
    losses, ancestors = functional.hierarchical_triplet_loss(
        distances, torch.tensor(random_triplets(6, 50)).T, noise=noise, margin=5.0
    )
    (grad,) = torch.autograd.grad(losses.sum(), distances)
    assert ancestors.min() == 5
    assert losses.isfinite().all()
    assert grad.isfinite().all()
    assert (grad[:, :5] == 0).all()


def test_nan_goes_through():
    distances = distance_matrix(points(6), points(8, seed=1))
    distances[0, 3] = math.nan
    distances.requires_grad_()
    losses, _ = functional.hierarchical_triplet_loss(distances, torch.tensor([[0], [1], [2]]))
    losses.sum().backward()
    assert losses.isnan().all()
    assert distances.grad.isnan().any()


# --- triplets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize(("n", "k"), [(30, 6), (12, 5), (7, 20), (12, 3)])
def test_triplets_cover_exactly_the_reference_sets(n, k, with_labels):
    torch.manual_seed(0)
    v = points(n, dim=2, seed=n)
    distances = distance_matrix(v, v)
    labels = [int(b) % 4 for b in range(n)] if with_labels else None
    related = reference.reciprocal_neighbors(distances, labels, k)
    anchors, positives, negatives, valid = functional.reciprocal_triplets(
        distances,
        None if labels is None else torch.tensor(labels),
        num_neighbors=k,
        triplets_per_anchor=500,
    )
    assert anchors.tolist() == [i for i in range(n) for _ in range(500)]
    for i in range(n):
        rest = set(range(n)) - related[i] - {i}
        mine = slice(i * 500, (i + 1) * 500)
        assert valid[mine].tolist() == [len(related[i]) >= 2 and len(rest) >= 1] * 500
        if valid[mine][0]:
            assert set(positives[mine].tolist()) == related[i]
            assert set(negatives[mine].tolist()) == rest


def test_triplets_are_uniform():
    torch.manual_seed(0)
    v = points(20, dim=2)
    distances = distance_matrix(v, v)
    draws = 20_000
    _, positives, negatives, valid = functional.reciprocal_triplets(
        distances, num_neighbors=8, triplets_per_anchor=draws
    )
    related = reference.reciprocal_neighbors(distances, None, 8)
    tested = 0
    for i in range(20):
        mine = slice(i * draws, (i + 1) * draws)
        if valid[mine][0]:
            for drawn, size in ((positives[mine], len(related[i])), (negatives[mine], 19 - len(related[i]))):
                counts = drawn.bincount(minlength=20)
                assert stats.chisquare(counts[counts > 0].numpy()).pvalue > 1e-4
                assert (counts > 0).sum() == size
                tested += 1
    assert tested > 20


def test_equal_labels_come_before_any_distance():
    """Far points of the same class are neighbours before near ones of another, also where exp(-d) underflows."""
    positions = torch.tensor([0.0, 200.0, 400.0, 1.0, 201.0, 401.0])
    distances = (positions[:, None] - positions).abs()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    _, positives, negatives, valid = functional.reciprocal_triplets(
        distances, labels, num_neighbors=3, triplets_per_anchor=100
    )
    assert valid.all()
    for i in range(6):
        mine = slice(i * 100, (i + 1) * 100)
        assert (labels[positives[mine]] == labels[i]).all()
        assert (labels[negatives[mine]] != labels[i]).all()


def test_even_triplets_cover_neighbours_and_the_rest_evenly():
    """The s-th of t positives is at (s + 1/2) / t of the neighbours; the negatives step by the golden ratio."""
    v = points(20, dim=2)
    related = reference.reciprocal_neighbors(distance_matrix(v, v), None, 8)
    _, positives, negatives, valid = functional.reciprocal_triplets(
        distance_matrix(v, v), num_neighbors=8, triplets_per_anchor=400, random=False
    )
    for i in range(20):
        if valid[i * 400]:
            pairs = torch.stack([positives, negatives])[:, i * 400 : (i + 1) * 400]
            for side, size in zip(pairs, (len(related[i]), 19 - len(related[i])), strict=True):
                counts = side.bincount(minlength=20)
                assert counts[counts > 0].min() >= 400 // size - 2
                assert (counts > 0).sum() == size
            near, rest = sorted(related[i]), sorted(set(range(20)) - related[i] - {i})
            assert len(set(map(tuple, pairs.T.tolist()))) == len(near) * len(rest)
            steps = [s + 0.5 for s in range(400)]
            assert pairs[0].tolist() == [near[int(s / 400 * len(near))] for s in steps]
            assert pairs[1].tolist() == [rest[int(s * (5**0.5 - 1) / 2 % 1 * len(rest))] for s in steps]


def test_duplicates_of_a_class_are_its_nearest_neighbours():
    """At distance 0, where -1 / d is the most that it can be."""
    positions = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    distances = (positions[:, None] - positions).abs()
    _, positives, negatives, valid = functional.reciprocal_triplets(
        distances, torch.zeros(6), num_neighbors=3, triplets_per_anchor=50
    )
    assert valid.all()
    anchors = torch.arange(6).repeat_interleave(50)
    assert (positions[positives] == positions[anchors]).all()
    assert (positions[negatives] != positions[anchors]).all()


def test_one_other_point_is_enough():
    positions = torch.tensor([0.0, 0.1, 0.2, 5.0])
    *_, negatives, valid = functional.reciprocal_triplets(
        (positions[:, None] - positions).abs(), num_neighbors=3, triplets_per_anchor=2
    )
    assert valid.tolist() == [True] * 6 + [False] * 2
    assert negatives[:6].tolist() == [3] * 6


def test_triplets_of_different_anchors_are_drawn_independently():
    """Two clusters of nine: what the first anchor draws says nothing about what the second draws."""
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(9.0), 1000 + torch.arange(9.0)])
    _, positives, negatives, valid = functional.reciprocal_triplets(
        (positions[:, None] - positions).abs(), num_neighbors=9, triplets_per_anchor=20_000
    )
    assert valid.all()
    for drawn, count in ((positives.view(18, -1), 8), (negatives.view(18, -1), 9)):
        own, other = (drawn[i].unique(return_inverse=True)[1] for i in (0, 1))
        table = torch.bincount(own * count + other, minlength=count**2).view(count, count)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    pairs = torch.bincount((positives[:20_000] - 1) * 9 + negatives[:20_000] - 9, minlength=72).view(8, 9)
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_defaults_are_the_papers():
    v = points(60, dim=2)
    distances = distance_matrix(v, v)
    results = []
    for settings in ({}, {"num_neighbors": 20, "triplets_per_anchor": 50}):
        torch.manual_seed(0)
        results.append(functional.reciprocal_triplets(distances, **settings))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    triplets = torch.stack(results[0][:3])[:, results[0][3]]
    results = []
    for settings in ({}, {"margin": 0.1, "temperature": 0.1}):
        torch.manual_seed(0)
        results.append(functional.hierarchical_triplet_loss(distances, triplets, **settings))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_collapsed_class_keeps_its_order():
    """Neighbours of one class at distances of 1e-8 are still told apart."""
    v = points(30, dim=3) * 1e-9
    related = reference.reciprocal_neighbors(distance_matrix(v, v) * 1e9, [0] * 30, 5)
    _, positives, _, valid = functional.reciprocal_triplets(
        distance_matrix(v, v).float(), torch.zeros(30), num_neighbors=5, triplets_per_anchor=200
    )
    for i in range(30):
        if len(related[i]) >= 2:
            assert valid[i * 200]
            assert set(positives[i * 200 : (i + 1) * 200].tolist()) == related[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("random", [False, True])
def test_default_dtype_and_device_do_not_matter(random, dtype):
    distances = distance_matrix(points(9), points(7, seed=1)).to(dtype)
    triplets = torch.tensor(random_triplets(9, 50)).T

    def run():
        torch.manual_seed(0)
        leaf = distances.clone().requires_grad_()
        losses, ancestors = functional.hierarchical_triplet_loss(leaf, triplets)
        mined = functional.reciprocal_triplets(
            distances[:7], num_neighbors=4, triplets_per_anchor=9, random=random
        )
        return [losses, ancestors, *torch.autograd.grad(losses.sum(), leaf), *mined]

    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = run()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_half_precision_distances_are_worked_on_in_float32():
    distances = distance_matrix(points(9), points(7, seed=1)).half().requires_grad_()
    noise = gumbel(2, 50, 7).float()
    triplets = torch.tensor(random_triplets(9, 50)).T
    losses, _ = functional.hierarchical_triplet_loss(distances, triplets, noise=noise, temperature=1e-6)
    expected, _ = functional.hierarchical_triplet_loss(distances.float(), triplets, noise=noise, temperature=1e-6)
    assert torch.equal(losses, expected)
    losses.sum().backward()
    assert distances.grad.isfinite().all()


def test_half_precision_distances_draw_with_all_digits():
    """Of thousands of others a float16 draw would never choose some."""
    positions = torch.cat([torch.arange(3.0) / 64, 2 + torch.arange(3000.0) // 64])
    distances = (positions[:, None] - positions).abs().half()
    results = []
    for d in (distances, distances.float()):
        torch.manual_seed(0)
        results.append(functional.reciprocal_triplets(d, num_neighbors=3, triplets_per_anchor=20)[2][:60])
    assert torch.equal(*results)


def test_expanded_noise_is_not_copied():
    """Eval mode expands a single zero; its backward pass must not make (2, T, P) of it: 480 MB here."""
    distances = torch.rand(100, 3000).requires_grad_()
    triplets = torch.randint(100, (3, 20_000))
    noise = torch.zeros(()).expand(2, 20_000, 3000)
    with torch.profiler.profile(profile_memory=True) as profile:
        functional.hierarchical_triplet_loss(distances, triplets, noise=noise, margin=5.0).losses.sum().backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 60e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"distances": torch.rand(3)},
            r"distances must be a floating point matrix .* got torch.float32 of shape \(3,\)",
        ),
        ({"distances": torch.ones(3, 4, dtype=torch.long)}, r"distances must be a floating .* got torch.int64"),
        ({"distances": torch.rand(0, 4)}, r"distances must be .* of shape \(0, 4\)"),
        ({"noise": torch.zeros(5, 4)}, r"noise must have shape \(2, 5, 4\), \(2, T, P\), got shape \(5, 4\)"),
        ({"triplets": torch.zeros(4, 5, dtype=torch.long)}, r"triplets must be three index tensors .* \(4, 5\)"),
        ({"margin": -1.0}, r"margin must be a finite non-negative number, got -1.0"),
        ({"temperature": 0.0}, r"temperature must be a finite positive number, got 0.0"),
        ({"temperature": 1e-31}, r"temperature must be at least 1e-30, got 1e-31"),
    ],
)
def test_bad_arguments_of_the_loss(change, message):
    arguments = {"distances": torch.rand(3, 4), "triplets": torch.zeros(3, 5, dtype=torch.long)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        functional.hierarchical_triplet_loss(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distances": torch.rand(3, 4)}, r"a square matrix of floats, got torch.float32 of shape \(3, 4\)"),
        ({"distances": torch.rand(0, 0)}, r"a square matrix of floats, got torch.float32 of shape \(0, 0\)"),
        ({"distances": torch.tensor(1.0)}, r"a square matrix of floats, got torch.float32 of shape \(\)"),
        ({"distances": torch.ones(5, 5).int()}, r"got torch.int32 of shape \(5, 5\)"),
        ({"labels": torch.zeros(1)}, r"labels must have shape \(5,\), got shape \(1,\)"),
        ({"num_neighbors": 2}, r"num_neighbors must be at least 3, got 2"),
        ({"triplets_per_anchor": 0}, r"triplets_per_anchor must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_the_miner(change, message):
    with pytest.raises(ValueError, match=message):
        functional.reciprocal_triplets(**{"distances": torch.rand(5, 5)} | change)


def test_identical_points_are_their_own_neighbours():
    """With all distances 0, ties must not push a point out of its own neighbourhood."""
    anchors, positives, negatives, valid = functional.reciprocal_triplets(torch.zeros(10, 10), num_neighbors=3)
    assert (anchors != positives)[valid].all()
    assert (anchors != negatives)[valid].all()
