"""Search by hyperbolic distance, exactly and in a vector store.

A small network learns from the digits 0 to 4 of scikit-learn with a loss on the Poincaré ball. The digits 5 to 9
are then searched twice: by PoincareKNN, which is exact, and in Qdrant, a vector store that searches by inner
product. Qdrant runs inside Python here. To use a server, replace ":memory:" by its address.
"""

import argparse

import numpy as np
import torch
from pytorch_metric_learning import losses, samplers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from qdrant_client import QdrantClient, models
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from hierloss import PoincareDistance, PoincareKNN
from hierloss.vector_stores import query_vectors, rerank, stored_vectors

EMBEDDING_SIZE = 32
EXTRA = 16  # candidates beyond k, because scores of the store are in float32


def main() -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--neighbors", type=int, default=10, help="neighbours of each query (k)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  (PML's sampler draws from it)

    data, targets = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(targets)
    seen = labels < 5
    distance = PoincareDistance()
    model = train(images[seen], labels[seen], distance, args.epochs)
    with torch.no_grad():
        embeddings, labels = model(images[~seen]), labels[~seen]
    query, reference = embeddings[:200], embeddings[200:]

    # Exact, and as the knn_func of PML's evaluation.
    knn_func = PoincareKNN(distance)
    distances, indices = knn_func(query, args.neighbors, reference)
    calculator = AccuracyCalculator(include=("precision_at_1",), knn_func=knn_func, device=torch.device("cpu"))
    accuracy = calculator.get_accuracy(query, labels[:200], reference, labels[200:])["precision_at_1"]

    # In a vector store.
    client = QdrantClient(":memory:")
    store(client, stored_vectors(reference, distance), labels[200:])
    found, candidates = search(client, query_vectors(query, distance), args.neighbors + EXTRA)
    exact, order = rerank(query, candidates, distance)
    ordered = found.gather(1, order)

    values = {
        name: 100 * float((some[:, : args.neighbors] == indices).double().mean())
        for name, some in {"Qdrant, by its scores": found, "Qdrant, ordered by distance": ordered}.items()
    }
    table = Table("search", "the same neighbours", title=f"{args.neighbors} neighbours of 200 digits never seen")
    for name, share in values.items():
        table.add_row(name, f"{share:.2f} %")
    Console().print(table)
    values["largest difference"] = float((exact[:, : args.neighbors] - distances).abs().max())
    values["R@1"] = 100 * accuracy
    print(f"Distances from {distances.min():.3f} to {distances.max():.3f}")
    print(f"Largest difference between those of PoincareKNN and of rerank: {values['largest difference']:.1e}")
    print(f"R@1 of PoincareKNN: {values['R@1']:.1f} %")
    return values


def train(images: Tensor, labels: Tensor, distance: PoincareDistance, epochs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, EMBEDDING_SIZE))
    loss_func = losses.NTXentLoss(temperature=0.2, distance=distance)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = samplers.MPerClassSampler(labels, m=18, length_before_new_iter=len(labels))
    loader = DataLoader(TensorDataset(images, labels), batch_size=90, sampler=sampler, drop_last=True)
    for _ in tqdm(range(epochs), unit="epoch"):
        for batch, targets in loader:
            optimizer.zero_grad()
            loss_func(model(batch), targets).backward()
            optimizer.step()
    return model.eval()


def store(client: QdrantClient, vectors: Tensor, labels: Tensor) -> None:
    # DOT, not COSINE, which would scale the vectors.
    client.create_collection(
        "digits", vectors_config=models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
    )
    points = models.Batch(
        ids=list(range(len(vectors))),
        vectors=vectors.tolist(),
        payloads=[{"digit": digit} for digit in labels.tolist()],
    )
    client.upsert("digits", points)


def search(client: QdrantClient, vectors: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Ids and stored vectors of the best references for every query."""
    requests = [models.QueryRequest(query=vector, limit=limit, with_vector=True) for vector in vectors.tolist()]
    answers = [answer.points for answer in client.query_batch_points("digits", requests)]
    return (
        torch.tensor([[point.id for point in points] for points in answers]),
        torch.tensor([[point.vector for point in points] for points in answers]),
    )


if __name__ == "__main__":
    main()
