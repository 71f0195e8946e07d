"""Micro-steps, boundaries and mixed precision, compared with a single process.

As in test_features.py, bodies run on four ranks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from support.bodies import (
    LIMIT,
    NUM_UNITS,
    WORLD,
    Layer,
    OutputsOnRequest,
    Stack,
    calls,
    expect_gradients,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import torch_mics as mics

MICRO_STEPS = 3

# --- boundaries -----------------------------------------------------------------------------------


def part_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    return model(points(rank, step)).square().mean() / MICRO_STEPS


def accumulate_alone(model: nn.Module, first: int = 0) -> None:
    for step in range(first, first + MICRO_STEPS):
        train_alone(model, functools.partial(part_of, step=step))


@contextlib.contextmanager
def micro_step(model: Any, how: str, is_last: bool) -> Iterator[None]:
    """One micro-step; only the last is a boundary, but under "plain" each is."""
    if how == "microbatch":
        with mics.microbatch(model, is_last=is_last):
            yield
    elif how == "no_sync":
        with contextlib.nullcontext() if is_last else model.no_sync():
            yield
    else:
        if how != "plain":
            getattr(model, how)(is_last)
        yield


def accumulate(model: Any, rank: int, how: str = "microbatch", first: int = 0) -> None:
    for step in range(first, first + MICRO_STEPS):
        with micro_step(model, how, step == first + MICRO_STEPS - 1):
            part_of(model, rank, step).backward()


def local_gradients(model: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.to_local().clone() for p in model.parameters()]


def same_bits(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, b) for a, b in pairs if a is not None and b is not None) and all(
        (a is None) == (b is None) for a, b in pairs
    )


HOW = ("microbatch", "no_sync", "set_requires_gradient_sync", "set_requires_all_reduce")


@on_ranks()
def test_ways_to_accumulate_give_the_same_bits_and_one_hop_2(world):
    plain = make(Stack)
    accumulate_alone(plain)
    found = []
    for how in HOW:
        model = shard(world, make(Stack))
        for step in range(MICRO_STEPS):
            assert all(p.grad is None for p in model.parameters()), how
            assert calls(model, "replicate") == 0, how
            with micro_step(model, how, step == MICRO_STEPS - 1):
                part_of(model, world.rank, step).backward()
        expect_gradients(world, model, plain)
        assert calls(model, "reduce/intra") == MICRO_STEPS * NUM_UNITS, how
        assert calls(model, "replicate") == (NUM_UNITS if world.partition_size < WORLD else 0), how
        found.append(local_gradients(model))
    assert all(same_bits(found[0], other) for other in found[1:])
    assert any(g.count_nonzero() > 0 for g in found[0])


@on_ranks()
def test_plain_loop_adds_up_with_a_boundary_in_every_backward(world):
    model, plain = twins(world, Stack)
    for step in range(MICRO_STEPS):
        part_of(model, world.rank, step).backward()
        assert all(p.grad is not None for p in model.parameters())
        train_alone(plain, functools.partial(part_of, step=step))
        expect_gradients(world, model, plain)
    expected = MICRO_STEPS * NUM_UNITS if world.partition_size < WORLD else 0
    assert calls(model, "replicate") == expected


@on_ranks(2, cases=[*HOW, "plain"])
def test_gradients_add_up_over_boundaries_without_zero_grad(world, how):
    model, plain = twins(world, Stack)
    accumulate(model, world.rank, how)
    accumulate_alone(plain)
    before = local_gradients(model)
    for step in (3, 4, 5):
        with micro_step(model, how, step == 5):
            part_of(model, world.rank, step).backward()
        if step < 5 and how != "plain":
            assert same_bits(local_gradients(model), before)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)


@on_ranks(cases=[True, False, "optimizer"])
def test_zero_grad_begins_a_new_sum(world, set_to_none):
    model, plain = twins(world, Stack)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for first in (0, 3):
        if set_to_none == "optimizer":
            optimizer.zero_grad(set_to_none=False)
        else:
            model.zero_grad(set_to_none=set_to_none)
        if first > 0:
            assert all((p.grad is None) == (set_to_none is True) for p in model.parameters())
        accumulate(model, world.rank, first=first)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)


@on_ranks()
def test_zero_grad_inside_an_accumulation_drops_it(world):
    model, plain = twins(world, Stack)
    with mics.microbatch(model, is_last=False):
        part_of(model, world.rank, 9).backward()
    model.zero_grad()
    accumulate(model, world.rank)
    accumulate_alone(plain)
    expect_gradients(world, model, plain)


@on_ranks(cases=["tensor", "tensor inside an accumulation", "some None", "in place"])
def test_gradient_that_the_user_changed_is_part_of_the_sum(world, how):
    model, plain = twins(world, Stack)

    def change(each: nn.Module) -> None:
        for i, parameter in enumerate(each.parameters()):
            if how == "in place":
                parameter.grad.mul_(2)
            elif how == "some None":
                parameter.grad = None if i % 3 == 0 else parameter.grad
            else:
                parameter.grad = parameter.grad * 3

    accumulate(model, world.rank)
    accumulate_alone(plain)
    if "inside" not in how:
        change(model)
    change(plain)
    for step in (3, 4, 5):
        with mics.microbatch(model, is_last=step == 5):
            part_of(model, world.rank, step).backward()
        if step == 3 and "inside" in how:
            change(model)
    accumulate_alone(plain, first=3)
    expect_gradients(world, model, plain)
    # And the library's own buffer is in use again after a new start.
    for each in (model, plain):
        each.zero_grad()
    accumulate(model, world.rank, first=6)
    accumulate_alone(plain, first=6)
    expect_gradients(world, model, plain)


@on_ranks(cases=HOW[:3])
def test_local_accumulation_reduces_nothing_before_the_boundary(world, how):
    model, plain = twins(world, Stack, accumulate="local")
    for step in range(MICRO_STEPS):
        assert calls(model, "reduce/intra") == 0 if step > 0 else not mics.traffic(model)
        assert all(p.grad is None for p in model.parameters())
        with micro_step(model, how, step == MICRO_STEPS - 1):
            part_of(model, world.rank, step).backward()
    accumulate_alone(plain)
    expect_gradients(world, model, plain)
    assert calls(model, "reduce/intra") == NUM_UNITS


class LayersOnRequest(Stack):
    """Runs only the layers asked for."""

    def forward(self, x: torch.Tensor, wanted: set[int]) -> torch.Tensor:
        x = self.embed(x)
        for i in sorted(wanted):
            x = self.layers[i](x)
        return self.head(x)


@on_ranks(cases=[(a, u) for a in ("two_hop", "local") for u in ("not run", "no gradient")])
def test_unit_that_the_last_micro_step_does_not_use_keeps_its_gradient(world, case):
    kind, use = case
    cls = LayersOnRequest if use == "not run" else OutputsOnRequest
    wanted = [{0, 1, 2}, {0, 2}]

    def value(model: nn.Module, rank: int, step: int) -> torch.Tensor:
        return model(points(rank, step), wanted[step]).square().mean()

    model, plain = twins(world, cls, accumulate=kind)
    for step in range(2):
        with mics.microbatch(model, is_last=step == 1):
            value(model, world.rank, step).backward()
        train_alone(plain, functools.partial(value, step=step))
    assert plain.layers[1].up.weight.grad is not None
    expect_gradients(world, model, plain)


@on_ranks()
def test_several_backwards_of_a_micro_step_are_one_boundary(world):
    model, plain = twins(world, Stack)
    values = [part_of(model, world.rank, step) for step in range(MICRO_STEPS)]
    for step, value in enumerate(values):
        model.set_is_last_backward(step == MICRO_STEPS - 1)
        assert all(p.grad is None for p in model.parameters())
        value.backward()
    accumulate_alone(plain)
    expect_gradients(world, model, plain)
    assert calls(model, "replicate") == (NUM_UNITS if world.partition_size < WORLD else 0)


@on_ranks()
def test_parameter_used_in_one_micro_step_on_one_rank_has_a_gradient(world):
    def value(model: nn.Module, rank: int, step: int) -> torch.Tensor:
        wanted = {0, 1, 2} if (rank, step) == (1, 0) else {0, 2}
        return model(points(rank, step), wanted).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    for step in range(MICRO_STEPS):
        with mics.microbatch(model, is_last=step == MICRO_STEPS - 1):
            value(model, world.rank, step).backward()
        train_alone(plain, functools.partial(value, step=step))
    assert plain.layers[1].up.weight.grad is not None
    expect_gradients(world, model, plain)


# --- mixed precision ------------------------------------------------------------------------------


def train_alone_in(dtype: torch.dtype, plain: Stack, num_micro_steps: int) -> None:
    """Computes in `dtype` and sums in fp32."""
    for step in range(num_micro_steps):
        for rank in range(WORLD):
            copy = make(Stack).to(dtype)
            output = copy(points(rank, step).to(dtype))
            (output.float().square().mean() / num_micro_steps).backward()
            for mine, other in zip(plain.parameters(), copy.parameters(), strict=True):
                mine.grad = other.grad.float() / WORLD + (0 if mine.grad is None else mine.grad)


BF16 = torch.bfloat16
POLICIES = {
    "bf16": ("bf16", LIMIT),
    "reduced in bf16": (MixedPrecisionPolicy(param_dtype=BF16), 2.0**-8),
    "bf16 in, fp32 out": (
        MixedPrecisionPolicy(
            param_dtype=BF16, reduce_dtype=torch.float32, output_dtype=torch.float32
        ),
        # The cast of each layer's output rounds nothing; only the sum is in another order.
        LIMIT,
    ),
}


@on_ranks(cases=list(POLICIES))
def test_bf16_gradients_are_those_of_a_process_that_computes_in_bf16(world, name):
    policy, limit = POLICIES[name]
    model, plain = make(Stack), make(Stack)
    mics.fully_shard(model, mesh=world.mesh, mp_policy=policy)
    for step in range(MICRO_STEPS):
        with mics.microbatch(model, is_last=step == MICRO_STEPS - 1):
            output = model(points(world.rank, step))
            assert output.dtype == (torch.float32 if "out" in name else BF16)
            (output.float().square().mean() / MICRO_STEPS).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    train_alone_in(BF16, plain, MICRO_STEPS)
    expect_gradients(world, model, plain, limit)
    # It did compute in bf16: fp32 is further away.
    exact = make(Stack)
    accumulate_alone(exact)
    error = (plain.embed.weight.grad - exact.embed.weight.grad).norm()
    assert error > 100 * LIMIT * exact.embed.weight.grad.norm()


class Recorder(nn.Module):
    """Tells the dtypes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor, count: torch.Tensor, *, more: dict[str, Any]) -> Any:
        self.seen = [x.dtype, count.dtype, more["deep"][0].dtype, self.weight.dtype]
        return {"y": x.to(self.weight.dtype) * self.weight, "count": count, "text": "kept"}


