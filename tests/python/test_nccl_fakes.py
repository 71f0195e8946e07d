"""The wrapper on the production NCCL code over fakes: ranks are processes, streams run late by chance.

What a model comes to must be what it comes to over shared memory, to the bit: both sum in rank order.
"""

from __future__ import annotations

import gc
import itertools
import os
from typing import Any
from unittest import mock

import pytest
import torch
from support.bodies import RANKS_PER_NODE, World
from support.fakes import needs_fakes, over_fakes
from support.models import batch, loss, make_gpt
from support.programs import RandomProgram
from support.ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_mics as mics
from torch_mics import _C
from torch_mics._context import contexts_of
from torch_mics._groups import Groups
from torch_mics._nccl import Nccl
from torch_mics._unit import units_of

pytestmark = needs_fakes

STEPS = 3
MICRO_STEPS = 2
SEEDS = (0, 1, 2)


State = dict[str, torch.Tensor]

BF16 = mics.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)


class Recomputed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.block, x, use_reentrant=False)
        return result


def _train(rank: int, options: dict[str, Any], recomputes: bool = False) -> tuple[State, str]:
    """Gives parameters, losses and norms of gradients, and what carried the collectives."""
    model = make_gpt(tied=True)
    if recomputes:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = Recomputed(block)
    model = mics.shard_model(model, **options)
    optimizer = mics.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = []
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            with mics.microbatch(model, is_last=micro_step == MICRO_STEPS - 1):
                value = loss(model, batch(step, micro_step, rank))
                (value / MICRO_STEPS).backward()
            numbers.append(value.detach())
        numbers.append(mics.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    state = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    state["numbers"] = torch.stack([torch.as_tensor(number) for number in numbers])
    return state, ", ".join(mics.backends(model).values())


def _train_over_fakes(
    rank: int, fakes: dict[str, Any], registration: str, *arguments: Any
) -> tuple[State, str, dict[str, int]]:
    kind = getattr(_C.NcclRegistration, registration)
    with over_fakes(rank, registration=kind, **fakes) as device:
        state, carriers = _train(rank, *arguments)
        gc.collect()
        counts = device.take_counts()
    return state, carriers, counts


_EXPECTED: dict[tuple[int, int, str], list[tuple[State, str]]] = {}  # of runs without fakes


def _expect_equal(size: int, per_node: int, fakes: dict[str, Any], registration: str, *arguments):
    key = (size, per_node, repr(arguments))
    if key not in _EXPECTED:
        _EXPECTED[key] = run_ranks(size, _train, *arguments, ranks_per_node=per_node)
    expected = _EXPECTED[key]
    found = run_ranks(
        size, _train_over_fakes, fakes, registration, *arguments, ranks_per_node=per_node
    )
    for (state, carriers, counts), (theirs, other_carriers) in zip(found, expected, strict=True):
        assert "nccl" in carriers
        assert "nccl" not in other_carriers
        assert counts["launch"] > 0
        # As FSDP2's: all streams but that of the replicas' sums.
        assert (counts["pool_stream high"], counts["pool_stream"]) == (4, 1)
        assert "synchronisation" not in counts
        for name, value in theirs.items():
            assert torch.equal(state[name], value), name
            assert not value.isnan().any(), name
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("size", "per_node", "shard_size"),
    [(2, 2, 2), (2, 1, 2), (2, 1, 1), (4, 2, 4), (4, 2, 2), (4, 4, 2), (4, 1, 4)],
)
def test_a_model_comes_to_the_same_bits(size: int, per_node: int, shard_size: int, seed: int):
    _expect_equal(size, per_node, {"seed": seed}, "NONE", {"shard_size": shard_size})


@pytest.mark.parametrize(
    ("options", "recomputes"),
    [
        ({"mp_policy": BF16}, False),
        ({"hierarchical_gather": False}, False),
        ({"reshard_after_forward": False}, False),
        ({"keep_between_microsteps": "full"}, False),
        ({"keep_between_microsteps": "block", "reshard_after_forward": 2}, False),
        ({"mp_policy": BF16}, True),
    ],
    ids=["bf16", "flat", "full-in-backward", "full", "block", "recomputed"],
)
def test_settings_come_to_the_same_bits(options: dict[str, Any], recomputes: bool):
    _expect_equal(4, 2, {"seed": 3}, "NONE", {"shard_size": 4, **options}, recomputes)


@pytest.mark.parametrize("registration", ["BUFFERS", "WINDOWS"])
def test_registered_memory_comes_to_the_same_bits(registration: str):
    has_windows = registration == "WINDOWS"
    fakes = {"seed": 1, "copy_engine": has_windows}
    found = _expect_equal(4, 2, fakes, registration, {"shard_size": 4})
    for _, _, counts in found:
        assert counts["mem_alloc"] == 1
        assert counts.get("by a copy engine", 0) > 0 or not has_windows


def _mean_of(rank: int, values: list[float], dtype: torch.dtype, as_nccl: bool) -> torch.Tensor:
    """Gives the gradient of two weights that is `values[r]` on rank r, reduced in `dtype`."""
    policy = mics.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    with over_fakes(rank, sums_in_fp32=not as_nccl):
        torch.manual_seed(0)
        model = mics.shard_model(nn.Linear(1, len(values), bias=False), mp_policy=policy)
        model(torch.tensor([[values[rank]]])).sum().backward()
        gradient: torch.Tensor = model.weight.grad.full_tensor().clone()
    return gradient


