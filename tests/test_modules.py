"""ToPoincare and FromPoincare as layers of a network."""

import geoopt
import pytest
import torch

from hierloss import FromPoincare, ToPoincare, poincare


def features(scale=1.0):
    return (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()


@pytest.mark.parametrize("clip_radius", [None, 1.0])
def test_to_poincare_is_the_clipped_exponential_map(clip_radius):
    v = features(2.0)
    expected = poincare.exp_map0(poincare.clip_norm(v.double(), clip_radius), 0.3).float()
    x = ToPoincare(c=0.3, clip_radius=clip_radius)(v)
    assert torch.equal(x, expected)
    ball = geoopt.PoincareBall(c=0.3)
    largest = ball.dist0(x).max()
    assert (largest <= 2.0 + 1e-5) == (clip_radius is not None)


def test_from_poincare_inverts_it():
    v = features(0.5)
    torch.testing.assert_close(FromPoincare(c=0.3)(ToPoincare(c=0.3)(v)), v, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("c", [0.1, 10.0])
def test_the_largest_norm_in_float32(c):
    """docs/numerics.md: about 7.6 / sqrt(c)."""
    far = torch.full((1, 4), 100.0 / c**0.5)
    back = FromPoincare(c)(ToPoincare(c, clip_radius=None)(far))
    assert float(back.norm()) * c**0.5 == pytest.approx(7.6, abs=0.1)


def test_riemannian_gradient():
    grads = []
    for option in (False, True):
        v = features(0.5)
        x = ToPoincare(c=0.3, riemannian_gradient=option)(v)
        x.retain_grad()
        x.sum().backward()
        grads.append((x.detach(), v.grad))
    (x, plain), (_, scaled) = grads
    _, jacobian = torch.func.vjp(lambda t: poincare.exp_map0(t, 0.3), features(0.5).detach())
    upstream = (1 - 0.3 * x.square().sum(1, keepdim=True)) ** 2 / 4
    torch.testing.assert_close(scaled, jacobian(upstream.expand_as(x))[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(scaled, plain)
    c = torch.tensor(0.3, requires_grad=True)
    (grad,) = torch.autograd.grad(poincare.riemannian_gradient(v, c).square().sum(), v, create_graph=True)
    assert torch.autograd.grad(grad.sum(), c, allow_unused=True) == (None,)


@pytest.mark.parametrize("module", [ToPoincare, FromPoincare])
def test_learnable_curvature(module):
    layer = module(c=geoopt.PoincareBall(c=0.3, learnable=True))
    layer(features(0.5)).sum().backward()
    (parameter,) = layer.parameters()
    assert parameter.grad.abs() > 0
    other = module(c=geoopt.PoincareBall(c=0.9, learnable=True))
    other.load_state_dict(layer.state_dict())
    assert float(other.c) == pytest.approx(0.3)


def test_output_is_float32_under_autocast():
    v = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.nn.Sequential(torch.nn.Linear(4, 4), ToPoincare())(v)
    assert x.dtype == torch.float32
    assert list(ToPoincare().state_dict()) == []


@pytest.mark.parametrize("module", [ToPoincare, FromPoincare])
def test_bad_arguments(module):
    with pytest.raises(ValueError, match="c must be a finite positive number, got 0"):
        module(c=0)
    with pytest.raises(TypeError, match=r"c must be a positive number or a geoopt.PoincareBall, got NoneType"):
        module(c=None)
    with pytest.raises(ValueError, match="clip_radius must be a finite positive number, got -1"):
        ToPoincare(clip_radius=-1)


def test_repr():
    assert (
        repr(ToPoincare(riemannian_gradient=True))
        == "ToPoincare(c=0.1, clip_radius=2.3, riemannian_gradient=True)"
    )
    assert [repr(module) for module in (FromPoincare(0.2), FromPoincare())] == [
        "FromPoincare(c=0.2)",
        "FromPoincare(c=0.1)",
    ]
