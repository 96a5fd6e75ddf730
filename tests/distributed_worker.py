"""What one process of a distributed training does and sees; test_distributed.py starts several and compares.

`torchrun --nproc-per-node 2 tests/distributed_worker.py everything FOLDER` writes FOLDER/rank0.pt and so on.
"""

import gc
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel as DDP

from hierloss import HIERLoss

B, F, D, P, CLASSES = 24, 12, 8, 16, 6  # B is that of all processes together


def make_data(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A batch for all processes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (B,), generator=generator)
    return torch.randn(B, F, generator=generator, dtype=dtype) + labels[:, None], labels


def make_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(F, D).to(dtype)


def make_losses(dtype: torch.dtype = torch.float64, **kwargs: Any) -> tuple[torch.nn.Module, HIERLoss]:
    torch.manual_seed(1)
    hier = HIERLoss(P, D, **{"gradient_ratio": None} | kwargs)
    return losses.ProxyAnchorLoss(CLASSES, D).to(dtype), hier.to(dtype)


def every_triplet() -> miners.TripletMarginMiner:
    """A miner that does not mind the order of the batch."""
    return miners.TripletMarginMiner(margin=1000)


def wrapped_losses(base: torch.nn.Module, hier: HIERLoss) -> DDP:
    """Each loss in PML's wrapper, which gathers for itself."""
    wrapped = [DistributedLossWrapper(base), DistributedLossWrapper(hier)]
    return DDP(losses.MultipleLosses(wrapped, weights=[1, 0.5]))


