"""Time and memory of a training step of HIER, beside the plain form."""

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from pytorch_metric_learning import losses
from torch import Tensor
from tqdm import tqdm

from benchmarks import plain
from hierloss import HIERLoss, ReciprocalNeighborMiner

Step = Callable[[], Tensor]

WARM_UP = 3
"""Steps that are not timed. The first ones of a compiled loss compile it, and record its CUDA graphs."""


def make_step(
    form: str, device: str, batch: int, dim: int, proxies: int, triplets: int, proxy_batch: int | None = None
) -> Step:
    """A function that runs forward and backward once; ``form`` is one of those of `compare`."""
    torch.manual_seed(0)
    embeddings = torch.randn(batch, dim, device=device).requires_grad_()
    labels = torch.arange(batch, device=device) // 2
    miner = ReciprocalNeighborMiner(triplets_per_anchor=triplets)
    options = {"miner": miner, "proxy_miner": miner, "proxy_batch_size": proxy_batch, "gradient_ratio": None}
    loss_func = HIERLoss(proxies, dim, **options).to(device)
    if form == "compiled":
        loss_func.compile(mode="reduce-overhead")
    elif form == "captured":
        loss_func.compile()

    def run() -> Tensor:
        embeddings.grad = loss_func.proxies.grad = None
        if form != "plain":
            loss: Tensor = loss_func(embeddings, labels)
        else:
            loss = plain.hier(embeddings, labels, loss_func.proxies, triplets_per_anchor=triplets)
        loss.backward()
        return loss.detach()

    return captured(run) if form == "captured" else run


def captured(step: Step) -> Step:
    """The step as one CUDA graph, as part of a training step that is one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def seconds(step: Step, device: str) -> float:
    """Time of one step, with the device's work done."""
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def side_by_side(steps: dict[str, Step], device: str, repeats: int) -> dict[str, list[float]]:
    """Times of several steps, run in turns so that whatever else the machine does meets all of them."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Number, median and spread of some times."""
    ms = [1e3 * t for t in times]
    return {"n": len(ms), "median ms": statistics.median(ms), "least ms": min(ms), "most ms": max(ms)}


def peak_memory(**settings: Any) -> float:
    """Largest extra memory of a step in MB, measured in a process of its own."""
    # Without this, glibc keeps freed blocks, and the same step takes three times as much in one run as in another.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(sender, settings))
    process.start()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    process.join()
    if process.exitcode != 0:
        raise MemoryError(f"the process that measured memory ended with exit code {process.exitcode}: {settings}")
    result: float = receiver.recv()
    return result


