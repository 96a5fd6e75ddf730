"""The study trains and scores what it says, resumes where it stopped, and compares in pairs."""

import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from scipy import stats

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import data, images, report, study, training


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


@pytest.mark.parametrize("name", [name for name, method in training.METHODS.items() if method.head])
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


def test_the_frozen_features_are_scored_as_they_are(folder):
    parts = split_of(folder)
    curve = training.run(parts, "SupCon", training.METHODS["frozen features"], 0, 4, test=True)
    assert list(curve) == ["0"]
    for name, scores in curve["0"].items():
        assert scores == training.scores(torch.nn.Identity(), getattr(parts, name), 0)
    assert set(curve["0"]) == {"validation", "test"}


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
    methods = ["--methods", "none", "frozen features", "ratio 0.3, frozen", "ratio 1.0, frozen"]
    main(monkeypatch, "validate", "--data", folder, *common, *methods)
    main(monkeypatch, "test", "--data", folder, *common, *methods, "--seeds", 1)
    first = (folder / "runs" / "test.jsonl").read_text()
    assert first.count("\n") == 4
    main(monkeypatch, "test", "--data", folder, *common, *methods, "--seeds", 3)
    text = (folder / "runs" / "test.jsonl").read_text()
    assert text.startswith(first)
    assert text.count("\n") == 12
    assert "test" not in study.read("validate", folder / "runs")[0]["curve"]["4"]
    main(monkeypatch, "report", "--folder", folder / "runs", "--images", images)
    printed = capsys.readouterr().out
    rows = study.read("test", folder / "runs")
    trained = [row for row in rows if row["method"] != "frozen features"]
    scores = {(row["method"], row["seed"]): row["curve"]["4"]["test"]["H-AP"] for row in trained}
    gains = [scores["ratio 0.3, frozen", seed] - scores["none", seed] for seed in range(3)]
    interval = stats.ttest_rel(*([scores[m, s] for s in range(3)] for m in ("ratio 0.3, frozen", "none")))
    low, high = interval.confidence_interval(0.95)
    lines = (folder / "runs" / "test.csv").read_text().splitlines()
    (line,) = (x for x in lines if x.startswith('4 times,cub,SupCon,"ratio 0.3, frozen",H-AP'))
    mean, half, seeds = (float(x) for x in line.split(",")[-3:])
    assert (mean, half, seeds) == pytest.approx((np.mean(gains), (high - low) / 2, 3), abs=2e-3)
    assert "| ratio 0.3, frozen | 4 times |" in printed
    assert "| none, stopped early |" in printed
    features = [row["curve"]["0"]["test"]["R@1"] for row in rows if row["method"] == "frozen features"]
    assert f"| frozen features, not trained | {np.mean(features):.2f} |" in printed
    assert "frozen features, stopped early" not in printed
    assert (images / "gain.png").stat().st_size > 5000


def test_up_and_down_are_beyond_the_interval():
    """Gains of four methods over a base loss, in one cell and three seeds; the last has a single seed."""
    gained = {"up": [1.0, 1.2, 0.8], "down": [-1.0, -1.2, -0.8], "neither": [1.0, -1.2, 0.3], "one seed": [5.0]}
    rows = []
    for method, values in ({"none": [0.0, 0.0, 0.0]} | gained).items():
        for seed, value in enumerate(values):
            curve = {"1": {"test": dict.fromkeys(training.SCORES, 50 + seed + value)}}
            rows.append({"dataset": "cub", "loss": "SupCon", "method": method, "seed": seed, "curve": curve})
    found = report.gains(report.scores(rows, "test", {"best length": lambda row: row["curve"]["1"]}))
    lines = dict(line.split("|")[1:4:2] for line in report.table(found).splitlines()[2:])
    assert {method.strip(): cell.strip() for method, cell in lines.items()} == {
        "up": "+1.0 ± 0.5 (1 up, 0 down of 1)",
        "down": "-1.0 ± 0.5 (0 up, 1 down of 1)",
        "neither": "+0.0 ± 2.8 (0 up, 0 down of 1)",
        "one seed": "+5.0 ± nan (0 up, 0 down of 1)",
    }


