"""The lines above a run's first step, and summary.json below its last."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.corpus import describe
from gpt.report import clean, format_count

if TYPE_CHECKING:
    from gpt.trainer import Trainer

__all__ = ["add_traffic", "header", "write_summary"]

Traffic = dict[str, dict[str, int]]


def header(trainer: Trainer, num_nodes: int, resumed: Path | None) -> list[str]:
    """Says what is trained, on what, in which groups."""
    config, cluster, data = trainer.config, trainer.cluster, trainer.data
    n, p = cluster.world_size, trainer.partition_size
    micro, batch = config.accumulation_steps, config.batch_size
    gather = {"True": "on", "False": "off"}.get(str(config.hierarchical_gather), "auto")
    lines = [
        f"model   GPT, {format_count(trainer.num_parameters)} parameters: {config.layers} layers, "
        f"{config.heads} heads, width {config.width}, sequence length {config.sequence_length}",
        f"data    {describe(config.data)}: {format_count(len(data.train))} training and "
        f"{format_count(len(data.validation))} validation tokens, "
        f"{config.tokenizer} vocabulary of {data.tokenizer.vocab_size}",
        f"batch   {batch} sequences x {n} ranks x {micro} micro-steps = {batch * n * micro} "
        f"sequences, {format_count(trainer.tokens_per_step)} tokens per step",
        f"groups  n={n} ranks on {num_nodes} nodes, p={p} ranks per partition group, "
        f"{n // p} replicas, hierarchical gather {gather}",
        f"device  {cluster.device.type}, {config.precision}",
    ]
    if resumed is not None:
        lines.append(f"resume  {resumed}, after step {trainer.progress.step}")
    return lines


def add_traffic(per_rank: Iterable[Traffic]) -> Traffic:
    """Adds the ranks' counters, communicator by communicator."""
    total: Traffic = {}
    for traffic in per_rank:
        for name, counters in traffic.items():
            sums = total.setdefault(name, {})
            for counter, value in counters.items():
                sums[counter] = sums.get(counter, 0) + value
    return total


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write_summary(
    path: Path,
    trainer: Trainer,
    results: Mapping[str, Any],
    traffic: Traffic,
    *,
    num_nodes: int,
    num_hosts: int,
    seconds: float,
) -> None:
    """Writes summary.json. Rank 0 calls it."""
    distributions = ("torch", "torch-mics", "numpy", "tokenizers")
    summary = {
        **results,
        "step": trainer.progress.step,
        "num_parameters": trainer.num_parameters,
        "world_size": trainer.cluster.world_size,
        "partition_size": trainer.partition_size,
        "replication_size": trainer.cluster.world_size // trainer.partition_size,
        "num_nodes": num_nodes,
        "num_hosts": num_hosts,
        "device": trainer.cluster.device.type,
        "tokens_per_step": trainer.tokens_per_step,
        "training_seconds": trainer.progress.seconds,
        "wall_seconds": seconds,
        "traffic": traffic,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in distributions},
        },
        "config": asdict(trainer.config),
    }
    path.write_text(json.dumps(clean(summary), indent=2) + "\n")
