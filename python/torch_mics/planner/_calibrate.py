"""Makes a calibration from measured collectives: tables, and the few numbers of the formulas."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch_mics import _C
from torch_mics.planner._calibration import TABLES, Calibration, Table, Value
from torch_mics.planner._extras import extra
from torch_mics.planner._measure import Measurement
from torch_mics.planner._tables import Table as TextTable
from torch_mics.planner._tables import percent

FAR_OFF = 0.30  # relative to the base's prediction; marked in the table
_TIME_ERROR = 0.15


def calibrate(
    base: Calibration,
    measurements: Sequence[Measurement],
    *,
    ranks_per_node: int,
    instance: str,
    source: str,
    date: str,
    device: dict[str, float] | None = None,
) -> Calibration:
    """Puts measurements into a calibration; what was not measured stays as `base` has it.

    Latencies, bandwidths and launches are fitted to the tables by least squares of relative errors, none
    below 0; they predict beyond the tables. Points of equal ranks and bytes count once, as their mean.

    Args:
        base: the instance type that is nearest.
        measurements: of a cluster with `ranks_per_node`.
        instance: the name of the result.
        source, date: of the measurements.
        device: measured numbers of the device, by their name in a calibration.

    Raises:
        ValueError: a table has fewer than two sizes.
    """
    points = _merge(measurements)
    intra = [m for m in points if m.table == "intra_hop"]
    inter = [m for m in points if m.table != "intra_hop"]
    fitted: dict[str, tuple[float, str]] = {}
    if intra:
        latency, rate = _fit([(m.seconds, _intra_row(m)) for m in _of_two_sizes(intra)])
        text = f"least squares over {len(intra)} collectives of {source}"
        fitted |= {"intra_latency": (latency, text), "intra_bandwidth": (1 / rate, text)}
    if inter:
        k = ranks_per_node
        hop = fitted["intra_latency"][0] if intra else base["intra_latency"]
        rows = [
            (m.seconds - _intra_steps(m, k) * hop, _inter_row(m, k)) for m in _of_two_sizes(inter)
        ]
        launch, rail_launch, latency, rate = _fit(rows)
        text = f"least squares over {len(inter)} collectives of {source}"
        fitted |= {"launch": (launch, text), "rail_launch": (rail_launch, text)}
        fitted |= {"inter_latency": (latency, text), "inter_bandwidth": (1 / rate, text)}
    measured = dict(device or {})
    if ranks_per_node != base["ranks_per_node"]:
        measured["ranks_per_node"] = float(ranks_per_node)
    values = dict(base.values)
    values |= {name: Value(x, "fitted", text, date) for name, (x, text) in fitted.items()}
    values |= {name: Value(x, "measured", source, date) for name, x in measured.items()}
    if "peak" in measured:
        reached = Value(1.0, "assumed", "the peak is what matrix products reached", date)
        values |= {"efficiency": reached, "efficiency_wide": reached}
    unknown = "no training run was compared with this calibration"
    values["time_error"] = Value(_TIME_ERROR, "assumed", unknown, date)
    tables = {
        name: Table(
            tuple((m.num_ranks, float(m.nbytes), m.seconds) for m in points if m.table == name),
            source,
            date,
        )
        for name in TABLES
        if any(m.table == name for m in points)
    }
    return Calibration(instance, (), base.gpu, values, tables)


def _merge(measurements: Sequence[Measurement]) -> list[Measurement]:
    found: dict[tuple[str, int, int], list[float]] = {}
    for m in measurements:
        found.setdefault((m.table, m.num_ranks, m.nbytes), []).append(m.seconds)
    return [Measurement(*key, statistics.fmean(found[key])) for key in sorted(found)]


def _of_two_sizes(points: list[Measurement]) -> list[Measurement]:
    if len({m.nbytes for m in points}) < 2:
        raise ValueError(
            "a calibration needs collectives of at least two sizes: got "
            f"{points[0].nbytes} bytes alone in {points[0].table}. Measure more sizes."
        )
    return points


# The formulas of include/mics/model/cost_model.h, linear in what is fitted; the last is 1 / bandwidth.
def _intra_row(m: Measurement) -> tuple[float, ...]:
    return (m.num_ranks - 1.0, (m.num_ranks - 1) / m.num_ranks * m.nbytes)


def _intra_steps(m: Measurement, k: int) -> int:
    return m.num_ranks - m.num_ranks // k if m.table == "flat" else 0


def _inter_row(m: Measurement, k: int) -> tuple[float, ...]:
    p, is_flat = m.num_ranks, m.table == "flat"
    moved = (p - 1 if is_flat else p - k) / p * m.nbytes
    return (float(is_flat), float(not is_flat), p // k - 1.0, moved)


def _fit(rows: Sequence[tuple[float, tuple[float, ...]]]) -> tuple[float, ...]:
    """Least squares of relative errors without negative numbers, and with the last above 0."""
    with extra("fits need scipy"):
        import numpy as np
        from scipy.optimize import nnls

    scaled = np.array([[x / max(t, 1e-12) for x in row] for t, row in rows if t > 0])
    norms = np.linalg.norm(scaled, axis=0)
    norms[norms == 0] = 1.0  # what no collective depends on becomes 0
    # Where the data cannot tell two numbers apart, the later one is taken: latency per node, no launch.
    norms /= 1 + 1e-6 * np.arange(len(norms))
    ones = np.ones(len(scaled))
    found, _ = nnls(scaled / norms, ones)
    if found[-1] == 0:  # time does not grow with bytes: bandwidth alone explains it
        found = np.zeros_like(found)
        found[-1:], _ = nnls(scaled[:, -1:] / norms[-1:], ones)
    return tuple(map(float, found / norms))


def measured_table(calibration: Calibration, base: Calibration) -> TextTable:
    """Gives each measured collective beside the fitted formula and what the base predicts."""
    fitted, expected = calibration.cluster(0), base.cluster(0)
    # The formulas alone; a table would repeat its own points. Nodes are those of the measured cluster.
    expected.machine.ranks_per_node = fitted.machine.ranks_per_node
    formulas = {
        "flat": _C.flat_seconds,
        "rail_hop": _C.rail_hop_seconds,
        "intra_hop": _C.intra_hop_seconds,
    }
    rows = []
    for name, table in calibration.tables.items():
        for ranks, nbytes, seconds in table.points:
            ours = formulas[name](fitted.machine, ranks, nbytes)
            theirs = formulas[name](expected.machine, ranks, nbytes)
            far = abs(seconds / theirs - 1) > FAR_OFF if theirs else True
            rows.append(
                (
                    name,
                    str(ranks),
                    f"{nbytes / 1e6:.3f}",
                    f"{1e3 * seconds:.3f}",
                    percent(ours / seconds - 1),
                    percent(theirs / seconds - 1),
                    f"over {100 * FAR_OFF:.0f}% off" if far else "",
                )
            )
    columns = ("collective", "ranks", "MB", "ms", "formula", base.instance, "")
    return TextTable("Measured, and how far off the predictions are", columns, rows)
