"""Agreement of all ranks through the Store: before collectives that could hang, after those that failed."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torch_mics._C import TimeoutError as MicsTimeoutError

# Ranks that wait for the same missing rank time out within this time of each other.
_ROLL_CALL = datetime.timedelta(seconds=3)


def operation_timeout() -> datetime.timedelta:
    """Gives the time-out of a collective: that of torch's default process group."""
    group = dist.group.WORLD
    assert group is not None
    # A group with "nccl" alone has no backend for the CPU.
    devices = sorted(group._device_types, key=lambda device: device.type != "cpu")
    options = group._get_backend(devices[0]).options
    return getattr(options, "_timeout", c10d.default_pg_timeout)


def exchange(topic: str, value: str) -> list[str]:
    """Gives every rank the values of all ranks, in rank order. Every rank must call it.

    Args:
        topic: what the values are, for the message when a rank does not come.
        value: this rank's value.

    Raises:
        TimeoutError: a rank did not come within the time-out of torch's default process group. The
            message names the missing ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("torch_mics", c10d._get_default_store())
    # Ranks call in the same order, so the number of the call is the same on all.
    call = store.add(f"calls/{rank}", 1)
    keys = [f"{call}/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps([topic, value]))
    timeout = operation_timeout()
    try:
        store.wait(keys, timeout)
    except Exception as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise MicsTimeoutError(
            f"every rank must take part in the agreement on {topic}: got no answer from world ranks "
            f"{missing} within {timeout.total_seconds():.0f} s (world_rank={rank}). They have ended, "
            "or make other calls of torch_mics; see docs/errors.md#timeouts."
        ) from error
    answers = [json.loads(store.get(key).decode()) for key in keys]
    for other, (other_topic, _) in enumerate(answers):
        if other_topic != answers[0][0]:
            raise ValueError(
                "the calls of torch_mics must be the same on every rank: got an agreement on "
                f"{answers[0][0]} on world_rank 0 and on {other_topic} on world_rank {other}. Build and "
                "run the model with the same code and arguments on every rank."
            )
    return [answer for _, answer in answers]


@contextlib.contextmanager
def together(call: str) -> Iterator[None]:
    """Wraps the body of a public call with collectives: every rank must come, and all learn of a failure.

    Args:
        call: name of the public function, for messages.

    Raises:
        TimeoutError: a rank did not make the call in time.
        RuntimeError: the body failed on another rank, whose error is quoted. Own errors pass unchanged.
    """
    exchange(f"a call of {call}", "")
    with all_or_none(call):
        yield


@contextlib.contextmanager
def all_or_none(call: str) -> Iterator[None]:
    """Wraps what every rank has begun: if it fails on one, all raise, so that none is left waiting."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    outcome = "" if failure is None else f"{type(failure).__name__}: {failure}"
    outcomes = exchange(f"the outcome of {call}", outcome)
    if failure is not None:
        raise failure
    failed = [rank for rank, text in enumerate(outcomes) if text]
    if failed:
        raise RuntimeError(
            f"{call} must succeed on every rank: got a failure on world ranks {failed}, on "
            f"{failed[0]}: {outcomes[failed[0]]}"
        )


@contextlib.contextmanager
def naming(call: str, ranks: list[int]) -> Iterator[None]:
    """Names the ranks that were missing when one of torch's collectives fails in `call`."""
    try:
        yield
    except RuntimeError as error:
        missing = _roll_call(call, ranks)
        if not missing:
            raise
        raise MicsTimeoutError(
            f"{call} must be called on every rank: got no call from world ranks {missing} within "
            f"{operation_timeout().total_seconds():.0f} s (world_rank={dist.get_rank()}). They have "
            f"ended, or do something else; see docs/errors.md#timeouts. torch says: {error}"
        ) from error


def _roll_call(call: str, ranks: list[int]) -> list[int]:
    """Gives those of `ranks` that do not report within a few seconds that `call` failed for them too."""
    store = dist.PrefixStore("torch_mics/failed", c10d._get_default_store())
    number = store.add(f"{call}/{dist.get_rank()}", 1)
    keys = {rank: f"{call}/{number}/{rank}" for rank in ranks}
    store.set(keys[dist.get_rank()], "")
    deadline = time.monotonic() + _ROLL_CALL.total_seconds()
    missing = list(ranks)
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([keys[rank]])]
        time.sleep(0.05)
    return missing


def _first_difference(mine: Any, other: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Finds the first place where two JSON values differ: (path, mine, other)."""
    if isinstance(mine, dict) and isinstance(other, dict):
        for key in [*mine, *(key for key in other if key not in mine)]:
            if key not in mine or key not in other:
                return (f"{path}{key}", mine.get(key, "nothing"), other.get(key, "nothing"))
            found = _first_difference(mine[key], other[key], f"{path}{key} / ")
            if found is not None:
                return found
        return None
    if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
        for index, (left, right) in enumerate(zip(mine, other, strict=True)):
            found = _first_difference(left, right, f"{path}{index} / ")
            if found is not None:
                return found
        return None
    return None if mine == other else (path.removesuffix(" / "), mine, other)


def check_same(topic: str, value: Any) -> None:
    """Raises the same ValueError on every rank when the ranks' values differ.

    Args:
        topic: what must be the same on all ranks.
        value: JSON-like. Dictionary keys become the path in the message.
    """
    text = json.dumps(value)
    digests = exchange(topic, hashlib.sha256(text.encode()).hexdigest())
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not different:
        return
    # The full texts are exchanged only when some differ, which every rank knows by now.
    texts = exchange(f"{topic} in full", text)
    found = _first_difference(json.loads(texts[0]), json.loads(texts[different[0]]))
    assert found is not None, "digests differ but texts do not"
    path, first, other = found
    raise ValueError(
        f"{topic} must be the same on every rank: got {path} = {first} on world_rank 0 and {other} on "
        f"world_rank {different[0]} (world ranks that differ from 0: {different}). Build the model with "
        "the same code and arguments on every rank."
    )
