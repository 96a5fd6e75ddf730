"""Scores of superclasses in PML's calculator: against definitions, with any knn_func, in PML's tester."""

import math

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.inference import CustomKNN

from hierloss import PoincareDistance, PoincareKNN, metrics
from hierloss.accuracy_calculator import HierarchicalAccuracyCalculator

SCORES = ("superclass_precision_at_1", "superclass_precision_at_k", "hierarchical_average_precision")
TAXONOMY = {label: (label // 3, label // 6) for label in range(12)}


def samples(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(12, (count,), generator=generator)
    centers = torch.randn(12, 5, generator=generator)
    return centers[labels] + torch.randn(count, 5, generator=generator), labels


@pytest.mark.parametrize("hyperbolic", [False, True])
def test_scores_equal_their_definitions(hyperbolic):
    embeddings, labels = samples()
    distance = PoincareDistance() if hyperbolic else CosineSimilarity()
    knn_func = PoincareKNN(distance) if hyperbolic else CustomKNN(distance)
    calculator = HierarchicalAccuracyCalculator(
        TAXONOMY, include=(*SCORES, "precision_at_1"), k=7, knn_func=knn_func, device=torch.device("cpu")
    )
    found = calculator.get_accuracy(embeddings, labels)
    matrix = distance(embeddings) if hyperbolic else -distance(embeddings)
    taxonomy = torch.stack([labels, labels // 3, labels // 6], 1)
    nearest = matrix.clone().fill_diagonal_(torch.inf).argsort(1)[:, :7]
    same = (labels[nearest] // 3 == labels[:, None] // 3).double()
    assert found["superclass_precision_at_1"] == pytest.approx(float(same[:, 0].mean()))
    assert found["superclass_precision_at_k"] == pytest.approx(float(same.mean()))
    expected = metrics.hierarchical_average_precision(matrix, taxonomy)
    assert found["hierarchical_average_precision"] == pytest.approx(expected)
    assert found["precision_at_1"] < found["superclass_precision_at_1"] < 1


def test_queries_alone_in_their_superclass_do_not_count():
    points = torch.tensor([[0.0], [0.1], [5.0], [5.2]])
    calculator = HierarchicalAccuracyCalculator({0: 0, 1: 0, 2: 1, 3: 2}, include=SCORES, k=1)
    assert set(calculator.get_accuracy(points, torch.arange(4)).values()) == {1.0}
    found = calculator.get_accuracy(points[2:], torch.arange(2, 4), points[:2], torch.arange(2))
    assert all(np.isnan(value) for value in found.values())


def test_queries_and_references_apart():
    (query, labels), (reference, reference_labels) = samples(20, 1), samples(50, 2)
    calculator = HierarchicalAccuracyCalculator(TAXONOMY, include=SCORES, k=3, device=torch.device("cpu"))
    found = calculator.get_accuracy(query, labels, reference, reference_labels)
    order = torch.cdist(query, reference).argsort(1)
    levels, ranked = (np.stack([x, x // 3, x // 6], -1) for x in (labels.numpy(), reference_labels[order].numpy()))
    expected = metrics.average_precisions(levels, ranked).mean()
    assert found["hierarchical_average_precision"] == pytest.approx(expected)
    assert found["superclass_precision_at_k"] == pytest.approx((levels[:, None, 1] == ranked[:, :3, 1]).mean())


def test_edges_in_a_file_are_the_same_taxonomy(tmp_path):
    lines = [f"family{label // 3} {label}" for label in range(12)]
    lines += ["", *(f"order{family // 2} family{family}" for family in range(4)), "root order0", "root order1"]
    (tmp_path / "edges.txt").write_text("\n".join(lines), "utf-8-sig")  # with the mark of editors on Windows
    scores = []
    as_arrays = {label: np.array(levels) for label, levels in TAXONOMY.items()}
    as_names = {label: list(map(str, levels)) for label, levels in TAXONOMY.items()}
    for taxonomy in (TAXONOMY, tmp_path / "edges.txt", as_arrays, as_names):
        calculator = HierarchicalAccuracyCalculator(taxonomy, include=SCORES, k=5, device=torch.device("cpu"))
        scores.append(calculator.get_accuracy(*samples()))
    assert scores[0] == scores[1] == scores[2] == scores[3]


def test_superclasses_are_numbers():
    """Equal numbers of other types are one superclass, and scores of each superclass are in their order."""
    points, labels = samples()
    scores = []
    for above in ([2, 10], [2.0, torch.tensor(10)], [2, 3]):
        taxonomy = {label: above[label > 5] for label in range(12)}
        calculator = HierarchicalAccuracyCalculator(
            taxonomy, include=["superclass_precision_at_1"], return_per_class=True, device=torch.device("cpu")
        )
        scores.append(calculator.get_accuracy(points, labels))
    assert scores[0] == scores[1] == scores[2]


def test_options_of_pml():
    embeddings, labels = samples()
    options = {"include": SCORES[:1], "k": 1, "device": torch.device("cpu")}
    per_class = HierarchicalAccuracyCalculator(TAXONOMY, return_per_class=True, **options)
    found = per_class.get_accuracy(embeddings, labels)[SCORES[0]]
    nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
    hits = labels[nearest] // 3 == labels // 3
    assert found == pytest.approx([float(hits[labels // 3 == k].double().mean()) for k in range(4)])
    mean = HierarchicalAccuracyCalculator(TAXONOMY, avg_of_avgs=True, **options)
    assert mean.get_accuracy(embeddings, labels)[SCORES[0]] == pytest.approx(np.mean(found))


def test_in_a_tester_of_pml():
    embeddings, labels = samples()
    calculator = HierarchicalAccuracyCalculator(
        dict(enumerate("aaabbbcccddd")), include=SCORES[:1], k=1, device=torch.device("cpu")
    )
    tester = GlobalEmbeddingSpaceTester(
        accuracy_calculator=calculator, normalize_embeddings=False, dataloader_num_workers=0, data_device="cpu"
    )
    dataset = torch.utils.data.TensorDataset(embeddings, labels)
    found = tester.test({"val": dataset}, 0, torch.nn.Identity())["val"]
    nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
    expected = (labels[nearest] // 3 == labels // 3).double().mean()
    assert found["superclass_precision_at_1_level0"] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("taxonomy", "message"),
    [
        ({}, "at least one, got no label"),
        ({0: (), 1: ()}, "at least one, got 0"),
        ({0: (1, 2), 1: 1}, "same number of superclasses, at least one, got 1 and 2"),
        ("a b c", r"edges.txt, line 1: expected a parent and a child, got 'a b c'"),
        ("a 1\nb 1", "edges.txt, line 2: 1 has two parents, a and b"),
        ("b a\na b\na 1", "the nodes above 1 form a cycle"),
        ("a 1\nb 2", "expected one root above all nodes, got a and b"),
        ("r a\na 1\na 01", "each label once"),
        ("r a\na x", "taxonomy must have integer labels: .*'x'"),
        ({2**24: 0, 2**24 + 1: 1}, r"labels up to 2\*\*24, because PML's are float32, got 16777217"),
    ],
)
def test_bad_taxonomy(taxonomy, message, tmp_path):
    if isinstance(taxonomy, str):
        (tmp_path / "edges.txt").write_text(taxonomy)
        taxonomy = tmp_path / "edges.txt"
    with pytest.raises(ValueError, match=message):
        HierarchicalAccuracyCalculator(taxonomy)


def test_precision_at_k_needs_k():
    """Without it, all references are neighbours: the precision would be the same for all embeddings."""
    embeddings, labels = samples()
    own = {"knn_func": CustomKNN(CosineSimilarity()), "exclude": ("AMI", "NMI"), "device": torch.device("cpu")}
    assert "superclass_precision_at_k" not in HierarchicalAccuracyCalculator(TAXONOMY, **own).get_accuracy(
        embeddings, labels
    )
    found = HierarchicalAccuracyCalculator(TAXONOMY, k=3, **own).get_accuracy(embeddings, labels)
    assert 0 < found["superclass_precision_at_k"] < 1
    with pytest.raises(ValueError, match="k must be given for superclass_precision_at_k, got None"):
        HierarchicalAccuracyCalculator(TAXONOMY, include=SCORES)


def test_no_two_labels_are_equal():
    """PML then requests 0 neighbours for "max_bin_count"."""
    own = {"k": "max_bin_count", "knn_func": CustomKNN(CosineSimilarity()), "device": torch.device("cpu")}
    calculator = HierarchicalAccuracyCalculator(TAXONOMY, include=SCORES[:1], **own)
    assert math.isnan(calculator.get_accuracy(torch.randn(6, 3), torch.arange(6))[SCORES[0]])


def test_label_without_superclass():
    calculator = HierarchicalAccuracyCalculator({0: 0, 1: 0}, include=SCORES[:1], k=1, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"a superclass for each label, got none for \[2, 3\]"):
        calculator.get_accuracy(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), torch.arange(4))
