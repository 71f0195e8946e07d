"""Reads what nccl-tests printed, or wrote as JSON, as measured collectives.

Both forms have a row for each size; the ranks are counted from the list of devices. Sizes that leave a
rank without elements are printed as 0 and skipped. An all-gather and a reduce-scatter tell what a unit's
exchange costs; other collectives use other algorithms and are refused.
Source: the output of nccl-tests 2.13 to 2.17 and version 2 of its JSON.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_mics.planner._located_json import LocatedJson
from torch_mics.planner._located_json import Path as FieldPath
from torch_mics.planner._measure import Measurement

_WHAT = "a result of nccl-tests"
_PROGRAMS = ("all_gather_perf", "reduce_scatter_perf")
_DEVICE = re.compile(r"#\s+Rank\s+\d+\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device")
_STARTING = re.compile(r"# Collective test (?:starting|concluded): (\S+)")
_ELEMENT_NBYTES = {
    **dict.fromkeys(("int8", "uint8", "f8e4m3", "f8e5m2"), 1),
    **dict.fromkeys(("half", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float"), 4),
    **dict.fromkeys(("int64", "uint64", "double"), 8),
}


@dataclasses.dataclass(frozen=True)
class NcclResult:
    """The measurements of one file, and the ranks of each of its nodes."""

    ranks_per_node: int
    measurements: list[Measurement]


def read_nccl_tests(path: Path) -> NcclResult:
    """Reads one file in either form.

    Raises:
        ValueError: the file is malformed, with its line and field, or is no gather and no reduce-scatter.
    """
    text = path.read_text()
    if text.lstrip().startswith("{"):
        return parse_json(text, path.name)
    return parse_text(text, path.name)


# --- text -----------------------------------------------------------------------------------------


def parse_text(text: str, source: str) -> NcclResult:
    """Reads what a test printed; other lines than those of the test may stand between."""
    devices: list[tuple[str, str]] = []  # group and host
    rows: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _STARTING.match(line):
            _check_program(found.group(1), f"{source}, line {number}")
        elif found := _DEVICE.match(line):
            devices.append((found.group(1) or "0", found.group(2)))
        elif line.startswith("#") and "cputime" in line:
            raise _error(source, number, "time", "must be that of the GPU, without -C", "cputime")
        elif re.match(r"\s*\d+\s+\d+\s+[a-z]\w+\s", line):
            rows.append((number, line.split()))
    if not devices:
        raise _error(
            source, 1, "devices", 'must be listed as "#  Rank 0 ... on HOST device 0"', "none"
        )
    if not rows:
        raise _error(source, 1, "results", "must have a row for each size", "none")
    kind = _kind_of(devices, source)
    measured = [_text_row(source, n, cells, kind) for n, cells in rows if cells[0] != "0"]
    return NcclResult(kind.per_node, measured)


def _text_row(source: str, line: int, cells: list[str], kind: _Kind) -> Measurement:
    names = ("size", "count", "type", "redop", "root", "time")
    if len(cells) < len(names):
        raise _error(source, line, names[len(cells)], "must be there", " ".join(cells))
    size, count = int(cells[0]), int(cells[1])
    try:
        microseconds = float(cells[5])
    except ValueError:
        microseconds = 0.0
    if not 0 < microseconds < float("inf"):
        raise _error(source, line, "time", "must be a number above 0", cells[5])
    if reason := _count_problem(size, count, cells[2], kind.num_ranks):
        raise _error(source, line, "count", reason, count)
    return kind.measurement(size, microseconds)


def _error(source: str, line: int, field: str, rule: str, got: object) -> ValueError:
    return ValueError(
        f"{_WHAT} must be well formed: {source}, line {line}, field {field}: {rule}: got {got!r}."
    )


# --- JSON -----------------------------------------------------------------------------------------


def parse_json(text: str, source: str) -> NcclResult:
    """Reads what a test wrote with its option for JSON."""
    located = LocatedJson(text, source, _WHAT)
    arguments = _get(located, ("args",), list)
    if arguments and isinstance(arguments[0], str):
        _check_program(arguments[0].rpartition("/")[2], f"{source}, field args.0")
    per_process = _whole(located, ("config", "nthreads")) * _whole(located, ("config", "ngpus"))
    devices = []
    for index, _ in enumerate(_get(located, ("config", "devices"), list)):
        place: FieldPath = ("config", "devices", index)
        host = _get(located, (*place, "hostname"), str)
        group = _get(located, (*place, "group"), int)
        # Each process writes its first device only.
        devices += [(str(group), host)] * per_process
    results = _get(located, ("results",), list)
    if not devices or not results:
        name = "results" if devices else "config.devices"
        raise located.error(tuple(name.split(".")), "must not be empty", [])
    kind = _kind_of(devices, source)
    sized = [i for i in range(len(results)) if _get(located, ("results", i, "size"), int) != 0]
    return NcclResult(kind.per_node, [_json_row(located, i, kind) for i in sized])


def _json_row(located: LocatedJson, index: int, kind: _Kind) -> Measurement:
    place: FieldPath = ("results", index)
    size, count = _whole(located, (*place, "size")), _whole(located, (*place, "count"))
    form = "out_of_place" if _get(located, (*place, "out_of_place"), dict | None) else "in_place"
    microseconds = _get(located, (*place, form, "time"), int | float)
    if not 0 < microseconds < float("inf"):
        raise located.error((*place, form, "time"), "must be a number above 0", microseconds)
    dtype = _get(located, (*place, "type"), str)
    if reason := _count_problem(size, count, dtype, kind.num_ranks):
        raise located.error((*place, "count"), reason, count)
    return kind.measurement(size, microseconds)


def _get(located: LocatedJson, path: FieldPath, kind: Any) -> Any:
    found = located.value
    for depth, key in enumerate(path):
        if isinstance(key, str) and (not isinstance(found, dict) or key not in found):
            raise located.error(path[: depth + 1], "must be there", None)
        found = found[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        name = getattr(kind, "__name__", str(kind))
        raise located.error(path, f"must be a value of type {name}", found)
    return found


def _whole(located: LocatedJson, path: FieldPath) -> int:
    found: int = _get(located, path, int)
    if found < 1:
        raise located.error(path, "must be at least 1", found)
    return found


# --- what was measured ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Which collective of a step a test was: `factor` makes its bytes those of a unit."""

    table: str
    num_ranks: int  # of one group
    partition_size: int
    factor: int
    per_node: int

    def measurement(self, size: int, microseconds: float) -> Measurement:
        return Measurement(self.table, self.partition_size, size * self.factor, microseconds / 1e6)


