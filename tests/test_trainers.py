"""Accelerate, transformers' Trainer and Lightning, each with two processes, train as a plain loop with one."""

import pytest
import torch
from distributed_worker import make_data
from test_distributed import assert_same_on_all, pytestmark, torchrun  # noqa: F401  (the marks hold here too)
from trainers_worker import STEPS, WORLD_SIZE, make

load_file = pytest.importorskip("safetensors.torch").load_file


def plain_loop(steps):
    module, optimizer = make()
    features, labels = make_data()
    for _ in range(steps):
        optimizer.zero_grad()
        module.loss_func(module.model(features), labels).backward()
        optimizer.step()
    return module.state_dict()


@pytest.fixture(scope="module", params=["accelerate", "transformers", "lightning"])
def trained(request, tmp_path_factory):
    """The name of the trainer, its folder, and what each process has in the end."""
    pytest.importorskip(request.param)
    folder = tmp_path_factory.mktemp("ranks")
    status, log = torchrun(WORLD_SIZE, request.param, folder, worker="trainers_worker.py")
    assert status == 0, log
    ranks = range(WORLD_SIZE)
    return request.param, folder, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in ranks]


def test_two_processes_train_save_and_resume_as_one(trained):
    _, _, results = trained
    assert_same_on_all(results)
    start, half, whole = (plain_loop(steps) for steps in (0, STEPS // 2, STEPS))
    assert sum(name.endswith("proxies") for name in start) == 2  # of the classes, and of HIER
    for name in start:
        assert (whole[name] - half[name]).abs().max() > 1e-4
        assert (half[name] - start[name]).abs().max() > 1e-4
    for name, expected in {"whole": whole, "half": half, "resumed": whole}.items():
        torch.testing.assert_close(results[0][name], expected)


def test_the_saved_proxies_load_without_the_trainer(trained):
    trainer, folder, _ = trained
    folder = folder / "parts"
    if trainer == "accelerate":  # the losses are the second module that was prepared
        proxies = load_file(folder / "model_1.safetensors")["losses.1.proxies"]
    elif trainer == "transformers":
        proxies = load_file(folder / f"checkpoint-{STEPS // 2}" / "model.safetensors")[
            "loss_func.losses.1.proxies"
        ]
    else:
        state = torch.load(folder / "half.ckpt", weights_only=True)["state_dict"]
        proxies = state["both.loss_func.losses.1.proxies"]
    torch.testing.assert_close(proxies, plain_loop(STEPS // 2)["loss_func.losses.1.proxies"])


def test_the_lightning_callback_keeps_proxies_equal(tmp_path):
    pytest.importorskip("lightning")
    status, log = torchrun(WORLD_SIZE, "callback", tmp_path, worker="trainers_worker.py")
    assert status == 0, log
    assert_same_on_all([torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)])
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"tree.json", "tree.html"}
