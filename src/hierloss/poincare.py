r"""The Poincaré ball: maps, distances, and the lift to the hyperboloid. Pure functions of tensors.

Conventions of this file
    - ``c > 0`` is a number or a tensor of one element; the curvature is ``-c``, the radius ``1 / sqrt(c)``.
    - ``x, y`` are points on the ball, ``v`` tangent vectors at the origin, of shape ``(..., D)``. Points on or
      outside the boundary are projected inside first.
    - Coordinates are computed in float64, because float32 has too few digits near the boundary. Devices without
      float64 use float32. Results have the dtype of the input, and at least float32.

Sources: Ganea, Bécigneul, Hofmann, "Hyperbolic Neural Networks" (2018), lemma 2, for the maps; Ratcliffe,
"Foundations of Hyperbolic Manifolds", section 4.5, for distance and hyperboloid.
"""

import math
from functools import reduce

import torch
from torch import Tensor

from ._checks import check_number

__all__ = [
    "clip_norm",
    "distance",
    "exp_map0",
    "from_hyperboloid",
    "lift_queries",
    "lift_references",
    "log_map0",
    "pairwise_distance",
    "project",
    "riemannian_gradient",
    "to_hyperboloid",
]

_CHUNK_CELLS = 2**18  # of a distance matrix at a time: 2 MB in float64; twice as many on a GPU, for fewer launches


def boundary_eps(dtype: torch.dtype) -> float:
    """Least distance from the boundary, as a share of the radius: after rounding, ``1 - c|x|^2`` is positive."""
    return 4 * torch.finfo(dtype).eps


def min_norm(dtype: torch.dtype) -> float:
    """The norm below which a vector counts as 0: second derivatives divide by its cube, a subnormal number."""
    return float(torch.finfo(dtype).tiny ** (1 / 3))


def linear_norm(dtype: torch.dtype) -> float:
    """The norm ``n`` below which ``tanh(n) / n`` is 1 in every digit, and its derivatives are rounding errors."""
    return math.sqrt(torch.finfo(dtype).eps) / 2


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a result: that of the inputs, and at least float32."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype that coordinates are computed in."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def as_number(c: float | Tensor) -> float:
    """``c`` as a number; float() of a learnable tensor gives a warning."""
    return float(c.item() if isinstance(c, Tensor) else c)


def _sqrt(c: float | Tensor, like: Tensor) -> Tensor:
    """``sqrt(c)`` as a 0-dim tensor of the dtype of ``like``."""
    if isinstance(c, Tensor):
        if c.numel() != 1:
            raise ValueError(f"c must have one element, one curvature for all points, got shape {tuple(c.shape)}")
        root: Tensor = c.to(like.dtype).reshape(()).sqrt()
        return root + 0 * root  # NaN if c is infinite: such a ball has no points
    return like.new_full((), math.sqrt(check_number("c", c)))


def _norm(x: Tensor, least: float | None = None) -> Tensor:
    """Norm of the rows, as a column, never 0, twice differentiable at the origin, unlike torch's own norm."""
    return x.square().sum(-1, keepdim=True).clamp_min((least or min_norm(x.dtype)) ** 2).sqrt()


def _lorentz_factor(x: Tensor) -> Tensor:
    """The Lorentz factor ``1 / sqrt(1 - |x|^2)`` of points ``x`` of the unit ball, as a column."""
    return (1 - x.square().sum(-1, keepdim=True)).rsqrt()


def clip_norm(v: Tensor, radius: float | None) -> Tensor:
    """Limit the norms of the rows: ``v * min(1, radius / |v|)``; ``None`` is no limit.

    Example:
        >>> clip_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])

    Source: Guo et al., "Clipped Hyperbolic Classifiers Are Super-Hyperbolic Classifiers" (CVPR 2022).
    """
    if radius is None:
        return v.to(result_dtype(v))
    check_number("radius", radius, positive=False)
    w = working(v)
    return (w * (radius / _norm(w).clamp_min(radius))).to(result_dtype(v))


def project(x: Tensor, c: float | Tensor) -> Tensor:
    """Move points on or outside the boundary to the inside, to ``sqrt(c)|x| = 1 - boundary_eps``.

    Example:
        >>> project(torch.tensor([[2.0, 0.0], [0.5, 0.0]]), c=1.0)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.0000]])
    """
    w = working(x)
    return (w * _inside(_sqrt(c, w) * w, result_dtype(x))).to(result_dtype(x))


