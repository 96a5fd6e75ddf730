"""Hugging Face Accelerate on scikit-learn's digits: `torchrun --nproc-per-node 2 examples/accelerate_loop.py`."""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pytorch_metric_learning import losses
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.data import DataLoader, TensorDataset

from hierloss import HIERLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    parser.add_argument("--output", default="accelerate", help="folder of the checkpoint")
    args = parser.parse_args()
    # Without cpu=True, Accelerate would not connect processes that have no GPU.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(args.seed)

    data, targets = load_digits(return_X_y=True)
    digits = TensorDataset(torch.from_numpy(data).float() / 16, torch.from_numpy(targets))
    # all_gather needs batches of one size, so the last and smaller one is dropped.
    loader = DataLoader(digits, batch_size=45, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    base = losses.ProxyAnchorLoss(num_classes=10, embedding_size=64)
    loss_func = losses.MultipleLosses([base, HIERLoss(num_proxies=64, embedding_size=64)])
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    # The loss is prepared too: its proxies stay equal in all processes, and are in the checkpoint.
    model, loss_func, optimizer, loader = accelerator.prepare(model, loss_func, optimizer, loader)
    set_seed(args.seed, device_specific=True)  # each process draws its own triplets and ancestors
    for epoch in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss: Tensor = loss_func(gather(accelerator, model(images)), gather(accelerator, labels))
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"Epoch {epoch + 1}, {accelerator.num_processes} processes: loss {loss.item():.2f}")
    accelerator.save_state(args.output)  # load_state resumes


def gather(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The rows of all processes; gradients flow back, which `accelerator.gather` does not do."""
    return torch.cat(all_gather(tensor)) if accelerator.num_processes > 1 else tensor


if __name__ == "__main__":
    main()
