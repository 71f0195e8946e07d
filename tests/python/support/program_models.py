"""Models of random programs: uneven and shared weights, which layers are units, and their settings."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_mics as mics
from support.bodies import WORLD, make

WIDTH = 6


class Narrow(nn.Module):
    """Fewer rows than ranks."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, WIDTH) / WIDTH)

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return x + torch.tanh(x @ self.weight.T) @ self.weight


class Optional(nn.Module):
    """A part that only some calls use."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(WIDTH, WIDTH)
        self.extra = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        x = x + torch.tanh(self.used(x)) / 4
        return x + self.extra(x) / 4 if extra else x


class Deep(nn.Module):
    """Units inside a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.ModuleList([Narrow(3), Optional()])

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        y = self.norm(x)
        for layer in self.inner:
            y = layer(y, extra)
        return x + y / 4


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Optional()

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return self.layer(self.layer(x, extra), False)


class Nothing(nn.Module):
    """No parameters."""

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return torch.tanh(x)


class Recomputed(nn.Module):
    """Computes its layer again in backward."""

    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        return checkpoint(self.layer, x, extra, use_reentrant=self.use_reentrant)


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: Narrow(1),
    lambda: Narrow(2),
    lambda: Narrow(5),
    Optional,
    Deep,
    Twice,
    Nothing,
    lambda: Recomputed(Optional(), True),
    lambda: Recomputed(Optional(), False),
    lambda: Recomputed(Deep(), False),
]


class Error(Exception):
    """Raised on purpose, on all ranks."""


class Net(nn.Module):
    """Layers between an embedding and a head of the same weight.

    Args:
        layers: indices of LAYERS.
        is_tied: the head has the weight of the embedding.
        reads: index of a layer of which this forward itself uses a part, and whether it does so before the
            layer's forward. A part of the head with the index that follows the last layer's.
    """

    def __init__(self, layers: list[int], is_tied: bool, reads: tuple[int, bool]) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(LAYERS[index]() for index in layers)
        self.head = nn.Linear(WIDTH, WIDTH)
        if is_tied:
            self.head.weight = self.embed.weight
        self.reads = reads
        self.raises_at = -1

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        x = self.embed(x)
        for index, layer in enumerate(self.layers):
            if index == self.raises_at:
                raise Error
            if self.reads == (index, True):
                x = read(layer, x)
            x = layer(x, extra)
            if self.reads == (index, False):
                x = read(layer, x)
        if self.reads[0] == len(self.layers):
            return F.linear(x, self.head.weight, self.head.bias)
        return self.head(x)


def read(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Uses a parameter of a layer, or a module inside it, but not the layer."""
    if isinstance(layer, Narrow):
        return x + x @ layer.weight.T @ layer.weight / 4
    return x + layer.used(x) / 4 if isinstance(layer, Optional) else x


# torch has no fused SGD for DTensors.
FORMS: dict[str, dict[str, Any]] = {
    "SGD": {"foreach": False},
    "SGD foreach": {"foreach": True},
    "AdamW": {"foreach": False},
    "AdamW foreach": {"foreach": True},
    "AdamW fused": {"fused": True},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name: functools.partial(getattr(torch.optim, name.split()[0]), **form)
    for name, form in FORMS.items()
} | {"mics.SGD": mics.optim.SGD, "mics.AdamW": mics.optim.AdamW}


@dataclasses.dataclass
class Plan:
    """What a seed draws before the program."""

    layers: list[int]
    is_tied: bool
    reads: tuple[int, bool]
    units: list[int]  # of the layers
    inner_units: bool
    head_is_unit: bool
    options: dict[str, Any]
    optimizer: str
    steps_in_backward: bool  # an optimizer per parameter, in its hook

    @classmethod
    def draw(cls, choose: random.Random, partition_size: int) -> Plan:
        layers = [choose.randrange(len(LAYERS)) for _ in range(choose.randint(1, 5))]
        spans = partition_size == WORLD  # two nodes of two ranks
        accumulate = ["two_hop", "two_hop", "local"] + ["block"] * spans
        options = {
            "reshard_after_forward": choose.choice([None, True, False] + [2] * spans),
            "keep_between_microsteps": choose.choice(["shard", "full"] + ["block"] * spans),
            "accumulate": choose.choice(accumulate),
        }
        if "block" not in options.values() and options["reshard_after_forward"] != 2:
            options["hierarchical_gather"] = choose.choice(["auto", False])
        is_tied = choose.random() < 0.3
        return cls(
            layers=layers,
            is_tied=is_tied,
            reads=(choose.randint(-2, len(layers)), choose.random() < 0.5),
            units=[index for index in range(len(layers)) if choose.random() < 0.7],
            inner_units=choose.random() < 0.5,
            head_is_unit=not is_tied and choose.random() < 0.5,
            options=options,
            optimizer=choose.choice(list(OPTIMIZERS)),
            steps_in_backward=choose.random() < 0.15,
        )

    def make_model(self) -> Net:
        return make(Net, self.layers, self.is_tied, self.reads)

    def shard(self, model: Net, mesh: Any) -> Any:
        for index in self.units:
            layer = model.layers[index]
            if self.inner_units and isinstance(layer, Deep):
                for inner in layer.inner:
                    mics.fully_shard(inner, mesh=mesh, **self.options)
            mics.fully_shard(layer, mesh=mesh, **self.options)
        if self.head_is_unit:
            mics.fully_shard(model.head, mesh=mesh, **self.options)
        return mics.fully_shard(model, mesh=mesh, **self.options)

    def make_optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """One, or with steps_in_backward one for each parameter."""
        is_plain = not isinstance(model, mics.MiCSModule)
        name = self.optimizer.removeprefix("mics.") + " foreach" * ("mics" in self.optimizer)
        make_one = OPTIMIZERS[name if is_plain else self.optimizer]
        rest: dict[str, Any] = {"eps": 1e-2} if "AdamW" in name else {"momentum": 0.5}
        parameters = list(model.parameters())
        chosen = [[p] for p in parameters] if self.steps_in_backward else [parameters]
        return [make_one(each, lr=0.02, **rest) for each in chosen]
