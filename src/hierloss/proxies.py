"""The parameter that holds the hierarchical proxies: its initialization, and its size, which can be unknown."""

import math
from typing import Any

import torch
from torch import Tensor

from . import poincare
from ._checks import check_number
from .distances import PoincareDistance


class UnsizedParameter(torch.nn.UninitializedParameter):
    """A parameter without a size, which can be frozen before it has one."""

    def requires_grad_(self, requires_grad: bool = True) -> "UnsizedParameter":
        self.requires_grad = requires_grad
        return self


def set_size(parameter: Any, values: Tensor, dtype: torch.dtype) -> None:
    """Give the parameter its size and values in one step, so that an error leaves it unchanged."""
    if "meta" in (values.device.type, parameter.data.device.type):
        raise RuntimeError("HIERLoss cannot get a size on the meta device; give embedding_size on another device")
    dtype = dtype if dtype == torch.float64 else parameter.data.dtype  # no other dtype changes the parameter's
    # The first batch may come in inference mode: a sanity check before training, for instance.
    with torch.inference_mode(False), torch.no_grad():
        try:
            parameter.data.copy_(values.new_empty(0))  # fails where the parameter must not be changed
        except RuntimeError as error:
            raise RuntimeError("HIERLoss cannot get a size within torch.func; give embedding_size") from error
        parameter.materialize(values.shape, device=values.device, dtype=dtype)
        parameter.copy_(values)


def random_proxies(count: int, size: int, distance: PoincareDistance, device: torch.device) -> Tensor:
    """The initialization of the paper, ``normal(0, 1) * 0.9 r / sqrt(D)``: norms are about 0.9 clip radii."""
    radius = distance.clip_radius or poincare.as_number(distance.c) ** -0.5  # where the map begins to saturate
    return torch.randn(count, size, device=device) * (0.9 * radius / math.sqrt(size))


def proxies_from_data(count: int, embeddings: Tensor, distance: PoincareDistance) -> Tensor:
    """Clipped embeddings, drawn without replacement as long as there are enough, times factors of U(0, 1)."""
    check_number("c of the distance", poincare.as_number(distance.c))
    v = embeddings if distance.normalize_embeddings else poincare.log_map0(embeddings, distance.c)
    rounds = -(-count // len(v))
    chosen = torch.cat([torch.randperm(len(v), device=v.device) for _ in range(rounds)])[:count]
    factors = torch.rand(count, 1, device=v.device)
    return poincare.clip_norm(v[chosen], distance.clip_radius) * factors
