"""A checkpoint is the former or the new one, whole, wherever its save is ended; and it runs no code."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics
from torch_mics._storage import METADATA, Reader, read_metadata
from torch_mics.checkpoint import TrainState

WIDTH = 6
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch_mics"])


class Counter:
    """An extra."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


# --- ended saves -----------------------------------------------------------------------------------


def _end_at(folder: str, event: int | None) -> list[str]:
    """Ends this process before its `event`-th change of the folder. Gives the list of changes so far."""
    changes: list[str] = []

    def note(what: str) -> None:
        if len(changes) == event:
            os._exit(9)
        changes.append(what)

    def audit(name: str, arguments: tuple[Any, ...]) -> None:
        is_write = name == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if is_write or name in ("os.rename", "os.remove", "os.mkdir"):
            path = str(arguments[0])
            if path.startswith(folder):
                note(f"{name} {Path(path).name}")

    sync = os.fsync

    def noted_sync(descriptor: Any) -> None:
        note("fsync")
        sync(descriptor)

    sys.addaudithook(audit)
    os.fsync = noted_sync
    return changes


def _save(rank: int, world: str, folder: str, value: float, ends: dict[int, int]) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{world}", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    mics.shard_model(model, shard_size=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    changes = _end_at(folder, ends.get(rank))
    try:
        TrainState(model, step=Counter(value)).save(folder)
        Path(f"{world}.{rank}").write_text(json.dumps(changes))
    except BaseException as error:
        Path(f"{world}.{rank}.error").write_text(str(error))
    finally:
        os._exit(0)


