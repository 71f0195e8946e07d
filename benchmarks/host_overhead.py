"""Host time that sharding adds to forward and backward: torch_mics beside FSDP2.

    python benchmarks/host_overhead.py

One process; the other ranks are played by torch's fake process group, whose collectives move nothing.
Small parameters, so that what is measured is the work of the host. Three copies of one model take turns,
step by step: the plain one, one under FSDP2, one under torch_mics. The overhead of a step is its time
less that of the plain model's step in the same turn; each number is a median over the turns, in
microseconds per unit, all hooks, gathers and reductions included.

Two clocks: the wall clock, and the CPU time of all threads of the process. torch_mics is measured twice:
with all work on the caller's thread ("inline"), as FSDP2 does on a CPU and both do on a GPU, and with
streams on threads ("threads", the default on CPUs), where each collective is handed to a thread and waited
for. The last line is the worst ratio of the first kind; that of the second is printed above it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

import torch_mics as mics

KINDS = ("inline", "threads")
WARM_UP = 3  # turns that are not counted: they record the order and allocate memory


def answer_for_other_ranks(world_size: int) -> None:
    """Answers for all other ranks as rank 0 does, when torch_mics makes all ranks agree on something."""
    store = dist.PrefixStore("torch_mics", distributed_c10d._get_default_store())
    for call in itertools.count(1):
        store.wait([f"{call}/0"], datetime.timedelta(days=1))
        for rank in range(1, world_size):
            store.set(f"{call}/{rank}", store.get(f"{call}/0"))


class Unit(nn.Module):
    """Adds its parameters to the input."""

    def __init__(self, num_parameters: int, numel: int) -> None:
        super().__init__()
        self.terms = nn.ParameterList(
            nn.Parameter(torch.rand(numel)) for _ in range(num_parameters)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for term in self.terms:
            x = x + term
        return x


@dataclasses.dataclass
class Clock:
    """A reading of both clocks, or a difference of two."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Clock:
        return Clock(time.perf_counter(), time.process_time())

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--parameters", type=int, nargs="+", default=[12, 2], help="per unit")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--numel", type=int, default=64, help="elements per parameter")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(arguments: argparse.Namespace, num_parameters: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Unit(num_parameters, arguments.numel) for _ in range(arguments.units)])


def shard(model: nn.Sequential, how: Callable[[nn.Module], object]) -> nn.Sequential:
    for unit in model:
        how(unit)
    how(model)
    return model


def step(model: nn.Module, x: torch.Tensor) -> Clock:
    start = Clock.now()
    model(x).sum().backward()
    passed = Clock.now() - start
    for parameter in model.parameters():
        parameter.grad = None
    return passed


def measure(
    arguments: argparse.Namespace, world_size: int, num_parameters: int
) -> dict[str, Clock]:
    """Gives medians in microseconds per unit: the plain step, and what FSDP2 and torch_mics add."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=dist.HashStore())
    threading.Thread(target=answer_for_other_ranks, args=[world_size], daemon=True).start()
    mesh = init_device_mesh("cpu", (world_size,))
    ours = mics.init_mesh(world_size, device_type="cpu", gpus_per_node=world_size)
    models = {
        "plain": build(arguments, num_parameters),
        "FSDP2": shard(build(arguments, num_parameters), lambda unit: fully_shard(unit, mesh=mesh)),
        "torch_mics": shard(
            build(arguments, num_parameters), lambda unit: mics.fully_shard(unit, mesh=ours)
        ),
    }
    x = torch.rand(arguments.numel)
    turns: dict[str, list[Clock]] = {name: [] for name in models}
    gc.disable()  # its pauses would hit whoever has the turn
    for turn in range(arguments.rounds + WARM_UP):
        passed = {name: step(model, x) for name, model in models.items()}
        gc.collect()
        if turn < WARM_UP:
            continue
        turns["plain"].append(passed["plain"])
        for name in ("FSDP2", "torch_mics"):
            turns[name].append(passed[name] - passed["plain"])
    scale = 1e6 / arguments.units
    return {
        name: Clock(
            statistics.median(clock.wall for clock in clocks) * scale,
            statistics.median(clock.cpu for clock in clocks) * scale,
        )
        for name, clocks in turns.items()
    }


def measure_in_process(
    arguments: argparse.Namespace, world_size: int, num_parameters: int, streams: str
) -> dict[str, Clock]:
    """As measure(), in a new process: process groups and streams are made once per process."""
    command = [sys.executable, __file__, "--alone", "--world-sizes", str(world_size)]
    command += ["--parameters", str(num_parameters)]
    for name in ("units", "numel", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "MICS_STREAMS": streams}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: Clock(**clock) for name, clock in found.items()}


def main() -> None:
    """Prints a table, and the ratio as the last line."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.alone:
        found = measure(arguments, arguments.world_sizes[0], arguments.parameters[0])
        print(json.dumps({name: dataclasses.asdict(clock) for name, clock in found.items()}))
        return
    table = Table(
        title=f"Host time per unit of {arguments.units}, us: plain model, and what is added to it"
    )
    for column in ("ranks", "parameters per unit", "streams", "clock"):
        table.add_column(column)
    for column in ("plain", "FSDP2", "torch_mics", "ratio"):
        table.add_column(column, justify="right")
    rows = []
    cases = list(itertools.product(arguments.world_sizes, arguments.parameters, KINDS))
    for world_size, num_parameters, streams in track(
        cases, description="measuring", console=Console(stderr=True)
    ):
        found = measure_in_process(arguments, world_size, num_parameters, streams)
        for clock in ("wall", "cpu"):
            numbers = {name: getattr(reading, clock) for name, reading in found.items()}
            ratio = numbers["torch_mics"] / numbers["FSDP2"]
            row = {"ranks": world_size, "parameters": num_parameters, "streams": streams}
            rows.append({**row, "clock": clock, **numbers, "ratio": ratio})
            table.add_row(
                *(str(value) for value in row.values()),
                clock,
                *(f"{number:.1f}" for number in numbers.values()),
                f"{ratio:.4f}",
            )
    Console().print(table)
    worst = {
        kind: max(float(row["ratio"]) for row in rows if row["streams"] == kind) for kind in KINDS
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"rows": rows, "ratios": worst}) + "\n")
    print(f"with streams on threads = {worst['threads']:.4f}")
    print(f"ratio ours/FSDP2 = {worst['inline']:.4f}")


if __name__ == "__main__":
    main()
