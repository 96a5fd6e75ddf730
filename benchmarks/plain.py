"""HIER as one would write it down first: whole tensors, a loop over anchors for the triplets.

The slow side of the benchmarks. It allocates ``(N, M, D)`` for distances, and ``(T, P)`` for every step of the
choice of ancestors. `tests/test_benchmarks.py` checks it against the reference.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import relu

Triplets = tuple[Tensor, Tensor, Tensor]


def exp_map0(v: Tensor, c: float, clip_radius: float) -> Tensor:
    norm = v.norm(dim=-1, keepdim=True).clamp_min(1e-5)
    v = v * (clip_radius / norm).clamp_max(1)
    s = math.sqrt(c) * v.norm(dim=-1, keepdim=True).clamp_min(1e-5)
    return s.tanh() * v / s


def distance_matrix(x: Tensor, y: Tensor, c: float) -> Tensor:
    """Möbius form, for all pairs at once."""
    x, y = x.unsqueeze(1), y.unsqueeze(0)
    xy = -(x * y).sum(-1, keepdim=True)
    x2, y2 = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    moebius = (-(1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y) / (1 + 2 * c * xy + c * c * x2 * y2)
    norm = moebius.square().sum(-1).clamp_min(1e-15).sqrt()
    return 2 / math.sqrt(c) * torch.atanh((math.sqrt(c) * norm).clamp_max(1 - 1e-5))


@torch.no_grad()
def mine(distances: Tensor, labels: Tensor | None, num_neighbors: int, triplets_per_anchor: int) -> Triplets:
    similarity = torch.exp(-distances)
    if labels is not None:
        similarity = similarity + (labels.unsqueeze(1) == labels)
    similarity.fill_diagonal_(math.inf)
    neighbors = torch.zeros_like(similarity, dtype=torch.bool)
    neighbors.scatter_(1, similarity.topk(min(num_neighbors, len(similarity))).indices, True)
    reciprocal = neighbors & neighbors.T
    reciprocal.fill_diagonal_(False)
    anchors, positives, negatives = [], [], []
    for i in range(len(reciprocal)):
        related = reciprocal[i].nonzero().squeeze(1)
        rest = ~reciprocal[i]
        rest[i] = False
        others = rest.nonzero().squeeze(1)
        if len(related) >= 2 and len(others) >= 1:
            anchors.append(torch.full((triplets_per_anchor,), i, device=distances.device))
            positives.append(related[torch.randint(len(related), (triplets_per_anchor,), device=distances.device)])
            negatives.append(others[torch.randint(len(others), (triplets_per_anchor,), device=distances.device)])
    if not anchors:
        nothing = torch.zeros(0, dtype=torch.long, device=distances.device)
        return nothing, nothing, nothing
    return torch.cat(anchors), torch.cat(positives), torch.cat(negatives)


def choose(logits: Tensor, noise: Tensor | None) -> Tensor:
    if noise is None:
        return torch.nn.functional.gumbel_softmax(logits, hard=True, dim=1)
    soft = (logits + noise).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


def triplet_losses(
    distances: Tensor, triplets: Triplets, margin: float, temperature: float, noise: Tensor | None = None
) -> Tensor:
    i, j, k = triplets
    to_i, to_j, to_k = distances[i], distances[j], distances[k]
    pair = torch.maximum(to_i, to_j)
    rho_ij = choose(-pair / temperature, None if noise is None else noise[0])
    rho_ijk = choose(-torch.maximum(pair, to_k) / temperature, None if noise is None else noise[1])
    distinct = rho_ij.argmax(1) != rho_ijk.argmax(1)
    losses = (
        relu((to_i * rho_ij).sum(1) - (to_i * rho_ijk).sum(1) + margin)
        + relu((to_j * rho_ij).sum(1) - (to_j * rho_ijk).sum(1) + margin)
        + relu((to_k * rho_ijk).sum(1) - (to_k * rho_ij).sum(1) + margin)
    )
    return losses * distinct


def hier(
    embeddings: Tensor,
    labels: Tensor | None,
    proxies: Tensor,
    *,
    c: float = 0.1,
    clip_radius: float = 2.3,
    margin: float = 0.1,
    temperature: float = 0.1,
    num_neighbors: int = 20,
    triplets_per_anchor: int = 50,
) -> Tensor:
    x, rho = exp_map0(embeddings, c, clip_radius), exp_map0(proxies, c, clip_radius)
    total = (embeddings * 0).sum() + (proxies * 0).sum()
    for points, own_labels in ((x, labels), (rho, None)):
        triplets = mine(distance_matrix(points, points, c), own_labels, num_neighbors, triplets_per_anchor)
        if len(triplets[0]):
            total = total + triplet_losses(distance_matrix(points, rho, c), triplets, margin, temperature).mean()
    return total
