"""Tables and plots out of the runs: paired differences with their 95% confidence intervals."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from .settings import BASE_LOSSES, Settings

__all__ = ["differences", "figures", "interval", "of_study"]

NAMES = {"digits": "digits", "synthetic": "synthetic tree", "trec": "TREC", "omniglot": "Omniglot"}
Rows = list[dict[str, Any]]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% confidence interval (Student's t)."""
    sample = np.array(list(values))
    if len(sample) < 2:
        return float(sample.mean()) if len(sample) else float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / len(sample) ** 0.5
    return float(sample.mean()), float(half)


def values(rows: Rows, dataset: str, base: str, method: str, metric: str) -> dict[int, float]:
    """The metric of each seed."""
    return {
        row["seed"]: row["scores"][metric]
        for row in rows
        if (row["dataset"], row["base"], row["method"]) == (dataset, base, method) and metric in row["scores"]
    }


def differences(
    rows: Rows, dataset: str, base: str, method: str, metric: str, less: tuple[str, str] | None = None
) -> list[float]:
    """Paired by seed: the metric of the method, less that of the base loss alone or of what ``less`` names."""
    other_method, other_metric = less or ("alone", metric)
    ours = values(rows, dataset, base, method, metric)
    theirs = values(rows, dataset, base, other_method, other_metric)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def text(sample: Iterable[float], digits: int = 1) -> str:
    """``mean ± half-width``, in bold where the interval leaves out 0."""
    sample = list(sample)
    if not sample:
        return ""
    mean, half = interval(sample)
    if len(sample) == 1:
        return f"{mean:+.{digits}f}"
    written = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{written}**" if abs(mean) > half else written


def cells(rows: Rows) -> list[tuple[str, str]]:
    """Pairs of data set and base loss that the runs have, in the order of the documentation."""
    have = {(row["dataset"], row["base"]) for row in rows}
    return [(dataset, base) for dataset in NAMES for base in BASE_LOSSES if (dataset, base) in have]


def methods(rows: Rows) -> list[str]:
    return [name for name in dict.fromkeys(row["method"] for row in rows) if name != "alone"]


