"""Fits, predicts every published number, and says how far off it is."""

from __future__ import annotations

import dataclasses

from torch_mics.planner._calibration import Calibration, load_calibration
from torch_mics.planner._tables import Table, percent
from torch_mics.published._claims import Claim, all_claims
from torch_mics.published._fit import FITS, Fit, fit_calibration
from torch_mics.published._runs import Run, predict_run, published_runs

_FITTED, _LEFT_OUT = "fitted", "left out"


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run, its prediction, and whether the fit has seen it."""

    run: Run
    predicted: float  # seconds per micro-step
    is_fitted: bool

    @property
    def error(self) -> float:
        return self.predicted / self.run.seconds - 1

    @property
    def is_held_out(self) -> bool:
        return not self.is_fitted and not self.run.anomaly


@dataclasses.dataclass(frozen=True)
class Validation:
    """All published runs and claims, each with what the models predict."""

    calibrations: dict[str, Calibration]
    rows: list[Row]
    claims: list[Claim]

    def held_out_errors(self, instance: str) -> list[float]:
        """Relative errors of the time of one instance type, without their signs."""
        return [
            abs(row.error) for row in self.rows if row.run.instance == instance and row.is_held_out
        ]

    def summary(self) -> str:
        """Gives the last line of the report."""
        p3dn = self.held_out_errors("p3dn.24xlarge")
        p4d = self.held_out_errors("p4d.24xlarge")
        return (
            f"held-out error: p3dn mean {100 * sum(p3dn) / len(p3dn):.1f}%, "
            f"worst {100 * max(p3dn):.1f}%; p4d mean {100 * sum(p4d) / len(p4d):.1f}%"
        )

    def tables(self) -> list[Table]:
        """Gives the numbers fitted, every run, and the other claims."""
        return [self._fits(), *(self._runs(fit) for fit in FITS), self._claims()]

    def left_out(self) -> list[str]:
        """Says which runs are in no mean, and why."""
        return [
            f"{row.run.model} {row.run.system}, {row.run.gpus} GPUs (figure {row.run.figure}): "
            f"{row.run.anomaly}"
            for row in self.rows
            if row.run.anomaly
        ]

    def _fits(self) -> Table:
        rows = []
        for fit in FITS:
            calibration = self.calibrations[fit.instance]
            numbers = ", ".join(f"{name} {calibration[name]:.3g}" for name in fit.start)
            points = sum(fit.is_point(row.run) for row in self.rows)
            rows.append((fit.instance, str(len(fit.start)), str(points), numbers))
        return Table("Fitted", ("instance", "numbers", "points", "values"), rows)

    def _runs(self, fit: Fit) -> Table:
        rows = []
        for row in self.rows:
            if row.run.instance != fit.instance:
                continue
            mark = _FITTED if row.is_fitted else _LEFT_OUT if row.run.anomaly else ""
            rows.append(
                (
                    f"{row.run.model} {row.run.system}",
                    str(row.run.gpus),
                    str(row.run.partition),
                    f"{row.run.seconds:.2f}",
                    f"{row.predicted:.2f}",
                    percent(row.error),
                    mark,
                )
            )
        title = f"{fit.instance}: seconds per micro-step"
        return Table(title, ("run", "GPUs", "p", "published", "predicted", "error", ""), rows)

    def _claims(self) -> Table:
        rows = [
            (c.text, c.published, c.predicted, c.goal, "yes" if c.is_met else "no")
            for c in self.claims
        ]
        return Table("Claims", ("claim", "published", "predicted", "goal", "met"), rows)


def validate() -> Validation:
    """Fits the two instance types that have published runs, and predicts all their runs."""
    calibrations = {
        fit.instance: fit_calibration(load_calibration(fit.instance), fit) for fit in FITS
    }
    rows = []
    for fit in FITS:
        calibration = calibrations[fit.instance]
        for run in published_runs():
            if run.instance == fit.instance:
                rows.append(Row(run, predict_run(run, calibration), fit.is_point(run)))
    p4d = calibrations["p4d.24xlarge"]
    # The same processors and network with twice the memory.
    p4de = load_calibration("p4de.24xlarge").replace(
        **{name: p4d[name] for name in (*FITS[1].start, "rail_launch")}
    )
    claims = all_claims(calibrations["p3dn.24xlarge"], p4d, p4de)
    return Validation(calibrations, rows, claims)
