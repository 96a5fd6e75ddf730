"""Data from a known tree, for tests and benchmarks."""

import torch
from torch import Tensor

__all__ = ["sample_tree"]


def sample_tree(
    generator: torch.Generator,
    branching: tuple[int, ...] = (4, 3, 3),
    scales: tuple[float, ...] = (1.0, 0.5, 0.25),
    samples_per_class: int = 20,
    noise: float = 0.3,
    dim: int = 32,
) -> tuple[Tensor, Tensor]:
    """Samples around the leaves of a tree whose nodes are Gaussian steps away from their parents.

    Args:
        generator: source of all random numbers.
        branching: children of a node at each level, from the root down.
        scales: standard deviation of the steps at each level, in every coordinate.
        samples_per_class: samples around each leaf.
        noise: standard deviation of the samples around their leaf.
        dim: ``D``.

    Returns:
        Features ``(N, D)``, shuffled, and labels ``(N, L)`` from fine (the leaves) to coarse.
    """
    means, paths = torch.zeros(1, dim), torch.zeros(1, 0, dtype=torch.long)
    for children, scale in zip(branching, scales, strict=True):
        means = means.repeat_interleave(children, 0)
        means = means + scale * torch.randn(means.shape, generator=generator)
        paths = torch.cat([torch.arange(len(means))[:, None], paths.repeat_interleave(children, 0)], 1)
    features = means.repeat_interleave(samples_per_class, 0)
    features = features + noise * torch.randn(features.shape, generator=generator)
    shuffled = torch.randperm(len(features), generator=generator)
    return features[shuffled], paths.repeat_interleave(samples_per_class, 0)[shuffled]
