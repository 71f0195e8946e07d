"""First values that a device's own generator draws: those of one process on rank 0's random state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import fake_device
from support.meta_models import SEED, differences
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics
from torch_mics._random_state import random_state

pytestmark = fake_device.needs_fake_device

DEVICE = fake_device.NAME


class Draws(nn.Module):
    """Draws on the device, on the CPU, and from seeds of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        with torch.random.fork_rng(devices=[]):  # of the CPU alone
            torch.manual_seed(1)
            self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.noise = torch.randn(2, device="cpu")
        self.fourth = nn.Linear(4, 4)


def _seed(rank: int) -> None:
    """As a program that seeds every device of every rank differently."""
    torch.manual_seed(SEED + rank)
    torch.get_device_module(DEVICE).manual_seed_all(SEED + 100 + rank)


def _plain(cls: Any) -> nn.Module:
    _seed(0)
    with torch.device(DEVICE):
        return cls()


def _recorded(rank: int, shard_size: int, between: str) -> list[str]:
    _seed(rank)
    with mics.meta_device():
        model = Draws()
    if between == "seeded":
        torch.manual_seed(77 + rank)
    elif between == "drawn":
        torch.randn(1 + rank, device=DEVICE)
    mesh = mics.init_mesh(shard_size, device_type=DEVICE)
    mics.fully_shard(model, mesh=mesh)
    mics.materialize(model)
    return differences(model, _plain(Draws))


@pytest.mark.parametrize("between", ["nothing", "seeded", "drawn"])
@pytest.mark.parametrize("shard_size", [1, 2])
def test_a_recorded_construction_draws_from_the_generators_that_rank_0_had_there(
    shard_size: int, between: str
) -> None:
    assert run_ranks(2, _recorded, shard_size, between, device=DEVICE) == [[], []]


class DrawsElsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))
        with torch.no_grad():
            self.weight.copy_(torch.randn(4, 4, device="cpu"))


def _elsewhere(rank: int, differs: bool) -> str:
    _seed(rank if differs else 0)
    with mics.meta_device():
        model = DrawsElsewhere()
    mics.fully_shard(model, mesh=mics.init_mesh(2, device_type=DEVICE))
    try:
        mics.materialize(model)
    except ValueError as error:
        assert model.weight.is_meta
        return str(error)
    return str(differences(model, _plain(DrawsElsewhere)))


def test_values_that_a_constructor_draws_outside_the_meta_device_are_compared() -> None:
    assert run_ranks(2, _elsewhere, False, device=DEVICE) == ["[]", "[]"]
    texts = run_ranks(2, _elsewhere, True, device=DEVICE)
    assert "what constructors bring to parameters must be the same on every rank" in texts[0]
    assert texts[0] == texts[1]


def _initialised(rank: int) -> list[str]:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mics.fully_shard(model, mesh=mics.init_mesh(1, device_type=DEVICE))
    _seed(rank)
    mics.materialize(model)
    return differences(model, _plain(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))


def test_initialisers_draw_from_the_generators_that_rank_0_has() -> None:
    assert run_ranks(2, _initialised, device=DEVICE) == [[], []]


def _state_after(rank: int, differs: bool, seeds_again: bool, device: str) -> tuple[bool, bool]:
    """Whether each generator is where it was, after a call that drew from it."""
    seed = rank if differs else 0
    _seed(seed)
    with mics.meta_device():
        model = nn.Linear(4, 4)
    if seeds_again:
        _seed(seed + 5)
    mics.fully_shard(model, mesh=mics.init_mesh(1, device_type=device))
    before = random_state()
    mics.materialize(model)
    after = random_state()
    return after.cpu == before.cpu, after.device == before.device


@pytest.mark.parametrize("device", ["cpu", DEVICE])
def test_the_generators_go_on_as_those_of_a_process_that_built_the_model(device: str) -> None:
    # Where the ranks drew alike, the one that drew has moved on; a rank that had others has its own.
    moved = (device != "cpu", device == "cpu")
    still = (True, True)
    assert run_ranks(2, _state_after, False, False, device, device=DEVICE) == [moved, moved]
    assert run_ranks(2, _state_after, True, False, device, device=DEVICE) == [moved, still]
    # What the program sets after construction, it finds again.
    assert run_ranks(2, _state_after, False, True, device, device=DEVICE) == [still, still]
    assert run_ranks(2, _state_after, True, True, device, device=DEVICE) == [still, still]


def _fails(rank: int) -> bool:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    mics.fully_shard(model, mesh=mics.init_mesh(1, device_type=DEVICE))
    _seed(rank)
    before = random_state()
    with pytest.raises(ValueError, match="an initialiser must run"):
        mics.materialize(model, init_fn=_draw_and_raise)
    return random_state() == before


def _draw_and_raise(module: nn.Module) -> None:
    torch.randn(3), torch.randn(3, device=DEVICE)
    raise ValueError("no")


def test_a_call_that_fails_has_drawn_nothing() -> None:
    assert run_ranks(2, _fails, device=DEVICE) == [True, True]


class SeedsAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        torch.manual_seed(1)
        self.second = nn.Linear(4, 4)


def _not_started(rank: int) -> list[str]:
    """The device's library is started only after construction, as CUDA's may be."""
    module: Any = torch.get_device_module(DEVICE)
    torch.manual_seed(SEED)
    module.is_started = False
    with mics.meta_device():
        model = SeedsAgain()
    assert not module.is_started
    mics.fully_shard(model, mesh=mics.init_mesh(2, device_type=DEVICE))
    mics.materialize(model)
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        plain = SeedsAgain()
    return differences(model, plain)


def test_a_device_that_is_not_started_is_known_by_its_seed() -> None:
    assert run_ranks(2, _not_started, device=DEVICE) == [[], []]
