"""The two figures of the post that announced MiCS: predicted lines, published points.

One is strong scaling of BERT on p3dn against DeepSpeed 0.5.6, the other weak scaling of a model of 100B
parameters on p4d, and the 175B model on p4de beside it. What the models do not reproduce shows as a line
that misses its points (docs/accuracy.md).
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch_mics import _C
from torch_mics.planner._calibration import Calibration, load_calibration
from torch_mics.planner._report import new_figure, use_log_scale
from torch_mics.published._runs import (
    FLAT,
    HIERARCHICAL,
    predict_run,
    predict_step,
    published,
    published_runs,
)

_NAMES = {
    "mics": "MiCS",
    "deepspeed_zero3": "DeepSpeed ZeRO-3",
    "deepspeed_zero2": "DeepSpeed ZeRO-2",
}
_STRONG_FIGURES = ("7a", "7b", "7c", "7d")
_WEAK_GPUS = (128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One point of a figure; None where there is no such number."""

    panel: str
    system: str
    gpus: int
    predicted: float
    published: float | None


def strong_scaling() -> list[Sample]:
    """Gives samples per second of BERT on p3dn."""
    p3dn = load_calibration("p3dn")
    return [
        Sample(
            panel=run.model,
            system=_NAMES[run.system],
            gpus=run.gpus,
            predicted=run.micro_batch * run.gpus / predict_run(run, p3dn),
            published=run.samples_per_s,
        )
        for run in published_runs()
        if run.figure in _STRONG_FIGURES
    ]


def weak_scaling() -> list[Sample]:
    """Gives TFLOP/s per GPU of 100B on p4d and of 175B on p4de."""
    p4d, p4de = load_calibration("p4d"), load_calibration("p4de")
    stated = {
        (c["model"], c["system"], c["gpus"]): c["tflops"] for c in published()["case_studies"]
    }
    found = []
    for system in ("mics", "deepspeed_zero3"):
        for gpus in _WEAK_GPUS:
            rate = rate_of_100b(p4d, gpus, is_mics=system == "mics")
            key = ("mics_100b_assumed", system, gpus)
            found.append(Sample("100B on p4d", _NAMES[system], gpus, rate, stated.get(key)))
    key = ("gpt3_175b", "mics", 128)
    found.append(Sample("175B on p4de", _NAMES["mics"], 128, rate_of_175b(p4de), stated[key]))
    return found


def rate_of_100b(p4d: Calibration, gpus: int, *, is_mics: bool) -> float:
    """TFLOP/s per GPU of the paper's 100B model: MiCS with p = 128, or DeepSpeed's ZeRO-3."""
    settings = _C.StepSettings(
        world_size=gpus,
        partition_size=128 if is_mics else gpus,
        micro_batch=16,
        num_microsteps=4,
        recompute=True,
        gather=HIERARCHICAL if is_mics else FLAT,
        overlap=is_mics,
    )
    return predict_step("mics_100b_assumed", p4d, settings)[1]


def rate_of_175b(p4de: Calibration) -> float:
    """TFLOP/s per GPU of the post's 175B model on 16 nodes."""
    settings = _C.StepSettings(
        world_size=128,
        partition_size=128,
        micro_batch=2,
        num_microsteps=4,
        recompute=True,
        gather=HIERARCHICAL,
    )
    return predict_step("gpt3_175b", p4de, settings)[1]


def write_announcement(folder: Path) -> list[Path]:
    """Writes strong.png, weak.png and the points of both as announcement.csv; gives their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    strong, weak = strong_scaling(), weak_scaling()
    paths = [folder / name for name in ("strong.png", "weak.png", "announcement.csv")]
    _plot(strong, "samples per second", is_log=True, path=paths[0])
    _plot(weak, "TFLOP/s per GPU", is_log=False, path=paths[1])
    with paths[2].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("figure", "panel", "system", "gpus", "predicted", "published"))
        for name, samples in (("strong", strong), ("weak", weak)):
            for s in samples:
                stated = "" if s.published is None else s.published
                writer.writerow((name, s.panel, s.system, s.gpus, f"{s.predicted:.6g}", stated))
    return paths


def _plot(samples: Sequence[Sample], unit: str, *, is_log: bool, path: Path) -> None:
    panels = list(dict.fromkeys(s.panel for s in samples))
    figure = new_figure(4 * len(panels), 4)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=not is_log)
    for axes, panel in zip(grid[0], panels, strict=True):
        inside = [s for s in samples if s.panel == panel]
        for system in (name for name in _NAMES.values() if name in {s.system for s in inside}):
            mine = [s for s in inside if s.system == system]
            stated = [s for s in mine if s.published is not None]
            gpus = [s.gpus for s in mine]
            (line,) = axes.plot(gpus, [s.predicted for s in mine], ".-", label=f"{system}, model")
            axes.plot(
                [s.gpus for s in stated],
                [s.published for s in stated],
                "x",
                color=line.get_color(),
                label=f"{system}, published",
            )
        axes.set_xscale("log", base=2)
        ticks = sorted({s.gpus for s in inside})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel("GPUs")
        axes.set_ylabel(unit)
        if is_log:
            use_log_scale(axes)
        else:
            axes.set_ylim(0, 1.1 * max(max(s.predicted, s.published or 0) for s in samples))
        axes.set_title(panel)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc="lower right" if is_log else "best")
    figure.savefig(path)
