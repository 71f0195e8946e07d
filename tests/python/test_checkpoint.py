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
from support.models import TinyGPT, batch, loss, make_gpt
from support.ranks import run_ranks
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
from torch_mics.checkpoint import TrainState, export_safetensors

# (world size, shard size, ranks per node)
SAVED_AT = (4, 4, 2)
LAYOUTS = [(4, 2, 4), (4, 4, 2), (2, 1, 1), (2, 2, 1), (1, 1, 1)]
SECONDS = 900.0


class Counter:
    """An extra as users write them."""

    def __init__(self) -> None:
        self.steps = 0
        self.note = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "note": self.note}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.note = state["steps"], state["note"]


class Run:
    """A model with all that trains it."""

    def __init__(self, shard_size: int, *, tied: bool = False, seed: int = 0) -> None:
        self.model: TinyGPT = mics.shard_model(make_gpt(tied, seed=seed), shard_size=shard_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
        self.counter = Counter()
        self.state = TrainState(
            self.model, self.optimizer, scheduler=self.scheduler, counter=self.counter
        )

    def train(self, first: int, last: int, rank: int) -> list[float]:
        losses = []
        for step in range(first, last):
            value = loss(self.model, batch(step, 0, rank))
            value.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.counter.steps += 1
            self.counter.note += step + 0.5
            losses.append(value.item())
        return losses

    def everything(self) -> dict[str, torch.Tensor]:
        """Model, optimizer and extras as plain tensors, the same at every layout."""
        found = {f"model.{k}": whole(v) for k, v in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = whole(value)
        found["lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)
        found["scheduler"] = torch.tensor(self.scheduler.last_epoch)
        found["steps"] = torch.tensor(self.counter.steps)
        found["note"] = self.counter.note.clone()
        return found


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def assert_same(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert list(found) == list(right)
    for name, value in right.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def run_at(layout: tuple[int, int, int], function: Any, *args: Any) -> list[Any]:
    world_size, shard_size, ranks_per_node = layout
    return run_ranks(
        world_size, function, shard_size, *args, ranks_per_node=ranks_per_node, timeout=SECONDS
    )


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
    ranks = {int(re.fullmatch(r"__(\d+)_\d+\.distcp", file.name)[1]) for file in files}  # type: ignore[index]
    assert ranks == writers
    written = sum(file.stat().st_size for file in files)
    # One copy, and what the format adds.
    assert nbytes <= written < 1.25 * nbytes


def _load_from(rank: int, shard_size: int, path: str) -> tuple[str, str]:
    run = Run(shard_size)
    try:
        run.state.load(path)
    except FileNotFoundError as error:
        return type(error).__name__, str(error)
    return "", ""


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


# --- full states ----------------------------------------------------------------------------------


class WithBuffers(nn.Module):
    """Parameters of two dtypes, buffers of both kinds, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.narrow = nn.Linear(7, 5).to(torch.bfloat16)
        self.frozen = nn.Parameter(torch.arange(6.0).reshape(2, 3), requires_grad=False)
        self.register_buffer("table", torch.arange(4), persistent=True)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.norm(x).to(torch.bfloat16)).float() + self.frozen.sum()


def _make(kind: str) -> nn.Module:
    if kind == "buffers":
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return WithBuffers()
    return make_gpt(tied=kind == "tied")


def _shard(kind: str, shard_size: int, model: nn.Module | None = None) -> nn.Module:
    units: Any = {nn.Linear} if kind == "buffers" else "auto"
    return mics.shard_model(model or _make(kind), units=units, shard_size=shard_size)


KINDS = ["plain", "tied", "buffers"]
FULL_LAYOUTS = [(4, 2, 2), (4, 4, 2), (2, 1, 2), (1, 1, 1)]


def _full_states(rank: int, shard_size: int, kind: str) -> list[dict[str, Any]]:
    model = _shard(kind, shard_size)
    return [
        mics.full_state_dict(model),
        mics.full_state_dict(model, rank0_only=False),
        mics.full_state_dict(model, rank0_only=False, cpu_offload=False),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", FULL_LAYOUTS, ids=str)
def test_full_state_dict_equals_that_of_the_unsharded_model(
    layout: tuple[int, int, int], kind: str
):
    right = dict(_make(kind).state_dict())
    for rank, states in enumerate(run_at(layout, _full_states, kind)):
        if rank > 0:
            assert states.pop(0) == {}
        for state in states:
            assert all(type(value) is torch.Tensor for value in state.values())
            assert_same(state, right)


def _snapshot_and_train(rank: int, shard_size: int) -> bool:
    run = Run(shard_size)
    state = mics.full_state_dict(run.model)
    before = {name: value.clone() for name, value in state.items()}
    run.train(0, 1, rank)
    return all(torch.equal(state[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", FULL_LAYOUTS, ids=str)
def test_full_state_dict_does_not_change_with_training(layout: tuple[int, int, int]):
    assert all(run_at(layout, _snapshot_and_train))


def _load_full(
    rank: int, shard_size: int, kind: str, how: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    source = _make(kind).state_dict()
    if how == "meta":
        with torch.device("meta"):
            model = _shard(kind, shard_size, TinyGPT(tied=kind == "tied"))
    else:
        model = _make(kind)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        model = _shard(kind, shard_size, model)
    if how == "after a forward":
        _forward(kind, model)
    if how == "own copies":
        mics.load_full_state_dict(model, source, broadcast=False)
    else:
        mics.load_full_state_dict(model, source if rank == 0 else {})
    found = {name: whole(value) for name, value in model.state_dict().items()}
    output = _forward(kind, model)
    return found, None if kind == "buffers" else output


def _forward(kind: str, model: nn.Module) -> torch.Tensor:
    if kind == "buffers":
        return model(torch.ones(3, 7)).detach()
    return model(batch(0, 0, 0)[0]).detach()


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (kind, how)
        for kind in KINDS
        for how in ("fresh", "after a forward", "own copies")
        # A forward of BatchNorm changes what is loaded over.
        if (kind, how) != ("buffers", "after a forward")
    ]
    + [("plain", "meta"), ("tied", "meta")],
)
def test_load_full_state_dict_gives_every_rank_its_rows(kind: str, how: str):
    right = dict(_make(kind).state_dict())
    output = None if kind == "buffers" else _forward(kind, _make(kind))
    for layout in ((4, 2, 2), (2, 2, 1)):
        for found, its_output in run_at(layout, _load_full, kind, how):
            assert_same(found, right)
            if output is not None:
                # Other kernels may run for the same values; the values were compared above.
                torch.testing.assert_close(its_output, output, rtol=1e-5, atol=1e-6)


def _load_part(rank: int, shard_size: int) -> dict[str, torch.Tensor]:
    model = mics.shard_model(make_gpt(seed=1), shard_size=shard_size)
    part = {"head.weight": torch.full((37, 12), 2.5)} if rank == 0 else {}
    mics.load_full_state_dict(model, part, strict=False)
    return {name: whole(value) for name, value in model.state_dict().items()}


def test_load_full_state_dict_not_strict_changes_only_what_it_brings():
    right = {**make_gpt(seed=1).state_dict(), "head.weight": torch.full((37, 12), 2.5)}
    for found in run_at((4, 2, 2), _load_part):
        assert_same(found, right)


def _export(rank: int, shard_size: int, path: str, kind: str) -> None:
    export_safetensors(_shard(kind, shard_size), path, metadata={"format": "pt", "made": "here"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [(4, 2, 2), (4, 4, 2), (1, 1, 1)], ids=str)
def test_safetensors_export_reads_back_bit_for_bit(
    tmp_path: Path, layout: tuple[int, int, int], kind: str
):
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    run_at(layout, _export, str(path), kind)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "made": "here"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    right = dict(_make(kind).state_dict())
    assert_same({name: found.pop(name) for name in right}, right)
    assert not found
