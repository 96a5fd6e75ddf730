"""One run: train a linear head on frozen features with one method, and score it at several lengths of training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional as F

from hierloss import HIERLoss, ReciprocalNeighborMiner
from hierloss.gradient_ratio import hold_gradient_ratio
from hierloss.metrics import hierarchical_average_precision

from .data import Part, Split

EMBEDDING_SIZE = 128
CLASSES_PER_BATCH, SAMPLES_PER_CLASS = 18, 5
LR, PROXY_LR = 1e-3, 1e-2  # Adam's learning rates of the head, and of class proxies and hierarchical proxies
CHECKPOINTS = (0, 50, 100, 200, 400, 800, 1600, 3200)
MOST_STEPS = CHECKPOINTS[-1]
H_AP_SAMPLES = 1000  # drawn at random, because the time of H-AP grows with their square
SCORES = ("R@1", "MAP@R", "superclass P@20", "H-AP")

LOSSES: dict[str, Callable[[int, int], tuple[nn.Module, nn.Module | None]]] = {
    "ProxyAnchor": lambda classes, size: (losses.ProxyAnchorLoss(classes, size), None),
    "NormalizedSoftmax": lambda classes, size: (losses.NormalizedSoftmaxLoss(classes, size), None),
    "SupCon": lambda *_: (losses.SupConLoss(), None),
    "MultiSimilarity": lambda *_: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
    "Triplet": lambda *_: (losses.TripletMarginLoss(margin=0.1), miners.TripletMarginMiner(margin=0.1)),
}


@dataclass(frozen=True)
class Method:
    """What is trained beside the base loss: HIER, a distillation of the frozen similarities, both, or nothing."""

    hier: bool = True
    distill: bool = False
    head: bool = True  # otherwise, the frozen features themselves are scored
    ratio: float | None = None  # of the gradients at the embeddings; None is lambda = 1
    frozen: bool = False  # neighbours among the frozen features instead of the embeddings
    schedule: str = "constant"  # or "rising", "falling"
    num_proxies: int = 64
    triplets_per_anchor: int = 50
    proxy_triplets: int | None = None  # for each proxy; None: as triplets_per_anchor
    proxy_batch_size: int | None = None


OWN = Method(ratio=0.3)
FROZEN = replace(OWN, frozen=True)
NEIGHBORS = {"": OWN, ", frozen": FROZEN}
METHODS: dict[str, Method] = {
    "none": Method(hier=False),
    "frozen features": Method(hier=False, head=False),
    "lambda 1": Method(),
    **{f"ratio {r}{name}": replace(own, ratio=r) for name, own in NEIGHBORS.items() for r in (0.1, 0.3, 1.0)},
    **{f"distillation {ratio}": Method(hier=False, distill=True, ratio=ratio) for ratio in (0.3, 1.0)},
    **{
        f"ratio {ratio}{name}, {schedule}": replace(own, ratio=ratio, schedule=schedule)
        for name, own in NEIGHBORS.items()
        for ratio, schedule in ((0.3, "rising"), (0.3, "falling"), (1.0, "rising"))
    },
    **{
        f"ratio 0.3{name}, {count} triplets": replace(own, triplets_per_anchor=count)
        for name, own in NEIGHBORS.items()
        for count in (10, 200)
    },
    "ratio 0.3, 512 proxies": replace(OWN, num_proxies=512),
    "ratio 0.3, 512 proxies, 64 a step": replace(OWN, num_proxies=512, proxy_batch_size=64),
    "ratio 0.1, 512 proxies": replace(OWN, ratio=0.1, num_proxies=512),
    "ratio 0.1, 512 proxies with 10 triplets": replace(OWN, ratio=0.1, num_proxies=512, proxy_triplets=10),
    "ratio 0.3, frozen, and distillation": replace(FROZEN, distill=True),
}


def run(split: Split, loss: str, method: Method, seed: int, steps: int, test: bool) -> dict[str, Any]:
    """Scores of validation classes, and of test classes if ``test``, at each checkpoint up to ``steps``."""
    parts = {"validation": split.validation} | ({"test": split.test} if test else {})
    curve: dict[str, Any] = {}
    for step, head, _ in train(split.train, loss, method, seed, steps):
        if step in CHECKPOINTS:
            curve[str(step)] = {name: scores(head, part, seed) for name, part in parts.items()}
    return curve


def train(
    data: Part, loss: str, method: Method, seed: int, steps: int
) -> Iterator[tuple[int, nn.Module, HIERLoss]]:
    """Train a head; yields the number of steps done, the head and HIER, before each step and after the last.

    Equal seeds mean equal initial weights and equal batches, whatever the method is.
    """
    if not method.head:
        yield 0, nn.Identity(), make_hier(method)
        return
    torch.manual_seed(seed)
    features, labels = data.features, data.taxonomy[:, 0].unique(return_inverse=True)[1]
    head = make_head(features.shape[1])
    base, miner = LOSSES[loss](int(labels.max()) + 1, EMBEDDING_SIZE)
    hier = make_hier(method)
    optimizer = torch.optim.Adam(
        [
            {"params": head.parameters(), "lr": LR},
            {"params": [*base.parameters(), *hier.parameters()], "lr": PROXY_LR},
        ]
    )
    batches = make_batches(labels, seed)
    for step in range(steps):
        yield step, head, hier
        rows = next(batches)
        embeddings, targets = head(features[rows]), labels[rows]
        total = base(embeddings, targets, miner(embeddings, targets) if miner else None)
        if method.hier:
            hier.gradient_ratio = scheduled(method, step / steps)
            neighbors = features[rows] if method.frozen else None
            total = total + hier(embeddings, targets, neighbor_features=neighbors)
        if method.distill:
            total = total + distillation(hold_gradient_ratio(embeddings, method.ratio), features[rows])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    yield steps, head, hier


def make_head(width: int) -> nn.Sequential:
    """LayerNorm without weights and an orthogonal linear map, as in the paper."""
    linear = nn.Linear(width, EMBEDDING_SIZE)
    nn.init.orthogonal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), linear)


def make_hier(method: Method) -> HIERLoss:
    """HIER; it is not trained by methods without it."""
    counts = (method.triplets_per_anchor, method.proxy_triplets or method.triplets_per_anchor)
    miner, proxy_miner = (ReciprocalNeighborMiner(triplets_per_anchor=count) for count in counts)
    options = {"miner": miner, "proxy_miner": proxy_miner, "proxy_batch_size": method.proxy_batch_size}
    return HIERLoss(method.num_proxies, EMBEDDING_SIZE, **options)


def scheduled(method: Method, done: float) -> float | None:
    """The ratio after this share of the training; schedules change in the first half."""
    rising = min(1.0, 2 * done)
    share = {"constant": 1.0, "rising": rising, "falling": 1 - rising}[method.schedule]
    return None if method.ratio is None else method.ratio * share


def distillation(embeddings: Tensor, features: Tensor, temperature: float = 0.1) -> Tensor:
    """Divergence of the rows of softmaxes of cosine similarities, of the embeddings from the frozen features."""
    rows = []
    for x in (embeddings, features):
        x = F.normalize(x)
        similarity = (x @ x.T / temperature).fill_diagonal_(-1e4)
        rows.append(similarity.log_softmax(1))
    return F.kl_div(rows[0], rows[1], reduction="batchmean", log_target=True)


def make_batches(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """Rows of batches of 18 classes with 5 samples each."""
    generator = torch.Generator().manual_seed(seed)
    by_class = [torch.where(labels == label)[0] for label in range(int(labels.max()) + 1)]
    while True:
        rows = []
        for label in torch.randperm(len(by_class), generator=generator)[:CLASSES_PER_BATCH].tolist():
            own = by_class[label]
            order = torch.randperm(max(len(own), SAMPLES_PER_CLASS), generator=generator)[:SAMPLES_PER_CLASS]
            rows.append(own[order % len(own)])
        yield torch.cat(rows)


@torch.no_grad()
def scores(head: nn.Module, part: Part, seed: int) -> dict[str, float]:
    """R@1 and MAP@R of the classes, precision at 20 of the superclasses above them, and H-AP, in percent."""
    embeddings = F.normalize(head(part.features))
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
    fine, superclass = part.taxonomy[:, 0], part.taxonomy[:, 1]
    relevant = fine.bincount()[fine] - 1
    longest = int(relevant.max())
    nearest = similarity.topk(max(longest, 20), 1).indices
    hits = (fine[nearest[:, :longest]] == fine[:, None]).double()
    ranks = torch.arange(1, longest + 1)
    precision = hits.cumsum(1) / ranks * hits * (ranks <= relevant[:, None])
    found = relevant > 0
    chosen = torch.randperm(len(fine), generator=torch.Generator().manual_seed(seed))[:H_AP_SAMPLES]
    values = {
        "R@1": hits[found, 0].mean(),
        "MAP@R": (precision.sum(1)[found] / relevant[found]).mean(),
        "superclass P@20": (superclass[nearest[:, :20]] == superclass[:, None]).double().mean(),
        "H-AP": hierarchical_average_precision(
            -similarity[chosen][:, chosen].nan_to_num(neginf=-2.0), part.taxonomy[chosen]
        ),
    }
    return {name: round(100 * float(value), 4) for name, value in values.items()}
