"""No two streams use the same memory at once: the race detector over every access of whole steps.

The model trains on the production NCCL code over fakes. What its operators, the engine, collectives and the
optimizer read, write, allocate and free enters one trace; only events order it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.bodies import RANKS_PER_NODE, World
from support.fakes import needs_fakes
from support.models import batch, loss, make_gpt
from support.programs import RandomProgram
from support.races import watched, watched_over_fakes
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics
from torch_mics import _C

STEPS = 3
MICRO_STEPS = 2
BF16 = mics.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
Defects = dict[str, tuple[int, int]]  # noticed and all, by kind
Options = dict[str, Any]


def _far_prefetch(model: Any) -> None:
    """More units in flight than the plan has slots."""
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 4])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - 3) : index][::-1])


def _unshard_all(model: Any) -> None:
    for block in model.blocks:
        block.unshard()


def _in_bf16(model: nn.Module) -> None:
    model.to(torch.bfloat16)


# What is done with a model: before it is sharded, after it, and before each forward.
BEFORE: dict[str, Callable[[nn.Module], None]] = {"bf16 model": _in_bf16}
AFTER: dict[str, Callable[[Any], None]] = {"far prefetch": _far_prefetch}
EACH: dict[str, Callable[[Any], None]] = {"unsharded by hand": _unshard_all}


def _make_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "mics":
        return mics.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **{kind: True})


def _train(rank: int, options: Options, habits: tuple[str, ...]) -> None:
    model: Any = make_gpt(tied=True)
    for habit in habits:
        BEFORE.get(habit, lambda _model: None)(model)
    model = mics.shard_model(model, **options)
    for habit in habits:
        AFTER.get(habit, lambda _model: None)(model)
    kinds = [kind for kind in ("foreach", "fused") if kind in habits] or ["mics"]
    optimizer = _make_optimizer(model, kinds[0])
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            with mics.microbatch(model, is_last=micro_step == MICRO_STEPS - 1):
                for habit in habits:
                    EACH.get(habit, lambda _model: None)(model)
                (loss(model, batch(step, micro_step, rank)) / MICRO_STEPS).backward()
        mics.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none="kept gradients" not in habits)
        if "evaluated" in habits:
            with torch.no_grad():
                model(batch(step, 0, rank)[0])


def _find_races(
    rank: int, options: Options, habits: tuple[str, ...], strides: dict[str, int]
) -> tuple[list[str], int, Defects]:
    """Gives races, the number of accesses, and which defects are noticed: every `strides`-th of a kind."""
    with watched_over_fakes(rank, keeps_trace=bool(strides)) as detector:
        _train(rank, options, habits)
    defects = {}
    for kind, stride in strides.items() if rank == 0 else ():
        for found, counts in detector.put_defects(stride, kind).items():
            defects[found] = (counts.noticed, counts.all)
    return detector.races, detector.num_accesses, defects


def _expect_none(size: int, per_node: int, options: Options, *habits: str) -> None:
    for races, num_accesses, _ in run_ranks(
        size, _find_races, options, habits, {}, ranks_per_node=per_node
    ):
        assert races == []
        assert num_accesses > 1000


CASES: list[tuple[int, int, Options, tuple[str, ...]]] = [
    (2, 2, {"shard_size": 2}, ("fused",)),
    (2, 1, {"shard_size": 1}, ("foreach", "kept gradients")),
    (4, 2, {"shard_size": 4}, ("mics", "evaluated")),
    (4, 2, {"shard_size": 4}, ("foreach", "far prefetch")),
    (4, 2, {"shard_size": 4}, ("fused", "unsharded by hand")),
    (4, 2, {"shard_size": 2, "mp_policy": BF16}, ("foreach", "kept gradients")),
    (4, 2, {"shard_size": 4, "hierarchical_gather": False}, ("fused", "evaluated")),
    (4, 2, {"shard_size": 4, "reshard_after_forward": False}, ("foreach", "evaluated")),
    (4, 2, {"shard_size": 4, "keep_between_microsteps": "full"}, ("fused", "evaluated")),
    (
        4,
        2,
        {"shard_size": 4, "keep_between_microsteps": "block", "accumulate": "block"},
        ("mics", "kept gradients"),
    ),
    (4, 2, {"shard_size": 4, "accumulate": "block", "mp_policy": BF16}, ("bf16 model", "foreach")),
    (4, 4, {"shard_size": 2}, ("bf16 model", "fused", "kept gradients")),
]


@needs_fakes
@pytest.mark.parametrize(("size", "per_node", "options", "habits"), CASES)
def test_training_has_no_race(
    size: int, per_node: int, options: Options, habits: tuple[str, ...]
) -> None:
    _expect_none(size, per_node, options, *habits)


def _run_program(rank: int, shard_size: int, seed: int) -> tuple[list[str], int]:
    with watched_over_fakes(rank) as detector:
        mesh = mics.init_mesh(shard_size, device_type="cpu", gpus_per_node=RANKS_PER_NODE)
        RandomProgram(World(rank, mesh), seed).run()
    return detector.races, detector.num_accesses


def _programs() -> list[tuple[int, int]]:
    """Six programs; 80 with MICS_WIDE=1."""
    seeds = range(3000, 3040) if "MICS_WIDE" in os.environ else range(3000, 3003)
    return [(shard_size, seed) for shard_size in (4, 2) for seed in seeds]


@needs_fakes
@pytest.mark.parametrize(("shard_size", "seed"), _programs())
def test_random_programs_have_no_race(shard_size: int, seed: int) -> None:
    for races, num_accesses in run_ranks(4, _run_program, shard_size, seed):
        assert races == []
        assert num_accesses > 100


# The faults that were in the library once, as defects of a trace, and a case in which each is noticed. A
# record that is left out stands for a slot whose event was never recorded, a late write for memory that is
# filled after the event which orders the fill. A gradient that comes late after hop 2 of its block is in
# schedule_checker_test.cc, where the engine can be brought to it.
FORMER_FAULTS = {
    "no edge from compute to the next gather": (
        "gather_rail does not wait for compute",
        {"shard_size": 4},
        ("fused",),
    ),
    "no edge from compute to the next gather of one hop": (
        "gather_intra does not wait for compute",
        {"shard_size": 2},
        ("foreach",),
    ),
    "no event of a grown slot": (
        "compute does not record",
        {"shard_size": 4},
        ("foreach", "far prefetch"),
    ),
    "a fill after the event that orders it": (
        "compute writes late",
        {"shard_size": 4},
        ("foreach", "kept gradients"),
    ),
    "gradients that are freed while they are reduced": (
        "compute does not wait for reduce_intra",
        {"shard_size": 4},
        ("foreach",),
    ),
    "an accumulated block that is read before the last micro-step is added": (
        "reduce_rail does not wait for reduce_intra",
        {"shard_size": 4, "accumulate": "block"},
        ("foreach", "kept gradients"),
    ),
}


@needs_fakes
@pytest.mark.parametrize("fault", FORMER_FAULTS)
def test_a_former_fault_is_noticed(fault: str) -> None:
    kind, options, habits = FORMER_FAULTS[fault]
    races, _, defects = run_ranks(4, _find_races, options, habits, {kind: 3}, ranks_per_node=2)[0]
    assert races == []
    noticed, number = defects[kind]
    assert 0 < noticed <= number


# Edges of which every single one is needed.
NEEDED = (
    "compute does not wait for gather_intra",
    "gather_intra does not wait for gather_rail",
    "gather_rail does not wait for compute",
    "reduce_intra does not wait for compute",
    "reduce_rail does not wait for reduce_intra",
    "replicate does not wait for reduce_rail",
)


@needs_fakes
def test_every_edge_that_is_needed_is_noticed_when_it_is_left_out() -> None:
    strides = {"": 7} | dict.fromkeys(NEEDED, 1)  # of all kinds, and then of those
    found = run_ranks(4, _find_races, {"shard_size": 4}, ("foreach",), strides, ranks_per_node=2)
    defects: Defects = found[0][2]
    for kind in NEEDED:
        noticed, number = defects[kind]
        assert noticed == number > 0, kind
    # Of the other kinds some are needed, and others are made sure by a second path of events.
    assert len([kind for kind, (noticed, _) in defects.items() if noticed > 0]) > 15, defects


def _make_races(rank: int) -> list[str]:
    """A script's own mistakes with events, as torch's trace of CUDA would tell of them."""
    detector = _C.RaceDetector(keeps_trace=False, throws=True)
    weight = torch.zeros(8)
    detector.name_memory(weight, 'shard of unit "blocks.1"')
    side, other = 0x10, 0x20
    detector.access("aten::mul_", [], [weight], side)
    detector.record_event(1, side)
    detector.wait_for_event(1, other)
    detector.access("aten::add", [weight], [], other)  # ordered
    messages = []
    for step in (
        lambda: detector.access("aten::add", [weight[4:]], [], 0),
        lambda: detector.access("aten::add", [], [weight], None),
    ):
        try:
            step()
        except mics.RaceError as error:
            messages.append(str(error))
    return messages


def test_the_message_names_operators_tensors_memory_and_streams() -> None:
    first = _make_races(0)[0]
    for part in (
        'aten::add of Float [4] on stream "compute", which reads 16 bytes',
        'that aten::mul_ of Float [8] on stream "stream 0x10" writes',
        'shard of unit "blocks.1"',
        "Record an event",
    ):
        assert part in first, first


def _train_on_threads(rank: int) -> tuple[list[str], int]:
    with watched() as detector:
        _train(rank, {"shard_size": 2}, ("foreach",))
    return detector.races, detector.num_accesses


def test_streams_that_are_threads_are_checked_too() -> None:
    for races, num_accesses in run_ranks(2, _train_on_threads):
        assert races == []
        assert num_accesses > 1000


SCRIPT = """
import torch
import torch_mics as mics
from torch_mics import _race_check

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
mics.shard_model(model, units=list(model))
optimizer = mics.optim.AdamW(model.parameters())
for _ in range(2):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
detector = _race_check.of_process()
print("accesses:", 0 if detector is None else detector.num_accesses)
"""


def _run_script(value: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"MICS_RACE_CHECK": value},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_variable_turns_the_check_on_for_a_script() -> None:
    assert "accesses: 0\n" in _run_script("0").stdout
    checked = _run_script("1").stdout
    assert int(checked.rsplit("accesses: ", 1)[1]) > 100
    assert 'MICS_RACE_CHECK must be "0" or "1": got "yes".' in _run_script("yes").stderr
