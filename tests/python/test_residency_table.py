"""The table of settings in docs/training.md is measured, row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics

ROOT = Path(__file__).resolve().parents[2]

TABLE: dict[str, tuple[int | str, bool, dict[str, Any]]] = {
    "ZeRO-3": (4, False, {}),
    "MiCS": (4, True, {}),
    "hpZ": (4, True, {"reshard_after_forward": 2}),
    "block": (4, True, {"keep_between_microsteps": "block"}),
    "block, both ways": (4, True, {"keep_between_microsteps": "block", "accumulate": "block"}),
    "ZeRO-2": (4, True, {"keep_between_microsteps": "full"}),
    "HSDP, MiCS inside a node": (2, True, {}),
    "DDP-like": (1, True, {}),
}


def _measure(rank: int, name: str) -> tuple[int, int]:
    shard_size, hierarchical, options = TABLE[name]
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    mics.shard_model(
        model,
        units={nn.Linear},
        shard_size=shard_size,
        hierarchical_gather=hierarchical,
        **options,
    )
    for _ in range(2):
        before = mics.traffic(model)
        for micro_step in range(4):
            with mics.microbatch(model, is_last=micro_step == 3):
                model(torch.ones(2, 64)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.zero_grad()
    sent = {name: c["sent_inter_nbytes"] for name, c in mics.traffic(model).items()}
    across = sum(sent[n] - before[n]["sent_inter_nbytes"] for n in sent if n != "control")
    states = sum(2 * p.to_local().nbytes for p in model.parameters())  # weights and gradients
    return across, states + sum(mics.memory(model).values())


def table_rows() -> dict[str, tuple[int, int]]:
    text = (ROOT / "docs/training.md").read_text().partition("<!-- table: residency -->")[2]
    cells = re.findall(r"^\| ([^|`]+?) \|.*\| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return {name: (int(across), int(memory)) for name, across, memory in cells}


def test_table_of_the_docs_is_measured():
    counted = {}
    for name in TABLE:
        ranks = run_ranks(4, _measure, name, ranks_per_node=2)
        counted[name] = (sum(across for across, _ in ranks[:2]), ranks[0][1])
    assert counted == table_rows()
