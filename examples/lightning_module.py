"""HIER in a LightningModule, and a callback that logs what HIER does and writes the tree that it learned.

The losses are submodules, so that Lightning moves, saves and optimizes their proxies. Trains on scikit-learn's
digits 0 to 4, and retrieves among the digits 5 to 9 after every epoch.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hierloss import HIERLoss
from hierloss.plotting import write_html

STATISTICS = (
    *("sample_loss", "proxy_loss", "unscaled_gradient_ratio", "num_triplets"),
    *("fraction_active", "num_ancestors", "fraction_clipped"),
)


class HIERCallback(lightning.Callback):  # type: ignore[misc]
    """Logs the statistics of a HIERLoss, initializes its proxies from data, and writes its tree at the end.

    The module must have the loss as ``hier``, built with ``collect_stats=True``, and a method ``embed`` from a
    batch of the training loader to embeddings and labels.

    Args:
        folder: where ``tree.json`` and ``tree.html`` are written.
        max_samples: training samples that initialize the proxies, and that are the leaves of the tree.
    """

    def __init__(self, folder: Path, max_samples: int = 1000) -> None:
        self.folder, self.max_samples = folder, max_samples

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        module.log_dict({f"hier/{name}": float(getattr(module.hier, name)) for name in STATISTICS})

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:  # the embeddings mean something now
            module.hier.init_proxies(self.samples(trainer, module)[0])
            with torch.no_grad():  # processes have other samples, and must have the same proxies
                module.hier.proxies.copy_(trainer.strategy.broadcast(module.hier.proxies))

    @rank_zero_only  # type: ignore[untyped-decorator]
    def on_fit_end(self, trainer: Any, module: Any) -> None:
        tree = module.hier.hierarchy(*self.samples(trainer, module))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tree.json").write_text(tree.to_json())
        write_html(tree, self.folder / "tree.html")

    @torch.no_grad()
    def samples(self, trainer: Any, module: Any) -> tuple[Tensor, Tensor]:
        """Embeddings and labels of the first training samples."""
        parts, count = [], 0
        for batch in trainer.train_dataloader:
            parts.append(module.embed([part.to(module.device) for part in batch]))
            count += len(parts[-1][1])
            if count >= self.max_samples:
                break
        embeddings, labels = (torch.cat(column)[: self.max_samples] for column in zip(*parts, strict=True))
        return embeddings, labels


class MetricLearner(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        self.base = losses.ProxyAnchorLoss(num_classes=5, embedding_size=64)
        # The line that adds HIER. With its size given, a checkpoint can be loaded before the first batch, and
        # Lightning's summary can count the parameters.
        self.hier = HIERLoss(num_proxies=64, embedding_size=64, collect_stats=True)
        self.calculator = AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"), knn_func=CustomKNN(CosineSimilarity())
        )
        self.unseen: list[tuple[Tensor, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # `self.parameters()` has the proxies too; groups let them learn faster than the network.
        return torch.optim.AdamW(
            [
                {"params": self.model.parameters(), "lr": 1e-3},
                {"params": [*self.base.parameters(), *self.hier.parameters()], "lr": 1e-2},
            ]
        )

    def embed(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return self.model(images), labels

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        embeddings, labels = self.embed(batch)
        terms: dict[str, Tensor] = {"base": self.base(embeddings, labels), "hier": self.hier(embeddings, labels)}
        self.log_dict({f"loss/{name}": term for name, term in terms.items()}, prog_bar=True)
        return terms["base"] + terms["hier"]

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
    parser.add_argument("--output", type=Path, default=Path("hier"), help="folder for the tree")
    args = parser.parse_args()
    lightning.seed_everything(args.seed)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5
    train_set, test_set = (TensorDataset(images[rows], labels[rows]) for rows in (seen, ~seen))

    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[HIERCallback(args.output)],
    )
    trainer.fit(
        MetricLearner(), DataLoader(train_set, batch_size=90, shuffle=True), DataLoader(test_set, batch_size=300)
    )
    scores = {name: 100 * float(trainer.callback_metrics[name]) for name in ("R@1", "MAP@R")}
    print("Digits never seen:", ", ".join(f"{name} {score:.1f}%" for name, score in scores.items()))
    print(f"The learned tree: {args.output / 'tree.html'}")
    return scores


if __name__ == "__main__":
    main()
