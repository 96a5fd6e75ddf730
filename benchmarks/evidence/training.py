"""One run: train on some classes, with or without HIER, and score retrieval and trees on others."""

import copy
from typing import Any

import geoopt
import numpy as np
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.samplers import MPerClassSampler
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy.cluster.hierarchy import linkage
from torch import Tensor, nn
from torch.nn import functional as F

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner
from hierloss.hierarchy import Hierarchy, initial_proxies
from hierloss.metrics import dendrogram_purity, hierarchical_average_precision

from .data import Split
from .settings import Settings, make_base

__all__ = ["EMBEDDING_SIZE", "EPOCH", "STEPS", "run"]

EMBEDDING_SIZE = 64
BATCH_SIZE = 90
EPOCH = 20
"""Steps after which proxies start from data or are revived: what an epoch is with 1,800 samples."""
STEPS = {"digits": 100, "synthetic": 200, "trec": 200, "omniglot": 200}
PROXY_LR = 1e-2
"""Of the class proxies of a base loss."""
HIERARCHICAL_SAMPLES = 1000
"""Test samples, drawn at random, that H-AP is computed on: its time grows with the square of them."""


def run(dataset: str, split: Split, base_name: str, lr: float, settings: Settings, seed: int) -> dict[str, float]:
    """Train and score. Equal seeds mean equal initial weights and equal batches, whatever the settings are."""
    torch.manual_seed(seed)
    labels = split.train_taxonomy[:, 0].unique(return_inverse=True)[1]
    network = make_network(split.train)
    base, base_miner = make_base(base_name, int(labels.max()) + 1, EMBEDDING_SIZE)
    training = Training(network, base, base_miner, settings, lr)
    batches = list(_batches(labels, STEPS[dataset], seed))
    for step, rows in enumerate(batches):
        if step and step % EPOCH == 0:
            training.between_epochs(split.train, first=step == EPOCH)
        training.step(split.train[rows], labels[rows], step / len(batches))
    network.eval()
    with torch.no_grad():
        embeddings = network(split.test)
        result = scores(embeddings, split.test_taxonomy, seed)
        if settings.weight:
            result |= training.scores_of_hier(embeddings, split.test_taxonomy)
    return result


def make_network(inputs: Tensor) -> nn.Sequential:
    """Convolutions for images, one hidden layer for vectors; then LayerNorm and a linear head, as in the paper."""
    layers: list[nn.Module]
    if inputs.ndim == 2:
        layers, width = [nn.Linear(inputs.shape[1], 256), nn.ReLU()], 256
    else:
        layers = []
        for channels_in, channels_out in ((1, 16), (16, 32), (32, 64))[: 2 if inputs.shape[-1] < 16 else 3]:
            layers.append(nn.Conv2d(channels_in, channels_out, 3, padding=1))
            layers += [nn.MaxPool2d(2), nn.GroupNorm(4, channels_out), nn.ReLU()]
        layers.append(nn.Flatten())
        width = channels_out * (inputs.shape[-1] // 2 ** (len(layers) // 4)) ** 2
    head = nn.Linear(width, EMBEDDING_SIZE)
    nn.init.orthogonal_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*layers, nn.LayerNorm(width, elementwise_affine=False), head)