def _run(tmp_path: Path, folder: Path, value: float, ends: dict[int, int]) -> list[list[str]]:
    """Saves on two ranks; those of `ends` end before that change. Gives the changes of each."""
    world = str(tmp_path / f"world{len(list(tmp_path.iterdir()))}")
    ranks = [
        _PROCESSES.Process(target=_save, args=(rank, world, str(folder), value, ends))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for number, rank in sorted(enumerate(ranks), key=lambda each: each[0] not in ends):
        # Who waits for a rank that has ended is ended too, wherever it is by then.
        rank.join(1 if ends and number not in ends else 120)
        if rank.is_alive():
            rank.kill()
            rank.join()
    done = [Path(f"{world}.{rank}") for rank in range(2)]
    return [json.loads(file.read_text()) if file.exists() else [] for file in done]


def _value(folder: Path) -> float | None:
    """What the checkpoint in a directory holds, which must be one value; None: there is none."""
    if not (folder / METADATA).exists():
        return None
    names = [f"{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    model = {n: torch.zeros(WIDTH, WIDTH) if "weight" in n else torch.zeros(WIDTH) for n in names}
    state: dict[str, Any] = {"train": {"model": model, "extras": {"step": {"value": 0.0}}}}
    dcp.load(state, storage_reader=Reader(folder), no_dist=True)
    values = {float(v) for tensor in model.values() for v in tensor.unique()}
    values.add(state["train"]["extras"]["step"]["value"])
    assert len(values) == 1, values
    return values.pop()


@pytest.mark.parametrize("is_new", [False, True], ids=["over a former one", "in a new place"])
def test_a_save_that_is_ended_leaves_the_former_or_the_new_one(tmp_path: Path, is_new: bool):
    worlds = tmp_path / "worlds"
    worlds.mkdir()

    if not is_new:
        _run(worlds, tmp_path / "former", 1.0, {})
        assert _value(tmp_path / "former") == 1.0

    def start(name: str) -> Path:
        folder = tmp_path / name
        if not is_new:
            shutil.copytree(tmp_path / "former", folder)
        return folder

    changes = _run(worlds, start("whole"), 2.0, {})
    assert len(changes[0]) > len(changes[1]) > 1
    assert any(change.startswith("os.rename") for change in changes[0])
    ended = [{rank: event} for rank in range(2) for event in range(len(changes[rank]))]
    ended += [{0: event, 1: event} for event in range(0, len(changes[1]), 2)]
    former = None if is_new else 1.0
    seen = set()
    for ends in ended:
        folder = start(str(ends))
        _run(worlds, folder, 2.0, ends)
        found = _value(folder)
        assert found in (former, 2.0), (ends, changes)
        seen.add(found)
        # What the ended save has left goes with the next one.
        if ends in ({0: 4}, {1: 3}):
            _run(worlds, folder, 3.0, {})
            assert _value(folder) == 3.0
            used = {info.relative_path for info in read_metadata(folder).storage_data.values()}
            assert {file.name for file in folder.iterdir()} == used | {METADATA}
    assert seen == {former, 2.0}


# --- what a file names is not run ------------------------------------------------------------------


class Evil:
    """Would make a file when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.path),))


def _state(**extras: Any) -> TrainState:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    mics.shard_model(model, shard_size=2)
    return TrainState(model, **extras)


def _load_evil_metadata(rank: int, folder: Path, ran: Path) -> str:
    state = _state()
    state.save(folder)
    dist.barrier()
    if rank == 0:
        metadata = read_metadata(folder)
        metadata.planner_data = {"train": Evil(str(ran))}
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
    dist.barrier()
    with pytest.raises((ValueError, RuntimeError)) as caught:
        state.load(folder)
    return str(caught.value)


def test_metadata_that_names_code_is_refused(tmp_path: Path):
    ran = tmp_path / "ran"
    for text in run_ranks(2, _load_evil_metadata, tmp_path / "checkpoint", ran):
        assert "must be what torch.distributed.checkpoint writes" in text
    assert not ran.exists()


def _save_evil_extra(rank: int, folder: Path, ran: Path) -> tuple[str, Any]:
    plain = [1, "a", np.float64(0.5), np.arange(3)]
    state = _state(counter=Counter(Evil(str(ran))), plain=Counter(plain))
    with pytest.raises((TypeError, RuntimeError)) as caught:
        state.save(folder)
    assert not folder.exists()
    dist.barrier()
    _state(plain=Counter(plain)).save(folder)
    loaded = _state(plain=Counter(None))
    loaded.load(folder)
    return str(caught.value), loaded.extras["plain"].value


def test_extra_that_would_run_code_is_refused_when_it_is_saved(tmp_path: Path):
    ran = tmp_path / "ran"
    for text, value in run_ranks(2, _save_evil_extra, tmp_path / "checkpoint", ran):
        assert "counter.value (Evil)" in text
        assert value[:3] == [1, "a", 0.5]
        assert value[3].tolist() == [0, 1, 2]
    assert not ran.exists()


def _save_evil_option(rank: int, folder: Path, ran: Path) -> str:
    state = _state(plain=Counter(1))
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=np.float64(0.1))
    state.save(folder)  # numbers of numpy are numbers
    state.load(folder)
    state.optimizer.param_groups[0]["evil"] = Evil(str(ran))
    with pytest.raises(RuntimeError) as caught:
        state.save(folder)
    del state.optimizer.param_groups[0]["evil"]
    state.load(folder)  # the former checkpoint is whole
    return str(caught.value)


def test_option_that_would_run_code_is_refused_when_it_is_saved(tmp_path: Path):
    ran = tmp_path / "ran"
    for text in run_ranks(2, _save_evil_option, tmp_path / "checkpoint", ran):
        assert "what is saved must be tensors, numbers" in text
        assert ".evil" in text
    assert not ran.exists()


def _load_evil_value(rank: int, folder: Path, ran: Path) -> str:
    dcp.save({"train": _state(counter=Counter(Evil(str(ran))))}, checkpoint_id=folder)
    dist.barrier()
    with pytest.raises(RuntimeError) as caught:
        _state(counter=Counter(0)).load(folder)
    return str(caught.value)


def test_value_in_a_file_that_would_run_code_is_refused(tmp_path: Path):
    ran = tmp_path / "ran"
    for text in run_ranks(2, _load_evil_value, tmp_path / "checkpoint", ran):
        assert "would run code" in text
    assert not ran.exists()


# --- files that are lost or torn -------------------------------------------------------------------


def _load_torn(rank: int, folder: Path, cuts: list[tuple[int, float]]) -> list[str]:
    """Cuts a data file, loads, and mends it, again and again: each load must raise and change nothing."""
    state = _state(step=Counter(1))
    state.save(folder)
    before = [parameter.to_local().clone() for parameter in state.model.parameters()]
    files = sorted(folder.glob("*.distcp"))
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(1.0)
    texts = []
    for number, share in cuts:
        file = files[number]
        content = file.read_bytes()
        dist.barrier()
        if rank == 0:
            if share < 0:
                file.unlink()
            else:
                file.write_bytes(content[: int(share * len(content))])
        dist.barrier()
        with pytest.raises((ValueError, RuntimeError)) as caught:
            state.load(folder)
        texts.append(str(caught.value))
        for parameter, value in zip(state.model.parameters(), before, strict=True):
            assert torch.equal(parameter.to_local(), value + 1.0)
        dist.barrier()
        if rank == 0:
            file.write_bytes(content)
        dist.barrier()
    state.load(folder)
    for parameter, value in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(parameter.to_local(), value)
    return texts


def test_files_that_are_torn_are_refused_before_anything_changes(tmp_path: Path):
    cuts = [(number, share) for number in range(2) for share in (-1.0, 0.0, 0.3, 0.9, 0.9999)]
    for texts in run_ranks(2, _load_torn, tmp_path / "checkpoint", cuts):
        assert all("must be whole" in text for text in texts), texts
        assert "no such file" in texts[0]
