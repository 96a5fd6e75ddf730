"""The studies train and score what they say, resume where they stopped, and compare in pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import data, settings, studies, tables, training

ALONE = replace(settings.FAITHFUL, weight=0.0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(training, "STEPS", dict.fromkeys(data.DATASETS, 3))
    monkeypatch.setattr(training, "EPOCH", 1)


def synthetic():
    return data.split(*data.load_synthetic(0))


def test_no_class_is_both_trained_and_retrieved():
    inputs, taxonomy = data.load_synthetic(0)
    test = data.split(inputs, taxonomy)
    tuning = [data.split(inputs, taxonomy, seed) for seed in range(2)]
    fine = taxonomy[:, 0]
    assert set(test.train_taxonomy[:, 0].tolist()) == set(range(0, 64, 2))
    assert set(test.test_taxonomy[:, 0].tolist()) == set(range(1, 64, 2))
    for split in tuning:
        training_classes, validation = (set(t[:, 0].tolist()) for t in (split.train_taxonomy, split.test_taxonomy))
        assert training_classes | validation == set(range(0, 64, 2))
        assert not training_classes & validation
        assert len(validation) == 16
        torch.testing.assert_close(split.test, inputs[torch.isin(fine, split.test_taxonomy[:, 0].unique())])
    assert not torch.equal(tuning[0].test, tuning[1].test)


def test_settings_differ_from_the_faithful_ones_in_one_thing():
    for name, changed in settings.sweep().items():
        differing = [k for k in vars(changed) if getattr(changed, k) != getattr(settings.FAITHFUL, k)]
        assert len(differing) == (name != "faithful"), name


@pytest.mark.parametrize("name", settings.CANDIDATES | settings.CHOSEN)
def test_every_candidate_trains(name):
    candidate = (settings.CANDIDATES | settings.CHOSEN)[name]
    scores = training.run("synthetic", synthetic(), "SupCon", 1e-3, candidate, seed=0)
    alone = training.run("synthetic", synthetic(), "SupCon", 1e-3, ALONE, seed=0)
    assert all(np.isfinite(value) for value in scores.values())
    assert scores["MAP@R"] != alone["MAP@R"]  # HIER had an effect


def test_equal_seeds_are_paired():
    """With a weight of nearly nothing, initial weights and batches are those of the base loss alone."""
    scores = [
        training.run("synthetic", synthetic(), "SupCon", 1e-3, replace(ALONE, weight=weight), seed=0)
        for weight in (0.0, 1e-12)
    ]
    for name, value in scores[0].items():
        assert scores[1][name] == pytest.approx(value, abs=1e-4)


def test_gradients_of_base_and_hier_have_the_ratio_that_lambda_implies(monkeypatch):
    monkeypatch.setattr(training, "STEPS", {"synthetic": 1})
    ratios = [
        training.run("synthetic", synthetic(), "SupCon", 1e-3, replace(ALONE, weight=weight), 0)["gradient ratio"]
        for weight in (0.5, 2.0)
    ]
    assert ratios[1] == pytest.approx(4 * ratios[0], rel=1e-6)
    assert ratios[0] > 0


def test_total_gradient_is_that_of_the_base_loss_plus_lambda_times_hier():
    torch.manual_seed(0)
    embeddings, labels = torch.randn(30, 8, requires_grad=True), torch.arange(30) % 6
    base = losses.SupConLoss()
    hier = training.HIERLoss(16, 8).eval()  # draws nothing
    both = losses.MultipleLosses([base, hier], weights=[1, 0.5])
    gradient = [torch.autograd.grad(f(embeddings, labels), embeddings)[0] for f in (both, base, hier)]
    torch.testing.assert_close(gradient[0], gradient[1] + 0.5 * gradient[2], rtol=1e-5, atol=1e-7)


def test_scores_of_known_embeddings():
    """Two superclasses of two classes each, on four directions: neighbours by class, then by superclass."""
    degrees = torch.tensor([0.0, 10.0, 100.0, 110.0]).repeat_interleave(30) + torch.linspace(0, 0.1, 30).repeat(4)
    embeddings = torch.stack([torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))], 1)
    fine = torch.arange(4).repeat_interleave(30)
    scores = training.scores(embeddings, torch.stack([fine, fine // 2], 1), seed=0)
    for name in ("R@1", "MAP@R", "superclass R@1", "superclass P@20", "H-AP", "purity, ward", "purity, average"):
        assert scores[name] == pytest.approx(100), name
    swapped = torch.stack([fine, torch.tensor([0, 1, 0, 1])[fine]], 1)
    scores = training.scores(embeddings, swapped, seed=0)
    assert scores["superclass P@20"] == pytest.approx(100)  # 20 neighbours of the own class
    assert scores["purity, ward"] == pytest.approx(50)  # every superclass is the whole tree only
    wrong = (torch.arange(120) % 30)[:, None]
    assert training.scores(embeddings, wrong, seed=0)["R@1"] < 10


def test_a_study_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(studies, "BASE_LOSSES", ("SupCon",))
    perform = lambda seeds: studies.perform("base", ["synthetic"], None, 1, seeds, tmp_path)  # noqa: E731
    perform(1)
    first = studies.read("base", tmp_path)
    perform(2)
    both = studies.read("base", tmp_path)
    assert [row["seed"] for row in both] == [0, 1]
    assert both[0] == first[0]  # not run again
    perform(2)
    assert studies.read("base", tmp_path) == both


def test_studies_use_the_learning_rate_that_is_best_among_validation_classes(tmp_path):
    with pytest.raises(ValueError, match="run the study base first"):
        list(studies.runs("test", ["synthetic"], folder=tmp_path))
    rows = [
        {
            "dataset": "synthetic",
            "base": base,
            "lr": lr,
            "seed": seed,
            "method": f"lr={lr:g}",
            "key": "",
            "scores": s,
        }
        for base in settings.BASE_LOSSES
        for lr, of_seeds in ((1e-3, (50, 10)), (1e-2, (40, 40)))
        for seed, s in enumerate({"MAP@R": value, "R@1": 0} for value in of_seeds)
    ]
    (tmp_path / "base.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = list(studies.runs("test", ["synthetic"], folder=tmp_path))
    assert {run.lr for run in runs} == {1e-2}
    assert not any(run.validation for run in runs)
    assert {run.seed for run in runs} == set(range(10))
    assert all(run.validation for run in studies.runs("candidates", ["synthetic"], folder=tmp_path))


def test_differences_are_paired_and_certain_ones_are_bold():
    def row(method, seed, value):
        of = {"dataset": "digits", "base": "SupCon", "method": method, "seed": seed}
        stats = dict.fromkeys(("gradient ratio", "share clipped", "share active", "ancestors drawn"), 0.5)
        return of | {"scores": {"R@1": value, "MAP@R": -value} | stats}

    rows = [row("alone", seed, 10.0 * seed) for seed in range(3)]
    rows += [row("faithful", seed, 10.0 * seed + change) for seed, change in enumerate((1.0, 2.0, 3.0))]
    assert tables.differences(rows, "digits", "SupCon", "faithful", "R@1") == [1, 2, 3]
    mean, half = tables.interval([1, 2, 3])
    assert mean == 2
    assert half == pytest.approx(4.302652729911275 / 3**0.5)  # t of 2 degrees of freedom
    text = dict(tables.of_study("test", rows))
    assert "| digits | SupCon | 10.0 | +2.0 ± 2.5 |" in text["R@1 among test classes"]
    rows += [row("alone", 3, 0.0), row("faithful", 3, 2.0)]
    text = dict(tables.of_study("test", rows))
    assert "**+2.0 ± 1.3**" in text["R@1 among test classes"]
    assert (
        "R@1 or MAP@R certainly above the base loss alone in 1 of 1 cells; certainly below in 1 of 2"
        in text["In short"]
    )
    assert "digits, SupCon, MAP@R" in text["In short"]


def test_report_draws_what_was_measured(tmp_path, capsys):
    for study, methods in (("sweep", ["faithful", "c=1.0"]), ("candidates", ["faithful"]), ("test", ["faithful"])):
        rows = [
            {"dataset": "trec", "base": base, "method": method, "seed": seed, "seconds": 60.0, "key": f"{seed}"}
            | {
                "scores": dict.fromkeys(
                    ("R@1", "MAP@R", "gradient ratio", "share clipped", "share active"), 1.0 * seed
                )
            }
            for base in settings.BASE_LOSSES
            for method in ["alone", *methods]
            for seed in range(3)
        ]
        for r in rows:
            r["scores"]["ancestors drawn"] = 1.0
        (tmp_path / f"{study}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evidence.report(tmp_path, tmp_path / "images")
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"sweep.png", "candidates.png", "test.png"}
    assert "test: 30 runs, 30 minutes" in capsys.readouterr().out
