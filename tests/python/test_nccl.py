"""NCCL from Python: what is installed, what is refused, and how a model finds its world.

The backend itself is proven in C++ (tests/cpp/nccl_*_test.cc), over fakes. Here its world is a stand-in
over Gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import weakref
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


@no_gpu
def test_cuda_without_a_gpu_is_refused_by_name():
    with pytest.raises(RuntimeError, match='device_type="cuda" needs a GPU and NCCL'):
        mics.init_mesh(1, device_type="cuda")
    assert not dist.is_initialized()  # a call that is refused leaves nothing behind


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
    usual = {"registration": "NONE", "copy_engine": False, "max_in_flight": 4, "max_ctas": 0}
    assert run_ranks(2, _options, {}) == [usual] * 2
    asked = {
        "MICS_NCCL_REGISTRATION": "windows",
        "MICS_NCCL_COPY_ENGINE": "1",
        "MICS_NCCL_MAX_IN_FLIGHT": "0",
        "MICS_NCCL_MAX_CTAS": "8",
    }
    wanted = {"registration": "WINDOWS", "copy_engine": True, "max_in_flight": 0, "max_ctas": 8}
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
        only_gathers: bool,
    ) -> Any:
        assert only_gathers == (name == "gather/intra")
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
        model = mics.shard_model(make_gpt(blocks=1), shard_size=2)
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
    nccl._world = weakref.ref(world)
    nccl.close()
    assert len(world.closed) == 1


def _timeout(rank: int) -> float:
    return _exchange.operation_timeout().total_seconds()


def test_the_time_out_is_that_of_the_process_group():
    assert run_ranks(1, _timeout)[0] > 0
