"""The last collectives of a rank: as a list, as a trace, and for torch's flight recorder tools."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from torch_mics._context import context_of
from torch_mics._module import sharded_unit

_FIELDS = (
    "number",
    "group",
    "op",
    "unit",
    "nbytes",
    "state",
    "issued_at",
    "started_at",
    "ended_at",
)


def flight_log(model: nn.Module) -> list[dict[str, Any]]:
    """Gives this rank's last collectives, oldest first; at most 256, of all models of the session.

    Keys: number (in its group, from 1), group (name and world ranks), op, unit, nbytes (of the larger
    side), state ("issued", "started", "finished" or "failed"), issued_at, started_at and ended_at (seconds
    as of time.monotonic(), None before). Empty in a world of one.
    """
    context = context_of(sharded_unit(model, "flight_log"))
    if context is None or context.flight_log is None:
        return []
    return [
        {field: getattr(operation, field) for field in _FIELDS}
        for operation in context.flight_log.operations()
    ]


def export_chrome_trace(model: nn.Module, path: str | Path) -> None:
    """Writes the flight log as a trace that Perfetto and chrome://tracing show: a row per group.

    Each collective is a bar from its start to its end, with its bytes and the time it was queued. Ranks of
    one host have one clock, so their files can be looked at together.

    Args:
        model: a sharded module.
        path: of the JSON file; every rank writes its own.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    log = [entry for entry in flight_log(model) if entry["ended_at"] is not None]
    rows = {group: row for row, group in enumerate(dict.fromkeys(e["group"] for e in log))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"world_rank {rank}"}}
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": group}}
        for group, row in rows.items()
    ]
    events += [
        {
            "ph": "X",
            "name": f"{entry['op']} {entry['unit']}".rstrip(),
            "pid": rank,
            "tid": rows[entry["group"]],
            "ts": entry["started_at"] * 1e6,
            "dur": (entry["ended_at"] - entry["started_at"]) * 1e6,
            "args": {
                "number": entry["number"],
                "nbytes": entry["nbytes"],
                "state": entry["state"],
                "queued_us": (entry["started_at"] - entry["issued_at"]) * 1e6,
            },
        }
        for entry in log
    ]
    Path(path).write_text(json.dumps({"traceEvents": events}) + "\n")


# The form of torch 2.11's own recorder.
_RECORDER_VERSION = "2.10"
_RECORDER_STATES = {
    "issued": "scheduled",
    "started": "started",
    "finished": "completed",
    "failed": "started",  # it did not complete
}


def export_flight_recorder(model: nn.Module, folder: str | Path) -> Path:
    """Writes the flight log as torch's flight recorder does, for `torch.distributed.flight_recorder`.

    Every rank writes a file of its own, also after a collective failed. The analyser matches the files of
    all ranks and names the first collective in which they differ, and the ranks that are missing. Our log
    has no shapes: sizes are numbers of bytes, and a launch is one entry for all its tensors.

    Args:
        model: a sharded module.
        folder: must exist.

    Returns:
        The file, torch_mics_rank_<world rank>.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    to_epoch = time.time_ns() - time.monotonic_ns()

    def nanoseconds(seconds: float | None) -> int | None:
        return None if seconds is None else int(seconds * 1e9) + to_epoch

    groups: dict[str, dict[str, str]] = {}
    entries = []
    for record_id, entry in enumerate(flight_log(model)):
        group = entry["group"]  # "gather/rail [0 2]": a name may have several groups
        name, _, members = group.rpartition(" [")
        ranks = members.rstrip("]").split(" ")
        groups[group] = {"name": group, "desc": name, "ranks": f"[{', '.join(ranks)}]"}
        whole, piece = [entry["nbytes"]], [entry["nbytes"] // len(ranks)]
        is_gather, is_scatter = entry["op"] == "all_gather", entry["op"] == "reduce_scatter"
        entries.append(
            {
                "record_id": record_id,
                "pg_id": list(groups).index(group),
                "process_group": (group, name),
                "collective_seq_id": entry["number"],
                "p2p_seq_id": 0,
                "op_id": entry["number"],
                # The analyser accepts only names with "nccl:", whatever carried the operation.
                "profiling_name": f"nccl:{entry['op']}",
                "is_p2p": False,
                "input_sizes": [piece if is_gather else whole],
                "input_dtypes": ["Byte"],
                "output_sizes": [piece if is_scatter else whole],
                "output_dtypes": ["Byte"],
                "state": _RECORDER_STATES[entry["state"]],
                "time_created_ns": nanoseconds(entry["issued_at"]),
                "time_discovered_started_ns": nanoseconds(entry["started_at"]),
                "time_discovered_completed_ns": nanoseconds(entry["ended_at"]),
                "retired": entry["state"] == "finished",
                "timeout_ms": 0,
                "frames": [{"name": f"unit {entry['unit']}", "filename": "torch_mics", "line": 0}],
            }
        )
    path = Path(folder) / f"torch_mics_rank_{rank}"
    with path.open("wb") as file:
        pickle.dump({"version": _RECORDER_VERSION, "pg_config": groups, "entries": entries}, file)
    return path