def _inside(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The factors, at most 1, that bring points of the unit ball inside the boundary."""
    largest = 1 - boundary_eps(dtype)
    return largest / _norm(x, largest)


def exp_map0(v: Tensor, c: float | Tensor, clip_radius: float | None = None) -> Tensor:
    r"""Exponential map at the origin: points at hyperbolic distance ``2|v|`` from it, strictly inside the ball.

    .. math:: \exp_0(v) = \tanh(\sqrt c\,|v|) \frac{v}{\sqrt c\,|v|}

    With ``clip_radius``, the norms are first limited to this value, see `clip_norm`.

    Example:
        >>> exp_map0(torch.tensor([[1.0, 0.0]]), c=1.0)
        tensor([[0.7616, 0.0000]])
    """
    w = working(v)
    norm = _norm(w)
    factor: float | Tensor = 1.0
    if clip_radius is not None:
        check_number("clip_radius", clip_radius, positive=False)
        factor, norm = clip_radius / norm.clamp_min(clip_radius), norm.clamp_max(clip_radius)
    norm = (_sqrt(c, w) * norm).clamp_min(linear_norm(w.dtype))
    tanh = norm.tanh().clamp_max(1 - boundary_eps(result_dtype(v)))
    return (w * (tanh / norm * factor)).to(result_dtype(v))


def log_map0(x: Tensor, c: float | Tensor) -> Tensor:
    r"""Logarithmic map at the origin, the inverse of `exp_map0`.

    .. math:: \log_0(x) = \operatorname{artanh}(\sqrt c\,|x|) \frac{x}{\sqrt c\,|x|}

    Example:
        >>> log_map0(exp_map0(torch.tensor([[0.3, -0.4]]), c=0.1), c=0.1)
        tensor([[ 0.3000, -0.4000]])
    """
    w = working(project(x, c))
    norm = _norm(_sqrt(c, w) * w, linear_norm(w.dtype))
    return (w * (norm.atanh() / norm)).to(result_dtype(x))


def unit_ball(x: Tensor, c: float | Tensor) -> Tensor:
    """The points in working precision, scaled to the unit ball and kept inside it."""
    w = working(x)
    w = w * _sqrt(c, w)
    return w * _inside(w, result_dtype(x))


def distance(x: Tensor, y: Tensor, c: float | Tensor) -> Tensor:
    r"""Hyperbolic distance of corresponding points.

    .. math:: d(x, y) = \frac{2}{\sqrt c} \operatorname{arsinh}
        \frac{\sqrt c\,|x - y|}{\sqrt{(1 - c|x|^2)(1 - c|y|^2)}}

    The shapes ``(..., D)`` of ``x`` and ``y`` broadcast, to ``(...)``. The gradient at coincident points is 0.

    Example:
        >>> distance(torch.tensor([[0.5, 0.0]]), torch.tensor([[-0.5, 0.0]]), c=1.0)
        tensor([2.1972])
    """
    p, q = unit_ball(x, c), unit_ball(y, c)
    gap = _norm(p - q)
    gap = gap.masked_fill(gap <= min_norm(p.dtype), 0)  # first and second derivatives are set to 0 here
    ratio = gap * (_lorentz_factor(p) * _lorentz_factor(q))
    return (2 / _sqrt(c, p) * ratio.asinh()).squeeze(-1).to(result_dtype(x, y))


def pairwise_distance(x: Tensor, y: Tensor, c: float | Tensor, dtype: torch.dtype | None = None) -> Tensor:
    r"""Hyperbolic distances of all pairs, by matrix products without cancellation errors, in ``O(NM)`` memory.

    Shapes: ``(..., N, D)`` and ``(..., M, D)`` to ``(..., N, M)``, in ``dtype``, by default that of the points. In
    float32 it is as exact as `distance`; in float64, points closer than about 1e-10 of the largest coordinate
    count as equal. docs/numerics.md compares it with geoopt and with ``torch.cdist``.

    Example:
        >>> x = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
        >>> pairwise_distance(x, x, c=1.0)
        tensor([[0.0000, 1.0986],
                [1.0986, 0.0000]])

    Source: the Gram matrix without cancellation follows Ozaki, Ogita, Oishi, Rump, "Error-free transformations of
    matrix multiplication" (Numerical Algorithms, 2012).
    """
    p = unit_ball(x, c)
    return unit_ball_distance(p, p if y is x else unit_ball(y, c), c, dtype or result_dtype(x, y))


def unit_ball_distance(p: Tensor, q: Tensor, c: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`pairwise_distance` of points that `unit_ball` returned."""
    result: Tensor = _PairwiseDistance.apply(p, q, 2 / _sqrt(c, p), dtype)
    return result


def _squared_euclidean(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs; ``scale`` is the largest absolute coordinate.

    Each coordinate is split into a part on a coarse grid, whose inner products are exact, and a small remainder:
    ``|x-y|^2 = |qx-qy|^2 + (corrections with the remainders)``. Cancellation occurs only in the first term.
    """
    dim, eps = x.shape[-1], torch.finfo(x.dtype).eps
    digits = 1 - round(math.log2(eps))
    bits = (digits - 2 - math.ceil(math.log2(max(dim, 2)))) // 2  # sums of 4 * dim products are then exact
    # Adding and subtracting a large number rounds to a multiple of its last place.
    shift = scale * 2.0 ** (digits - bits)
    qx, qy = (x + shift) - shift, (y + shift) - shift
    rx, ry = x - qx, y - qy
    exact = qx.square().sum(-1, keepdim=True) + qy.square().sum(-1).unsqueeze(-2)
    exact.sub_(qx @ qy.mT, alpha=2)
    exact += ((x + qx) * rx).sum(-1, keepdim=True) + ((y + qy) * ry).sum(-1).unsqueeze(-2)
    exact.sub_(torch.cat([x, rx], -1) @ torch.cat([ry, qy], -1).mT, alpha=2)
    coincident_eps = 4 * dim * eps * 2.0**-bits  # the rounding error for equal points, relative to scale squared
    return exact.masked_fill_(exact < coincident_eps * scale.square(), 0)


class _PairwiseDistance(torch.autograd.Function):
    """``diameter * arsinh(|x-y| fx fy)`` for all pairs. Only this matrix is saved; backward is products."""

    @staticmethod
    def forward(x, y, diameter, dtype):  # type: ignore[no-untyped-def]
        scale = torch.maximum(_largest(x), _largest(y))
        factor = _lorentz_factor(y).mT
        chunks = []
        for (rows,) in _row_chunks(y.shape[-2], x):
            ratio = _squared_euclidean(rows, y, scale).sqrt_().mul_(_lorentz_factor(rows)).mul_(factor).to(dtype)
            # arsinh, in a fast form without cancellation near 0
            root = ratio.square().add_(1).sqrt_().add_(1)
            # Not mul_: compiled by torch 2.11, a result that was changed in place has no gradient.
            chunks.append(ratio.addcmul_(ratio, ratio / root).log1p_() * diameter)
        return torch.cat(chunks, -2) if len(chunks) > 1 else chunks[0]

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:-1], output)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, y, diameter, out = ctx.saved_tensors
        grad_x, grad_y, grad_diameter = [], 0, torch.zeros_like(diameter)
        fy2 = _lorentz_factor(y).square()
        scaled_y = torch.cat([fy2 * y, fy2], -1)
        for rows, g, out_rows in _row_chunks(y.shape[-2], x, grad, out):
            half = out_rows / diameter
            # Divided by the diameter, the derivative by |x-y| gives fx^2 fy^2 w (x - y); that by fx gives t / fx,
            # and dfx/dx = fx^3 x.
            fx2, t = _lorentz_factor(rows).square(), g * half.tanh()
            w = 2 * g / (2 * half).sinh().masked_fill(half == 0, math.inf).to(x.dtype)
            wy, wx = w @ scaled_y, w.mT @ torch.cat([fx2 * rows, fx2], -1)
            grad_x.append(fx2 * ((wy[..., -1:] + t.sum(-1, keepdim=True)) * rows - wy[..., :-1]))
            grad_y = grad_y + fy2 * ((wx[..., -1:] + t.sum(-2).unsqueeze(-1)) * y - wx[..., :-1])
            if ctx.needs_input_grad[2]:
                grad_diameter = grad_diameter + (g * half).sum(dtype=x.dtype)
        return diameter * torch.cat(grad_x, -2), diameter * grad_y, grad_diameter, None


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value, 0 if there is none; a NaN affects its own row only."""
    return x.nan_to_num(nan=0.0).abs().amax() if x.numel() else x.new_zeros(())


def _row_chunks(width: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of all tensors, as many at a time as `_CHUNK_CELLS` allows for a result of this width."""
    cells = _CHUNK_CELLS if tensors[0].device.type == "cpu" else 2 * _CHUNK_CELLS
    rows = max(1, cells // max(1, width))
    return list(zip(*(tensor.split(rows, -2) for tensor in tensors), strict=True))


def to_hyperboloid(x: Tensor, c: float | Tensor) -> Tensor:
    r"""Lift points of the ball to the hyperboloid ``-t^2 + |s|^2 = -1/c``; the time ``t`` comes last.

    .. math:: s = \frac{2x}{1 - c|x|^2}, \qquad t = \frac{1}{\sqrt c} \frac{1 + c|x|^2}{1 - c|x|^2}

    For lifted points ``(..., D + 1)``, ``cosh(sqrt(c) d(x, y)) = c (t_x t_y - <s_x, s_y>)``.

    Example:
        >>> to_hyperboloid(torch.tensor([[0.5, 0.0]]), c=1.0)
        tensor([[1.3333, 0.0000, 1.6667]])
    """
    p = unit_ball(x, c)
    factor = 2 * _lorentz_factor(p).square()
    return (torch.cat([factor * p, factor - 1], -1) / _sqrt(c, p)).to(result_dtype(x))


def from_hyperboloid(points: Tensor, c: float | Tensor) -> Tensor:
    r"""Points of the ball ``(..., D)`` from those of the hyperboloid ``(..., D + 1)``, time last.

    .. math:: x = \frac{s}{1 + \sqrt c\,t}

    Example:
        >>> from_hyperboloid(torch.tensor([[4 / 3, 0.0, 5 / 3]]), c=1.0)
        tensor([[0.5000, 0.0000]])
    """
    w = working(points)
    space, time = w.tensor_split([-1], -1)
    # 0 * time is NaN for an infinite time: without it, the result would be the origin.
    return project((space / (1 + _sqrt(c, w) * time + 0 * time)).to(result_dtype(points)), c)


def lift_references(x: Tensor, c: float | Tensor, max_distance: float | None = None) -> Tensor:
    r"""Vectors ``(..., D + 2)`` to store for hyperbolic search by inner product, in FAISS or a vector store.

    .. math:: y' = \left(s_y,\; t_y,\; \sqrt{L^2 - |s_y|^2 - t_y^2}\right)

    with ``(s, t)`` of `to_hyperboloid`. The nearest references have the greatest inner products with a vector of
    `lift_queries`. The last coordinate does not change them, but gives all vectors the length ``L``: graphs of
    neighbours such as HNSW need one length. ``max_distance`` is the largest distance from the origin of all points
    that are stored together: by default that of ``x``, for embeddings of a `PoincareDistance` ``2 * clip_radius``.

    Example:
        >>> references = lift_references(torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.8, 0.0]]), c=1.0)
        >>> (lift_queries(torch.tensor([[0.6, 0.0]]), c=1.0) @ references.T).argmax()
        tensor(1)

    Source: Nickel, Kiela, "Learning Continuous Hierarchies in the Lorentz Model" (ICML 2018), equation 5;
    Bachrach et al., "Speeding Up the Xbox Recommender System" (RecSys 2014) for the last coordinate.
    """
    lifted = to_hyperboloid(x, c)
    squared = lifted.square().sum(-1, keepdim=True)
    if max_distance is None:
        longest = _largest(squared)
    else:
        root = _sqrt(c, lifted)
        farthest = 2 * math.atanh(1 - boundary_eps(lifted.dtype))  # of any point from the origin, for c = 1
        longest = (2 * (root * max_distance).clamp_max(farthest)).cosh() / root.square()
    rest = (longest - squared).clamp_min(min_norm(squared.dtype) ** 2)  # at 0, the root has no gradient
    return torch.cat([lifted, rest.sqrt()], -1)


def lift_queries(x: Tensor, c: float | Tensor) -> Tensor:
    r"""Query vectors ``(..., D + 2)`` for a search among stored vectors of `lift_references`.

    .. math:: x'' = c\,(s_x,\; -t_x,\; 0), \qquad \langle x'', y' \rangle = -\cosh(\sqrt c\,d(x, y))

    The distance is ``arcosh(-score) / sqrt(c)``. Float32 scores have too few digits for near pairs, and far from
    the origin for all pairs: request more candidates than needed, and sort them by `distance`.

    Example:
        >>> query, reference = torch.tensor([[0.6, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> score = lift_queries(query, c=1.0) @ lift_references(reference, c=1.0).T
        >>> (-score).acosh(), distance(query, reference, c=1.0)
        (tensor([[1.3863]]), tensor([1.3863]))
    """
    lifted = to_hyperboloid(x, c)
    space, time = (_sqrt(c, lifted).square() * lifted).tensor_split([-1], -1)
    return torch.cat([space, -time, torch.zeros_like(time)], -1)


def riemannian_gradient(x: Tensor, c: float | Tensor) -> Tensor:
    r"""The identity, whose backward pass turns the Euclidean gradient into the Riemannian one.

    .. math:: \nabla^{\mathrm{riem}} = \frac{(1 - c|x|^2)^2}{4} \nabla

    ``c`` receives no gradient. The factor is 0 on the boundary and outside.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> riemannian_gradient(x, c=1.0).sum().backward()
        >>> x.grad
        tensor([[0.2500, 0.2500]])

    Source: Nickel, Kiela, "Poincaré Embeddings for Learning Hierarchical Representations" (2017), equation 3.
    """
    if not x.requires_grad:
        return x
    w = working(x)
    scale = (1 - (_sqrt(c, w).detach() * w).square().sum(-1, keepdim=True)).clamp_min(0).square() / 4
    same = x.view_as(x)
    same.register_hook(lambda grad: (grad * scale).to(grad.dtype))
    return same
