"""Sharded modules have FSDP2's types and methods, move and cast as its modules do, and are freed."""

from __future__ import annotations

import gc
import inspect
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.fsdp as fsdp
from support.fsdp2 import DIMS, WORLD, each_rank, gradients, mesh_of, on_ranks, ours, theirs
from support.models import TinyGPT, batch, loss, make_gpt
from support.values import assert_same, full_values
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import torch_mics as mics

# --- types and methods ----------------------------------------------------------------------------


@each_rank
def test_sharded_module_is_an_fsdp_module_and_of_its_own_class(rank: int) -> None:
    model = ours(2)
    assert isinstance(model, FSDPModule)
    assert isinstance(model, mics.MiCSModule)
    assert isinstance(model, TinyGPT)
    assert all(isinstance(block, FSDPModule) for block in model.blocks)
    assert not isinstance(model.head, FSDPModule)
    assert type(model.blocks[0]) is type(model.blocks[1])
    assert all(isinstance(p, nn.Parameter) and isinstance(p, DTensor) for p in model.parameters())


def _methods_of_fsdp_module() -> list[str]:
    members = FSDPModule.__dict__.items()
    own = [
        name for name, value in members if inspect.isfunction(value) or isinstance(value, property)
    ]
    return sorted(name for name in own if not name.startswith("__"))


@pytest.mark.parametrize("name", _methods_of_fsdp_module())
def test_method_of_fsdp_module_is_overridden_with_a_signature_that_takes_its_calls(name: str):
    assert name in mics.MiCSModule.__dict__
    mine = getattr(mics.MiCSModule, name)
    # FSDPModule._apply takes anything and hands it on to nn.Module.
    right = nn.Module._apply if name == "_apply" else getattr(FSDPModule, name)
    mine_parameters = dict(inspect.signature(mine).parameters)
    for parameter in inspect.signature(right).parameters.values():
        twin = mine_parameters.pop(parameter.name)
        assert twin.default == parameter.default, parameter
        assert twin.kind == parameter.kind, parameter
    assert all(extra.default is not inspect.Parameter.empty for extra in mine_parameters.values())


def test_methods_that_frameworks_and_torch_call_are_among_those_looked_at():
    found = set(_methods_of_fsdp_module())
    assert {"_apply", "_get_fsdp_state", "_set_unshard_async_op"} <= found
    assert {"reshard", "unshard", "set_requires_gradient_sync", "set_is_last_backward"} <= found


def test_fully_shard_takes_the_arguments_of_fsdp2():
    mine = dict(inspect.signature(mics.fully_shard).parameters)
    for parameter in inspect.signature(fsdp.fully_shard).parameters.values():
        twin = mine.pop(parameter.name, None)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        assert twin is not None, parameter
        assert twin.kind == parameter.kind, parameter
    assert all(extra.kind is extra.KEYWORD_ONLY for extra in mine.values())
    assert all(extra.default is not inspect.Parameter.empty for extra in mine.values())


def _refusals(rank: int) -> dict[str, str]:
    model = ours(2)
    calls: dict[str, Callable[[], object]] = {
        "set_custom_all_gather": lambda: model.set_custom_all_gather(None),
        "set_custom_reduce_scatter": lambda: model.set_custom_reduce_scatter(None),
        "set_allocate_memory_from_process_group_for_comm": (
            lambda: model.set_allocate_memory_from_process_group_for_comm(True)
        ),
    }
    found = {}
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} does not apply") as error:
            call()
        found[name] = str(error.value)
    # The values that ask for nothing are taken.
    model._set_unshard_async_op(True)
    model.set_allocate_memory_from_process_group_for_comm(False)
    model.set_force_sum_reduction_for_comms(True)
    return found


def test_method_that_cannot_be_honoured_refuses():
    assert len(on_ranks(_refusals)[0]) == 3


# --- moving and casting ---------------------------------------------------------------------------


