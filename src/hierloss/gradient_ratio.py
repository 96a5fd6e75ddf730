"""The gradient of one loss at a fixed ratio to the gradients of all others, by a hook on the embeddings.

The loss gets the embeddings through an identity function, whose backward pass stores its gradient and returns
zeros. A hook on the embeddings gets the sum of the other gradients, scales the stored one, and adds it. No second
backward pass and no synchronization is needed.
"""

import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from . import poincare

__all__ = ["hold_gradient_ratio"]


class _Aside(deque[tuple[Tensor, Tensor]]):
    """Not a deque itself: torch.func copies the containers among the arguments of an autograd function."""


def hold_gradient_ratio(
    embeddings: Tensor,
    ratio: float | None,
    *,
    on_ratio: Callable[[Tensor], None] | None = None,
    on_alone: Callable[[], None] | None = None,
) -> Tensor:
    r"""Return the embeddings, at least float32, for one loss; its gradient ``g`` is scaled relative to all others.

    .. math:: \nabla = h + r \frac{\|h\|}{\|g\|} g

    ``h`` is the sum of all other gradients at the same tensor in the same backward pass, ``r`` the ratio; norms
    are Frobenius norms over the batch. A common factor of all losses, of a gradient scaler for instance, does not
    change the ratio. Non-finite values are kept. If ``h`` or ``g`` is zero, the result is ``h``. If no other loss
    uses the tensor in a backward pass, the result is ``g``. At least one loss must not be held:
    two held ones alone give zeros.

    Args:
        embeddings: shape ``(N, D)``, the same tensor that the other losses use.
        ratio: ``r``; ``None`` does not scale.
        on_ratio: called with ``|g| / |h|``, a 0-dim tensor, in each backward pass of several losses.
        on_alone: called in each backward pass in which no other loss uses the tensor, if there is a ratio.

    Example:
        >>> embeddings = torch.tensor([[3.0, 4.0]], requires_grad=True)
        >>> held = hold_gradient_ratio(embeddings, ratio=0.5)
        >>> (embeddings.sum() + 100 * held[0, 0]).backward()
        >>> embeddings.grad  # (1, 1) and 0.5 * sqrt(2) in the direction of (100, 0)
        tensor([[1.7071, 1.0000]])

    Source: Défossez et al., "High Fidelity Neural Audio Compression" (2022), section 3.4, which balances the
    gradients of all losses at the output of a model; here the other losses keep their gradients.
    """
    dtype = poincare.result_dtype(embeddings)
    if (ratio is None and on_ratio is None) or not (embeddings.requires_grad and torch.is_grad_enabled()):
        return embeddings.to(dtype)
    # The gradient of the loss, stored for the hook, and the zeros that were returned in its place.
    aside = _Aside(maxlen=1)
    # The hook must not keep the graph alive, nor stay on a leaf that is used in every step.
    reference = weakref.ref(aside)

    def add_back(others: Tensor) -> Tensor | None:
        aside = reference()
        if not aside:
            return None  # a backward pass of other losses alone
        own, zeros = aside.pop()
        if others is zeros:
            if on_alone is not None and ratio is not None:
                on_alone()
            return own.to(others.dtype)
        # In float64, where squares do not overflow when a gradient scaler is used.
        size, own_size = (torch.linalg.vector_norm(poincare.working(gradient)) for gradient in (others, own))
        if on_ratio is not None:
            on_ratio((own_size / size).detach())
        if ratio is None:
            return others + own.to(others.dtype)
        factor = size / own_size.masked_fill(own_size == 0, torch.inf)
        return torch.addcmul(others, own, factor, value=ratio).to(others.dtype)

    handle = embeddings.register_hook(add_back)
    weakref.finalize(aside, handle.remove).atexit = False
    result: Tensor = _Identity.apply(embeddings, aside, dtype)
    return result


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(embeddings, aside, dtype):  # type: ignore[no-untyped-def]
        return embeddings.to(dtype, copy=True)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        embeddings, ctx.aside, _ = inputs
        ctx.dtype = embeddings.dtype

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        zeros = torch.zeros_like(gradient, dtype=ctx.dtype)
        ctx.aside.append((gradient, zeros))
        return zeros, None, None