def test_a_base_loss_that_still_improves_at_the_end_has_no_longer_training_to_compare():
    lengths = {("cub", "SupCon"): 1, ("cub", "Triplet"): 4}
    curve = {str(steps): steps for steps in (1, 2, 4)}
    rows = [{"dataset": "cub", "loss": loss, "curve": curve, "steps": 4} for _, loss in lengths]
    points = {name: [at(row) for row in rows] for name, at in report.two_lengths(lengths).items()}
    assert points == {"best length": [1, None], "4 times": [4, None]}


# --- trained encoders ---------------------------------------------------------------------------------------


@pytest.fixture
def clinc(tmp_path, monkeypatch):
    """Texts of 4 domains with 3 intents each, and a small sentence encoder with random weights."""
    transformers = pytest.importorskip("transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    text = pytest.importorskip("benchmarks.evidence.text")
    monkeypatch.setattr(text, "CHECKPOINTS", (0, 1, 3))
    words = [f"word{i}" for i in range(40)]
    generator = np.random.default_rng(0)
    domains = {f"intent{i:02d}": f"domain{i % 4}" for i in range(12)}
    texts = {"train": [], "test": []}
    for i, intent in enumerate(domains):
        for n in range(20):
            noise = [str(w) for w in generator.choice(words[16:], 1 + n % 5)]
            row = [" ".join([words[i % 4], words[4 + i], *noise]), intent]
            texts["train" if n < 8 else "test"].append(row)
    (tmp_path / "clinc150.json").write_text(json.dumps({"domain": domains, **texts}))
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=45, **size)).save_pretrained(tmp_path / "bert")
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    layers = [transformer, modules.Pooling(16), modules.Normalize()]
    sentence_transformers.SentenceTransformer(modules=layers, device="cpu").save(str(tmp_path / "encoder"))
    return text, tmp_path


def test_texts_of_trained_intents_are_not_retrieved(clinc):
    text, folder = clinc
    encoder = text.make_encoder(folder / "encoder")
    table = text.load(folder / "clinc150.json", encoder)
    assert int(table.is_test.sum()) == 12 * 12
    of_seed = [text.split(table.taxonomy, seed) for seed in range(3)]
    assert len({tuple(rows.tolist()) for rows in of_seed}) > 1
    for rows in of_seed:
        trained, other = (table.taxonomy[r].unique(dim=0) for r in (rows, ~rows))
        assert trained[:, 1].bincount().tolist() == [2] * 4  # of 3 intents of each domain
        assert other[:, 1].bincount().tolist() == [1] * 4
        assert not set(trained[:, 0].tolist()) & set(other[:, 0].tolist())
    assert [int(text.split(torch.tensor([[i, 0] for i in range(n)]), 0).sum()) for n in (15, 4)] == [8, 2]
    for i in (0, 7, 100):  # each row is that of its own text, and keeps its norm
        alone = text.embed(encoder, table.texts[i : i + 1])[0]
        torch.testing.assert_close(table.frozen[i], alone, rtol=1e-4, atol=1e-5)
        assert abs(float(alone.norm()) - 1) > 0.1


