"""Every example runs by itself, in a short setting, and does what it says."""

import base64
import contextlib
import gzip
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses
from test_distributed import outputs

from hierloss import Hierarchy, HIERLoss

with contextlib.suppress(ModuleNotFoundError):
    import torchvision_operators  # noqa: F401  (transformers imports torchvision where it is installed)

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"accelerate_loop.py": "accelerate", "lightning_module.py": "lightning", "text_retrieval.py": "datasets"}


def run(name, *arguments, folder, launch=()):
    command = [sys.executable, *launch, str(EXAMPLES / name), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, errors = outputs(process)
    assert process.returncode == 0, errors
    return printed


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs an example in this process, which saves the start of torch, and returns what its ``main`` does."""

    def call(name, *arguments):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        return runpy.run_path(sys.argv[0])["main"]()

    return call


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_help(name, call, capsys):
    with pytest.raises(SystemExit) as end:
        call(name, "--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "usage:" in printed
    assert "(default: " in printed
    assert "--seed" in printed


def test_plain_loop(call, capsys):
    scores = call("plain_loop.py", "--epochs", 2)
    assert scores["R@1"] > 90
    assert f"R@1 {scores['R@1']:.1f}%" in capsys.readouterr().out
    assert call("plain_loop.py", "--epochs", 2) == scores
    assert call("plain_loop.py", "--epochs", 2, "--seed", 1) != scores


@pytest.mark.slow
def test_wrap_any_loss(call, capsys):
    """Every loss of PML is in the table, or named with a reason; and HIER changes what is learned."""
    scores = call("wrap_any_loss.py", "--steps", 2)
    for name, (alone, with_hier) in scores.items():
        assert min(alone[0], with_hier[0]) > 90, name
        assert (alone != with_hier).any(), name
    printed = capsys.readouterr().out
    left_out = set(re.findall(r"^- (\w+):", printed, re.MULTILINE))
    modules = {name for name in dir(losses) if isinstance(getattr(losses, name), type)}
    mixins = {"EmbeddingRegularizerMixin", "WeightRegularizerMixin"}
    assert modules - mixins == scores.keys() | left_out
    assert left_out == {
        "BaseLossWrapper",
        "BaseMetricLossFunction",
        "DynamicSoftMarginLoss",
        "GenericPairLoss",
        "MultipleLosses",
        "SelfSupervisedLoss",
        "VICRegLoss",
    }
    alone, with_hier = scores["TripletMarginLoss"]
    assert re.search(rf"TripletMarginLoss +{alone[0]:.1f} +{with_hier[0]:.1f} ", printed)


def test_what_wrap_any_loss_leaves_out_works_as_it_says():
    """The two losses of two views have HIER in the ways that it names; the third fails without HIER too."""
    views, labels = torch.randn(2, 60, 8, requires_grad=True), torch.arange(60) // 4
    hier = HIERLoss(num_proxies=16, embedding_size=8)
    inside = losses.NTXentLoss(embedding_regularizer=hier)
    losses.SelfSupervisedLoss(inside)(views[0], views[1]).backward()
    (losses.VICRegLoss()(views[0], ref_emb=views[1]) + hier(views.flatten(0, 1), labels.repeat(2))).backward()
    assert hier.proxies.grad.abs().sum() > 0
    alone = losses.DynamicSoftMarginLoss()
    alone(views[0], labels).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        alone(views[0], labels).backward()


def test_pml_trainer(call, capsys):
    history = call("pml_trainer.py", "--epochs", 2)
    assert len(history) == 2
    assert all(0.9 < epoch["R@1"] < 1 for epoch in history)
    assert f"Epoch 2, digits never seen: R@1 {100 * history[1]['R@1']:.1f}%" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lightning_callback(tmp_path, monkeypatch):
    """What it logs is what the loss has; the proxies start again from data after the first epoch alone."""
    lightning = pytest.importorskip("lightning")
    example = runpy.run_path(str(EXAMPLES / "lightning_module.py"))
    module, callback = example["MetricLearner"](), example["HIERCallback"](tmp_path / "out", max_samples=50)
    calls = []
    monkeypatch.setattr(module.hier, "init_proxies", lambda embeddings: calls.append(embeddings.shape))
    data = torch.utils.data.TensorDataset(torch.randn(90, 64), torch.arange(90) % 5)
    loader = torch.utils.data.DataLoader(data, batch_size=45)
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[callback], num_sanity_val_steps=0
    )
    trainer.fit(module, loader, loader)
    for name in example["STATISTICS"]:
        assert float(trainer.callback_metrics[f"hier/{name}"]) == pytest.approx(getattr(module.hier, name))
    assert module.hier.unscaled_gradient_ratio > 0
    assert {"loss/base", "loss/hier"} <= set(trainer.callback_metrics)
    assert calls == [(50, 64)]
    assert Hierarchy.from_json((tmp_path / "out" / "tree.json").read_text()).num_leaves == 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_module(call):
    assert call("lightning_module.py", "--epochs", 2, "--output", "tree")["R@1"] > 90  # chance is 20
    assert Hierarchy.from_json(Path("tree/tree.json").read_text()).num_leaves == 901
    packed = Path("tree/tree.html").read_text().split('const text = "')[1].split('"')[0]
    assert gzip.decompress(base64.b85decode(packed)).startswith(b'disk.innerHTML = "<svg')
    module = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["MetricLearner"]()
    optimized = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    assert id(module.hier.proxies) in optimized


def test_poincare_head(call):
    scores = call("poincare_head.py", "--epochs", 2)
    assert scores["R@1"] > 90
    assert abs(scores["c"] - 0.1) > 1e-4  # the curvature is learned
    assert 0 < scores["largest norm of a class proxy, in radii"] < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_text_retrieval(call):
    scores = call("text_retrieval.py", "--epochs", 40)
    assert scores["after"]["MAP@R fine"] > scores["before"]["MAP@R fine"] + 5
    assert scores["after"]["MAP@R coarse"] > scores["before"]["MAP@R coarse"] + 30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_text_retrieval_takes_a_model_and_data(call, tmp_path):
    """A saved model whose embeddings have norm 1, and a file as that of TREC."""
    pytest.importorskip(NEEDS["text_retrieval.py"])
    example = runpy.run_path(str(EXAMPLES / "text_retrieval.py"))
    texts, labels = example["made_here"]()
    rows = labels >= "MUSIC"  # two of the four coarse classes
    np.savez(tmp_path / "trec_questions.npz", text=texts[rows], label=labels[rows])
    torch.manual_seed(0)
    model = example["untrained"](texts)
    model.append(importlib.import_module("sentence_transformers.sentence_transformer.modules").Normalize())
    model.save(str(tmp_path / "model"))
    arguments = ("--model", tmp_path / "model", "--data", tmp_path / "trec_questions.npz", "--epochs")
    untrained = call("text_retrieval.py", *arguments, 1, "--lr", 1e-9)
    assert untrained["after"] == pytest.approx(untrained["before"])
    trained = call("text_retrieval.py", *arguments, 50, "--lr", 1e-2)
    assert trained["before"] == untrained["before"]
    assert trained["after"]["MAP@R fine"] > trained["before"]["MAP@R fine"] + 5


@pytest.mark.slow
def test_ddp(tmp_path):
    printed = run("ddp.py", "--epochs", 2, folder=tmp_path)
    assert float(re.search(r"R@1 ([\d.]+)%", printed)[1]) > 90
    assert "proxies between 2 processes: 0\n" in printed


@pytest.mark.slow
def test_accelerate_loop(tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run("accelerate_loop.py", "--epochs", 3, folder=tmp_path, launch=launch)
    values = [float(value) for value in re.findall(r"2 processes: loss ([\d.]+)", printed)]
    assert len(values) == 3  # printed by one process
    assert values[2] < 0.9 * values[0]
    assert {path.name for path in (tmp_path / "accelerate").iterdir()} >= {
        "model.safetensors",
        "model_1.safetensors",
    }


@pytest.mark.slow
def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--seeds", 1, "--steps", 200, folder=tmp_path)
    alone, with_hier = (
        float(re.search(rf"{re.escape(name)} +│ +[\d.]+ +│ +[\d.]+ +│ +([\d.]+)", printed)[1])
        for name in ("ProxyAnchor", "ProxyAnchor + HIER")
    )
    assert with_hier > alone + 3  # H-AP
    assert printed.count("difference (95% interval)") == 2
    assert (tmp_path / "quickstart.png").stat().st_size > 20_000


@pytest.mark.slow
def test_hierarchy_report(tmp_path):
    printed = run("hierarchy_report.py", "--epochs", 2, "--samples", 60, folder=tmp_path)
    assert "HIER, average linkage" in printed
    assert "pixels, average linkage" in printed
    folder = tmp_path / "hierarchy"
    assert {path.name for path in folder.iterdir()} == {"disk.png", "dendrogram.png", "hierarchy.html"}
    assert "<script" in (folder / "hierarchy.html").read_text()


@pytest.mark.slow
def test_hyperbolic_search(call, capsys):
    values = call("hyperbolic_search.py", "--epochs", 2, "--neighbors", 5)
    assert values["Qdrant, by its scores"] > 98
    assert values["Qdrant, ordered by distance"] == 100
    assert values["R@1"] > 80  # chance is 20
    assert values["largest difference"] < 1e-4
    printed = capsys.readouterr().out
    assert "ordered by distance │ 100.00 %" in printed
    assert f"R@1 of PoincareKNN: {values['R@1']:.1f} %" in printed
