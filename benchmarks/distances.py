"""Error of distances and of their gradients in low precision, over the ball: ours, geoopt's, the Möbius form."""

import statistics
from collections.abc import Callable
from typing import Any

import geoopt
import mpmath
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks.speed import side_by_side, summary
from hierloss import poincare

RADII = (0.0, 0.3, 0.9, 0.99, 0.999, 0.9999, 0.99999)
SEPARATIONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.9, 1.9)
"""In units of the radius of the ball; 1.9 stands for opposite points, the diameter of their circle apart."""
DIM, POINTS = 16, 12


def moebius(x: Tensor, y: Tensor) -> Tensor:
    xy, x2, y2 = -(x * y).sum(-1, keepdim=True), (x * x).sum(-1, keepdim=True), (y * y).sum(-1, keepdim=True)
    added = (-(1 + 2 * xy + y2) * x + (1 - x2) * y) / (1 + 2 * xy + x2 * y2)
    return 2 * torch.atanh(added.norm(dim=-1))


def geoopt_distance(x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = geoopt.PoincareBall(c=torch.ones((), dtype=x.dtype)).dist(x, y)
    return result


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "distance": lambda x, y: poincare.distance(x, y, 1.0),
    "pairwise": lambda x, y: poincare.pairwise_distance(x, y, 1.0).diagonal(),
    "geoopt": geoopt_distance,
    "Möbius": moebius,
}


