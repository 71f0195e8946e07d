"""What a model may do between sharding and its step, compared with a single process.

The body of each test runs on four ranks, two on each of two nodes; on_ranks() makes the test. All
bodies of a file share one launch and one mesh per partition size.
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
from support.models import batch, loss, make_gpt
from support.parity import local_error
from support.ranks import RankFailure, run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

import torch_mics as mics

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
                if item.module.__name__ == module
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


@functools.cache
def _failures(module: str, keys: tuple[str, ...]) -> dict[str, list[str]]:
    """Runs the bodies; gives the tracebacks of the ranks on which each failed."""
    with tempfile.TemporaryDirectory() as directory:
        failure = "rank {} did not run it."
        try:
            run_ranks(WORLD, _run_bodies, module, keys, directory, ranks_per_node=RANKS_PER_NODE)
        except RankFailure as error:
            failure = f"rank {{}} did not end it, or did not run it: {error}"
        files = [pathlib.Path(directory, str(rank)) for rank in range(WORLD)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
    return {
        key: [
            text
            for rank in range(WORLD)
            if (text := found[rank].get(key, failure.format(rank))) is not None
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


def expect_values(model: nn.Module, plain: nn.Module) -> None:
    """Compares the parameters, bit for bit. Collective."""
    right = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        full = parameter.detach().full_tensor()
        assert torch.equal(full.view(torch.int32), right[name].detach().view(torch.int32)), name


def calls(model: nn.Module, name: str) -> int:
    return mics.traffic(model).get(f"{name}", {"calls": 0})["calls"]


def fail_text(function: Callable[[], object]) -> str:
    """The message of the RuntimeError that `function` must raise."""
    try:
        function()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing was raised")


@on_ranks()
def test_comparison_with_one_process_catches_wrong_gradients(world):
    model, plain = twins(world, Stack)
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)

    def is_caught() -> bool:
        try:
            expect_gradients(world, model, plain)
        except AssertionError:
            return True
        return False

    weight, right = model.layers[1].up.weight, plain.layers[1].up.weight
    kept = weight.grad, right.grad
    if world.rank == 2:
        weight.grad = kept[0] * (1 + 1e-5)
    assert is_caught()
    weight.grad = None if world.rank == 1 else kept[0]
    assert is_caught()
    weight.grad, right.grad = kept[0], None
    assert is_caught()
    right.grad = kept[1]
    expect_gradients(world, model, plain)


# --- activation checkpointing ---------------------------------------------------------------------


class CheckpointedInside(Layer):
    """Recomputes what lies inside a unit."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> torch.Tensor:
        return checkpoint(super().forward, x, use_spare, use_reentrant=self.use_reentrant)


class CheckpointedAround(Stack):
    """Recomputes whole units, `size` of them at a time."""

    def __init__(self, size: int, use_reentrant: bool) -> None:
        super().__init__()
        self.size = size
        self.use_reentrant = use_reentrant

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for first in range(0, len(self.layers), self.size):
            run = nn.Sequential(*self.layers[first : first + self.size])
            x = checkpoint(run, x, use_reentrant=self.use_reentrant)
        return x


def make_checkpointed(where: str, use_reentrant: bool) -> Stack:
    if where == "inside":
        return make(Stack, functools.partial(CheckpointedInside, use_reentrant))
    sizes = {"one": 1, "two": 2, "all": 3}
    return make(CheckpointedAround, sizes[where], use_reentrant)


def count_calls(model: nn.Module, rank: int) -> tuple[int, int]:
    """Gathers and reductions of one forward and backward."""
    before = calls(model, "gather/intra"), calls(model, "reduce/intra")
    value_of(model, rank).backward()
    return calls(model, "gather/intra") - before[0], calls(model, "reduce/intra") - before[1]


