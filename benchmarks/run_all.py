"""Runs all comparisons on the emulated cluster and writes a page of tables and plots.

    python benchmarks/run_all.py --out docs/results
    python benchmarks/run_all.py --out docs/results --only one_node two_nodes --repeats 1
    python benchmarks/run_all.py --out docs/results --render

Each launch is one file in OUT/data, and is skipped if that exists: a run that was stopped goes on where
it was. Needs what benchmarks/emulated_cluster needs. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from results import CALIBRATION, portable, render
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HERE = Path(__file__).parent
REAL = ("--steps", "5", "--base", "ddp")
# Virtual layers, with the ratio of network to compute that BERT 10B has on p3dn.
VIRTUAL = (
    *("--compute", "virtual", "--preset", "p3dn", "--layers", "8", "--layer-mb", "2"),
    *("--micro-steps", "4", "--steps", "2", "--base", "none"),
)


MOST_NODES = 8


@dataclasses.dataclass(frozen=True)
class Cell:
    """One launch: a cluster, and what runs on it."""

    nodes: int
    ranks_per_node: int
    rate: str
    arguments: tuple[str, ...]


def _weak(nodes: int) -> Cell:
    """Groups of one node beside one group over all; on the most nodes, also every size between."""
    names = [f"ours@{4 * nodes}"]
    if nodes > 1:
        names = ["ours@4", *names, f"ours_flat@{4 * nodes}"]
    if nodes == MOST_NODES:
        names += [f"ours@{p}" for p in (8, 16)]
    return Cell(nodes, 4, "100mbit", ("--strategy", "none", *names, *VIRTUAL))


CELLS = {
    "one_node": Cell(
        *(4, 2, "500mbit"),
        (
            *("--strategy", "none", "ddp", "fsdp2", "deepspeed_zero3", "deepspeed_mics@2"),
            *("hsdp_deferred@2", "hsdp_deferred@2/our_rs"),
            *("hsdp_nosync@2", "hsdp_nosync@2/our_rs", "ours@2", "ours_gloo@2", "ours_nosync@2"),
            *REAL,
        ),
    ),
    "two_nodes": Cell(
        *(4, 2, "500mbit"),
        (
            *("--strategy", "ddp", "hsdp_deferred@4", "hsdp_deferred@4/our_rs", "hsdp_nosync@4"),
            *("hsdp_nosync@4/our_rs", "ours@2", "ours@4", "ours_flat@4", "ours_residency@4"),
            *REAL,
        ),
    ),
    "all_nodes": Cell(
        *(4, 2, "500mbit"),
        (
            *("--strategy", "ddp", "fsdp2", "fsdp2_best", "fsdp2_nosync", "fsdp2/our_rs"),
            *("ours@8", "ours_flat@8", "ours_residency@8"),
            *REAL,
        ),
    ),
    **{
        f"accumulation_{steps}": Cell(
            *(4, 2, "500mbit"),
            (
                *("--strategy", "ddp", "hsdp@2", "hsdp_deferred@2", "ours_each@2", "ours@2"),
                *("--micro-steps", str(steps), *REAL),
            ),
        )
        for steps in (1, 2, 4, 8)
    },
    **{f"weak_scaling_{nodes}": _weak(nodes) for nodes in (1, 2, 4, MOST_NODES)},
}
# What is calibrated on the cluster of the weak scaling: collectives of a layer, and of half and double.
CALIBRATE = ("--base", "p3dn", "--sizes", "1000000", "2000000", "4000000")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="launches of each comparison")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    parser.add_argument("--render", action="store_true", help="run nothing, only write the page")
    return parser.parse_args()


def command(cell: Cell, data: Path, name: str) -> list[str]:
    """The command line of one launch."""
    return [
        *(sys.executable, str(HERE / "emulated_cluster"), "--nodes", str(cell.nodes)),
        *("--ranks-per-node", str(cell.ranks_per_node), "--rate", cell.rate),
        *("--json", str(data / f"{name}.cluster.json"), "--"),
        *(sys.executable, str(HERE / "train_bench"), *cell.arguments),
        *("--json", str(data / f"{name}.json")),
    ]


def calibrate(data: Path) -> None:
    """Measures the collectives of the cluster that weak scaling runs on."""
    _start(
        [
            *(sys.executable, str(HERE / "emulated_cluster"), "--nodes", str(MOST_NODES)),
            *("--ranks-per-node", "4", "--rate", "100mbit", "--"),
            *(sys.executable, "-m", "torch_mics", "calibrate", str(data / f"{CALIBRATION}.json")),
            *(*CALIBRATE, "--name", "emulated"),
        ],
        data,
        CALIBRATION,
    )


def run(cell: Cell, data: Path, name: str) -> None:
    """Runs one launch."""
    _start(command(cell, data, name), data, name)
    make_portable(data, name)


def _start(words: list[str], data: Path, name: str) -> None:
    """Runs a command; if it fails, its output goes to a log beside the numbers."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        log = data / f"{name}.log"
        log.write_text(done.stdout + done.stderr)
        raise SystemExit(f"{name} ended with status {done.returncode}; its output is in {log}")


def make_portable(data: Path, name: str) -> None:
    """Removes this machine's paths from a launch's numbers, so that they can be kept in the project."""
    cluster = data / f"{name}.cluster.json"
    numbers = json.loads(cluster.read_text())
    numbers["command"] = portable(numbers["command"])
    cluster.write_text(json.dumps(numbers, indent=1) + "\n")


def main() -> None:
    """Runs what is missing, round by round, then renders."""
    arguments = parse_arguments()
    data = arguments.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    rounds = [(f"{n}-{r}", n) for r in range(1, arguments.repeats + 1) for n in arguments.only]
    missing = [(name, cell) for name, cell in rounds if not (data / f"{name}.json").exists()]
    columns = (
        *(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
        ),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    needs_calibration = any(name.startswith("weak_scaling") for name in arguments.only)
    if needs_calibration and not arguments.render and not (data / f"{CALIBRATION}.json").exists():
        calibrate(data)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=0 if arguments.render else len(missing))
        for name, cell in [] if arguments.render else missing:
            progress.update(task, description=name)
            run(CELLS[cell], data, name)
            progress.advance(task)
    print(render(arguments.out))


if __name__ == "__main__":
    main()
