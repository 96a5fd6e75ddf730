"""HIER in a LightningModule: the loss is a submodule, so that its proxies are moved, saved and optimized.

Trains on scikit-learn's digits 0 to 4, and retrieves among the digits 5 to 9 after every epoch.
"""

import argparse

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hierloss import HIERLoss


class MetricLearner(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        base = losses.ProxyAnchorLoss(num_classes=5, embedding_size=64)
        # The line that adds HIER. With its size given, a checkpoint can be loaded before the first batch, and
        # Lightning's summary can count the parameters.
        hier = HIERLoss(num_proxies=64, embedding_size=64)
        self.loss_func = losses.MultipleLosses([base, hier], weights=[1, 0.5])
        self.calculator = AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"), knn_func=CustomKNN(CosineSimilarity())
        )
        self.unseen: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # `self.parameters()` has the proxies too; groups let them learn faster than the network.
        return torch.optim.AdamW(
            [
                {"params": self.model.parameters(), "lr": 1e-3},
                {"params": self.loss_func.parameters(), "lr": 1e-2},
            ]
        )

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss_func(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.unseen.append((self.model(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        embeddings, labels = (torch.cat(parts) for parts in zip(*self.unseen, strict=True))
        self.unseen.clear()
        accuracy = self.calculator.get_accuracy(embeddings, labels)
        self.log("R@1", accuracy["precision_at_1"], prog_bar=True)
        self.log("MAP@R", accuracy["mean_average_precision_at_r"], prog_bar=True)


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()
    lightning.seed_everything(args.seed)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5
    train_set, test_set = (TensorDataset(images[rows], labels[rows]) for rows in (seen, ~seen))

    trainer = lightning.Trainer(
        max_epochs=args.epochs, num_sanity_val_steps=0, logger=False, enable_checkpointing=False
    )
    trainer.fit(
        MetricLearner(), DataLoader(train_set, batch_size=90, shuffle=True), DataLoader(test_set, batch_size=300)
    )
    scores = {name: 100 * float(trainer.callback_metrics[name]) for name in ("R@1", "MAP@R")}
    print("Digits never seen:", ", ".join(f"{name} {score:.1f}%" for name, score in scores.items()))
    return scores


if __name__ == "__main__":
    main()
