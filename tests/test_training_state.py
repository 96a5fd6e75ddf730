"""A run that was killed and resumed is the run that was not; and checkpoints of earlier versions load."""

import os
import random
import subprocess
import sys
from pathlib import Path

import geoopt
import pytest
import torch
from pytorch_metric_learning import losses
from training_worker import RUNS, STEPS, Run

from hierloss import HIERLoss, PoincareDistance

FIXTURES = Path(__file__).parent / "fixtures"
WORKER = Path(__file__).with_name("training_worker.py")


def uninterrupted(name, steps=STEPS):
    run = Run(name)
    for _ in range(steps):
        run.step()
    return run.state_dict()


def assert_same(actual, expected):
    """Equal bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_step_resumes_bit_for_bit(tmp_path):
    """Killed for good, SIGKILL at a random step, and taken up by another process."""

    def worker():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, tmp_path], stdout=subprocess.PIPE, text=True, env=environment
        )

    last = random.randrange(1, STEPS - 9)  # it ends by itself after the last step
    with worker() as killed:
        for line in killed.stdout:
            if int(line) == last:
                killed.kill()
                break
    assert killed.returncode == -9, last
    with worker() as resumed:
        steps = [int(line) for line in resumed.stdout]
    assert resumed.returncode == 0
    assert steps[0] >= last, "nothing was resumed"
    assert steps[-1] == STEPS - 1
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in RUNS:
        assert_same(states[name], uninterrupted(name))


@pytest.mark.parametrize("order", [("loss_func", "optimizer"), ("optimizer", "loss_func")])
@pytest.mark.parametrize("name", RUNS)
def test_resuming_before_and_after_every_early_step(name, order, tmp_path):
    """Also before the first batch, when the proxies have no size, and whatever is loaded first."""
    expected = uninterrupted(name, 4)
    for stop in range(5):
        torch.save(uninterrupted(name, stop), tmp_path / "checkpoint.pt")
        run = Run(name)
        torch.manual_seed(123)  # a new process has other random numbers
        run.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True), order)
        for _ in range(stop, 4):
            run.step()
        assert_same(run.state_dict(), expected)


def test_what_is_left_out_of_the_checkpoint_changes_the_run():
    """Or the tests above would show nothing."""
    name = "lazily sized, Adam"
    expected = uninterrupted(name, 6)["values"]
    for left_out in ("model", "loss_func", "optimizer", "random"):
        state = uninterrupted(name, 3)
        fresh = Run(name)
        fresh.step()
        state[left_out] = fresh.state_dict()[left_out]
        run = Run(name)
        run.load_state_dict(state)
        for _ in range(3):
            run.step()
        assert run.values != expected, left_out


# --- what an error says -------------------------------------------------------------------------------------


def state(**kwargs):
    return HIERLoss(**{"num_proxies": 24, "embedding_size": 8} | kwargs).state_dict()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (state(embedding_size=9), r"the checkpoint has shape \(24, 9\), expected \(24, 8\); build HIERLoss with"),
        ({"proxies": torch.zeros(24)}, r"the checkpoint has shape \(24,\), expected \(24, 8\)"),
        ({"proxies": [0.0]}, r'parameter named "proxies", expected torch.Tensor .* received'),
        ({}, r'Missing key\(s\) in state_dict: "proxies"'),
        ({"module.proxies": torch.zeros(24, 8)}, r'(?s)Missing .* "proxies".*Unexpected .* "module.proxies"'),
        (
            state(distance=PoincareDistance(c=geoopt.PoincareBall(learnable=True))),
            r'Unexpected key\(s\) in state_dict: "distance.curvature.isp_c"',
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_says_why(saved, message):
    loss_func = HIERLoss(24, 8)
    before = loss_func.proxies.detach().clone()
    with pytest.raises(RuntimeError, match=message):
        loss_func.load_state_dict(saved)
    if "Unexpected" not in message:
        assert torch.equal(loss_func.proxies, before)


def test_a_state_dict_for_another_order_of_losses_says_why():
    saved = losses.MultipleLosses([losses.ProxyAnchorLoss(6, 8), HIERLoss(24, 8)]).state_dict()
    target = losses.MultipleLosses([HIERLoss(24, 8), losses.ProxyAnchorLoss(6, 8)])
    with pytest.raises(
        RuntimeError, match=r"losses.0.proxies: .* \(6, 8\), expected \(24, 8\).* in the same order"
    ):
        target.load_state_dict(saved)


def test_a_missing_key_may_be_left_out_on_purpose():
    loss_func = HIERLoss(24)
    assert loss_func.load_state_dict({}, strict=False).missing_keys == ["proxies"]
    assert loss_func(torch.randn(9, 8)).isfinite()


# --- checkpoints of earlier versions ------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("checkpoint-*.pt")), ids=lambda path: path.stem)
@pytest.mark.parametrize("sized", [False, True])
def test_a_checkpoint_of_an_earlier_version_gives_the_same_loss(path, sized):
    """tests/fixtures/make_checkpoint.py made them; they stay as they are."""
    checkpoint = torch.load(path, weights_only=True)
    embeddings, labels = checkpoint["embeddings"], checkpoint["labels"]
    for name, expected in checkpoint["losses"].items():
        hier = HIERLoss(16, 8 if sized else None)
        if name == "learned curvature":
            distance = PoincareDistance(c=geoopt.PoincareBall(c=1.0, learnable=True))
            hier = HIERLoss(16, 8 if sized else None, distance=distance)
        loss_func = losses.MultipleLosses([losses.ProxyAnchorLoss(6, 8), hier], weights=[1, 0.5])
        optimizer = torch.optim.Adam(loss_func.parameters())
        assert loss_func.load_state_dict(checkpoint["states"][name]) == ([], [])
        optimizer.load_state_dict(checkpoint["optimizers"][name])
        actual = loss_func.eval()(embeddings, labels)
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=0)
        loss_func.train()(embeddings, labels).backward()
        before = hier.proxies.detach().clone()
        optimizer.step()
        assert (hier.proxies != before).any(1).all()


def test_there_is_a_checkpoint_of_the_first_version():
    assert (FIXTURES / "checkpoint-0.1.0.pt").exists()
