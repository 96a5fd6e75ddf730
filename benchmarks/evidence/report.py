"""What the runs say: one table, one picture, and all differences as CSV."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from . import study
from .training import METHODS, MOST_STEPS, SCORES

IMAGES = Path(__file__).parents[2] / "docs" / "images" / "evidence"
SHOWN = {
    "ratio 0.1": "#332288",
    "ratio 0.1, frozen": "#88CCEE",
    "ratio 0.3, frozen": "#117733",
    "ratio 1.0, frozen, rising": "#CC6677",
    "distillation 0.3": "#DDAA33",
}
"""Methods in the picture, with their colours, and in the table of alternatives."""
CELL = ["dataset", "loss"]
Row = dict[str, Any]
Points = dict[Any, Callable[[Row], Any]]
"""By name: functions that pick a point of the curve of a run, or ``None`` where the run does not have it."""


def scores(rows: list[Row], part: str, points: Points) -> pd.DataFrame:
    """A row for each point of each run, and a column for each score."""
    keys = [*CELL, "method", "seed"]
    found = [
        {"length": name, **{key: row[key] for key in keys}, **at(row)[part]}
        for name, at in points.items()
        for row in rows
        if at(row)
    ]
    return pd.DataFrame(found, columns=["length", *keys, *SCORES]).set_index(["length", *keys])


def gains(found: pd.DataFrame) -> pd.DataFrame:
    """Differences to the base loss alone, of the seeds that both have."""
    alone = found.xs("none", level="method")
    methods = found.drop(index="none", level="method")
    return (methods - alone.reindex(methods.index.droplevel("method")).to_numpy()).dropna()


def interval(groups: Any) -> tuple[Any, Any]:
    """Means over seeds, and half widths of their 95% confidence intervals, from Student's t distribution."""
    return groups.mean(), groups.sem() * stats.t.ppf(0.975, groups.count() - 1)


