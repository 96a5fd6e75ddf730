"""What the studies of trained encoders share: their program, their table, and their curves over training."""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from . import study
from .report import CELL, IMAGES, Row, differences, gains, markdown, scores
from .training import SCORES

STUDIES = {"clinc150": "text", "cub": "images"}
UNITS = {"clinc150": "steps", "cub": "epochs"}  # what the points of a curve count
COLORS = ["#777777", "#CC6677", "#332288", "#117733", "#DDAA33", "#882255"]


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


def length(row: Row) -> int:
    """Epochs or steps of a run."""
    return int(row[UNITS[row["dataset"]]])


def paired_scores(rows: list[Row]) -> pd.DataFrame:
    """Scores at each point of training, of the seeds that all methods of a cell have; each length is a cell."""
    rows = [row | {"loss": f"{row['loss']}, {length(row)} {UNITS[row['dataset']]}"} for row in rows]
    points = sorted({int(point) for row in rows for point in row["curve"]})
    found = scores(rows, "test", {point: lambda row, p=str(point): row["curve"].get(p) for point in points})
    cells = [own.unstack("method").dropna().stack("method") for _, own in found.groupby(CELL, sort=False)]
    return pd.concat(cells)[list(SCORES)].reorder_levels(found.index.names)


def table(found: pd.DataFrame) -> str:
    """Scores of the base losses alone, and the differences of the methods to them."""
    cells = ["length", *CELL]
    alone = found.xs("none", level="method")
    lines = []
    means, halves = differences(gains(found))
    for (length, dataset, loss), own in alone.groupby(cells, sort=False):
        start = [f"{dataset}, {loss}", f"{length} {UNITS[dataset]}"]
        lines.append([*start, "none", str(len(own)), *(f"{mean:.1f}" for mean in own.mean())])
        # Before training, all methods are the same. A cell may have no method but "none" so far.
        if length and (length, dataset, loss) in means.index.droplevel("method"):
            mean, half = (frame.xs((length, dataset, loss), level=cells) for frame in (means, halves))
            for method in mean.index:
                values = [f"{m:+.1f} ± {h:.1f}" for m, h in zip(mean.loc[method], half.loc[method], strict=True)]
                lines.append([*start, method, str(len(own)), *values])
    return markdown(["data, base loss", "after", "method", "seeds", *SCORES], lines)


def figure(found: pd.DataFrame) -> Figure:
    """Mean scores over training; bars are the interval of the paired difference to the base loss alone."""
    cells = [*found.groupby(CELL, sort=False)]
    colors = dict(zip(found.index.unique("method"), itertools.cycle(COLORS), strict=False))
    _, halves = differences(gains(found))
    picture = Figure(figsize=(11, 2.4 * len(cells)), layout="constrained")
    axes = picture.subplots(len(cells), len(SCORES), squeeze=False)
    for line, ((dataset, loss), own) in zip(axes, cells, strict=True):
        seeds = own.index.unique("seed")
        own = own.groupby(["method", "length"]).mean()
        for shift, method in enumerate(own.index.unique("method")):
            shown = own.loc[method]
            where = shown.index + 0.008 * shift * shown.index.max()
            for score, ax in zip(SCORES, line, strict=True):
                bars = None
                if method != "none" and len(seeds) > 2:  # intervals of two seeds are wider than the picture
                    bars = halves.xs((dataset, loss, method), level=[*CELL, "method"])[score].reindex(shown.index)
                style = {"color": colors[method], "lw": 1.5, "capsize": 2, "marker": "o", "ms": 3, "label": method}
                ax.errorbar(where, shown[score], bars, **style)
        for score, ax in zip(SCORES, line, strict=True):
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel(UNITS[dataset], fontsize=8)
            ax.set_title(f"{score}, %", fontsize=9)
        line[0].set_ylabel(f"{dataset}, {loss}\n{len(seeds)} seeds", fontsize=8)
        line[0].legend(fontsize=7, frameon=False)
    return picture


def write(folder: Path, images: Path) -> None:
    """Print the table, and draw the picture of the longest trainings."""
    rows = [row for name in STUDIES.values() for row in study.read(name, folder)]
    if rows:
        print(table(paired_scores(rows)))
        longest = pd.Series([length(row) for row in rows]).groupby([row["dataset"] for row in rows]).max()
        shown = [row for row in rows if length(row) == longest[row["dataset"]]]
        images.mkdir(parents=True, exist_ok=True)
        figure(paired_scores(shown)).savefig(images / "end-to-end.png", dpi=110)
