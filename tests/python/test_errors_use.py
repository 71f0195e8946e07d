"""Arguments that break a rule, and calls at the wrong time, are refused on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.errors import (
    WORLD,
    caught,
    expect_caught,
    parameters_of,
    refused_on_each_rank,
    sharded_gpt,
)
from support.models import Block, TinyGPT, batch, loss, make_gpt
from support.ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import torch_mics as mics

# --- arguments ------------------------------------------------------------------------------------


def _bad_arguments(rank: int) -> dict[str, tuple[str, str]]:
    mesh = mics.init_mesh(2)
    override = MixedPrecisionPolicy()
    calls: dict[str, Callable[[], object]] = {}

    def shard(name: str, **options: Any) -> None:
        calls[f"shard_model {name}"] = lambda: mics.shard_model(make_gpt(blocks=2), **options)
        if "units" not in options:
            calls[f"fully_shard {name}"] = lambda: mics.fully_shard(make_gpt(blocks=2), **options)

    shard("mesh and shard_size", mesh=mesh, shard_size=2)
    shard("mp_policy string", mesh=mesh, mp_policy="fp8")
    shard("mp_policy type", mesh=mesh, mp_policy=torch.bfloat16)
    shard("accumulate", mesh=mesh, accumulate="global")
    shard("reshard_after_forward", mesh=mesh, reshard_after_forward=3)
    shard("units string", mesh=mesh, units="blocks")
    shard("units type", mesh=mesh, units=1.5)
    shard("units bool", mesh=mesh, units=True)
    shard("units number", mesh=mesh, units=0)
    shard("units elsewhere", mesh=mesh, units=[nn.Linear(2, 2)])
    shard("units not found", mesh=mesh, units={nn.Conv2d})
    calls["offload_policy"] = lambda: mics.fully_shard(
        make_gpt(blocks=1), mesh=mesh, offload_policy=CPUOffloadPolicy()
    )
    calls["shard_placement_fn"] = lambda: mics.fully_shard(
        make_gpt(blocks=1), mesh=mesh, shard_placement_fn=lambda parameter: None
    )
    calls["empty list"] = lambda: mics.fully_shard([], mesh=mesh)
    calls["not a module"] = lambda: mics.fully_shard(make_gpt(blocks=1).head.weight, mesh=mesh)
    calls["ModuleList"] = lambda: mics.fully_shard(make_gpt(blocks=2).blocks, mesh=mesh)
    if hasattr(override, "param_dtype_override_fn"):
        override = MixedPrecisionPolicy(param_dtype_override_fn=lambda *_: torch.float32)
        calls["override"] = lambda: mics.fully_shard(
            make_gpt(blocks=1), mesh=mesh, mp_policy=override
        )
    calls["set_reshard_after_forward"] = lambda: sharded_gpt().set_reshard_after_forward(3)
    calls["divide factor"] = lambda: sharded_gpt().set_gradient_divide_factor(0.0)
    calls["prefetch"] = lambda: sharded_gpt().set_modules_to_forward_prefetch([nn.Linear(2, 2)])
    calls["microbatch"] = lambda: mics.microbatch(nn.Linear(2, 2), is_last=True).__enter__()
    calls["full_state_dict"] = lambda: mics.full_state_dict(nn.Linear(2, 2))
    calls["rank0_only"] = lambda: mics.full_state_dict(sharded_gpt(), cpu_offload=False)
    calls["extra"] = lambda: mics.checkpoint.TrainState(sharded_gpt(), counter=3)
    return {name: caught(call) for name, call in calls.items()}


BOTH = ("ValueError", "give either a mesh or a shard_size", "got both (shard_size=2)")
BAD_ARGUMENTS = {
    "shard_model mesh and shard_size": BOTH,
    "fully_shard mesh and shard_size": BOTH,
    "shard_model mp_policy string": ("ValueError", '"bf16", "fp16" or a MixedPrec', "got 'fp8'"),
    "fully_shard mp_policy string": ("ValueError", '"bf16", "fp16" or a MixedPrec', "got 'fp8'"),
    "shard_model mp_policy type": ("TypeError", "or a MixedPrecisionPolicy", "got dtype"),
    "fully_shard mp_policy type": ("TypeError", "or a MixedPrecisionPolicy", "got dtype"),
    "shard_model accumulate": ("ValueError", '"two_hop", "block" or "local"', "got 'global'"),
    "fully_shard accumulate": ("ValueError", '"two_hop", "block" or "local"', "got 'global'"),
    "shard_model reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "fully_shard reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "shard_model units string": ("ValueError", 'units must be "auto"', "got 'blocks'"),
    "shard_model units type": ("TypeError", 'must be "auto"', "got float"),
    "shard_model units bool": ("TypeError", "must not be a bool", "got True"),
    "shard_model units number": ("ValueError", "must be at least 1", "got 0"),
    "shard_model units elsewhere": ("ValueError", "must be modules of the model", "Linear"),
    "shard_model units not found": ("ValueError", "no module of TinyGPT is a unit", "Conv2d"),
    "offload_policy": ("ValueError", "must be OffloadPolicy()", "got CPUOffloadPolicy"),
    "shard_placement_fn": ("ValueError", "shard_placement_fn must be None", "along dim 0"),
    "empty list": ("ValueError", "at least one module", "empty list"),
    "not a module": ("TypeError", "takes modules", "got Parameter"),
    "ModuleList": ("ValueError", "modules with a forward", "got ModuleList", "Shard its members"),
    "set_reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "divide factor": ("ValueError", "must be positive", "factor=0.0"),
    "prefetch": ("ValueError", "must be sharded by torch_mics", "got Linear"),
    "microbatch": ("TypeError", "microbatch needs a sharded model", "got Linear", "shard_model()"),
    "full_state_dict": ("TypeError", "full_state_dict needs a sharded model", "got Linear"),
    "rank0_only": ("ValueError", "rank0_only needs cpu_offload", "Pass rank0_only=False"),
    "extra": ("TypeError", "must have state_dict() and load_state_dict()", "counter=int"),
}


@pytest.fixture(scope="module")
def bad_arguments() -> list[dict[str, tuple[str, str]]]:
    return run_ranks(WORLD, _bad_arguments)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_argument_that_breaks_a_rule_is_refused(
    case: str, bad_arguments: list[dict[str, tuple[str, str]]]
):
    expect_caught([found[case] for found in bad_arguments], *BAD_ARGUMENTS[case])


def test_every_bad_argument_is_looked_at(bad_arguments: list[dict[str, tuple[str, str]]]):
    # param_dtype_override_fn came after torch 2.11.
    for found in bad_arguments:
        error = found.pop("override", None)
        assert error is None or (error[0] == "ValueError" and "param_dtype_override_fn" in error[1])
        assert set(found) == set(BAD_ARGUMENTS)


def _bad_argument_leaves_the_model_alone(rank: int) -> bool:
    model = make_gpt(blocks=2)
    before = dict(model.named_parameters())
    for options in ({"mp_policy": "fp8"}, {"accumulate": "x"}, {"reshard_after_forward": 3}):
        assert caught(lambda options=options: mics.shard_model(model, shard_size=2, **options))[0]
    unchanged = type(model) is TinyGPT and all(type(block) is Block for block in model.blocks)
    return unchanged and all(before[name] is now for name, now in model.named_parameters())


def test_bad_argument_leaves_the_model_as_it_was():
    assert run_ranks(WORLD, _bad_argument_leaves_the_model_alone) == [True] * WORLD


# --- wrong use ------------------------------------------------------------------------------------


def _wrong_uses(rank: int) -> dict[str, tuple[str, str]]:
    model = sharded_gpt()
    block = model.blocks[0]
    x = torch.zeros(1, 12)
    found = {
        "shard twice": caught(lambda: mics.shard_model(model, shard_size=2)),
        "shard a unit twice": caught(lambda: mics.fully_shard(block, shard_size=2)),
        "deepcopy": caught(lambda: copy.deepcopy(model)),
        "deepcopy of a unit": caught(lambda: copy.deepcopy(block)),
        "inner module before a forward": caught(lambda: block.up(x)),
    }
    loss(model, batch(0, 0, rank)).backward()
    found["inner module"] = caught(lambda: block.up(x))
    found["a method that is no forward"] = caught(lambda: model.encode(batch(0, 0, rank)[0]))
    with mics.unsharded(model):
        found["forward inside unsharded"] = caught(lambda: model(batch(0, 0, rank)[0]))
        found["inner module inside unsharded"] = caught(lambda: block.up(x))
    block.unshard()
    found["inner module of an unsharded unit"] = caught(lambda: block.up(x))
    block.reshard()
    found["inner module of a resharded unit"] = caught(lambda: block.up(x))
    # None of this has broken anything.
    found["training"] = caught(lambda: loss(model, batch(1, 0, rank)).backward())
    return found


INSIDE = ("RuntimeError", "must run inside the unit's forward", "Call the unit, or unshard() it")
WRONG_USES = {
    "shard twice": ("ValueError", "may be sharded once"),
    "shard a unit twice": ("ValueError", "may be sharded once", "Block"),
    "deepcopy": ("RuntimeError", "must not be copied", "TinyGPT", "Copy before sharding"),
    "deepcopy of a unit": ("RuntimeError", "must not be copied", "Block", "Copy before sharding"),
    "inner module before a forward": (*INSIDE, "a call of Linear while its unit"),
    "inner module": (*INSIDE, 'a call of Linear while its unit "blocks.0" is sharded'),
    "a method that is no forward": ("",),
    "forward inside unsharded": ("RuntimeError", "forward must not run inside unsharded()"),
    "inner module inside unsharded": ("",),
    "inner module of an unsharded unit": ("",),
    "inner module of a resharded unit": (*INSIDE, '"blocks.0"'),
    "training": ("",),
}


@pytest.fixture(scope="module")
def wrong_uses() -> list[dict[str, tuple[str, str]]]:
    return run_ranks(WORLD, _wrong_uses)


@pytest.mark.parametrize("case", WRONG_USES)
def test_wrong_use_is_told_from_right_use(case: str, wrong_uses: list[dict[str, tuple[str, str]]]):
    expect_caught([found[case] for found in wrong_uses], *WRONG_USES[case])


def _deepcopy_of_a_container(rank: int) -> tuple[str, str]:
    holder = nn.Sequential(nn.Identity(), sharded_gpt())
    return caught(lambda: copy.deepcopy(holder))


def test_deepcopy_of_what_holds_a_sharded_module_is_refused():
    expect_caught(run_ranks(WORLD, _deepcopy_of_a_container), "RuntimeError", "must not be copied")


@pytest.mark.parametrize("how", ["microbatch", "no_sync", "set_requires_all_reduce", "local"])
@refused_on_each_rank(
    "RuntimeError",
    "an optimizer may step only after an accumulation boundary",
    '"blocks.0"',
    '"blocks.1"',
    '"tokens"',
    "microbatch(model, is_last=True)",
)
def test_step_with_unfinished_accumulation_names_the_units(rank: int, how: str) -> None:
    model = sharded_gpt(accumulate="local" if how == "local" else "two_hop")
    optimizer = torch.optim.AdamW(model.parameters())
    if how == "microbatch":
        with mics.microbatch(model, is_last=False):
            loss(model, batch(0, 0, rank)).backward()
    elif how == "set_requires_all_reduce":
        model.set_requires_all_reduce(False)
        loss(model, batch(0, 0, rank)).backward()
    else:
        with model.no_sync():
            loss(model, batch(0, 0, rank)).backward()
    before = parameters_of(model)
    kind, text = caught(optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))
    assert kind == "RuntimeError", (kind, text)
    # The boundary makes it right again.
    model.set_requires_all_reduce(True)
    loss(model, batch(0, 1, rank)).backward()
    optimizer.step()
    raise RuntimeError(text)


@refused_on_each_rank(
    "RuntimeError",
    "must not be moved or replaced during an accumulation",
    "not synchronised",
    "reset()",
)
def test_moving_parameters_inside_an_accumulation_is_refused(rank: int) -> None:
    model = sharded_gpt()
    with model.no_sync():
        loss(model, batch(0, 0, rank)).backward()
    model.to(torch.bfloat16)


@refused_on_each_rank(
    "RuntimeError",
    "parameters must have values before the first forward",
    "is on the meta device",
    "torch_mics.materialize(model), or load a state dict",
)
def test_forward_on_the_meta_device_asks_for_materialize(rank: int) -> None:
    with torch.device("meta"):
        model = TinyGPT(blocks=1)
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])


class NoInitialiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@refused_on_each_rank(
    "ValueError",
    "needs an initialiser",
    "1 (NoInitialiser), 2 (NoInitialiser)",
    "reset_parameters(), or pass init_fn",
)
def test_materialize_names_every_module_without_initialiser(rank: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), NoInitialiser(), NoInitialiser())
    mics.fully_shard(model, shard_size=2)
    mics.materialize(model)
