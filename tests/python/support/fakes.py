"""The fakes of CUDA and NCCL for ranks that are processes: nccl_fakes, which the C++ tests build.

with over_fakes(rank, seed=1) as device:       # models on the CPU take the production NCCL path
    model = mics.shard_model(make_gpt(), shard_size=2)
    ...
assert device.take_counts()["launch"] > 0
"""

from __future__ import annotations

import contextlib
import datetime
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist

from support.built import load_built, needs_built
from torch_mics import _C
from torch_mics._backend import Local
from torch_mics._groups import BACKENDS
from torch_mics._nccl import Nccl

needs_fakes = needs_built("nccl_fakes")


def load() -> Any:
    """Gives the module of the fakes."""
    return load_built("nccl_fakes")


@contextlib.contextmanager
def carried_by(world: Any, device_type: str = "cpu") -> Iterator[None]:
    """Lets models on the CPU, or another device, take communicators and streams from a world of NCCL."""
    chosen: Any = {(device_type, reach): (Nccl,) for reach in ("node", "nodes")}
    with (
        mock.patch.dict(BACKENDS, {(device_type, "rank"): (Local,), **chosen}),
        mock.patch.object(Nccl, "world", return_value=world),
    ):
        yield


@contextlib.contextmanager
def over_fakes(
    rank: int,
    *,
    seed: int = 0,
    at_once: bool = False,
    registration: _C.NcclRegistration = _C.NcclRegistration.NONE,
    copy_engine: bool = False,
    sums_in_fp32: bool = True,
    device_type: str = "cpu",
) -> Iterator[Any]:
    """Lets models of this rank find a world over the fakes; gives the device below it.

    At its end nothing may be left: no fault, communicator, event, allocation or registration. Memory of
    this process holds no numbers before it is written, from here to the end of the process.

    Args:
        seed: of random delays of every stream; 0: none.
        at_once: streams run what they are given at once, on the thread that gives it.
        registration: as of NcclWorld.
        copy_engine: as of NcclWorld.
        sums_in_fp32: sums are to the bit those of the other backends; else in the dtype that is sent, as
            NCCL's.
        device_type: of the models; "fakegpu" is made by support.fake_device.
    """
    fakes = load()
    fakes.poison_memory()
    device = fakes.FakeDevice(
        rank,
        0 if seed == 0 else seed + 1000 * rank,
        sums_in_fp32=sums_in_fp32,
        device=device_type if device_type == "cpu" else f"{device_type}:0",
    )
    if at_once:
        device.run_at_once()
    world = device.make_world(
        dist.PrefixStore("fakes", dist.distributed_c10d._get_default_store()),
        world_size=dist.get_world_size(),
        registration=registration,
        copy_engine=copy_engine,
    )
    with carried_by(world, device_type):
        yield device
    world.close(datetime.timedelta(seconds=30))
    del world
    gc.collect()
    assert device.faults == []
    assert device.num_live_communicators == 0
    assert device.num_held == 0
