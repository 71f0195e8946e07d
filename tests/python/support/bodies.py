"""Bodies of tests that run on four ranks and are compared with one process.

on_ranks() makes a test of a body. All bodies of a file share one launch and one mesh per partition size.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import json
import pathlib
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import torch_mics as mics
from support.parity import local_error
from support.ranks import TIMEOUT_SECONDS, RankFailure, run_ranks

WORLD = 4
RANKS_PER_NODE = 2
# fp32 sums in another order than one process has: rounding only.
LIMIT = 5e-7

# --- running on ranks -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """What the body of a test gets."""

    rank: int
    mesh: DeviceMesh

    @property
    def partition_size(self) -> int:
        return self.mesh.size(1)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values: list[Any] = [None] * WORLD
        dist.all_gather_object(values, value)
        return values


_bodies: dict[str, dict[str, Callable[..., None]]] = collections.defaultdict(dict)


def on_ranks(*partition_sizes: int, cases: Sequence[Any] = ()) -> Callable[..., Any]:
    """Makes a test of `body(world)`, or `body(world, case)`, for each partition size and case.

    By default a partition group of four, gathered hierarchically, and two replicas of two.
    """
    keys = [(size, i) for size in partition_sizes or (4, 2) for i in range(len(cases) or 1)]

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        module, name = body.__module__, body.__name__
        for size, i in keys:
            arguments = [cases[i]] if cases else []
            _bodies[module][f"{name}-{size}-{i}"] = functools.partial(_call, body, size, arguments)

        ids = [f"p{size}-{cases[i]}" if cases else f"p{size}" for size, i in keys]

        @pytest.mark.parametrize("key", [f"{name}-{size}-{i}" for size, i in keys], ids=ids)
        def test(key: str, request: pytest.FixtureRequest) -> None:
            selected = [
                item.callspec.params["key"]
                for item in request.session.items
                if item.module.__name__ == module and "key" in getattr(item, "fixturenames", [])
            ]
            failures = _failures(module, tuple(selected))[key]
            assert not failures, "\n".join(failures)

        test.__name__ = test.__qualname__ = name
        test.__module__ = module
        return test

    return decorate


def _call(
    body: Callable[..., None], size: int, arguments: list[Any], rank: int, meshes: Any
) -> None:
    if size not in meshes:
        meshes[size] = mics.init_mesh(size, device_type="cpu", gpus_per_node=RANKS_PER_NODE)
    body(World(rank, meshes[size]), *arguments)


_RANK = "<rank>"  # in a text that may have braces of its own


@functools.cache
def _failures(module: str, keys: tuple[str, ...]) -> dict[str, list[str]]:
    """Runs the bodies; gives the tracebacks of the ranks on which each failed."""
    with tempfile.TemporaryDirectory() as directory:
        failure = f"rank {_RANK} did not run it."
        try:
            run_ranks(
                WORLD,
                _run_bodies,
                module,
                keys,
                directory,
                ranks_per_node=RANKS_PER_NODE,
                timeout=max(TIMEOUT_SECONDS, 5.0 * len(keys)),
            )
        except RankFailure as error:
            failure = f"rank {_RANK} did not end it, or did not run it: {error}"
        files = [pathlib.Path(directory, str(rank)) for rank in range(WORLD)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {
        key: [
            text
            for rank in range(WORLD)
            if (text := found[rank].get(key, failure.replace(_RANK, str(rank)))) is not None
        ]
        for key in keys
    }


def _run_bodies(rank: int, module: str, keys: tuple[str, ...], directory: str) -> None:
    importlib.import_module(module)
    meshes: dict[int, DeviceMesh] = {}
    found: dict[str, str | None] = {}
    for key in keys:
        torch.manual_seed(0)
        try:
            _bodies[module][key](rank, meshes)
            found[key] = None
        except Exception:
            found[key] = f"--- rank {rank}\n{traceback.format_exc()}"
        # Written at once: when a later body hangs, it is this that tells which.
        pathlib.Path(directory, str(rank)).write_text(json.dumps(found))


# --- models and comparison ------------------------------------------------------------------------

Value = Callable[[nn.Module, int], torch.Tensor]


class Layer(nn.Module):
    """A residual layer, with a part that only some calls use."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up = nn.Linear(width, 7)
        self.down = nn.Linear(7, width)
        self.spare = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        if use_spare:
            x = x + self.spare(x)
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """A projection, three layers and a head."""

    def __init__(self, make_layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.layers = nn.ModuleList(make_layer() for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.run_layers(self.embed(x)))

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


NUM_UNITS = 4


def make(cls: Callable[..., Any], *args: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return cls(*args)


def shard(world: World, model: Any, **options: Any) -> Any:
    for layer in model.layers:
        mics.fully_shard(layer, mesh=world.mesh, **options)
    return mics.fully_shard(model, mesh=world.mesh, **options)


def twins(world: World, cls: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    """The same model twice, the first sharded."""
    return shard(world, make(cls, *args), **options), make(cls, *args)


def points(rank: int, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, generator=generator)


def value_of(model: nn.Module, rank: int) -> torch.Tensor:
    return model(points(rank)).square().mean()


def train_alone(model: nn.Module, value: Value, num_micro_steps: int = 1) -> None:
    """Adds the gradients of the mean of `value` over the ranks."""
    for rank in range(WORLD):
        part = value(model, rank)
        if part.requires_grad:
            (part / (WORLD * num_micro_steps)).backward()


def expect_gradients(
    world: World, model: nn.Module, plain: nn.Module, limit: float = LIMIT
) -> None:
    """Compares the gradients of all ranks; every rank must call it, and fails if any is wrong."""
    right = {name: p.grad for name, p in plain.named_parameters()}
    mine: dict[str, tuple[float, float] | None] = {}
    for name, parameter in model.named_parameters():
        expected = right[name]
        if parameter.grad is None:
            mine[name] = None
        else:
            zeros = torch.full(parameter.shape, float("nan")) if expected is None else expected
            mine[name] = local_error(parameter.grad, zeros)
    found = world.gather(mine)
    size = world.partition_size
    for name, expected in right.items():
        per_rank = [errors[name] for errors in found]
        if expected is None:
            assert per_rank == [None] * WORLD, f"{name} has a gradient: {per_rank}"
            continue
        assert None not in per_rank, f"{name} has no gradient on some ranks: {per_rank}"
        for first in range(0, WORLD, size):
            error, square = (
                sum(pair) for pair in zip(*per_rank[first : first + size], strict=True)
            )
            assert error <= limit**2 * square, f"{name}: {error} of {square} from rank {first}"


def expect_step(
    world: World, model: nn.Module, plain: nn.Module, value: Value = value_of, limit: float = LIMIT
) -> None:
    """Runs forward and backward of both, and compares the gradients."""
    value(model, world.rank).backward()
    train_alone(plain, value)
    expect_gradients(world, model, plain, limit)


def expect_values(model: nn.Module, plain: nn.Module) -> None:
    """Compares the parameters, bit for bit. Collective."""
    right = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        full = parameter.detach().full_tensor()
        assert torch.equal(full.view(torch.int32), right[name].detach().view(torch.int32)), name


def calls(model: nn.Module, name: str) -> int:
    return mics.traffic(model).get(f"{name}", {"calls": 0})["calls"]


def units_of(model: nn.Module) -> set[frozenset[str]]:
    """The names of the modules of each unit."""
    units: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, mics.MiCSModule):
            units.setdefault(id(module._unit), []).append(name)
    return {frozenset(names) for names in units.values()}


def fail_text(function: Callable[[], object], kind: type[Exception] = RuntimeError) -> str:
    """The message of the error that `function` must raise."""
    try:
        function()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


class OutputsOnRequest(Stack):
    """Runs every layer and adds the outputs of those asked for."""

    def forward(self, x: torch.Tensor, wanted: Iterable[int]) -> torch.Tensor:
        x = self.embed(x)
        y = x
        for i, layer in enumerate(self.layers):
            output = layer(y if i in wanted else x)
            if i in wanted:
                y = y + output
        return self.head(y)
