"""Real vector stores find the neighbours of exact hyperbolic search."""

import geoopt
import pytest
import torch

from hierloss import PoincareDistance, PoincareKNN
from hierloss.vector_stores import query_vectors, rerank, stored_vectors

K, EXTRA = 10, 16


def qdrant(stored, queries, limit, folder):
    qdrant_client = pytest.importorskip("qdrant_client")
    models = qdrant_client.models
    client = qdrant_client.QdrantClient(":memory:")
    params = models.VectorParams(size=stored.shape[1], distance=models.Distance.DOT)
    client.create_collection("items", vectors_config=params)
    client.upsert("items", models.Batch(ids=list(range(len(stored))), vectors=stored.tolist()))
    requests = [models.QueryRequest(query=query, limit=limit, with_vector=True) for query in queries.tolist()]
    answers = [answer.points for answer in client.query_batch_points("items", requests)]
    return [[(point.id, point.vector) for point in points] for points in answers]


def lancedb(stored, queries, limit, folder):
    rows = [{"id": i, "vector": row} for i, row in enumerate(stored.numpy())]
    table = pytest.importorskip("lancedb").connect(folder).create_table("items", rows)
    answers = [table.search(query).distance_type("dot").limit(limit).to_list() for query in queries.numpy()]
    return [[(row["id"], row["vector"]) for row in rows] for rows in answers]


def random(scale):
    """Points without structure, and one of each query's near duplicates."""
    references, query = torch.randn(1000, 16) * scale, torch.randn(30, 16) * scale
    references[:30] = query + 1e-3 * torch.randn(30, 16)
    return query, references


def clusters(scale):
    """Neighbours that are near each other, and far from the origin."""
    centers = torch.randn(10, 16) * scale
    return centers + 0.02 * torch.randn(10, 16), (centers + 0.02 * torch.randn(100, 10, 16)).flatten(0, 1)


@pytest.mark.parametrize("store", [qdrant, lancedb])
@pytest.mark.parametrize(
    ("distance", "data", "scale", "farthest"),
    [
        (PoincareDistance(), random, 0.3, 2),
        (PoincareDistance(), random, 2.0, 4.6),
        (PoincareDistance(), clusters, 2.0, 4.6),
        (PoincareDistance(c=1.0, clip_radius=5.0), random, 2.0, 10),
        (PoincareDistance(c=1.0, clip_radius=5.0), clusters, 2.0, 10),
        (PoincareDistance(clip_radius=None), random, 3.0, 20),
        (PoincareDistance(geoopt.PoincareBall(0.3, learnable=True)), random, 1.0, 4.6),
    ],
)
def test_stores_find_the_exact_neighbors(store, distance, data, scale, farthest, tmp_path):
    query, references = data(scale)
    assert distance(references, torch.zeros(1, 16)).median() > 0.9 * farthest
    stored = torch.cat([stored_vectors(part, distance) for part in references.split(400)])
    assert stored.shape == (len(references), 16 + 2)
    answers = store(stored, query_vectors(query, distance), K + EXTRA, tmp_path)
    ids = torch.tensor([[i for i, _ in found] for found in answers])
    candidates = torch.tensor([[vector for _, vector in found] for found in answers])
    distances, order = rerank(query, candidates, distance)
    expected, nearest = PoincareKNN(distance)(query, K, references)
    assert torch.equal(ids.gather(1, order)[:, :K], nearest)
    torch.testing.assert_close(distances[:, :K], expected, rtol=1e-6, atol=1e-3)  # far away, float32 moves points
    assert distances.dtype == torch.float32
    assert not distances.requires_grad


def test_scores_alone_are_not_in_the_order_of_distances():
    """Why there is `rerank`. If this fails, the module may become shorter."""
    distance = PoincareDistance()
    query, references = clusters(9.0)
    scores = query_vectors(query, distance) @ stored_vectors(references, distance).T
    assert not torch.equal(scores.topk(K).indices, PoincareKNN(distance)(query, K, references)[1])


def test_vectors_of_several_calls_have_one_length():
    """Graphs of neighbours, such as HNSW, need it."""
    distance = PoincareDistance()
    parts = [stored_vectors(torch.randn(9, 4) * scale, distance) for scale in (0.1, 1, 9)]
    lengths = torch.cat(parts).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(27))


def test_vectors_of_points_of_the_ball_have_one_length():
    """The clip radius does not apply to them."""
    points = torch.tensor([[0.0, 0.1], [0.5, 0.0], [0.0, 0.999]])
    lengths = stored_vectors(points, PoincareDistance(c=1.0, normalize_embeddings=False)).norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(3))


def test_points_of_the_ball_and_half_precision():
    distance = PoincareDistance(c=1.0, normalize_embeddings=False)
    points = torch.rand(40, 4).half() * 0.4
    candidates = stored_vectors(points, distance).expand(3, -1, -1)
    distances, order = rerank(points[:3], candidates, distance)
    expected = PoincareKNN(distance)(points[:3], 40, points)
    assert torch.equal(order, expected[1])
    torch.testing.assert_close(distances, expected[0], rtol=1e-6, atol=1e-6)
    for array in (candidates.numpy(), candidates.flip(0).numpy()[::-1]):
        assert torch.equal(rerank(points[:3], array, distance)[1], order)
    assert rerank(points[:3].double(), candidates, distance)[0].dtype == torch.float64


def test_bad_input():
    distance, query = PoincareDistance(), torch.randn(3, 8)
    for function in (stored_vectors, query_vectors):
        with pytest.raises(TypeError, match="distance must be a PoincareDistance, got float"):
            function(query, 0.1)
    with pytest.raises(ValueError, match="embeddings must be finite, got NaN or infinity in row 1"):
        stored_vectors(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), distance)
    lost = PoincareDistance(geoopt.PoincareBall(1.0, learnable=True))
    lost.curvature.isp_c.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="c of the distance must be a finite positive number, got nan"):
        stored_vectors(query, lost)
    with pytest.raises(ValueError, match=r"query must have shape \(batch_size, embedding_size\)"):
        query_vectors(query[0], distance)
    for shape in [(3, 5, 8), (2, 5, 10), (3, 10)]:
        with pytest.raises(ValueError, match=r"candidates must have shape \(3, K, 10\), .* got shape"):
            rerank(query, torch.randn(shape), distance)
