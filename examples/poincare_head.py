"""A network that ends on the Poincaré ball, with class proxies on it that geoopt's RiemannianAdam trains.

Embeddings, class proxies and HIER share one geoopt.PoincareBall, whose curvature is learned too. Trains on
scikit-learn's digits 0 to 4, and retrieves among the digits 5 to 9.
"""

import argparse

import geoopt
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from hierloss import HIERLoss, PoincareDistance, PoincareKNN, ToPoincare

NUM_CLASSES, EMBEDDING_SIZE = 5, 64


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training set")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < NUM_CLASSES

    ball = geoopt.PoincareBall(c=0.1, learnable=True)
    # The last layer maps to the ball, so the distance must not do it again: normalize_embeddings=False.
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE), ToPoincare(ball))
    distance = PoincareDistance(ball, normalize_embeddings=False)
    ntxent = losses.NTXentLoss(temperature=0.2, distance=distance)
    hier = HIERLoss(num_proxies=64, embedding_size=EMBEDDING_SIZE, distance=distance)
    # One point of the ball for each class. geoopt's optimizer moves it along the ball, and never off it.
    class_proxies = geoopt.ManifoldParameter(
        ball.random_normal(NUM_CLASSES, EMBEDDING_SIZE, std=0.1).detach(), manifold=ball
    )
    classes = torch.arange(NUM_CLASSES)

    # RiemannianAdam treats class_proxies as points of their ball, and all others as Adam does. HIER's own proxies
    # are Euclidean vectors that its distance maps to the ball: any optimizer will do for them.
    optimizer = geoopt.optim.RiemannianAdam(
        [
            {"params": [*model[:-1].parameters(), *ball.parameters()], "lr": 1e-3},
            {"params": [class_proxies, hier.proxies], "lr": 1e-2},
        ]
    )
    for _ in (progress := tqdm(range(args.epochs), unit="epoch")):
        for batch in torch.randperm(int(seen.sum())).split(90):
            points, targets = model(images[seen][batch]), labels[seen][batch]
            optimizer.zero_grad()
            # PML's ref_emb: each point is compared with the class proxies instead of the batch.
            loss = ntxent(points, targets, ref_emb=class_proxies, ref_labels=classes) + hier(points, targets)
            loss.backward()
            optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", c=f"{ball.c.item():.4f}")

    with torch.no_grad():
        points = model.eval()(images[~seen])
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), knn_func=PoincareKNN(distance)
    )
    accuracy = calculator.get_accuracy(points, labels[~seen])
    scores = {
        "R@1": 100 * float(accuracy["precision_at_1"]),
        "MAP@R": 100 * float(accuracy["mean_average_precision_at_r"]),
        "c": ball.c.item(),
        "largest norm of a class proxy, in radii": (class_proxies.norm(dim=1).max() * ball.c.sqrt()).item(),
    }
    print("Digits never seen:", ", ".join(f"{name} {value:.3g}" for name, value in scores.items()))
    return scores


if __name__ == "__main__":
    main()
