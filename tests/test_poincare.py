"""Ball geometry against mpmath, geoopt and its own axioms."""

import math

import geoopt
import mpmath
import pytest
import torch

from hierloss import poincare

mpmath.mp.dps = 60


def exact_distance(x, y, c):
    """60-digit distance of the points as they are stored."""
    c = mpmath.mpf(float(c))
    x, y = ([mpmath.mpf(float(t)) for t in point] for point in (x, y))
    gap = mpmath.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
    inside = (1 - c * sum(a * a for a in x)) * (1 - c * sum(b * b for b in y))
    return 2 / mpmath.sqrt(c) * mpmath.asinh(mpmath.sqrt(c) * gap / mpmath.sqrt(inside))


def directions(n, dim, seed=0):
    v = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=1, keepdim=True)


# --- exactness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 128])
@pytest.mark.parametrize("radius", [0, 0.3, 0.9, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("separation", [1e-6, 1e-4, 1e-2, 0.5, 1.9])
def test_float32_distances_are_exact(dim, radius, separation):
    """Relative error at most 1e-6, from the origin to 0.99999 of the radius, from near pairs to the diameter."""
    c = 0.5
    x = (directions(6, dim) * radius / math.sqrt(c)).float()
    y = x + (directions(6, dim, seed=1) * separation / math.sqrt(c)).float()
    y = y * (radius / (math.sqrt(c) * y.norm(dim=1, keepdim=True))).clamp(max=1)  # back inside
    matrix = poincare.pairwise_distance(x, y, c)
    vector = poincare.distance(x, y, c)
    for i in range(6):
        expected = float(exact_distance(x[i], y[i], c))
        if expected > 0:
            assert abs(float(vector[i]) / expected - 1) < 1e-6
            assert abs(float(matrix[i, i]) / expected - 1) < 1e-6


@pytest.mark.parametrize("dim", [2, 3, 128, 1000, 2048])
def test_pairwise_keeps_near_pairs_in_float64(dim):
    """The Gram matrix without cancellation: plain float64 is wrong in the fourth digit at 1e-6."""
    x = directions(20, dim) * 0.7
    for separation in (1e-3, 1e-6, 1e-8):
        y = x + separation * directions(20, dim, seed=1)
        matrix = poincare.pairwise_distance(x, y, 1.0).diagonal()
        torch.testing.assert_close(
            matrix, poincare.distance(x, y, 1.0), rtol=1e-9 if separation > 1e-7 else 1e-5, atol=0
        )


@pytest.mark.parametrize("dim", [2, 64, 2048])
def test_equal_points_are_at_distance_zero(dim):
    """Without coincident_eps, rounding leaves 1e-11 here, and its gradient is noise."""
    x = (directions(50, dim) * torch.linspace(0, 0.999, 50, dtype=torch.float64).unsqueeze(1)).requires_grad_()
    matrix = poincare.pairwise_distance(x, x.detach().clone(), 1.0)
    assert (matrix.diagonal() == 0).all()
    (grad,) = torch.autograd.grad(matrix.diagonal().sum(), x)
    assert (grad == 0).all()


def test_sums_of_the_largest_coordinates_are_exact():
    """In every dimension: with three bits more on the grid, sums round and equal points move apart."""
    for dim in range(2, 140):
        size = 1 - 0.02 * torch.rand(8, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
        x = size * directions(8, dim, seed=dim).sign() * 0.9 / math.sqrt(dim)
        y = torch.cat([x.flip(0), x])  # another order of the products
        assert (poincare.pairwise_distance(x, y, 1.0)[:, 8:].diagonal() == 0).all(), dim
        pairs = x.view(4, 2, dim)
        in_a_batch = poincare.pairwise_distance(pairs, pairs.flip(1), 1.0).flip(2).diagonal(dim1=1, dim2=2)
        assert (in_a_batch == 0).all(), dim
        near = poincare.pairwise_distance(x, x + 1e-8 * directions(8, dim), 1.0).diagonal()
        torch.testing.assert_close(
            near, poincare.distance(x, x + 1e-8 * directions(8, dim), 1.0), rtol=1e-6, atol=0
        )


def test_chunks_of_rows_do_not_change_the_result(monkeypatch):
    x, y = (directions(17, 3) * 0.8).requires_grad_(), (directions(11, 3, seed=1) * 0.5).requires_grad_()
    results = []
    for cells in (1, 40, 99, 10**6):  # 17, 6, 2 chunks and 1
        monkeypatch.setattr(poincare, "_CHUNK_CELLS", cells)
        c = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        d = poincare.pairwise_distance(x, y, c)
        weights = torch.arange(d.numel(), dtype=d.dtype).view_as(d)
        results.append((d, *torch.autograd.grad((d * weights).sum(), (x, y, c))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_pairwise_equals_distance_in_value_and_gradient():
    x, y = (directions(9, 4) * 0.9).requires_grad_(), (directions(7, 4, seed=1) * 0.6).requires_grad_()
    c = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    matrix = poincare.pairwise_distance(x, y, c)
    expanded = poincare.distance(x.unsqueeze(1), y.unsqueeze(0), c)
    torch.testing.assert_close(matrix, expanded, rtol=1e-13, atol=0)
    weights = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads, expected = (torch.autograd.grad((d * weights).sum(), (x, y, c)) for d in (matrix, expanded))
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("cells", [10, 10**6])
def test_pairwise_takes_leading_dimensions(cells, monkeypatch):
    monkeypatch.setattr(poincare, "_CHUNK_CELLS", cells)
    x = (directions(18, 4).view(3, 6, 4) * 0.9).requires_grad_()
    y = (directions(15, 4, seed=1).view(3, 5, 4) * 0.5).requires_grad_()
    actual = poincare.pairwise_distance(x, y, 0.6)
    expected = torch.stack([poincare.pairwise_distance(a, b, 0.6) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads, expected_grads = (torch.autograd.grad((d * weights).sum(), (x, y)) for d in (actual, expected))
    torch.testing.assert_close(grads, expected_grads)


# --- agreement with geoopt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.05, 0.1, 1.0, 4.0])
def test_agrees_with_geoopt_in_float64(c):
    ball = geoopt.PoincareBall(c=torch.tensor(c, dtype=torch.float64))
    v, w = directions(8, 5) * 1.2, directions(8, 5, seed=1) * 0.4
    x, y = poincare.exp_map0(v, c), poincare.exp_map0(w, c)
    torch.testing.assert_close(x, ball.expmap0(v))
    torch.testing.assert_close(poincare.log_map0(x, c), ball.logmap0(x))
    torch.testing.assert_close(poincare.distance(x, y, c), ball.dist(x, y))
    torch.testing.assert_close(poincare.distance(x, torch.zeros_like(x), c), ball.dist0(x))


def test_riemannian_gradient_is_geoopts():
    ball = geoopt.PoincareBall(c=torch.tensor(0.3, dtype=torch.float64))
    x = (directions(5, 4) * 1.5).requires_grad_()
    upstream = directions(5, 4, seed=1)
    out = poincare.riemannian_gradient(x, 0.3)
    assert torch.equal(out, x)
    (grad,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(grad, ball.egrad2rgrad(x, upstream))


def test_learnable_curvature_at_the_origin():
    """The gradient of c is finite, and right, when a point is the origin; and nothing on the way is NaN."""
    v = directions(4, 3)
    v[0] = 0

    def total(c):
        x = poincare.exp_map0(poincare.clip_norm(v, 0.5), c)
        return poincare.pairwise_distance(x, x, c).sum() + poincare.log_map0(x, c).sum()

    for value in (1e-6, 0.1, 1.0):
        c = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        with torch.autograd.detect_anomaly(check_nan=True):
            (grad,) = torch.autograd.grad(total(c), c)
        step = value * 1e-4
        torch.testing.assert_close(grad, (total(c + step) - total(c - step)) / (2 * step), rtol=1e-4, atol=1e-7)


def test_riemannian_gradient_outside_is_that_of_the_boundary():
    """Far outside, (1 - c|x|^2)^2 once overflowed."""
    x = (directions(3, 4) * torch.tensor([[1.0], [2.0], [1e30]])).float().requires_grad_()
    (grad,) = torch.autograd.grad(poincare.riemannian_gradient(x, 1.0).sum(), x)
    torch.testing.assert_close(grad, torch.zeros_like(grad))


def test_distances_of_a_set_from_itself():
    """Both sides give one gradient, which half precision rounds once."""
    x = (directions(6, 4) * 0.7).half().requires_grad_()
    double = x.detach().double().requires_grad_()
    weights = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((poincare.pairwise_distance(x, x, 1.0) * weights).sum(), x)
    other = poincare.pairwise_distance(double, double.clone(), 1.0)
    (expected,) = torch.autograd.grad((other * weights).sum(), double)
    assert torch.equal(grad, expected.half())


@pytest.mark.parametrize("c", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["exp_map0", "log_map0", "project", "to_hyperboloid", "lift_queries"])
def test_a_curvature_that_diverged_is_not_taken_for_a_ball_of_one_point(name, c):
    assert getattr(poincare, name)(directions(3, 4), torch.tensor(c)).isnan().any(1).all()


@pytest.mark.parametrize("c", [0.0, -1.0, math.inf, math.nan])
def test_bad_curvature(c):
    x = directions(3, 4)
    for function in (poincare.exp_map0, poincare.project, lambda x, c: poincare.distance(x, x, c)):
        with pytest.raises(ValueError, match=f"c must be a finite positive number, got {c}"):
            function(x, c)


def test_bad_radius():
    with pytest.raises(ValueError, match="radius must be a finite non-negative number, got -1"):
        poincare.clip_norm(directions(3, 4), -1.0)


def test_a_time_that_is_infinite_is_not_taken_for_the_origin():
    points = torch.tensor([[4 / 3, 0.0, 5 / 3], [4 / 3, 0.0, math.inf]])
    assert poincare.from_hyperboloid(points, 1.0).isnan().all(1).tolist() == [False, True]


def test_lifted_references_at_their_limits():
    """None at all; the longest vector, whose last coordinate is the root of 0; more than the boundary allows."""
    assert poincare.lift_references(torch.rand(0, 3), 1.0).shape == (0, 5)
    x = (directions(4, 3) * 0.7).requires_grad_()
    for max_distance in (None, 1e4):
        lifted = poincare.lift_references(x, 1.0, max_distance)
        (grad,) = torch.autograd.grad(lifted.sum(), x)
        assert lifted.isfinite().all()
        assert grad.isfinite().all()
        lengths = lifted.norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand(4))


def test_a_bad_row_spoils_its_own_distances_only():
    x = directions(4, 3) * 0.5
    x[1, 0] = math.nan
    matrix = poincare.pairwise_distance(x, x, 1.0)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, :] = expected[:, 1] = True
    assert torch.equal(matrix.isnan(), expected)


def test_a_bad_row_does_not_make_the_others_coarse():
    """The grid of coordinates follows the largest, of which NaN is none."""
    x, y = directions(5, 3) * 1e-9, directions(5, 3, seed=1) * 1e-9
    expected = poincare.pairwise_distance(x, y, 1.0)
    assert (expected > 0).all()
    for points in (x, y):
        points[4, 0] = math.nan
    assert torch.equal(poincare.pairwise_distance(x, y, 1.0)[:4, :4], expected[:4, :4])


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_no_points(n, m):
    assert poincare.pairwise_distance(torch.rand(n, 3), torch.rand(m, 3), 1.0).shape == (n, m)


# --- maps ---------------------------------------------------------------------------------------------------


def test_the_distance_from_the_origin_is_twice_the_norm():
    v = directions(6, 4) * torch.tensor([1e-9, 1e-3, 0.5, 1.0, 2.3, 5.0], dtype=torch.float64).unsqueeze(1)
    x = poincare.exp_map0(v, 0.1)
    torch.testing.assert_close(
        poincare.distance(x, torch.zeros_like(x), 0.1), 2 * v.norm(dim=1), rtol=1e-12, atol=0
    )


def test_log_map_inverts_exp_map():
    v = directions(4, 3) * torch.tensor([1e-8, 0.1, 1.0, 4.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(poincare.log_map0(poincare.exp_map0(v, 0.4), 0.4), v, rtol=1e-9, atol=0)


def test_clip_norm():
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.equal(poincare.clip_norm(v, None), v)
    torch.testing.assert_close(poincare.clip_norm(v, 2.5), torch.tensor([[1.5, 2.0], [0.3, 0.4], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_are_at_least_float32(dtype):
    x = (directions(3, 4) * 0.5).to(dtype)
    expected = torch.promote_types(dtype, torch.float32)
    for result in (
        poincare.exp_map0(x, 1.0),
        poincare.log_map0(x, 1.0),
        poincare.project(x, 1.0),
        poincare.clip_norm(x, 0.1),
        poincare.clip_norm(x, None),
        poincare.distance(x, x, 1.0),
        poincare.pairwise_distance(x, x, 1.0),
        poincare.to_hyperboloid(x, 1.0),
        poincare.from_hyperboloid(x, 1.0),
        poincare.lift_references(x, 1.0),
        poincare.lift_references(x, 1.0, max_distance=5.0),
        poincare.lift_queries(x, 1.0),
    ):
        assert result.dtype == expected
    exact = poincare.pairwise_distance(x.double(), x.double(), 1.0)
    torch.testing.assert_close(poincare.pairwise_distance(x, x, 1.0), exact.to(expected), rtol=1e-6, atol=0)


def test_hyperboloid():
    """On the hyperboloid, back again, and the inner product gives the distance."""
    c = 0.7
    x = poincare.exp_map0(directions(6, 4) * 1.5, c)
    lifted = poincare.to_hyperboloid(x, c)
    space, time = lifted[:, :-1], lifted[:, -1]
    torch.testing.assert_close(time.square() - space.square().sum(1), torch.full_like(time, 1 / c))
    torch.testing.assert_close(poincare.from_hyperboloid(lifted, c), x)
    inner = time[:, None] * time - space @ space.T
    torch.testing.assert_close(
        torch.acosh((c * inner).clamp(min=1)) / math.sqrt(c),
        poincare.pairwise_distance(x, x, c),
        rtol=1e-9,
        atol=1e-6,
    )


# --- epsilons: each test fails without its own --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1.0, 1.5, 1e30])
def test_boundary_eps_keeps_the_boundary_finite(dtype, radius):
    """Points on the boundary and beyond it: finite distances and gradients, and they stay strictly inside."""
    for dim in (2, 100):
        x = (directions(20, dim) * radius).to(dtype).requires_grad_()
        y = (directions(20, dim, seed=1) * 0.5).to(dtype).requires_grad_()
        inside = poincare.project(x, 1.0)
        assert (inside.double().norm(dim=1) < 1).all()
        for d in (poincare.pairwise_distance(x, y, 1.0), poincare.distance(x, y, 1.0)):
            assert d.isfinite().all()
            # As far as the triangle inequality demands: x is at log(2 / eps) from the origin, y at log 3.
            farthest = math.log(2 / poincare.boundary_eps(dtype))
            assert d.min() > farthest - math.log(3) - 0.3  # a digit of eps is rounding
            for grad in torch.autograd.grad(d.sum(), (x, y), retain_graph=True):
                assert grad.isfinite().all()


def test_exp_map_stays_inside_in_float32():
    v = (directions(1000, 16) * torch.logspace(0, 30, 1000, dtype=torch.float64).unsqueeze(1)).float()
    assert (poincare.exp_map0(v, 1.0).double().norm(dim=1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_linear_norm_keeps_the_origin_finite(dtype, size):
    v = (directions(5, 3) * size).to(dtype).requires_grad_()
    for function in (poincare.exp_map0, poincare.log_map0, lambda t, c: poincare.clip_norm(t, 1.0)):
        out = function(v, 0.5)
        torch.testing.assert_close(out, v, rtol=1e-6, atol=0)
        (grad,) = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(grad, torch.ones_like(v))  # the identity, to first order
    d = poincare.pairwise_distance(v, v, 0.5)
    (grad,) = torch.autograd.grad(d.sum(), v)
    assert grad.isfinite().all()


# --- shapes, dtypes, thresholds -----------------------------------------------------------------------------


NAMES_OF_ROWS = [
    "clip_norm",
    "exp_map0",
    "from_hyperboloid",
    "lift_queries",
    "log_map0",
    "project",
    "riemannian_gradient",
    "to_hyperboloid",
]


@pytest.mark.parametrize("name", NAMES_OF_ROWS)
def test_leading_dimensions_are_rows(name):
    """A tensor of shape (2, 3, D) is six points; also in the backward pass."""
    function = getattr(poincare, name)
    rows = (0.3 * directions(6, 5)).requires_grad_()
    if name == "from_hyperboloid":
        rows = poincare.to_hyperboloid(rows.detach(), 0.5).requires_grad_()
    expected = function(rows, 0.5)
    actual = function(rows.view(2, 3, -1), 0.5)
    torch.testing.assert_close(actual, expected.view(actual.shape))
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((f * weights.view(f.shape)).sum(), rows)[0] for f in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_references_are_lifted_to_one_length():
    """Also those that are almost as far out as the farthest; for any number of leading dimensions."""
    points = torch.stack([torch.linspace(0, 0.3, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)], 1)
    lifted = poincare.lift_references(points, 1.0)
    torch.testing.assert_close(lifted.norm(dim=1), lifted[-1].norm().expand(8), rtol=1e-12, atol=0)
    torch.testing.assert_close(poincare.lift_references(points.view(2, 4, 2), 1.0), lifted.view(2, 4, 4))


def test_the_default_device_does_not_matter():
    x = directions(6, 4) * 0.5
    with torch.device("meta"):
        results = [
            *(getattr(poincare, name)(x, 0.5) for name in NAMES_OF_ROWS if name != "from_hyperboloid"),
            poincare.from_hyperboloid(poincare.to_hyperboloid(x, 0.5), 0.5),
            poincare.lift_references(x, 0.5, max_distance=4.0),
            poincare.distance(x, x.flip(0), 0.5),
            poincare.pairwise_distance(x, x, 0.5),
        ]
    assert all(result.device.type == "cpu" and result.isfinite().all() for result in results)


def test_distances_take_the_wider_dtype():
    x, y = torch.tensor([[0.1, 0.2]], dtype=torch.float64), torch.tensor([[0.3, 0.1]])
    for function in (poincare.distance, poincare.pairwise_distance):
        assert function(x, y, 1.0).dtype == function(y, x, 1.0).dtype == torch.float64
        assert function(y, y, 1.0).dtype == function(y, y.half(), 1.0).dtype == torch.float32


def test_points_coincide_below_min_norm_and_not_above():
    least = poincare.min_norm(torch.float64)
    origin = torch.zeros(1, 2, dtype=torch.float64)
    for gap in (1e-20, 1e-90, 2 * least):
        x = torch.tensor([[gap, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(
            poincare.distance(x, origin, 1.0), torch.tensor([2 * gap], dtype=torch.float64), atol=0, rtol=1e-6
        )
    x = torch.tensor([[least / 2, 0.0]], dtype=torch.float64, requires_grad=True)
    distance = poincare.distance(x, origin, 1.0)
    assert distance.item() == 0
    assert torch.autograd.grad(distance.sum(), x)[0].abs().sum() == 0
