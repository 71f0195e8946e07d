"""Inputs and outputs in containers of every kind are cast as FSDP2 casts them, and keep their types."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, NamedTuple

import pytest
import torch
from support.bodies import World, on_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import torch_mics as mics


class Pair(NamedTuple):
    a: torch.Tensor
    b: Any = None


class Named(dict):
    """A dict with attributes, as configurations are."""


class Marked(list):
    mark = "none"


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    number: int = 3


class Kind(enum.Enum):
    ONE = 1


class Slim:
    __slots__ = ("x",)


def x_of() -> torch.Tensor:
    return torch.ones(2, 4)


def marked() -> Marked:
    made = Marked([x_of()])
    made.mark = "kept"
    return made


# What goes in, and how the tensor in it is reached.
CONTAINERS: dict[str, tuple[Any, Any]] = {
    "tensor": (x_of, lambda v: v),
    "list": (lambda: [x_of()], lambda v: v[0]),
    "tuple": (lambda: (x_of(), 1), lambda v: v[0]),
    "dict": (lambda: {"x": x_of()}, lambda v: v["x"]),
    "namedtuple": (lambda: Pair(x_of(), "b"), lambda v: v.a),
    "OrderedDict": (lambda: collections.OrderedDict(x=x_of()), lambda v: v["x"]),
    "defaultdict": (lambda: collections.defaultdict(list, x=x_of()), lambda v: v["x"]),
    "subclass of dict": (lambda: Named(x=x_of(), kind=Kind.ONE), lambda v: v["x"]),
    "subclass of list": (marked, lambda v: v[0]),
    "UserDict": (lambda: collections.UserDict(x=x_of()), lambda v: v["x"]),
    "deque": (lambda: collections.deque([x_of()], maxlen=3), lambda v: v[0]),
    "set": (lambda: {x_of()}, lambda v: next(iter(v))),
    "frozenset": (lambda: frozenset([x_of()]), lambda v: next(iter(v))),
    "dataclass": (lambda: Data(x_of(), [x_of()]), lambda v: v.rest[0] if v.rest else v.x),
    "frozen dataclass": (lambda: Frozen(x_of()), lambda v: v.x),
    "nested": (lambda: [{"a": Data(Pair(x_of()))}], lambda v: v[0]["a"].x.a),
    "packed sequence": (lambda: pack_sequence([x_of()]), lambda v: v.data),
}
# FSDP2 leaves these alone; one process knows no cast.
NOT_IN_FSDP2 = {"UserDict", "deque", "packed sequence"}
# Raises there, or loses the type.
CHANGED_BY_FSDP2 = {"subclass of dict", "subclass of list", "frozenset", "defaultdict"}


class Taker(nn.Module):
    """Says what came in, computes, and gives it back in the same container."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.name = name

    def forward(self, value: Any, *, other: Any = None) -> Any:
        self.seen = value
        self.seen_other = other
        reach = CONTAINERS[self.name][1]
        assert reach(other).dtype == reach(value).dtype
        self.linear(reach(value))
        return value


POLICY = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, output_dtype=torch.float64, cast_forward_inputs=True
)


def run(model: Any, name: str) -> Any:
    make, _ = CONTAINERS[name]
    given = make()
    out = model(given, other=make())
    assert type(model.seen) is type(given)
    assert CONTAINERS[name][1](given).dtype == torch.float32  # the caller's own is as it was
    return out


@on_ranks(2, cases=list(CONTAINERS))
def test_containers_are_cast_and_keep_their_type(world: World, name: str) -> None:
    reach = CONTAINERS[name][1]
    inner = mics.fully_shard(Taker(name), mesh=world.mesh, mp_policy=POLICY)
    model = mics.fully_shard(nn.Sequential(inner), mesh=world.mesh)
    for taker, called in ((inner, inner), (inner, model[0])):
        out = run(called, name)
        assert type(out) is type(CONTAINERS[name][0]())
        assert reach(taker.seen).dtype == torch.bfloat16
        assert reach(taker.seen_other).dtype == torch.bfloat16
        assert reach(out).dtype == torch.float64
    if name == "subclass of list":
        assert inner.seen.mark == "kept"
    if name == "subclass of dict":
        assert inner.seen["kind"] is Kind.ONE
    if name in NOT_IN_FSDP2 | CHANGED_BY_FSDP2:
        return
    theirs = fully_shard(Taker(name), mp_policy=POLICY)
    out = run(theirs, name)
    assert reach(theirs.seen).dtype == torch.bfloat16
    assert reach(out).dtype == torch.float64


@on_ranks(2)
def test_what_needs_no_cast_is_passed_on_itself(world: World) -> None:
    model = mics.fully_shard(Taker("dict"), mesh=world.mesh, mp_policy="bf16")
    given = {"x": x_of().bfloat16(), "ids": torch.arange(3), "flag": True}
    model(given, other=given)
    assert model.seen is given


def test_odd_values_are_left_alone():
    from torch_mics._policy import cast_floating, find_tensors

    @dataclasses.dataclass
    class Late:
        x: torch.Tensor
        unset: Any = dataclasses.field(init=False)

    slim = Slim()
    slim.x = x_of().requires_grad_()
    late = cast_floating(Late(x_of()), torch.bfloat16)
    assert late.x.dtype == torch.bfloat16
    assert not hasattr(late, "unset")
    assert cast_floating(Data, torch.bfloat16) is Data
    assert cast_floating(slim, torch.bfloat16) is slim
    assert [t is slim.x for t in find_tensors({"a": slim})] == [True]
    loop: Any = Slim()
    loop.x = loop
    assert find_tensors(loop) == []
    packed = cast_floating(pack_sequence([x_of()]), torch.bfloat16)
    assert isinstance(packed, PackedSequence)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cast_floating(Frozen(x_of()), torch.bfloat16).x = 1
