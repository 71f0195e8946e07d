"""Mixed precision and buffers, compared with a single process."""

from __future__ import annotations

from typing import Any

import torch
from support.bodies import (
    LIMIT,
    WORLD,
    Layer,
    Stack,
    expect_gradients,
    make,
    on_ranks,
    points,
    shard,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import torch_mics as mics

MICRO_STEPS = 3


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
    train_alone_in(torch.float32, exact, MICRO_STEPS)
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
