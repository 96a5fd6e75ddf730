"""What the runs say: one table, one picture, and all differences as CSV."""

import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from . import study
from .training import METHODS, SCORES

matplotlib.use("Agg")

__all__ = ["IMAGES", "Difference", "choose", "differences", "paired", "write"]

IMAGES = Path(__file__).parents[2] / "docs" / "images" / "evidence"
SHOWN = ("lambda 1", "ratio 0.3", "ratio 0.3, frozen", "distillation 0.3")
"""Methods in the picture."""
Row = dict[str, Any]
Scores = dict[str, float]


class Difference(NamedTuple):
    """Mean of paired differences, with the half width of its 95% confidence interval."""

    mean: float
    half_width: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half_width:.1f}"

    @property
    def is_up(self) -> bool:
        return self.mean > self.half_width

    @property
    def is_down(self) -> bool:
        return -self.mean > self.half_width


def paired(values: Sequence[float]) -> Difference:
    """The mean of differences and its interval, from Student's t distribution."""
    count = len(values)
    half = stats.t.ppf(0.975, count - 1) * stats.sem(values) if count > 1 else np.inf
    return Difference(float(np.mean(values)), float(half), count)


def gains(rows: list[Row], part: str, at: Callable[[Row], Scores]) -> dict[tuple[str, ...], dict[int, float]]:
    """Gain over the base loss for each seed, by data set, loss, method and score; ``at`` picks from a curve."""
    by_seed: dict[tuple[str, str, str], dict[int, Scores]] = defaultdict(dict)
    for row in rows:
        by_seed[row["dataset"], row["loss"], row["method"]][row["seed"]] = at(row)[part]  # type: ignore[index]
    found = {}
    for (dataset, loss, method), own in by_seed.items():
        alone = by_seed.get((dataset, loss, "none"), {})
        seeds = sorted(own.keys() & alone.keys())
        for score in SCORES if seeds else ():
            found[dataset, loss, method, score] = {s: own[s][score] - alone[s][score] for s in seeds}
    return found


def differences(rows: list[Row], part: str, at: Callable[[Row], Scores]) -> dict[tuple[str, ...], Difference]:
    """The same, with intervals over the seeds."""
    return {key: paired(list(by_seed.values())) for key, by_seed in gains(rows, part, at).items()}


def mean_gain(by_cell: list[dict[int, float]]) -> Difference:
    """Mean over cells (data set and loss), with an interval over the seeds that all cells have."""
    seeds = set.intersection(*(set(by_seed) for by_seed in by_cell))
    return paired([float(np.mean([by_seed[seed] for by_seed in by_cell])) for seed in sorted(seeds)] or [np.nan])


def lengths_of(rows: list[Row], lengths: dict[tuple[str, str], int]) -> dict[str, Callable[[Row], Any]]:
    """The two lengths of training that are compared: the best one of the base loss alone, and the whole run."""

    def best(row: Row) -> Any:
        return row["curve"][str(lengths[row["dataset"], row["loss"]])]

    def whole(row: Row) -> Any:
        return row["curve"][str(row["steps"])]

    return {"best length": best, "4 times": whole}


def choose(rows: list[Row], lengths: dict[tuple[str, str], int]) -> dict[str, float]:
    """Each method's mean gain on validation classes, over cells, scores and both lengths of training."""
    gains: dict[str, list[float]] = defaultdict(list)
    for at in lengths_of(rows, lengths).values():
        for (_, _, method, _), difference in differences(rows, "validation", at).items():
            gains[method].append(difference.mean)
    return {method: float(np.mean(values)) for method, values in gains.items() if method != "none"}


