r"""The HIER loss as pure functions: from a distance matrix to triplets, and from triplets to losses.

Conventions of this file
    - ``N`` points (embeddings or proxies), ``P`` hierarchical proxies, ``T`` triplets.
    - ``triplets`` are ``(anchors, positives, negatives)``; anchors and positives are the related pair.
    - ``noise`` is standard Gumbel noise; random numbers come from torch's default generator of the device.
    - Shapes do not depend on values on a GPU, so no synchronization is needed.

Source: Kim, Jeong, Kwak, "HIER" (CVPR 2023), https://arxiv.org/abs/2212.14258, sections 3.2 and 3.3.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from ._checks import MIN_TEMPERATURE, check_count, check_number
from .poincare import working

__all__ = ["HierarchicalTripletLoss", "hierarchical_triplet_loss", "reciprocal_triplets"]

_CHUNK_CELLS = 2**18  # of a (triplets, proxies) array at a time on a CPU: about the size of its cache
# On an accelerator, a kernel launch costs more than a cache miss; a compiler unrolls the loop over chunks. One
# chunk holds the 50 * (180 + 512) triplets of a batch of 180 with 512 proxies.
_CHUNK_CELLS_FUSED = 18 * 2**20
_FORWARD_CHUNK, _BACKWARD_CHUNK = 16, 4  # times as large if compiled, on a CPU: fewer arrays are kept
_GROUP_SIZE = 16  # at most, proxies of a group: compiled code draws a group first
_WEIGHTS_SPAN = 140  # weights are between e^-70 and e^70, so that sums and products with noise fit float32 too
_TABLE_SIZE = 2**15  # at least, exponential variables that triplets share, where more would be needed

# glibc gives freed memory back to the system, unless there is less of it than twice the largest block freed so
# far, of at most 32 MB; memory from the system is slow at first. This block itself is never touched.
torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")

# When first used: the import of the compiler is slow.
_compile: Callable[..., Any] = functools.cache(torch.compile)


@torch.no_grad()
def reciprocal_triplets(
    distances: Tensor,
    labels: Tensor | None = None,
    *,
    num_neighbors: int = 20,
    triplets_per_anchor: int = 50,
    random: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Draw triplets whose related pair are reciprocal nearest neighbours.

    The similarity is :math:`S_{ab} = e^{-d(a, b)}`, plus 1 where the labels are equal. ``b`` is a neighbour of
    ``a`` if it is among the ``num_neighbors`` most similar to ``a``, where ``a`` itself counts as one; the two
    are reciprocal if each is a neighbour of the other. Positives are drawn uniformly from the anchor's reciprocal
    neighbours, negatives uniformly from all other points. An anchor is valid if it has two or more reciprocal
    neighbours and one or more other points.

    Args:
        distances: symmetric distances of shape ``(N, N)``; the diagonal is ignored. They get no gradient.
        labels: class labels of shape ``(N,)``, or ``None``.
        num_neighbors: ``k``, at least 3; values above ``N`` mean ``N``.
        triplets_per_anchor: ``t``.
        random: ``False`` spreads positives and negatives evenly instead of drawing them.

    Returns:
        ``(anchors, positives, negatives, valid)``, each of shape ``(N * t,)``. Indices that are not valid are in
        range and have no meaning.

    Example:
        >>> points = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 5.2])
        >>> distances = (points[:, None] - points).abs()
        >>> a, p, n, valid = reciprocal_triplets(distances, num_neighbors=3, triplets_per_anchor=2)
        >>> bool(valid.all()), bool((a // 3 == p // 3).all()), bool((a // 3 != n // 3).all())
        (True, True, True)
    """
    shape = tuple(distances.shape)
    if len(shape) != 2 or shape[0] != shape[1] or 0 in shape or not distances.is_floating_point():
        raise ValueError(f"distances must be a square matrix of floats, got {distances.dtype} of shape {shape}")
    count = shape[0]
    if labels is not None and labels.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), got shape {tuple(labels.shape)}")
    check_count("num_neighbors", num_neighbors, minimum=3)  # with 2, no anchor is valid
    check_count("triplets_per_anchor", triplets_per_anchor)
    # Smaller is more similar: -1 / d < 0 for equal labels, else d. The order is that of S, but without
    # underflow. A point is first among its own neighbours.
    order = distances
    if labels is not None:
        tiny = torch.finfo(distances.dtype).tiny
        order = torch.where(labels.unsqueeze(1) == labels, (-tiny - distances).reciprocal(), distances)
    itself = torch.eye(count, dtype=torch.bool, device=distances.device)
    nearest = order.masked_fill(itself, -torch.inf).topk(min(num_neighbors, count), largest=False, sorted=False)
    neighbors = torch.zeros_like(itself).scatter_(1, nearest.indices, True)
    related = neighbors & neighbors.mT  # a point is related to itself
    options: dict[str, Any] = {"dtype": torch.float32, "device": distances.device}
    if random:
        uniform = torch.rand(2, count, triplets_per_anchor, **options)
    else:  # both evenly spaced, and their pairs too: the second has steps of the golden ratio
        steps = torch.arange(triplets_per_anchor, **options) + 0.5
        uniform = torch.stack([steps * (1 / triplets_per_anchor), steps * (0.5 * 5**0.5 - 0.5)]) % 1
    positives, num_positives = _choice(related & ~itself, uniform[0])
    negatives, num_negatives = _choice(~related, uniform[1])
    valid = (num_positives >= 2) & (num_negatives >= 1)
    anchors = torch.arange(count * triplets_per_anchor, device=distances.device) // triplets_per_anchor
    return anchors, positives.flatten(), negatives.flatten(), valid[anchors]