def differences(gained: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean gain and half width of its interval, for each length, cell (data set and loss) and method."""
    means, halves = interval(gained.groupby(["length", *CELL, "method"], sort=False))
    return means, halves


def over_cells(gained: pd.DataFrame) -> pd.DataFrame:
    """Means over the cells of one method and length, of the seeds that all of them have."""
    return gained.unstack(CELL).dropna().T.groupby(level=0, sort=False).mean().T


def by_length(lengths: dict[tuple[str, str], int], multiples: dict[Any, int]) -> Points:
    """Points at multiples of the best length of the base loss alone, for the runs that have all of them."""

    def at(multiple: int, row: Row) -> Any:
        best = lengths[row["dataset"], row["loss"]]
        return row["curve"].get(str(multiple * best)) if best * max(multiples.values()) <= row["steps"] else None

    return {name: partial(at, multiple) for name, multiple in multiples.items()}


def two_lengths(lengths: dict[tuple[str, str], int]) -> Points:
    """The lengths of training that are compared in tables."""
    return by_length(lengths, {"best length": 1, "4 times": 4})


def choose(rows: list[Row], lengths: dict[tuple[str, str], int]) -> pd.DataFrame:
    """Each method's mean gains on validation classes over cells and both lengths, and the number of the cells."""
    means, _ = differences(gains(scores(rows, "validation", two_lengths(lengths))))
    cells = means.groupby("method", sort=False)
    return cells.mean().assign(mean=cells.mean().mean(axis=1), cells=cells.size() // 2).sort_values("mean")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def table(gained: pd.DataFrame) -> str:
    """Mean gain over all cells with its 95% interval, and how many cells are significantly up and down."""
    means, halves = differences(gained)
    lines = []
    for (length, method), own in gained.groupby(["length", "method"], sort=False):
        mean, half = interval(over_cells(own.xs((length, method), level=["length", "method"])))
        each, widths = (frame.xs((length, method), level=["length", "method"]) for frame in (means, halves))
        counts = zip((each > widths).sum(), (-each > widths).sum(), strict=True)
        cells = [
            f"{m:+.1f} ± {h:.1f} ({up} up, {down} down of {len(each)})"
            for m, h, (up, down) in zip(mean, half, counts, strict=True)
        ]
        lines.append([method, length, *cells])
    return markdown(["method", "length", *SCORES], lines)


def without_training_longer(rows: list[Row], lengths: dict[tuple[str, str], int]) -> str:
    """What a user can do without HIER: the frozen features, an untrained head, early stopping on validation.

    Means over the runs that all methods of the picture have.
    """
    rows = [row for row in rows if row["method"] in {"none", "frozen features", *SHOWN}]
    options = {
        "not trained": lambda row: row["curve"]["0"] if row["method"] not in SHOWN else None,
        "stopped early": lambda row: (
            len(row["curve"]) > 1 and max(row["curve"].values(), key=lambda at: at["validation"]["MAP@R"])
        ),
    } | two_lengths(lengths)
    found = scores(rows, "test", options)
    runs = found.xs("best length", level="length").groupby([*CELL, "seed"])[SCORES[0]].size()
    common = runs.index[runs == runs.max()]
    found = found[found.index.droplevel(["length", "method"]).isin(common)]
    means = found.groupby(["method", "length"], sort=False).mean()
    order = [(m, o) for m in METHODS for o in options if (m, o) in means.index]
    lines = [[f"{m}, {o}", *(f"{value:.2f}" for value in means.loc[m, o])] for m, o in order]
    return markdown(["method", *SCORES], lines)


def figure(rows: list[Row], lengths: dict[tuple[str, str], int]) -> Figure:
    """Gain over the base loss by length of training, relative to the best one of the base loss."""
    ticks = {"×1": 1, "×2": 2, "×4": 4}
    gained = gains(scores(rows, "test", by_length(lengths, ticks)))
    datasets = gained.index.unique("dataset")
    picture = Figure(figsize=(11, 2.6 * len(datasets)), layout="constrained")
    axes = picture.subplots(len(datasets), len(SCORES), squeeze=False, sharex=True)
    for line, dataset in zip(axes, datasets, strict=True):
        for method, color in SHOWN.items():
            own = gained.query("dataset == @dataset and method == @method")
            points = [
                interval(over_cells(o.droplevel(["length", "method"])))
                for _, o in own.groupby("length", sort=False)
            ]
            for ax, score in zip(line, SCORES, strict=True):
                means, halves = [m[score] for m, _ in points], [h[score] for _, h in points]
                ax.errorbar([*ticks][: len(points)], means, halves, color=color, lw=1.6, capsize=2, label=method)
        for ax in line:
            ax.axhline(0, color="#999999", lw=0.8)
            ax.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(f"{dataset}\npoints", fontsize=9)
    for ax, score in zip(axes[0], SCORES, strict=True):
        ax.set_title(score, fontsize=10)
    lines, names = axes[0, 0].get_legend_handles_labels()
    picture.legend(lines, names, fontsize=8, frameon=False, loc="outside upper center", ncols=len(SHOWN))
    picture.supxlabel("length of training, relative to the best one of the base loss alone", fontsize=9)
    return picture


def write(folder: Path, images: Path) -> None:
    """Print the tables; write the picture and the CSV."""
    lengths = study.best_lengths(folder)
    print("Best length of each base loss alone, on validation classes, in steps:\n")
    for (dataset, loss), steps in sorted(lengths.items()):
        print(f"- {dataset}, {loss}: {steps}")
    print("\nMean gain on validation classes, in points, over cells and both lengths:\n")
    print(choose(study.read("validate", folder), lengths).round(2).to_string())
    rows = study.read("test", folder)
    if not rows:
        return
    still_improving = {f"{MOST_STEPS} steps": lambda row: row["curve"].get(str(MOST_STEPS))}
    gained = gains(scores(rows, "test", two_lengths(lengths) | still_improving))
    seeds = gained.reset_index("seed").groupby("method", sort=False)["seed"].nunique().to_dict()
    print(f"\nTest classes; seeds: {seeds}\n\n{table(gained)}\n")
    print(without_training_longer(rows, lengths))
    means, halves = (frame.rename_axis(columns="score").stack() for frame in differences(gained))
    count = gained.groupby(["length", *CELL, "method"]).size().reindex(means.index.droplevel("score"))
    found = pd.DataFrame({"difference": means, "half_width_95": halves}).round(3).assign(seeds=count.array)
    found.sort_index().to_csv(folder / "test.csv")
    images.mkdir(parents=True, exist_ok=True)
    figure(rows, lengths).savefig(images / "gain.png", dpi=110)