def shard(data: tuple[Tensor, Tensor], rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    here = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return data[0][here], data[1][here]


def gradients(model: torch.nn.Module, base: torch.nn.Module, hier: HIERLoss) -> dict[str, Tensor]:
    return {
        "model": next(model.parameters()).grad.clone(),
        "base": base.proxies.grad.clone(),
        "hier": hier.proxies.grad.clone(),
    }


def one_step(
    rank: int, world_size: int, *, seed: int | None, gather: bool = True, unscaled: bool = False, **kwargs: Any
) -> dict[str, Tensor]:
    """Gradients of a step with PML's wrappers or without gathering; ``seed`` ``None`` is eval mode."""
    model, (base, hier) = DDP(make_model()), make_losses(**kwargs)
    plain = losses.MultipleLosses([base, hier], weights=[1, 0.5])
    loss_func = wrapped_losses(base, hier) if gather else DDP(plain)
    if unscaled:
        for parameter in loss_func.parameters():
            parameter.register_hook(lambda grad: grad / world_size)
    loss_func.train(seed is not None)
    features, labels = shard(make_data(), rank, world_size)
    torch.manual_seed(seed or 0)
    loss_func(model(features), labels).backward()
    return gradients(model, base, hier)


def gathered_once(
    rank: int, world_size: int, seed: int | None, shard_model: bool = False, **kwargs: Any
) -> dict[str, Tensor]:
    """The recipe of docs/distributed.md: gradients of a step, and the ratio of HIER's in the whole batch."""
    model, (base, hier) = make_model(), make_losses(**kwargs, collect_stats=True)
    parallel = FSDP(model, use_orig_params=True, device_id=torch.device("cpu")) if shard_model else DDP(model)
    loss_func = DDP(losses.MultipleLosses([base, hier], weights=[1, 0.5])).train(seed is not None)
    features, labels = shard(make_data(), rank, world_size)
    torch.manual_seed(seed or 0)
    embeddings = torch.cat(all_gather(parallel(features)))
    loss_func(embeddings, torch.cat(all_gather(labels))).backward()
    ratio = torch.tensor(hier.unscaled_gradient_ratio)
    if not shard_model:
        return gradients(model, base, hier) | {"ratio": ratio}
    parts = [torch.empty(F * D + D, dtype=torch.float64) for _ in range(world_size)]  # uneven shards
    own = torch.cat([p.grad.flatten() for p in parallel.parameters() if p.grad is not None])
    sizes = [torch.tensor(0) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor(len(own)))
    dist.all_gather(parts, torch.cat([own, own.new_zeros(F * D + D - len(own))]))
    whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return {
        "model": whole[: F * D].view(D, F),
        "base": base.proxies.grad,
        "hier": hier.proxies.grad,
        "ratio": ratio,
    }


def train(
    rank: int, world_size: int, steps: int, around_loss: bool = True, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Many steps with draws of their own in each process; with mixed precision if there is a dtype for it."""
    model, (base, hier) = DDP(make_model(torch.float32)), make_losses(torch.float32)
    loss_func = wrapped_losses(base, hier) if around_loss else wrapped_losses(base, hier).module
    optimizer = torch.optim.Adam([*model.parameters(), *loss_func.parameters()], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    torch.manual_seed(rank)
    values = []
    for step in range(steps):
        features, labels = shard(make_data(step, torch.float32), rank, world_size)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            embeddings = model(features)
        # In float32, or PML's ProxyAnchorLoss turns its proxies to half precision, and DDP no longer knows them.
        loss = loss_func(embeddings.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(loss.item())
    return {"hier": hier.proxies.detach(), "base": base.proxies.detach(), "values": values}


def awkward_batches(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Batches of other sizes in each process, of one class, of one sample: none of them waits for ever."""
    results = []
    for gather, sizes, one_class in (
        (False, [4, 9, 1, 3], False),
        (False, [6, 6, 6, 6], True),
        (True, [6, 6, 6, 6], True),
        (True, [1, 1, 1, 1], False),
    ):
        model, (base, hier) = DDP(make_model()), make_losses()
        both = losses.MultipleLosses([base, hier])
        loss_func = wrapped_losses(base, hier) if gather else DDP(both)
        features, labels = make_data(rank)
        if one_class and rank == 0:
            labels = torch.zeros_like(labels)
        size = sizes[rank]
        loss_func(model(features[:size]), labels[:size]).backward()
        results.append(gradients(model, base, hier))
    return results


class ModelAndLoss(torch.nn.Module):
    """Both in one module, for what takes one only."""

    def __init__(self, model: torch.nn.Module, loss_func: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.loss_func = model, loss_func

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.loss_func(self.model(features), labels)


def uneven_number_of_batches(rank: int, world_size: int) -> dict[str, Tensor]:
    """The last process has three batches more than the others; `Join` waits for it."""
    model, (base, hier) = make_model(), make_losses()
    both = DDP(ModelAndLoss(model, losses.MultipleLosses([base, hier])))
    optimizer = torch.optim.SGD(both.parameters(), lr=0.01)
    with Join([both]):
        for step in range(4 + 3 * (rank == world_size - 1)):
            features, labels = make_data(10 * rank + step)
            optimizer.zero_grad()
            both(features, labels).backward()
            optimizer.step()
    return {"hier": hier.proxies.detach(), "model": model.weight.detach()}


def uneven_gathered_batches(rank: int, world_size: int) -> dict[str, Tensor]:
    """The last process has a sample less than the others, and PML's wrapper gathers."""
    model, (base, hier) = DDP(make_model()), make_losses()
    features, labels = make_data(rank)
    size = 6 - (rank == world_size - 1)
    wrapped_losses(base, hier)(model(features[:size]), labels[:size]).backward()
    return gradients(model, base, hier)


def start_from_data(rank: int, world_size: int) -> Tensor:
    """Each process has other embeddings; what the first makes of its own is sent to all."""
    _, hier = make_losses()
    torch.manual_seed(rank)
    hier.init_proxies(make_data(rank)[0][:, :D])
    with torch.no_grad():
        dist.broadcast(hier.proxies, src=0)
    return hier.proxies.detach()


def messages(rank: int, world_size: int) -> dict[str, str]:
    """What goes wrong in the same way in all processes, and what is said."""
    said = {}
    features, labels = make_data()
    for name, call in {
        "lazily sized": lambda: DDP(HIERLoss(P)),
        "efficient": lambda: DistributedLossWrapper(make_losses()[1], efficient=True)(features[:, :D], labels),
        "multiple": lambda: DistributedLossWrapper(losses.MultipleLosses([make_losses()[1]])),
    }.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def everything(*here: int) -> dict[str, Any]:
    _, hier = make_losses()
    return {
        "gathered once": gathered_once(*here, None, gradient_ratio=0.3),
        "gathered once, FSDP": gathered_once(*here, None, shard_model=True, gradient_ratio=0.3),
        "gathered once, draws": gathered_once(*here, 7 + here[0]),
        "any order, eval": one_step(*here, seed=None, miner=every_triplet()),
        "any order, unscaled": one_step(*here, seed=None, miner=every_triplet(), unscaled=True),
        "eval": one_step(*here, seed=None),
        "same seeds": one_step(*here, seed=7),
        "other seeds": one_step(*here, seed=7 + here[0]),
        "not gathered": one_step(*here, seed=7 + here[0], gather=False),
        "train": train(*here, 200),
        "train, bfloat16": train(*here, 60, dtype=torch.bfloat16),
        "train, float16": train(*here, 60, dtype=torch.float16),
        "train, no DDP around the loss": train(*here, 200, around_loss=False),
        "awkward batches": awkward_batches(*here),
        "uneven number of batches": uneven_number_of_batches(*here),
        "start from data": start_from_data(*here),
        "without labels": DistributedLossWrapper(hier)(make_data()[0][:, :D]).item(),
        "messages": messages(*here),
    }


@record
def main(what: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    here = dist.get_rank(), dist.get_world_size()
    results = {"everything": everything, "uneven": uneven_gathered_batches}[what](*here)
    torch.save(results, folder / f"rank{here[0]}.pt")
    gc.collect()  # if DDP is freed after its process group, torch can hang (pytorch issue 56297)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
