"""What the studies of trained encoders share: their program, their table, and their curves over training."""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import study
from .report import IMAGES, Difference, Row, differences
from .training import SCORES

__all__ = ["METHODS", "make_parser", "perform", "table", "write"]

STUDIES = {"clinc150": "text", "cub": "images"}
UNITS = {"clinc150": "steps", "cub": "epochs"}  # what the points of a curve count
METHODS = {"none": "#777777", "ratio 0.3": "#CC6677", "ratio 0.3, frozen": "#332288"}
"""And their colours. Frozen: neighbours among the embeddings of the encoder that the training starts from."""


def make_parser(study_name: str, doc: str | None, length: int, data: str) -> argparse.ArgumentParser:
    """Options of both studies."""
    prog, layout = f"python -m benchmarks.evidence.{study_name}", argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=layout)
    parser.add_argument("--data", type=Path, help=f"{data}; without it, only the report")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--length", type=int, default=length, help=f"of the training (default: {length})")
    parser.add_argument("--folder", type=Path, default=study.FOLDER, help="where the runs are kept")
    parser.add_argument("--images", type=Path, default=IMAGES, help="where the picture goes")
    return parser


Run = Callable[[str, str, int], dict[str, Any]]  # from base loss, method and seed to the curve


def perform(
    args: argparse.Namespace, dataset: str, losses: Iterable[str], methods: Iterable[str], run: Run
) -> None:
    """Do the runs that the file does not have yet, seed by seed, so that an unfinished study is balanced."""
    name = STUDIES[dataset]
    for seed, loss, method in itertools.product(range(args.seeds), losses, methods):
        row = {"dataset": dataset, "loss": loss, "method": method, "seed": seed, UNITS[dataset]: args.length}
        if any(row.items() <= done.items() for done in study.read(name, args.folder)):
            continue
        began = sum(os.times()[:4])
        row["curve"] = run(loss, method, seed)
        row["seconds"] = round(sum(os.times()[:4]) - began, 1)  # of processor time, with that of child processes
        args.folder.mkdir(parents=True, exist_ok=True)
        with (args.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def at_point(rows: list[Row], point: str) -> tuple[dict[str, float], dict[str, list[Difference]]]:
    """Mean scores of the base loss alone, and differences to it by method; over seeds that all methods have."""
    own = [row for row in rows if point in row["curve"]]
    methods = dict.fromkeys(row["method"] for row in own)
    seeds = set.intersection(*({row["seed"] for row in own if row["method"] == method} for method in methods))
    own = [row for row in own if row["seed"] in seeds]
    found = differences(own, "test", lambda row: row["curve"][point])
    alone = [row["curve"][point]["test"] for row in own if row["method"] == "none"]
    means = {score: float(np.mean([values[score] for values in alone])) for score in SCORES}
    return means, {m: [d for key, d in found.items() if key[2] == m] for m in methods}


def curves_of(rows: list[Row]) -> dict[tuple[str, str], dict[str, Any]]:
    """By data set and base loss: what ``at_point`` says of each point of training."""
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["dataset"], row["loss"]), []).append(row)
    return {
        cell: {p: at_point(own, p) for p in sorted(set().union(*(row["curve"] for row in own)), key=int)}
        for cell, own in cells.items()
    }


def table(rows: list[Row]) -> str:
    """Scores of the base losses alone, and the differences of the methods to them."""
    head = ["data, base loss", "after", "method", "seeds", *SCORES]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for (dataset, loss), points in curves_of(rows).items():
        for point, (alone, gains) in points.items():
            for method, by_score in gains.items():
                if method != "none" and point == "0":
                    continue  # before training, all methods are the same
                values = map(str, by_score) if method != "none" else (f"{mean:.1f}" for mean in alone.values())
                start = [f"{dataset}, {loss}", f"{point} {UNITS[dataset]}", method, str(by_score[0].seeds)]
                lines.append(f"| {' | '.join([*start, *values])} |")
    return "\n".join(lines)


def figure(rows: list[Row]) -> Figure:
    """Mean scores over training; bars are the interval of the paired difference to the base loss alone."""
    cells = curves_of(rows)
    picture = Figure(figsize=(11, 2.4 * len(cells)), layout="constrained")
    axes = picture.subplots(len(cells), len(SCORES), squeeze=False)
    for line, ((dataset, loss), points) in zip(axes, cells.items(), strict=True):
        for column, (score, ax) in enumerate(zip(SCORES, line, strict=True)):
            for shift, (method, color) in enumerate(METHODS.items()):
                shown = {
                    int(p): (alone[score], g[method][column]) for p, (alone, g) in points.items() if method in g
                }
                where = [point + 0.008 * shift * max(shown) for point in shown]
                # Intervals of two seeds are wider than the picture.
                bars = [d.half_width if d.seeds > 2 and method != "none" else 0.0 for _, d in shown.values()]
                means = [alone + difference.mean for alone, difference in shown.values()]
                ax.errorbar(where, means, bars, color=color, lw=1.5, capsize=2, marker="o", ms=3, label=method)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel(UNITS[dataset], fontsize=8)
            ax.set_title(f"{score}, %", fontsize=9)
        seeds = {d.seeds for _, gains in points.values() for by_score in gains.values() for d in by_score}
        line[0].set_ylabel(f"{dataset}, {loss}\n{' or '.join(map(str, sorted(seeds)))} seeds", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    return picture


def write(folder: Path, images: Path) -> None:
    """Print the table and draw the picture."""
    rows = [row for name in STUDIES.values() for row in study.read(name, folder)]
    if rows:
        print(table(rows))
        images.mkdir(parents=True, exist_ok=True)
        figure(rows).savefig(images / "end-to-end.png", dpi=110)
