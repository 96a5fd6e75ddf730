"""HIER, slow and obvious: plain loops in float64, from the paper's definitions.

Nothing of hierloss is used here. Distances are in the textbook's Möbius form, gradients are autograd's, and the
straight-through Gumbel-softmax is PyTorch's trick ``hard - soft.detach() + soft``.
"""

import math
import random

import torch
from torch import Tensor


def exp_map0(v: Tensor, c: float, clip_radius: float | None) -> Tensor:
    norm = v.norm()
    if norm == 0:
        return v
    if clip_radius is not None and norm > clip_radius:
        v, norm = v * clip_radius / norm, torch.tensor(clip_radius, dtype=v.dtype)
    s = math.sqrt(c) * norm
    return torch.tanh(s) * v / s


def distance(x: Tensor, y: Tensor, c: float) -> Tensor:
    if torch.equal(x, y):
        return (x * 0).sum()
    xy, x2, y2 = -(x @ y), x @ x, y @ y
    moebius = (-(1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y) / (1 + 2 * c * xy + c * c * x2 * y2)
    return 2 / math.sqrt(c) * torch.atanh(math.sqrt(c) * moebius.norm())


def reciprocal_neighbors(distances: Tensor, labels: list[int] | None, num_neighbors: int) -> list[set[int]]:
    """For every point the set of its reciprocal neighbours, itself left out."""
    n = len(distances)
    neighbors = []
    for a in range(n):
        similarity = {}
        for b in range(n):
            bonus = 1.0 if labels is not None and labels[a] == labels[b] else 0.0
            similarity[b] = math.inf if a == b else math.exp(-float(distances[a, b])) + bonus
        ranked = sorted(similarity, key=lambda b: -similarity[b])
        neighbors.append(set(ranked[:num_neighbors]))
    return [{b for b in neighbors[a] if b != a and a in neighbors[b]} for a in range(n)]


def draw_triplets(
    distances: Tensor,
    labels: list[int] | None,
    num_neighbors: int,
    triplets_per_anchor: int,
    rng: random.Random,
) -> list[tuple[int, int, int]]:
    triplets = []
    for i, related in enumerate(reciprocal_neighbors(distances, labels, num_neighbors)):
        rest = [b for b in range(len(distances)) if b != i and b not in related]
        if len(related) >= 2 and rest:
            for _ in range(triplets_per_anchor):
                triplets.append((i, rng.choice(sorted(related)), rng.choice(rest)))
    return triplets


def lowest_common_ancestor(distances: Tensor, points: list[int], temperature: float, gumbel: Tensor) -> Tensor:
    """Straight-through one-hot vector over proxies: the proxy drawn for this set of points."""
    logits = []
    for p in range(distances.shape[1]):
        farthest = distances[points[0], p]
        for a in points[1:]:
            farthest = torch.maximum(farthest, distances[a, p])
        logits.append(-farthest / temperature)
    perturbed = torch.stack(logits) + gumbel
    soft = torch.softmax(perturbed, 0)
    hard = torch.zeros_like(soft)
    hard[int(perturbed.argmax())] = 1.0
    return hard - soft.detach() + soft


def triplet_loss(
    distances: Tensor,
    triplet: tuple[int, int, int],
    margin: float,
    temperature: float,
    gumbel_ij: Tensor,
    gumbel_ijk: Tensor,
) -> Tensor:
    i, j, k = triplet
    rho_ij = lowest_common_ancestor(distances, [i, j], temperature, gumbel_ij)
    rho_ijk = lowest_common_ancestor(distances, [i, j, k], temperature, gumbel_ijk)
    if int(rho_ij.argmax()) == int(rho_ijk.argmax()):
        return (distances * 0).sum()

    def to(point: int, rho: Tensor) -> Tensor:
        return (distances[point] * rho).sum()

    return (
        torch.relu(to(i, rho_ij) - to(i, rho_ijk) + margin)
        + torch.relu(to(j, rho_ij) - to(j, rho_ijk) + margin)
        + torch.relu(to(k, rho_ijk) - to(k, rho_ij) + margin)
    )


def distance_matrix(xs: list[Tensor], ys: list[Tensor], c: float) -> Tensor:
    return torch.stack([torch.stack([distance(x, y, c) for y in ys]) for x in xs])


def hier(
    embeddings: Tensor,
    proxies: Tensor,
    sample_triplets: list[tuple[int, int, int]],
    proxy_triplets: list[tuple[int, int, int]],
    sample_noise: Tensor,
    proxy_noise: Tensor,
    *,
    c: float = 0.1,
    clip_radius: float | None = 2.3,
    margin: float = 0.1,
    temperature: float = 0.1,
) -> Tensor:
    """Mean over sample triplets plus mean over proxy triplets; noise has shape (2, number of triplets, P)."""
    xs = [exp_map0(v, c, clip_radius) for v in embeddings]
    rhos = [exp_map0(v, c, clip_radius) for v in proxies]
    total = (embeddings * 0).sum() + (proxies * 0).sum()
    for points, triplets, noise in ((xs, sample_triplets, sample_noise), (rhos, proxy_triplets, proxy_noise)):
        if triplets:
            distances = distance_matrix(points, rhos, c)
            losses = [
                triplet_loss(distances, triplet, margin, temperature, noise[0, t], noise[1, t])
                for t, triplet in enumerate(triplets)
            ]
            total = total + torch.stack(losses).mean()
    return total
