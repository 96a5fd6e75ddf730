"""Derivatives of everything public, once and twice, against finite differences in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import hierloss
from hierloss import (
    FromPoincare,
    HIERLoss,
    PoincareDistance,
    ReciprocalNeighborMiner,
    ToPoincare,
    functional,
    poincare,
)


def rows(n, dim=3, seed=0, scale=1.0):
    """Rows of norm 0 (the first) to ``scale``."""
    v = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    norms = torch.linspace(0, scale, n, dtype=torch.float64).unsqueeze(1)
    return (v / v.norm(dim=1, keepdim=True) * norms).requires_grad_()


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def on_hyperboloid(space, c):
    return torch.cat([space, (1 / c + space.square().sum(-1, keepdim=True)).sqrt()], -1)


def curved(module, **parameters):
    """The module as a function of the parameters of its learnable ball, and of its input."""
    module = module.double()
    return lambda isp_c, *inputs: functional_call(module, {**parameters, "curvature.isp_c": isp_c}, inputs)


def ball():
    return geoopt.PoincareBall(c=0.7, learnable=True)


def hier(embeddings, proxies):
    """Draws that do not change, and are sure: no noise, a low temperature. No triplets among so few proxies."""
    return functional_call(HIER, {"proxies": proxies}, (embeddings, LABELS))


torch.manual_seed(0)
HIER = HIERLoss(
    num_proxies=4, embedding_size=3, temperature=1e-5, margin=0.3, miner=ReciprocalNeighborMiner(4, 5)
).eval()
LABELS = torch.arange(12) % 3
DISTANCES = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
TRIPLETS = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3], [2, 3, 4, 5, 0, 1, 5]])
CHOSEN = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 0, 4]])


def sure_draws(distances):
    """Noise that leaves no doubt about which proxies are drawn: the soft choice is then a hard one."""
    noise = torch.nn.functional.one_hot(CHOSEN, 5).double() * 1e4
    return functional.hierarchical_triplet_loss(distances, TRIPLETS, noise=noise, margin=0.5).losses


@dataclass
class Check:
    function: Callable
    inputs: tuple
    exact: bool = True
    """Whether the gradient is that of the function, and not another one on purpose."""
    twice: bool = True


X, Y, C = rows(5, scale=0.9), rows(4, seed=1, scale=0.8), number(0.9)
with torch.no_grad():
    Y[1] = X[1] + 1e-3  # a near pair
WIDE = torch.cat([X.detach(), 3 * rows(3, seed=2).detach()[1:]]).requires_grad_()

CHECKS = {
    "poincare.clip_norm": [Check(lambda v: poincare.clip_norm(v, 0.6), (X,))],
    "poincare.distance": [Check(lambda x, y, c: poincare.distance(x.unsqueeze(1), y, c), (X[1:], Y[1:], C))],
    "poincare.exp_map0": [Check(poincare.exp_map0, (WIDE, C))],
    "poincare.from_hyperboloid": [
        Check(lambda space, c: poincare.from_hyperboloid(on_hyperboloid(space, c), c), (WIDE, C))
    ],
    "poincare.lift_queries": [Check(poincare.lift_queries, (X, C))],
    "poincare.lift_references": [Check(lambda x, c: poincare.lift_references(x, c, 5.0), (X, C))],
    "poincare.log_map0": [Check(poincare.log_map0, (X, C))],
    "poincare.pairwise_distance": [Check(poincare.pairwise_distance, (X[1:], Y[1:], C))],
    "poincare.project": [Check(poincare.project, (WIDE, C))],
    # Its gradient is not that of the identity, on purpose: test_riemannian_gradient_is_geoopts.
    "poincare.riemannian_gradient": [Check(lambda x: poincare.riemannian_gradient(x, 0.9), (X,), exact=False)],
    "poincare.to_hyperboloid": [Check(poincare.to_hyperboloid, (X, C))],
    "functional.hierarchical_triplet_loss": [Check(sure_draws, (DISTANCES.requires_grad_(),), twice=False)],
    "FromPoincare": [Check(FromPoincare(0.9), (X,)), Check(curved(FromPoincare(ball())), (number(-0.2), X))],
    "HIERLoss": [Check(hier, (rows(12, seed=5, scale=3.0), rows(5, seed=6, scale=2.0)[1:]), twice=False)],
    "PoincareDistance": [
        Check(PoincareDistance(), (WIDE[1:], Y[1:])),
        Check(PoincareDistance(0.9, normalize_embeddings=False), (X[1:], Y[1:])),
        Check(lambda x, y: PoincareDistance().pairwise_distance(x, y), (X[1:], Y)),
        Check(PoincareDistance(clip_radius=0.5).normalize, (WIDE,)),
        Check(curved(PoincareDistance(ball())), (number(-0.2), WIDE[1:], Y[1:])),
    ],
    "ToPoincare": [
        Check(ToPoincare(0.9, 0.6), (WIDE,)),
        Check(ToPoincare(0.9, None, riemannian_gradient=True), (WIDE,), exact=False),
        Check(curved(ToPoincare(ball())), (number(-0.2), WIDE)),
    ],
}  # fmt: skip
NOT_DIFFERENTIABLE = {
    "functional.HierarchicalTripletLoss": "what hierarchical_triplet_loss returns",
    "functional.reciprocal_triplets": "returns indices",
    "Hierarchy": "a tree",
    "PoincareKNN": "for evaluation",
    "ReciprocalNeighborMiner": "returns indices",
    "metrics": "numbers of NumPy",
}


def test_every_public_function_is_checked():
    """A new one fails here, until it has its line above."""
    public = {f"{m.__name__.split('.')[-1]}.{name}" for m in (poincare, functional) for name in m.__all__}
    public |= {name for name in hierloss.__all__ if name not in ("poincare", "functional")}
    assert public == CHECKS.keys() | NOT_DIFFERENTIABLE.keys()


CASES = [pytest.param(c, id=f"{name}-{i}") for name, checks in CHECKS.items() for i, c in enumerate(checks)]


@pytest.mark.parametrize("check", [case for case in CASES if case.values[0].exact])
def test_gradient(check):
    assert gradcheck(check.function, check.inputs)


@pytest.mark.parametrize("check", CASES)
def test_gradient_of_the_gradient(check):
    if check.twice:
        assert gradgradcheck(check.function, check.inputs)
        return
    grads = torch.autograd.grad(check.function(*check.inputs).sum(), check.inputs, create_graph=True)
    assert all(grad.abs().max() > 0 for grad in grads)
    with pytest.raises(RuntimeError, match="the HIER loss can be differentiated once only"):
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), check.inputs)


def test_straight_through_gradient_is_that_of_its_soft_choice():
    """With draws fixed, the gradient is that of distances to hard ancestors plus fixed distances to soft ones."""
    noise = -torch.log(
        -torch.log(torch.rand(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    )
    start, margin, temperature = DISTANCES.detach(), 0.5, 0.4
    losses, ancestors = functional.hierarchical_triplet_loss(
        DISTANCES, TRIPLETS, noise=noise, margin=margin, temperature=temperature
    )
    (actual,) = torch.autograd.grad(losses.sum(), DISTANCES)
    near, far = (start[TRIPLETS, ancestors[side]] for side in (0, 1))
    signs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64).unsqueeze(1)
    slopes = signs * ((near - far) * signs + margin > 0) * (ancestors[0] != ancestors[1])
    assert 6 < (slopes != 0).sum() < slopes.numel() - 3

    def surrogate(distances):
        total = 0
        of_three = distances[TRIPLETS]  # (3, T, P)
        for sign, points, side in ((1, 2, 0), (-1, 3, 1)):
            soft = (noise[side] - of_three[:points].amax(0) / temperature).softmax(-1)
            hard = distances[TRIPLETS, ancestors[side]]
            total = total + sign * (slopes * (hard + (start[TRIPLETS] * soft).sum(-1))).sum()
        return total

    step = 1e-6
    expected = torch.zeros_like(start)
    for cell in range(start.numel()):
        moved = torch.zeros_like(start)
        moved.view(-1)[cell] = step
        expected.view(-1)[cell] = (surrogate(start + moved) - surrogate(start - moved)) / (2 * step)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def twice(function, x):
    """Gradient of a sum of the results, and of a weighted sum of that gradient."""
    x = x.detach().requires_grad_()
    out = function(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((grad * torch.linspace(1, 2, grad.numel()).view_as(grad)).sum(), x)
    return grad.detach(), second


@pytest.mark.parametrize("name", ["distance", "pairwise_distance"])
@pytest.mark.parametrize("radius", [0.0, 1e-30, 0.3, 1.0, 1e10])
def test_coincident_points_can_be_differentiated_twice(name, radius):
    """The distance has a kink there: gradient 0 is the middle of all, and what it changes by is taken as 0 too."""
    x = rows(4)[1:].detach() * radius
    function = getattr(poincare, name)
    grad, second = twice(lambda t: function(t, x, 1.0)[..., :1], x[:1])
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.equal(second, torch.zeros_like(second))
    for derivative in twice(lambda t: function(t, t, 1.0), x):
        assert derivative.isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-110, 1e-30, 1e-12, 1e-7])
@pytest.mark.parametrize("name", ["clip_norm", "exp_map0", "log_map0", "project"])
def test_linear_norm_keeps_the_origin_exact(name, size):
    """The identity to second order; without linear_norm, rounding makes the second derivative 1e15 at 1e-30."""
    x = rows(3)[1:].detach() * size
    function = getattr(poincare, name)
    assert torch.equal(function(x, 1.3), x) or size > 1e-8
    grad, second = twice(lambda t: function(t, 1.3), x)
    torch.testing.assert_close(grad, torch.ones_like(grad), rtol=0, atol=1e-12)
    assert second.abs().max() <= 1e-5


@pytest.mark.parametrize("size", [0.0, 1e-110, 1e-90])
def test_min_norm_lets_the_origin_be_differentiated_twice(size):
    """Distances from a point that is not the origin are smooth there: all as at 1e-9 from it."""
    y = rows(3, seed=1, scale=0.7)[1:].detach()
    for function in (
        lambda t: poincare.distance(t, y, 1.0),
        lambda t: poincare.pairwise_distance(t, y, 1.0),
        lambda t: poincare.to_hyperboloid(t, 1.0),
        lambda t: poincare.from_hyperboloid(on_hyperboloid(t, 1.0), 1.0),
    ):
        near = twice(function, rows(3)[1:].detach() * 1e-9)
        torch.testing.assert_close(twice(function, rows(3)[1:].detach() * size), near, rtol=1e-6, atol=1e-6)


def test_a_bound_of_the_norm_can_be_differentiated_twice_everywhere():
    """Rows inside, at and beyond the clip radius, and the origin."""
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.6, 0.8], [6.0, 8.0]], dtype=torch.float64)
    for radius in (1e-30, 1.0, math.inf):
        for derivative in twice(lambda t, radius=radius: poincare.clip_norm(t, min(radius, 1e30)), x):
            assert derivative.isfinite().all()