@on_ranks(cases=[(w, r) for w in ("one", "two", "all", "inside") for r in (True, False)])
def test_checkpointing_keeps_gradients_and_reduces_each_unit_once(world, case):
    model = shard(world, make_checkpointed(*case))
    plain = make(Stack)
    model.train()
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    # A second step on other weights.
    with torch.no_grad():
        for parameter in [*model.parameters(), *plain.parameters()]:
            parameter.mul_(1.5)
    model.zero_grad()
    plain.zero_grad()
    gathers, reductions = count_calls(model, world.rank)
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert reductions == NUM_UNITS
    # As without checkpoints: each in forward, each layer again in backward.
    assert gathers == NUM_UNITS + 3, gathers


@on_ranks(4, cases=[(i, u) for i in CheckpointImpl for u in ("wrapper", "wrapped")])
def test_checkpoint_wrapper_before_sharding_keeps_gradients(world, case):
    impl, unit = case
    model, plain = make(Stack), make(Stack)
    for each in (model, plain):
        for i, layer in enumerate(each.layers):
            each.layers[i] = checkpoint_wrapper(layer, checkpoint_impl=impl)
    for wrapper in model.layers:
        mics.fully_shard(
            wrapper if unit == "wrapper" else wrapper._checkpoint_wrapped_module, mesh=world.mesh
        )
    mics.fully_shard(model, mesh=world.mesh)
    for _ in range(2):
        counts = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert counts == (NUM_UNITS + 3, NUM_UNITS)
    assert list(model.state_dict()) == list(make(Stack).state_dict())


@on_ranks(cases=[True, False])
def test_checkpointing_under_accumulation_keeps_gradients(world, use_reentrant):
    model, plain = shard(world, make_checkpointed("two", use_reentrant)), make(Stack)
    for micro_step in range(3):
        with mics.microbatch(model, is_last=micro_step == 2):
            value = model(points(world.rank, micro_step)).square().mean() / 3
            value.backward()
        train_alone(plain, lambda m, r, s=micro_step: m(points(r, s)).square().mean(), 3)
    expect_gradients(world, model, plain)
    assert calls(model, "reduce/intra") == 3 * NUM_UNITS


# --- parameters without a gradient ----------------------------------------------------------------

SOME_RANKS = [[], [0], [3], [1, 2], [0, 1, 2, 3]]


class SpareOnRequest(Stack):
    def forward(self, x: torch.Tensor, use_spare: bool) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, use_spare=use_spare)
        return self.head(x)


@on_ranks(cases=SOME_RANKS)
def test_parameter_used_on_some_ranks_has_a_gradient_on_all_and_on_none_has_none(world, used_on):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank), rank in used_on).square().mean()

    model, plain = twins(world, SpareOnRequest)
    for _ in range(2):
        model.zero_grad()
        value(model, world.rank).backward()
    train_alone(plain, value)
    assert (plain.layers[0].spare.weight.grad is None) == (not used_on)
    expect_gradients(world, model, plain)


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


@on_ranks(cases=[(0, [2]), (1, []), (1, [2]), (2, [0, 3])])
def test_unit_whose_output_is_used_on_some_ranks_is_reduced_on_all(world, case):
    layer, used_on = case

    def value(model: nn.Module, rank: int) -> torch.Tensor:
        wanted = {0, 1, 2} - (set() if rank in used_on else {layer})
        return model(points(rank), wanted).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    value(model, world.rank).backward()
    train_alone(plain, value)
    expect_gradients(world, model, plain)
    # Every rank joins the reduction, whether it has a gradient or not.
    assert calls(model, "reduce/intra") == NUM_UNITS


@on_ranks()
def test_rank_that_uses_no_layer_at_all_joins_the_others(world):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank), range(3) if rank == 1 else ()).square().mean()

    model, plain = twins(world, OutputsOnRequest)
    for _ in range(2):
        value(model, world.rank).backward()
        train_alone(plain, value)
    expect_gradients(world, model, plain)


class CalledTwice(Stack):
    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1, 0, 2, 2, 1):
            x = self.layers[i](x)
        return x


@on_ranks()
def test_unit_called_twice_is_reduced_once(world):
    model, plain = twins(world, CalledTwice)
    for _ in range(2):
        counts = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert counts[1] == NUM_UNITS


