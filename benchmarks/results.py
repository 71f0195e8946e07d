"""The page of results: tables and plots of what run_all.py has measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import plots
from prediction import predicted_seconds

TITLES = {
    "one_node": "Groups of one node (p = 2), 4 nodes x 2 ranks",
    "two_nodes": "Groups of two nodes (p = 4), 4 nodes x 2 ranks",
    "all_nodes": "One group over all nodes (p = 8), 4 nodes x 2 ranks",
    "accumulation_1": "One micro-step, 4 nodes x 2 ranks",
    "accumulation_2": "Two micro-steps, 4 nodes x 2 ranks",
    "accumulation_4": "Four micro-steps, 4 nodes x 2 ranks",
    "accumulation_8": "Eight micro-steps, 4 nodes x 2 ranks",
    "weak_scaling_1": "Layers that wait: 1 node x 4 ranks",
    "weak_scaling_2": "Layers that wait: 2 nodes x 4 ranks",
    "weak_scaling_4": "Layers that wait: 4 nodes x 4 ranks",
    "weak_scaling_8": "Layers that wait: 8 nodes x 4 ranks",
}
CALIBRATION = "calibration"  # of the cluster of the weak scaling, beside the launches
LIMITS = """\
What these numbers can say: bytes over each link, and step times where links are the bottleneck, of
real processes with real collectives that take turns on one machine. What they cannot: anything
about a GPU, NVLink or EFA, their latency, or many cores. Peers move what stays inside a node over
the loopback by Gloo, which is work for the processors here; where these were the bottleneck the
machine was not quick enough for the links, and the launch is marked. Ratios are medians of steps in
the same turn; seconds are only good for ratios.
"""


@dataclasses.dataclass
class Line:
    """One contestant of one comparison, all launches together; numbers are None where it did not run."""

    name: str
    seconds: float | None
    ratio: float | None
    cpu: float | None
    link_nbytes: float | None
    local_nbytes: float | None
    counted_nbytes: int
    verdict: str  # parity, or why it did not run


@dataclasses.dataclass
class Comparison:
    """All launches of one cell."""

    name: str
    base: str
    lines: list[Line]
    launches: list[dict[str, Any]]
    gates: list[str]
    command: str

    def line(self, name: str) -> Line | None:
        """The line of a contestant that ran."""
        return next((x for x in self.lines if x.name == name and x.seconds is not None), None)


def load(data: Path, name: str) -> Comparison | None:
    """Joins the launches of a cell."""
    files = sorted(f for f in data.glob(f"{name}-*.json") if not f.name.endswith(".cluster.json"))
    if not files:
        return None
    launches = [json.loads(f.read_text()) for f in files]
    clusters = [json.loads(f.with_suffix(".cluster.json").read_text()) for f in files]
    base = launches[0]["options"]["base"]
    lines = [_line(contestant, base, launches) for contestant in launches[0]["records"]]
    gates = sorted({gate for cluster in clusters for gate in cluster["broken_gates"]})
    return Comparison(name, base, lines, launches, gates, _shown(clusters[0], launches[0]))


def _line(contestant: str, base: str, launches: list[dict[str, Any]]) -> Line:
    records = [launch["records"][contestant] for launch in launches]
    absent = next((r["why_not"] for r in records if r.get("why_not")), "")
    if absent:
        return Line(contestant, None, None, None, None, None, 0, f"did not run: {absent}")
    seconds = [s for record in records for s in record["seconds"]]
    others = [s for launch in launches for s in launch["records"][base]["seconds"]]
    parities = {record["parity"] for record in records}

    def median(field: str) -> float | None:
        values = [record[field] for record in records if record[field] is not None]
        return statistics.median(values) if values else None

    return Line(
        name=contestant,
        seconds=statistics.median(seconds),
        ratio=statistics.median(a / b for a, b in zip(seconds, others, strict=True)),
        cpu=statistics.median(s for record in records for s in record["cpu"]),
        link_nbytes=median("link_nbytes"),
        local_nbytes=median("loopback_nbytes"),
        counted_nbytes=records[0]["counted_inter_nbytes"],
        verdict=parities.pop() if len(parities) == 1 else "differs between launches",
    )


def portable(command: list[str]) -> list[str]:
    """A launch's command without the parts that depend on the machine: interpreter, folders, files."""
    words = ["python", "benchmarks/train_bench", *command[2:]]
    if "--json" in words:
        place = words.index("--json")
        del words[place : place + 2]
    return words


def _shown(cluster: dict[str, Any], launch: dict[str, Any]) -> str:
    """The whole command, to be run from the root of the checkout."""
    return (
        f"python benchmarks/emulated_cluster --nodes {cluster['nodes']} "
        f"--ranks-per-node {launch['ranks_per_node']} "
        f"--rate {cluster['rate_bps'] // 1_000_000}mbit -- {' '.join(portable(cluster['command']))}"
    )


