"""First values, full parameters and norms of models that shard_model() has sharded."""

from __future__ import annotations

from unittest import mock

import torch
from support.bodies import (
    WORLD,
    Layer,
    Stack,
    expect_gradients,
    expect_step,
    expect_values,
    fail_text,
    make,
    on_ranks,
    points,
    shard,
    train_alone,
    twins,
    value_of,
)
from support.models import TinyGPT, first_loss, make_gpt
from torch import nn

import torch_mics as mics

# --- units ----------------------------------------------------------------------------------------


# --- first values ---------------------------------------------------------------------------------


class Odd(nn.Module):
    """A norm without reset_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


class Initialised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = Odd()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Odd):
            nn.init.normal_(module.gain)
            module.table.copy_(torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def seed(number: int) -> None:
    torch.manual_seed(number)


@on_ranks(1, 2, 4, cases=[False, True])
def test_materialize_gives_the_values_of_a_single_process(world, tied):
    with torch.device("meta"):
        model = TinyGPT(tied)
    mics.shard_model(model, mesh=world.mesh)
    assert all(p.is_meta for p in model.parameters())
    # The random state of rank 0 counts.
    seed(5 + world.rank)
    mics.materialize(model)
    seed(5)
    plain = TinyGPT(tied)
    if tied:
        # Whoever builds on the meta device calls each module's initialiser, in the model's order.
        seed(5)
        for module in plain.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    expect_values(model, plain)
    expect_step(world, model, plain, first_loss)


@on_ranks(1, 2, 4, cases=["_init_weights", "init_fn"])
def test_materialize_takes_the_initialiser_of_the_model(world, how):
    with torch.device("meta"):
        model = Initialised()
    shard(world, model)
    seed(5 + world.rank)
    mics.materialize(model, init_fn=model._init_weights if how == "init_fn" else None)
    plain = Initialised()
    seed(5)
    for module in plain.modules():
        # A module's own reset_parameters() comes before the model's _init_weights().
        if how == "_init_weights" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
        plain._init_weights(module)
    expect_values(model, plain)
    assert torch.equal(model.norm.table, torch.arange(4.0))


@on_ranks(2)
def test_materialize_leaves_what_has_values(world):
    model, plain = make(Initialised), make(Initialised)
    model.layers[1].to("meta")
    shard(world, model)
    seed(5 + world.rank)
    mics.materialize(model)
    seed(5)
    for part in (plain.layers[1].up, plain.layers[1].down, plain.layers[1].spare):
        part.reset_parameters()
        plain._init_weights(part)
    expect_values(model, plain)


# --- unsharded ------------------------------------------------------------------------------------


@on_ranks(cases=[(when, back) for when in ("before", "after a step") for back in (True, False)])
def test_unsharded_gives_full_parameters_and_writes_back_on_request(world, case):
    when, writeback = case
    model = mics.shard_model(make_gpt(tied=True), mesh=world.mesh)
    plain = make_gpt(tied=True)
    if when == "after a step":
        first_loss(model, world.rank).backward()
        model.zero_grad()
    sharded = dict(model.named_parameters())
    with mics.unsharded(model, writeback=writeback), torch.no_grad():
        right = dict(plain.named_parameters())
        full = dict(model.named_parameters())
        assert list(full) == list(right)
        for name, parameter in full.items():
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, right[name])
            parameter.mul_(2)
        assert model.head.weight is model.tokens.weight
    assert all(parameter is sharded[name] for name, parameter in model.named_parameters())
    if writeback:
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(2)
    expect_values(model, plain)
    expect_step(world, model, plain, first_loss)


@on_ranks()
def test_unsharded_after_an_exception_writes_nothing(world):
    model, plain = twins(world, Stack)

    class Stop(Exception):
        pass

    stopped = False
    try:
        with mics.unsharded(model, writeback=True), torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            raise Stop
    except Stop:
        stopped = True
    assert stopped
    expect_values(model, plain)


@on_ranks()
def test_unsharded_with_writeback_is_refused_inside_an_accumulation(world):
    model, plain = twins(world, Stack)

    def write() -> None:
        with mics.unsharded(model, writeback=True):
            pass

    with mics.microbatch(model, is_last=False):
        value_of(model, world.rank).backward()
    assert "must not be written during an accumulation" in fail_text(write)
    with mics.unsharded(model):
        assert torch.equal(model.head.weight, plain.head.weight)
    value_of(model, world.rank).backward()
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


# --- clip_grad_norm_ ------------------------------------------------------------------------------


@on_ranks(cases=[1.0, 2.0, float("inf")])
def test_clipping_works_on_the_gradients_of_torch(world, norm_type):
    model, plain = twins(world, Stack)
    extra = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for each, beside in zip((model, plain), extra, strict=True):
        each.layers[1].spare.requires_grad_(False)
        beside.grad = torch.tensor([1.0, -2.0, 0.5])
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    before = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    # A plain parameter, the same on every rank, counts once.
    norm = mics.clip_grad_norm_([*model.parameters(), extra[0]], 0.1, norm_type)
    right = torch.nn.utils.clip_grad_norm_([*plain.parameters(), extra[1]], 0.1, norm_type)
    assert len(set(world.gather(norm.item()))) == 1
    assert right > 0.1
    # A norm of fp32 numbers summed in another order, times each gradient.
    assert abs(norm - right) <= 1e-6 * right
    expect_gradients(world, model, plain, limit=2e-6)
    torch.testing.assert_close(extra[0].grad, extra[1].grad, rtol=2e-6, atol=0)
    # A norm below the bound leaves every bit.
    kept = [p.grad.to_local().clone() for p in model.parameters() if p.grad is not None]
    mics.clip_grad_norm_(model.parameters(), 1e6, norm_type)
    now = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(kept, now, strict=True))
    assert len(kept) == len(before)


@on_ranks()
def test_clipping_scales_a_unit_at_once_and_reduces_once(world):
    # Dimensions that 4 divides leave no gaps between the gradients of a unit.
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3)))
    mics.shard_model(model, units=list(model), mesh=world.mesh)
    model(torch.ones(2, 8)).sum().backward()
    foreach_mul, all_reduce = torch._foreach_mul_, torch.distributed.all_reduce
    with (
        mock.patch.object(torch, "_foreach_mul_", wraps=foreach_mul) as products,
        mock.patch.object(torch.distributed, "all_reduce", wraps=all_reduce) as reductions,
    ):
        mics.clip_grad_norm_(model.parameters(), 0.1)
    assert [len(call.args[0]) for call in products.call_args_list] == [3]
    assert reductions.call_count == 1


@on_ranks(cases=[float("inf"), float("nan")])
def test_norm_that_is_not_finite_raises_on_every_rank_or_is_returned(world, bad):
    model, _ = twins(world, Stack)
    value_of(model, world.rank).backward()
    weight = model.layers[0].up.weight
    if world.rank % world.partition_size == 0:
        # In one shard of each replica.
        weight.grad.to_local()[0, 0] = bad
    before = [p.grad.to_local().clone() for p in model.parameters()]
    text = fail_text(lambda: mics.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True))
    assert "the gradient norm must be finite" in text
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad.to_local().isfinite(), kept.isfinite())
        assert torch.equal(parameter.grad.to_local().nan_to_num(), kept.nan_to_num())
    norm = mics.clip_grad_norm_(model.parameters(), 1.0)
    norms = world.gather(str(norm.item()))
    assert norms == [str(bad)] * WORLD


@on_ranks()
def test_norm_without_gradients_is_zero(world):
    model, _ = twins(world, Stack)
    assert mics.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
    model(points(world.rank))
    assert mics.clip_grad_norm_(model.parameters(), 1.0).item() == 0.0
