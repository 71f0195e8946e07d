"""Draws training and validation loss over steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["plot_losses"]


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Writes the plot to `path`.

    Returns:
        False where matplotlib is not installed; then nothing is written.
    """
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", "-"),
        ("validation_loss", "validation", "o--"),
    ):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
    return True
