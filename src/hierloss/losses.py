"""The HIER regularizer as a PML loss."""

import math
import warnings
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.reducers import MeanReducer, MultipleReducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from . import functional, poincare
from ._checks import check_count, check_embeddings, check_labels, check_number
from .distances import PoincareDistance
from .hierarchy import Hierarchy, initial_proxies
from .miners import ReciprocalNeighborMiner
from .modules import as_number

__all__ = ["HIERLoss"]

_FORGOTTEN_AFTER = 100
"""Training steps without an update after which the optimizer is taken to have been forgotten; more than anybody
accumulates gradients over."""


class HIERLoss(BaseMetricLossFunction):  # type: ignore[misc]
    r"""Hierarchical regularizer: learns proxies on the Poincaré ball that act as ancestors of the embeddings.

    Add it to any metric learning loss:

        losses.MultipleLosses([losses.ProxyAnchorLoss(100, 128), HIERLoss()], weights=[1, 0.5])

    Embeddings and proxies are Euclidean vectors that `PoincareDistance` maps to the ball. Triplets
    :math:`(i, j, k)` whose ``i`` and ``j`` are reciprocal neighbours are drawn among the embeddings of the
    batch, and likewise among the proxies. The lowest common ancestor of a set is a proxy, drawn with the
    Gumbel-max trick from :math:`\mathrm{softmax}_p(-\max_a d(a, \rho_p) / \tau)`. The ancestor of the pair,
    :math:`\rho_{ij}`, is to be nearer to the pair than the ancestor of all three, :math:`\rho_{ijk}`, and
    farther from ``k``:

    .. math:: [d(i, \rho_{ij}) - d(i, \rho_{ijk}) + m]_+ + [d(j, \rho_{ij}) - d(j, \rho_{ijk}) + m]_+
        + [d(k, \rho_{ijk}) - d(k, \rho_{ij}) + m]_+

    or 0 where both are the same proxy. The loss is the mean over the embeddings' triplets (``sample_loss``,
    reduction type ``triplet``) plus the mean over the proxies' triplets (``proxy_loss``). In eval mode nothing is
    drawn: the most probable ancestor is taken, and triplets are spread evenly.

    The proxies are parameters of the loss: **give them to the optimizer**,
    ``torch.optim.Adam([*model.parameters(), *loss_func.parameters()])``. Every random number comes from
    torch's default generators.

    Called as any PML loss, ``loss_func(embeddings, labels)``, with embeddings ``(N, D)`` of any floating dtype
    and labels ``(N,)`` or ``None``; returns a scalar. The ``indices_tuple`` that `MultipleLosses` hands to all
    its losses is ignored: HIER mines its own triplets, and ``miner`` is the way to change them.

    Args:
        num_proxies: number of hierarchical proxies ``P``, 512 in the paper. Time grows faster than linearly with
            it: take fewer on a CPU or for few classes, 64 for instance, or see ``proxy_batch_size``.
        embedding_size: width ``D`` of the embeddings; ``None`` takes it from the first batch. An optimizer
            built before that batch trains the proxies all the same. Give it where something must know the
            parameters' sizes before: ``numel()``, ``Adagrad``, ``AveragedModel``,
            ``DistributedDataParallel``, ``torch.compile(fullgraph=True)``.
        margin: ``m``.
        temperature: :math:`\tau` of the ancestors' distribution.
        miner: miner of the triplets among embeddings, default `ReciprocalNeighborMiner`; its
            ``num_neighbors`` and ``triplets_per_anchor`` hold for the proxies too, and its ``features`` let
            neighbours be found among a frozen backbone's features. Any other PML miner is called with
            embeddings and labels.
        proxy_batch_size: draw the proxies' triplets among this many proxies, drawn anew in every step;
            ``None`` for all. Time and memory of a large ``num_proxies`` come from here. Neighbourhoods among
            fewer proxies are wider ones; ancestors are still chosen from all.
        **kwargs: PML's options: ``distance`` (a `PoincareDistance`, of which curvature and way onto the ball are
            read), ``reducer``, ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Attributes:
        proxies: the parameter, tangent vectors at the origin, shape ``(P, D)``.
        num_triplets: triplets among embeddings and proxies. This and what follows with ``collect_stats``, of the
            last batch.
        fraction_active: the share of them with a loss above 0.
        num_ancestors: how many different proxies were drawn as ancestors.
        fraction_clipped: the share of embeddings at the clip radius.

    Raises:
        TypeError, ValueError: an argument is not what is described above; embeddings of another width than the
            proxies; ``ref_emb`` given.

    Example:
        >>> from pytorch_metric_learning import losses
        >>> loss_func = losses.MultipleLosses(
        ...     [losses.ProxyAnchorLoss(num_classes=10, embedding_size=64), HIERLoss()], weights=[1, 0.5]
        ... )
        >>> embeddings, labels = torch.randn(32, 64, requires_grad=True), torch.arange(32) % 10
        >>> loss_func(embeddings, labels).backward()

    Source: Kim, Jeong, Kwak, "HIER: Metric Learning Beyond Class Labels via Hierarchical Regularization"
    (CVPR 2023), https://arxiv.org/abs/2212.14258.
    """

    def __init__(
        self,
        num_proxies: int = 512,
        embedding_size: int | None = None,
        margin: float = 0.1,
        temperature: float = 0.1,
        miner: torch.nn.Module | None = None,
        proxy_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.distance, PoincareDistance):
            raise TypeError(
                f"distance must be a hierloss.PoincareDistance, got {type(self.distance).__name__}; "
                "the ancestors of HIERLoss are points of the Poincaré ball"
            )
        if self.distance.power != 1:
            raise ValueError(f"the power of the distance must be 1 for HIERLoss, got {self.distance.power}")
        self.num_proxies = check_count("num_proxies", num_proxies)
        self.margin = check_number("margin", margin, positive=False)
        self.temperature = check_number("temperature", temperature)
        if proxy_batch_size is not None:
            check_count("proxy_batch_size", proxy_batch_size, minimum=2)
        self.proxy_batch_size = proxy_batch_size
        self.miner: BaseMiner = ReciprocalNeighborMiner(distance=self.distance) if miner is None else miner
        _check_miner(self.miner, self.distance)
        with torch.inference_mode(False):  # in which nothing could be trained that is made now
            self.proxies = torch.nn.UninitializedParameter()
        self._steps_without_update: int | None = 0
        if embedding_size is not None:
            self._create_proxies(check_count("embedding_size", embedding_size))
        self.add_to_recordable_attributes(list_of_names=["num_proxies", "margin", "temperature"], is_stat=False)
        self.add_to_recordable_attributes(
            list_of_names=["num_triplets", "fraction_active", "num_ancestors", "fraction_clipped"],
            is_stat=True,
        )

    @property
    def embedding_size(self) -> int | None:
        """Width of the proxies, ``None`` before the first batch if it was not given."""
        return None if self._is_lazy else self.proxies.shape[1]

    @property
    def _is_lazy(self) -> bool:
        return isinstance(self.proxies, torch.nn.UninitializedParameter)

    @property
    def _proxy_miner(self) -> ReciprocalNeighborMiner:
        """The miner of the proxies' triplets; no module of its own, which the state_dict would name."""
        if isinstance(self.miner, ReciprocalNeighborMiner):
            return self.miner
        return ReciprocalNeighborMiner(distance=self.distance)

    def get_default_distance(self) -> PoincareDistance:
        return PoincareDistance()

    def _sub_loss_names(self) -> list[str]:
        return ["sample_loss", "proxy_loss"]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: outputs of the network, shape ``(N, D)``, neither normalized nor mapped to the ball (unless
                the distance says that they are). Values that are not finite give a loss that is not.
            labels: shape ``(N,)``, or ``None``.
            indices_tuple: ignored, HIER mines its own triplets.
            ref_emb: not supported.
            ref_labels: not supported.

        Returns:
            The reduced loss, a scalar.
        """
        if ref_emb is not None or ref_labels is not None:
            raise ValueError(
                "ref_emb and ref_labels are not supported by HIERLoss, expected None: reciprocal neighbours are "
                "defined within one set of embeddings; concatenate the two sets and pass them as embeddings, or, "
                "with DistributedLossWrapper, efficient=False"
            )
        check_embeddings("embeddings", embeddings, self.embedding_size)
        check_labels(labels, len(embeddings))
        if self._is_lazy:
            self._create_proxies(embeddings.shape[1], embeddings)
        if self.proxies.device != embeddings.device:
            raise ValueError(
                f"embeddings are on {embeddings.device}, but the proxies of HIERLoss on {self.proxies.device}; "
                f'call loss_func.to("{embeddings.device}") before the optimizer is built'
            )
        self._watch_optimizer(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            loss: Tensor = super().forward(embeddings, labels)
        return loss

    def compute_loss(self, embeddings: Tensor, labels: Tensor | None, *_: Any) -> dict[str, dict[str, Any]]:
        batch_size = len(embeddings)
        points = poincare.project(self.distance.maybe_normalize(embeddings), self.distance.c)
        features = getattr(self.miner, "features", None)
        if features is not None:  # a 0 that is NaN if they are not finite: who is near then must not look fine
            points = points + (features.detach() * 0).sum()
        ancestors = self.distance.normalize(self.proxies)
        proxy_batch = self._proxy_batch()
        distances = poincare.pairwise_distance(
            torch.cat([points, ancestors[proxy_batch]]),
            ancestors,
            self.distance.c,
            dtype=poincare.result_dtype(embeddings),
        )
        sample_triplets, sample_valid = self._mine(embeddings, labels)
        among_proxies = distances[batch_size:, proxy_batch].detach()
        mined = self._proxy_miner.sample(among_proxies, random=self.training)
        proxy_triplets, proxy_valid = _drop_invalid(mined)
        triplets = torch.cat([sample_triplets, proxy_triplets + batch_size], 1)
        losses, drawn = functional.hierarchical_triplet_loss(
            distances,
            triplets,
            margin=self.margin,
            temperature=self.temperature,
            noise=self._noise(distances, triplets.shape[1]),
        )
        valid = torch.cat([sample_valid, proxy_valid])
        self._set_stats(embeddings, losses, drawn, valid)
        sample_losses, proxy_losses = losses.split([sample_triplets.shape[1], proxy_triplets.shape[1]])
        return {
            "sample_loss": {
                "losses": _mean_is_over_valid(sample_losses, sample_valid),
                "indices": tuple(sample_triplets),
                "reduction_type": "triplet",
            },
            "proxy_loss": {
                "losses": _mean_is_over_valid(proxy_losses, proxy_valid).mean(),
                "indices": None,
                "reduction_type": "already_reduced",
            },
        }

    def _noise(self, distances: Tensor, num_triplets: int) -> Tensor | None:
        """Noise of the ancestors' choice; ``None`` for draws."""
        # Nothing is drawn in eval mode. Without noise, the most probable ancestor wins.
        return None if self.training else distances.new_zeros(()).expand(2, num_triplets, self.num_proxies)

    def _proxy_batch(self) -> Tensor | slice:
        """The proxies among which triplets are drawn: all, or some of them, evenly spread in eval mode."""
        size, device = self.proxy_batch_size, self.proxies.device
        if size is None or size >= self.num_proxies:
            return slice(None)
        if self.training:
            return torch.randperm(self.num_proxies, device=device)[:size]
        return torch.arange(size, device=device) * self.num_proxies // size

    def _mine(self, embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Triplets among the embeddings, ``(3, T)``, and which of them are valid, ``(T,)``."""
        embeddings = embeddings.detach()
        if type(self.miner).mine is ReciprocalNeighborMiner.mine:
            # Fixed shapes, unlike what a PML miner returns, so that the host need not wait for the device.
            miner = self._proxy_miner
            mined = miner.sample(miner.distances(embeddings), labels, random=self.training)
            # A mean can leave invalid triplets out by itself; other reducers need the list without them.
            return _drop_invalid(mined, wait=not self._sample_loss_is_averaged())
        if labels is None:
            raise ValueError(f"labels are None, but the miner {type(self.miner).__name__} needs them")
        triplets = torch.stack(lmu.convert_to_triplets(self.miner(embeddings, labels), labels))
        if triplets.shape[1] == 0:
            return triplets.new_zeros(3, 1), triplets.new_zeros(1, dtype=torch.bool)
        return triplets, torch.ones_like(triplets[0], dtype=torch.bool)

    def _sample_loss_is_averaged(self) -> bool:
        reducer = self.reducer
        if isinstance(reducer, MultipleReducers):
            reducer = dict(reducer.reducers.items()).get("sample_loss", reducer.default_reducer)
        return type(reducer) is MeanReducer

    def _set_stats(self, embeddings: Tensor, losses: Tensor, drawn: Tensor, valid: Tensor) -> None:
        if self.collect_stats:
            with torch.no_grad():
                self.num_triplets = int(valid.sum())
                self.fraction_active = float((losses[valid] > 0).float().mean()) if self.num_triplets else 0.0
                self.num_ancestors = int(drawn[:, valid].unique().numel())
                radius = self.distance.clip_radius
                if self.distance.normalize_embeddings and radius is not None:
                    self.fraction_clipped = float((embeddings.norm(dim=1) >= radius).float().mean())

    # --- hierarchy ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_proxies(self, embeddings: Tensor, generator: torch.Generator | None = None) -> None:
        """Start the proxies again from data: embeddings, pulled towards the origin by random factors.

        Every region of the data then has proxies above it, specific ones near it and general ones near the
        origin, where the paper's start has random directions; docs/hierarchy.md shows what that changes. Call
        it once, after the first epoch, when embeddings mean something; an optimizer that has the proxies keeps
        them.

        Args:
            embeddings: shape ``(N, D)``, as they go into the loss, of some thousand training samples.
            generator: source of the random numbers; ``None`` is torch's default.

        Raises:
            TypeError, ValueError: embeddings of another width than the proxies, or not finite.

        Example:
            >>> loss_func = HIERLoss(num_proxies=64)
            >>> loss_func.init_proxies(torch.randn(1000, 16))
            >>> loss_func.proxies.shape
            torch.Size([64, 16])
        """
        check_embeddings("embeddings", embeddings, self.embedding_size)
        proxies = initial_proxies(embeddings, self.num_proxies, self.distance, generator)
        if self._is_lazy:
            self._create_proxies(embeddings.shape[1], embeddings)
        self.proxies.copy_(proxies)

    def hierarchy(self, embeddings: Tensor, labels: Tensor | None = None, *, per_class: bool = False) -> Hierarchy:
        """The tree over embeddings whose inner nodes are the proxies of this loss.

        Args:
            embeddings: shape ``(N, D)``, as they go into the loss; those of a test set make as good a tree.
            labels: shape ``(N,)``; kept with the leaves.
            per_class: one leaf for each class instead of each embedding; needs labels.

        Returns:
            A `Hierarchy`, see `Hierarchy.from_embeddings`.

        Raises:
            RuntimeError: the loss has seen no batch, so that it has no proxies yet.
            TypeError, ValueError: embeddings or labels that do not fit, or too many leaves.

        Example:
            >>> loss_func = HIERLoss(num_proxies=64, embedding_size=16)
            >>> tree = loss_func.hierarchy(torch.randn(200, 16), torch.arange(200) // 20, per_class=True)
            >>> tree.num_leaves
            10
        """
        if self.embedding_size is None:
            raise RuntimeError(
                "HIERLoss has no proxies before its first batch; train it, or load a state_dict, and then ask "
                "for the hierarchy"
            )
        check_embeddings("embeddings", embeddings, self.embedding_size)
        return Hierarchy.from_embeddings(embeddings, self.proxies, self.distance, labels, per_class=per_class)

    # --- proxies --------------------------------------------------------------------------------------------

    def _create_proxies(self, embedding_size: int, like: Tensor | None = None) -> None:
        """Size the proxies, on the device of ``like``, and start them at random."""
        radius = self.distance.clip_radius
        if radius is None:
            radius = as_number(self.distance.c) ** -0.5  # where the exponential map begins to saturate
        device = self.proxies.data.device if like is None else like.device
        self._set_proxies(
            torch.randn(self.num_proxies, embedding_size, device=device)
            * (0.9 * radius / math.sqrt(embedding_size)),
            torch.float64 if like is not None and like.dtype == torch.float64 else self.proxies.data.dtype,
        )

    def _set_proxies(self, values: Tensor, dtype: torch.dtype) -> None:
        """Give the proxies their size and values; in one step, so that an error leaves them as they were."""
        # The first batch may come in inference mode: a sanity check before training, for instance.
        with torch.inference_mode(False), torch.no_grad():
            data = values.to(dtype, copy=True)
            self.proxies.materialize(data.shape, device=data.device, dtype=dtype)
            self.proxies.data = data

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._is_lazy:  # a tensor without columns says that there is nothing to load yet
            destination[prefix + "proxies"] = torch.empty(self.num_proxies, 0)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved = state_dict.get(prefix + "proxies")
        if isinstance(saved, Tensor):  # what else can be there, or not, torch reports
            shape, own = tuple(saved.shape), self.embedding_size
            if len(shape) != 2 or shape[0] != self.num_proxies or (own and shape[1] not in (0, own)):
                lists[-1].append(
                    f"size mismatch for {prefix}proxies: the checkpoint has shape {shape}, expected "
                    f"({self.num_proxies}, {own or 'embedding_size'}); build HIERLoss with the num_proxies and "
                    "embedding_size of the checkpoint, and give MultipleLosses its losses in the same order"
                )
                return
            if shape[1] == 0:
                return
            if self._is_lazy:
                dtype = torch.float64 if saved.dtype == torch.float64 else self.proxies.data.dtype
                self._set_proxies(saved.to(self.proxies.data.device), dtype)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self._steps_without_update = 0

    def _watch_optimizer(self, embeddings: Tensor) -> None:
        """Warn once if proxies are used in training and no optimizer ever moves them."""
        if self._steps_without_update is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if not self.training or not (embeddings.requires_grad or self.proxies.grad is not None):
            return
        if self._steps_without_update == 0:
            self._start = self.proxies._version, self.proxies.detach().sum()
        if self.proxies._version != self._start[0] or not self.proxies.requires_grad:
            self._steps_without_update = None
            return
        self._steps_without_update += 1
        if self._steps_without_update == _FORGOTTEN_AFTER:
            self._steps_without_update = None
            # Some optimizers write to .data, which leaves the version as it was.
            if torch.equal(self.proxies.detach().sum(), self._start[1]):
                warnings.warn(
                    f"the proxies of HIERLoss did not change in {_FORGOTTEN_AFTER} training steps: no optimizer "
                    "has them. Build it with the parameters of both, "
                    "torch.optim.Adam([*model.parameters(), *loss_func.parameters()]); in a trainer of PML it is "
                    "the metric_loss_optimizer",
                    stacklevel=5,  # the line that calls the loss
                )

    def extra_repr(self) -> str:
        return (
            f"num_proxies={self.num_proxies}, embedding_size={self.embedding_size}, margin={self.margin:g}, "
            f"temperature={self.temperature:g}"
        )


def _check_miner(miner: Any, distance: PoincareDistance) -> None:
    """Raise unless the miner is one of PML's, and sees the same ball as the loss."""
    if not isinstance(miner, BaseMiner):
        raise TypeError(f"miner must be a miner of pytorch_metric_learning, got {type(miner).__name__}")
    own = miner.distance
    if not isinstance(miner, ReciprocalNeighborMiner) or not isinstance(own, PoincareDistance):
        return
    for name in ("curvature", "clip_radius", "normalize_embeddings"):
        if getattr(own, name) != getattr(distance, name):
            raise ValueError(
                f"the distances of miner and loss must agree, got {own} and {distance}; "
                "pass the same distance= to both"
            )


def _drop_invalid(mined: tuple[Tensor, Tensor, Tensor, Tensor], wait: bool = False) -> tuple[Tensor, Tensor]:
    """Triplets ``(3, T)`` and whether they are valid, ``(T,)``.

    Without the invalid ones where asking for them is free, or worth waiting for the device; unless all are.
    """
    triplets, valid = torch.stack(mined[:3]), mined[3]
    if (wait or functional.asking_is_free(valid)) and valid.any():
        return triplets[:, valid], valid[valid]
    return triplets, valid


def _mean_is_over_valid(losses: Tensor, valid: Tensor) -> Tensor:
    """Scale the losses so that their mean is the mean over the valid ones, 0 if there is none."""
    return losses * (valid * (len(valid) / valid.sum().clamp_min(1)))
