"""Which device and memory things are on: shards, communicators, counters of steps, full states, reports."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import fake_device
from support.models import batch, loss, make_gpt
from support.ranks import run_outcomes, run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

import torch_mics as mics
from torch_mics import _C, _nccl
from torch_mics._hosts import device_of_rank
from torch_mics.checkpoint import TrainState, export_safetensors

pytestmark = fake_device.needs_fake_device

DEVICE = fake_device.NAME


def to_device(data: tuple[torch.Tensor, ...], device: Any = DEVICE) -> Any:
    return tuple(part.to(device) for part in data)


# --- the device of a rank -------------------------------------------------------------------------


def _bound(rank: int, path: str) -> list[str]:
    fake_device.install()
    device = torch.device(DEVICE, rank + 1)
    dist.init_process_group(
        fake_device.BACKEND,
        init_method=f"file://{path}",
        rank=rank,
        world_size=2,
        device_id=device,
    )
    torch.get_device_module(DEVICE).set_device(0)  # which is not what device_id says
    mesh = mics.init_mesh(2, device_type=DEVICE)
    model = mics.shard_model(make_gpt(), mesh=mesh)
    loss(model, to_device(batch(0, 0, rank), device)).backward()
    mics.optim.AdamW(model.parameters()).step()
    with mics.meta_device():
        other = nn.Linear(3, 3)
    mics.shard_model(other, mesh=mesh)
    mics.materialize(other)
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *other.parameters()]
    return sorted({str(tensor._local_tensor.device) for tensor in tensors})


def test_a_rank_is_on_the_device_that_the_process_group_was_given(tmp_path: Path):
    found = run_ranks(2, _bound, str(tmp_path / "store"), initialise=False)
    assert found == [[f"{DEVICE}:1"], [f"{DEVICE}:2"]]


def _chosen(rank: int, path: str, is_started: bool) -> tuple[int, str]:
    fake_device.install()
    module: Any = torch.get_device_module(DEVICE)
    device = torch.device(DEVICE, 2)
    dist.init_process_group(
        fake_device.BACKEND, init_method=f"file://{path}", rank=0, world_size=1, device_id=device
    )
    module.set_device(1)
    module.is_started = is_started
    mics.init_mesh(1, device_type=DEVICE)
    return module.current_device(), str(device_of_rank(DEVICE))


@pytest.mark.parametrize("is_started", [True, False])
def test_a_mesh_makes_that_device_current_unless_the_program_has_chosen(
    tmp_path: Path, is_started: bool
):
    found = run_ranks(1, _chosen, str(tmp_path / "store"), is_started, initialise=False)
    # torch would take the device that LOCAL_RANK names, 0.
    assert found == [(1 if is_started else 2, f"{DEVICE}:2")]


def _world(rank: int) -> int:
    dist.group.WORLD.bound_device_id = torch.device("cuda", 3)
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(_C, "NcclWorld", side_effect=RuntimeError("no GPU")) as make,
        pytest.raises(RuntimeError, match="no GPU"),
    ):
        _nccl.Nccl().world()
    return make.call_args.kwargs["device"]


def test_communicators_of_nccl_are_on_that_device():
    assert run_ranks(1, _world) == [3]


# --- the default device ---------------------------------------------------------------------------


def _counters(rank: int, device: str, make: str, path: str) -> tuple[set[str], int]:
    """Gives where the steps are counted, and how often a step read from the device."""
    core = fake_device.install()
    model = mics.shard_model(make_gpt(), mesh=mics.init_mesh(2, device_type=device))
    data = to_device(batch(0, 0, rank), device)
    older = torch.optim.AdamW(model.parameters())
    loss(model, data).backward()
    older.step()
    extra = nn.Parameter(torch.zeros(3, device=device))
    extra.grad = torch.ones_like(extra)
    torch.set_default_device(DEVICE)
    try:
        if make == "ours":
            optimizer: Any = mics.optim.AdamW([*model.parameters(), extra])
            core.take_host_reads()
            optimizer.step()
        else:
            optimizer = torch.optim.AdamW(model.parameters())
            TrainState(model, older).save(path)
            TrainState(model, optimizer).load(path)
            core.take_host_reads()
            optimizer.step()
        reads = core.take_host_reads()
        steps = [state["step"] for state in optimizer.state.values()]
        assert len(steps) == sum(len(group["params"]) for group in optimizer.param_groups)
        return {str(step.device) for step in steps}, reads
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("device", ["cpu", DEVICE])
@pytest.mark.parametrize("make", ["ours", "torch's, from a checkpoint"])
def test_steps_are_counted_on_the_cpu_whatever_the_default_device(
    device: str, make: str, tmp_path: Path
):
    assert run_ranks(2, _counters, device, make, str(tmp_path), device=DEVICE) == [({"cpu"}, 0)] * 2


# --- checkpoints that are not there ---------------------------------------------------------------


def _load(rank: int, paths: list[str]) -> None:
    model = mics.shard_model(make_gpt(), mesh=mics.init_mesh(2, device_type="cpu"))
    TrainState(model).save(paths[0])
    TrainState(model, torch.optim.AdamW(model.parameters())).load(paths[1 + rank])


@pytest.mark.parametrize("missing", [[0, 1], [1], [0]])
def test_a_checkpoint_that_some_rank_cannot_see_is_the_same_error_on_every_rank(
    tmp_path: Path, missing: list[int]
):
    there, nowhere = str(tmp_path / "saved"), str(tmp_path / "nowhere")
    paths = [there, *(nowhere if rank in missing else there for rank in range(2))]
    outcomes = run_outcomes(2, _load, paths, device=DEVICE)
    for outcome in outcomes:
        assert outcome.error_type == "FileNotFoundError", outcome.trace
        assert f"on world ranks {missing}" in str(outcome.error_text)


# --- reports --------------------------------------------------------------------------------------


def _reported(rank: int) -> bool:
    model = mics.shard_model(make_gpt(), mesh=mics.init_mesh(2, device_type="cpu"))
    loss(model, batch(0, 0, rank)).backward()
    engine = model._context().engine
    report = engine.memory()
    parts = [(part.name, part.count, part.nbytes) for part in report.parts]
    nbytes = report.nbytes
    model.release_memory()
    gc.collect()
    filler = [torch.full((1000,), 1 << 40) for _ in range(200)]  # takes the place of what was freed
    same = [(part.name, part.count, part.nbytes) for part in report.parts] == parts
    return same and report.nbytes == nbytes and len(filler) == 200


def test_a_report_of_memory_outlives_the_memory():
    assert run_ranks(2, _reported, device=DEVICE) == [True, True]


# --- full states ----------------------------------------------------------------------------------


class Large(nn.Module):
    """Much larger than the largest of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _save(model: nn.Module, path: Path) -> Any:
    export_safetensors(model, path / "model.safetensors")


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
CALLS: dict[str, Callable[..., Any]] = {
    "full_state_dict": lambda model, *_: mics.full_state_dict(model),
    "on every rank": lambda model, *_: mics.full_state_dict(model, rank0_only=False),
    "export": lambda model, _, path: _save(model, path),
    "of torch": lambda model, *_: get_model_state_dict(model, options=FULL),
    "optimizer, of torch": lambda model, optimizer, _: get_optimizer_state_dict(
        model, optimizer, options=FULL
    ),
    "load": lambda model, *_: mics.load_full_state_dict(
        model, Large().state_dict() if dist.get_rank() == 0 else {}
    ),
    "load, from each rank": lambda model, *_: mics.load_full_state_dict(
        model, Large().state_dict(), broadcast=False
    ),
}


