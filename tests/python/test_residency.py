"""What a unit keeps between uses: fewer collectives, the same numbers, and never an old weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bodies import Stack, make, on_ranks, points, shard
from torch import nn

import torch_mics as mics
from torch_mics import _C

MICRO_STEPS = 3
NUM_UNITS = 4

SETTINGS: dict[str, dict[str, Any]] = {
    "MiCS": {"reshard_after_forward": True},
    "MiCS, no reshard": {"reshard_after_forward": False},
    "hpZ": {"reshard_after_forward": 2},
    "block": {"reshard_after_forward": 2, "keep_between_microsteps": "block"},
    "block, both ways": {
        "reshard_after_forward": 2,
        "keep_between_microsteps": "block",
        "accumulate": "block",
    },
    "ZeRO-2": {"reshard_after_forward": False, "keep_between_microsteps": "full"},
    "reshard, then block": {"reshard_after_forward": True, "keep_between_microsteps": "block"},
}


def residency(options: dict[str, Any]) -> _C.ResidencySettings:
    found = _C.ResidencySettings()
    after: object = options["reshard_after_forward"]
    after_forward = {True: _C.Residency.SHARD, False: _C.Residency.FULL}
    keeps_block = options.get("keep_between_microsteps") == "block" and after is True
    found.after_forward = (
        _C.Residency.BLOCK if after == 2 or keeps_block else after_forward[bool(after)]
    )
    found.between_microsteps = {
        "shard": _C.Residency.SHARD,
        "block": _C.Residency.BLOCK,
        "full": _C.Residency.FULL,
    }[options.get("keep_between_microsteps", "shard")]
    if options.get("accumulate") == "block":
        found.gradient_accumulation = _C.Residency.BLOCK
    return found


def run_step(model: Any, rank: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + MICRO_STEPS):
        with mics.microbatch(model, is_last=step == first + MICRO_STEPS - 1):
            loss = model(points(rank, step)).square().mean()
            loss.backward()
            losses.append(loss.item())
    return losses


def calls(model: Any) -> dict[str, int]:
    return {name: counters["calls"] for name, counters in mics.traffic(model).items()}


@on_ranks(4, cases=list(SETTINGS))
def test_hops_run_as_often_as_the_cost_model_says(world, name):
    model = shard(world, make(Stack), **SETTINGS[name])
    before = {"gather/rail": 0, "gather/intra": 0, "reduce/rail": 0, "reduce/intra": 0}
    for step in range(2):
        run_step(model, world.rank, step * MICRO_STEPS)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
        expected = _C.count_hops(residency(SETTINGS[name]), MICRO_STEPS, replication_size=1)
        now = calls(model)
        counted = [now[key] - before[key] for key in before]
        wanted = [
            expected.gather_rail,
            expected.gather_intra,
            expected.reduce_rail,
            expected.reduce_intra,
        ]
        assert counted == [count * NUM_UNITS for count in wanted], name
        before = {key: now[key] for key in before}


@on_ranks(4, cases=[name for name in SETTINGS if name != "MiCS"])
def test_training_is_the_same_whatever_is_kept(world, name):
    models = [shard(world, make(Stack), **SETTINGS[each]) for each in ("MiCS", name)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            losses.append(run_step(model, world.rank, step * MICRO_STEPS))
            optimizer.step()
            optimizer.zero_grad()
        # A gradient block sums over micro-steps before nodes: the same terms in another order.
        is_exact = SETTINGS[name].get("accumulate") != "block"
        assert losses[0] == (losses[1] if is_exact else pytest.approx(losses[1], rel=1e-6))
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if is_exact:
            assert torch.equal(mine.to_local(), other.to_local())
        else:
            torch.testing.assert_close(mine.to_local(), other.to_local(), rtol=1e-5, atol=1e-7)


def write_by_optimizer(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.25).step()
    model.zero_grad()


def write_by_copy(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.full_like(parameter, 0.25))


def write_by_load(model: Any) -> None:
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


def write_by_unsharded(model: Any) -> None:
    with mics.unsharded(model, writeback=True), torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)


WRITES = {
    "optimizer": write_by_optimizer,
    "copy_": write_by_copy,
    "load_state_dict": write_by_load,
    "unsharded": write_by_unsharded,
}


@on_ranks(4, cases=[(w, s) for w in WRITES for s in ("block", "ZeRO-2", "hpZ")])
def test_changed_weight_is_never_missed(world, case):
    write, name = case
    models = [shard(world, make(Stack), **SETTINGS[each]) for each in ("MiCS", name)]
    values = []
    for model in models:
        before = run_step(model, world.rank)
        WRITES[write](model)
        model.zero_grad()
        values.append(run_step(model, world.rank))
        assert values[-1] != before
    assert values[0] == values[1]


@on_ranks(4)
def test_settings_may_change_between_steps(world):
    model = shard(world, make(Stack), **SETTINGS["MiCS"])
    run_step(model, world.rank)
    small = mics.memory(model)
    model.set_reshard_after_forward(2)
    model.set_keep_between_microsteps("block")
    run_step(model, world.rank)
    large = mics.memory(model)
    assert "blocks, kept" not in small
    assert large["blocks, kept"] > 0
    count = calls(model)["gather/rail"]
    run_step(model, world.rank)
    assert calls(model)["gather/rail"] == count + NUM_UNITS  # once in a step
    model.set_keep_between_microsteps("shard")
    model.set_reshard_after_forward(True)
    run_step(model, world.rank)
    assert calls(model)["gather/rail"] == count + (1 + 2 * MICRO_STEPS) * NUM_UNITS


@on_ranks(2)
def test_block_needs_two_hops(world):
    for options, asked in (
        ({"reshard_after_forward": 3}, "reshard_after_forward=3 needs"),
        ({"keep_between_microsteps": "block"}, "keep_between_microsteps=.block. needs"),
        ({"accumulate": "block"}, "accumulate=.block. needs"),
        ({"keep_between_microsteps": "node"}, 'must be "shard", "block" or "full": got .node'),
        ({"reshard_after_forward": "node"}, "or a number of ranks: got .node"),
    ):
        with pytest.raises(ValueError, match=asked):
            mics.fully_shard(nn.Linear(2, 2), mesh=world.mesh, **options)
    # The partition group's own size is no block.
    model = shard(world, make(Stack), reshard_after_forward=2)
    run_step(model, world.rank)
    with pytest.raises(ValueError, match="needs a partition group over several nodes"):
        model.set_keep_between_microsteps("block")


@on_ranks(4)
def test_number_of_ranks_must_be_that_of_a_node(world):
    with pytest.raises(ValueError, match="the ranks of a node or of the partition group: got 3"):
        mics.fully_shard(nn.Linear(2, 2), mesh=world.mesh, reshard_after_forward=3)
    with pytest.raises(ValueError, match="Without two hops"):
        mics.fully_shard(
            nn.Linear(2, 2), mesh=world.mesh, reshard_after_forward=2, hierarchical_gather=False
        )


class Narrow(nn.Module):
    """Two rows: of four ranks two have none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(x @ self.weight.T) @ self.weight


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.layers = nn.ModuleList([Narrow(), nn.Linear(6, 6), Narrow()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Unseen(torch.optim.Optimizer):
    """Steps as a kernel of its own would: no version counter moves, and where there is nothing it does
    nothing.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            mine, gradient = parameter.to_local(), parameter.grad.to_local()
            if mine.numel() > 0:
                mine.data.sub_(gradient, alpha=0.01)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "mics.SGD": lambda parameters: mics.optim.SGD(parameters, lr=0.01),
    "mics.AdamW": lambda parameters: mics.optim.AdamW(parameters, lr=0.01),
    "unseen": Unseen,
}


# A rank without a row has nothing to write, but must gather when the others do.
@on_ranks(
    4,
    cases=[
        (optimizer, kept, evaluates)
        for optimizer in OPTIMIZERS
        for kept in ("MiCS", "block", "ZeRO-2")
        for evaluates in (False, True)
    ],
)
def test_ranks_without_a_row_gather_as_the_others(world, case):
    optimizer, kept, evaluates = case
    models = [shard(world, make(Uneven), **SETTINGS[each]) for each in ("MiCS", kept)]
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    for step in range(3):
        losses = []
        for model, stepping in zip(models, optimizers, strict=True):
            losses.append(run_step(model, world.rank, step * MICRO_STEPS))
            if evaluates:
                with torch.no_grad():
                    model(points(world.rank, 0))
            stepping.step()
            stepping.zero_grad()
        assert losses[0] == losses[1]
