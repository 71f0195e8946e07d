"""A rank that is lost, stopped or out of step: the others end in time, and say where everybody was."""

from __future__ import annotations

import datetime
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.bodies import Layer, Stack, make, points
from support.ranks import run_ranks, start_process

import torch_mics as mics
from torch_mics import _session

WORLD = 4
# Of the process group, seconds: waited for on purpose, and more than a busy machine needs for a step.
TIMEOUT = 15.0
PATIENCE = datetime.timedelta(seconds=10)  # for the answers of the other ranks
# Within which a busy machine sees that TIMEOUT is over; torch's own time-out is 30 minutes.
LIMIT = 120.0
HANG = 600.0

WHAT = ("kill", "stop", "sleep", "fewer")


def step(model: Any, rank: int, number: int, micro_steps: int = 1) -> None:
    for micro_step in range(micro_steps):
        with mics.microbatch(model, is_last=micro_step == micro_steps - 1):
            model(points(rank, number)).square().mean().backward()


def wait_for(path: str, name: str, ranks: tuple[int, ...]) -> None:
    """Returns when each of `ranks` has made its file `name`."""
    deadline = time.monotonic() + HANG
    while not all(Path(path, f"{name}{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, f"some of the ranks {ranks} have not come to {name!r}"
        time.sleep(0.05)


def run(rank: int, path: str, what: str) -> None:
    """One rank of a training in which rank 1 goes wrong after the second step."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    _session.PATIENCE = PATIENCE
    # Interpreters start at other times; the time-out is of the process group's start, too.
    Path(path, f"started{rank}").touch()
    wait_for(path, "started", (0, 1, 2, 3))
    os.environ["MICS_NODE_ID"] = str(rank // 2)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    model = make(Stack)
    mics.shard_model(model, units={Layer}, shard_size=4)
    for number in range(2):
        step(model, rank, number)
    dist.barrier()
    if rank == 1:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "sleep":
            wait_for(path, "error", (0, 2, 3))
            return
    start = time.monotonic()
    try:
        step(model, rank, 2, micro_steps=2 if what == "fewer" and rank == 1 else 3)
    except Exception as error:
        Path(path, f"error{rank}").write_text(f"{time.monotonic() - start}\n{error}")
        os._exit(3)


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, tuple[float, str]]]:
    """Seconds until the error and its text, of every rank that ended with one.

    The trainings wait for their time-outs side by side.
    """
    paths = {what: tmp_path_factory.mktemp(what) for what in WHAT}
    ranks = {
        (what, rank): start_process(run, rank, str(path), what)
        for what, path in paths.items()
        for rank in range(WORLD)
    }
    try:
        for (what, rank), process in ranks.items():
            if rank != 1 or what == "fewer":
                process.join(timeout=HANG)
    finally:
        for process in ranks.values():
            process.kill()
            process.join()
    found: dict[str, dict[int, tuple[float, str]]] = {what: {} for what in WHAT}
    for what, rank in ranks:
        file = paths[what] / f"error{rank}"
        if file.exists():
            seconds, _, text = file.read_text().partition("\n")
            found[what][rank] = (float(seconds), text)
    return found


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("kill", "world_rank 1: no answer; it has ended or is stopped"),
        ("stop", "world_rank 1: no answer; it has ended or is stopped"),
        ("sleep", "finished, none issued, behind (others have issued "),
    ],
)
def test_other_ranks_end_and_say_where_everybody_was(errors: Any, what: str, said: str):
    assert sorted(errors[what]) == [0, 2, 3]
    for seconds, text in errors[what].values():
        assert seconds < LIMIT
        assert "gather/" in text
        assert "What each rank was doing" in text
        assert 'of unit "' in text
        line = next(row for row in text.splitlines() if row.startswith("  world_rank 1"))
        assert said in line


def test_one_micro_step_less_on_one_rank_ends_all_and_names_the_hop(errors: Any):
    assert sorted(errors["fewer"]) == list(range(WORLD))
    for seconds, text in errors["fewer"].values():
        assert seconds < LIMIT
        lines = {row.split(":")[0].strip(): row for row in text.splitlines()}
        # Rank 1 is at the boundary, where the others are not yet; they gather, and it does not.
        assert "control" in lines["world_rank 1"]
        assert ", all_reduce, " in lines["world_rank 1"]
        for other in (0, 2, 3):
            assert "gather/" in lines[f"world_rank {other}"]
            assert 'all_gather of unit "' in lines[f"world_rank {other}"]
            assert "behind" in lines[f"world_rank {other}"] or "behind" in lines["world_rank 1"]


def _log(rank: int) -> list[dict[str, Any]]:
    model = make(Stack)
    mics.shard_model(model, units={Layer}, shard_size=4)
    assert mics.flight_log(model) == []
    step(model, rank, 0)
    return mics.flight_log(model)


def test_flight_log_lists_the_collectives_of_a_step():
    logs = run_ranks(WORLD, _log, ranks_per_node=2)
    for rank, log in enumerate(logs):
        rails = [entry for entry in log if entry["group"].startswith("gather/rail")]
        assert rails[0]["group"] == f"gather/rail [{rank % 2} {rank % 2 + 2}]"
        assert [entry["number"] for entry in rails] == list(range(1, len(rails) + 1))
        assert {entry["unit"] for entry in rails} == {"Stack", "layers.0", "layers.1", "layers.2"}
        assert all(entry["op"] == "all_gather" and entry["nbytes"] > 0 for entry in rails)
        finished = [entry for entry in log if entry["state"] == "finished"]
        assert len(finished) >= len(log) - 1  # the flags' sum may be under way
        for entry in finished:
            assert entry["issued_at"] <= entry["started_at"] <= entry["ended_at"]
    orders = [[(e["op"], e["unit"]) for e in log if "gather" in e["group"]] for log in logs]
    assert all(order == orders[0] for order in orders)