@on_ranks(2, cases=[True, False])
def test_inputs_and_outputs_are_cast_as_the_policy_says(world, cast):
    policy = MixedPrecisionPolicy(
        param_dtype=BF16, output_dtype=torch.float64, cast_forward_inputs=cast
    )
    model = mics.fully_shard(Recorder(), mesh=world.mesh, mp_policy=policy)
    x = torch.ones(2, 3, requires_grad=True)
    output = model(x, torch.tensor(3), more={"deep": [torch.ones(1)]})
    dtype = BF16 if cast else torch.float32
    assert model.seen == [dtype, torch.int64, dtype, BF16]
    assert output["y"].dtype == torch.float64
    assert output["count"].dtype == torch.int64
    assert output["text"] == "kept"
    output["y"].sum().backward()
    assert x.grad.dtype == torch.float32
    assert torch.equal(model.weight.grad.full_tensor(), torch.full((3,), 2.0))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 8.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


@on_ranks()
def test_infinity_in_one_shard_makes_all_ranks_skip_and_lower_the_scale(world):
    model = mics.fully_shard(Product(), mesh=world.mesh, mp_policy="fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, growth_interval=2)

    def step(x: torch.Tensor) -> list[float]:
        optimizer.zero_grad()
        scaler.scale(model(x).float()).backward()
        scaler.unscale_(optimizer)
        mics.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        assert len(set(world.gather(scaler.get_scale()))) == 1
        return model.weight.detach().full_tensor().tolist()

    start = model.weight.detach().full_tensor().tolist()
    x = torch.ones(7)
    if world.rank == 3:
        # Times the scale beyond fp16, in the first row alone: other ranks hold no infinity.
        x[0] = 60000.0
    assert step(x) == start
    assert scaler.get_scale() == 512.0
    # Then it goes on; all numbers here are exact.
    assert step(torch.full((7,), 2.0)) == [value - 0.5 for value in start]
    assert scaler.get_scale() == 512.0
    assert step(torch.full((7,), float(world.rank))) == [value - 0.875 for value in start]
    assert scaler.get_scale() == 1024.0


@on_ranks(2, cases=["two_hop", "local"])
def test_bf16_model_adds_up_many_tiny_gradients_in_fp32(world, kind):
    num_micro_steps = 300 if kind == "two_hop" else 2
    model = nn.Linear(4, 5, bias=False).to(BF16)
    mics.fully_shard(model, mesh=world.mesh, accumulate=kind)
    assert model.weight.dtype == BF16
    for step in range(num_micro_steps):
        # 1 + 2**-9 is 1 in bf16, so that a sum in bf16 would stay 1.
        x = torch.full((1, 4), 1.0 if step == 0 else 2.0**-9, dtype=BF16)
        with mics.microbatch(model, is_last=step == num_micro_steps - 1):
            model(x).sum().backward()
    gradient = model.weight.grad.full_tensor()
    assert gradient.dtype == BF16
    right = torch.tensor(1 + (num_micro_steps - 1) * 2.0**-9).to(BF16)
    assert (right > 1.5) == (kind == "two_hop")
    assert torch.equal(gradient, right.expand(5, 4))


# --- buffers --------------------------------------------------------------------------------------


class WithBuffers(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))
        self.register_buffer("num_calls", torch.tensor(0))
        self.register_buffer("scale", torch.full((3,), 1.0 / 3.0))
        self.register_buffer("secret", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        self.num_calls += 1
        self.running_mean.mul_(0.9).add_(x.detach().float().mean(0), alpha=0.1)
        x = (x - self.running_mean.to(x.dtype)) * self.scale.to(x.dtype)[0]
        return super().forward(x, use_spare) * self.secret.to(x.dtype)[0]


@on_ranks(cases=[None, "bf16"])
def test_buffers_stay_plain_local_and_in_the_state_dict(world, policy):
    model = make(Stack, WithBuffers)
    plain = make(Stack, WithBuffers)
    shard(world, model, mp_policy=policy)
    for _ in range(2):
        model(points(world.rank)).float().square().mean().backward()
        plain(points(world.rank))
    buffers = dict(plain.named_buffers())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "layers.0.secret" in buffers
    for name, buffer in model.named_buffers():
        assert type(buffer) is torch.Tensor
        assert buffer.dtype == buffers[name].dtype, name
        if policy is None or "running" not in name:
            # Running statistics are this rank's own, as in one process on its data.
            assert torch.equal(buffer, buffers[name]), name
        if "secret" not in name:
            assert torch.equal(model.state_dict()[name], buffer), name
    assert model.layers[0].num_calls == 2
    means = world.gather(model.layers[0].running_mean)
    assert not torch.equal(means[0], means[1])
