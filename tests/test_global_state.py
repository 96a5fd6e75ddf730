"""Nothing outside the loss changes: not by import, not by training, not by another thread."""

import copy
import inspect
import os
import random
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses

from hierloss import HIERLoss, PoincareDistance, ReciprocalNeighborMiner

P, D, B = 24, 8, 32


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=generator), torch.arange(B) % 6


def settings():
    """What a process has once, or a thread; but for torch's generator."""
    return {
        "random": random.getstate(),
        "numpy's generator": [str(part) for part in np.random.get_state()],  # noqa: NPY002
        "dtype": torch.get_default_dtype(),
        "device": torch.empty(0).device,
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.ones(1, 1) @ torch.ones(1, 1)).dtype,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": torch.get_float32_matmul_precision(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "numpy's errors": np.geterr(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
    }


# --- import -------------------------------------------------------------------------------------------------

# No test module is imported there: it would import hierloss.
IMPORT = f"""
import os, random, sys, time, warnings
import numpy as np, pytorch_metric_learning.losses, torch
{inspect.getsource(settings)}
before, generator, loaded = settings(), torch.get_rng_state(), set(sys.modules)
assert "hierloss" not in loaded
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    start = time.process_time()
    import hierloss
    seconds = time.process_time() - start
assert "geoopt" not in sys.modules  # its import is slow, and prints a warning of torch 2.15
assert not {{"matplotlib", "plotly", "hierloss.plotting"}} & set(sys.modules)
assert settings() == before
assert torch.equal(torch.get_rng_state(), generator)
assert [w for w in caught if "hierloss" in w.filename] == []
print(seconds)
"""


def python(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return result


def test_import_prints_nothing_and_needs_no_optional_package():
    result = python("import sys; sys.modules.update(matplotlib=None, plotly=None, networkx=None); import hierloss")
    assert result.stdout == result.stderr == ""


def test_import_changes_nothing_and_adds_less_than_a_second():
    """A second of processor time beside PML; the faster of two processes, as others may be at work."""
    assert min(float(python(IMPORT).stdout) for _ in range(2)) < 1


# --- training -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _torch_has_been_used():
    """The first step of an optimizer of torch imports SymPy, which adds a filter of warnings."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    torch.optim.Adam([parameter]).step()


def train(loss_func, seed=0, steps=3, dtype=torch.float32):
    embeddings, labels = batch(seed)
    embeddings = embeddings.to(dtype).requires_grad_()
    optimizer = torch.optim.Adam([embeddings, *loss_func.parameters()], lr=0.03)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_func(embeddings, labels)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, embeddings.detach()


def fail():
    with pytest.raises(ValueError, match="must have 8 columns"):
        HIERLoss(P, D)(torch.randn(B, D + 1))


@pytest.mark.parametrize(
    "use",
    [
        lambda: train(HIERLoss(P)),
        lambda: train(HIERLoss(P, proxy_batch_size=5, collect_stats=True)),
        lambda: train(HIERLoss(P).double(), dtype=torch.float64),
        lambda: train(losses.TripletMarginLoss(distance=PoincareDistance())),
        lambda: ReciprocalNeighborMiner()(*batch()),
        lambda: HIERLoss(P).init_proxies(batch()[0]),
        lambda: HIERLoss(P, D).hierarchy(*batch()).to_json(),
        fail,
    ],
    ids=["lazily", "proxy batch", "float64", "distance", "miner", "init_proxies", "hierarchy", "error"],
)
def test_use_changes_no_setting_and_draws_from_torch_alone(use):
    before = settings()
    use()
    assert settings() == before


def test_settings_of_the_user_are_respected_and_kept():
    """Half the settings are not the usual ones; the loss neither minds nor resets them."""
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.set_detect_anomaly(True):
            before = settings()
            values, _ = train(HIERLoss(P))
            assert settings() == before
            assert before["autocast"] == torch.bfloat16
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    assert np.isfinite(values).all()


# --- threads ------------------------------------------------------------------------------------------------


def loss_of_its_own(seed):
    torch.manual_seed(seed)
    return HIERLoss(P, D, distance=PoincareDistance(c=0.1 * (1 + seed)))


def test_in_eval_mode_threads_give_the_same_bit_for_bit():
    """Proxies and embeddings are trained; triplets and ancestors are not drawn."""
    made = [loss_of_its_own(i).eval() for i in range(3)]

    def work(i):
        loss_func = copy.deepcopy(made[i])
        return *train(loss_func, seed=i, steps=30), loss_func.proxies.detach()

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, range(3)))
    torch.testing.assert_close(together, [work(i) for i in range(3)], rtol=0, atol=0)
    assert together[0][0] != together[1][0]


def test_in_training_threads_share_nothing_but_the_generator():
    """Draws come from torch's default generator in the order in which threads ask: no promise of the same bits."""
    made = [loss_of_its_own(i) for i in range(3)]
    before = [loss_func.proxies.detach().clone() for loss_func in made]

    def work(i):
        return train(made[i], seed=i, steps=60)[0]

    with ThreadPoolExecutor(3) as pool:
        histories = list(pool.map(work, range(3)))
    assert np.isfinite(histories).all()
    for values, loss_func, old in zip(histories, made, before, strict=True):
        assert np.mean(values[-10:]) < np.mean(values[:10])
        assert (loss_func.proxies != old).any(1).all()
    assert [round(loss_func.distance.c, 6) for loss_func in made] == [0.1, 0.2, 0.3]