def _choice(mask: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The column of a true entry of each row for every number in [0, 1); and the number of true entries."""
    cumulative = mask.cumsum(1, dtype=torch.int32)
    number = cumulative[:, -1:]
    rank = (uniform * number).to(torch.int32)  # in float32, uniform * n < n for n < 2^24
    column = torch.searchsorted(cumulative, rank, right=True)
    return column.clamp_max(mask.shape[1] - 1), number.squeeze(1)  # rows without true entries have no index


def drop_invalid(
    mined: tuple[Tensor, Tensor, Tensor, Tensor], synchronize: bool = False, at_most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Triplets ``(3, T)`` and their validity ``(T,)``, without invalid triplets, unless all are invalid.

    Where the removal needs a synchronization, invalid triplets are kept, unless ``synchronize``. If there are more
    than ``at_most``, an equal share of each anchor's is kept.
    """
    triplets, valid = torch.stack(mined[:3]), mined[3]
    if (synchronize or shapes_may_depend_on_values(valid)) and valid.any():
        triplets, valid = triplets[:, valid], valid[valid]
    step = 1 if at_most is None else -(-len(valid) // at_most)
    return triplets[:, ::step], valid[::step]


def mean_over_valid(losses: Tensor, valid: Tensor) -> Tensor:
    """The losses, scaled so that their mean is the mean over the valid ones, 0 if there is none."""
    return losses * (valid / valid.mean(dtype=losses.dtype).clamp_min(1 / len(valid)))


def euclidean_distances(features: Tensor) -> Tensor:
    """Distances of all pairs by matrix products, centred and in float64, so that only duplicates rank wrongly."""
    features = working(features)
    features = features - features.mean(0)
    return torch.cdist(features, features, compute_mode="use_mm_for_euclid_dist")


class HierarchicalTripletLoss(NamedTuple):
    """What `hierarchical_triplet_loss` returns."""

    losses: Tensor
    """Loss of every triplet, shape ``(T,)``."""
    ancestors: Tensor
    """Proxies drawn as lowest common ancestors of the related pair and of all three, shape ``(2, T)``."""


def hierarchical_triplet_loss(
    distances: Tensor,
    triplets: Sequence[Tensor] | Tensor,
    *,
    margin: float = 0.1,
    temperature: float = 0.1,
    noise: Tensor | None = None,
    compiled: bool = False,
) -> HierarchicalTripletLoss:
    r"""The loss of every triplet, low if the ancestor of the pair is nearer to it than the ancestor of all three.

    The lowest common ancestor of a set A is a draw from :math:`\mathrm{softmax}_p(-\max_{a \in A} d(a, \rho_p)
    / \tau)`; :math:`\rho_{ij}` is that of the related pair, :math:`\rho_{ijk}` that of all three. The loss is

    .. math:: [d(i, \rho_{ij}) - d(i, \rho_{ijk}) + m]_+ + [d(j, \rho_{ij}) - d(j, \rho_{ijk}) + m]_+
        + [d(k, \rho_{ijk}) - d(k, \rho_{ij}) + m]_+

    and 0 where both draws are the same proxy. The gradient is that of the straight-through Gumbel-softmax: the
    forward pass uses the drawn proxy, the backward pass the soft probabilities of the same noise. Where two
    distances tie for the maximum, the gradient goes to the earlier of i, j, k. Without ``noise``, ancestors are
    drawn by inverting the cumulative distribution, and each backward pass draws Gumbel noise conditionally on the
    ancestors: the same joint distribution. On a CPU, many triplets share one list of these random numbers.
    Memory is ``O(T + NP)`` and a chunk of triplets, which is large on a GPU. Backward recomputes the rest.

    Args:
        distances: distances of shape ``(N, P)`` from points to proxies.
        triplets: ``(anchors, positives, negatives)``, each of shape ``(T,)``, indices of rows.
        margin: ``m``.
        temperature: :math:`\tau`, positive.
        noise: Gumbel noise of shape ``(2, T, P)`` for the two draws. Zeros choose the most probable ancestor, and
            -inf excludes a proxy.
        compiled: compile the work on triplets by `torch.compile`, on a CPU only; needs a C++ compiler. It is
            fastest if 16 divides ``P``.

    Returns:
        `HierarchicalTripletLoss` of ``losses`` ``(T,)``, differentiable once, and ``ancestors`` ``(2, T)``.

    Example:
        >>> distances = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 2.0]])  # 3 points, 2 proxies
        >>> triplets = tuple(torch.tensor([i]) for i in range(3))
        >>> result = hierarchical_triplet_loss(distances, triplets, noise=torch.zeros(2, 1, 2))
        >>> result.ancestors.T, result.losses
        (tensor([[0, 1]]), tensor([0.]))

    Source: HIER (arXiv 2212.14258), equations 4 to 6; Jang, Gu, Poole, "Categorical Reparameterization with
    Gumbel-Softmax" (2017); Maddison, Tarlow, Minka, "A* Sampling" (2014) for the conditional noise.
    """
    if distances.ndim != 2 or distances.numel() == 0 or not distances.is_floating_point():
        raise ValueError(
            "distances must be a floating point matrix of shape (points, proxies), "
            f"got {distances.dtype} of shape {tuple(distances.shape)}"
        )
    check_number("margin", margin, positive=False)
    check_number("temperature", temperature, minimum=MIN_TEMPERATURE)
    indices = triplets if isinstance(triplets, Tensor) else torch.stack(tuple(triplets))
    if indices.ndim != 2 or len(indices) != 3:
        raise ValueError(f"triplets must be three index tensors of shape (T,), got shape {tuple(indices.shape)}")
    expected = (2, indices.shape[1], distances.shape[1])
    if noise is not None and noise.shape != expected:
        raise ValueError(f"noise must have shape {expected}, (2, T, P), got shape {tuple(noise.shape)}")
    # Half precision has too few digits for weights that are exponentials.
    distances = distances.to(torch.promote_types(distances.dtype, torch.float32)).contiguous()
    noise = None if noise is None else noise.to(distances.dtype)
    compiled = compiled and shapes_may_depend_on_values(distances)
    losses, ancestors, _ = _HierarchicalTripletLoss.apply(distances, indices, margin, temperature, noise, compiled)
    return HierarchicalTripletLoss(losses, ancestors)


class _HierarchicalTripletLoss(torch.autograd.Function):
    @staticmethod
    def forward(distances, triplets, margin, temperature, noise, compiled):  # type: ignore[no-untyped-def]
        scores, are_weights = _scores(distances, temperature, noise)
        chunks = []
        for here in _chunks(triplets.shape[1], distances, _FORWARD_CHUNK if compiled and noise is None else 1):
            if noise is None:
                chunks.append(_draw(triplets[:, here].contiguous(), scores, are_weights, compiled))
            else:
                both = _set_scores(*embedding(triplets[:, here], scores))
                chunks.append(torch.stack(both).add_(noise[:, here]).argmax(-1))
        ancestors = torch.cat(chunks, 1)
        cells = triplets.unsqueeze(1) * distances.shape[1] + ancestors
        near, far = embedding(cells, distances.view(-1, 1)).squeeze(-1).unbind(1)  # faster than indexing
        gap = near - far
        gap[2].neg_()
        # The last term is NaN if any distance is not finite: the draws are then meaningless, so the loss is NaN.
        terms = (gap + margin) * torch.ne(*ancestors) + (distances.amax() - distances.amin()) * 0
        losses = terms.clamp_min(0).sum(0)
        if noise is not None:  # NaN if the noise is NaN; not +=, which torch 2.11 compiles without a gradient
            losses = losses + noise.gather(2, ancestors.unsqueeze(-1)).sum((0, 2)) * 0
        return losses, ancestors, terms

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        distances, triplets, _, ctx.temperature, noise, ctx.compiled = inputs
        ctx.save_for_backward(distances, triplets, noise, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, grad_losses, *_):  # type: ignore[no-untyped-def]
        grad = _Gradient.apply(grad_losses, ctx.temperature, ctx.compiled, *ctx.saved_tensors)
        return grad, None, None, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient with respect to the distances, which has no derivative itself."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        grad_losses, temperature, compiled, distances, triplets, noise, ancestors, terms
    ):
        # The gradient with respect to d(., rho_ij), for i, j and k; that of d(., rho_ijk) is the opposite.
        slopes = ~(terms <= 0) * grad_losses  # NaN must propagate
        slopes[2].neg_()
        kept = torch.arange(slopes.shape[1], device=slopes.device)
        if shapes_may_depend_on_values(slopes):
            kept = slopes.any(0).nonzero().squeeze(1)
            triplets, ancestors, slopes = (part.index_select(1, kept) for part in (triplets, ancestors, slopes))

        grad = torch.zeros_like(distances)
        cells = (triplets.unsqueeze(1) * distances.shape[1] + ancestors).flatten()
        grad.view(-1).index_add_(0, cells, torch.stack([slopes, -slopes], 1).flatten())
        scores, are_weights = _scores(distances, temperature, noise)
        logits = distances / -temperature if are_weights else scores
        table, rows, first = None, ancestors, slopes  # the last two without a meaning, if noise is given
        if noise is None:
            first = torch.rand_like(ancestors, dtype=grad.dtype).clamp_min_(torch.finfo(grad.dtype).tiny).log_()
            # On a CPU, random numbers for all cells would take much of the time.
            if ancestors.numel() * distances.shape[1] > _TABLE_SIZE and shapes_may_depend_on_values(distances):
                table = _delay_table(distances)
                rows = torch.randint_like(ancestors, len(table))
        kernel: Callable[..., Any] = _compile(_soft_gradients) if compiled else _soft_gradients
        for here in _chunks(triplets.shape[1], distances, _BACKWARD_CHUNK if compiled else 1):
            own = [part[:, here].contiguous() for part in (triplets, slopes, ancestors, first, rows)]
            own_noise = noise if noise is None else noise[:, kept[here]]
            gradients = kernel(*own, scores, logits, are_weights, own_noise, table)
            for index, gradient in zip(own[0], gradients, strict=True):
                grad.index_add_(0, index, gradient)
        return grad

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "the HIER loss can be differentiated once only: its gradient is that of a random draw; leave it out "
            "of what is differentiated twice, a gradient penalty for instance"
        )


