"""All public names as a user calls them; mypy checks the types of this file, and a test runs it."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from pytorch_metric_learning import losses

from hierloss import (
    FromPoincare,
    Hierarchy,
    HIERLoss,
    PoincareDistance,
    PoincareKNN,
    ReciprocalNeighborMiner,
    ToPoincare,
    functional,
    metrics,
    poincare,
)
from hierloss.accuracy_calculator import HierarchicalAccuracyCalculator
from hierloss.gradient_ratio import hold_gradient_ratio
from hierloss.plotting import plot_dendrogram, plot_disk, plot_embeddings, write_html
from hierloss.vector_stores import query_vectors, rerank, stored_vectors

distance = PoincareDistance(c=0.1, clip_radius=2.3)
miner = ReciprocalNeighborMiner(num_neighbors=5, triplets_per_anchor=2, distance=distance)
hier = HIERLoss(16, 8, miner=miner, distance=distance)
loss_func = losses.MultipleLosses([losses.SupConLoss(), hier])
embeddings, labels = torch.randn(40, 8, requires_grad=True), torch.arange(40) % 8
loss: torch.Tensor = hier(embeddings, labels, neighbor_features=torch.randn(40, 3))
with hier.neighbors_from(torch.randn(40, 3)):
    loss = loss_func(embeddings, labels)
loss.backward()
hier.init_proxies(embeddings.detach())
distances: torch.Tensor = hier.proxy_distances(embeddings)
tree: Hierarchy = hier.hierarchy(embeddings, labels, per_class=True, linkage="ward")
tree = Hierarchy.from_embeddings(embeddings, labels)
tree = Hierarchy.from_linkage(tree.linkage, labels, distances)
assert tree.proxies is not None
proxy: int = int(tree.proxies[tree.lowest_common_ancestor([0, 1])])
groups: np.ndarray = tree.cut(num_groups=3)
nodes: np.ndarray = tree.place(np.zeros((2, tree.num_leaves)))
children: tuple[int, ...] = tree.children(tree.root)
text: str = tree.to_newick()
tree = Hierarchy.from_json(tree.to_json())
purity: float = metrics.dendrogram_purity(tree, labels)
levels: list[float] = metrics.ami_per_level(tree.linkage, labels)
recall: list[float] = metrics.hierarchical_recall_at_k(distance(embeddings), labels, k=2)
h_ap: float = metrics.hierarchical_average_precision(distance(embeddings), labels)
calculator = HierarchicalAccuracyCalculator({0: 1, 1: 1}, include=("precision_at_1",), k=1)
found, indices = PoincareKNN(distance)(embeddings.detach(), 3, embeddings.detach())
x: torch.Tensor = ToPoincare(c=0.1)(embeddings)
v: torch.Tensor = FromPoincare(c=0.1)(x)
stored: torch.Tensor = poincare.lift_references(x, 0.1) @ poincare.lift_queries(x, 0.1).T
vectors: torch.Tensor = stored_vectors(embeddings, distance)
scores: torch.Tensor = query_vectors(embeddings[:2], distance) @ vectors.T
nearest, order = rerank(embeddings[:2], vectors[scores.topk(5).indices], distance)
a, p, n, valid = functional.reciprocal_triplets(distance(x), labels)
result = functional.hierarchical_triplet_loss(distances, (a, p, n))
total: torch.Tensor = result.losses.sum()
held: torch.Tensor = hold_gradient_ratio(embeddings, 0.3)
axes = [plot_disk(tree), plot_dendrogram(tree), plot_embeddings(embeddings, labels)]
write_html(tree, Path(tempfile.mkdtemp(), "page.html"))
