"""Runs a function on n processes that form a Gloo world. The processes are kept between calls.

    def check_sum(rank: int, factor: int) -> float: ...

    results = run_ranks(4, check_sum, 3, ranks_per_node=2)

The function must be importable (module level). Its first argument is the rank; its results come back in
rank order. If it raises on some rank, run_ranks raises RankFailure with the tracebacks of all ranks.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# Of ranks that hang. What none of them needs, on a machine with ten times the load either.
TIMEOUT_SECONDS = 900.0


@dataclasses.dataclass
class Outcome:
    """What a rank's call came to."""

    value: Any = None
    error_type: str | None = None
    error_text: str | None = None
    trace: str | None = None


class RankFailure(AssertionError):
    """A rank raised, ended or did not come back in time."""


def _serve(rank: int, world_size: int, connection: Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
        # No rank goes on, fails and closes its sockets while another still connects to it.
        TORCH_DIST_INIT_BARRIER="1",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        request = pickle.loads(connection.recv_bytes())
        function, args, node, path, initialise, device = request
        os.environ["MICS_NODE_ID"] = node
        outcome = Outcome()
        try:
            backend = "gloo" if device == "cpu" else _backend_of_fake_device()
            if initialise:
                dist.init_process_group(
                    backend, init_method=f"file://{path}", rank=rank, world_size=world_size
                )
            outcome.value = function(rank, *args)
        except BaseException as error:
            outcome.error_type = type(error).__name__
            outcome.error_text = str(error)
            outcome.trace = traceback.format_exc()
        connection.send_bytes(pickle.dumps(outcome))
        if dist.is_initialized():
            # Gloo's thread may want the GIL for the last tensors, and must have had it before.
            time.sleep(0.01)
            dist.destroy_process_group()
            _forget_meshes()


def _backend_of_fake_device() -> str:
    from support import fake_device

    fake_device.install()
    return fake_device.BACKEND


def _forget_meshes() -> None:
    """DTensor would take a mesh of a later process group for an equal one whose groups are gone."""
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    _redistribute._gen_transform_infos.cache_clear()


def _context() -> multiprocessing.context.BaseContext:
    """Ranks are forked from a server that has imported the library and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    # The first optimizer step of a process imports torch._dynamo: a second of each rank's time.
    modules = ("torch_mics", "torch._dynamo", "torch.distributed.tensor", "pytest")
    context.set_forkserver_preload([*modules, "support.models"])
    return context


def start_process(target: Callable[..., None], *args: Any) -> BaseProcess:
    """Starts a process that has the library imported, in less time than an interpreter takes."""
    process = _context().Process(target=target, args=args, daemon=True)  # type: ignore[attr-defined]
    process.start()
    return process


class _Pool:
    def __init__(self, world_size: int) -> None:
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            mine, theirs = _context().Pipe()
            self.connections.append(mine)
            self.processes.append(start_process(_serve, rank, world_size, theirs))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_pools: dict[int, _Pool] = {}


def close_pools() -> None:
    """Ends all ranks; the next call starts new ones."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


atexit.register(close_pools)


def run_outcomes(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    ranks_per_node: int | None = None,
    nodes: list[str] | None = None,
    initialise: bool = True,
    device: str = "cpu",
    timeout: float = TIMEOUT_SECONDS,
) -> list[Outcome]:
    """Runs `function(rank, *args)` on every rank and gives what each came to, errors included.

    Args:
        ranks_per_node: node of rank r is r // ranks_per_node; by default all are on one.
        nodes: the node of each rank, instead.
        initialise: make the default process group first.
        device: "cpu", or "fakegpu" to have that device and collectives of its tensors too.
        timeout: seconds until the ranks are killed.

    Raises:
        RankFailure: a rank ended or did not come back in time.
    """
    if nodes is None:
        nodes = [str(rank // (ranks_per_node or world_size)) for rank in range(world_size)]
    pool = _pools.get(world_size) or _Pool(world_size)
    _pools[world_size] = pool
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "store")
        for rank, connection in enumerate(pool.connections):
            # Plain bytes: Connection.send() would pass every tensor as a file descriptor.
            request = (function, args, nodes[rank], path, initialise, device)
            connection.send_bytes(pickle.dumps(request))
        outcomes = []
        deadline = time.monotonic() + timeout
        for rank, connection in enumerate(pool.connections):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    raise EOFError("no answer in time")
                outcomes.append(pickle.loads(connection.recv_bytes()))
            except (EOFError, OSError) as error:
                _pools.pop(world_size).close()
                finished = "\n".join(str(o.trace) for o in outcomes if o.trace)
                raise RankFailure(
                    f"rank {rank} did not come back within {timeout:.0f} s: {error}\n{finished}"
                ) from error
    return outcomes


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, **options: Any
) -> list[Any]:
    """As run_outcomes, but gives the values and raises RankFailure if a rank raised."""
    outcomes = run_outcomes(world_size, function, *args, **options)
    expect_success(outcomes)
    return [outcome.value for outcome in outcomes]


def on_each_rank(
    check: Callable[[list[Outcome], dict[str, Any]], None], world_size: int, **options: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test of `body(rank, ...)` that runs it on every rank, and looks at the outcomes.

    `check` gets them and the arguments of the test.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            where = (body.__module__, body.__name__)
            check(run_outcomes(world_size, _run_body, *where, arguments, **options), arguments)

        _, *others = inspect.signature(body).parameters.values()
        test.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
        return test

    return decorate


def _run_body(rank: int, module: str, name: str, arguments: dict[str, Any]) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(rank, **arguments)


def expect_success(outcomes: list[Outcome], arguments: object = None) -> None:
    """Raises RankFailure if a rank raised."""
    failed = [(rank, o) for rank, o in enumerate(outcomes) if o.error_type is not None]
    if failed:
        traces = "\n".join(f"--- rank {rank}\n{outcome.trace}" for rank, outcome in failed)
        raise RankFailure(f"{len(failed)} of {len(outcomes)} ranks raised:\n{traces}")
