"""exit_rank: the end of a rank, its status and its output."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import start_process
from torch.nn.parallel import DistributedDataParallel

import torch_mics as mics

PRELUDE = """
import atexit, sys, time
import torch, torch.distributed as dist
import torch_mics as mics
atexit.register(print, "atexit")
"""
JOIN = (
    'dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank={}, world_size=2)\n'
)


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("status", [0, 3])
def test_alone_it_writes_what_was_printed_and_runs_no_handler(status: int):
    process = start(f'print("printed"); mics.exit_rank({status})')
    assert process.communicate(timeout=600) == ("printed\n", None)
    assert process.returncode == status


def test_a_right_end_waits_for_the_others(tmp_path: Path):
    store = str(tmp_path / "store")
    first = start(JOIN.format(0) + "mics.exit_rank()", store)
    second = start(
        JOIN.format(1)
        + 'time.sleep(2); print("about to end", flush=True); time.sleep(1); mics.exit_rank()',
        store,
    )
    assert second.stdout is not None
    assert second.stdout.readline() == "about to end\n"
    assert first.poll() is None
    assert first.wait(600) == second.wait(600) == 0


def test_a_wrong_end_waits_for_nobody(tmp_path: Path):
    store = str(tmp_path / "store")
    failing = start(JOIN.format(0) + "mics.exit_rank(4)", store)
    other = start(JOIN.format(1) + "time.sleep(3600)", store)
    try:
        assert failing.wait(600) == 4
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def _train_and_end(rank: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    model(torch.ones(1, 8)).sum().backward()
    dist.all_gather_object([None, None], rank)
    mics.exit_rank()


def test_ranks_that_let_go_of_tensors_end_all_the_same(tmp_path: Path):
    """Where DDP's model goes, Gloo's threads may still hold the last tensors."""
    for turn in range(4):
        store = str(tmp_path / f"store{turn}")
        ranks = [start_process(_train_and_end, rank, store) for rank in range(2)]
        for rank in ranks:
            rank.join(600)
        assert [rank.exitcode for rank in ranks] == [0, 0]