def table(head: list[str], body: Iterable[list[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def test_table(rows: Rows, metric: str) -> str:
    """One line for each data set and base loss: alone, and what each method adds."""
    body = []
    for dataset, base in cells(rows):
        alone = list(values(rows, dataset, base, "alone", metric).values())
        if alone:
            added = [text(differences(rows, dataset, base, method, metric)) for method in methods(rows)]
            body.append([NAMES[dataset], base, f"{np.mean(alone):.1f}", *added])
    return table(
        ["data", "base loss", f"{metric} alone", *(f"{name}, difference" for name in methods(rows))], body
    )


def purity_table(rows: Rows) -> str:
    """Trees over the test classes: clustering without HIER, clustering with it, and the learned tree."""
    body = []
    for dataset, base in cells(rows):
        alone = [values(rows, dataset, base, "alone", f"purity, {kind}") for kind in ("chance", "average", "ward")]
        if not alone[0]:
            continue
        row = [NAMES[dataset], base, *(f"{np.mean(list(of_kind.values())):.1f}" for of_kind in alone)]
        for method in methods(rows):
            ward = values(rows, dataset, base, method, "purity, ward")
            hier = values(rows, dataset, base, method, "purity, HIER")
            less = differences(rows, dataset, base, method, "purity, HIER", ("alone", "purity, ward"))
            row += [f"{np.mean(list(ward.values())):.1f}", f"{np.mean(list(hier.values())):.1f}", text(less)]
        body.append(row)
    head = ["data", "base loss", "chance", "average, alone", "Ward, alone"]
    for method in methods(rows):
        head += [f"Ward, {method}", f"HIER's tree, {method}", f"HIER's tree, {method}, less Ward alone"]
    return table(head, body)


def rates_table(rows: Rows) -> str:
    """One line for each data set and base loss, one column for each learning rate."""
    rates = sorted({row["lr"] for row in rows})
    body = []
    for dataset, base in cells(rows):
        means = [np.mean(list(values(rows, dataset, base, f"lr={rate:g}", "MAP@R").values())) for rate in rates]
        best = int(np.argmax(means))
        body.append(
            [NAMES[dataset], base, *(f"**{m:.1f}**" if k == best else f"{m:.1f}" for k, m in enumerate(means))]
        )
    return table(["data", "base loss", *(f"{rate:g}" for rate in rates)], body)


def training_table(rows: Rows) -> str:
    """What went on in HIER: how large its gradient was, how much was clipped, how many ancestors were in use."""
    names = ["gradient ratio", "share clipped", "share active", "ancestors drawn"]
    body = []
    for dataset, base in cells(rows):
        for method in methods(rows):
            medians = [np.median(list(values(rows, dataset, base, method, name).values())) for name in names]
            # MultiSimilarity has no gradient where it has no hard pairs, and the ratio then no bound.
            ratio = f"{medians[0]:.2f}" if medians[0] < 100 else "over 100"
            body.append(
                [
                    NAMES[dataset],
                    base,
                    method,
                    ratio,
                    f"{medians[1]:.2f}",
                    f"{medians[2]:.2f}",
                    f"{medians[3]:.0f}",
                ]
            )
    return table(["data", "base loss", "method", *names], body)


def tuning_table(rows: Rows, metrics: tuple[str, ...] = ("R@1", "MAP@R")) -> str:
    """One line for each method, one column for each cell and metric."""
    head = ["setting", *(f"{NAMES[d]}, {b}, {metric}" for d, b in cells(rows) for metric in metrics)]
    body = [
        [method, *(text(differences(rows, d, b, method, metric)) for d, b in cells(rows) for metric in metrics)]
        for method in methods(rows)
    ]
    return table(head, body)


def summary(rows: Rows, method: str, metrics: tuple[str, ...] = ("R@1", "MAP@R")) -> str:
    """In how many cells a method is certainly better, and in how many certainly worse."""
    better, worse = set(), []
    for dataset, base in cells(rows):
        for metric in metrics:
            mean, half = interval(differences(rows, dataset, base, method, metric))
            if mean - half > 0:
                better.add((dataset, base))
            elif mean + half < 0:
                worse.append(f"{NAMES[dataset]}, {base}, {metric}")
    total = sum(bool(differences(rows, dataset, base, method, metrics[0])) for dataset, base in cells(rows))
    return (
        f"{method}: {' or '.join(metrics)} certainly above the base loss alone in {len(better)} of {total} cells; "
        f"certainly below in {len(worse)} of {total * len(metrics)} figures"
        + (f" ({'; '.join(worse)})" if worse else "")
    )


def plot_test(rows: Rows, metrics: tuple[str, ...] = ("R@1", "MAP@R", "H-AP")) -> Figure:
    """Differences with their intervals, a line for each data set and base loss."""
    order = cells(rows)[::-1]
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(4.2 * len(metrics), 0.36 * len(order) + 1.2), sharey=True
    )
    for axis, metric in zip(np.atleast_1d(axes), metrics, strict=True):
        for number, method in enumerate(methods(rows)):
            shift = 0.22 * (1 - number)
            points = [interval(differences(rows, d, b, method, metric)) for d, b in order]
            mean, half = np.array(points).T
            axis.errorbar(mean, np.arange(len(order)) + shift, xerr=half, fmt="o", ms=4, capsize=2, label=method)
        axis.axvline(0, color="0.4", lw=1)
        axis.set_xscale("symlog", linthresh=2)
        ticks = (-50, -10, -2, -1, 0, 1, 2, 10)
        axis.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
        axis.set_xlabel(f"{metric}, difference (points)")
        axis.grid(axis="x", alpha=0.3)
    first = np.atleast_1d(axes)[0]
    first.set_yticks(range(len(order)), [f"{NAMES[d]}, {b}" for d, b in order])
    first.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8)
    figure.tight_layout()
    return figure


def plot_candidates(rows: Rows, metric: str = "MAP@R") -> Figure:
    """Differences to the base loss alone for each candidate, a marker for each data set and base loss."""
    names = methods(rows)[::-1]
    figure, axis = plt.subplots(figsize=(7.5, 0.32 * len(names) + 1.2))
    for number, (dataset, base) in enumerate(cells(rows)):
        mean, half = np.array([interval(differences(rows, dataset, base, name, metric)) for name in names]).T
        shift = 0.6 * (number / max(1, len(cells(rows)) - 1) - 0.5)
        axis.errorbar(
            mean,
            np.arange(len(names)) + shift,
            xerr=half,
            fmt="o",
            ms=3,
            lw=0.8,
            label=f"{NAMES[dataset]}, {base}",
        )
    axis.axvline(0, color="0.4", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel=f"{metric}, difference to the base loss alone (points)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)
    figure.tight_layout()
    return figure


def plot_sweep(rows: Rows, faithful: Settings, metric: str = "MAP@R") -> Figure:
    """A panel for each setting of the faithful method."""
    settings: dict[str, list[tuple[Any, str]]] = {}
    for method in methods(rows):
        if method.count("=") == 1:
            name, value = method.split("=")
            settings.setdefault(name, []).append((float("inf") if value == "None" else float(value), method))
    for name, of_name in settings.items():
        usual = getattr(faithful, name)
        of_name.append((float("inf") if usual is None else float(usual), "faithful"))
        of_name.sort()
    columns = 3
    figure, axes = plt.subplots(
        -(-len(settings) // columns), columns, figsize=(11, 2.6 * -(-len(settings) // columns))
    )
    for axis, (name, of_name) in zip(axes.flat, settings.items(), strict=False):
        for number, (dataset, base) in enumerate(cells(rows)):
            points = [interval(differences(rows, dataset, base, method, metric)) for _, method in of_name]
            mean, half = np.array(points).T
            x = np.arange(len(points)) + 0.06 * (number - 1.5)
            axis.errorbar(x, mean, yerr=half, fmt="o-", ms=3, lw=0.9, label=f"{NAMES[dataset]}, {base}")
        axis.axhline(0, color="0.4", lw=1)
        axis.set_xticks(range(len(of_name)), ["none" if v == float("inf") else f"{v:g}" for v, _ in of_name])
        axis.set_title(name, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.flat)[len(settings) :]:
        axis.set_visible(False)
    axes.flat[0].set_ylabel(f"{metric}, difference")
    axes.flat[0].legend(fontsize=6)
    figure.tight_layout()
    return figure


def of_study(study: str, rows: Rows) -> Iterator[tuple[str, str]]:
    """Titles and tables of a study."""
    if study == "base":
        yield "MAP@R of the base losses alone, among validation classes, by learning rate", rates_table(rows)
    elif study in ("sweep", "candidates", "combinations", "finalists"):
        yield "Difference to the base loss alone, among validation classes", tuning_table(rows)
    elif rows:
        for metric in ("R@1", "MAP@R", "superclass R@1", "superclass P@20", "H-AP"):
            yield f"{metric} among test classes", test_table(rows, metric)
        yield "Dendrogram purity of trees over the test classes", purity_table(rows)
        yield "In training", training_table(rows)
        groups = (("R@1", "MAP@R"), ("superclass P@20", "H-AP"))
        yield (
            "In short",
            "\n".join(f"- {summary(rows, name, group)}" for name in methods(rows) for group in groups),
        )


def figures(studies: dict[str, Rows], faithful: Settings) -> Iterator[tuple[str, Figure]]:
    """Names and plots of the studies that have runs."""
    if studies["sweep"]:
        yield "sweep", plot_sweep(studies["sweep"], faithful)
    if studies["candidates"]:
        yield "candidates", plot_candidates(studies["candidates"])
    if studies["test"]:
        yield "test", plot_test(studies["test"])
