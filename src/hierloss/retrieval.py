"""Nearest neighbours on the Poincaré ball, for PML's evaluators and testers.

N queries, M references, D dimensions, k neighbours. Internally, points are on the ball of radius 1, in float64;
distances are scaled back at the end.
"""

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import poincare
from ._checks import check_count, check_finite, check_number
from .distances import PoincareDistance

Found = tuple[Tensor, Tensor, Tensor]  # distances (N, k), indices (N, k), whether they are proved correct (N,)
_EXTRA = 16  # candidates beyond k: more cost time in every search; with fewer, more queries are searched again
_CHUNK_CELLS = 2**22  # numbers that are processed at a time: 32 MB in float64


class PoincareKNN:
    """The k nearest references of every query in hyperbolic distance: a ``knn_func`` of PML.

    Exact: equal to sorting all distances in float64, with the lower index first where distances are equal.
    Candidates have the largest inner products of `poincare.lift_queries` and `poincare.lift_references`, found by
    FAISS in float32 where it is installed and the queries are on the CPU, otherwise by torch in float64. Their
    distances are sorted in float64. A bound on the rounding errors finds the queries that may have missed a nearer
    reference. These are searched again with more digits, and finally by all of their distances. Memory is
    ``O((N + M) D + N k)``.

    Give PML's testers and `InferenceModel` ``normalize_embeddings=False``, or they scale embeddings to norm 1.

    Args:
        distance: a `PoincareDistance`, for its curvature and its map onto the ball. Its ``power`` is not applied.
            Stored references follow changes of its attributes. If a subclass has others, call `train` again.
        index: an index of FAISS for approximate search: a factory string such as ``"HNSW32"``, or a function from
            the number of dimensions to an index by inner product. Candidates are sorted by exact distances.

    Example:
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        >>> calculator = AccuracyCalculator(include=("precision_at_1",), knn_func=PoincareKNN())
        >>> embeddings = torch.randn(100, 16)
        >>> distances, indices = PoincareKNN()(embeddings[:2], 3, embeddings)
        >>> indices[:, 0]
        tensor([0, 1])

    Source: that of `poincare.lift_references`; Higham, "Accuracy and Stability of Numerical Algorithms" (2002),
    section 3.1, for the error of an inner product.
    """

    def __init__(
        self, distance: PoincareDistance | None = None, index: str | Callable[[int], Any] | None = None
    ) -> None:
        distance = PoincareDistance() if distance is None else distance
        if not isinstance(distance, PoincareDistance):
            raise TypeError(f"distance must be a PoincareDistance, got {type(distance).__name__}")
        if not (index is None or isinstance(index, str) or callable(index)):
            raise TypeError(
                "index must be a factory string of FAISS, or a function from the number of dimensions to an "
                f"index, got {type(index).__name__}"
            )
        if index is not None and _faiss() is None:
            raise ModuleNotFoundError("index needs FAISS: install faiss-cpu, or leave index=None")
        self.distance = distance
        self._index = index
        self._embeddings: Tensor | None = None
        self._prepared: dict[Any, _References] = {}

    @torch.no_grad()
    def __call__(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Distances and indices of the nearest references of every query, both ``(N, k)``, nearest first.

        Args:
            query: finite embeddings of shape ``(N, D)``.
            k: number of neighbours.
            reference: finite embeddings of shape ``(M, D)``; those given to `train` and `add` if ``None``.
            ref_includes_query: the first N references are the queries. A query is not its own neighbour, but
                its duplicates are its neighbours.
        """
        check_finite("query", query)
        embeddings = self._embeddings if reference is None else reference
        if embeddings is None:
            raise ValueError("reference must be given, or stored by train(embeddings) before, got None")
        check_finite("reference", embeddings)
        if query.shape[1] != embeddings.shape[1]:
            raise ValueError(
                "query and reference must have the same number of columns, got shapes "
                f"{tuple(query.shape)} and {tuple(embeddings.shape)}"
            )
        # PML requests 0 neighbours if no two labels are equal.
        k = check_count("k", k, 0 if ref_includes_query else 1)
        most = len(embeddings) - ref_includes_query
        if k > most:
            besides = " besides the query itself" if ref_includes_query else ""
            raise ValueError(f"k must be at most {most}, the number of references{besides}, got {k}")
        c = check_number("c of the distance", poincare.as_number(self.distance.c))
        # The map onto the ball can change, a learnable curvature for instance, and the device of the queries.
        key = c, self.distance.clip_radius, self.distance.normalize_embeddings, query.device
        prepared = self._prepared if reference is None else {}
        if key not in prepared:
            points = _by_rows(self._on_unit_ball, embeddings.to(query.device))
            prepared = {key: _References(points, c, self._index)}
        if reference is None:
            self._prepared = prepared
        distances, indices = prepared[key].nearest(_by_rows(self._on_unit_ball, query), k + ref_includes_query)
        distances = distances.to(poincare.result_dtype(query, embeddings))
        # Imported here: PML's module imports FAISS, which is slow.
        from pytorch_metric_learning.utils.inference import return_results

        neighbors: tuple[Tensor, Tensor] = return_results(distances, indices, ref_includes_query)
        return neighbors

    def _on_unit_ball(self, embeddings: Tensor) -> Tensor:
        """The embeddings on the ball, scaled to the unit ball, in float64."""
        return poincare.unit_ball(self.distance.maybe_normalize(embeddings, dim=1), self.distance.c)

    def train(self, embeddings: Tensor) -> None:
        """Store references ``(M, D)``, in place of those stored before."""
        check_finite("embeddings", embeddings)
        self._embeddings, self._prepared = embeddings.detach().clone(), {}

    def add(self, embeddings: Tensor) -> None:
        """Store more references ``(M, D)``, behind those stored before."""
        check_finite("embeddings", embeddings)
        stored = [] if self._embeddings is None else [self._embeddings]
        self._embeddings, self._prepared = torch.cat([*stored, embeddings.detach()]), {}

    def save(self, filename: str | PathLike[str]) -> None:
        """Write the stored references to a file."""
        if self._embeddings is None:
            raise RuntimeError("there are no references to save; call train(embeddings) first")
        torch.save(self._embeddings, filename)

    def load(self, filename: str | PathLike[str]) -> None:
        """Store the references that `save` wrote, in place of those stored before."""
        self.train(torch.load(filename, "cpu", weights_only=True))


class _References:
    """References on the unit ball for one curvature, and the methods to search them, from fast to exact."""

    def __init__(self, points: Tensor, c: float, index: str | Callable[[int], Any] | None) -> None:
        self.points, self.c = points, c
        self.largest_time = 2 * _by_rows(poincare._lorentz_factor, points).amax().square() - 1
        self.index: Any = None
        if index is not None or (points.device.type == "cpu" and _faiss() is not None):
            self.index = _build_index(self._lifted(torch.float32).cpu().numpy(), index or "Flat")

    def _lifted(self, dtype: torch.dtype) -> Any:
        """The vectors whose inner products are searched."""
        farthest = float(self.largest_time.acosh())
        return _by_rows(lambda rows: poincare.lift_references(rows, 1.0, farthest).to(dtype), self.points)

    def nearest(self, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and indices, both of shape ``(N, k)``."""
        distances = points.new_empty(len(points), k)
        indices = points.new_empty((len(points), k), dtype=torch.long)
        searches = [self._search_all]  # the last one is the first to run
        if k + _EXTRA < len(self.points):
            searches.append(self._search_products)
            if self.index is not None:
                searches.append(self._search_index)
        rows = torch.arange(len(points), device=points.device)
        while len(rows):
            distances[rows], indices[rows], decided = searches.pop()(points[rows], k)
            rows = rows[~decided]
        return distances * (1 / self.c**0.5), indices

    def _search_index(self, points: Tensor, k: int) -> Found:
        """By FAISS: results of a flat index can be proved correct, those of other indexes are not checked."""
        query = poincare.lift_queries(points, 1.0)
        found = self.index.search(query.float().cpu().numpy(), k + _EXTRA)
        scores, candidates = (torch.from_numpy(array).to(points.device) for array in found)
        distances, indices = self._rank(points, candidates, k)
        if isinstance(self.index, _faiss().IndexFlat):
            return distances, indices, self._decided(query, distances, scores)
        return distances, indices, distances[:, -1].isfinite()  # some indexes find fewer than k

    def _search_products(self, points: Tensor, k: int) -> Found:
        """By inner products of all pairs, in float64."""
        query, lifted = poincare.lift_queries(points, 1.0), self._lifted(torch.float64)
        scores, candidates = _by_rows(lambda rows: (rows @ lifted.T).topk(k + _EXTRA), query, width=len(lifted))
        distances, indices = self._rank(points, candidates, k)
        return distances, indices, self._decided(query, distances, scores)

    def _search_all(self, points: Tensor, k: int) -> Found:
        """By the distances of all pairs."""

        def rank(rows: Tensor) -> tuple[Tensor, Tensor]:
            distances, indices = _pairwise_distance(rows, self.points).sort(stable=True)
            return distances[:, :k], indices[:, :k]

        distances, indices = _by_rows(rank, points, width=len(self.points))
        return distances, indices, torch.ones_like(points[:, 0], dtype=torch.bool)

    def _rank(self, points: Tensor, candidates: Tensor, k: int) -> Any:
        """The k nearest of the candidates of each point, from their distances; -1 means no candidate."""

        def rank(rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            chosen = chosen.sort().values  # so that a stable sort puts the lower index first
            distances = _pairwise_distance(rows.unsqueeze(1), self.points[chosen]).squeeze(1)
            distances, order = distances.masked_fill(chosen < 0, torch.inf).sort(stable=True)
            return distances[:, :k], chosen.gather(1, order[:, :k])

        return _by_rows(rank, points, candidates, width=candidates.shape[1] * points.shape[1])

    def _decided(self, query: Tensor, distances: Tensor, scores: Tensor) -> Tensor:
        """Whether it is proved that all references as near as the k-th neighbour are candidates.

        Let ``t`` be time coordinates and ``d`` the distance of the k-th neighbour. A reference as near as that
        has an inner product of at least ``-cosh(d)``, and, by the triangle inequality, a time coordinate of at
        most ``cosh(arcosh(t_q) + d)``. The product of the lengths of the two vectors is less than ``2 t_q t``.
        The error of their inner product is at most that times ``(D + 1)`` units in the last place, apart from
        rounding of the vectors. If ``-cosh(d)`` exceeds the lowest score by more, the reference is a candidate.
        """
        time, last = -query[:, -2], distances[:, -1]
        farthest = time * last.cosh() + (time.square() - 1).clamp_min(0).sqrt() * last.sinh()
        farthest = farthest.minimum(self.largest_time)
        # eps is two units; 8 extra dimensions cover the rounding of the vectors, and of this computation
        error = (query.shape[1] + 8) * torch.finfo(scores.dtype).eps * 2 * time * farthest
        return last.cosh() + error < -scores[:, -1]


def _pairwise_distance(x: Tensor, y: Tensor) -> Tensor:
    """Distances of all pairs on the unit ball, as exact as `poincare.distance`: ``|x - y|`` from differences."""
    gap = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return 2 * (gap * poincare._lorentz_factor(x) * poincare._lorentz_factor(y).mT).asinh()


def _build_index(vectors: "np.ndarray[Any, Any]", index: str | Callable[[int], Any]) -> Any:
    """A FAISS index that contains the vectors."""
    faiss, size = _faiss(), vectors.shape[1]
    built = index(size) if callable(index) else faiss.index_factory(size, index, faiss.METRIC_INNER_PRODUCT)
    if built.metric_type != faiss.METRIC_INNER_PRODUCT or built.d != size or built.ntotal:
        raise ValueError(
            f"index must make an empty index of {size} dimensions, embedding_size + 2, by METRIC_INNER_PRODUCT; "
            f"got one of {built.d} dimensions by metric {built.metric_type} with {built.ntotal} vectors"
        )
    if not built.is_trained:
        built.train(vectors)
    built.add(vectors)
    return built


def _faiss() -> Any:
    """FAISS, or ``None`` where it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        return None
    return faiss


def _by_rows(function: Callable[..., Any], *tensors: Tensor, width: int | None = None) -> Any:
    """``function(*tensors)``, in chunks of rows that fit into the cache, at ``width`` numbers for each row."""
    rows = max(1, _CHUNK_CELLS // (width or 8 * tensors[0].shape[1]))
    parts = [function(*chunks) for chunks in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
