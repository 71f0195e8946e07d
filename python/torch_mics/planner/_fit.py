"""Fits the few constants of a calibration to a few published runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch_mics.planner._calibration import Calibration
from torch_mics.planner._published import Run, predict_run, published_runs

# A hop over nodes starts in three quarters of the time of a flat collective. Not among the fitted
# numbers, and not known from elsewhere: chosen with the hierarchical runs in sight (docs/accuracy.md).
RAIL_LAUNCH_SHARE = 0.75

_RUNS = 4  # restarts of the search from where it ended


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
    """Fits by least squares of the relative errors of the time; other numbers stay as they are."""
    runs = [run for run in published_runs() if fit.is_point(run)]
    names = list(fit.start)

    def place(scaled: Sequence[float]) -> Calibration:
        numbers = {n: max(x, 1e-9) * fit.start[n] for n, x in zip(names, scaled, strict=True)}
        for name in names:
            if name.startswith("efficiency"):
                numbers[name] = min(numbers[name], 1.0)
        return with_numbers(calibration, fit, numbers)

    def loss(scaled: Sequence[float]) -> float:
        tried = place(scaled)
        return sum((predict_run(run, tried) / run.seconds - 1) ** 2 for run in runs)

    best = [1.0] * len(names)
    for _ in range(_RUNS):
        best = minimize(loss, best)
    return place(best)


def minimize(
    loss: Callable[[Sequence[float]], float], start: Sequence[float], steps: int = 250
) -> list[float]:
    """Nelder and Mead's simplex search: reflect, expand, contract or shrink."""
    size = len(start)
    corners = [list(start)]
    corners += [[x * (1.1 if i == j else 1) for j, x in enumerate(start)] for i in range(size)]
    simplex = sorted((loss(corner), corner) for corner in corners)
    for _ in range(steps):
        centre = [sum(corner[j] for _, corner in simplex[:-1]) / size for j in range(size)]
        worst_value, worst = simplex[-1]

        def towards(
            share: float, centre: list[float] = centre, worst: list[float] = worst
        ) -> tuple[float, list[float]]:
            point = [c + share * (w - c) for c, w in zip(centre, worst, strict=True)]
            return loss(point), point

        reflected = towards(-1)
        if reflected[0] < simplex[0][0]:
            simplex[-1] = min(reflected, towards(-2))
        elif reflected[0] < simplex[-2][0]:
            simplex[-1] = reflected
        else:
            contracted = towards(0.5)
            if contracted[0] < worst_value:
                simplex[-1] = contracted
            else:
                best = simplex[0][1]
                shrunk = [
                    [(a + b) / 2 for a, b in zip(c, best, strict=True)] for _, c in simplex[1:]
                ]
                simplex[1:] = [(loss(corner), corner) for corner in shrunk]
        simplex.sort()
    return simplex[0][1]
