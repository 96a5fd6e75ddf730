"""Checks and conversions of arguments. Every error names the argument, the expected value and the given value."""

import math
import numbers
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import geoopt

MIN_TEMPERATURE = 1e-30  # distances divided by a smaller number can be infinite in float32


def check_number(name: str, value: Any, *, positive: bool = True, minimum: float = 0.0) -> float:
    """Return ``value`` if it is a finite number, at least ``minimum`` and, if ``positive``, not 0."""
    kind = "positive" if positive else "non-negative"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a {kind} number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a finite {kind} number, got {value}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return float(value)


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is a whole number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def check_curvature(c: Any) -> "float | geoopt.PoincareBall":
    """Return ``c`` if it is a positive number or a geoopt ball of one."""
    if isinstance(c, numbers.Real):
        return check_number("c", c)
    import geoopt  # the import is slow, and prints a warning of torch 2.15

    if not isinstance(c, geoopt.PoincareBall):
        raise TypeError(f"c must be a positive number or a geoopt.PoincareBall, got {type(c).__name__}")
    if c.c.numel() != 1:
        raise ValueError(f"c of the geoopt.PoincareBall must have one element, got shape {tuple(c.c.shape)}")
    if c.c.device.type != "meta":
        check_number("c of the geoopt.PoincareBall", c.c.item())  # geoopt's softplus overflows at 89
    return c


def current_c(curvature: "float | geoopt.PoincareBall") -> float | Tensor:
    """The number, or the present value of the ball's tensor."""
    # Not float | int, which torch 2.7 cannot compile.
    return curvature if isinstance(curvature, (float, int)) else curvature.c


def check_embeddings(name: str, embeddings: Tensor, width: int | None = None) -> None:
    """Raise unless ``embeddings`` is a floating point matrix, with ``width`` columns if that is given."""
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(embeddings).__name__}")
    shape = tuple(embeddings.shape)
    if len(shape) != 2:
        raise ValueError(f"{name} must have shape (batch_size, embedding_size), got shape {shape}")
    if not embeddings.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {embeddings.dtype}")
    if 0 in shape:
        missing = "row" if shape[0] == 0 else "column"
        raise ValueError(f"{name} must have at least one {missing}, got shape {shape}")
    if width is not None and shape[1] != width:
        raise ValueError(f"{name} must have {width} columns, the embedding_size of the proxies, got shape {shape}")


def check_finite(name: str, embeddings: Tensor, width: int | None = None) -> None:
    """Raise unless `check_embeddings` passes and all values are finite."""
    check_embeddings(name, embeddings, width)
    finite = embeddings.isfinite().all(1)
    if not finite.all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {int(finite.int().argmin())}")


def check_batch(embeddings: Tensor, width: int | None, labels: Tensor | None, features: Tensor | None) -> None:
    """Raise unless embeddings have ``width`` columns (``None``: any), and the others, if given, as many rows."""
    check_embeddings("embeddings", embeddings, width)
    count = len(embeddings)
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
        if (shape := tuple(labels.shape)) != (count,):
            raise ValueError(f"labels must have shape ({count},), one for each embedding, got shape {shape}")
    if features is not None:
        check_embeddings("neighbor_features", features)
        if len(features) != count:
            raise ValueError(
                f"neighbor_features must have shape ({count}, F), a row for each embedding, got shape "
                f"{tuple(features.shape)}; gather them too where embeddings are gathered"
            )


def check_names(argument: str, names: Any, count: int) -> list[str]:
    """Return a text for each of ``count`` leaves."""
    if isinstance(names, Mapping):
        raise TypeError(f"{argument} must be a sequence in the order of the leaves, got a mapping")
    if len(names) != count:
        raise ValueError(f"{argument} must be {count}, one for each leaf, got {len(names)}")
    return [str(name) for name in (names.tolist() if isinstance(names, Tensor) else names)]


def to_numpy(values: Any) -> np.ndarray:
    """Tensor, array or lists as an array."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()


def to_vector(labels: Any, count: int, kind: str) -> np.ndarray:
    """Labels as an array of shape ``(count,)``, one for each leaf, sample or the like."""
    values = to_numpy(labels)
    if values.shape != (count,):
        raise ValueError(f"labels must have shape ({count},), one for each {kind}, got shape {values.shape}")
    return values
