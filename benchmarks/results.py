"""The page of results: tables and plots of what run_all.py has measured."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

TITLES = {
    "one_node": "Groups of one node (p = 2), 4 nodes x 2 ranks",
    "two_nodes": "Groups of two nodes (p = 4), 4 nodes x 2 ranks",
    "all_nodes": "One group over all nodes (p = 8), 4 nodes x 2 ranks",
    "accumulation_1": "One micro-step",
    "accumulation_2": "Two micro-steps",
    "accumulation_8": "Eight micro-steps",
    "weak_scaling_1": "Weak scaling, layers that wait: 1 node x 4 ranks",
    "weak_scaling_2": "Weak scaling, layers that wait: 2 nodes x 4 ranks",
    "weak_scaling_4": "Weak scaling, layers that wait: 4 nodes x 4 ranks",
    "weak_scaling_8": "Weak scaling, layers that wait: 8 nodes x 4 ranks",
}
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
    """One contestant of one comparison, all launches together."""

    name: str
    seconds: float
    ratio: float
    cpu: float
    link_nbytes: float | None
    local_nbytes: float | None
    counted_nbytes: int
    parity: str


@dataclasses.dataclass
class Comparison:
    """All launches of one cell."""

    name: str
    base: str
    lines: list[Line]
    launches: list[dict[str, Any]]
    gates: list[str]
    command: str


def _load(data: Path, name: str) -> Comparison | None:
    files = sorted(f for f in data.glob(f"{name}-*.json") if not f.name.endswith(".cluster.json"))
    if not files:
        return None
    launches = [json.loads(f.read_text()) for f in files]
    clusters = [json.loads(f.with_suffix(".cluster.json").read_text()) for f in files]
    base = launches[0]["options"]["base"]
    lines = []
    for contestant in launches[0]["records"]:
        records = [launch["records"][contestant] for launch in launches]
        bases = [launch["records"][base] for launch in launches]
        seconds = [s for record in records for s in record["seconds"]]
        others = [s for record in bases for s in record["seconds"]]
        links = [r["link_nbytes"] for r in records if r["link_nbytes"] is not None]
        local = [r["loopback_nbytes"] for r in records if r["loopback_nbytes"] is not None]
        parities = {record["parity"] for record in records}
        lines.append(
            Line(
                name=contestant,
                seconds=statistics.median(seconds),
                ratio=statistics.median(a / b for a, b in zip(seconds, others, strict=True)),
                cpu=statistics.median(s for record in records for s in record["cpu"]),
                link_nbytes=statistics.median(links) if links else None,
                local_nbytes=statistics.median(local) if local else None,
                counted_nbytes=records[0]["counted_inter_nbytes"],
                parity=parities.pop() if len(parities) == 1 else "differs between launches",
            )
        )
    gates = sorted({gate for cluster in clusters for gate in cluster["broken_gates"]})
    command = _shown(clusters[0], launches[0])
    return Comparison(name, base, lines, launches, gates, command)


def portable(command: list[str]) -> list[str]:
    """A launch's command without what belongs to the machine: interpreter, folders, output files."""
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


def _megabytes(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.2f}"


def _table(comparison: Comparison) -> list[str]:
    text = [
        f"| Strategy | Seconds | Over {comparison.base} | CPU s "
        "| Link MB | Counted MB | Local MB | Parity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in comparison.lines:
        counted = _megabytes(line.counted_nbytes) if line.counted_nbytes else ""
        text.append(
            f"| {line.name} | {line.seconds:.3f} | {line.ratio:.3f} | {line.cpu:.2f} | "
            f"{_megabytes(line.link_nbytes)} | {counted} | {_megabytes(line.local_nbytes)} | "
            f"{line.parity} |"
        )
    return text


def _plot(comparison: Comparison, file: Path) -> None:
    """Bars of step time and of bytes over a node's link."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "torch_mics"  # the same numbers give the same file
    from matplotlib import pyplot as plt

    names = [line.name for line in comparison.lines][::-1]
    colours = ["#3b6ea5" if name.startswith("ours") else "#b0b0b0" for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.45 * len(names) + 1.2), sharey=True)
    left.barh(names, [line.ratio for line in comparison.lines][::-1], color=colours)
    left.set_xlabel(f"step time over {comparison.base}")
    links = [(line.link_nbytes or 0) / 1e6 for line in comparison.lines][::-1]
    right.barh(names, links, color=colours)
    right.set_xlabel("MB over a node's link per step")
    figure.suptitle(TITLES[comparison.name])
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _plot_weak(found: dict[int, Comparison], file: Path) -> None:
    """Efficiency over the number of ranks: groups of a node, and one group over all."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "torch_mics"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for label, name_of in (
        ("groups of one node", lambda nodes: "ours@4"),
        ("one group, two hops", lambda nodes: f"ours@{4 * nodes}"),
        ("one group, one hop", lambda nodes: "ours@4" if nodes == 1 else f"ours_flat@{4 * nodes}"),
    ):
        points = efficiencies(found, name_of)
        axes.plot([4 * n for n in points], [100 * e for e in points.values()], "o-", label=label)
    axes.set_xlabel("ranks")
    axes.set_ylabel("% of the throughput per rank on one node")
    axes.set_ylim(0, 105)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def efficiencies(found: dict[int, Comparison], name_of: Any) -> dict[int, float]:
    """By number of nodes: step time on one node over that on so many."""
    seconds = {}
    for nodes, comparison in sorted(found.items()):
        by_name = {line.name: line.seconds for line in comparison.lines}
        if name_of(nodes) in by_name:
            seconds[nodes] = by_name[name_of(nodes)]
    return {nodes: seconds[1] / own for nodes, own in seconds.items()} if 1 in seconds else {}


def render(out: Path) -> str:
    """Writes OUT/README.md and its plots, and says what was written."""
    comparisons = [c for name in TITLES if (c := _load(out / "data", name)) is not None]
    if not comparisons:
        return f"nothing to render: no numbers in {out / 'data'}."
    text = ["# Results", "", "Made by `python benchmarks/run_all.py`.", "", LIMITS]
    for comparison in comparisons:
        versions = comparison.launches[0]["versions"]
        steps = sum(
            len(launch["records"][comparison.base]["seconds"]) for launch in comparison.launches
        )
        text += [f"## {TITLES[comparison.name]}", "", *_table(comparison), ""]
        if not comparison.name.startswith("weak"):
            _plot(comparison, out / f"{comparison.name}.svg")
            text += [f"![step time and bytes]({comparison.name}.svg)", ""]
        text += [
            f"Launches: {len(comparison.launches)}, timed steps in all: {steps}. Commit "
            f"{versions['commit']}, torch {versions['torch']}, {versions['cores']} cores, "
            f"Linux {versions['kernel']}, {versions.get('date', 'no date')}.",
            "",
            *([f"- **Not valid:** {gate}." for gate in comparison.gates] or ["All gates hold."]),
            "",
            "```bash",
            comparison.command,
            "```",
            "",
        ]
    weak = {
        int(c.name.rpartition("_")[2]): c for c in comparisons if c.name.startswith("weak_scaling_")
    }
    if len(weak) > 1:
        _plot_weak(weak, out / "weak_scaling.svg")
        text += ["## Weak scaling", "", "![efficiency](weak_scaling.svg)", ""]
    (out / "README.md").write_text("\n".join(text))
    return f"wrote {out / 'README.md'}: {len(comparisons)} comparisons."
