"""One process of a training by Accelerate, transformers or Lightning; test_trainers.py starts two and compares.

`torchrun --nproc-per-node 2 tests/trainers_worker.py accelerate FOLDER` writes FOLDER/rank0.pt and so on. The data
are one batch of all processes, and neither losses nor miner mind its order. So each step is that of one process.
"""

import gc
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from distributed_worker import B, ModelAndLoss, every_triplet, make_data, make_losses, make_model
from pytorch_metric_learning import losses
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.utils.data import DataLoader, TensorDataset

STEPS, WORLD_SIZE = 4, 2
RATES = {"model": 1e-2, "loss_func": 1e-1}
LIGHTNING = {"accelerator": "cpu", "devices": WORLD_SIZE, "strategy": "ddp", "logger": False}
LIGHTNING |= dict.fromkeys(["enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)


class Gathering(ModelAndLoss):
    """What the plain `Trainer` of transformers trains: its forward returns the loss of all processes together."""

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeddings = torch.cat(all_gather(self.model(features)))
        return {"loss": self.loss_func(embeddings, torch.cat(all_gather(labels)))}


class Deterministic(losses.MultipleLosses):
    """No random ancestors, whatever the trainer does with the mode."""

    def train(self, mode: bool = True) -> "Deterministic":
        return super().train(False)


def make() -> tuple[Gathering, torch.optim.Optimizer]:
    """Model, losses, and an optimizer with the groups of the README."""
    module = Gathering(make_model(), Deterministic([*make_losses(miner=every_triplet(), gradient_ratio=0.3)]))
    groups = [{"params": getattr(module, name).parameters(), "lr": rate} for name, rate in RATES.items()]
    return module.train(), torch.optim.SGD(groups)


def accelerate(folder: Path, steps: int, resume: bool) -> torch.nn.Module:
    """The recipe of docs/distributed.md and of examples/accelerate_loop.py."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    module, optimizer = make()
    loader = DataLoader(TensorDataset(*make_data()), batch_size=B // WORLD_SIZE, shuffle=True, drop_last=True)
    model, loss_func, optimizer, loader = accelerator.prepare(module.model, module.loss_func, optimizer, loader)
    if resume:
        accelerator.load_state(str(folder))
    for _ in range(STEPS // 2 if resume else steps):
        for features, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_func(torch.cat(all_gather(model(features))), torch.cat(all_gather(labels))))
            optimizer.step()
    if steps < STEPS:
        accelerator.save_state(str(folder))
    return module


def transformers(folder: Path, steps: int, resume: bool) -> torch.nn.Module:
    """The losses are part of the model, which gathers."""
    from transformers import Trainer, TrainingArguments

    module, optimizer = make()
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=B // WORLD_SIZE,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo",
    )
    rows = [{"features": x, "labels": y} for x, y in zip(*make_data(), strict=True)]
    Trainer(module, args, train_dataset=rows, optimizers=(optimizer, None)).train(resume_from_checkpoint=resume)
    return module


def lightning(folder: Path, steps: int, resume: bool) -> torch.nn.Module:
    """The losses are submodules, and Lightning's own `all_gather` has gradients."""
    from lightning import LightningModule, Trainer

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.both, self.optimizer = make()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.optimizer

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            embeddings = self.both.model(batch[0])
            embeddings = self.all_gather(embeddings, sync_grads=True).reshape(-1, embeddings.shape[1])
            loss: Tensor = self.both.loss_func(embeddings, self.all_gather(batch[1]).flatten())
            return loss

    module, file = Module(), folder / "half.ckpt"
    loader = DataLoader(TensorDataset(*make_data()), batch_size=B // WORLD_SIZE, shuffle=True, drop_last=True)
    trainer = Trainer(**LIGHTNING, max_steps=steps)
    trainer.fit(module, loader, ckpt_path=str(file) if resume else None)
    if steps < STEPS:
        trainer.save_checkpoint(file)
    return module.both


def callback(folder: Path) -> dict[str, Tensor]:
    """The callback of examples/lightning_module.py, which initializes proxies from samples of each process."""
    from lightning import Trainer

    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "lightning_module.py"))
    torch.manual_seed(0)
    module, digits = example["MetricLearner"](), TensorDataset(torch.randn(90, 64), torch.arange(90) % 5)
    trainer = Trainer(
        **LIGHTNING, max_epochs=2, callbacks=[example["HIERCallback"](folder / "tree", max_samples=45)]
    )
    trainer.fit(module, DataLoader(digits, batch_size=15))
    return {"proxies": module.hier.proxies.detach()}


def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if what == "callback":
        finish(callback(folder), folder)
        return
    train = {"accelerate": accelerate, "transformers": transformers, "lightning": lightning}[what]
    results: dict[str, Any] = {}
    for name, steps, resume in (("whole", STEPS, False), ("half", STEPS // 2, False), ("resumed", STEPS, True)):
        module = train(folder / ("whole" if name == "whole" else "parts"), steps, resume)
        results[name] = {key: value.detach().clone() for key, value in module.state_dict().items()}
    finish(results, folder)


def finish(results: dict[str, Any], folder: Path) -> None:
    torch.save(results, folder / f"rank{torch.distributed.get_rank()}.pt")
    gc.collect()  # if DDP is freed after its process group, torch can hang (pytorch issue 56297)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