def _peak(rank: int, call: str, path: str, shard_size: int) -> tuple[int, set[str]]:
    """Gives bytes of the device above those before the call, and where the result is."""
    core = fake_device.install()
    mesh = mics.init_mesh(shard_size, device_type=DEVICE)
    torch.manual_seed(0)
    model = mics.shard_model(Large(), mesh=mesh)
    optimizer = mics.optim.AdamW(model.parameters())
    model(torch.ones(2, 64, device=DEVICE)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    before = core.allocated_nbytes()
    core.reset_peak()
    found = CALLS[call](model, optimizer, Path(path))
    peak = core.peak_nbytes() - before
    tensors = found.get("state", found).values() if found else []
    flat = [v for t in tensors for v in (t.values() if isinstance(t, dict) else [t])]
    return peak, {str(t.device) for t in flat if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shard_size", [2, 1])
def test_a_full_state_takes_the_memory_of_a_few_parameters_on_the_device(
    call: str, shard_size: int, tmp_path: Path
):
    if call == "export":
        pytest.importorskip("safetensors")
    one = 64 * 64 * 4
    for peak, devices in run_ranks(2, _peak, call, str(tmp_path), shard_size, device=DEVICE):
        assert peak <= 4 * one, peak / one
        assert devices <= {"cpu"}