def frozen_names(model: Stack, what: str) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    chosen = {
        "all but a part of each unit": lambda n: "spare" not in n,
        "the first unit": lambda n: "layers.0" in n,
        "the unit between": lambda n: "layers.1" in n,
        "the last unit": lambda n: "layers.2" in n,
        "the root": lambda n: "layers" not in n,
        "all before the last": lambda n: "layers.2" not in n and "head" not in n,
        "all but one": lambda n: n != "layers.1.down.bias",
        "all but one of the root": lambda n: n != "head.bias",
    }[what]
    return [name for name in names if chosen(name)]


FROZEN = {
    # Units with a trainable parameter.
    "all but a part of each unit": 3,
    "the first unit": 3,
    "the unit between": 3,
    "the last unit": 3,
    "the root": 3,
    "all before the last": 2,
    "all but one": 1,
    "all but one of the root": 1,
}


@on_ranks(4, cases=list(FROZEN))
def test_frozen_parameters_have_no_gradient_and_the_others_have_theirs(world, what):
    model, plain = make(Stack), make(Stack)
    for each in (model, plain):
        for name in frozen_names(each, what):
            each.get_parameter(name).requires_grad_(False)
    shard(world, model)
    for _ in range(2):
        _, reductions = count_calls(model, world.rank)
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)
    assert reductions == FROZEN[what]


@on_ranks(cases=[True, False])
def test_freezing_and_unfreezing_between_steps_is_followed(world, zeroes):
    model, plain = twins(world, Stack)
    for what in ("nothing", "the unit between", "all but a part of each unit", "nothing"):
        for each in (model, plain):
            frozen = [] if what == "nothing" else frozen_names(each, what)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(name not in frozen)
            if zeroes:
                each.zero_grad()
        value_of(model, world.rank).backward()
        train_alone(plain, value_of)
        expect_gradients(world, model, plain)


@on_ranks()
def test_input_of_the_first_unit_gets_its_gradient_and_needs_none(world):
    class Layers(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run_layers(x)

    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return model(points(rank).repeat(1, 2)).square().mean()

    model, plain = twins(world, Layers)
    value(model, world.rank).backward()
    train_alone(plain, value)
    expect_gradients(world, model, plain)
    inputs = [points(world.rank).repeat(1, 2).requires_grad_() for _ in range(2)]
    for each, x in zip((model, plain), inputs, strict=True):
        each(x).square().mean().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)


# --- several forwards and backwards ---------------------------------------------------------------


@on_ranks(cases=["sum", "first first", "last first", "last first, first under no_sync"])
def test_several_forwards_before_backward_add_their_gradients(world, order):
    model, plain = twins(world, Stack)
    for _ in range(2):
        values = [model(points(world.rank, step)).square().mean() for step in range(3)]
        if order == "sum":
            sum(values).backward()
        elif order == "first first":
            for value in values:
                value.backward()
        elif order == "last first":
            for value in reversed(values):
                value.backward()
        else:
            with model.no_sync():
                values[2].backward()
                values[1].backward()
            values[0].backward()
        for step in range(3):
            train_alone(plain, lambda m, r, s=step: m(points(r, s)).square().mean())
    expect_gradients(world, model, plain)


@on_ranks()
def test_retained_graph_runs_backward_twice(world):
    model, plain = twins(world, Stack)
    value = value_of(model, world.rank)
    value.backward(retain_graph=True)
    first = model.embed.weight.grad.to_local().clone()
    value.backward()
    assert torch.equal(model.embed.weight.grad.to_local(), 2 * first)
    for _ in range(2):
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(cases=["eval", "no_grad", "inference_mode"])
def test_forward_without_backward_between_forward_and_backward_changes_nothing(world, kind):
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}

    def look(model: nn.Module) -> torch.Tensor:
        with contexts.get(kind, torch.enable_grad)():
            return model(points(world.rank, 5))

    model, plain = twins(world, Stack)
    for _ in range(2):
        value = value_of(model, world.rank)
        model.train(kind != "eval")
        assert torch.equal(look(model), look(plain))
        model.train()
        value.backward()
        train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(cases=["no_grad", "inference_mode"])
