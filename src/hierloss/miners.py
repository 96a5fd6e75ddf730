"""Triplets of reciprocal nearest neighbours, for any PML loss."""

from typing import Any

import torch
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from . import functional
from ._checks import check_count
from .distances import PoincareDistance

__all__ = ["ReciprocalNeighborMiner"]


class ReciprocalNeighborMiner(BaseMiner):  # type: ignore[misc]
    r"""Triplets whose anchor and positive are among each other's nearest neighbours; HIER's miner.

    The similarity is :math:`S_{ab} = e^{-d(a, b)}`, plus 1 where the labels are equal. ``b`` is a neighbour of
    ``a`` if it is among the ``num_neighbors`` most similar to ``a``, where ``a`` itself counts as one. Every
    anchor with at least two reciprocal neighbours besides itself, and at least one other point, gives
    ``triplets_per_anchor`` triplets: positives are drawn uniformly from its reciprocal neighbours, negatives
    uniformly from all other points. Positives and negatives may thus be of any class.

    Called as any PML miner, ``miner(embeddings, labels)``, it returns ``(anchors, positives, negatives)``.
    Random numbers come from torch's default generator.

    The miner of a `HIERLoss` can find neighbours among other features than the embeddings that are trained: those
    of a frozen backbone, or the inputs themselves. Set ``features`` before the loss is called; it holds for one
    batch. docs/results.md has what it changes, measured.

    Args:
        num_neighbors: size of a neighbourhood, the point itself included.
        triplets_per_anchor: triplets drawn for every anchor.
        **kwargs: PML's options: ``distance`` (default `PoincareDistance`), ``collect_stats``.

    Attributes:
        features: ``None``, or features of the next batch of `HIERLoss`, of shape ``(N, F)``, whose Euclidean
            distances say who is near whom.

    Raises:
        TypeError, ValueError: a count is not a whole number, or too small; the distance is inverted.

    Example:
        >>> from pytorch_metric_learning import losses
        >>> miner = ReciprocalNeighborMiner(num_neighbors=3, triplets_per_anchor=10)
        >>> embeddings, labels = torch.randn(16, 8), torch.arange(16) // 4
        >>> anchors, positives, negatives = miner(embeddings, labels)
        >>> loss = losses.TripletMarginLoss()(embeddings, labels, (anchors, positives, negatives))

    Source: HIER (arXiv 2212.14258), section 3.3.
    """

    def __init__(self, num_neighbors: int = 20, triplets_per_anchor: int = 50, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.distance.is_inverted:
            raise ValueError(
                "distance must grow with dissimilarity, got the inverted "
                f"{type(self.distance).__name__}; use PoincareDistance or LpDistance"
            )
        self.num_neighbors = check_count("num_neighbors", num_neighbors, minimum=2)
        self.triplets_per_anchor = check_count("triplets_per_anchor", triplets_per_anchor)
        self.features: Tensor | None = None
        self.add_to_recordable_attributes(list_of_names=["num_neighbors", "triplets_per_anchor"], is_stat=False)

    def get_default_distance(self) -> PoincareDistance:
        return PoincareDistance()

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if ref_emb is not embeddings:
            raise ValueError(
                "ref_emb is not supported by ReciprocalNeighborMiner: neighbours are reciprocal only within "
                f"one set; got ref_emb of shape {tuple(ref_emb.shape)}, expected None"
            )
        anchors, positives, negatives, valid = self.sample(self.distance(embeddings), labels)
        return anchors[valid], positives[valid], negatives[valid]

    def distances(self, embeddings: Tensor) -> Tensor:
        """Distances by which `HIERLoss` finds neighbours: of ``features`` if they were set, which uses them up.

        Args:
            embeddings: shape ``(N, D)``.

        Returns:
            Distances of all pairs, shape ``(N, N)``.

        Raises:
            ValueError: ``features`` do not have one row for each embedding.
        """
        features, self.features = self.features, None
        if features is None:
            distances: Tensor = self.distance(embeddings)
            return distances
        if features.ndim != 2 or len(features) != len(embeddings):
            raise ValueError(
                f"features must have shape ({len(embeddings)}, F), a row for each embedding of the batch, got "
                f"shape {tuple(features.shape)}"
            )
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")

    def sample(
        self, distances: Tensor, labels: Tensor | None = None, random: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw triplets from distances with this miner's settings; see `functional.reciprocal_triplets`."""
        return functional.reciprocal_triplets(
            distances,
            labels,
            num_neighbors=self.num_neighbors,
            triplets_per_anchor=self.triplets_per_anchor,
            random=random,
        )
