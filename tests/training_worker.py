"""Small training runs that save their whole state after every step; test_training_state.py kills and resumes them.

`python tests/training_worker.py FOLDER` takes up the runs where FOLDER has them, and prints a line for each step.
"""

import os
import sys
from pathlib import Path
from typing import Any

import geoopt
import torch
from pytorch_metric_learning import losses

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner

STEPS, CLASSES, D = 40, 6, 8
RUNS: dict[str, dict[str, Any]] = {
    "lazily sized, Adam": {"hier": {}, "optimizer": torch.optim.Adam},
    "lambda, Adam": {"hier": {"gradient_ratio": None}, "optimizer": torch.optim.Adam},
    "proxy batch, AdamW": {"hier": {"proxy_batch_size": 7}, "optimizer": torch.optim.AdamW},
    "sized, SGD": {"hier": {"embedding_size": D}, "optimizer": torch.optim.SGD, "momentum": 0.9},
    "learned curvature": {"hier": {"distance": 0.3}, "optimizer": torch.optim.Adam},
}


class Run:
    """One training: a network with dropout, a base loss with parameters, HIERLoss, and a schedule."""

    def __init__(self, name: str) -> None:
        settings = dict(RUNS[name])
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(12, D))
        hier = dict(settings.pop("hier"))
        if "distance" in hier:
            hier["distance"] = PoincareDistance(c=geoopt.PoincareBall(hier["distance"], learnable=True))
        miner = ReciprocalNeighborMiner(6, 5, distance=hier.get("distance"))
        base = losses.ProxyAnchorLoss(CLASSES, D)
        self.loss_func = losses.MultipleLosses([base, HIERLoss(20, miner=miner, **hier)], weights=[1, 0.5])
        parameters = [*self.model.parameters(), *self.loss_func.parameters()]
        self.optimizer = settings.pop("optimizer")(parameters, lr=0.03, **settings)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, gamma=0.9)
        self.random = torch.get_rng_state()
        self.values: list[float] = []

    def step(self) -> None:
        torch.set_rng_state(self.random)
        features, labels = torch.randn(24, 12), torch.randint(CLASSES, (24,))
        self.optimizer.zero_grad()
        loss = self.loss_func(self.model(features + labels[:, None]), labels)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.random = torch.get_rng_state()
        self.values.append(loss.item())

    def state_dict(self) -> dict[str, Any]:
        parts = {
            name: getattr(self, name).state_dict() for name in ("model", "loss_func", "optimizer", "scheduler")
        }
        return {**parts, "random": self.random, "values": self.values}

    def load_state_dict(self, state: dict[str, Any], order: tuple[str, ...] = ("loss_func", "optimizer")) -> None:
        for name in ("model", *order, "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        self.random, self.values = state["random"], list(state["values"])


def main(folder: Path) -> None:
    checkpoint = folder / "checkpoint.pt"
    runs = {name: Run(name) for name in RUNS}
    if checkpoint.exists():
        for name, state in torch.load(checkpoint, weights_only=True).items():
            runs[name].load_state_dict(state)
    for step in range(len(runs["sized, SGD"].values), STEPS):
        print(step, flush=True)
        for run in runs.values():
            run.step()
        torch.save({name: run.state_dict() for name, run in runs.items()}, folder / "new.pt")
        os.replace(folder / "new.pt", checkpoint)  # at no time is there half a checkpoint


if __name__ == "__main__":
    main(Path(sys.argv[1]))
