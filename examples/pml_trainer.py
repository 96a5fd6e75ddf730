"""HIER with PML's own trainer and tester, which evaluates by hyperbolic distance after every epoch.

The pairwise cross-entropy of Hyperbolic Vision Transformers and HIER share one hyperbolic distance, and retrieval
uses the same. Trains on scikit-learn's digits 0 to 4, and retrieves among the digits 5 to 9.
"""

import argparse

import numpy as np
import torch
from pytorch_metric_learning import losses, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from hierloss import HIERLoss, PoincareDistance, PoincareKNN

METRICS = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R"}


def main() -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  (PML's sampler draws from it)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5
    train_set, test_set = (TensorDataset(images[rows], labels[rows]) for rows in (seen, ~seen))

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    distance = PoincareDistance()
    loss_func = losses.MultipleLosses(
        [losses.NTXentLoss(temperature=0.2, distance=distance), HIERLoss(num_proxies=64, distance=distance)]
    )
    tester = testers.GlobalEmbeddingSpaceTester(
        # PML's testers scale embeddings to norm 1 by default. Hyperbolic distances need the norm.
        normalize_embeddings=False,
        accuracy_calculator=AccuracyCalculator(include=tuple(METRICS), knn_func=PoincareKNN(distance)),
        dataloader_num_workers=0,
    )
    history: list[dict[str, float]] = []

    # PML's logging_presets.HookContainer also saves models and keeps records; it needs the packages
    # record-keeper and tensorboard. A hook is any function of the trainer.
    def end_of_epoch_hook(trainer: trainers.MetricLossOnly) -> None:
        accuracy = tester.test({"test": test_set}, trainer.epoch, trainer.models["trunk"])["test"]
        history.append({name: float(accuracy[f"{key}_level0"]) for key, name in METRICS.items()})
        scores = (f"{name} {100 * value:.1f}%" for name, value in history[-1].items())
        print(f"Epoch {trainer.epoch}, digits never seen:", ", ".join(scores))

    trainer = trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={
            "trunk_optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
            # The proxies are parameters of the loss. Under this name the trainer finds their optimizer.
            "metric_loss_optimizer": torch.optim.AdamW(loss_func.parameters(), lr=1e-2),
        },
        batch_size=60,
        loss_funcs={"metric_loss": loss_func},
        dataset=train_set,
        sampler=samplers.MPerClassSampler(labels[seen], m=12, length_before_new_iter=len(train_set)),
        dataloader_num_workers=0,
        end_of_epoch_hook=end_of_epoch_hook,
    )
    trainer.train(num_epochs=args.epochs)
    return history


if __name__ == "__main__":
    main()
