"""The plots of the results page; the same numbers give the same files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "torch_mics"
from matplotlib import pyplot as plt  # noqa: E402

OURS, THEIRS = "#3b6ea5", "#b0b0b0"
Curve = Mapping[float, float]


def bars(
    title: str, names: Sequence[str], columns: Mapping[str, Sequence[float]], file: Path
) -> None:
    """Draws one bar per contestant, from the top, in each of the columns."""
    names = names[::-1]
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    size = (4.5 * len(columns), 0.45 * len(names) + 1.2)
    figure, axes = plt.subplots(1, len(columns), figsize=size, sharey=True, squeeze=False)
    for axis, (label, values) in zip(axes[0], columns.items(), strict=True):
        axis.barh(names, values[::-1], color=colours)
        axis.set_xlabel(label)
    figure.suptitle(title)
    _save(figure, file)


def curves(
    found: Mapping[str, Curve],
    file: Path,
    *,
    x: str,
    y: str,
    predicted: Mapping[str, Curve] | None = None,
    **limits: Any,
) -> None:
    """Draws measured points joined by lines, and predictions of the same name dashed in their colour."""
    figure, axes = plt.subplots(figsize=(6, 3.8))
    for label, points in found.items():
        (line,) = axes.plot(list(points), list(points.values()), "o-", label=label)
        other = (predicted or {}).get(label)
        if other:
            axes.plot(list(other), list(other.values()), "--", color=line.get_color())
    if predicted:
        axes.plot([], [], "--", color="black", label="predicted")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_xscale("log", base=2)
    ticks = sorted({point for points in found.values() for point in points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(**limits)
    axes.legend()
    _save(figure, file)


def losses(found: Mapping[str, Sequence[float]], reference: Sequence[float], file: Path) -> None:
    """Draws loss curves over that of one process, and below them their distances from it."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 4.6), sharex=True)
    steps = range(1, len(reference) + 1)
    above.plot(steps, reference, "k-", linewidth=5, alpha=0.25, label="one process")
    for name, values in found.items():
        above.plot(steps, values, label=name, linewidth=1)
        far = [abs(a - b) for a, b in zip(values, reference, strict=True)]
        below.plot(steps, far, label=name, linewidth=1)
    above.set_ylabel("loss")
    above.legend(fontsize=6, ncols=2)
    below.set_ylabel("distance")
    below.set_yscale("symlog", linthresh=1e-7)
    below.set_xlabel("step")
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
