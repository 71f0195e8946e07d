"""Collective calls that only some ranks make end on all ranks in time, and say who is missing.

The ranks that do not make the call go on to something else, which then lacks the others.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.bodies import Layer, Stack, make, points
from support.ranks import close_pools, run_ranks

import torch_mics as mics

# Of the process group, seconds: waited for on purpose.
TIMEOUT = 6.0
# Within which a busy machine sees that TIMEOUT is over; torch's own time-out is 30 minutes.
LIMIT = 120.0
HANG = 600.0

# --- calls ----------------------------------------------------------------------------------------


def train_state(model: Any) -> mics.checkpoint.TrainState:
    return mics.checkpoint.TrainState(model, torch.optim.AdamW(model.parameters()))


def enter_unsharded(model: Any, path: str) -> None:
    with mics.unsharded(model):
        pass


Call = Callable[[Any, str], object]

CALLS: dict[str, Call] = {
    "full_state_dict": lambda model, path: mics.full_state_dict(model),
    "load_full_state_dict": lambda model, path: mics.load_full_state_dict(
        model, make(Stack).state_dict()
    ),
    "TrainState.save": lambda model, path: train_state(model).save(path),
    "TrainState.load": lambda model, path: train_state(model).load(path),
    "export_safetensors": lambda model, path: mics.checkpoint.export_safetensors(
        model, path + ".safetensors"
    ),
    "unsharded": enter_unsharded,
    "clip_grad_norm_": lambda model, path: mics.clip_grad_norm_(model.parameters(), 1.0),
    "materialize": lambda model, path: mics.materialize(model),
    "describe": lambda model, path: mics.describe(model),
    "forward": lambda model, path: model(points(0)),
    "barrier": lambda model, path: dist.barrier(),
}
BEFORE_FORWARD = ("materialize", "describe")


@dataclasses.dataclass(frozen=True)
class Case:
    """Some ranks make one call, the others another."""

    callers: tuple[int, ...]
    call: str
    others: str

    def __str__(self) -> str:
        return f"{self.call} on {list(self.callers)}, {self.others} on the others"


# By the size of the world. Each has processes of its own, so that they wait at the same time.
CASES: dict[int, list[Case]] = {
    2: [
        Case((1,), "full_state_dict", "forward"),
        Case((0,), "TrainState.load", "barrier"),
        Case((1,), "export_safetensors", "barrier"),
        Case((0,), "unsharded", "forward"),
        Case((0,), "clip_grad_norm_", "full_state_dict"),
    ],
    3: [
        Case((0,), "load_full_state_dict", "barrier"),
        Case((2,), "TrainState.save", "forward"),
        Case((1,), "clip_grad_norm_", "forward"),
        Case((0,), "materialize", "barrier"),
        Case((0, 2), "full_state_dict", "TrainState.save"),
    ],
    4: [
        Case((1,), "describe", "barrier"),
        Case((0, 1, 3), "unsharded", "barrier"),
        Case((2,), "clip_grad_norm_", "barrier"),
        Case((1, 2), "TrainState.save", "clip_grad_norm_"),
        Case((0, 1, 2), "TrainState.load", "export_safetensors"),
    ],
}


# --- running on ranks -----------------------------------------------------------------------------


def wait_for_all(path: str, name: str, rank: int, size: int) -> None:
    """Returns when all ranks have come; no time-out of a process group is running."""
    pathlib.Path(path, f"{name}{rank}").touch()
    deadline = time.monotonic() + HANG
    while not all(pathlib.Path(path, f"{name}{other}").exists() for other in range(size)):
        assert time.monotonic() < deadline, f"some rank has not come to {name}"
        time.sleep(0.02)


def _run(rank: int, size: int, path: str) -> list[tuple[float, str, str]]:
    """Seconds, type and text of what came of each case."""
    return [
        _run_case(rank, size, case, f"{path}/{number}") for number, case in enumerate(CASES[size])
    ]


def _run_case(rank: int, size: int, case: Case, path: str) -> tuple[float, str, str]:
    pathlib.Path(path).mkdir(exist_ok=True)
    wait_for_all(path, "started", rank, size)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    name = case.call if rank in case.callers else case.others
    with torch.device("meta") if case.call == "materialize" else contextlib.nullcontext():
        model = make(Stack)
    mics.shard_model(model, units={Layer}, shard_size="world")
    if case.call not in BEFORE_FORWARD:
        model(points(rank)).sum().backward()
    wait_for_all(path, "ready", rank, size)
    start = time.monotonic()
    kind, text = "", ""
    try:
        CALLS[name](model, f"{path}/checkpoint")
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    seconds = time.monotonic() - start
    wait_for_all(path, "ended", rank, size)
    del model
    dist.destroy_process_group()
    return seconds, kind, text


@functools.cache
def _outcomes() -> dict[Case, list[tuple[float, str, str]]]:
    """What came of each case on each rank."""
    found = {}
    with (
        tempfile.TemporaryDirectory() as path,
        concurrent.futures.ThreadPoolExecutor(len(CASES)) as executor,
    ):
        runs = {}
        for size in CASES:
            pathlib.Path(path, str(size)).mkdir()
            runs[size] = executor.submit(
                run_ranks, size, _run, size, f"{path}/{size}", initialise=False
            )
        for size, run in runs.items():
            for case, *outcomes in zip(CASES[size], *run.result(), strict=True):
                found[case] = outcomes
    close_pools()
    return found


# --- tests ----------------------------------------------------------------------------------------

ALL_CASES = [(size, case) for size, cases in CASES.items() for case in cases]
AGREES = {name for name in CALLS if name not in ("clip_grad_norm_", "forward", "barrier")}


@pytest.mark.parametrize(("size", "case"), ALL_CASES, ids=[f"{n} ranks, {c}" for n, c in ALL_CASES])
def test_call_that_some_ranks_do_not_make_ends_on_all_in_time(size: int, case: Case):
    outcomes = _outcomes()[case]
    both_agree = {case.call, case.others} <= AGREES
    for rank, (seconds, kind, text) in enumerate(outcomes):
        assert seconds < LIMIT
        assert kind, f"rank {rank} saw no error"
        if both_agree:
            # Nobody is missing: the calls differ, and all learn of it at once.
            assert kind in ("ValueError", "InvalidArgument")
            assert case.call in text
            assert case.others in text
            continue
        name = case.call if rank in case.callers else case.others
        missing = [r for r in range(size) if (r in case.callers) != (rank in case.callers)]
        if name == "barrier":
            continue  # torch's own words
        assert kind == "TimeoutError", text
        if name == "forward":
            assert all(f"world_rank {other}: " in text for other in missing), text
        else:
            assert name in text
            assert f"world ranks {missing}" in text, text