def shapes_may_depend_on_values(tensor: Tensor) -> bool:
    """Whether this is eager mode on a CPU. Elsewhere, such shapes need a synchronization or do not compile."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _chunks(count: int, distances: Tensor, factor: int) -> list[slice]:
    """Slices of the triplets, as many at a time as the chunk size, times a factor, allows."""
    cells = _CHUNK_CELLS if shapes_may_depend_on_values(distances) else _CHUNK_CELLS_FUSED
    size = max(1, factor * cells // max(1, distances.shape[1]))
    return [slice(start, start + size) for start in range(0, max(count, 1), size)]


def _scores(distances: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, bool]:
    """Logits; or, on a CPU without noise, weights: exponentials of logits, times a factor, if they fit float32.

    Either falls with the distance: the score of the farthest of several points is the smallest.
    """
    if noise is None and shapes_may_depend_on_values(distances):
        nearest, farthest = distances.aminmax()
        if (farthest - nearest) / temperature < _WEIGHTS_SPAN:
            return (((nearest + farthest) / 2 - distances) / temperature).exp_(), True
    return distances / -temperature, False


def _set_scores(i: Tensor, j: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the pair and of all three: those of the farthest point, so the smallest ones."""
    pair = torch.minimum(i, j)
    return pair, torch.minimum(pair, k)


