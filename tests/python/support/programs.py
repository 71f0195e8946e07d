"""Random programs of what a training script may do, compared with one process after every action.

Each seed draws a model with uneven and shared weights, which of its layers are units, their settings, and
a program. The plain model does the same with the data of all ranks.

    RandomProgram(world, seed).run()
"""

from __future__ import annotations

import contextlib
import dataclasses
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
BATCH = 3
NUM_ACTIONS = 12

# --- models ---------------------------------------------------------------------------------------


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
    """Layers between an embedding and a head of the same weight."""

    def __init__(self, layers: list[int], is_tied: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(LAYERS[index]() for index in layers)
        self.head = nn.Linear(WIDTH, WIDTH)
        if is_tied:
            self.head.weight = self.embed.weight
        self.raises_at = -1

    def forward(self, x: torch.Tensor, extra: bool) -> torch.Tensor:
        x = self.embed(x)
        for index, layer in enumerate(self.layers):
            if index == self.raises_at:
                raise Error
            x = layer(x, extra)
        return self.head(x)


@dataclasses.dataclass
class Plan:
    """What a seed draws before the program."""

    layers: list[int]
    is_tied: bool
    units: list[int]  # of the layers
    inner_units: bool
    options: dict[str, Any]
    optimizer: str

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
        return cls(
            layers=layers,
            is_tied=choose.random() < 0.3,
            units=[index for index in range(len(layers)) if choose.random() < 0.7],
            inner_units=choose.random() < 0.5,
            options=options,
            optimizer=choose.choice(["SGD", "AdamW", "mics.SGD", "mics.AdamW"]),
        )

    def make_model(self) -> Net:
        return make(Net, self.layers, self.is_tied)

    def shard(self, model: Net, mesh: Any) -> Any:
        for index in self.units:
            layer = model.layers[index]
            if self.inner_units and isinstance(layer, Deep):
                for inner in layer.inner:
                    mics.fully_shard(inner, mesh=mesh, **self.options)
            mics.fully_shard(layer, mesh=mesh, **self.options)
        return mics.fully_shard(model, mesh=mesh, **self.options)

    def make_optimizer(self, model: nn.Module, is_plain: bool) -> torch.optim.Optimizer:
        rooms: Any = torch.optim if is_plain or "mics" not in self.optimizer else mics.optim
        name = self.optimizer.removeprefix("mics.")
        rest: dict[str, Any] = {"eps": 1e-2} if name == "AdamW" else {"momentum": 0.5}
        return getattr(rooms, name)(model.parameters(), lr=0.02, **rest)


# --- programs -------------------------------------------------------------------------------------


class RandomProgram:
    """A sharded model and its plain twin, through the same actions."""

    def __init__(self, world: Any, seed: int) -> None:
        self.rank = world.rank
        self.choose = random.Random(seed)  # the same on all ranks
        self.plan = Plan.draw(self.choose, world.partition_size)
        self.plain = self.plan.make_model()
        self.model = self.plan.shard(self.plan.make_model(), world.mesh)
        self.optimizers = [
            self.plan.make_optimizer(model, is_plain=model is self.plain)
            for model in (self.model, self.plain)
        ]
        self.num_batches = 0

    # Data and values

    def points(self, rank: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * number + rank)
        return torch.randn(BATCH, WIDTH, generator=generator)

    def value(self, model: nn.Module, rank: int, number: int, extra: list[bool]) -> torch.Tensor:
        return F.mse_loss(model(self.points(rank, number), extra[rank]), torch.ones(BATCH, WIDTH))

    def next_batch(self) -> tuple[int, list[bool]]:
        self.num_batches += 1
        kind = self.choose.choice(["all", "none", "some"])
        draws = [self.choose.random() < 0.5 for _ in range(WORLD)]
        extra = {"all": [True] * WORLD, "none": [False] * WORLD, "some": draws}[kind]
        return self.num_batches, extra

    def backward_of_plain(self, number: int, extra: list[bool], share: float) -> None:
        for rank in range(WORLD):
            (self.value(self.plain, rank, number, extra) * share / WORLD).backward()

    # Actions

    def accumulate(self) -> None:
        micro_steps = self.choose.randint(1, 3)
        for micro_step in range(micro_steps):
            batch = self.next_batch()
            with mics.microbatch(self.model, is_last=micro_step == micro_steps - 1):
                (self.value(self.model, self.rank, *batch) / micro_steps).backward()
            self.backward_of_plain(*batch, 1 / micro_steps)

    def several_forwards(self) -> None:
        batches = [self.next_batch() for _ in range(2)]
        values = [self.value(self.model, self.rank, *batch) for batch in batches]
        with self.model.no_sync():
            values[1].backward()
        values[0].backward()
        for batch in batches:
            self.backward_of_plain(*batch, 1.0)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.forget()

    def clip_and_step(self) -> None:
        norms = [
            mics.clip_grad_norm_(self.model.parameters(), 0.05),
            nn.utils.clip_grad_norm_(self.plain.parameters(), 0.05),
        ]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-5)
        self.step()

    def forget(self) -> None:
        sets_to_none = self.choose.random() < 0.7
        for model in (self.model, self.plain):
            model.zero_grad(set_to_none=sets_to_none)

    def evaluate(self) -> None:
        number, extra = self.next_batch()
        context = self.choose.choice([torch.no_grad, torch.inference_mode])
        with context():
            mine = self.value(self.model, self.rank, number, extra)
            other = self.value(self.plain, self.rank, number, extra)
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)

    def write(self) -> None:
        names = [name for name, _ in self.plain.named_parameters()]
        name = self.choose.choice(names)
        with torch.no_grad():
            for model in (self.model, self.plain):
                model.get_parameter(name).mul_(0.9)

    def write_unsharded(self) -> None:
        with mics.unsharded(self.model, writeback=True), torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.95)
        with torch.no_grad():
            for parameter in self.plain.parameters():
                parameter.mul_(0.95)

    def load(self) -> None:
        for model in (self.model, self.plain):
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})

    def freeze(self) -> None:
        frozen = self.choose.random() < 0.5
        index = self.choose.randrange(len(self.plan.layers))
        for model in (self.model, self.plain):
            model.zero_grad()
            model.layers[index].requires_grad_(not frozen)

    def raise_in_forward(self) -> None:
        batch = self.next_batch()
        self.model.raises_at = self.choose.randrange(len(self.plan.layers))
        with contextlib.suppress(Error):
            self.value(self.model, self.rank, *batch)
        self.model.raises_at = -1

    def drop_a_forward(self) -> None:
        self.value(self.model, self.rank, *self.next_batch())

    def unshard_by_hand(self) -> None:
        self.model.unshard()
        self.evaluate()
        self.model.reshard()

    def release(self) -> None:
        self.model.release_memory()

    def change_settings(self) -> None:
        self.model.set_reshard_after_forward(self.choose.choice([True, False]))
        if "hierarchical_gather" in self.plan.options:
            self.model.set_keep_between_microsteps(self.choose.choice(["shard", "full"]))

    def run(self) -> list[str]:
        """Gives the names of the actions."""
        between = [
            self.evaluate,
            self.write,
            self.write_unsharded,
            self.load,
            self.freeze,
            self.raise_in_forward,
            self.drop_a_forward,
            self.unshard_by_hand,
            self.release,
            self.change_settings,
            self.forget,
        ]
        done = []
        while len(done) < NUM_ACTIONS:
            chosen = [self.choose.choice([self.accumulate, self.several_forwards])]
            if self.choose.random() < 0.3:
                chosen.append(self.evaluate)
            chosen.append(self.choose.choice([self.step, self.step, self.clip_and_step]))
            chosen += self.choose.sample(between, self.choose.randint(0, 2))
            for action in chosen:
                done.append(action.__name__)
                try:
                    action()
                    self.compare()
                except Exception as error:
                    raise AssertionError(f"{self.plan}, after {done}: {error}") from error
        return done

    def compare(self) -> None:
        """Collective: parameters and gradients of both models."""
        right = dict(self.plain.named_parameters())
        for name, parameter in self.model.named_parameters():
            pairs = [(parameter.detach(), right[name].detach())]
            assert (parameter.grad is None) == (right[name].grad is None), f"gradient of {name}"
            if parameter.grad is not None:
                pairs.append((parameter.grad, right[name].grad))
            for mine, other in pairs:
                torch.testing.assert_close(
                    mine.full_tensor(),
                    other,
                    rtol=1e-3,
                    atol=1e-4,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
