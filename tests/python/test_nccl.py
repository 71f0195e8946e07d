"""NCCL from Python: what is installed, what is refused, and how a model finds its world.

The backend itself is proven in C++ (tests/cpp/nccl_*_test.cc), over fakes. Here its world is a stand-in
over Gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.fakes import carried_by
from support.models import batch, loss, make_gpt
from support.ranks import RankFailure, run_ranks

import torch_mics as mics
from torch_mics import _C, _exchange, _nccl

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a GPU")


def test_versions_are_those_of_the_libraries_that_torch_uses():
    versions = _C.nccl_versions()
    if versions.library == 0:
        pytest.skip(f"no NCCL: {versions.problem}")
    assert versions.header >= 21800
    if torch.version.cuda is not None:
        assert _nccl.version_text(versions.library) == ".".join(map(str, torch.cuda.nccl.version()))
        assert versions.cuda_runtime // 1000 == int(torch.version.cuda.partition(".")[0])


def _refused(rank: int) -> bool:
    with pytest.raises(RuntimeError, match='device_type="cuda" needs a GPU and NCCL'):
        mics.init_mesh(1, device_type="cuda")
    return dist.is_initialized()


@no_gpu
def test_cuda_without_a_gpu_is_refused_by_name():
    # A call that is refused leaves nothing behind.
    assert run_ranks(1, _refused, initialise=False) == [False]


def _make_world(rank: int) -> str:
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        pytest.raises(ValueError, match="NCCL needs a GPU") as caught,
    ):
        _nccl.Nccl().world()
    return str(caught.value)


@no_gpu
def test_a_world_without_a_gpu_is_refused_on_every_rank():
    assert len(set(run_ranks(2, _make_world))) == 1


def _options(rank: int, environment: dict[str, str]) -> Any:
    with mock.patch.dict(os.environ, environment):
        options = _nccl.options_from_environment()
    return options | {"registration": options["registration"].name}


def _differing(rank: int) -> str:
    value = "windows" if rank == 1 else "buffers"
    with (
        mock.patch.dict(os.environ, MICS_NCCL_REGISTRATION=value),
        pytest.raises(ValueError, match="must be the same on every rank") as caught,
    ):
        _nccl.options_from_environment()
    return str(caught.value)


def test_what_is_asked_of_nccl_comes_from_the_environment():
    usual = {
        "registration": "NONE",
        "copy_engine": False,
        "max_in_flight": 4,
        "max_ctas": 0,
        "is_blocking": True,
    }
    assert run_ranks(2, _options, {}) == [usual] * 2
    asked = {
        "MICS_NCCL_REGISTRATION": "windows",
        "MICS_NCCL_COPY_ENGINE": "1",
        "MICS_NCCL_MAX_IN_FLIGHT": "0",
        "MICS_NCCL_MAX_CTAS": "8",
        "MICS_NCCL_BLOCKING": "0",
    }
    wanted = {
        "registration": "WINDOWS",
        "copy_engine": True,
        "max_in_flight": 0,
        "max_ctas": 8,
        "is_blocking": False,
    }
    assert run_ranks(2, _options, asked) == [wanted] * 2


def test_ranks_that_ask_for_other_things_are_named_on_every_rank():
    for text in run_ranks(2, _differing):
        assert (
            "MICS_NCCL_REGISTRATION = buffers on world_rank 0 and windows on world_rank 1" in text
        )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MICS_NCCL_REGISTRATION", "symmetric"),
        ("MICS_NCCL_COPY_ENGINE", "yes"),
        ("MICS_NCCL_MAX_IN_FLIGHT", "-1"),
        ("MICS_NCCL_MAX_CTAS", "many"),
        ("MICS_NCCL_BLOCKING", "no"),
    ],
)
def test_values_that_nothing_knows_are_refused(variable: str, value: str):
    with pytest.raises(RankFailure, match=f"{variable} must be .*: got '{value}'"):
        run_ranks(2, _options, {variable: value})


class StandIn:
    """Has the methods of _C.NcclWorld."""

    def __init__(self) -> None:
        self.made: list[tuple[str, list[int], int]] = []

    def make_communicator(
        self,
        *,
        name: str,
        world_ranks: list[int],
        nodes: list[int],
        rank: int,
        direction: _C.NcclDirection,
        only_gathers: bool,
    ) -> Any:
        assert only_gathers == (name == "gather/intra")
        assert direction.name.lower() == {"control": "gather"}.get(name, name.partition("/")[0])
        self.made.append((name, world_ranks, rank))
        return _C.make_c10d_communicator(
            dist.new_group(world_ranks, use_local_synchronization=True),
            name=name,
            world_ranks=world_ranks,
            nodes=nodes,
            rank=rank,
            timeout=datetime.timedelta(seconds=300),
        )

    def make_streams(self) -> _C.RuntimeStreams:
        return _C.RuntimeStreams(on_threads=False)

    def notes(self) -> list[str]:
        return ["a note"]


def _train(rank: int, through_world: bool) -> tuple[torch.Tensor, dict[str, str], str, list[Any]]:
    world = StandIn() if through_world else None
    with carried_by(world) if through_world else contextlib.nullcontext():
        mesh = mics.init_mesh(2, device_type="cpu")  # also where there is a GPU
        model = mics.shard_model(make_gpt(blocks=1), mesh=mesh)
        loss(model, batch(0, 0, rank)).backward()
    gradient = model.blocks[0].up.weight.grad.full_tensor()
    report = mics.describe(model)
    return gradient, mics.backends(model), report, world.made if world is not None else []


def test_a_model_takes_its_communicators_and_streams_from_the_world():
    theirs = run_ranks(4, _train, False)
    ours = run_ranks(4, _train, True)
    text = f"nccl {_nccl.version_text(_C.nccl_versions().library)}"
    for rank, (gradient, backends, report, made) in enumerate(ours):
        assert torch.equal(gradient, theirs[rank][0])
        assert set(backends.values()) == {text}
        assert "note: a note" in report
        group, index = [2 * (rank // 2), 2 * (rank // 2) + 1], rank % 2
        assert sorted(made) == sorted(
            [
                ("control", [0, 1, 2, 3], rank),
                ("gather/intra", group, index),
                ("reduce/intra", group, index),
                ("replicate", [rank % 2, rank % 2 + 2], rank // 2),
            ]
        )


class Closing:
    """Has the end of _C.NcclWorld."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.closed: list[datetime.timedelta] = []

    def close(self, patience: datetime.timedelta) -> None:
        self.closed.append(patience)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, _C.TimeoutError("late")])
