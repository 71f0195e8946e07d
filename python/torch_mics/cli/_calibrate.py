"""The command `calibrate`: measures the running cluster, or reads results of nccl-tests."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torch_mics._exchange import exchange
from torch_mics._exit_rank import exit_rank
from torch_mics.planner._calibrate import calibrate, measured_table
from torch_mics.planner._calibration import (
    Calibration,
    dump_calibration,
    load_calibration,
    parse_calibration,
    shipped_instances,
)
from torch_mics.planner._measure import (
    DEFAULT_SIZES,
    measure,
    measure_cpu,
    ranks_per_node,
)
from torch_mics.planner._nccl_tests import read_nccl_tests


def add_calibrate(commands: Any) -> None:
    """Adds the command to a parser."""
    command = commands.add_parser(
        "calibrate", help="measure the running cluster (under torchrun), or import nccl-tests"
    )
    command.add_argument("output", type=Path, help="the .json file to write")
    command.add_argument(
        "--base",
        required=True,
        help=f"source of what is not measured: {', '.join(shipped_instances())}, or a .json file",
    )
    command.add_argument("--name", help="name of the result; by default that of the file")
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(DEFAULT_SIZES),
        metavar="BYTES",
        help="bytes of the units that are gathered",
    )
    source.add_argument(
        "--from-nccl-tests",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="outputs of all_gather_perf and reduce_scatter_perf, text or JSON, instead of a measurement",
    )
    command.set_defaults(run=_run_calibrate)


def _run_calibrate(options: argparse.Namespace) -> None:
    if options.from_nccl_tests is not None:
        base = load_calibration(options.base)
        _finish(options, base, _import_results(options, base))
        return
    with _process_group():
        base = _agreed_base(options)
        made = _measure_cluster(options, base)
        if dist.get_rank() == 0:
            _finish(options, base, made)


def _import_results(options: argparse.Namespace, base: Calibration) -> Calibration:
    results = [read_nccl_tests(path) for path in options.from_nccl_tests]
    sizes = [result.ranks_per_node for result in results]
    # A test inside one node may leave out some of its GPUs.
    over_nodes = [r.ranks_per_node for r in results if r.measurements[0].table != "intra_hop"]
    per_node = max(over_nodes) if over_nodes else max(int(base["ranks_per_node"]), *sizes)
    if max(sizes) > per_node or min(over_nodes, default=per_node) < per_node:
        raise ValueError(
            "results of one cluster must have nodes of one size: got ranks per node "
            f"{dict(zip((path.name for path in options.from_nccl_tests), sizes, strict=True))}. Import "
            "those of one cluster."
        )
    names = ", ".join(path.name for path in options.from_nccl_tests)
    return calibrate(
        base,
        [m for r in results for m in r.measurements],
        ranks_per_node=per_node,
        instance=_name(options),
        source=f"nccl-tests, {names}",
        date=datetime.date.today().isoformat(),
    )


# --- with ranks -----------------------------------------------------------------------------------


@contextmanager
def _process_group() -> Iterator[None]:
    """The launcher's process group, made here unless the caller has one."""
    if dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "a measurement needs the ranks of the cluster: got a single process. Start it with torchrun, "
            "or pass --from-nccl-tests."
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    yield
    exit_rank()


def _agreed_base(options: argparse.Namespace) -> Calibration:
    """Gives the base; a problem on one rank raises on all, before the first collective."""
    problem, base = "", None
    try:
        base = load_calibration(options.base)
        folder = options.output.resolve().parent
        if dist.get_rank() == 0 and not folder.is_dir():
            problem = f"the folder of the calibration must exist: got {folder}."
    except (ValueError, OSError) as error:
        problem = str(error)
    if min(options.sizes) < 1 or len(set(options.sizes)) < 2:
        problem = problem or f"--sizes must be at least two sizes above 0: got {options.sizes}."
    problems = [text for text in exchange("the calibration", problem) if text]
    if problems or base is None:
        raise ValueError(problems[0])
    return base


def _measure_cluster(options: argparse.Namespace, base: Calibration) -> Calibration:
    per_node = ranks_per_node()
    world_size = dist.get_world_size()
    is_first = dist.get_rank() == 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backends = dict(part.split(":") for part in str(dist.get_backend_config()).split(","))
    found = list(measure(options.sizes, device, _say if is_first else _say_nothing))
    made = calibrate(
        base,
        found,
        ranks_per_node=per_node,
        instance=_name(options),
        source=f"{world_size} ranks, {per_node} on each node, over {backends[device.type]}, "
        f"torch {torch.__version__}",
        date=datetime.date.today().isoformat(),
        device=None if device.type == "cuda" else measure_cpu(per_node),
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return dataclasses.replace(made, gpu=name)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_nothing(text: str) -> None:
    del text


# --- the file -------------------------------------------------------------------------------------


def _name(options: argparse.Namespace) -> str:
    return options.name or options.output.name.removesuffix(".json")


def _finish(options: argparse.Namespace, base: Calibration, made: Calibration) -> None:
    text = _text_of(dump_calibration(made))
    parse_calibration(text, str(options.output))  # what is written can be read
    options.output.write_text(text)
    measured_table(made, base).show()
    print(f"{options.output}: {sum(len(t.points) for t in made.tables.values())} collectives")


def _text_of(dumped: dict[str, Any]) -> str:
    """Writes each value and each point on a line of its own, so that an error can name its line."""

    def lines(items: Sequence[str], close: str) -> str:
        return ",\n  ".join(items) + f"\n {close}"

    parts = [f'"{k}": {json.dumps(v)}' for k, v in dumped.items() if k not in ("values", "tables")]
    values = [f'"{name}": {json.dumps(value)}' for name, value in dumped["values"].items()]
    parts.append('"values": {\n  ' + lines(values, "}"))
    tables = []
    for name, table in dumped["tables"].items():
        points = ",\n    ".join(json.dumps(point) for point in table["points"])
        head = ", ".join(f'"{k}": {json.dumps(table[k])}' for k in ("source", "date"))
        tables.append(f'"{name}": {{{head}, "points": [\n    {points}]}}')
    parts.append('"tables": {' + ("\n  " + lines(tables, "}") if tables else "}"))
    return "{\n " + ",\n ".join(parts) + "\n}\n"
