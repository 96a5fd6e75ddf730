"""Train for very long at a high learning rate in mixed precision, and watch what should not happen.

`make soak` runs 20,000 steps each in float32, bfloat16 and float16, and prints the figures of
CONTRIBUTING.md; the tests run some hundred. Half-way the data change: other class centres, on which the
loss has to fall again.
"""

import argparse
import gc
from typing import NamedTuple

import psutil
import torch
from pytorch_metric_learning import losses
from torch import Tensor
from tqdm import tqdm

from hierloss import HIERLoss, ReciprocalNeighborMiner

B, F, D, P, CLASSES = 32, 32, 16, 32, 16
MEASUREMENTS = 80  # in a run
BLOCK = 8  # measurements that are averaged where a half begins and ends


class Report(NamedTuple):
    """What a run has shown."""

    dtype: str
    steps: int
    skipped: int
    """Steps that the gradient scaler left out because of an overflow."""
    not_finite: int
    """Steps, of the others, with a loss or a gradient that was not finite."""
    largest_norm: float
    """Of a proxy, a vector at the origin; on its way to the ball it is clipped to 2.3."""
    largest_radius: float
    """Of a proxy on the ball, as a share of the ball's radius: less than 1 is inside."""
    base: tuple[float, float, float, float]
    """Mean of the base loss where the first half begins and ends, and where the second does."""
    hier: tuple[float, float, float, float]
    """The same of the HIER loss in eval mode."""
    shuffled: float
    """HIER loss in eval mode where the second half ends, of embeddings with coordinates shuffled among them."""
    ancestors: float
    """Proxies that are the ancestor of some triplet of a step, mean where the second half ends."""
    megabytes: tuple[float, float]
    """Resident memory after a quarter of the steps, and at the end."""
    objects: tuple[int, int]
    """Objects that Python's garbage collector knows, at the same times."""


def soak(dtype: torch.dtype, steps: int, lr: float = 0.1, seed: int = 0, progress: bool = True) -> Report:
    """Train a small network, ProxyAnchorLoss and HIERLoss under autocast to ``dtype``, and report."""
    torch.manual_seed(seed)
    centres = torch.randn(2, CLASSES, F)
    model = torch.nn.Sequential(torch.nn.Linear(F, 32), torch.nn.ReLU(), torch.nn.Linear(32, D))
    base, hier = losses.ProxyAnchorLoss(CLASSES, D), HIERLoss(P, D, miner=ReciprocalNeighborMiner(8, 10))
    optimizer = torch.optim.Adam([*model.parameters(), *base.parameters(), *hier.parameters()], lr=lr)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    every = max(5, steps // MEASUREMENTS)
    rows: tuple[list[list[float]], list[list[float]]] = ([], [])  # base, HIER, HIER of shuffled, ancestors
    skipped = not_finite = 0
    norm = radius = 0.0
    for step in tqdm(range(steps), desc=str(dtype), mininterval=1, disable=not progress):
        half = int(step >= steps // 2)
        labels = torch.randint(CLASSES, (B,))
        features = centres[half][labels] + 0.3 * torch.randn(B, F)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            embeddings = model(features)
            base_loss = base(embeddings.float(), labels)  # PML would turn its proxies to half precision
            loss = base_loss + hier(embeddings, labels)
        scaler.scale(loss).backward()
        finite = loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        finite = finite and hier.proxies.grad.isfinite().all()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        overflow = scaler.get_scale() < scale
        skipped += overflow
        not_finite += not finite and not overflow
        if step % every == 0:
            norm = max(norm, hier.proxies.detach().norm(dim=1).max().item())
            on_ball = hier.distance.normalize(hier.proxies.detach())
            radius = max(radius, on_ball.norm(dim=1).max().item() * hier.distance.c**0.5)
            rows[half].append([base_loss.item(), *look(hier, embeddings.detach().float(), labels)])
        if step == steps // 4:
            early = memory()
    late = memory()
    ends = [mean(block) for half in rows for block in (half[:1], half[-BLOCK:])]
    return Report(
        dtype=str(dtype).removeprefix("torch."),
        steps=steps,
        skipped=skipped,
        not_finite=not_finite,
        largest_norm=norm,
        largest_radius=radius,
        base=(ends[0][0], ends[1][0], ends[2][0], ends[3][0]),
        hier=(ends[0][1], ends[1][1], ends[2][1], ends[3][1]),
        shuffled=ends[3][2],
        ancestors=ends[3][3],
        megabytes=(early[0], late[0]),
        objects=(early[1], late[1]),
    )


def memory() -> tuple[float, int]:
    """Resident megabytes, and objects that the garbage collector knows."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20, len(gc.get_objects())


@torch.no_grad()
def look(hier: HIERLoss, embeddings: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """HIER loss in eval mode, that of shuffled coordinates, and how many proxies are ancestors."""
    shuffled = torch.stack([column.roll(i) for i, column in enumerate(embeddings.T)], 1)
    hier.collect_stats = True
    hier.eval()
    values = hier(embeddings, labels).item(), hier(shuffled, labels).item()
    hier.train()
    state = torch.get_rng_state()
    hier(embeddings, labels)
    torch.set_rng_state(state)
    hier.collect_stats = False
    return *values, hier.num_ancestors


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    args = parser.parse_args()
    reports = [soak(getattr(torch, dtype), args.steps, args.lr) for dtype in args.dtypes]
    for name in Report._fields:
        values = [
            "  ".join(f"{v:.4g}" for v in x) if isinstance(x, tuple) else x
            for x in (getattr(report, name) for report in reports)
        ]
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        print(f"{name:15}", *(f"{cell:>32}" for cell in cells))


if __name__ == "__main__":
    main()
