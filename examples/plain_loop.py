"""The plain PyTorch loop: one line adds HIER to a loss, another gives its proxies to the optimizer.

Trains on scikit-learn's digits 0 to 4, and retrieves among the digits 5 to 9.
"""

import argparse

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from hierloss import HIERLoss


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    base = losses.ProxyAnchorLoss(num_classes=5, embedding_size=64)
    # The line that adds HIER. It takes the raw outputs of the network, neither normalized nor mapped to the ball.
    loss_func = losses.MultipleLosses([base, HIERLoss(num_proxies=64)])
    # The proxies are parameters of the loss, and learn faster than the network.
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss_func.parameters(), "lr": 1e-2}]
    )
    for _ in tqdm(range(args.epochs), unit="epoch"):
        for batch in torch.randperm(int(seen.sum())).split(90):
            optimizer.zero_grad()
            loss_func(model(images[seen][batch]), labels[seen][batch]).backward()
            optimizer.step()

    with torch.no_grad():
        embeddings = model.eval()(images[~seen])
    metrics = {"precision_at_1": "R@1", "mean_average_precision_at_r": "MAP@R"}
    # ProxyAnchorLoss compares by cosine, so retrieval does too.
    calculator = AccuracyCalculator(include=tuple(metrics), knn_func=CustomKNN(CosineSimilarity()))
    accuracy = calculator.get_accuracy(embeddings, labels[~seen])
    scores = {name: 100 * float(accuracy[key]) for key, name in metrics.items()}
    print("Digits never seen:", ", ".join(f"{name} {score:.1f}%" for name, score in scores.items()))
    return scores


if __name__ == "__main__":
    main()
