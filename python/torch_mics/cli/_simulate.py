"""The command `simulate`: scaling curves of a plan, and the figures of the announcement."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from torch_mics.cli._model import add_model, add_search, plan_of
from torch_mics.planner._report import verdict
from torch_mics.planner._scaling import MOST_GPUS, SCALINGS, SYSTEMS, Point, curve, gpu_counts
from torch_mics.planner._scaling_report import plot_scaling, scaling_table, write_csv
from torch_mics.published import write_announcement


def add_simulate(commands: Any) -> None:
    """Adds the command to a parser."""
    command = commands.add_parser(
        "simulate", help="weak and strong scaling of a plan, beside HSDP, ZeRO-3 and ZeRO-2"
    )
    model = add_model(command)
    model.add_argument(
        "--announcement",
        type=Path,
        metavar="DIRECTORY",
        help="write the two figures of the announcement of MiCS, and nothing else",
    )
    # A plan is made for --gpus; --announcement needs none of these.
    add_search(command, required=False)
    command.add_argument(
        "--max-gpus", type=int, default=MOST_GPUS, help=f"the end of the curves; {MOST_GPUS}"
    )
    command.add_argument("--csv", type=Path, metavar="FILE", help="a row for each point")
    command.add_argument("--plot", type=Path, metavar="FILE", help="the curves; .png, .svg, .pdf")
    command.set_defaults(run=_run_simulate)


def _run_simulate(options: argparse.Namespace) -> None:
    if options.announcement is not None:
        for path in write_announcement(options.announcement):
            print(path)
        return
    needed = {
        "--instance": options.instance,
        "--gpus": options.gpus,
        "--global-batch": options.global_batch,
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"a simulation needs the cluster and the batch of its plan: got no {', no '.join(missing)}."
        )
    found = plan_of(options)
    counts = gpu_counts(found, options.max_gpus)
    points: list[Point] = []
    for scaling in SCALINGS:
        for system in SYSTEMS:
            start = time.monotonic()
            points += (points_now := curve(found, scaling, system, counts))
            print(
                f"{scaling} scaling of {system}: {len(points_now)} of {len(counts)} sizes in "
                f"{time.monotonic() - start:.1f} s",
                file=sys.stderr,
            )
    if options.csv is not None:
        write_csv(points, options.csv)
    if options.plot is not None:
        plot_scaling(found, points, options.plot)
    print(verdict(found))
    for scaling in SCALINGS:
        scaling_table(found, scaling, points).show()
