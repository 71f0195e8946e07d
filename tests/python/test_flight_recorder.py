"""The flight log in the form of torch's flight recorder, read by torch's own analyser."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models import batch, loss, make_gpt
from support.ranks import run_ranks

import torch_mics as mics

ANALYSER = "torch.distributed.flight_recorder.fr_trace"


def _export(rank: int, folder: str) -> float:
    """Collectives, each shared out among its members."""
    for shard_size in (2, 4):  # groups of one name and other members
        model = mics.shard_model(make_gpt(blocks=1), shard_size=shard_size)
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                loss(model, batch(0, micro_step, rank)).backward()
        if shard_size == 2:
            kept = model  # the log lives as long as a model
    file = mics.export_flight_recorder(kept, folder)
    entries = pickle.loads(file.read_bytes())["entries"]
    return sum(1 / (len(entry["process_group"][0].split()) - 1) for entry in entries)


def analyse(folder: Path) -> tuple[list[Any], str]:
    """The collectives that the analyser finds, and what it says."""
    pytest.importorskip(ANALYSER, reason="this torch has no analyser of flight recorders")
    output = folder.parent / "db"
    done = subprocess.run(
        [sys.executable, "-m", ANALYSER, str(folder), "-o", str(output)],
        capture_output=True,
        text=True,
        check=True,
    )
    with output.open("rb") as file:
        _, database = pickle.load(file)
    return database.collectives, done.stdout + done.stderr


def test_the_analyser_matches_all_collectives_of_ranks_that_agree(tmp_path: Path):
    folder = tmp_path / "logs"
    folder.mkdir()
    shares = run_ranks(4, _export, str(folder))
    collectives, text = analyse(folder)
    names = [collective.collective_name for collective in collectives]
    assert len(names) == pytest.approx(sum(shares))
    assert {"nccl:all_gather", "nccl:reduce_scatter", "nccl:all_reduce"} == set(names)
    assert "missing ranks" not in text


def test_the_analyser_names_the_collective_that_one_rank_did_not_run(tmp_path: Path):
    folder = tmp_path / "logs"
    folder.mkdir()
    run_ranks(4, _export, str(folder))
    file = folder / "torch_mics_rank_1"
    log = pickle.loads(file.read_bytes())
    gathers = [
        entry
        for entry in log["entries"]
        if entry["process_group"] == ("gather/intra [0 1]", "gather/intra")
    ]
    log["entries"].remove(gathers[-1])
    unit = gathers[-1]["frames"][0]["name"].removeprefix("unit ")
    file.write_bytes(pickle.dumps(log))
    _, text = analyse(folder)
    assert "Not all ranks joining collective" in text
    assert "missing ranks: {1}" in text
    assert f"unit {unit}" in text
