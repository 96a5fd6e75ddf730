"""Layers onto the Poincaré ball and back."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import poincare
from ._checks import check_curvature, check_number, current_c

if TYPE_CHECKING:
    import geoopt


class ToPoincare(torch.nn.Module):
    r"""Clipped exponential map at the origin, `poincare.exp_map0`, as the last layer of a network.

    .. math:: x = \exp_0(v \min(1, r / |v|))

    Shapes: ``(..., D)`` to ``(..., D)``, at least float32, also under autocast. Losses, miners and evaluators
    behind it, also `HIERLoss`, need ``PoincareDistance(normalize_embeddings=False)``, or points are mapped twice.

    Args:
        c: minus the curvature, a positive number; or a ``geoopt.PoincareBall``, also with learnable curvature.
        clip_radius: ``r``, the largest norm of an input; ``None`` for no limit. The output lies within
            hyperbolic distance ``2r`` of the origin.
        riemannian_gradient: scale the gradient by ``(1 - c|x|^2)^2 / 4``, 0.094 at the default clip radius, as the
            official HIER code does for both losses.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.Linear(16, 8), ToPoincare(c=0.1))
        >>> points = head(torch.randn(4, 16))  # of norm below 1 / sqrt(0.1)

    Source: Guo et al., "Clipped Hyperbolic Classifiers Are Super-Hyperbolic Classifiers" (CVPR 2022).
    """

    def __init__(
        self,
        c: "float | geoopt.PoincareBall" = 0.1,
        clip_radius: float | None = 2.3,
        riemannian_gradient: bool = False,
    ) -> None:
        super().__init__()
        self.curvature = check_curvature(c)
        self.clip_radius = None if clip_radius is None else check_number("clip_radius", clip_radius)
        self.riemannian_gradient = riemannian_gradient

    @property
    def c(self) -> float | Tensor:
        """Minus the curvature: a number, or the ball's tensor."""
        return current_c(self.curvature)

    def forward(self, v: Tensor) -> Tensor:
        x = poincare.exp_map0(v, self.c, self.clip_radius)
        return poincare.riemannian_gradient(x, self.c) if self.riemannian_gradient else x

    def extra_repr(self) -> str:
        riemannian = ", riemannian_gradient=True" if self.riemannian_gradient else ""
        return f"c={poincare.as_number(self.c):g}, clip_radius={self.clip_radius}{riemannian}"


class FromPoincare(torch.nn.Module):
    r"""Logarithmic map at the origin, `poincare.log_map0`, the inverse of `ToPoincare` within the clip radius.

    .. math:: v = \operatorname{artanh}(\sqrt c\,|x|) \frac{x}{\sqrt c\,|x|}

    Shapes: ``(..., D)`` to ``(..., D)``. ``c`` is as in `ToPoincare`.

    Example:
        >>> v = torch.tensor([[0.5, -1.0]])
        >>> FromPoincare(c=0.1)(ToPoincare(c=0.1)(v))
        tensor([[ 0.5000, -1.0000]])

    Source: Ganea, Bécigneul, Hofmann, "Hyperbolic Neural Networks" (NeurIPS 2018), lemma 2.
    """

    def __init__(self, c: "float | geoopt.PoincareBall" = 0.1) -> None:
        super().__init__()
        self.curvature = check_curvature(c)

    @property
    def c(self) -> float | Tensor:
        """Minus the curvature: a number, or the ball's tensor."""
        return current_c(self.curvature)

    def forward(self, x: Tensor) -> Tensor:
        return poincare.log_map0(x, self.c)

    def extra_repr(self) -> str:
        return f"c={poincare.as_number(self.c):g}"
