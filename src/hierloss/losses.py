"""The HIER regularizer as a PML loss."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from pytorch_metric_learning.reducers import MeanReducer, MultipleReducers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from . import functional, poincare
from ._checks import MIN_TEMPERATURE, check_batch, check_count, check_embeddings, check_finite, check_number
from ._warnings import OptimizerWatch, Reports
from .distances import PoincareDistance
from .gradient_ratio import hold_gradient_ratio
from .hierarchy import Hierarchy
from .miners import ReciprocalNeighborMiner
from .proxies import UnsizedParameter, proxies_from_data, random_proxies, set_size

_CHUNK_ROWS = 4096  # embeddings of a whole data set that are mapped to the ball at a time
_PROXY_TRIPLETS = 5120  # at most, by default, or one of each proxy; more of them gain no more: docs/results.md


class HIERLoss(BaseMetricLossFunction):  # type: ignore[misc]
    r"""The HIER regularizer: learns proxies on the Poincaré ball that are ancestors of the embeddings.

    Add it to any metric learning loss, and give its parameters, the proxies, to the optimizer. A
    `PoincareDistance` maps embeddings and proxies, both Euclidean vectors, to the ball. HIER is the mean loss of
    triplets of embeddings (``sample_loss``, reduction type ``triplet``) plus that of triplets of proxies
    (``proxy_loss``). A triplet :math:`(i, j, k)`, of which ``i`` and ``j`` are reciprocal neighbours, has the loss

    .. math:: [d(i, \rho_{ij}) - d(i, \rho_{ijk}) + m]_+ + [d(j, \rho_{ij}) - d(j, \rho_{ijk}) + m]_+
        + [d(k, \rho_{ijk}) - d(k, \rho_{ij}) + m]_+

    with the ancestors :math:`\rho_{ij}` of the pair and :math:`\rho_{ijk}` of all three: proxies drawn from
    :math:`\mathrm{softmax}_p(-\max_a d(a, \rho_p) / \tau)`, see `functional.hierarchical_triplet_loss`. Eval mode
    is not random: ancestors are the most probable ones, and triplets are evenly spread.

    Call it like any PML loss, with embeddings ``(N, D)`` of any floating dtype and labels ``(N,)`` or ``None``. It
    returns a scalar, at least float32. Embeddings are outputs of the network, neither normalized nor mapped to
    the ball; non-finite values give a non-finite loss. It mines its own triplets, so the ``indices_tuple`` of
    `MultipleLosses` is ignored. Random numbers come from torch's default generators.

    Args:
        num_proxies: ``P``, at least 2; 512 in the paper. Use fewer, 64 for instance, on a CPU or for few classes.
        embedding_size: width ``D`` of the embeddings; ``None`` takes it from the first batch. Most optimizers can
            be built before that; ``Adagrad``, ``Muon``, ``AveragedModel``, ``DDP`` and ``numel()`` need the size.
        margin: ``m``, a hyperbolic distance.
        temperature: :math:`\tau` of the distribution of ancestors, a hyperbolic distance.
        miner: miner of the triplets of embeddings, default `ReciprocalNeighborMiner`. Any other PML miner is
            called with embeddings (or the features of `neighbors_from`) and labels.
        proxy_miner: a `ReciprocalNeighborMiner` with the settings for the triplets of proxies. Default: those of
            ``miner`` or of the default miner, but at most 5,120 triplets in a training step: 10 of each of 512
            proxies, in place of 50 as in the paper. This hardly changes the expected gradient.
        proxy_batch_size: number of proxies, new ones in every step, among which triplets of proxies are drawn:
            time and memory grow linearly with ``num_proxies``. ``None`` for all. Ancestors are any proxies.
        gradient_ratio: norm of HIER's gradient at the embeddings, relative to that of all other gradients there in
            the same backward pass; see `hierloss.gradient_ratio`. Weights of `MultipleLosses` then change the
            gradient of the proxies only. ``None``: no scaling, and the weight is the paper's :math:`\lambda`.
        **kwargs: PML's options: ``distance`` (a `PoincareDistance`, which holds the curvature), ``reducer``,
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Attributes:
        proxies: the parameter, tangent vectors at the origin, shape ``(P, D)``.
        sample_loss: mean loss of the triplets of embeddings. This and the following are set with
            ``collect_stats``, for the last batch.
        proxy_loss: mean loss of the triplets of proxies.
        num_triplets: number of triplets of embeddings and of proxies.
        fraction_active: share of the triplets with a loss above 0.
        num_ancestors: number of different proxies drawn as ancestors.
        fraction_clipped: share of the embeddings at the clip radius.
        unscaled_gradient_ratio: the ratio of the gradients before scaling; set if other losses have gradients too.

    Raises:
        TypeError, ValueError: an argument that is not as described, or embeddings of another width.

    Example:
        >>> from pytorch_metric_learning import losses
        >>> model, base = torch.nn.Linear(20, 64), losses.ProxyAnchorLoss(num_classes=10, embedding_size=64)
        >>> loss_func = losses.MultipleLosses([base, HIERLoss()])
        >>> optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()])
        >>> loss_func(model(torch.randn(32, 20)), torch.arange(32) % 10).backward()

    Source: Kim, Jeong, Kwak, "HIER" (CVPR 2023), https://arxiv.org/abs/2212.14258.
    """

    def __init__(
        self,
        num_proxies: int = 512,
        embedding_size: int | None = None,
        margin: float = 0.1,
        temperature: float = 0.1,
        miner: torch.nn.Module | None = None,
        proxy_miner: ReciprocalNeighborMiner | None = None,
        proxy_batch_size: int | None = 512,
        gradient_ratio: float | None = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.distance, PoincareDistance):
            raise TypeError(f"distance must be a hierloss.PoincareDistance, got {type(self.distance).__name__}")
        if self.distance.power != 1:
            raise ValueError(f"the power of the distance must be 1 for HIERLoss, got {self.distance.power}")
        self.num_proxies = check_count("num_proxies", num_proxies, minimum=2)  # with one, the loss is 0
        self.margin = check_number("margin", margin, positive=False)
        self.temperature = check_number("temperature", temperature, minimum=MIN_TEMPERATURE)
        self.miner: BaseMiner = ReciprocalNeighborMiner(distance=self.distance) if miner is None else miner
        if not isinstance(self.miner, BaseMiner):
            raise TypeError(f"miner must be a miner of pytorch_metric_learning, got {type(miner).__name__}")
        if isinstance(self.miner, ReciprocalNeighborMiner):
            self.miner.check_distance(self.distance)
        if not isinstance(proxy_miner, ReciprocalNeighborMiner | None):
            raise TypeError(f"proxy_miner must be a ReciprocalNeighborMiner, got {type(proxy_miner).__name__}")
        self.proxy_miner = proxy_miner
        size = proxy_batch_size
        self.proxy_batch_size = None if size is None else check_count("proxy_batch_size", size, minimum=2)
        self.gradient_ratio = gradient_ratio
        with torch.inference_mode(False):  # parameters created in inference mode cannot be trained
            self.proxies = UnsizedParameter()
        self._features: dict[int, Tensor] = {}  # of neighbors_from, by thread
        self._unused: set[int] = set()  # threads in a block of neighbors_from without a call so far
        self._watch, self._reports = OptimizerWatch(), Reports()
        self._compiled_loss: Callable[..., Tensor] | None = None
        if embedding_size is not None:
            self._size_proxies(check_count("embedding_size", embedding_size), self.proxies.data)
        statistics = [*self._sub_loss_names(), "num_triplets", "fraction_active", "num_ancestors"]
        statistics += ["fraction_clipped", "unscaled_gradient_ratio"]
        self.add_to_recordable_attributes(list_of_names=["num_proxies", "margin", "temperature", "gradient_ratio"])
        self.add_to_recordable_attributes(list_of_names=statistics, is_stat=True)

    @property
    def gradient_ratio(self) -> float | None:
        """See the argument. It can change during training."""
        return self._gradient_ratio

    @gradient_ratio.setter
    def gradient_ratio(self, ratio: float | None) -> None:
        self._gradient_ratio = None if ratio is None else check_number("gradient_ratio", ratio, positive=False)

    @property
    def embedding_size(self) -> int | None:
        """Width of the proxies, ``None`` before the first batch if it was not given."""
        data = self.proxies.data  # a parameter moved to the meta device loses its class
        return data.shape[1] if data.ndim == 2 else None

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
        *,
        neighbor_features: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; ``neighbor_features`` are those of `neighbors_from`, for this call."""
        if ref_emb is not None or ref_labels is not None:
            raise ValueError(
                "ref_emb and ref_labels are not supported by HIERLoss, expected None: neighbours are reciprocal "
                "within one set; concatenate the two sets or, with DistributedLossWrapper, efficient=False"
            )
        # torch can tell since 2.7. Before 2.13, torch.compile took is_exporting() to be true.
        if not torch.compiler.is_dynamo_compiling() and getattr(torch.compiler, "is_exporting", bool)():
            raise RuntimeError("HIERLoss cannot be exported: it is for training; export the model alone")
        if self._features and neighbor_features is None:
            self._unused.discard(get_ident())
            neighbor_features = self._features.get(get_ident())
        check_batch(embeddings, self.embedding_size, labels, neighbor_features)
        if self.embedding_size is None:
            self._size_proxies(embeddings.shape[1], embeddings)
        if self.proxies.device != embeddings.device:
            raise ValueError(
                f"embeddings are on {embeddings.device}, but the proxies of HIERLoss on {self.proxies.device}; "
                f'call loss_func.to("{embeddings.device}") before the optimizer is built'
            )
        if self.training and not torch.compiler.is_compiling():
            self._watch.check(self.proxies, embeddings)
            if type(self.miner) is ReciprocalNeighborMiner:
                self._reports.size("embeddings", len(embeddings), self.miner.num_neighbors)
            if type(among_proxies := self.proxy_miner or self.miner) is ReciprocalNeighborMiner:
                drawn = min(self.num_proxies, self.proxy_batch_size or self.num_proxies)
                self._reports.size("proxies", drawn, among_proxies.num_neighbors)
        on_ratio = self._record_ratio if self.collect_stats else None
        on_alone = partial(self._reports.alone, self.gradient_ratio)
        held = hold_gradient_ratio(embeddings, self.gradient_ratio, on_ratio=on_ratio, on_alone=on_alone)
        compiled = None if functional.shapes_may_depend_on_values(held) else self._compiled_loss
        with torch.autocast(embeddings.device.type, enabled=False):
            return (compiled or self._loss_of_batch)(held, labels, neighbor_features)

    def _loss_of_batch(self, embeddings: Tensor, labels: Tensor | None, features: Tensor | None) -> Tensor:
        # PML passes its third argument, the indices_tuple, to compute_loss unchanged.
        loss: Tensor = super().forward(embeddings, labels, features)
        return loss

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor | None, neighbor_features: Tensor | None = None, *_: Any
    ) -> dict[str, dict[str, Any]]:
        batch_size = len(embeddings)
        points = self._points(embeddings)
        leaves, ancestors = points.tensor_split([batch_size])
        proxy_batch = self._proxy_batch()
        rows = points if isinstance(proxy_batch, slice) else torch.cat([leaves, ancestors[proxy_batch]])
        distances = self._distances(rows, ancestors, embeddings)
        if neighbor_features is not None:  # non-finite features give a non-finite loss
            distances = distances + (neighbor_features.detach() * 0).sum().to(distances)
        sample_triplets, sample_valid = self._mine(embeddings, leaves, labels, neighbor_features)
        among_proxies = distances[batch_size:, proxy_batch].detach()
        miner = self.proxy_miner or self.miner
        sample = miner.sample if isinstance(miner, ReciprocalNeighborMiner) else functional.reciprocal_triplets
        mined = sample(among_proxies, random=self.training)
        limit = None if self.proxy_miner or not self.training else max(_PROXY_TRIPLETS, len(among_proxies))
        proxy_triplets, proxy_valid = functional.drop_invalid(mined, at_most=limit)
        triplets = torch.cat([sample_triplets, proxy_triplets + batch_size], 1)
        # Noise of 0 chooses the most probable ancestor.
        noise = None if self.training else distances.new_zeros(()).expand(2, triplets.shape[1], len(ancestors))
        losses, drawn = functional.hierarchical_triplet_loss(
            distances, triplets, margin=self.margin, temperature=self.temperature, noise=noise,
            compiled=self._compiled_loss is not None,
        )  # fmt: skip
        sample_losses, proxy_losses = losses.split([sample_triplets.shape[1], proxy_triplets.shape[1]])
        sample_losses = functional.mean_over_valid(sample_losses, sample_valid)
        proxy_loss = functional.mean_over_valid(proxy_losses, proxy_valid).mean()
        if self.collect_stats:
            self.sample_loss, self.proxy_loss = float(sample_losses.detach().mean()), float(proxy_loss.detach())
            self._set_stats(embeddings, losses, drawn, torch.cat([sample_valid, proxy_valid]))
        return {
            "sample_loss": {"losses": sample_losses, "indices": (*sample_triplets,), "reduction_type": "triplet"},
            "proxy_loss": {"losses": proxy_loss, "indices": None, "reduction_type": "already_reduced"},
        }

    def _points(self, embeddings: Tensor) -> Tensor:
        """Embeddings and proxies, in this order, as points of the unit ball."""
        distance = self.distance
        if distance.normalize_embeddings:
            points = distance.normalize(torch.cat([embeddings, self.proxies]))
        else:
            points = torch.cat([poincare.project(embeddings, distance.c), distance.normalize(self.proxies)])
        return poincare.unit_ball(points, distance.c)

    def _distances(self, points: Tensor, ancestors: Tensor, like: Tensor) -> Tensor:
        """Distances between points of the unit ball, in the dtype of ``like`` and at least float32."""
        return poincare.unit_ball_distance(points, ancestors, self.distance.c, poincare.result_dtype(like))

    def _proxy_batch(self) -> Tensor | slice:
        """The proxies among which triplets are drawn: all, or some of them, evenly spread in eval mode."""
        size, device = self.proxy_batch_size, self.proxies.device
        if size is None or size >= self.num_proxies:
            return slice(None)
        if self.training:
            return torch.randperm(self.num_proxies, device=device)[:size]
        return torch.arange(size, device=device) * self.num_proxies // size

    @torch.no_grad()
    def _mine(
        self, embeddings: Tensor, points: Tensor, labels: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Triplets of embeddings, ``(3, T)``, and which of them are valid, ``(T,)``."""
        if isinstance(self.miner, ReciprocalNeighborMiner):
            if features is not None:
                near = functional.euclidean_distances(features.to(embeddings.device))
            elif isinstance(self.miner.distance, PoincareDistance):  # the same ball as the loss's
                near = self._distances(points, points, embeddings)
            else:
                near = self.miner.distance(embeddings)
            # In a mean, invalid triplets can have weight 0; other reducers need a list without them.
            mined = self.miner.sample(near, labels, random=self.training)
            return functional.drop_invalid(mined, synchronize=not self._sample_loss_is_averaged())
        if labels is None:
            raise ValueError(f"labels are None, but the miner {type(self.miner).__name__} needs them")
        mined = self.miner(embeddings.detach() if features is None else features.to(embeddings.device), labels)
        triplets = torch.stack(lmu.convert_to_triplets(mined, labels))
        if triplets.shape[1] == 0:
            return triplets.new_zeros(3, 1), triplets.new_zeros(1, dtype=torch.bool)
        return triplets, torch.ones_like(triplets[0], dtype=torch.bool)

    def _sample_loss_is_averaged(self) -> bool:
        reducer = self.reducer
        if isinstance(reducer, MultipleReducers):
            reducer = dict(reducer.reducers.items()).get("sample_loss", reducer.default_reducer)
        return type(reducer) is MeanReducer

    def _set_stats(self, embeddings: Tensor, losses: Tensor, drawn: Tensor, valid: Tensor) -> None:
        self.num_triplets = int(valid.sum())
        self.fraction_active = float((losses[valid] > 0).float().mean()) if self.num_triplets else 0.0
        self.num_ancestors = int(drawn[:, valid].unique().numel())
        radius = self.distance.clip_radius
        if self.distance.normalize_embeddings and radius is not None:
            self.fraction_clipped = float((embeddings.detach().norm(dim=1) >= radius).float().mean())

    @contextmanager
    def neighbors_from(self, features: Tensor) -> Iterator[None]:
        """Find neighbours by Euclidean distances of other features than the embeddings, in a ``with`` block.

        Features of a frozen backbone, for instance, do not change during training. Labels are used as before. The
        innermost block of a thread applies to its calls of this loss, also within `MultipleLosses`.

        Args:
            features: ``(N, F)``, a row for each embedding of the batch, in the same order; without gradient.

        Example:
            >>> from pytorch_metric_learning import losses
            >>> backbone, head, labels = torch.randn(32, 40), torch.nn.Linear(40, 16), torch.arange(32) % 8
            >>> hier = HIERLoss(num_proxies=64)
            >>> loss_func = losses.MultipleLosses([losses.SupConLoss(), hier])
            >>> with hier.neighbors_from(backbone):
            ...     loss = loss_func(head(backbone), labels)
        """
        check_embeddings("features", features)
        thread = get_ident()
        outer = self._features.get(thread)
        self._features[thread] = features
        self._unused.add(thread)
        try:
            yield
            if thread in self._unused:
                warnings.warn(
                    "a neighbors_from block ended without a call of its HIERLoss that used its features; "
                    "call the loss within the block",
                    stacklevel=3,  # the with statement
                )
        finally:
            self._unused.discard(thread)
            del self._features[thread]
            if outer is not None:
                self._features[thread] = outer

    def _record_ratio(self, ratio: Tensor) -> None:
        self.unscaled_gradient_ratio = float(ratio)
        if self.gradient_ratio is None:
            self._reports.large(self.unscaled_gradient_ratio)

    def proxy_distances(self, embeddings: Tensor) -> Tensor:
        r"""Distances ``(N, P)`` of embeddings ``(N, D)`` from the proxies, :math:`d(x_i, \rho_p)`.

        Embeddings are as they go into the loss. Distances are at least float32.

        Example:
            >>> hier = HIERLoss(num_proxies=64, embedding_size=16)
            >>> nearest_proxy = hier.proxy_distances(torch.randn(200, 16)).argmin(1)
        """
        if self.embedding_size is None:
            raise RuntimeError(
                "HIERLoss has no proxies before its first batch; train it, load a state_dict, or give "
                "embedding_size"
            )
        check_embeddings("embeddings", embeddings, self.embedding_size)
        with torch.autocast(embeddings.device.type, enabled=False):
            splits = (self._points(rows).tensor_split([len(rows)]) for rows in embeddings.split(_CHUNK_ROWS))
            return torch.cat([self._distances(points, ancestors, embeddings) for points, ancestors in splits])

    @torch.no_grad()
    def hierarchy(
        self, embeddings: Tensor, labels: Any = None, *, per_class: bool = False, linkage: str = "average"
    ) -> Hierarchy:
        """The tree of the embeddings, with the proxies of this loss as ancestors: `Hierarchy.from_embeddings`.

        The arguments are described there. Embeddings are as they go into the loss, also of samples not trained on.

        Example:
            >>> hier = HIERLoss(num_proxies=64, embedding_size=16)
            >>> tree = hier.hierarchy(torch.randn(200, 16), torch.arange(200) // 20, per_class=True)
            >>> tree.num_leaves
            10
        """
        return Hierarchy.from_embeddings(
            embeddings, labels, per_class=per_class, linkage=linkage, distances=self.proxy_distances(embeddings)
        )

    @torch.no_grad()
    def init_proxies(self, embeddings: Tensor) -> None:
        r"""Initialize the proxies by embeddings ``(N, D)``, scaled towards the origin by random factors.

        .. math:: \rho_p = u_p \cdot \mathrm{clip}_r(v_{i(p)}), \qquad u_p \sim U(0, 1)

        with ``i(p)`` drawn without replacement as long as there are enough embeddings. Every region of the data
        then has possible ancestors; default directions are random and almost orthogonal to the data. Call it once,
        after the first epoch, with embeddings of a few thousand training samples, as they go into the loss.
        Optimizers stay valid.

        Example:
            >>> hier = HIERLoss(num_proxies=64)
            >>> hier.init_proxies(torch.randn(1000, 16))
        """
        check_finite("embeddings", embeddings, self.embedding_size)
        values = proxies_from_data(self.num_proxies, embeddings, self.distance)
        if self.embedding_size is None:
            self._size_proxies(embeddings.shape[1], embeddings)
        self.proxies.copy_(values)
        self._watch = OptimizerWatch()  # no optimizer made this change of the proxies

    def _size_proxies(self, embedding_size: int, like: Tensor) -> None:
        """Initialize the proxies at random, on the device of ``like`` and in its dtype if that is float64."""
        values = random_proxies(self.num_proxies, embedding_size, self.distance, like.device)
        set_size(self.proxies, values, like.dtype)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile by `torch.compile`: ``hier.compile(mode="reduce-overhead")``; on a CPU, the work on triplets."""
        if self.embedding_size is None:
            raise RuntimeError("HIERLoss cannot be compiled before its first batch; give embedding_size")
        self._compiled_loss = torch.compile(self._loss_of_batch, *args, **kwargs)
        # CUDA graphs write each gradient to the same memory, so gradients are accumulated from copies.
        for parameter in filter(lambda parameter: parameter.requires_grad, self.parameters()):
            parameter.register_hook(torch.clone)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return state | {"_compiled_loss": None, "_features": {}, "_unused": set()}  # a copy starts without these

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.embedding_size is None:  # a tensor without columns marks proxies without a size
            destination[prefix + "proxies"] = torch.empty(self.num_proxies, 0)
        else:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        saved = state_dict.get(prefix + "proxies")
        if isinstance(saved, Tensor):  # torch reports a missing or other entry
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
            if own is None:
                set_size(self.proxies, saved.to(self.proxies.data.device), saved.dtype)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        self._watch = OptimizerWatch()  # no optimizer made this change of the proxies

    def extra_repr(self) -> str:
        names = ("num_proxies", "embedding_size", "margin", "temperature", "gradient_ratio")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