@pytest.mark.parametrize("as_nccl", [True, False])
def test_fp16_gradients_whose_sum_overflows_come_to_their_mean(as_nccl: bool):
    """As in one process: the sum of the ranks is 80000, beyond fp16."""
    for gradient in run_ranks(2, _mean_of, [40000.0, 40000.0], torch.float16, as_nccl):
        assert gradient.eq(40000).all()


@pytest.mark.parametrize(("as_nccl", "mean"), [(True, 64), (False, 65)])
def test_bf16_gradients_are_summed_as_the_backend_declares(as_nccl: bool, mean: float):
    """256 + 1 is 256 in bf16; 259 in fp32 is rounded to 260."""
    for gradient in run_ranks(4, _mean_of, [256.0, 1.0, 1.0, 1.0], torch.bfloat16, as_nccl):
        assert gradient.eq(mean).all()


def _sums_in_wire_dtype(rank: int) -> set[bool]:
    with over_fakes(rank):
        model = mics.shard_model(make_gpt(blocks=1), shard_size=1)
        loss(model, batch(0, 0, rank)).backward()
        (context,) = contexts_of(units_of(model))
        found = context.all_communicators()
    return {each.sums_in_wire_dtype for each in found if each.size > 1}


def test_a_communicator_sums_as_its_backend_declares():
    assert "dtype sent" in Nccl.properties.precision
    assert run_ranks(2, _sums_in_wire_dtype) == [{True}, {True}]


def _memory(rank: int) -> dict[str, int]:
    with over_fakes(rank, registration=_C.NcclRegistration.BUFFERS):
        model = mics.shard_model(make_gpt(blocks=1), shard_size=2)
        loss(model, batch(0, 0, rank)).backward()
        planned = sum(mics.memory(model).values())
        with (
            mock.patch.object(Groups, "device", torch.device("cuda", 0)),
            mock.patch.object(torch.cuda, "mem_get_info", return_value=(10**6, 10**8)),
            mock.patch.object(torch.cuda, "memory_reserved", return_value=10**7),
        ):
            found = mics.memory(model)
        # All that is in use and not torch's, each byte once: the plan is in memory of NCCL's.
        assert sum(found.values()) == 10**8 - 10**6 - 10**7
        assert found["outside torch"] == sum(found.values()) - planned
        del model  # which holds memory of NCCL
    return found


def test_memory_that_torch_does_not_count_is_reported():
    for found in run_ranks(2, _memory):
        assert found["outside torch"] > 0


def _calls_of_a_step(rank: int, shard_size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Gives what NCCL was called with, and the launches of each communicator."""
    with over_fakes(rank) as device:
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        model = mics.fully_shard(model, mesh=mics.init_mesh(shard_size, device_type="cpu"))
        model(torch.ones(1, 3)).sum().backward()
        before = mics.traffic(model)
        device.take_counts()
        model(torch.ones(1, 3)).sum().backward()
        counts = device.take_counts()
        launches = {
            name: counters["calls"] - before[name]["calls"]
            for name, counters in mics.traffic(model).items()
        }
    return counts, launches


@pytest.mark.parametrize(("shard_size", "nodes"), [(4, 2), (2, 1)])
def test_a_unit_is_one_group_with_a_call_for_each_node_and_parameter(shard_size: int, nodes: int):
    """As docs/streams.md says."""
    for counts, launches in run_ranks(4, _calls_of_a_step, shard_size, ranks_per_node=2):
        gathers, reductions = launches["gather/intra"], launches["reduce/intra"]
        assert gathers > 0
        assert reductions > 0
        rails = 1 if nodes > 1 else 0
        assert counts["group_start"] == gathers + reductions
        assert counts["all_gather"] == gathers * (nodes * 4 + rails)
        assert counts["reduce_scatter"] == reductions * (nodes * 4 + rails)


def _models_in_turn(rank: int) -> list[int]:
    made = []
    with over_fakes(rank) as device:
        for _ in range(3):
            model = mics.shard_model(make_gpt(blocks=1), shard_size=2)
            loss(model, batch(0, 0, rank)).backward()
            del model
            gc.collect()
            counts = device.take_counts()
            made.append(counts.get("comm_init_rank_config", 0) + counts.get("comm_split", 0))
            assert "comm_abort" not in counts
    return made


def test_models_that_come_and_go_use_the_communicators_of_those_before():
    for made in run_ranks(4, _models_in_turn):
        assert made[0] > 0
        assert made[1:] == [0, 0]


def _run_program(rank: int, shard_size: int, seed: int, registration: str) -> int:
    kind = getattr(_C.NcclRegistration, registration)
    with over_fakes(rank, seed=seed + 1, registration=kind) as device:
        mesh = mics.init_mesh(shard_size, device_type="cpu", gpus_per_node=RANKS_PER_NODE)
        RandomProgram(World(rank, mesh), seed).run()
        gc.collect()
        count: int = device.take_counts()["launch"]
    return count


def programs() -> list[tuple[int, int, str]]:
    """Six programs, each with another registration over either shard size; 240 with MICS_WIDE=1."""
    if "MICS_WIDE" in os.environ:
        return list(itertools.product((4, 2), range(1000, 1060), ("NONE", "WINDOWS")))
    shapes = itertools.product((4, 2), range(1000, 1006))
    return [(n, seed, ("NONE", "WINDOWS")[(seed + n // 2) % 2]) for n, seed in shapes]


@pytest.mark.parametrize(("shard_size", "seed", "registration"), programs())
def test_random_programs_do_what_they_do_in_one_process(
    shard_size: int, seed: int, registration: str
):
    assert min(run_ranks(4, _run_program, shard_size, seed, registration)) > 0
