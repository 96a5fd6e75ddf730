"""Which runs a study has, and the file that remembers the ones that are done."""

import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from . import data, training

FOLDER = Path(__file__).parents[1] / "results" / "evidence"
SEEDS = {"length": range(100, 103), "validate": range(100, 103), "test": range(10)}


def read(study: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All runs of a study so far."""
    file = folder / f"{study}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def best_lengths(folder: Path = FOLDER) -> dict[tuple[str, str], int]:
    """For each data set and base loss, the steps after which it alone has the best MAP@R of validation classes."""
    totals: dict[tuple[str, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in read("length", folder):
        for steps, scores in row["curve"].items():
            totals[row["dataset"], row["loss"]][int(steps)] += scores["validation"]["MAP@R"]
    found = {}
    for key, by_steps in totals.items():
        by_steps.pop(0, None)
        found[key] = max(by_steps, key=lambda steps: (by_steps[steps], -steps))
    return found


def runs(
    study: str,
    datasets: Sequence[str],
    losses: Sequence[str],
    methods: Sequence[str],
    seeds: int | None = None,
    folder: Path = FOLDER,
) -> Iterator[dict[str, Any]]:
    """The runs of a study, seed by seed, so that unfinished studies are balanced."""
    lengths = best_lengths(folder)
    methods = ["none"] if study == "length" else methods
    for seed, method, dataset, loss in itertools.product(SEEDS[study][:seeds], methods, datasets, losses):
        if study == "length":
            steps = training.MOST_STEPS
        elif (dataset, loss) in lengths:
            steps = min(4 * lengths[dataset, loss], training.MOST_STEPS)
        else:
            raise ValueError(f"{folder} does not say how long to train {loss} on {dataset}; run length first")
        yield {"dataset": dataset, "loss": loss, "method": method, "seed": seed, "steps": steps}


def perform(study: str, todo: Iterator[dict[str, Any]], source: Path, workers: int, folder: Path = FOLDER) -> None:
    """Do the runs that the file does not have yet; each is appended to it when it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("dataset", "loss", "method", "seed", "steps")
    done = {tuple(row[key] for key in keys) for row in read(study, folder)}
    missing = [run for run in todo if tuple(run.values()) not in done]
    results = Parallel(n_jobs=workers, return_as="generator_unordered")(
        delayed(_perform)(run, source, study == "test") for run in missing
    )
    with (folder / f"{study}.jsonl").open("a") as file:
        for row in tqdm(results, total=len(missing), unit="run", desc=study):
            file.write(json.dumps(row) + "\n")
            file.flush()


def _perform(run: dict[str, Any], source: Path, test: bool) -> dict[str, Any]:
    """The run with its curve, and the seconds of processor time that it took."""
    torch.set_num_threads(1)
    began = time.process_time()
    split = data.split(_load(run["dataset"], source), run["seed"])
    method = training.METHODS[run["method"]]
    curve = training.run(split, run["loss"], method, run["seed"], run["steps"], test)
    return {**run, "curve": curve, "seconds": round(time.process_time() - began, 1)}


@lru_cache(maxsize=3)
def _load(name: str, source: Path) -> data.Part:
    return data.load(name, source)