def test_the_end_of_the_process_closes_the_world_and_raises_nothing(error: Exception | None):
    world: Any = Closing(error)
    nccl = _nccl.Nccl()
    nccl._world = world
    nccl.close()
    assert len(world.closed) == 1
    nccl.close()
    assert len(world.closed) == 1


def test_a_world_outlives_the_models_and_ends_when_a_later_session_makes_its_own():
    """Not when Python collects the last model of a rank."""
    made: list[Closing] = []

    def make(*_: Any, **__: Any) -> Any:
        made.append(Closing(None))
        return made[-1]

    with (
        mock.patch.object(_C, "NcclWorld", make),
        mock.patch.object(_nccl, "options_from_environment", return_value={}),
        mock.patch.object(_nccl, "operation_timeout", return_value=None),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "get_world_size", return_value=1),
        mock.patch.object(
            dist.distributed_c10d, "_get_default_store", return_value=dist.HashStore()
        ),
        mock.patch.dict(os.environ),
    ):
        first, second = _nccl.Nccl(), _nccl.Nccl()
        assert first.world() is first.world()
        gc.collect()
        assert made[0].closed == []
        second.world()
        assert [len(world.closed) for world in made] == [1, 0]
        second.close()
        assert [len(world.closed) for world in made] == [1, 1]
    assert _nccl.Nccl._living == []


@pytest.mark.parametrize(
    ("version", "asked", "set_to"), [(22600, None, "1"), (22809, "0", "0"), (22502, None, None)]
)
def test_launches_are_ordered_unless_the_user_decides(version: int, asked, set_to):
    name = "NCCL_LAUNCH_ORDER_IMPLICIT"
    with mock.patch.dict(os.environ, {} if asked is None else {name: asked}):
        if asked is None:
            os.environ.pop(name, None)
        _nccl.order_launches(version)
        assert os.environ.get(name) == set_to


def test_memory_outside_torch_leaves_out_what_torch_and_the_plan_count():
    world: Any = mock.Mock(allocated_nbytes=100)
    with (
        mock.patch.object(torch.cuda, "mem_get_info", return_value=(5000, 10000)),
        mock.patch.object(torch.cuda, "memory_reserved", return_value=3000),
    ):
        assert _nccl.nbytes_outside_torch(world, torch.device("cuda", 0)) == 1900


def _timeout(rank: int) -> float:
    return _exchange.operation_timeout().total_seconds()


def test_the_time_out_is_that_of_the_process_group():
    assert run_ranks(1, _timeout)[0] > 0
