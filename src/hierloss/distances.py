"""Hyperbolic distance for any PML loss, miner or evaluator."""

from typing import TYPE_CHECKING, Any

import torch
from pytorch_metric_learning.distances import BaseDistance
from torch import Tensor

from . import poincare
from ._checks import check_curvature, check_number, current_c

if TYPE_CHECKING:
    import geoopt


class PoincareDistance(BaseDistance):  # type: ignore[misc]
    r"""Distance on the Poincaré ball of curvature ``-c``.

    .. math:: d(x, y) = \frac{2}{\sqrt c} \operatorname{arsinh}
        \frac{\sqrt c\,|x - y|}{\sqrt{(1 - c|x|^2)(1 - c|y|^2)}}

    Embeddings are Euclidean features by default. The map onto the ball replaces PML's normalization: norms are
    clipped to ``clip_radius``, and the exponential map at the origin is applied. The largest distance is ``4 *
    clip_radius``, 9.2 by default. Coordinates are computed in float64, also under autocast; distances have the
    dtype of the embeddings, and at least float32.

    Args:
        c: minus the curvature, a positive number; or a ``geoopt.PoincareBall``, also with learnable curvature
            (then give its parameters to the optimizer).
        clip_radius: largest norm of an embedding, ``None`` for no limit.
        normalize_embeddings: ``True`` for Euclidean features, ``False`` for points already on the ball.
        **kwargs: PML's options: ``power``, ``collect_stats``.

    Example:
        >>> from pytorch_metric_learning import losses
        >>> loss_func = losses.TripletMarginLoss(distance=PoincareDistance())
        >>> PoincareDistance(c=1.0)(torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
        tensor([[0., 1.],
                [1., 0.]])

    Source: Ganea, Bécigneul, Hofmann, "Hyperbolic Neural Networks" (NeurIPS 2018); Ermolov et al.,
    "Hyperbolic Vision Transformers" (CVPR 2022) for its use in metric learning.
    """

    def __init__(
        self,
        c: "float | geoopt.PoincareBall" = 0.1,
        clip_radius: float | None = 2.3,
        normalize_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(normalize_embeddings=normalize_embeddings, **kwargs)
        if self.is_inverted:
            raise ValueError("is_inverted must be False: a larger hyperbolic distance means less similar")
        if self.p != 2:
            raise ValueError(f"p must be 2: hyperbolic distances have no other norm, got {self.p}")
        self.curvature = check_curvature(c)
        self.clip_radius = None if clip_radius is None else check_number("clip_radius", clip_radius)

    @property
    def c(self) -> float | Tensor:
        """Minus the curvature: a number, or the ball's tensor."""
        return current_c(self.curvature)

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """Distances of all pairs, shape ``(N, M)``, of embeddings ``(N, D)`` and ``(M, D)``."""
        dtype = poincare.result_dtype(query_emb, query_emb if ref_emb is None else ref_emb)
        with torch.autocast(query_emb.device.type, enabled=False):
            mat: Tensor = super().forward(query_emb, ref_emb)
        return mat.to(dtype)

    def normalize(self, embeddings: Tensor, dim: int = -1, **_: Any) -> Tensor:
        """Points of the ball ``(..., D)`` in float64, from Euclidean features ``(..., D)``.

        PML passes ``dim``, the last dimension; any other raises a `ValueError`.
        """
        if dim not in (-1, embeddings.ndim - 1):
            raise ValueError(
                f"dim must be the last dimension, got {dim}: a loss that normalizes its own weights, such as "
                "NormalizedSoftmaxLoss, would map them to the ball twice; use ProxyNCALoss, which does not"
            )
        return poincare.exp_map0(poincare.working(embeddings), self.c, self.clip_radius)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """Distances of all pairs of points that are on the ball."""
        return poincare.pairwise_distance(query_emb, query_emb if ref_emb is None else ref_emb, self.c)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Distances of corresponding points that are on the ball."""
        return poincare.distance(query_emb, ref_emb, self.c)

    def extra_repr(self) -> str:
        on_ball = "" if self.normalize_embeddings else ", normalize_embeddings=False"
        return f"c={poincare.as_number(self.c):g}, clip_radius={self.clip_radius}{on_ball}"