def _draw(triplets: Tensor, scores: Tensor, are_weights: bool, compiled: bool) -> Tensor:
    """Ancestors of the pair and of all three, ``(2, T)``."""
    # Compiled, sums are fast, and cumulative sums are not: draw a group of proxies, and then one of them.
    size = math.gcd(scores.shape[1], _GROUP_SIZE) if compiled and are_weights else 1
    kernel = _compile(_group_weights) if compiled else _group_weights
    weights = kernel(triplets, scores, are_weights, size)
    if size == 1:
        return torch.stack([_inverse_cdf(own) for own in weights])
    group = _inverse_cdf(torch.stack(weights))
    i, j, k = embedding(triplets.unsqueeze(1) * (scores.shape[1] // size) + group, scores.view(-1, size))
    pair, triple = _set_scores(i, j, k)
    return group * size + _inverse_cdf(torch.stack([pair[0], triple[1]]))


def _group_weights(triplets: Tensor, scores: Tensor, are_weights: bool, size: int) -> list[Tensor]:
    """Weights of groups of ``size`` proxies, for the pair and for all three, ``(T, P / size)`` each."""
    weights = [score if are_weights else score.softmax(-1) for score in _set_scores(*embedding(triplets, scores))]
    return weights if size == 1 else [own.unflatten(1, (-1, size)).sum(-1) for own in weights]


def _inverse_cdf(weights: Tensor) -> Tensor:
    """Draw an index of the last dimension."""
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    # Numbers in (0, 1]: an index of weight 0 is never drawn, because 0 is excluded, and some index always is.
    uniform = 1 - torch.rand_like(total)
    index = torch.searchsorted(cumulative, uniform.mul_(total))
    return index.squeeze(-1).clamp_max_(weights.shape[-1] - 1)  # NaN gives an index out of range


def _soft_gradients(
    triplets: Tensor, slopes: Tensor, ancestors: Tensor, first: Tensor, rows: Tensor,
    scores: Tensor, logits: Tensor, are_weights: bool, noise: Tensor | None, table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the soft choices with respect to the distances of i, j and k, ``(T, P)`` each."""
    i, j, k = embedding(triplets, logits)
    slope_i, slope_j, slope_k = slopes.unsqueeze(-1)
    towards = (i * slope_i).addcmul_(j, slope_j).addcmul_(k, slope_k)
    if are_weights:
        i, j, k = embedding(triplets, scores)
    pair, triple = _set_scores(i, j, k)
    # The gradient goes to the farthest point. Products with booleans are slow on a CPU, so the comparisons are 0
    # or 1 in the dtype of the scores.
    is_j = torch.lt(j, i, out=torch.empty_like(j))
    is_k = torch.lt(k, pair, out=torch.empty_like(k))
    del i, j, k
    of_choices = []
    for which, score in enumerate((pair, triple)):
        if noise is not None:
            soft = (score + noise[which]).softmax(-1)
        else:
            delays = None if table is None else table.index_select(0, rows[which])
            soft = _soft_choice(score, are_weights, ancestors[which], first[which].unsqueeze(-1), delays)
        # Backward of softmax. Logits replace the distances of the loss here, which gives the factor
        # d logit / d distance = -1 / temperature.
        product = soft * towards
        total = soft.sum(-1, keepdim=True)
        mean = product.sum(-1, keepdim=True) / total
        of_choices.append(product.addcmul_(soft, mean, value=-1).mul_(1 / total))
    of_pair, of_triple = of_choices
    of_k = is_k.mul_(of_triple)
    of_both = of_pair.sub_(of_triple.sub_(of_k))  # where k is not the farthest, both go to one point
    of_j = is_j.mul_(of_both)
    return of_both.sub_(of_j), of_j, of_k.neg_()


def _soft_choice(
    score: Tensor, are_weights: bool, ancestors: Tensor, first: Tensor, delays: Tensor | None
) -> Tensor:
    """Soft probabilities of the Gumbel-max trick, times a factor, given the ancestors ``(T,)`` that it chose.

    In this trick, proxy p has the time ``t_p = exp(-gumbel_p) / probability_p``. The smallest time is drawn, and
    soft probabilities are proportional to ``1 / t_p``. Given which one, its time is standard exponential, and the
    time of every other proxy is larger by an exponential variable of rate ``probability_p``.
    """
    weights = score if are_weights else score.softmax(-1)
    if delays is None:
        delays = torch.rand_like(weights).log_()
    if torch.compiler.is_compiling():  # scatter_ would be a loop of its own
        columns = torch.arange(weights.shape[1], dtype=torch.int32, device=weights.device)
        delays = delays.masked_fill(columns == ancestors.int().unsqueeze(-1), 0)
    else:
        delays.scatter_(1, ancestors.unsqueeze(-1), 0)
    if are_weights:  # their sum is not 1
        delays.mul_(weights.sum(-1, keepdim=True))
    # 1 / t_p = weight_p / (first * weight_p + delay_p). The logarithm of a uniform variable is minus an
    # exponential variable, so the result is negative, and so is its sum.
    return weights / delays.addcmul_(first, weights)


def _delay_table(distances: Tensor) -> Tensor:
    """Rows of minus standard exponential variables, ``(R, P)``: all windows of one list of random numbers.

    A row chosen at random has the distribution of P new variables. Two rows rarely overlap.
    """
    count = distances.shape[1]
    values = distances.new_empty(max(_TABLE_SIZE, 64 * count))  # 64 rows or more do not overlap
    return values.uniform_().log_().unfold(0, count, 1)
