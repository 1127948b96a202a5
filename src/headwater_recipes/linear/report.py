"""After training: R² and β beside the closed form, the picture of β."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from headwater_recipes.common.pictures import new_figure
from headwater_recipes.common.stages import clock, say
from headwater_recipes.common.task import Ended
from headwater_recipes.linear import model
from headwater_recipes.tables.table import Array, Numbers

if TYPE_CHECKING:
    from headwater_recipes.linear.task import Linear

_NAMED = 25
"""Columns whose names fit into the picture."""


def figures(task: Linear, ended: Ended) -> dict[str, Any]:
    """For ``report.json``; draws ``beta.png``. ``mse`` is in the square of y's own unit; the largest difference of β
    from the closed form's in standard deviations of y for one of the column.
    """
    training, held = task.split.training, task.split.held_out
    found = task.read(task.folder)
    ols, constant, errors = model.closed_form(training)
    with torch.no_grad():
        ours = found.predict(torch.from_numpy(held.x)).numpy()
    variance = float(training.y.std()) ** 2
    beside = {"closed_form": held.x @ ols + constant, "mean": np.full_like(held.y, training.y.mean())}
    draw(task.folder, training, found.beta, ols, errors)
    return {
        "r2": r2(held.y, ours),
        "mse": mse(held.y, ours),
        "validation_loss": ended.metrics["loss"],
        "held_out_rows": len(held.y),
        "baseline": {
            name: {"r2": r2(held.y, said), "mse": mse(held.y, said), "loss": mse(held.y, said) / variance}
            for name, said in beside.items()
        },
        "beta": _named(training, found.beta),
        "beta_closed_form": _named(training, ols),
        "beta_standard_error": _named(training, errors),
        "beta_true": None if training.truth is None else _named(training, training.truth),
        "largest_beta_difference": float((np.abs(found.beta - ols) * training.x.std(0)).max() / training.y.std()),
        "pictures": ["beta.png"],
    }


def r2(y: Array, said: Array) -> float:
    """The share of the variance of y (N,) that is explained: 1 − Σ(y − said)² / Σ(y − mean)²."""
    return float(1 - ((y - said) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def mse(y: Array, said: Array) -> float:
    """The mean squared error."""
    return float(((y - said) ** 2).mean())


def _named(table: Numbers, values: Array) -> dict[str, float]:
    return {name: float(value) for name, value in zip(table.names, values, strict=True)}


def tell(folder: Path, found: Mapping[str, Any], console: Console) -> None:
    """Show the figures."""
    closed, plain = found["baseline"]["closed_form"], found["baseline"]["mean"]
    say(
        console,
        f"trained {found['step']} steps in {clock(found['training_seconds'])}; "
        f"on {found['held_out_rows']:,} held-out rows:",
    )
    for name, value, beside in (
        ("trained", found, ""),
        ("closed form", closed, "   (least squares, solved at once)"),
        ("mean", plain, "   (the baseline: the mean of y)"),
    ):
        say(console, f"  {name:<12} R² {value['r2']:.4f}   mean squared error {value['mse']:.4g}{beside}")
    far = found["largest_beta_difference"]
    say(console, f"  largest difference of β from the closed form's: {far:.1e} (columns and y in standard deviations)")
    say(console, f"serve it: headwater serve --model {folder}", whole=True)
    say(console, f"{folder}: model.safetensors, beta.png, metrics.jsonl, loss.png, report.json", whole=True)


def draw(folder: Path, table: Numbers, beta: Array, ols: Array, errors: Array) -> None:
    """``beta.png``: each coefficient, times its column's standard deviation, beside the true one or the closed form's.

    Times the deviation, as coefficients of columns in different units are not alike.
    """
    scale = table.x.std(0)
    against, label = (ols, "closed form") if table.truth is None else (table.truth, "true β")
    figure = new_figure(6, 6)
    axes = figure.add_subplot()
    x, y = against * scale, beta * scale
    spread = 2 * errors * scale  # what chance alone gives: twice the closed form's standard error to both sides
    low, high = float(min(x.min(), (y - spread).min())), float(max(x.max(), (y + spread).max()))
    margin = 0.08 * (high - low) or 1.0
    axes.axline((low, low), (high + margin, high + margin), color="#888888", lw=1, ls="--")
    axes.errorbar(x, y, yerr=spread, fmt="o", color="#4878a8", ecolor="#a8c0d8", ms=5, capsize=2)
    if len(x) <= _NAMED:
        for place, i in enumerate(np.argsort(x)):  # neighbours on different sides
            offset = (6, -10) if place % 2 else (-6, 5)
            side = "left" if place % 2 else "right"
            axes.annotate(table.names[i], (x[i], y[i]), offset, textcoords="offset points", fontsize=8, ha=side)
    axes.set(
        xlabel=f"{label} × standard deviation of its column",
        ylabel="trained β × standard deviation of its column",
        title=f"{folder.name}: β of {table.target}",
        xlim=(low - margin, high + margin),
        ylim=(low - margin, high + margin),
    )
    axes.grid(alpha=0.25)
    figure.savefig(folder / "beta.png", dpi=120)