def _check_views(model: Any, rank: int, dtype: torch.dtype) -> None:
    """Optimizer, state dict and forward all see one set of values, before and after a step."""
    plain = make_gpt().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batch(3, 0, rank)
    tolerance = 1e-6 if dtype != torch.bfloat16 else 2**-6
    for _ in range(2):
        before = full_values(model)
        assert all(value.dtype == dtype for value in before.values())
        plain.load_state_dict(before)
        value = loss(model, data)
        assert value.item() == pytest.approx(loss(plain, data).item(), rel=tolerance)
        value.backward()
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.grad is not None
            assert parameter.grad.dtype == dtype
        gradient = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        after = full_values(model)
        for name, parameter in before.items():
            assert gradient[name] is not None
            torch.testing.assert_close(
                after[name], (parameter.double() - 0.1 * gradient[name].double()).to(dtype)
            )


def _cast(rank: int, dims: int, how: str, when: str, units: str) -> None:
    # "groups": the final norm and the head form one unit of two modules.
    grouped = units == "groups"
    model = mics.shard_model(make_gpt(), mesh=mesh_of(dims)) if grouped else ours(dims)
    if when == "after a step":
        optimizer = torch.optim.AdamW(model.parameters())
        loss(model, batch(0, 0, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model(batch(0, 0, rank)[0])
    values = full_values(model)
    named = dict(model.named_parameters())
    result = {
        "bfloat16": lambda: model.to(torch.bfloat16),
        "double": lambda: model.double(),
        "to_empty": lambda: model.to_empty(device="cpu"),
        "cpu": lambda: model.to("cpu"),
    }[how]()
    assert result is model
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert list(dict(model.named_parameters())) == list(named)
    dtype = {"bfloat16": torch.bfloat16, "double": torch.float64}.get(how, torch.float32)
    if how == "to_empty":
        mics.load_full_state_dict(model, {name: v + 0.25 for name, v in values.items()})
        values = {name: v + 0.25 for name, v in values.items()}
    assert_same(full_values(model), {name: value.to(dtype) for name, value in values.items()})
    _check_views(model, rank, dtype)


@pytest.mark.parametrize("units", ["single", "groups"])
@pytest.mark.parametrize("when", ["before a forward", "after a step"])
@pytest.mark.parametrize("how", ["bfloat16", "double", "to_empty", "cpu"])
def test_moving_or_casting_the_model_keeps_one_set_of_values(how: str, when: str, units: str):
    on_ranks(_cast, 2, how, when, units)


@pytest.mark.parametrize("dims", DIMS)
@each_rank
def test_to_empty_brings_a_model_from_the_meta_device(rank: int, dims: int) -> None:
    """FSDP2's way: to_empty(), then the user's own initialisation of DTensors."""
    with torch.device("meta"):
        model = TinyGPT()
    ours(dims, model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    assert all(bool((value == 0.01).all()) for value in full_values(model).values())
    _check_views(model, rank, torch.float32)


# --- lifetime -------------------------------------------------------------------------------------


def _alive_after_use(rank: int, sharder: str, optimizes: bool) -> list[str]:
    model = ours(2) if sharder == "ours" else theirs(mesh_of(2))
    if optimizes:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss(model, batch(0, 0, rank)).backward()
        optimizer.step()
        del optimizer
    watched = {
        "model": weakref.ref(model),
        "block": weakref.ref(model.blocks[0]),
        "parameter": weakref.ref(model.blocks[0].up.weight),
    }
    del model
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]


@pytest.mark.parametrize("optimizes", [False, True])
@pytest.mark.parametrize("sharder", ["ours", "theirs"])
def test_model_is_freed_when_nothing_refers_to_it(sharder: str, optimizes: bool):
    assert on_ranks(_alive_after_use, sharder, optimizes) == [[]] * WORLD


def _threads_after_use(rank: int) -> int:
    model = mics.shard_model(make_gpt(blocks=1), shard_size=2)
    loss(model, batch(0, 0, rank)).backward()
    del model
    torch.distributed.destroy_process_group()
    gc.collect()
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_process_groups_and_their_threads_end_with_the_model():
    on_ranks(_threads_after_use)  # threads of what other tests have left end here
    first, second, third = (on_ranks(_threads_after_use) for _ in range(3))
    assert first == second == third
