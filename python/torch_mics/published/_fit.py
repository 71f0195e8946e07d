"""Fits the few constants of a calibration to a few published runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch_mics.planner._calibration import Calibration
from torch_mics.planner._extras import extra
from torch_mics.published._runs import Run, predict_run, published_runs

# A hop over nodes starts in three quarters of the time of a flat collective. Not among the fitted
# numbers, and not known from elsewhere: chosen with the hierarchical runs in sight (docs/accuracy.md).
RAIL_LAUNCH_SHARE = 0.75

# Far below the digits that are printed, so that these are the same on every machine.
_TOLERANCES = {"xtol": 1e-12, "ftol": 1e-12, "gtol": 1e-12}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What is fitted on an instance type, from which start, and on which runs."""

    instance: str
    start: dict[str, float]
    points: tuple[tuple[str, str, int], ...]  # model, system, gpus

    def is_point(self, run: Run) -> bool:
        """Whether the fit sees this run."""
        # Figure 12 repeats a run of figure 7a with other partition sizes.
        key = (run.model, run.system, run.gpus)
        return run.instance == self.instance and key in self.points and run.figure != "12"


FITS = (
    Fit(
        instance="p3dn.24xlarge",
        start={
            "efficiency": 0.45,
            "launch": 7e-3,
            "inter_latency": 500e-6,
            "inter_bandwidth": 8e9,
        },
        points=(
            ("bert_10b", "mics", 16),
            ("bert_10b", "mics_as_zero3", 16),
            ("bert_10b", "mics_as_zero3", 32),
            ("bert_10b", "mics_as_zero3", 64),
            ("bert_10b", "mics_as_zero3", 128),
            ("bert_50b", "mics", 64),
        ),
    ),
    Fit(
        instance="p4d.24xlarge",
        start={
            "efficiency": 0.45,
            "efficiency_wide": 0.5,
            "launch": 4.5e-3,
            "inter_latency": 400e-6,
            "inter_bandwidth": 45e9,
        },
        points=(
            ("bert_15b", "mics", 16),
            ("bert_15b", "deepspeed_zero3", 16),
            ("bert_15b", "deepspeed_zero3", 64),
            ("bert_20b", "mics", 16),
            ("bert_20b", "deepspeed_zero3", 16),
        ),
    ),
)


def with_numbers(calibration: Calibration, fit: Fit, numbers: dict[str, float]) -> Calibration:
    """Puts fitted numbers, and those that follow from them, into a calibration."""
    follow = {"rail_launch": RAIL_LAUNCH_SHARE * numbers["launch"]}
    if "efficiency_wide" not in fit.start:
        follow["efficiency_wide"] = numbers["efficiency"]
    return calibration.replace(**numbers, **follow)


def fit_calibration(calibration: Calibration, fit: Fit) -> Calibration:
    """Fits by least squares of the relative errors of the time; other numbers stay as they are.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    with extra("fits need scipy"):
        from scipy.optimize import least_squares

    runs = [run for run in published_runs() if fit.is_point(run)]

    def place(scaled: Sequence[float]) -> Calibration:
        numbers = {n: float(x) * fit.start[n] for n, x in zip(fit.start, scaled, strict=True)}
        return with_numbers(calibration, fit, numbers)

    def errors(scaled: Sequence[float]) -> list[float]:
        tried = place(scaled)
        return [predict_run(run, tried) / run.seconds - 1 for run in runs]

    most = [1 / x if n.startswith("efficiency") else math.inf for n, x in fit.start.items()]
    found = least_squares(errors, [1.0] * len(most), bounds=(1e-9, most), **_TOLERANCES)
    return place(found.x)
