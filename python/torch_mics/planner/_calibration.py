"""Calibrations: what is known of an instance type, each number with its source and date."""

from __future__ import annotations

import dataclasses
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

from torch_mics import _C
from torch_mics.planner._located_json import LocatedJson
from torch_mics.planner._located_json import Path as FieldPath

SCHEMA = "torch_mics.calibration/1"
ORIGINS = ("published", "measured", "fitted", "assumed")
TABLES = ("flat", "rail_hop", "intra_hop")

_POSITIVE = "a number above 0"
_NOT_NEGATIVE = "a number of at least 0"
_SHARE = "a number above 0 and at most 1"
_COUNT = "a whole number of at least 1"
# Every value of a calibration: its unit, and what it must be.
VALUES = {
    "ranks_per_node": ("ranks", _COUNT),
    "memory": ("bytes", _POSITIVE),
    "usable_memory": ("share", _SHARE),
    "context": ("bytes", _NOT_NEGATIVE),
    "communicator": ("bytes", _NOT_NEGATIVE),
    "peak": ("FLOP/s", _POSITIVE),
    "efficiency": ("share", _SHARE),
    "efficiency_wide": ("share", _SHARE),
    "memory_bandwidth": ("bytes/s", _POSITIVE),
    "intra_latency": ("s", _NOT_NEGATIVE),
    "intra_bandwidth": ("bytes/s", _POSITIVE),
    "inter_latency": ("s", _NOT_NEGATIVE),
    "inter_bandwidth": ("bytes/s", _POSITIVE),
    "launch": ("s", _NOT_NEGATIVE),
    "rail_launch": ("s", _NOT_NEGATIVE),
    "compute_by_network": ("share", _NOT_NEGATIVE),
    "compute_by_intra": ("share", _NOT_NEGATIVE),
    "network_by_compute": ("share", _NOT_NEGATIVE),
    "time_error": ("share", _NOT_NEGATIVE),
}
WIDE = 5120  # hidden size from which efficiency_wide holds


@dataclasses.dataclass(frozen=True)
class Value:
    """A number, and where it is from."""

    value: float
    origin: str
    source: str
    date: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Measured collectives: (ranks, bytes, seconds) each."""

    points: tuple[tuple[int, float, float], ...]
    source: str
    date: str


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One instance type. `values` has every key of VALUES; `tables` some of TABLES."""

    instance: str
    aliases: tuple[str, ...]
    gpu: str
    values: dict[str, Value]
    tables: dict[str, Table]

    def __getitem__(self, name: str) -> float:
        return self.values[name].value

    @property
    def num_fitted(self) -> int:
        """How many numbers were fitted to runs."""
        return sum(value.origin == "fitted" for value in self.values.values())

    @property
    def time_error(self) -> float:
        """The mean relative error that predictions of time are known, or assumed, to have."""
        return self["time_error"]

    def replace(self, **numbers: float) -> Calibration:
        """Gives the same with other numbers."""
        values = {
            name: dataclasses.replace(value, value=numbers.get(name, value.value))
            for name, value in self.values.items()
        }
        return dataclasses.replace(self, values=values)

    def cluster(self, width: int) -> _C.Cluster:
        """Gives what the time model needs, for a model of hidden size `width`."""
        machine = _C.Machine(
            ranks_per_node=int(self["ranks_per_node"]),
            launch=self["launch"],
            rail_launch=self["rail_launch"],
            intra=_C.Link(latency=self["intra_latency"], bandwidth=self["intra_bandwidth"]),
            inter=_C.Link(latency=self["inter_latency"], bandwidth=self["inter_bandwidth"]),
        )
        tables = {
            name: _C.MeasuredTable(
                [_C.MeasuredPoint(num_ranks=n, nbytes=b, seconds=s) for n, b, s in table.points]
            )
            for name, table in self.tables.items()
        }
        return _C.Cluster(
            machine=machine,
            contention=_C.Contention(
                compute_by_network=self["compute_by_network"],
                compute_by_intra=self["compute_by_intra"],
                network_by_compute=self["network_by_compute"],
            ),
            peak_flops=self["peak"],
            efficiency=self["efficiency_wide" if width >= WIDE else "efficiency"],
            memory_bandwidth=self["memory_bandwidth"],
            **tables,
        )

    def limits(self) -> _C.MemoryLimits:
        """Gives what the memory model needs."""
        return _C.MemoryLimits(
            capacity_nbytes=self["memory"],
            usable=self["usable_memory"],
            context_nbytes=self["context"],
            communicator_nbytes=self["communicator"],
        )


def shipped_instances() -> list[str]:
    """Names the instance types that have a calibration in the package."""
    folder = resources.files("torch_mics.planner") / "data" / "calibrations"
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir())


def load_calibration(name: str | Path) -> Calibration:
    """Reads a calibration: that of an instance type ("p4d.24xlarge" or "p4d"), or a file's.

    Raises:
        ValueError: nothing has this name; or the file is malformed, with its line and field.
    """
    if isinstance(name, Path) or name.endswith(".json"):
        return parse_calibration(Path(name).read_text(), str(name))
    folder = resources.files("torch_mics.planner") / "data" / "calibrations"
    for instance in shipped_instances():
        file = folder / f"{instance}.json"
        calibration = parse_calibration(file.read_text(), file.name)
        if name in (calibration.instance, *calibration.aliases):
            return calibration
    raise ValueError(
        f"an instance type must have a calibration: got {name!r}. Use one of "
        f"{', '.join(shipped_instances())}, or the path of a .json file that "
        "`python -m torch_mics calibrate` wrote."
    )