def _batches(labels: Tensor, steps: int, seed: int) -> Any:
    """Rows of balanced batches: 5 samples of a class, more where there are fewer than 18 classes."""
    np.random.seed(seed)  # noqa: NPY002  (PML's sampler draws from it)
    per_class = max(5, -(-BATCH_SIZE // len(labels.unique())))
    sampler = MPerClassSampler(labels, per_class, length_before_new_iter=max(len(labels), BATCH_SIZE))
    done = 0
    while done < steps:
        for rows in torch.tensor(list(sampler)).split(BATCH_SIZE):
            if len(rows) == BATCH_SIZE and done < steps:
                yield rows
                done += 1


class _Noise(HIERLoss):  # type: ignore[misc]
    """HIERLoss whose draws can be without noise, or lean towards proxies that are seldom drawn."""

    settings: Settings

    def _noise(self, distances: Tensor, num_triplets: int) -> Tensor | None:
        if not self.training:
            return super()._noise(distances, num_triplets)
        shape = (2, num_triplets, self.num_proxies)
        if not self.settings.noise:
            return distances.new_zeros(()).expand(shape)
        if not self.settings.balance:
            return None
        if not hasattr(self, "usage"):
            self.usage = torch.ones(self.num_proxies)
        nearest = distances.detach().argmin(1)
        self.usage = 0.95 * self.usage + 0.05 * nearest.bincount(minlength=self.num_proxies)
        gumbel = -torch.empty(shape).exponential_().log()
        return gumbel - self.settings.balance * (self.usage + 0.05).log()


class Training:
    """Network, losses and optimizer of one run."""

    def __init__(self, network: nn.Module, base: Any, base_miner: Any, settings: Settings, lr: float) -> None:
        self.network, self.base, self.base_miner, self.settings = network, base, base_miner, settings
        groups: list[dict[str, Any]] = [{"params": network.parameters(), "lr": lr}]
        groups.append({"params": base.parameters(), "lr": PROXY_LR})
        self.optimizers: list[torch.optim.Optimizer] = []
        if settings.weight:
            self._make_hier()
            if settings.manifold:
                self.optimizers.append(geoopt.optim.RiemannianAdam([self.hier.proxies], lr=settings.proxy_lr))
            else:
                groups.append({"params": self.hier.parameters(), "lr": settings.proxy_lr})
        self.optimizers.append(torch.optim.Adam(groups))
        self.norm: Tensor | None = None
        self.queue: tuple[Tensor, Tensor] | None = None
        self.average = copy.deepcopy(network) if settings.neighbors == "average" else None
        self.steps = 0
        self.gradient_ratios: list[float] = []

    def _make_hier(self) -> None:
        s = self.settings
        ball = geoopt.PoincareBall(c=s.c, learnable=True) if s.learn_curvature else s.c
        distance = PoincareDistance(ball, s.clip_radius, normalize_embeddings=not s.manifold)
        counts = {"num_neighbors": s.num_neighbors, "triplets_per_anchor": s.triplets_per_anchor}
        miner = ReciprocalNeighborMiner(distance=distance, **counts)
        self.hier = _Noise(
            s.num_proxies, EMBEDDING_SIZE, s.margin, s.temperature, miner, distance=distance, collect_stats=True
        )
        self.hier.settings = s
        self.onto_ball = PoincareDistance(s.c, s.clip_radius)
        if s.manifold:
            points = self.onto_ball.normalize(self.hier.proxies.detach()).float()
            self.hier.proxies = geoopt.ManifoldParameter(points, manifold=geoopt.PoincareBall(c=s.c))

    def into_hier(self, embeddings: Tensor) -> Tensor:
        """What HIER sees of the embeddings."""
        s = self.settings
        if s.mean_norm is not None:
            now = embeddings.detach().norm(dim=1).mean()
            if self.norm is None:
                self.norm = now
            elif torch.is_grad_enabled():
                self.norm = 0.9 * self.norm + 0.1 * now
            embeddings = embeddings * (s.mean_norm * (s.clip_radius or 1.0) / self.norm)
        return self.onto_ball.normalize(embeddings).float() if s.manifold else embeddings

    def step(self, inputs: Tensor, labels: Tensor, progress: float) -> None:
        s = self.settings
        embeddings = self.network(inputs)
        loss = self.base(embeddings, labels, self.base_miner(embeddings, labels) if self.base_miner else None)
        if s.weight:
            if s.neighbors == "inputs":
                self.hier.miner.features = inputs.flatten(1)
            elif self.average is not None:
                with torch.no_grad():
                    self.hier.miner.features = F.normalize(self.average(inputs))
            if s.anneal:
                self.hier.temperature = s.temperature * 10 ** (1 - progress)
            regularizer = self.hier(*self._with_memory(self.into_hier(embeddings), labels))
            weight = s.weight * min(1.0, 2 * progress) if s.warm_up else s.weight
            if s.by_gradient or self.steps % 20 == 0:
                ours, theirs = (
                    torch.autograd.grad(x, embeddings, retain_graph=True)[0].norm() for x in (regularizer, loss)
                )
                self.gradient_ratios.append(float(weight * ours / theirs.clamp_min(1e-12)))
                if s.by_gradient:
                    weight = weight * float(theirs / ours.clamp_min(1e-12))
            loss = loss + weight * regularizer
        self.steps += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average is not None:
            with torch.no_grad():
                for slow, fast in zip(self.average.parameters(), self.network.parameters(), strict=True):
                    slow.lerp_(fast, 0.02)

    def _with_memory(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        s = self.settings
        if not s.label_bonus:
            return embeddings, None
        if not s.memory:
            return embeddings, labels
        both = embeddings, labels
        if self.queue is not None:
            both = torch.cat([embeddings, self.queue[0]]), torch.cat([labels, self.queue[1]])
        self.queue = both[0].detach()[: s.memory], both[1][: s.memory]
        return both

    @torch.no_grad()
    def between_epochs(self, inputs: Tensor, first: bool) -> None:
        """Start proxies from data, or start those again that nothing is near to."""
        s = self.settings
        if not s.weight or not (s.revive or (first and s.start == "data")):
            return
        embeddings = self.into_hier(self.network(inputs[torch.randperm(len(inputs))[:1000]]))
        fresh = initial_proxies(embeddings, s.num_proxies, self.hier.distance)
        if first and s.start == "data":
            self.hier.proxies.copy_(fresh)
        else:
            used = self.hier.distance(embeddings, self.hier.proxies).argmin(1).unique()
            unused = torch.ones(s.num_proxies, dtype=torch.bool)
            unused[used] = False
            self.hier.proxies[unused] = fresh[unused]

    def scores_of_hier(self, embeddings: Tensor, taxonomy: Tensor) -> dict[str, float]:
        """Purity of the learned tree, and what went on in training."""
        result = {
            "gradient ratio": float(np.median(self.gradient_ratios)),
            "share clipped": float(self.hier.fraction_clipped),
            "share active": float(self.hier.fraction_active),
            "ancestors drawn": float(self.hier.num_ancestors),
        }
        if taxonomy.shape[1] > 1:
            tree = self.hier.hierarchy(self.into_hier(embeddings), taxonomy[:, 0], per_class=True)
            coarse = dict(taxonomy[:, [0, -1]].tolist())
            result["purity, HIER"] = 100 * dendrogram_purity(tree, [coarse[int(k)] for k in tree.leaf_labels])
        return result


class _Accuracy(AccuracyCalculator):  # type: ignore[misc]
    """PML's calculator, and precision at 20."""

    def calculate_precision_at_20(self, knn_labels: Tensor, query_labels: Tensor, **_: Any) -> float:
        return float((knn_labels[:, :20] == query_labels.unsqueeze(1)).float().mean())

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), "precision_at_20"]


def scores(embeddings: Tensor, taxonomy: Tensor, seed: int) -> dict[str, float]:
    """Retrieval in %, by cosine similarity as the base losses train it; purity of trees over the classes."""
    fine, coarse = taxonomy[:, 0], taxonomy[:, -1]
    knn = CustomKNN(CosineSimilarity())
    of_class = AccuracyCalculator(("precision_at_1", "mean_average_precision_at_r"), knn_func=knn)
    values = of_class.get_accuracy(embeddings, fine)
    result = {"R@1": 100 * values["precision_at_1"], "MAP@R": 100 * values["mean_average_precision_at_r"]}
    if taxonomy.shape[1] == 1:
        return result
    above = _Accuracy(("precision_at_1", "precision_at_20"), knn_func=knn, k=20).get_accuracy(embeddings, coarse)
    result |= {"superclass R@1": 100 * above["precision_at_1"], "superclass P@20": 100 * above["precision_at_20"]}
    some = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))[:HIERARCHICAL_SAMPLES]
    unit = F.normalize(embeddings[some])
    result["H-AP"] = 100 * hierarchical_average_precision(1 - unit @ unit.T, taxonomy[some])

    classes, numbered = fine.unique(return_inverse=True)
    means = torch.stack([F.normalize(embeddings[numbered == k]).mean(0) for k in range(len(classes))])
    above_class = torch.stack([coarse[numbered == k][0] for k in range(len(classes))])
    for method in ("ward", "average"):
        tree = Hierarchy.from_linkage(linkage(means.double().numpy(), method))
        result[f"purity, {method}"] = 100 * dendrogram_purity(tree, above_class)
    chance = Hierarchy.from_distances(torch.rand(len(classes), 64, generator=torch.Generator().manual_seed(seed)))
    result["purity, chance"] = 100 * dendrogram_purity(chance, above_class)
    return result
