"""No tensor of the CPU where a GPU refuses one: scripts on a device without hardware, against the CPU."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
from support import fake_device
from support.device_scripts import SCRIPTS, Result, Script
from support.fakes import over_fakes
from support.planted import Place, find_places, planted
from support.ranks import run_outcomes, run_ranks

pytestmark = fake_device.needs_fake_device

DEVICE = fake_device.NAME


def _run(rank: int, device: str, carrier: str, shard_size: int, names: list[str]) -> list[Result]:
    """What each script came to, or the error."""
    scope: Any = contextlib.nullcontext()
    if carrier == "nccl":
        scope = over_fakes(rank, seed=5, device_type=device)
    with scope:
        return [SCRIPTS[name](Script(rank, device, shard_size)) for name in names]


_expected: dict[tuple[int, int, int, str], list[Result]] = {}  # by one run on the CPU


def _expect_equal(name: str, size: int, per_node: int, shard_size: int, carrier: str) -> None:
    key = (size, per_node, shard_size, name)
    arguments = (shard_size, [name])
    if key not in _expected:
        right = run_ranks(size, _run, "cpu", "", *arguments, ranks_per_node=per_node)
        _expected[key] = [results[0] for results in right]
    found = run_ranks(
        size, _run, DEVICE, carrier, *arguments, ranks_per_node=per_node, device=DEVICE
    )
    for (mine,), right in zip(found, _expected[key], strict=True):
        assert list(mine) == list(right)
        for tensor, value in right.items():
            assert torch.equal(mine[tensor], value), tensor
            assert not value.isnan().any() or name == "scaler", tensor


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_rank_does_what_it_does_on_the_cpu(name: str):
    _expect_equal(name, 1, 1, 1, "nccl")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_ranks_do_what_they_do_on_the_cpu(name: str):
    _expect_equal(name, 2, 2, 2, "nccl")


@pytest.mark.parametrize("name", ["accumulation", "bf16", "checkpoint", "collectives", "recovery"])
def test_process_groups_of_torch_do_what_they_do_on_the_cpu(name: str):
    _expect_equal(name, 2, 2, 2, "c10d")


@pytest.mark.parametrize("name", ["accumulation", "blocks", "habits", "checkpoint", "materialize"])
def test_two_nodes_do_what_they_do_on_the_cpu(name: str):
    _expect_equal(name, 4, 2, 4, "nccl")


# --- the device refuses what it should -------------------------------------------------------------


def _places(rank: int, name: str, size: int) -> list[Place]:
    with over_fakes(rank, device_type=DEVICE):
        return find_places(lambda: SCRIPTS[name](Script(rank, DEVICE, size)))


def _refused(rank: int, name: str, size: int, place: Place) -> str:
    with over_fakes(rank, device_type=DEVICE), planted(place):
        try:
            SCRIPTS[name](Script(rank, DEVICE, size))
        except Exception as error:
            return type(error).__name__
    return ""


@pytest.mark.parametrize(("name", "size"), [("accumulation", 1), ("bf16", 2)])
def test_memory_of_the_library_that_is_not_on_the_device_is_refused(name: str, size: int):
    options: Any = {"device": DEVICE, "ranks_per_node": size}
    places = run_ranks(size, _places, name, size, **options)[0]
    places = [place for place in places if 0 not in place.sizes]
    made_in = {(place.file, place.function) for place in places}
    # Shards, gradients, what the runtime works in, states of the optimizer, its blocks.
    assert made_in >= {
        ("_parameters.py", "_allocate"),
        ("_parameters.py", "make_gradients"),
        ("_flat_state.py", "_view"),
        ("optim.py", "_step_group"),
    }
    # Alone in fp32, the runtime needs no memory of its own.
    assert size == 1 or {file for file, _ in made_in} & {"_hooks.py", "_context.py"}
    # Each is a run of its own; on two ranks every third, all with MICS_WIDE=1.
    for place in places if size == 1 or "MICS_WIDE" in os.environ else places[::3]:
        outcomes = run_outcomes(size, _refused, name, size, place, **options)
        assert all(outcome.value or outcome.error_type for outcome in outcomes), place


def _meets(rank: int) -> list[str]:
    """The rules of a GPU, one by one."""
    fake_device.install()
    there, here = torch.ones(3, device=DEVICE), torch.ones(3)
    number = torch.tensor(2.0)
    refused = {
        "sum": lambda: there + here,
        "product of matrices": lambda: there.outer(there) @ here,
        "index": lambda: torch.nn.functional.embedding(number.long(), there.outer(there)),
        "in place": lambda: here.add_(there),
        "lists": lambda: torch._foreach_add_([there], [here]),
        "number written to": lambda: number.add_(there.sum()),
        "another device": lambda: there + torch.ones(3, device=f"{DEVICE}:1"),
        "generator": lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()),
        "numpy": lambda: there.numpy(),
    }
    wrong = []
    for name, operation in refused.items():
        with contextlib.suppress(RuntimeError, TypeError):
            operation()
            wrong.append(f"{name} was not refused")
    allowed = [there + number, there.mul_(number), torch._foreach_mul([there], number)[0]]
    allowed += [there[here.long() * 0], torch.empty(3, device=DEVICE).copy_(here)]
    return wrong + [f"{i}" for i, made in enumerate(allowed) if made.device.type != DEVICE]


def test_the_device_refuses_what_a_gpu_refuses_and_no_more():
    assert run_ranks(1, _meets, device=DEVICE) == [[]]
