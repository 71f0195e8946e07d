"""What a user can look at: the start-up report, repr, the flight log as a trace."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
import time
from pathlib import Path

import pytest
import torch
from support.bodies import NUM_UNITS, Stack, make, on_ranks, shard, value_of
from torch import nn

import torch_mics as mics


@on_ranks()
def test_trace_has_a_bar_per_collective_in_a_row_per_group(world):
    model = shard(world, make(Stack))
    value_of(model, world.rank).backward()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.json")
        mics.export_chrome_trace(model, path)
        events = json.loads(path.read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    bars = [e for e in events if e["ph"] == "X"]
    log = mics.flight_log(model)
    assert set(rows.values()) <= {entry["group"] for entry in log}
    reductions = [b for b in bars if rows[b["tid"]].startswith("reduce/intra")][-NUM_UNITS:]
    units = {"Stack", "layers.0", "layers.1", "layers.2"}
    assert {bar["name"] for bar in reductions} == {f"reduce_scatter {unit}" for unit in units}
    for bar in bars:
        assert bar["pid"] == world.rank
        assert bar["dur"] >= 0
        assert bar["args"]["nbytes"] > 0
    # One communicator is one order: its bars do not overlap.
    for row in rows:
        times = [(bar["ts"], bar["ts"] + bar["dur"]) for bar in bars if bar["tid"] == row]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@on_ranks()
def test_start_up_report_is_logged_once_by_rank_0(world):
    records, logger = Records(), logging.getLogger("torch_mics")
    before = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    try:
        model = shard(world, make(Stack))
        for _ in range(2):
            value_of(model, world.rank).backward()
    finally:
        logger.removeHandler(records)
        logger.setLevel(before)
    reports = [text for text in records.texts if "partition groups" in text]
    assert reports == ([mics.describe(model)] if world.rank == 0 else [])
    text = mics.describe(model)
    assert f"{4 // world.partition_size} replicas over partition groups of" in text
    assert f"units: {NUM_UNITS} of " in text
    for name, carried in mics.backends(model).items():
        assert f"{name}: {carried}" in text
    memory = mics.memory(model)
    assert f"memory: {sum(memory.values()) - memory['unplanned']:,} bytes" in text


@on_ranks()
def test_exposed_time_is_what_a_late_rank_costs_the_others(world):
    model = shard(world, make(Stack))
    for _ in range(2):
        value_of(model, world.rank).backward()
    before = mics.exposed(model)
    world.gather(None)  # start together
    if world.rank == 1:
        time.sleep(3.0)
    start = time.monotonic()
    value_of(model, world.rank).backward()
    passed = time.monotonic() - start
    now = mics.exposed(model)
    assert set(now) == {"Stack", "layers.0", "layers.1", "layers.2"}
    spent = {
        kind: sum(now[unit][kind] - before[unit][kind] for unit in now)
        for kind in ("gather", "reduce")
    }
    assert spent["gather"] + spent["reduce"] <= passed
    if world.rank == 0:  # in every group with rank 1
        assert spent["gather"] > 1.0  # the others have come within 2 s of each other


@on_ranks()
def test_profiler_sees_launches_and_waits(world):
    model = shard(world, make(Stack))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        value_of(model, world.rank).backward()
    names = {event.key for event in profiler.key_averages()}
    assert "torch_mics: gather of layers.1" in names
    assert "torch_mics: reduction of layers.1" in names
    assert "torch_mics: launch of gather/intra of layers.1" in names
    assert "torch_mics: launch of reduce/intra of layers.1" in names


@on_ranks()
def test_another_order_of_units_is_told_once(world):
    records, logger = Records(), logging.getLogger("torch_mics")
    logger.addHandler(records)
    try:
        model = shard(world, make(Stack))
        for step in range(6):
            value_of(model, world.rank).backward()
            assert len(records.texts) == (0 if step < 4 else 1)
            if step == 2:
                model.layers = nn.ModuleList(reversed(list(model.layers)))
    finally:
        logger.removeHandler(records)
    assert "in another order" in records.texts[0]


@on_ranks()
def test_repr_says_how_a_unit_is_sharded(world):
    model = shard(world, make(Stack))
    variant = "hierarchical" if world.partition_size == 4 else "flat"
    said = f"mics: 6 parameters over {world.partition_size} of 4 ranks, {variant}"
    assert said in repr(model.layers[0])
    linear = mics.fully_shard(make(Stack).head, mesh=world.mesh)
    assert "in_features=6, out_features=5, bias=True, mics: 2 parameters" in repr(linear)
    with pytest.raises(TypeError, match="sharded"):
        mics.describe(make(Stack))


class Bare(nn.Module):
    """A root that holds nothing but units."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Holding(Bare):
    """The same with a parameter of its own, which is in use from the first layer to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


@on_ranks(cases=(Bare, Holding))
def test_what_comes_next_is_gathered_beside_compute(world, kind):
    model = shard(world, make(kind))
    asked: dict[str, set[str]] = {}  # units of this step's gathers when a layer begins to compute

    def gathers() -> dict[tuple[str, int], str]:
        log = mics.flight_log(model)
        return {(e["group"], e["number"]): e["unit"] for e in log if "gather" in e["group"]}

    for step in range(3):
        known = gathers() if step else {}
        hooks = []
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and step == 2:

                def note(*_, name=name, known=known):
                    new = gathers().items() - known.items()
                    asked[name] = {unit for (group, _), unit in new if "gather/intra" in group}

                hooks.append(layer.register_forward_pre_hook(note))
        model(torch.ones(2, 8)).sum().backward()
        for hook in hooks:
            hook.remove()
    for layer in range(3):
        assert f"layers.{layer + 1}" in asked[f"layers.{layer}"]
    assert (kind.__name__ in set(gathers().values())) == (kind is Holding)  # nothing for nothing
