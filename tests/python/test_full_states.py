"""Full state dicts and safetensors files: those of the unsharded model, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Run, run_at
from support.models import TinyGPT, batch, make_gpt
from support.values import assert_same, whole
from torch import nn

import torch_mics as mics
from torch_mics.checkpoint import export_safetensors


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
