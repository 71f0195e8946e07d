"""Checkpoints: bit for bit at any layout, one copy on disk, and through the ordinary torch calls.

Functions that run on the ranks begin with an underscore; the tests say what must come of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.checkpoints import Counter, Run, run_at
from support.errors import caught
from support.models import batch
from support.values import assert_same, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

import torch_mics as mics
from torch_mics.checkpoint import TrainState

# (world size, shard size, ranks per node)
SAVED_AT = (4, 4, 2)
LAYOUTS = [(4, 2, 4), (4, 4, 2), (2, 1, 1), (2, 2, 1), (1, 1, 1)]


# --- TrainState -----------------------------------------------------------------------------------


def _train_and_save(
    rank: int, shard_size: int, path: str, tied: bool
) -> tuple[dict[str, torch.Tensor], list[float], dict[str, torch.Tensor]]:
    run = Run(shard_size, tied=tied)
    run.train(0, 2, rank)
    run.state.save(path)
    saved = run.everything()
    losses = run.train(2, 4, rank)
    return saved, losses, run.everything()


def _load(rank: int, shard_size: int, path: str, tied: bool) -> dict[str, torch.Tensor]:
    run = Run(shard_size, tied=tied, seed=9)
    run.state.load(path)
    return run.everything()


def _resume(
    rank: int, shard_size: int, path: str, tied: bool, when: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    run = Run(shard_size, tied=tied, seed=9)
    if when == "after training":
        # The root keeps its full parameters from here on.
        run.train(5, 7, rank)
        run.model(batch(0, 0, rank)[0])
    run.state.load(path)
    losses = run.train(2, 4, rank)
    return losses, run.everything()


Saved = dict[bool, tuple[Path, list[Any]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """By whether the head is tied: the directory, and what _train_and_save gave on each rank."""
    made: Saved = {}
    for tied in (False, True):
        path = tmp_path_factory.mktemp("checkpoint") / str(tied)
        made[tied] = (path, run_at(SAVED_AT, _train_and_save, str(path), tied))
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_train_state_loads_bit_for_bit_at_another_layout(
    saved: Saved, layout: tuple[int, int, int], tied: bool
):
    path, ranks = saved[tied]
    right = ranks[0][0]
    assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in right)
    assert right["steps"] == 2
    for found in run_at(layout, _load, str(path), tied):
        assert_same(found, right)


@pytest.mark.parametrize("when", ["fresh", "after training"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_after_resume_equals_uninterrupted_training_bitwise(
    saved: Saved, tied: bool, when: str
):
    path, ranks = saved[tied]
    results = run_at(SAVED_AT, _resume, str(path), tied, when)
    for (losses, found), (_, right_losses, right) in zip(results, ranks, strict=True):
        assert losses == right_losses
        assert_same(found, right)


def test_training_after_resume_at_another_layout_goes_on_alike(saved: Saved):
    path, ranks = saved[False]
    results = run_at((4, 2, 2), _resume, str(path), False, "fresh")
    for (losses, _), (_, right_losses, _) in zip(results, ranks, strict=True):
        # Sums over replicas come in another order; AdamW amplifies that where gradients are small.
        assert losses[0] == pytest.approx(right_losses[0], rel=1e-6)
        assert losses[1] == pytest.approx(right_losses[1], rel=1e-3)


def _load_model_alone(rank: int, shard_size: int, path: str) -> dict[str, torch.Tensor]:
    run = Run(shard_size, seed=9)
    TrainState(run.model).load(path)
    return {f"model.{k}": whole(v) for k, v in run.model.state_dict().items()}


def test_train_state_without_optimizer_loads_the_model_alone(saved: Saved):
    path, ranks = saved[False]
    right = {k: v for k, v in ranks[0][0].items() if k.startswith("model.")}
    for found in run_at((2, 2, 1), _load_model_alone, str(path)):
        assert_same(found, right)


def _save_wide(rank: int, shard_size: int, path: str) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(61, 500), nn.ReLU(), nn.Linear(500, 61))
    mics.shard_model(model, units={nn.Linear}, shard_size=shard_size)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 61)).sum().backward()
    optimizer.step()
    TrainState(model, optimizer, counter=Counter()).save(path)
    # The parameter and two moments.
    return sum(3 * p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize(("shard_size", "writers"), [(1, {0}), (2, {0, 1}), (4, {0, 1, 2, 3})])
def test_only_the_first_replica_writes(tmp_path: Path, shard_size: int, writers: set[int]):
    path = tmp_path / "checkpoint"
    nbytes = run_at((4, shard_size, 2), _save_wide, str(path))[0]
    # torch makes a file for every rank, also for one that has nothing to write.
    files = [file for file in path.glob("*.distcp") if file.stat().st_size > 0]
    ranks = {int(re.fullmatch(r"__[0-9a-f-]+_(\d+)_\d+\.distcp", file.name)[1]) for file in files}  # type: ignore[index]
    assert ranks == writers
    written = sum(file.stat().st_size for file in files)
    # One copy, and what the format adds.
    assert nbytes <= written < 1.25 * nbytes


def _load_from(rank: int, shard_size: int, path: str) -> tuple[str, str]:
    run = Run(shard_size)
    return caught(lambda: run.state.load(path))


@pytest.mark.parametrize("missing", ["metadata", "directory"])
def test_unfinished_checkpoint_is_refused_on_every_rank(tmp_path: Path, missing: str):
    path = tmp_path / "checkpoint"
    if missing == "metadata":
        run_at(SAVED_AT, _train_and_save, str(path), False)
        (path / ".metadata").unlink()
    for kind, text in run_at(SAVED_AT, _load_from, str(path)):
        assert kind == "FileNotFoundError"
        assert ".metadata" in text
        assert str(path) in text
        assert "not finished" in text


# --- the ordinary calls of torch ------------------------------------------------------------------


class ModelPart(Stateful):
    """As torchtitan's ModelWrapper."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state, options=StateDictOptions(strict=False))


