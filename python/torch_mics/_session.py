"""The session: what all models of one process share as long as a default process group lives."""

from __future__ import annotations

import datetime
import weakref

import torch.distributed as dist
from torch.distributed import distributed_c10d

from torch_mics import _C
from torch_mics._backend import C10d, Local
from torch_mics._nccl import Nccl
from torch_mics._shm import Shm

# How often a rank polls for the failure of another one, and how long it waits for answers about it.
_ALARM_INTERVAL = datetime.timedelta(seconds=0.5)
PATIENCE = datetime.timedelta(seconds=1.5)


class Session:
    """What models share, so that all use it in one order. The models keep it alive, not the session."""

    def __init__(self) -> None:
        self.nccl = Nccl()
        # In the order in which they are tried.
        self.backends = (Local(), self.nccl, Shm(), C10d())
        self.streams: weakref.WeakValueDictionary[str, _C.RuntimeStreams] = (
            weakref.WeakValueDictionary()
        )
        self._flight_log: weakref.ref[_C.FlightLog] | None = None

    def flight_log(self) -> _C.FlightLog:
        """Gives the log of this session's collectives; the caller keeps it alive."""
        found = self._flight_log() if self._flight_log is not None else None
        if found is None:
            rank, world_size = dist.get_rank(), dist.get_world_size()
            store = distributed_c10d._get_default_store()
            # Ranks make their logs in the same order, so the number of the log is the same on all.
            number = store.add(f"torch_mics/flight_logs/{rank}", 1)
            found = _C.make_reporting_log(
                dist.PrefixStore(f"torch_mics/flight_log/{number}", store),
                rank=rank,
                world_size=world_size,
                interval=_ALARM_INTERVAL,
                patience=PATIENCE,
            )
            self._flight_log = weakref.ref(found)
        return found


_sessions: weakref.WeakKeyDictionary[object, Session] = weakref.WeakKeyDictionary()


def session() -> Session:
    """Gives the session of torch's present default process group."""
    return _sessions.setdefault(dist.group.WORLD, Session())
