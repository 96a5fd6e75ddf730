"""Hyperbolic search in a vector store: vectors to store and to query with, and the order by exact distance.

The store searches by inner product (``dot``, ``ip``) and does not normalize vectors. These are explained in
`poincare.lift_references` and `poincare.lift_queries`.
"""

import numpy as np
import torch
from torch import Tensor

from . import poincare
from ._checks import check_finite, check_number
from .distances import PoincareDistance

__all__ = ["query_vectors", "rerank", "stored_vectors"]


@torch.no_grad()
def stored_vectors(embeddings: Tensor, distance: PoincareDistance) -> Tensor:
    """Vectors to store, ``(N, D + 2)`` in float32, from finite embeddings ``(N, D)``.

    Without a ``clip_radius``, or with points on the ball, give all embeddings in one call: only then have all
    vectors the same length, which approximate indexes need. After a learned curvature has changed, store all anew.

    Example:
        >>> stored_vectors(torch.randn(5, 16), PoincareDistance()).shape
        torch.Size([5, 18])
    """
    points = _points("embeddings", embeddings, distance)
    radius = distance.clip_radius if distance.normalize_embeddings else None
    farthest = None if radius is None else 2 * radius
    return poincare.lift_references(points, distance.c, farthest).float()


@torch.no_grad()
def query_vectors(query: Tensor, distance: PoincareDistance) -> Tensor:
    """Vectors to query with, ``(N, D + 2)`` in float32, from finite embeddings ``(N, D)``.

    Scores do not order near duplicates. So request more candidates than neighbours, 16 for instance, and `rerank`
    them.

    Example:
        >>> query_vectors(torch.randn(5, 16), PoincareDistance()).shape
        torch.Size([5, 18])
    """
    return poincare.lift_queries(_points("query", query, distance), distance.c).float()


@torch.no_grad()
def rerank(query: Tensor, candidates: Tensor | np.ndarray, distance: PoincareDistance) -> tuple[Tensor, Tensor]:
    r"""Order the candidates of each query by hyperbolic distance, in float64 from the float32 vectors.

    The float32 rounding of a vector at distance ``d`` from the origin changes distances by up to
    :math:`2^{-25} e^{\sqrt c\,d} / \sqrt c`: 4e-7 at the default clip radius, much more far beyond it.

    Args:
        query: finite embeddings of shape ``(N, D)``.
        candidates: the stored vectors that the store found, a tensor or array of shape ``(N, K, D + 2)``.
        distance: the same as for `stored_vectors`.

    Returns:
        Distances, nearest first, and positions among the candidates, both of shape ``(N, K)``.

    Example:
        >>> distance, embeddings = PoincareDistance(), torch.tensor([[0.0, 0.1], [1.0, 0.0], [0.0, 0.2]])
        >>> rerank(embeddings[:1], stored_vectors(embeddings, distance).unsqueeze(0), distance)[1]
        tensor([[0, 2, 1]])
    """
    x = _points("query", query, distance)
    if not isinstance(candidates, Tensor):
        candidates = torch.from_numpy(np.array(candidates, np.float64))
    n, columns, shape = len(query), query.shape[1] + 2, tuple(candidates.shape)
    if len(shape) != 3 or shape[::2] != (n, columns):
        raise ValueError(f"candidates must have shape ({n}, K, {columns}), of stored_vectors, got shape {shape}")
    space = poincare.working(candidates[..., :-2].to(query.device))
    # The stored time is rounded to float32, which would move points far from the origin.
    time = (space.square().sum(-1, keepdim=True) + 1 / distance.c).sqrt()
    y = poincare.from_hyperboloid(torch.cat([space, time], -1), distance.c)
    distances, order = poincare.distance(x.unsqueeze(1), y, distance.c).sort(stable=True)
    return distances.to(poincare.result_dtype(query)), order


def _points(name: str, embeddings: Tensor, distance: PoincareDistance) -> Tensor:
    """The embeddings on the ball."""
    if not isinstance(distance, PoincareDistance):
        raise TypeError(f"distance must be a PoincareDistance, got {type(distance).__name__}")
    check_finite(name, embeddings)
    check_number("c of the distance", poincare.as_number(distance.c))
    points: Tensor = distance.maybe_normalize(embeddings, dim=-1)
    return points
