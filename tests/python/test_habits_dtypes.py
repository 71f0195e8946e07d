"""Dtypes and kinds of parameters: as in one process or FSDP2, or refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.bodies import WORLD, expect_gradients, make, on_ranks, points, train_alone, value_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torch_mics as mics

# --- dtypes ---------------------------------------------------------------------------------------


FROZEN = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int64": torch.int64,
    "bool": torch.bool,
    "complex64": torch.complex64,
}


class Adapted(nn.Module):
    """A frozen base of another dtype, and trainable adapters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        values = torch.randn(5, 6)
        if not dtype.is_floating_point and not dtype.is_complex:
            values = values.round().abs()
        self.base = nn.Parameter(values.to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = self.base.real if self.base.is_complex() else self.base
        assert self.scale.dtype == self.base.dtype
        return F.linear(x, base.to(x.dtype)) + self.up(self.down(x))


class AdaptedNet(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 6), Adapted(dtype), nn.Linear(5, 3)) for _ in range(2)
        )
        self.head = Adapted(dtype)
        self.embed = nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.embed(x))


@on_ranks(4, 2, 1, cases=list(FROZEN))
def test_frozen_parameters_may_have_any_dtype(world, name):
    dtype = FROZEN[name]
    model, plain = make(AdaptedNet, dtype), make(AdaptedNet, dtype)
    for layer in model.layers:
        mics.fully_shard(layer, mesh=world.mesh)
    mics.fully_shard(model, mesh=world.mesh)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4) for m in (model, plain)]
    for step in range(2):
        for micro_step in range(2):
            with mics.microbatch(model, is_last=micro_step == 1):
                (value_of(model, world.rank) / 2).backward()
            train_alone(plain, value_of, 2)
        expect_gradients(world, model, plain, 2e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model(points(step)), plain(points(step)))
    full = mics.full_state_dict(model, rank0_only=False)
    for key, value in plain.state_dict().items():
        assert full[key].dtype == value.dtype
        assert full[key].shape == value.shape
    copied = copy.deepcopy(model.state_dict())
    model.load_state_dict(copied)


@on_ranks(4, 2)
def test_base_in_bf16_with_adapters_in_fp32_trains_as_fsdp2(world):
    """Under a policy every floating point parameter is cast, as there."""
    policy = mics.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(3, 4).to(torch.bfloat16).requires_grad_(False)
            self.adapter = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + self.adapter(x)

    ours = mics.fully_shard(make(Mixed), mesh=world.mesh, mp_policy=policy)
    theirs = fully_shard(make(Mixed), mesh=init_device_mesh("cpu", (WORLD,)), mp_policy=policy)
    for model in (ours, theirs):
        model(points(world.rank)).float().square().mean().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == other.dtype
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(
                mine.grad.full_tensor(), other.grad.full_tensor(), rtol=1e-2, atol=1e-3
            )


@on_ranks(4)
def test_trainable_parameters_of_a_unit_have_one_dtype(world):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="trainable parameters of a unit must have one dtype"):
        mics.fully_shard(model, mesh=world.mesh)
    assert not isinstance(model[0].weight, DTensor)


@on_ranks(4, 2)
def test_frozen_parameters_of_another_dtype_may_be_unfrozen(world):
    model, plain = make(AdaptedNet, torch.float64), make(AdaptedNet, torch.float64)
    for layer in model.layers:
        mics.fully_shard(layer, mesh=world.mesh)
    mics.fully_shard(model, mesh=world.mesh)
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    for each in (model, plain):
        each.layers[1][1].base.requires_grad_(True)
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    for name, parameter in plain.named_parameters():
        mine = model.get_parameter(name)
        assert (mine.grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                mine.grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-6
            )


# --- kinds of tensors -----------------------------------------------------------------------------


class Quantised(torch.Tensor):
    """A wrapper subclass with the extension of FSDP2."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Quantised:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors: Any, context: Any, size: Any, stride: Any) -> Quantised:
        return Quantised(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.inner * 2 if isinstance(a, Quantised) else a for a in args]
        out = func(*plain, **(kwargs or {}))
        return Quantised(args[0].inner) if func is torch.ops.aten.detach.default else out

    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self.inner,), None

    def fsdp_post_all_gather(self, outputs: Any, metadata: Any, dtype: Any, **_: Any) -> Any:
        return Quantised(outputs[0]), outputs


class PlainSubclass(torch.Tensor):
    """A subclass without an extension: its operations mean something else all the same."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Extended(nn.Parameter):
    def fsdp_pre_all_gather(self, mesh: Any) -> Any:
        return (self.data,), None


KINDS = {
    "wrapper": lambda: nn.Parameter(Quantised(torch.ones(4, 3))),
    "subclass": lambda: nn.Parameter(torch.ones(4, 3).as_subclass(PlainSubclass)),
    "extended parameter": lambda: Extended(torch.ones(4, 3)),
    "lazy": lambda: nn.UninitializedParameter(),
}


@on_ranks(4, cases=list(KINDS))
def test_tensors_that_say_how_they_are_gathered_are_refused_by_name(world, kind):
    model = nn.Module()
    model.plain = nn.Linear(2, 2)
    model.odd = KINDS[kind]()
    model.forward = lambda x: x
    words = "have a shape" if kind == "lazy" else "be a plain tensor"
    with pytest.raises(ValueError, match=rf'must {words}: got .*for "odd"'):
        mics.fully_shard(model, mesh=world.mesh)
    assert not isinstance(model.plain.weight, DTensor)
    if kind != "lazy":
        mics.fully_shard(model, mesh=world.mesh, ignored_params={model.odd})