def test_first_forward_of_all_may_be_one_without_backward(world, kind):
    model, plain = twins(world, Stack)
    with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
        assert torch.equal(model(points(world.rank)), plain(points(world.rank)))
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


# --- outputs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    extra: Any = None


Pair = collections.namedtuple("Pair", ["hidden", "extra"])

PACK: dict[str, Callable[[torch.Tensor], Any]] = {
    "dict": lambda x: {"hidden": x, "extra": None, "name": "layer"},
    "nested": lambda x: {"count": 3, "deep": [(None, [x])]},
    "dataclass": lambda x: Result(x),
    "dataclass of a tuple": lambda x: Result(torch.zeros(1), ((x,), None)),
    "tuple": lambda x: (None, x, 1.0),
    "named tuple": lambda x: Pair(x, None),
    "two tensors": lambda x: (x * 2, x * 3),
}

UNPACK: dict[str, Callable[[Any], torch.Tensor]] = {
    "dict": lambda output: output["hidden"],
    "nested": lambda output: output["deep"][0][1][0],
    "dataclass": lambda output: output.hidden,
    "dataclass of a tuple": lambda output: output.extra[0][0],
    "tuple": lambda output: output[1],
    "named tuple": lambda output: output.hidden,
    "two tensors": lambda output: output[0] - output[1],
}


class Packed(Layer):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, use_spare: bool = True) -> Any:
        return PACK[self.kind](super().forward(x))