def _kind_of(devices: Sequence[tuple[str, str]], source: str) -> _Kind:
    """Tells by the hosts of the groups: within nodes, over whole nodes, or one rank on each (a rail)."""
    hosts = Counter(host for _, host in devices)
    per_node = next(iter(hosts.values()))
    groups: dict[str, Counter[str]] = {}
    for group, host in devices:
        groups.setdefault(group, Counter())[host] += 1
    shapes = {tuple(sorted(members.values())) for members in groups.values()}
    same = len(set(hosts.values())) == 1 and len(shapes) == 1
    shape = next(iter(shapes))
    ranks, nodes, local = sum(shape), len(shape), shape[0]
    if same and ranks > 1 and len(set(shape)) == 1:
        if nodes == 1:
            return _Kind("intra_hop", ranks, ranks, 1, per_node)
        if local == per_node:
            return _Kind("flat", ranks, ranks, 1, per_node)
        if local == 1:
            return _Kind("rail_hop", ranks, nodes * per_node, per_node, per_node)
    text = ", ".join(f"{n} on {host}" for host, n in hosts.items())
    raise ValueError(
        f"{_WHAT} must be of groups inside nodes, over whole nodes, or with one rank on each node: got "
        f"ranks {text}, in {len(groups)} groups ({source}). Run the test on as many GPUs of each node."
    )


def _count_problem(size: int, count: int, dtype: str, num_ranks: int) -> str:
    """In a gather and a reduce-scatter, the count is the elements of one rank and the size those of all."""
    if dtype not in _ELEMENT_NBYTES:
        return f"must be of a known type, not {dtype}"
    if count * _ELEMENT_NBYTES[dtype] * num_ranks != size:
        return f"must be the elements of one of {num_ranks} ranks, as in all_gather_perf, for {size} bytes"
    return ""


def _check_program(program: str, place: str) -> None:
    if program.endswith("_perf") and program not in _PROGRAMS:
        raise ValueError(
            f"{_WHAT} must be of a gather or a reduce-scatter: got {program} ({place}). Others use "
            "algorithms that a gather does not."
        )
