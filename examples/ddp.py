"""Distributed training: every process sees its own part of a batch, and HIER the embeddings of all of them.

    torchrun --nproc-per-node 2 examples/ddp.py

`python examples/ddp.py` does the same. Processes use the CPU (gloo). Trains on scikit-learn's digits 0 to 4, and
retrieves among the digits 5 to 9.
"""

import argparse
import gc
import os
import sys

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.distributed.run import main as torchrun
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

from hierloss import HIERLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--epochs", type=int, default=10, help="passes over the training set (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    args = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # "nccl" on GPUs
        train(args.epochs, args.seed)
        gc.collect()  # if DDP is freed after its process group, torch can hang (pytorch issue 56297)
        dist.destroy_process_group()
    else:  # not started by torchrun
        torchrun(["--standalone", "--nproc-per-node", "2", *sys.argv])


def train(epochs: int, seed: int) -> None:
    rank = dist.get_rank()
    torch.manual_seed(seed)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5
    train_set = TensorDataset(images[seen], labels[seen])
    # all_gather needs batches of one size, so the last and smaller one is dropped.
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(
        train_set, seed=seed, drop_last=True
    )
    loader = DataLoader(train_set, batch_size=45, sampler=sampler, drop_last=True)

    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)))
    base = losses.ProxyAnchorLoss(num_classes=5, embedding_size=64)
    hier = HIERLoss(num_proxies=64, embedding_size=64)  # DDP must know the size
    # DDP around the losses keeps their proxies the same in all processes.
    loss_func = DistributedDataParallel(losses.MultipleLosses([base, hier]))
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    torch.manual_seed(seed + rank)  # from here on, each process draws its own triplets and ancestors
    for epoch in tqdm(range(epochs), unit="epoch", disable=rank > 0):
        sampler.set_epoch(epoch)
        for batch, batch_labels in loader:
            optimizer.zero_grad()
            # One tensor with the embeddings of all processes, for all losses; gradients flow back through it.
            embeddings = torch.cat(all_gather(model(batch)))
            loss_func(embeddings, torch.cat(all_gather(batch_labels))).backward()
            optimizer.step()

    proxies = hier.proxies.detach()
    everywhere = [torch.empty_like(proxies) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, proxies)
    if rank == 0:
        with torch.no_grad():
            embeddings = model.module.eval()(images[~seen])
        metrics = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R"}
        calculator = AccuracyCalculator(include=tuple(metrics), knn_func=CustomKNN(CosineSimilarity()))
        accuracy = calculator.get_accuracy(embeddings, labels[~seen])
        scores = (f"{name} {100 * accuracy[key]:.1f}%" for key, name in metrics.items())
        print("Digits never seen:", ", ".join(scores))
        difference = max(float((other - proxies).abs().max()) for other in everywhere)
        print(f"Largest difference of HIER's proxies between {len(everywhere)} processes: {difference:g}")


if __name__ == "__main__":
    main()