# --- one comparison -------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def _table(comparison: Comparison) -> list[str]:
    text = [
        f"| Strategy | Seconds | Over {comparison.base} | CPU s "
        "| Link MB | Counted MB | Local MB | Parity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in comparison.lines:
        cells = (
            *(line.name, _number(line.seconds), _number(line.ratio), _number(line.cpu, 2)),
            *(_number(line.link_nbytes, 2, 1e6), _number(line.counted_nbytes or None, 2, 1e6)),
            *(_number(line.local_nbytes, 2, 1e6), line.verdict),
        )
        text.append(f"| {' | '.join(cells)} |")
    return text


def _section(comparison: Comparison, out: Path) -> list[str]:
    versions = comparison.launches[0]["versions"]
    steps = sum(
        len(launch["records"][comparison.base]["seconds"]) for launch in comparison.launches
    )
    text = [f"## {TITLES[comparison.name]}", "", *_table(comparison), ""]
    if not comparison.name.startswith("weak"):
        ran = [line for line in comparison.lines if line.seconds is not None]
        columns = {
            f"step time over {comparison.base}": [line.ratio or 0 for line in ran],
            "MB over a node's link per step": [(line.link_nbytes or 0) / 1e6 for line in ran],
        }
        title = TITLES[comparison.name]
        plots.bars(title, [line.name for line in ran], columns, out / f"{comparison.name}.svg")
        text += [f"![step time and bytes]({comparison.name}.svg)", ""]
    peers = f", DeepSpeed {versions['deepspeed']}" if versions.get("deepspeed") else ""
    return [
        *text,
        f"Launches: {len(comparison.launches)}, timed steps in all: {steps}. Commit "
        f"{versions['commit']}, torch {versions['torch']}{peers}, {versions['cores']} cores, "
        f"Linux {versions['kernel']}, {versions.get('date', 'no date')}.",
        "",
        *([f"- **Not valid:** {gate}." for gate in comparison.gates] or ["All gates hold."]),
        "",
        "```bash",
        comparison.command,
        "```",
        "",
    ]


# --- over several comparisons ---------------------------------------------------------------------


def _losses(comparison: Comparison, out: Path) -> list[str]:
    launch = comparison.launches[0]
    found = {
        line.name: launch["records"][line.name]["losses"]
        for line in comparison.lines
        if line.seconds is not None and line.name != "none"
    }
    plots.losses(found, launch["reference_losses"], out / "losses.svg")
    return [
        "## Losses",
        "",
        f"Of the first launch of '{TITLES[comparison.name]}': every contestant over one process that sees "
        "all batches.",
        "",
        "![losses](losses.svg)",
        "",
    ]


def _accumulation(found: dict[int, Comparison], out: Path) -> list[str]:
    """The gain of synchronising replicas once per step, by number of micro-steps."""
    pairs = {
        "ours, replicas in every micro-step": "ours_each@2",
        "HSDP, replicas in every micro-step": "hsdp@2",
        "HSDP, deferred": "hsdp_deferred@2",
    }
    gains: dict[str, dict[float, float]] = {label: {} for label in pairs}
    for micro_steps, comparison in sorted(found.items()):
        for label, name in pairs.items():
            paired = [
                a / b
                for launch in comparison.launches
                for a, b in zip(
                    launch["records"][name]["seconds"],
                    launch["records"]["ours@2"]["seconds"],
                    strict=True,
                )
            ]
            gains[label][micro_steps] = statistics.median(paired)
    plots.curves(
        gains, out / "accumulation.svg", x="micro-steps", y="step time over ours@2", ylim=(0, None)
    )
    counts = sorted(found)
    text = [
        "## Accumulation",
        "",
        "Step time over that of ours@2, which synchronises replicas in the last micro-step only.",
        "",
        f"| | {' | '.join(f's = {n}' for n in counts)} |",
        f"|---|{'---|' * len(counts)}",
    ]
    for label, points in gains.items():
        text.append(f"| {label} | {' | '.join(f'{points[n]:.2f}' for n in counts)} |")
    return [*text, "", "![gain over the number of micro-steps](accumulation.svg)", ""]


WEAK = {
    "groups of one node": "ours@4",
    "one group, two hops": "ours@{}",
    "one group, one hop": "ours_flat@{}",
}


def efficiencies(seconds: dict[int, dict[str, float]]) -> dict[str, dict[float, float]]:
    """By curve and number of ranks: throughput per rank over that of one node.

    Seconds are relative to the compute alone in the same turns, so that the slowness of a machine with
    many processes does not count.
    """
    result: dict[str, dict[float, float]] = {}
    for label, pattern in WEAK.items():
        points = {}
        for nodes, by_name in sorted(seconds.items()):
            name = pattern.format(4 * nodes) if nodes > 1 else "ours@4"
            if name in by_name:
                points[4 * nodes] = seconds[1]["ours@4"] / by_name[name]
        result[label] = points
    return result


def _weak_scaling(found: dict[int, Comparison], calibration: Path, out: Path) -> list[str]:
    measured: dict[int, dict[str, float]] = {}
    predicted: dict[int, dict[str, float]] = {}
    rows, errors = [], []
    for nodes, comparison in sorted(found.items()):
        measured[nodes], predicted[nodes] = {}, {}
        for line in comparison.lines:
            if line.seconds is None or line.ratio is None:
                continue
            measured[nodes][line.name] = line.ratio
            seconds = predicted_seconds(calibration, comparison.launches[0], line.name)
            alone = predicted_seconds(calibration, comparison.launches[0], comparison.base)
            if seconds is None or alone is None:
                continue
            predicted[nodes][line.name] = seconds / alone
            error = seconds / alone / line.ratio - 1
            if line.name != comparison.base:
                errors.append(abs(error))
            rows.append(
                f"| {nodes} x 4 | {line.name} | {line.seconds:.2f} | {seconds:.2f} | {line.ratio:.3f} | "
                f"{seconds / alone:.3f} | {error:+.1%} |"
            )
    text = [
        "## Weak scaling",
        "",
        "Layers wait as BERT 10B's compute on p3dn, in the ratio of its network to it. Predictions are the "
        "planner's, from what `torch_mics calibrate` measured of collectives on the same emulated cluster; "
        "they saw no training. Errors are of step times over those of the compute alone.",
        "",
        "| Nodes | Strategy | Seconds | Predicted | Over none | Predicted | Error |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Mean error: {statistics.mean(errors):.1%}, worst {max(errors):.1%}.",
        "",
    ]
    if 1 in found:
        curves = {label: _percent(points) for label, points in efficiencies(measured).items()}
        dashed = {label: _percent(points) for label, points in efficiencies(predicted).items()}
        plots.curves(
            curves,
            out / "weak_scaling.svg",
            x="ranks",
            y="% of the throughput per rank on one node",
            predicted=dashed,
            ylim=(0, 105),
        )
        ends = ", ".join(f"{label} {points[max(points)]:.1f}%" for label, points in curves.items())
        text += [f"Efficiency on {max(found)} nodes: {ends}.", ""]
        text += ["![efficiency](weak_scaling.svg)", ""]
    return text + _partition_sweep(max(found), found[max(found)], predicted[max(found)], out)


def _percent(points: dict[float, float]) -> dict[float, float]:
    return {x: 100 * y for x, y in points.items()}


def _partition_sweep(
    nodes: int, comparison: Comparison, predicted: dict[str, float], out: Path
) -> list[str]:
    """Throughput over the partition size, on the most nodes."""
    ratios = {
        float(line.name.partition("@")[2]): line.ratio
        for line in comparison.lines
        if line.name.startswith("ours@") and line.ratio is not None
    }
    if len(ratios) < 3:
        return []
    points = {p: 100 / ratios[p] for p in sorted(ratios)}
    dashed = {p: 100 / predicted[f"ours@{p:.0f}"] for p in points}
    plots.curves(
        {"measured": points},
        out / "partition_sweep.svg",
        x="partition size",
        y="% of the compute's throughput",
        predicted={"measured": dashed},
        ylim=(0, 105),
    )
    return [
        "## Partition size",
        "",
        f"The smallest partition is the quickest: {nodes} nodes x 4 ranks, the same launch.",
        "",
        "![throughput over the partition size](partition_sweep.svg)",
        "",
    ]


def _numbered(comparisons: list[Comparison], prefix: str) -> dict[int, Comparison]:
    return {
        int(c.name.rpartition("_")[2]): c for c in comparisons if c.name.startswith(f"{prefix}_")
    }


def render(out: Path) -> str:
    """Writes OUT/README.md and its plots, and says what was written."""
    data = out / "data"
    comparisons = [c for name in TITLES if (c := load(data, name)) is not None]
    if not comparisons:
        return f"nothing to render: no numbers in {data}."
    text = ["# Results", "", "Made by `python benchmarks/run_all.py`.", "", LIMITS]
    shown = [c for c in comparisons if not c.name.startswith(("weak_scaling", "accumulation"))]
    for comparison in shown:
        text += _section(comparison, out)
    if shown and shown[0].launches[0]["reference_losses"] is not None:
        text += _losses(shown[0], out)
    accumulation = _numbered(comparisons, "accumulation")
    if len(accumulation) > 1:
        text += _accumulation(accumulation, out)
    weak, calibration = _numbered(comparisons, "weak_scaling"), data / f"{CALIBRATION}.json"
    if len(weak) > 1 and calibration.exists():
        text += _weak_scaling(weak, calibration, out)
    for comparison in comparisons:
        if comparison not in shown:
            text += _section(comparison, out)
    (out / "README.md").write_text("\n".join(text))
    return f"wrote {out / 'README.md'}: {len(comparisons)} comparisons."
