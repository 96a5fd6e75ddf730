"""What every benchmark does with its figures: a table on the screen, JSON and a plot in files."""

import json
import platform
from pathlib import Path
from typing import Any

import geoopt
import matplotlib
import numpy as np
import pytorch_metric_learning
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import hierloss

matplotlib.use("Agg")


def environment(device: torch.device) -> dict[str, Any]:
    """Device and versions, as they go into every JSON file."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch-metric-learning": pytorch_metric_learning.__version__,
        "geoopt": geoopt.__version__,
        "hierloss": hierloss.__version__,
    }


IMAGES = Path(__file__).parents[1] / "docs" / "images"
RESULTS = Path(__file__).parent / "results"


def write(
    name: str, device: torch.device, rows: list[dict[str, Any]], figure: Figure | None, folder: Path | None
) -> None:
    """Write ``name.json`` and ``name.png`` into the folder, by default where the documentation has them."""
    files = [(folder or RESULTS) / f"{name}.json"]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1) + "\n")
    if figure is not None:
        files.append((folder or IMAGES) / f"{name}.png")
        figure.savefig(files[1], dpi=110, bbox_inches="tight")
    for file in files:
        Console(stderr=True).print(f"wrote {file}", highlight=False)


def bars(rows: list[dict[str, Any]], name: str, value: str) -> Figure:
    """A horizontal bar for each row, with its smallest and largest value."""
    unit = value.split()[-1]
    figure, ax = plt.subplots(figsize=(7, 0.8 + 0.35 * len(rows)), layout="constrained")
    middle, least, most = (
        np.array([row[key] for row in rows]) for key in (value, f"least {unit}", f"most {unit}")
    )
    errors = middle - least, most - middle
    ax.barh([row[name] for row in rows], middle, xerr=errors, color="#332288", ecolor="#777777")
    ax.axvline(0, color="#777777", lw=0.8)
    ax.set(xlabel=value)
    ax.invert_yaxis()
    return figure


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, one column for each key."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=140).print(table)


def _text(value: Any) -> str:
    if isinstance(value, float):
        exact = f"{value:g}"
        return exact if len(exact) <= 7 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return str(value)
