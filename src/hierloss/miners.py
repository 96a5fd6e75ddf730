"""Triplets of reciprocal nearest neighbours, for any PML loss."""

from typing import Any

from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor

from . import functional
from ._checks import check_count
from .distances import PoincareDistance


class ReciprocalNeighborMiner(BaseMiner):  # type: ignore[misc]
    r"""Triplets whose anchor and positive are among each other's nearest neighbours; HIER's miner.

    Neighbours are the most similar points, those with an equal label first; `functional.reciprocal_triplets` has
    the definition. Positives and negatives may be of any class. Called like any PML miner, ``miner(embeddings,
    labels)``, it returns ``(anchors, positives, negatives)``. Random numbers come from torch's default generator.

    Args:
        num_neighbors: size of a neighbourhood, the point itself included; at least 3.
        triplets_per_anchor: triplets drawn for every anchor.
        **kwargs: PML's options: ``distance`` (default `PoincareDistance`), ``collect_stats``.

    Example:
        >>> from pytorch_metric_learning import losses
        >>> miner = ReciprocalNeighborMiner(num_neighbors=3, triplets_per_anchor=10)
        >>> embeddings, labels = torch.randn(16, 8), torch.arange(16) // 4
        >>> loss = losses.TripletMarginLoss()(embeddings, labels, miner(embeddings, labels))

    Source: HIER (arXiv 2212.14258), section 3.3.
    """

    def __init__(self, num_neighbors: int = 20, triplets_per_anchor: int = 50, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.distance.is_inverted:
            raise ValueError(
                "distance must grow with dissimilarity, got the inverted "
                f"{type(self.distance).__name__}; use PoincareDistance or LpDistance"
            )
        self.num_neighbors = check_count("num_neighbors", num_neighbors, minimum=3)
        self.triplets_per_anchor = check_count("triplets_per_anchor", triplets_per_anchor)
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

    def sample(
        self, distances: Tensor, labels: Tensor | None = None, random: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw triplets from distances with this miner's settings; see `functional.reciprocal_triplets`.

        `HIERLoss` calls this method with its own distances. Override it in a subclass to mine in another way.
        """
        return functional.reciprocal_triplets(
            distances,
            labels,
            num_neighbors=self.num_neighbors,
            triplets_per_anchor=self.triplets_per_anchor,
            random=random,
        )

    def check_distance(self, distance: PoincareDistance) -> None:
        """Raise if this miner uses another ball than the distance of a loss."""
        own, names = self.distance, ("curvature", "clip_radius", "normalize_embeddings")
        if isinstance(own, PoincareDistance) and (
            type(own) not in (PoincareDistance, type(distance))
            or any(getattr(own, n) != getattr(distance, n) for n in names)
        ):
            raise ValueError(
                f"the distances of miner and loss must agree, got {own} and {distance}; "
                "pass the same distance= to both"
            )