def sample(radius: float, separation: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs with one point at the radius and the other at this Euclidean distance, as stored in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    x, step = (torch.randn(POINTS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    x, step = x / x.norm(dim=1, keepdim=True), step / step.norm(dim=1, keepdim=True)
    x = x * radius
    y = x + step * separation if separation < 1 else -x
    y = y * (max(radius, 0.9) / y.norm(dim=1, keepdim=True)).clamp_max(1)
    x, y = x.to(dtype), y.to(dtype)
    inside = torch.maximum(x.double().norm(dim=1), y.double().norm(dim=1)) <= 1 - poincare.boundary_eps(dtype)
    inside &= (x != y).any(1)
    return x[inside], y[inside]


def exact(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Distances and gradients with respect to ``x`` of the points as stored, in 50 digits."""
    values, gradients = [], []
    with mpmath.workdps(50):
        for row_x, row_y in zip(x.double().tolist(), y.double().tolist(), strict=True):
            p, q = [mpmath.mpf(t) for t in row_x], [mpmath.mpf(t) for t in row_y]
            gap2 = mpmath.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True))
            at_p, at_q = 1 - mpmath.fsum(a * a for a in p), 1 - mpmath.fsum(b * b for b in q)
            ratio2 = gap2 / (at_p * at_q)
            values.append(float(2 * mpmath.asinh(mpmath.sqrt(ratio2))))
            # d = 2 arsinh(sqrt(u)), u = |p-q|^2 / (at_p at_q)
            outer = 1 / mpmath.sqrt(ratio2 * (1 + ratio2))
            gradients.append(
                [
                    float(outer * (2 * (a - b) / (at_p * at_q) + 2 * a * ratio2 / at_p))
                    for a, b in zip(p, q, strict=True)
                ]
            )
    return np.array(values), np.array(gradients)


def errors(dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row for each radius and separation: the largest relative error of each form, value and gradient."""
    rows = []
    for radius in tqdm(RADII, unit="radius", desc=str(dtype)):
        for separation in SEPARATIONS:
            x, y = sample(radius, separation, dtype)
            if not len(x):  # the dtype cannot tell such points from each other, or from the boundary
                continue
            values, gradients = exact(x, y)
            row: dict[str, Any] = {"dtype": str(dtype)[6:], "radius": radius, "separation": separation}
            for name, form in FORMS.items():
                own = x.clone().requires_grad_()
                d = form(own, y)
                (grad,) = torch.autograd.grad(d.sum(), own)
                row[name] = _largest(np.abs(d.detach().double().numpy() / values - 1))
                scale = np.linalg.norm(gradients, axis=1)
                row[f"{name} grad"] = _largest(np.linalg.norm(grad.double().numpy() - gradients, axis=1) / scale)
            rows.append(row)
    return rows


def _largest(relative: np.ndarray) -> float:
    """The largest error; what is not finite counts as infinite."""
    return float(np.where(np.isfinite(relative), relative, np.inf).max())


def plot(rows: list[dict[str, Any]], dtype: str = "float32") -> Figure:
    shown = ("pairwise", "geoopt", "Möbius")
    figure, all_axes = plt.subplots(2, len(shown), figsize=(12, 6), sharex=True, sharey=True, layout="constrained")
    own = [row for row in rows if row["dtype"] == dtype]
    for axes, suffix in zip(all_axes, ("", " grad"), strict=True):
        for ax, name in zip(axes, shown, strict=True):
            cells = np.full((len(RADII), len(SEPARATIONS)), np.nan)
            for row in own:
                error = np.log10(np.clip(row[name + suffix], 1e-9, 1e3))
                cells[RADII.index(row["radius"]), SEPARATIONS.index(row["separation"])] = error
            image = ax.imshow(cells, vmin=-8, vmax=1, cmap="cividis", origin="lower", aspect="auto")
            ax.set_title(f"{'hierloss, pairwise' if name == 'pairwise' else name}{', gradient' if suffix else ''}")
            ax.set_xticks(range(len(SEPARATIONS)), [f"{s:g}" for s in SEPARATIONS], rotation=45)
            ax.set_yticks(range(len(RADII)), [f"{r:g}" for r in RADII])
        axes[0].set_ylabel("radius")
    for ax in all_axes[1]:
        ax.set_xlabel("Euclidean separation")
    figure.colorbar(image, ax=all_axes, label="log10 of the largest relative error")
    return figure


def worst(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst cell of each form, for every dtype: of near pairs, near the boundary, and of all."""
    parts: dict[str, Callable[[dict[str, Any]], bool]] = {
        "near pairs, 1e-6 to 1e-4 apart": lambda row: row["separation"] <= 1e-4,
        "at 0.9999 of the radius and beyond": lambda row: row["radius"] >= 0.9999,
        "all": lambda row: True,
    }
    columns = [name + suffix for name in ("pairwise", "geoopt", "Möbius") for suffix in ("", " grad")]
    return [
        {"dtype": dtype, "cells": part, "n": len(own)} | {c: max(row[c] for row in own) for c in columns}
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
        for part, chosen in parts.items()
        if (own := [row for row in rows if row["dtype"] == dtype and chosen(row)])
    ]


def speed(device: str, repeats: int) -> list[dict[str, Any]]:
    """Forward and backward of all pairs of 692 x 512 points in 128 dimensions, beside Euclidean torch.cdist."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        (torch.randn(n, 128, generator=generator) * 0.03).to(device).requires_grad_() for n in (692, 512)
    )  # well inside the unit ball
    forms: dict[str, Callable[[], Tensor]] = {
        "hierloss, pairwise_distance": lambda: poincare.pairwise_distance(x, y, 1.0),
        "Euclidean torch.cdist, matrix product": lambda: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"),
        "Euclidean torch.cdist, differences": lambda: torch.cdist(
            x, y, compute_mode="donot_use_mm_for_euclid_dist"
        ),
        "geoopt, all pairs by broadcasting": lambda: geoopt_distance(x.unsqueeze(1), y.unsqueeze(0)),
    }

    def step(form: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            total = form().sum()
            total.backward()
            return total.detach()

        return run

    times = side_by_side({name: step(form) for name, form in forms.items()}, device, repeats)
    own = statistics.median(times["hierloss, pairwise_distance"])
    return [
        {
            "distance": name,
            **summary(seconds),
            "times hierloss": statistics.median(seconds) / own,
        }
        for name, seconds in times.items()
    ]
