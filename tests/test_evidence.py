"""The study trains and scores what it says, resumes where it stopped, and compares in pairs."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy import stats

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import data, report, study, training


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A table of 24 classes in 6 superclasses, and runs of four steps."""
    monkeypatch.setattr(training, "CHECKPOINTS", (0, 1, 2, 4))
    monkeypatch.setattr(training, "MOST_STEPS", 4)
    generator = np.random.default_rng(0)
    label = np.repeat(np.arange(24), 8)
    features = generator.normal(size=(6, 32))[label // 4] + generator.normal(size=(24, 32))[label]
    features = features + generator.normal(size=(len(label), 32))
    np.savez(tmp_path / "cub200_2010_features.npz", features=np.float16(features), label=label, family=label // 4)
    return tmp_path


def split_of(folder, seed=0):
    return data.split(data.load("cub", folder), seed)


def test_no_class_is_both_trained_and_retrieved(folder):
    table = data.load("cub", folder)
    assert table.features.dtype == torch.float32
    assert torch.equal(table.taxonomy[:, 1], table.taxonomy[:, 0] // 4)
    splits = [data.split(table, seed) for seed in range(2)]
    for parts in splits:
        classes = [set(part.taxonomy[:, 0].tolist()) for part in parts]
        assert [len(c) for c in classes] == [8, 4, 12]
        assert set.union(*classes) == set(range(24))
        for part in parts:
            for features, levels in zip(part.features[:3], part.taxonomy[:3], strict=True):
                row = (table.features == features).all(1)
                assert torch.equal(table.taxonomy[row][0], levels)
    assert set(splits[0].test.taxonomy[:, 0].tolist()) != set(splits[1].test.taxonomy[:, 0].tolist())


def test_scores_are_those_of_pml(folder):
    part = split_of(folder).test
    head = training.make_head(32)
    found = training.scores(head, part, 0)
    with torch.no_grad():
        embeddings = head(part.features)
    calculator = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"), knn_func=CustomKNN(CosineSimilarity())
    )
    expected = calculator.get_accuracy(embeddings, part.taxonomy[:, 0])
    assert found["R@1"] == pytest.approx(100 * expected["precision_at_1"], abs=1e-3)
    assert found["MAP@R"] == pytest.approx(100 * expected["mean_average_precision_at_r"], abs=1e-3)
    similarity = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(embeddings).T
    nearest = similarity.fill_diagonal_(-9).topk(20).indices
    superclass = part.taxonomy[:, 1]
    shares = (superclass[nearest] == superclass[:, None]).double().mean()
    assert found["superclass P@20"] == pytest.approx(100 * float(shares), abs=1e-3)
    assert found["superclass P@20"] < found["H-AP"] < 100


def test_batches_are_the_same_for_every_method_and_balanced():
    labels = torch.arange(24).repeat_interleave(torch.tensor([3, 9] * 12))
    first, again, other = (training.make_batches(labels, seed) for seed in (0, 0, 1))
    rows = next(first)
    assert torch.equal(rows, next(again))
    assert not torch.equal(rows, next(other))
    assert labels[rows].view(18, 5).unique(dim=1).shape == (18, 1)
    assert len(labels[rows].unique()) == 18


@pytest.mark.parametrize("name", [*training.METHODS])
def test_every_method_starts_alike_and_changes_the_training(name, folder):
    parts = split_of(folder)
    run = partial(training.run, parts, "SupCon", seed=0, steps=4, test=True)
    curve, alone = run(method=training.METHODS[name]), run(method=training.METHODS["none"])
    assert list(curve) == ["0", "1", "2", "4"]
    assert curve["0"] == alone["0"]
    assert (curve["4"] == alone["4"]) == (name == "none")
    assert run(method=training.METHODS[name]) == curve
    assert set(curve["4"]) == {"validation", "test"}
    assert set(run(method=training.METHODS[name], test=False)["4"]) == {"validation"}


@pytest.mark.parametrize("loss", training.LOSSES)
def test_every_base_loss_learns(loss, folder):
    curve = training.run(split_of(folder), loss, training.METHODS["none"], 0, 4, test=True)
    assert curve["4"]["test"] != curve["0"]["test"]


def test_schedules_change_in_the_first_half():
    ratios = {
        name: [training.scheduled(training.METHODS[f"ratio 0.3, frozen, {name}"], t) for t in (0, 0.25, 0.5, 1)]
        for name in ("rising", "falling")
    }
    assert ratios["rising"] == pytest.approx([0, 0.15, 0.3, 0.3])
    assert ratios["falling"] == pytest.approx([0.3, 0.15, 0, 0])
    assert training.scheduled(training.METHODS["lambda 1"], 0) is None


def test_distillation_is_zero_for_the_similarities_themselves():
    features = torch.randn(9, 5)
    assert training.distillation(3 * features, features).abs() < 1e-6
    rows = torch.randn(9, 4)
    similarity = [torch.nn.functional.cosine_similarity(x[:, None], x, dim=2) / 0.1 for x in (rows, features)]
    expected = 0.0
    for i in range(9):
        others = [j for j in range(9) if j != i]
        student, teacher = (s[i, others].softmax(0) for s in similarity)
        expected += float((teacher * (teacher / student).log()).sum()) / 9
    assert float(training.distillation(rows, features)) == pytest.approx(expected, rel=1e-4)


def main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evidence", *map(str, arguments)])
    evidence.main()


def test_the_whole_study_and_resuming(folder, monkeypatch, capsys):
    images = folder / "images"
    common = ["--datasets", "cub", "--losses", "SupCon", "--folder", folder / "runs", "--workers", 1]
    with pytest.raises(ValueError, match="run length first"):
        main(monkeypatch, "test", "--data", folder, *common)
    main(monkeypatch, "length", "--data", folder, *common)
    (folder / "runs" / "length.jsonl").write_text(
        "".join(
            json.dumps(row | {"curve": {s: {"validation": {"MAP@R": -int(s)}} for s in "0124"}}) + "\n"
            for row in study.read("length", folder / "runs")
        )
    )
    assert study.best_lengths(folder / "runs") == {("cub", "SupCon"): 1}
    methods = ["--methods", "none", "ratio 0.3, frozen", "ratio 1.0, frozen"]
    main(monkeypatch, "validate", "--data", folder, *common, *methods)
    main(monkeypatch, "test", "--data", folder, *common, *methods, "--seeds", 1)
    first = (folder / "runs" / "test.jsonl").read_text()
    assert first.count("\n") == 3
    main(monkeypatch, "test", "--data", folder, *common, *methods, "--seeds", 3)
    text = (folder / "runs" / "test.jsonl").read_text()
    assert text.startswith(first)
    assert text.count("\n") == 9
    assert "test" not in study.read("validate", folder / "runs")[0]["curve"]["4"]
    main(monkeypatch, "report", "--folder", folder / "runs", "--images", images)
    printed = capsys.readouterr().out
    rows = study.read("test", folder / "runs")
    scores = {(row["method"], row["seed"]): row["curve"]["4"]["test"]["H-AP"] for row in rows}
    gains = [scores["ratio 0.3, frozen", seed] - scores["none", seed] for seed in range(3)]
    interval = stats.ttest_rel(*([scores[m, s] for s in range(3)] for m in ("ratio 0.3, frozen", "none")))
    low, high = interval.confidence_interval(0.95)
    lines = (folder / "runs" / "test.csv").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith('4 times,cub,SupCon,"ratio 0.3, frozen",H-AP'))
    mean, half, seeds = (float(x) for x in line.split(",")[-3:])
    assert (mean, half, seeds) == pytest.approx((np.mean(gains), (high - low) / 2, 3), abs=2e-3)
    assert "| ratio 0.3, frozen | 4 times |" in printed
    assert "| none, stopped early |" in printed
    assert (images / "gain.png").stat().st_size > 5000


def test_up_and_down_are_beyond_the_interval():
    difference = report.paired([1.0, 1.2, 0.8])
    assert (difference.is_up, difference.is_down) == (True, False)
    assert (report.paired([-1.0, -1.2, -0.8]).is_down, report.paired([1.0, -1.2]).is_up) == (True, False)
    assert not report.paired([5.0]).is_up
    assert str(difference) == "+1.0 ± 0.5"
