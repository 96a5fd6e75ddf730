"""The studies: their runs, done in parallel, kept in JSON Lines, and resumed where they stopped."""

import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from joblib import Parallel, delayed
from tqdm import tqdm

from benchmarks.report import RESULTS

from . import data, training
from .settings import BASE_LOSSES, CANDIDATES, CHOSEN, COMBINATIONS, FAITHFUL, FINALISTS, Settings, sweep

__all__ = ["FOLDER", "SEEDS", "Run", "learning_rates", "perform", "read", "runs"]

FOLDER = RESULTS / "evidence"
SEEDS = {"base": 3, "sweep": 3, "candidates": 3, "combinations": 1, "finalists": 3, "test": 10}
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TUNED_ON = ("ProxyAnchor", "SupCon")
"""Base losses that settings of HIER are chosen with."""
ALONE = replace(FAITHFUL, weight=0.0)


class Run(NamedTuple):
    """One training run."""

    dataset: str
    base: str
    method: str
    settings: Settings
    lr: float
    seed: int
    validation: bool

    @property
    def key(self) -> str:
        settings = {
            name: value for name, value in asdict(self.settings).items() if value != getattr(FAITHFUL, name)
        }
        return json.dumps([self.dataset, self.base, self.method, settings, self.lr, self.seed, self.validation])


def runs(study: str, datasets: Sequence[str], seeds: int | None = None, folder: Path = FOLDER) -> Iterator[Run]:
    """The runs that a study is made of."""
    seeds = SEEDS[study] if seeds is None else seeds
    if study == "base":
        for seed, dataset, base, lr in itertools.product(range(seeds), datasets, BASE_LOSSES, LEARNING_RATES):
            yield Run(dataset, base, f"lr={lr:g}", ALONE, lr, seed, True)
        return
    rates = learning_rates(folder)
    test = study == "test"
    methods = {"alone": ALONE} | {
        "sweep": sweep(),
        "candidates": CANDIDATES,
        "combinations": COMBINATIONS,
        "finalists": FINALISTS,
        "test": CHOSEN,
    }[study]
    bases = BASE_LOSSES if test else TUNED_ON
    datasets = [name for name in datasets if test or name != "digits"]  # too few classes to choose anything on
    for seed, dataset, base, method in itertools.product(range(seeds), datasets, bases, methods):
        yield Run(dataset, base, method, methods[method], rates[dataset, base], seed, not test)


def learning_rates(folder: Path = FOLDER) -> dict[tuple[str, str], float]:
    """The rate of each data set and base loss with the best MAP@R among validation classes."""
    rows = read("base", folder)
    if not rows:
        raise ValueError(f"{folder} has no learning rates; run the study base first")
    totals: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        rates = totals.setdefault((row["dataset"], row["base"]), {})
        rates[row["lr"]] = rates.get(row["lr"], 0.0) + row["scores"]["MAP@R"]
    return {key: max(rates, key=rates.__getitem__) for key, rates in totals.items()}


def read(study: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All runs of a study so far."""
    file = folder / f"{study}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def perform(
    study: str,
    datasets: Sequence[str],
    source: Path | None,
    workers: int,
    seeds: int | None = None,
    folder: Path = FOLDER,
) -> None:
    """Do the runs that the file does not have yet; each is appended to it as it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read(study, folder)}
    missing = [run for run in runs(study, datasets, seeds, folder) if run.key not in done]
    results = Parallel(n_jobs=workers, return_as="generator_unordered")(
        delayed(_perform)(run, source) for run in missing
    )
    with (folder / f"{study}.jsonl").open("a") as file:
        for run, scores, seconds in tqdm(results, total=len(missing), unit="run", desc=study):
            row = {"dataset": run.dataset, "base": run.base, "method": run.method, "lr": run.lr, "seed": run.seed}
            row |= {"scores": {name: round(value, 4) for name, value in scores.items()}}
            row |= {"seconds": round(seconds, 2), "key": run.key}
            file.write(json.dumps(row) + "\n")
            file.flush()


def _perform(run: Run, source: Path | None) -> tuple[Run, dict[str, float], float]:
    """The scores of a run, and the seconds of processor time that it took."""
    torch.set_num_threads(1)
    # Trees of the tuning are other trees than those of the test.
    inputs, taxonomy = _load(run.dataset, source, run.seed + 1000 * run.validation)
    split = data.split(inputs, taxonomy, run.seed if run.validation else None)
    began = time.process_time()
    scores = training.run(run.dataset, split, run.base, run.lr, run.settings, run.seed)
    return run, scores, time.process_time() - began


@lru_cache(maxsize=8)
def _load(name: str, source: Path | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return data.load(name, source, seed)