class OptimizerPart(Stateful):
    """As torchtitan's OptimizersContainer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(
            self.model, self.optimizer, optim_state_dict=state, options=self.options
        )


def _parts(run: Run) -> dict[str, Any]:
    return {
        "model": ModelPart(run.model),
        "optimizer": OptimizerPart(run.model, run.optimizer),
        "scheduler": run.scheduler,
        "train_state": run.counter,
    }


def _save_ordinarily(rank: int, shard_size: int, path: str, style: str) -> dict[str, torch.Tensor]:
    run = Run(shard_size)
    run.train(0, 2, rank)
    if style == "stateful parts":
        dcp.save(_parts(run), checkpoint_id=path)
    else:
        model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    return run.everything()


def _load_ordinarily(rank: int, shard_size: int, path: str, style: str) -> dict[str, torch.Tensor]:
    run = Run(shard_size, seed=9)
    if style == "stateful parts":
        dcp.load(_parts(run), checkpoint_id=path)
    else:
        model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            run.model,
            run.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    return run.everything()


@pytest.mark.parametrize("style", ["stateful parts", "get and set"])
def test_ordinary_dcp_calls_load_bit_for_bit_at_another_layout(tmp_path: Path, style: str):
    path = str(tmp_path / "checkpoint")
    right = run_at(SAVED_AT, _save_ordinarily, path, style)[0]
    if style == "get and set":
        right = {k: v for k, v in right.items() if k.split(".")[0] in ("model", "optimizer", "lr")}
    for layout in ((4, 2, 4), (2, 1, 1)):
        for found in run_at(layout, _load_ordinarily, path, style):
            assert_same({name: found[name] for name in right}, right)


def _state_dict_traffic(rank: int, shard_size: int) -> bool:
    run = Run(shard_size)
    run.train(0, 1, rank)
    before = mics.traffic(run.model)
    state = run.state.state_dict()
    locals_only = all(isinstance(value, DTensor) for value in state["model"].values())
    return locals_only and mics.traffic(run.model) == before


def test_train_state_takes_its_state_without_communication():
    assert run_at(SAVED_AT, _state_dict_traffic) == [True] * 4