@pytest.mark.parametrize("loss", ["ProxyAnchor", "MultiSimilarity"])
def test_methods_start_alike_and_train_the_encoder(loss, clinc):
    text, folder = clinc
    table = text.load(folder / "clinc150.json", text.make_encoder(folder / "encoder"))
    found = {}
    for method in [*text.METHODS, "none"]:
        encoder = text.make_encoder(folder / "encoder")
        before = [p.clone() for p in encoder.parameters()]
        curve = text.run(table, encoder, loss, method, 0, 3)
        assert list(curve) == ["0", "1", "3"]
        assert any(not torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
        weights = torch.cat([p.detach().flatten() for p in encoder.parameters()])
        assert found.setdefault(method, (curve, weights))[0] == curve
        assert torch.equal(found[method][1], weights)
        test = table.frozen[~text.split(table.taxonomy, 0) & table.is_test]
        assert curve["0"]["clipped"] == pytest.approx(float((test.norm(dim=1) >= 2.3).float().mean()), abs=1e-4)
        assert curve["0"]["norm"] == pytest.approx(float(test.norm(dim=1).mean()), abs=1e-3)
    curves_of, weights = zip(*found.values(), strict=True)
    assert all(curve["0"] == curves_of[0]["0"] for curve in curves_of)
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


def test_study_of_texts_resumes_and_reports(clinc, monkeypatch, capsys):
    text, folder = clinc
    options = ["--encoder", folder / "encoder", "--length", 3, "--folder", folder / "runs"]
    options += ["--images", folder / "images"]

    def main(*more):
        monkeypatch.setattr("sys.argv", ["text", *map(str, [*options, *more])])
        text.main()

    main("--data", folder, "--seeds", 1)
    first = (folder / "runs" / "text.jsonl").read_text()
    assert first.count("\n") == 2 * 4
    main("--data", folder, "--seeds", 3)
    assert (folder / "runs" / "text.jsonl").read_text().startswith(first)
    rows = study.read("text", folder / "runs")
    assert [row["seed"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    alone = [row for row in rows if row["method"] == "none" or row["loss"] == "ProxyAnchor"]
    (folder / "runs" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    capsys.readouterr()
    main()  # a loss that has no method but "none" so far
    assert "| clinc150, MultiSimilarity, 3 steps | 3 steps | none | 3 |" in capsys.readouterr().out
    # one seed less for one method: its pairs are left out for all
    kept = [row for row in rows if (row["loss"], row["method"], row["seed"]) != ("ProxyAnchor", "ratio 0.3", 1)]
    # and a shorter training, which is a cell of its own
    kept += [row | {"steps": 1, "curve": {"1": row["curve"]["3"]}} for row in kept if row["seed"] < 2]
    (folder / "runs" / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    capsys.readouterr()
    main()
    printed = capsys.readouterr().out.splitlines()
    for loss, seeds in {"ProxyAnchor": [0, 2], "MultiSimilarity": [0, 1, 2]}.items():
        scores = {(r["method"], r["seed"]): r["curve"]["3"]["test"]["H-AP"] for r in rows if r["loss"] == loss}
        gained = [scores["ratio 0.3", s] - scores["none", s] for s in seeds]
        half = stats.sem(gained) * stats.t.ppf(0.975, len(seeds) - 1)
        start = f"| clinc150, {loss}, 3 steps | 3 steps |"
        (line,) = (x for x in printed if x.startswith(f"{start} ratio 0.3 |"))
        assert line.endswith(f"| {np.mean(gained):+.1f} ± {half:.1f} |")
        assert line.split("|")[4].strip() == str(len(seeds))
        (line,) = (x for x in printed if x.startswith(f"{start} none |"))
        assert line.endswith(f"| {np.mean([scores['none', s] for s in seeds]):.1f} |")
    assert any(x.startswith("| clinc150, MultiSimilarity, 1 steps | 1 steps | ratio 0.3 | 2 |") for x in printed)
    assert not any("0 steps | ratio" in x for x in printed)
    assert (folder / "images" / "end-to-end.png").stat().st_size > 5000


def test_study_of_images_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    """The harness itself is tested in test_retrieval_benchmarks.py."""
    runs = []

    def harness(words, check):
        assert check
        runs.append(words)
        output = Path(words[words.index("--output") + 1])
        output.mkdir(parents=True)
        (output / "checkpoint.pt").touch()
        cosine = dict.fromkeys(training.SCORES, 50.0) | {"R@2": 60.0}
        log = [{"epoch": 0, "cosine": cosine, "clipped": 1.0}, {"epoch": 1, "loss": 3.0}]
        hier = "--gradient-ratio" in words
        log.append({"epoch": 2, "cosine": cosine | {"H-AP": 51.0 + hier}, "clipped": 0.5})
        (output / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))

    monkeypatch.setattr("subprocess.run", harness)
    options = ["--data", tmp_path, "--output", tmp_path / "output", "--length", 2, "--seeds", 2]
    options += ["--folder", tmp_path, "--images", tmp_path]
    for expected in (12, 12):  # the second time there is nothing to do
        monkeypatch.setattr("sys.argv", ["images", *map(str, options)])
        images.main()
        assert len(runs) == expected
    assert len({tuple(words) for words in runs}) == 12
    assert not [*tmp_path.glob("output/*/checkpoint.pt")]
    start = "| cub, ProxyAnchor, 2 epochs | 2 epochs | ratio 0.3 | 2 |"
    line = f"{start} +0.0 ± 0.0 | +0.0 ± 0.0 | +0.0 ± 0.0 | +1.0 ± 0.0 |"
    assert line in capsys.readouterr().out.splitlines()
    (tmp_path / "checkpoint.pt").touch()
    assert images.command(tmp_path, tmp_path, "ProxyAnchor", "none", 0, 2)[-1] == "--resume"