def parse_calibration(text: str, source: str) -> Calibration:
    """Reads a calibration's JSON; `source` names it in errors."""
    located = LocatedJson(text, source)
    top = located.value
    keys = ("schema", "instance", "aliases", "gpu", "num_fitted", "values", "tables")
    _check_keys(located, (), top, keys)
    if top["schema"] != SCHEMA:
        raise located.error(("schema",), f'must be "{SCHEMA}"', top["schema"])
    for key in ("instance", "gpu"):
        _check_text(located, (key,), top[key])
    if not isinstance(top["aliases"], list):
        raise located.error(("aliases",), "must be a list", top["aliases"])
    for index, alias in enumerate(top["aliases"]):
        _check_text(located, ("aliases", index), alias)
    _check_keys(located, ("values",), top["values"], tuple(VALUES))
    values = {name: _read_value(located, name, top["values"][name]) for name in VALUES}
    if not isinstance(top["tables"], dict):
        raise located.error(("tables",), "must be an object", top["tables"])
    for name in top["tables"]:
        if name not in TABLES:
            raise located.error(("tables", name), f"must be one of {', '.join(TABLES)}", name)
    tables = {name: _read_table(located, name, found) for name, found in top["tables"].items()}
    result = Calibration(top["instance"], tuple(top["aliases"]), top["gpu"], values, tables)
    if top["num_fitted"] != result.num_fitted:
        rule = f"must be the number of values whose origin is fitted, {result.num_fitted}"
        raise located.error(("num_fitted",), rule, top["num_fitted"])
    return result


def dump_calibration(calibration: Calibration) -> dict[str, Any]:
    """Gives the JSON of a calibration; parse_calibration() reads it."""
    return {
        "schema": SCHEMA,
        "instance": calibration.instance,
        "aliases": list(calibration.aliases),
        "gpu": calibration.gpu,
        "num_fitted": calibration.num_fitted,
        "values": {
            name: {
                "value": value.value,
                "unit": VALUES[name][0],
                **{k: getattr(value, k) for k in ("origin", "source", "date")},
            }
            for name, value in calibration.values.items()
        },
        "tables": {
            name: {"source": t.source, "date": t.date, "points": [list(p) for p in t.points]}
            for name, t in calibration.tables.items()
        },
    }


def _check_keys(located: LocatedJson, path: FieldPath, found: Any, wanted: tuple[str, ...]) -> None:
    if not isinstance(found, dict):
        raise located.error(path, "must be an object", found)
    for key in found:
        if key not in wanted:
            raise located.error((*path, key), f"must be one of {', '.join(wanted)}", key)
    for key in wanted:
        if key not in found:
            raise located.error((*path, key), "must be there", None)


def _check_text(located: LocatedJson, path: FieldPath, found: Any) -> None:
    if not isinstance(found, str) or not found:
        raise located.error(path, "must be a text that is not empty", found)


def _check_date(located: LocatedJson, path: FieldPath, found: Any) -> None:
    if not isinstance(found, str) or not re.fullmatch(r"\d{4}(-\d{2}(-\d{2})?)?", found):
        raise located.error(path, "must be a date as 2022, 2022-11 or 2022-11-25", found)


def _check_number(located: LocatedJson, path: FieldPath, found: Any, rule: str) -> float:
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    good = is_number and math.isfinite(found) and found >= 0
    if rule == _COUNT:
        good = good and found >= 1 and found == int(found)
    elif rule != _NOT_NEGATIVE:
        good = good and found > 0
    if not good or (rule == _SHARE and found > 1):
        raise located.error(path, f"must be {rule}", found)
    return float(found)


def _read_value(located: LocatedJson, name: str, found: Any) -> Value:
    path = ("values", name)
    _check_keys(located, path, found, ("value", "unit", "origin", "source", "date"))
    unit, rule = VALUES[name]
    number = _check_number(located, (*path, "value"), found["value"], rule)
    if found["unit"] != unit:
        raise located.error((*path, "unit"), f'must be "{unit}"', found["unit"])
    if found["origin"] not in ORIGINS:
        raise located.error(
            (*path, "origin"), f"must be one of {', '.join(ORIGINS)}", found["origin"]
        )
    _check_text(located, (*path, "source"), found["source"])
    _check_date(located, (*path, "date"), found["date"])
    return Value(number, found["origin"], found["source"], found["date"])


def _read_table(located: LocatedJson, name: str, found: Any) -> Table:
    path: FieldPath = ("tables", name)
    _check_keys(located, path, found, ("source", "date", "points"))
    _check_text(located, (*path, "source"), found["source"])
    _check_date(located, (*path, "date"), found["date"])
    points: list[tuple[int, float, float]] = []
    if not isinstance(found["points"], list) or not found["points"]:
        raise located.error((*path, "points"), "must be a list of points", found["points"])
    for index, point in enumerate(found["points"]):
        place = (*path, "points", index)
        if not isinstance(point, list) or len(point) != 3:
            raise located.error(place, "must be [ranks, bytes, seconds]", point)
        ranks = _check_number(located, (*place, 0), point[0], _COUNT)
        nbytes = _check_number(located, (*place, 1), point[1], _POSITIVE)
        seconds = _check_number(located, (*place, 2), point[2], _POSITIVE)
        if any((int(ranks), nbytes) == known[:2] for known in points):
            raise located.error(place, "must have ranks and bytes of its own", point)
        points.append((int(ranks), nbytes, seconds))
    return Table(tuple(points), found["source"], found["date"])
