"""Time of exact and approximate hyperbolic search, beside FAISS's flat indexes for Euclidean space."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.speed import side_by_side, summary
from hierloss import PoincareKNN

Search = Callable[[], Tensor]


def make_data(references: int, queries: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings in classes, with norms below and above the clip radius."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, dim, generator=generator)

    def draw(n: int) -> Tensor:
        own = centers[torch.randint(classes, (n,), generator=generator)]
        v = own + 0.5 * torch.randn(n, dim, generator=generator)
        return v / dim**0.5 * (0.8 + 1.9 * torch.rand(n, 1, generator=generator))

    return draw(queries), draw(references)


def compare(
    repeats: int,
    references: int = 100_000,
    queries: int = 10_000,
    dim: int = 128,
    k: int = 10,
    classes: int = 1000,
    beams: tuple[int, ...] = (32, 64, 128),
) -> list[dict[str, Any]]:
    """One row for each search: seconds, and the share of the k nearest that it finds.

    Flat searches are timed with all that comes before, from embeddings to neighbours; those with the graph without
    the building of it, which has a column of its own.
    """
    query, reference = make_data(references, queries, dim, classes)

    def flat(index: Callable[[int], Any]) -> Search:
        def run() -> Tensor:
            built = index(dim)
            built.add(reference.numpy())
            return torch.from_numpy(built.search(query.numpy(), k)[1])

        return run

    exact = PoincareKNN()
    searches: dict[str, Search] = {
        "FAISS, IndexFlatL2": flat(faiss.IndexFlatL2),
        "FAISS, IndexFlatIP": flat(faiss.IndexFlatIP),
        "PoincareKNN": lambda: exact(query, k, reference)[1],
    }
    graphs = []

    def graph(size: int) -> Any:
        graphs.append(faiss.index_factory(size, "HNSW32", faiss.METRIC_INNER_PRODUCT))
        return graphs[-1]

    approximate = PoincareKNN(index=graph)
    approximate.train(reference)
    progress = tqdm(total=(3 + len(beams)) * (repeats + 1), unit="search", desc="building the graph")
    start = time.perf_counter()
    approximate(query[:1], k)
    building = time.perf_counter() - start

    def with_beam(beam: int) -> Search:
        def run() -> Tensor:
            graphs[0].hnsw.efSearch = beam
            return approximate(query, k)[1]

        return run

    searches |= {f"PoincareKNN, HNSW32, efSearch={beam}": with_beam(beam) for beam in beams}
    found: dict[str, Tensor] = {}

    def keeping(name: str, search: Search) -> Search:
        def run() -> Tensor:
            progress.set_description(name)
            found[name] = search()
            progress.update()
            return found[name]

        return run

    with progress:
        times = side_by_side({name: keeping(name, search) for name, search in searches.items()}, "cpu", repeats)
    euclidean = statistics.median(times["FAISS, IndexFlatL2"])
    return [
        {
            "search": name,
            **summary(seconds),
            "times IndexFlatL2": statistics.median(seconds) / euclidean,
            "building s": building if "HNSW" in name else "",
            "found %": 100 * recall(found[name], found["PoincareKNN"]),
        }
        for name, seconds in times.items()
    ]


def recall(found: Tensor, nearest: Tensor) -> float:
    """The share of the nearest neighbours that are among those found."""
    return (nearest.unsqueeze(2) == found.unsqueeze(1)).any(2).double().mean().item()
