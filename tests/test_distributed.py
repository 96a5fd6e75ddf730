"""Several processes train as one: real ones, started by torchrun, compared with a single process.

All checks of one number of processes share one start, distributed_worker.py; here is what they must have seen.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import B, every_triplet, make_data, make_losses, make_model, shard
from pytorch_metric_learning import losses

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
    ),
]


def torchrun(world_size, what, folder, worker=WORKER.name):
    """Run the worker in this many processes: the exit status, and what they printed."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [*command, f"--nproc-per-node={world_size}", WORKER.with_name(worker), what, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    log, _ = outputs(process)
    return process.returncode, log


def outputs(process):
    """What a process wrote. If it hangs, it is asked to end: torchrun then ends its workers too."""
    try:
        return process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        raise


@pytest.fixture(scope="module", params=[2, 4])
def seen(request, tmp_path_factory):
    """The number of processes, and what each of them saw."""
    world_size, folder = request.param, tmp_path_factory.mktemp("ranks")
    status, log = torchrun(world_size, "everything", folder)
    assert status == 0, log
    return world_size, [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def one_process(indices, seed, **kwargs):
    """Gradients of one process with these rows of the whole batch: those of embeddings, model, and losses."""
    model, (base, hier) = make_model(), make_losses(**kwargs)
    loss_func = losses.MultipleLosses([base, hier], weights=[1, 0.5]).train(seed is not None)
    features, labels = make_data()
    embeddings = model(features)
    embeddings.retain_grad()
    torch.manual_seed(seed or 0)
    loss_func(embeddings[indices], labels[indices]).backward()
    return {
        "embeddings": embeddings.grad,
        "model": model.weight.grad,
        "base": base.proxies.grad,
        "hier": hier.proxies.grad,
    }


def rows(rank, world_size):
    return shard((torch.arange(B), torch.arange(B)), rank, world_size)[0]


def assert_same_on_all(results):
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


# --- gradients ----------------------------------------------------------------------------------------------


def test_the_gradient_of_the_model_is_that_of_one_process_with_the_whole_batch(seen):
    _, results = seen
    expected = one_process(torch.arange(B), None, miner=every_triplet())
    for name in ("any order, eval", "any order, unscaled"):
        assert_same_on_all([result[name] for result in results])
        torch.testing.assert_close(results[0][name]["model"], expected["model"])


def test_the_gradient_of_the_losses_is_too_large_by_the_number_of_processes_unless_divided(seen):
    """DistributedLossWrapper multiplies by it, which DDP's mean takes back from the model alone."""
    world_size, results = seen
    expected = one_process(torch.arange(B), None, miner=every_triplet())
    for part in ("base", "hier"):
        assert expected[part].abs().max() > 1e-3
        torch.testing.assert_close(results[0]["any order, eval"][part], world_size * expected[part])
        torch.testing.assert_close(results[0]["any order, unscaled"][part], expected[part])


@pytest.mark.parametrize(
    ("name", "seeds"),
    [("eval", lambda _: None), ("same seeds", lambda _: 7), ("other seeds", lambda rank: 7 + rank)],
)
def test_each_process_draws_for_its_own_embeddings_and_their_mean_trains_the_proxies(seen, name, seeds):
    """Draws of the processes differ even from one seed: each has its own embeddings first in the batch."""
    world_size, results = seen
    assert_same_on_all([result[name] for result in results])
    through_embeddings, parts = torch.zeros(B, 8, dtype=torch.float64), []
    for rank in range(world_size):
        own = rows(rank, world_size)
        others = torch.cat([rows(r, world_size) for r in range(world_size) if r != rank])
        parts.append(one_process(torch.cat([own, others]), seeds(rank)))
        through_embeddings[own] = parts[-1]["embeddings"][own]
    torch.testing.assert_close(results[0][name]["model"], through_embeddings.T @ make_data()[0])
    expected = torch.stack([part["hier"] for part in parts])
    assert not torch.allclose(expected[0], expected[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(results[0][name]["hier"], world_size * expected.mean(0))


def test_gathered_once_every_gradient_is_that_of_one_process_with_the_whole_batch(seen):
    """The ratio is that of the whole batch too: no factor, whatever the number of processes."""
    _, results = seen
    expected = one_process(torch.arange(B), None, gradient_ratio=0.3)
    for name in ("gathered once", "gathered once, FSDP"):
        assert_same_on_all([result[name]["ratio"] for result in results])
        for part in ("model", "base", "hier"):
            torch.testing.assert_close(results[0][name][part], expected[part])
    assert not torch.allclose(one_process(torch.arange(B), None)["model"], expected["model"], rtol=1e-3)


@pytest.mark.parametrize("name", ["not gathered", "gathered once, draws"])
def test_with_draws_every_gradient_is_the_mean_of_those_of_the_processes(seen, name):
    world_size, results = seen
    parts = []
    for rank in range(world_size):
        indices = rows(rank, world_size) if name == "not gathered" else torch.arange(B)
        parts.append(one_process(indices, 7 + rank))
    for part in ("model", "base", "hier"):
        expected = torch.stack([p[part] for p in parts]).mean(0)
        torch.testing.assert_close(results[0][name][part], expected)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "train, bfloat16", "train, float16"])
def test_proxies_stay_the_same_on_all_processes(seen, name):
    """Bit for bit over 200 steps, 60 in mixed precision, with other draws in each process; and the loss falls."""
    _, results = seen
    assert_same_on_all([[result[name]["hier"], result[name]["base"]] for result in results])
    values = torch.tensor([result[name]["values"] for result in results])
    assert values.isfinite().all()
    assert (values[:, -20:].mean(1) < 0.7 * values[:, :20].mean(1)).all()


def test_without_ddp_around_the_loss_proxies_drift_apart(seen):
    """Why the recipe has it. If this fails, docs/distributed.md may become shorter."""
    _, results = seen
    first, second = (results[rank]["train, no DDP around the loss"]["hier"] for rank in (0, 1))
    assert (first - second).abs().max() > 0.05


def test_awkward_batches_end_with_the_same_finite_gradients_on_all_processes(seen):
    """Batches of different sizes, without gathering; one class; one sample. A hang would have been a timeout."""
    _, results = seen
    assert_same_on_all([result["awkward batches"] for result in results])
    for gradients in results[0]["awkward batches"]:
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_another_number_of_batches_in_each_process_ends(seen):
    _, results = seen
    assert_same_on_all([result["uneven number of batches"] for result in results])


def test_gathering_batches_of_different_sizes_ends_in_an_error(tmp_path):
    """PML gathers equal shapes only. Nobody waits for ever, and no step is taken with what was gathered."""
    status, log = torchrun(2, "uneven", tmp_path)
    assert status != 0, log
    assert not list(tmp_path.glob("rank*.pt"))


def test_a_start_from_data_is_sent_to_all_processes(seen):
    _, results = seen
    assert_same_on_all([result["start from data"] for result in results])


def test_labels_may_be_left_out(seen):
    world_size, results = seen
    assert all(0 < result["without labels"] < 10 * world_size for result in results)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lazily sized", "Modules with uninitialized parameters can't be used"),
        ("efficient", "ValueError: ref_emb and ref_labels are not supported by HIERLoss"),
        ("efficient", "with DistributedLossWrapper, efficient=False"),
        ("multiple", "TypeError: The input loss must extend BaseMetricLossFunction"),
    ],
)
def test_what_does_not_work_says_so_in_every_process(seen, case, message):
    _, results = seen
    assert all(message in result["messages"][case] for result in results)
