"""Scaling curves as CSV, tables and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from torch_mics.planner._plan import Plan
from torch_mics.planner._report import (
    BUSY_TERMS,
    TIME_TERMS,
    new_figure,
    use_log_scale,
    variant_name,
)
from torch_mics.planner._scaling import SYSTEMS, Point, Scaling
from torch_mics.planner._tables import Table

_COLUMNS = (
    "scaling",
    "system",
    "gpus",
    "partition_size",
    "variant",
    "micro_batch",
    "micro_steps",
    "global_batch",
    "seconds_per_step",
    "samples_per_s",
    "tflops_per_gpu",
    "efficiency",
    "fits",
    "peak_nbytes",
    "is_extrapolated",
)
_TERMS = tuple(name for name, _ in (*TIME_TERMS, *BUSY_TERMS))


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Writes a row for each point; the terms of the time are in seconds of a step."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*_COLUMNS, *(f"{name}_seconds" for name in _TERMS)))
        for point in points:
            settings, time = point.settings, point.time
            row = (
                point.scaling,
                point.system,
                point.gpus,
                settings.partition_size,
                variant_name(settings.gather),
                settings.micro_batch,
                settings.num_microsteps,
                point.samples,
                f"{time.total:.6g}",
                f"{point.samples_per_s:.6g}",
                f"{point.tflops:.6g}",
                f"{point.efficiency:.6g}",
                int(point.fits),
                f"{point.memory.peak:.0f}",
                int(time.is_extrapolated),
            )
            writer.writerow((*row, *(f"{getattr(time, name):.6g}" for name in _TERMS)))


def scaling_table(plan: Plan, scaling: Scaling, points: Sequence[Point]) -> Table:
    """Gives TFLOP/s per GPU and efficiency of each system by the number of GPUs."""
    mine = {(p.system, p.gpus): p for p in points if p.scaling == scaling}
    rows = []
    for gpus in sorted({gpus for _, gpus in mine}):
        cells = []
        for system in SYSTEMS:
            point = mine.get((system, gpus))
            cells.append(_cell(point) if point else "-")
        rows.append((str(gpus), *cells))
    batch = (
        f"{plan.best.settings.micro_batch} x {plan.best.settings.num_microsteps} samples per GPU"
        if scaling == "weak"
        else f"{plan.global_batch} samples"
    )
    title = (
        f"{scaling} scaling, {batch} a step: TFLOP/s per GPU and efficiency "
        "(!: does not fit, ~: extrapolated from measurements)"
    )
    return Table(title, ("GPUs", *SYSTEMS), rows)


def _cell(point: Point) -> str:
    mark = "" if point.fits else " !"
    if point.time.is_extrapolated:
        mark += " ~"
    return f"{point.tflops:.1f} {100 * point.efficiency:.1f}%{mark}"


def plot_scaling(plan: Plan, points: Sequence[Point], path: Path) -> None:
    """Draws samples per second of both scalings over GPUs, and TFLOP/s per GPU.

    Points that do not fit into memory are hollow. The suffix of `path` chooses the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 8)
    scalings = list(dict.fromkeys(p.scaling for p in points))
    grid = figure.subplots(2, len(scalings), squeeze=False, sharex=True)
    settings = plan.best.settings
    figure.suptitle(
        f"{plan.workload.numel / 1e9:.1f}B parameters on {plan.calibration.instance}, "
        f"p = {settings.partition_size}, {variant_name(settings.gather)}"
    )
    for column, scaling in enumerate(scalings):
        speed, rate = grid[0][column], grid[1][column]
        for order, system in enumerate(SYSTEMS):
            mine = [p for p in points if (p.scaling, p.system) == (scaling, system)]
            if not mine:
                continue
            gpus = [p.gpus for p in mine]
            missed = [i for i, p in enumerate(mine) if not p.fits]
            for axes, values in (
                (speed, [p.samples_per_s for p in mine]),
                (rate, [p.tflops for p in mine]),
            ):
                (line,) = axes.plot(
                    gpus, values, "o-", label=system, markersize=4, zorder=9 - order
                )
                hollow = {"markerfacecolor": "white", "color": line.get_color(), "zorder": 9}
                axes.plot([gpus[i] for i in missed], [values[i] for i in missed], "o", **hollow)
        speed.set_title(f"{scaling} scaling")
        use_log_scale(speed)
        speed.set_ylabel("samples per second")
        rate.set_ylim(bottom=0)
        rate.set_ylabel("TFLOP/s per GPU")
        rate.set_xlabel("GPUs (hollow: does not fit into memory)")
        for axes in (speed, rate):
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
            axes.legend()
    figure.savefig(path)
