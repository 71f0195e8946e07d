"""The last collectives of a rank: as a list, and as a trace to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from torch_mics._training import check_sharded

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
    unit = check_sharded(model, "flight_log")._unit
    if unit.context is None or unit.context.flight_log is None:
        return []
    return [
        {field: getattr(operation, field) for field in _FIELDS}
        for operation in unit.context.flight_log.operations()
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
