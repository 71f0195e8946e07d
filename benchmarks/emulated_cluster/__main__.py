"""Runs a command on an emulated cluster: nodes of this machine, joined by links of a given rate.

    python benchmarks/emulated_cluster --nodes 4 --ranks-per-node 2 --rate 500mbit -- \\
        python train.py --steps 10

The command is started once per rank, in its node's network namespace, with the environment that torchrun
gives. Afterwards: bytes over each link, and whether the machine kept up. Needs root, iproute2, and a
kernel that permits network namespaces, veth, bridge and tbf.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from gates import Limits, Watch, broken, probe
from isolation import NOT_PERMITTED, NotPermitted, run_isolated
from network import Counters, Network, bits_per_second
from ranks import run_ranks
from rich.console import Console
from rich.table import Table

GATE_BROKEN = 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="emulated_cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument(
        "--rate", type=bits_per_second, default="500mbit", help="of each node's link, each way"
    )
    parser.add_argument("--local-rate", type=bits_per_second, help="of each node's loopback")
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="MS", help="from one node to another"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="for the command")
    parser.add_argument("--json", type=Path, help="write bytes, rates and gates here")
    parser.add_argument("--logs", type=Path, help="folder for the output of all other ranks than 0")
    parser.add_argument(
        "--strict", action="store_true", help=f"end with {GATE_BROKEN} when a gate is broken"
    )
    parser.add_argument(
        "--max-cpu", type=float, default=Limits.cpu, help="gate: mean share of all cores"
    )
    parser.add_argument(
        "--max-late", type=float, default=Limits.timer_s, help="gate: seconds; 99 of 100 sleeps"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"only check that it can run here; end with {NOT_PERMITTED} if not",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what each rank runs")
    arguments = parser.parse_args()
    arguments.command = arguments.command[arguments.command[:1] == ["--"] :]
    if not 1 <= arguments.nodes <= 200 or arguments.ranks_per_node < 1:
        parser.error("--nodes must be 1 to 200 and --ranks-per-node at least 1")
    if arguments.delay < 0:
        parser.error("--delay must not be negative")
    if not arguments.command and not arguments.check:
        parser.error("a command is needed, after --")
    return arguments


def why_not() -> str | None:
    """Says what this machine lacks, before anything is tried."""
    if sys.platform != "linux":
        return f"an emulated cluster needs Linux: got {sys.platform}."
    if os.geteuid() != 0:
        return f"an emulated cluster needs root: got user id {os.geteuid()}. Run it with sudo."
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"an emulated cluster needs iproute2: got no {' and no '.join(missing)}."
    return None


def show(links: dict[str, Counters], machine: dict[str, float], broken_gates: list[str]) -> None:
    """Prints bytes and gates."""
    console = Console(stderr=True)
    table = Table(title="emulated cluster", caption="with headers; a port is its link's other end")
    for column in ("interface", "sent MB", "received MB", "dropped"):
        table.add_column(column, justify="left" if column == "interface" else "right")
    for name, counters in links.items():
        table.add_row(
            name,
            f"{counters.sent_nbytes / 1e6:.3f}",
            f"{counters.received_nbytes / 1e6:.3f}",
            str(counters.dropped),
        )
    console.print(table)
    console.print(
        f"{machine['seconds']:.1f} s, processors {machine['cpu']:.0%} busy, 1 of 100 sleeps at least "
        f"{machine['timer_p99_s'] * 1e3:.2f} ms late."
    )
    for gate in broken_gates:
        console.print(f"[bold]not valid:[/bold] {gate}", highlight=False)


def inside(arguments: argparse.Namespace) -> int:
    """Runs in isolation: makes the links, probes them, runs the ranks, and reports."""
    network = Network(arguments.nodes, arguments.rate, arguments.local_rate, arguments.delay / 1e3)
    if arguments.check:
        print("an emulated cluster can run here.")
        return 0
    probed = probe(network) if arguments.nodes > 1 else []
    if network.relay is not None:
        network.relay.start_over()
    before = network.counters()
    watch = Watch()
    with tempfile.TemporaryDirectory() as directory:
        logs = arguments.logs or Path(directory)
        logs.mkdir(parents=True, exist_ok=True)
        status = run_ranks(
            network, arguments.ranks_per_node, arguments.command, logs, arguments.timeout
        )
    machine = watch.stop()
    links = {name: now.since(before[name]) for name, now in network.counters().items()}
    limits = Limits(cpu=arguments.max_cpu, timer_s=arguments.max_late)
    relayed = None if network.relay is None else network.relay.stop()
    broken_gates = broken(limits, machine, probed, arguments.rate, links, relayed)
    show(links, machine, broken_gates)
    if arguments.json is not None:
        report = {
            "nodes": arguments.nodes,
            "ranks_per_node": arguments.ranks_per_node,
            "rate_bps": arguments.rate,
            "local_rate_bps": arguments.local_rate,
            "delay_ms": arguments.delay,
            "relay": relayed,
            "congestion_control": network.congestion_control(),
            "probe_Bps": probed,
            "links": {name: dataclasses.asdict(counters) for name, counters in links.items()},
            "machine": machine,
            "broken_gates": broken_gates,
            "command": arguments.command,
            "status": status,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return status or (GATE_BROKEN if arguments.strict and broken_gates else 0)


def main() -> int:
    """Gives the exit status."""
    arguments = parse_arguments()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return NOT_PERMITTED
    try:
        return run_isolated(lambda: inside(arguments))
    except NotPermitted as error:
        print(error, file=sys.stderr)
        return NOT_PERMITTED


if __name__ == "__main__":
    sys.exit(main())