def table(rows: list[Row], part: str, lengths: dict[tuple[str, str], int]) -> str:
    """Mean gain over all cells with its 95% interval, and how many cells are significantly up and down."""
    lines = [f"| method | length | {' | '.join(SCORES)} |", "| --- | --- |" + " --- |" * len(SCORES)]
    for name, at in lengths_of(rows, lengths).items():
        found = gains(rows, part, at)
        for method in METHODS:
            cells = []
            for score in SCORES:
                own = [by_seed for key, by_seed in found.items() if key[2:] == (method, score)]
                if own and method != "none":
                    each = [paired(list(by_seed.values())) for by_seed in own]
                    up, down = sum(d.is_up for d in each), sum(d.is_down for d in each)
                    cells.append(f"{mean_gain(own)} ({up} up, {down} down of {len(own)})")
            if cells:
                lines.append(f"| {method} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def without_training_longer(rows: list[Row], lengths: dict[tuple[str, str], int]) -> str:
    """What a user can do without HIER: the frozen features' head as it is, and early stopping on validation.

    Means over the runs that all of the methods have.
    """

    def stopped(row: Row) -> Any:
        return max(row["curve"].values(), key=lambda scores: scores["validation"]["MAP@R"])

    options: dict[str, Callable[[Row], Any]] = {
        "not trained": lambda row: row["curve"]["0"],
        "stopped early": stopped,
    } | lengths_of(rows, lengths)
    lines = [f"| method | {' | '.join(SCORES)} |", "| --- |" + " --- |" * len(SCORES)]
    runs = defaultdict(set)
    for row in rows:
        runs[row["method"]].add((row["dataset"], row["loss"], row["seed"]))
    common = set.intersection(*runs.values())
    for method in METHODS:
        own = [r for r in rows if r["method"] == method and (r["dataset"], r["loss"], r["seed"]) in common]
        for option, at in options.items():
            if own and (method == "none" or option != "not trained"):
                means = (np.mean([at(row)["test"][score] for row in own]) for score in SCORES)
                lines.append(f"| {method}, {option} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines)


def figure(rows: list[Row], shown: Sequence[str], lengths: dict[tuple[str, str], int]) -> Figure:
    """Gain over the base loss by length of training, relative to the best one of the base loss."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    picture = Figure(figsize=(11, 2.6 * len(datasets)), layout="constrained")
    axes = picture.subplots(len(datasets), len(SCORES), squeeze=False, sharex=True)
    multiples = (1, 2, 4)
    for line, dataset in enumerate(datasets):
        own = [row for row in rows if row["dataset"] == dataset]
        by_length = []
        for multiple in multiples:

            def at(row: Row, multiple: int = multiple) -> Any:
                steps = multiple * lengths[row["dataset"], row["loss"]]
                return row["curve"][str(min(steps, row["steps"]))]

            by_length.append(gains(own, "test", at))
        for ax, score in zip(axes[line], SCORES, strict=True):
            ax.axhline(0, color="#999999", lw=0.8)
            for color, method in zip(("#332288", "#CC6677", "#117733", "#DDAA33"), shown, strict=False):
                points = [
                    mean_gain([seeds for key, seeds in found.items() if key[2:] == (method, score)])
                    for found in by_length
                ]
                means, halves = [p.mean for p in points], [p.half_width for p in points]
                ax.errorbar(range(len(multiples)), means, halves, color=color, lw=1.6, capsize=2, label=method)
            ax.set_xticks(range(len(multiples)), [f"×{multiple}" for multiple in multiples])
            ax.spines[["top", "right"]].set_visible(False)
            if line == 0:
                ax.set_title(score, fontsize=10)
        axes[line, 0].set_ylabel(f"{dataset}\npoints", fontsize=9)
    axes[0, 0].legend(fontsize=7, frameon=False)
    picture.supxlabel("length of training, relative to the best one of the base loss alone", fontsize=9)
    return picture


def write(folder: Path, images: Path) -> None:
    """Print the tables; write the picture and the CSV."""
    lengths = study.best_lengths(folder)
    print("Best length of each base loss alone, on validation classes, in steps:\n")
    for (dataset, loss), steps in sorted(lengths.items()):
        print(f"- {dataset}, {loss}: {steps}")
    chosen = choose(study.read("validate", folder), lengths)
    print("\nMean gain on validation classes, in points, over cells, scores and both lengths:\n")
    for method, gain in sorted(chosen.items(), key=lambda item: -item[1]):
        print(f"- {method}: {gain:+.2f}")
    rows = study.read("test", folder)
    if not rows:
        return
    seeds = {method: len({row["seed"] for row in rows if row["method"] == method}) for method in METHODS}
    print(f"\nTest classes; seeds: {seeds}\n\n{table(rows, 'test', lengths)}\n")
    print(without_training_longer(rows, lengths))
    with (folder / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "dataset", "loss", "method", "score", "difference", "half_width_95", "seeds"])
        for name, at in lengths_of(rows, lengths).items():
            for key, difference in sorted(differences(rows, "test", at).items()):
                if key[2] != "none":
                    values = [f"{difference.mean:.3f}", f"{difference.half_width:.3f}", difference.seeds]
                    writer.writerow([name, *key, *values])
    images.mkdir(parents=True, exist_ok=True)
    shown = [m for m in SHOWN if seeds[m]]
    figure(rows, shown, lengths).savefig(images / "gain.png", dpi=110)