class PackedStack(Stack):
    def __init__(self, kind: str) -> None:
        super().__init__(functools.partial(Packed, kind))
        self.kind = kind

    def run_layers(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = UNPACK[self.kind](layer(x))
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return PACK[self.kind](super().forward(x))


@on_ranks(2, cases=list(PACK))
def test_outputs_in_containers_are_watched(world, kind):
    def value(model: nn.Module, rank: int) -> torch.Tensor:
        return UNPACK[kind](model(points(rank))).square().mean()

    model, plain = twins(world, PackedStack, kind)
    value(model, world.rank).backward()
    train_alone(plain, value)
    expect_gradients(world, model, plain)
    assert calls(model, "reduce/intra") == NUM_UNITS
    assert type(model(points(0))) is type(plain(points(0)))


# --- exactness ------------------------------------------------------------------------------------


@on_ranks(cases=[True, False])
def test_gathered_parameters_are_bitwise_those_before_sharding(world, hierarchical):
    def make_odd() -> Stack:
        model = make(Stack)
        with torch.no_grad():
            special = [float("nan"), float("-inf"), -0.0, 1e-42, 3.4e38]
            model.layers[1].spare.weight.view(-1)[:5] = torch.tensor(special)
            model.embed.weight.view(-1)[-5:] = torch.tensor(special)
        return model

    if hierarchical and world.partition_size <= RANKS_PER_NODE:
        hierarchical = "auto"
    plain = make_odd()
    model = shard(world, make_odd(), hierarchical_gather=hierarchical)
    seen: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            seen[f"{names[module]}.{name}"] = parameter.detach().clone()

    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        module.register_forward_hook(keep, prepend=True)
    model(points(world.rank))
    right = dict(plain.named_parameters())
    assert set(seen) == set(right)
    for name, value in right.items():
        assert torch.equal(seen[name].view(torch.int32), value.detach().view(torch.int32)), name


class Linear(nn.Module):
    """Values and gradients are small integers: every sum of them is exact in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-2, 3, parameter.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def integers(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-3, 4, (4, 5), generator=generator).float()


@on_ranks()
def test_flat_and_hierarchical_gradients_are_exact_where_sums_are(world):
    plain = make(Linear)
    train_alone(plain, lambda model, rank: model(integers(rank)).sum())
    assert all(p.grad.count_nonzero() > 0 for p in plain.parameters())
    variants = (True, False) if world.partition_size > RANKS_PER_NODE else (False,)
    for hierarchical in variants:
        model = shard(world, make(Linear), hierarchical_gather=hierarchical)
        model(integers(world.rank)).sum().backward()
        # Both are the exact sum, and so bitwise equal.
        expect_gradients(world, model, plain, limit=0.0)


@on_ranks()
def test_two_runs_give_the_same_bits(world):
    runs = []
    for _ in range(2):
        model = mics.shard_model(make_gpt(tied=True), mesh=world.mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            value = loss(model, batch(step, 0, world.rank))
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
        runs.append((losses, [p.to_local().clone() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert len(set(runs[0][0])) == 3
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))


# --- changed weights and full parameters ----------------------------------------------------------


def change_by_step(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def change_by_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter - 0.5)


@torch.no_grad()
def change_by_local_copy(model: nn.Module) -> None:
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.copy_(local - 0.5)


def change_by_load(model: nn.Module) -> None:
    state = {name: value.clone() - 0.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


@torch.no_grad()
def change_by_full_load(model: nn.Module) -> None:
    if not isinstance(model, mics.MiCSModule):
        change_by_copy(model)
        return
    state = mics.full_state_dict(model)
    mics.load_full_state_dict(model, {name: value - 0.5 for name, value in state.items()})


@torch.no_grad()
def change_by_writeback(model: nn.Module) -> None:
    if not isinstance(model, mics.MiCSModule):
        change_by_copy(model)
        return
    with mics.unsharded(model, writeback=True):
        change_by_copy(model)


CHANGES = {
    "optimizer.step": change_by_step,
    "copy_": change_by_copy,
    "to_local": change_by_local_copy,
    "load_state_dict": change_by_load,
    "load_full_state_dict": change_by_full_load,
    "unsharded": change_by_writeback,
}


@on_ranks(cases=list(CHANGES))
def test_changed_weight_is_never_missed_where_the_full_one_is_kept(world, how):
    model, plain = twins(world, Stack, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    outputs = [model(points(world.rank))]
    gathers = calls(model, "gather/intra")
    model(points(world.rank))
    assert calls(model, "gather/intra") == gathers == NUM_UNITS
    for _ in range(2):
        for each in (model, plain):
            CHANGES[how](each)
        outputs.append(model(points(world.rank)))
        assert torch.equal(outputs[-1], plain(points(world.rank)))
        assert not torch.equal(outputs[-1], outputs[-2])
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks(cases=[(kept, unit) for kept in (True, False) for unit in ("root", "layer")])
def test_backward_over_weights_changed_since_forward_raises(world, case):
    kept, unit = case
    model, plain = twins(world, Stack, reshard_after_forward=not kept)
    sharded = list(model.parameters())
    value = value_of(model, world.rank)
    weight = "head.weight" if unit == "root" else "layers.1.up.weight"
    for each in (model, plain):
        with torch.no_grad():
            each.get_parameter(weight).mul_(2)
    assert "modified by an inplace operation" in fail_text(value.backward)
    assert all(parameter.grad is None for parameter in sharded)
    # The next step is right.
    value_of(model, world.rank).backward()
    train_alone(plain, value_of)
    expect_gradients(world, model, plain)


@on_ranks()
def test_full_parameter_used_after_forward_names_its_unit(world):
    model = shard(world, make(Stack))
    kept: list[torch.Tensor] = []
    up = model.layers[1].up
    up.register_forward_hook(lambda module, args, output: kept.append(module.weight))
    value = value_of(model, world.rank)
    for use in (lambda: kept[0] + 1, lambda: kept[0].detach().clone(), lambda: up(kept[0])):
        text = fail_text(use)
        assert "unsharded" in text or "inside the unit's forward" in text
        assert '"layers.1"' in text
    assert "may only be used while their unit is unsharded" in fail_text(lambda: kept[0] + 1)
    value.backward()
    assert all(p.grad is not None for p in model.parameters())