def _measure_memory(sender: Any, settings: dict[str, Any]) -> None:
    small = settings | {"form": "hierloss", "batch": 24, "proxies": 24, "triplets": 2}
    make_step(**small)()  # what loading code takes is not the step's
    if settings["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make_step(**settings)
        for _ in range(WARM_UP):
            step()
        sender.send((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        step = make_step(**settings)
        if settings["form"] == "compiled":  # the compiler's own memory is not the step's
            for _ in range(WARM_UP):
                step()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
        before = _status("VmRSS")
        step()
        sender.send((_status("VmHWM") - before) / 2**10)


def _status(name: str) -> int:
    """A figure of Linux about this process, in kB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def compare(device: str, repeats: int, **sizes: int) -> list[dict[str, Any]]:
    """One row for each form: median time with its spread, memory, and how many times the plain form takes."""
    forms = ("plain", "hierloss", "compiled", *(["captured"] if device == "cuda" else []))
    times = side_by_side({form: make_step(form, device, **sizes) for form in forms}, device, repeats)
    memory = {form: peak_memory(form=form, device=device, **sizes) for form in forms}
    rows = []
    for form in forms:
        ratios = [a / b for a, b in zip(times["plain"], times[form], strict=True)]
        rows.append(
            {
                "form": form,
                **sizes,
                **summary(times[form]),
                "times faster": statistics.median(ratios),
                "extra MB": memory[form],
                "times smaller": memory["plain"] / memory[form],
            }
        )
    return rows


def cost_of_options(device: str, repeats: int) -> list[dict[str, Any]]:
    """Steps of ProxyAnchor with HIER, and the share of their time that options change; interleaved."""
    more = {"proxy_miner": ReciprocalNeighborMiner()}
    options = {"no ratio": {"gradient_ratio": None}, "default": {}, "50 triplets of each proxy": more}

    def make(own: dict[str, Any]) -> Step:
        torch.manual_seed(0)
        embeddings = torch.randn(180, 128, device=device).requires_grad_()
        labels = torch.arange(180, device=device) // 2
        both = losses.MultipleLosses([losses.ProxyAnchorLoss(90, 128), HIERLoss(512, 128, **own)])
        both.to(device)

        def run() -> Tensor:
            loss: Tensor = both(embeddings, labels)
            loss.backward()
            return loss.detach()

        return run

    times = side_by_side({name: make(own) for name, own in options.items()}, device, repeats)
    rows = []
    for name, own in times.items():
        shares = [100 * a / b for a, b in zip(own, times["default"], strict=True)]
        spread = {"% of default": statistics.median(shares), "least %": min(shares), "most %": max(shares)}
        rows.append({"options": name, **summary(own), **spread})
    return rows


FORWARD_PASSES, BACKWARD_PASSES = 3.5, 21
"""Operations of `hierloss.functional` that go over all cells of an ancestor, counted in its code."""


def limit(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an eager step would take on this CPU if each pass over the cells were as fast as a copy in cache."""
    torch.manual_seed(0)
    loss_func = HIERLoss(512, 128, proxy_miner=ReciprocalNeighborMiner(), collect_stats=True)
    loss_func(torch.randn(180, 128), torch.arange(180) // 2)
    forward = 2 * loss_func.num_triplets * 512 / 1e6
    backward = forward * loss_func.fraction_active
    source, target = torch.rand(2**18), torch.empty(2**18)
    times = []
    for _ in range(5000):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    copy = statistics.median(times) / 2**18 * 1e9
    return [
        {
            "forward Mcells": forward,
            "backward Mcells": backward,
            "ns a copy": copy,
            "limit ms": copy * (forward * FORWARD_PASSES + backward * BACKWARD_PASSES),
            **{f"{row['form']} ms": row["median ms"] for row in measured},
        }
    ]


def growth(device: str, repeats: int) -> list[dict[str, Any]]:
    """Time and memory of one step as each size grows by itself."""
    base = {"batch": 180, "dim": 128, "proxies": 512, "triplets": 50}
    values = {
        "batch": [32, 128, 512, 2048, 4096],
        "dim": [32, 128, 512, 1024],
        "proxies": [64, 256, 1024, 4096],
        "triplets": [10, 50, 200, 800],
    }
    cases = [(name, base | {name: value}) for name, several in values.items() for value in several]
    # Beyond this, all proxies as anchors are what limits; a batch of them is not.
    cases += [("proxies", base | {"proxies": value, "proxy_batch": 512}) for value in (4096, 10_000, 20_000)]
    rows = []
    for name, sizes in tqdm(cases, unit="size"):
        step = make_step("hierloss", device, **sizes)
        step()
        rows.append(
            {
                "grows": name,
                **base,
                "proxy_batch": "all",
                **sizes,
                **summary([seconds(step, device) for _ in range(repeats)]),
                "extra MB": peak_memory(form="hierloss", device=device, **sizes),
            }
        )
    return rows


def import_time(repeats: int) -> list[dict[str, Any]]:
    """What ``import hierloss`` takes in a new process, after PML."""
    code = (
        "import time; from pytorch_metric_learning import losses, miners, distances, reducers, utils\n"
        "start = time.perf_counter(); import hierloss; print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    times = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
    return [{"import": "hierloss", **summary(times)}]


def many_proxies(device: str) -> list[dict[str, Any]]:
    """Time and memory of a step with 10,000 proxies and a batch of 512, all of them anchors or some."""
    sizes = {"batch": 512, "dim": 128, "proxies": 10_000, "triplets": 50}
    rows = []
    for proxy_batch in (None, 512):
        step = make_step("hierloss", device, **sizes, proxy_batch=proxy_batch)
        rows.append(
            {
                **sizes,
                "proxy_batch": proxy_batch or "all",
                "seconds (n = 1)": seconds(step, device),
                "extra MB": peak_memory(form="hierloss", device=device, **sizes, proxy_batch=proxy_batch),
            }
        )
    return rows


def plot_growth(rows: list[dict[str, Any]]) -> Figure:
    figure, all_axes = plt.subplots(2, 4, figsize=(13, 5.5), sharey="row", layout="constrained")
    for axes, name in zip(all_axes.T, ("batch", "proxies", "dim", "triplets"), strict=True):
        for whole, style in ((True, "o-"), (False, "s--")):
            own = [row for row in rows if row["grows"] == name and (row["proxy_batch"] == "all") == whole]
            if not own:
                continue
            x = [row[name] for row in own]
            label = "all proxies are anchors" if whole else "proxy_batch_size=512"
            axes[0].plot(x, [row["median ms"] for row in own], style, label=label)
            axes[0].fill_between(x, [r["least ms"] for r in own], [r["most ms"] for r in own], alpha=0.2)
            axes[1].plot(x, [row["extra MB"] for row in own], style, label=label)
        for ax in axes:
            ax.set(xscale="log", yscale="log")
            ax.grid(alpha=0.3)
        axes[1].set_xlabel({"dim": "embedding size", "triplets": "triplets per anchor"}.get(name, name))
    all_axes[0, 0].set_ylabel("forward and backward, ms")
    all_axes[1, 0].set_ylabel("extra memory, MB")
    all_axes[0, 1].legend(frameon=False)
    return figure


def breakdown(device: str) -> list[dict[str, Any]]:
    """Where the time of a step goes, by operation, at the default sizes."""
    step = make_step("hierloss", device, batch=180, dim=128, proxies=512, triplets=50)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            step()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # Kernels have events of their own, beside those of the operations that launch them.
    events = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: -getattr(event, attribute))
    total = sum(getattr(event, attribute) for event in events)
    return [
        {"operation": event.key, "calls": event.count // 5, "share %": 100 * getattr(event, attribute) / total}
        for event in events[:12]
    ]
