"""Habits of training scripts that random programs draw: writes, toggles, copies, saves, children alone.

Everything is done to a sharded model and to its plain twin.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import random
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

import torch_mics as mics
from support.bodies import WORLD, World
from support.program_models import WIDTH, Plan

BATCH = 3
Batch = tuple[int, list[bool]]  # a number, and for each rank whether it uses optional parts


def by_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [
    copy.deepcopy,
    by_save,
    lambda value: pickle.loads(pickle.dumps(value)),
]


# --- writes ---------------------------------------------------------------------------------------

Parameters = list[nn.Parameter]


def write_in_place(parameters: Parameters) -> None:
    for p in parameters:
        p.mul_(0.9)


def write_data(parameters: Parameters) -> None:
    for p in parameters:
        p.data.mul_(0.9)


def write_copy(parameters: Parameters) -> None:
    for p in parameters:
        p.data.copy_(p.data * 0.9)


def write_foreach(parameters: Parameters) -> None:
    torch._foreach_mul_([p.detach() for p in parameters], 0.9)


def write_foreach_parameters(parameters: Parameters) -> None:
    torch._foreach_mul_(parameters, 0.9)


def write_local(parameters: Parameters) -> None:
    for p in parameters:
        (p.to_local() if hasattr(p, "to_local") else p).data.mul_(0.9)


def write_collective(parameters: Parameters) -> None:
    """The mean over the replicas, which are alike, and less."""
    for p in parameters:
        local, size = p, 1
        if hasattr(p, "to_local"):
            local, group = p.to_local(), p.device_mesh.get_group(0)
            size = dist.get_world_size(group)
            dist.all_reduce(local, group=group)
        local.data.mul_(0.9 / size)


WRITES = [
    write_in_place,
    write_data,
    write_copy,
    write_foreach,
    write_foreach_parameters,
    write_local,
    write_collective,
]


@contextlib.contextmanager
def frozen(parameters: Any) -> Iterator[None]:
    """Takes requires_grad away and gives it back."""
    chosen = [p for p in parameters if p.requires_grad]
    for p in chosen:
        p.requires_grad_(False)
    yield
    for p in chosen:
        p.requires_grad_(True)


def close(mine: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


# By the default group: processes of tests are kept, their groups are not.
_saving_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def saving_group() -> Any:
    """For saves beside training: their collectives run on a thread."""
    world = dist.group.WORLD
    if world not in _saving_groups:
        _saving_groups[world] = dist.new_group(backend="gloo")
    return _saving_groups[world]


class Habits:
    """What a program does besides training."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rank = world.rank
        self.choose = random.Random(seed)  # the same on all ranks
        self.plan = Plan.draw(self.choose, world.partition_size)
        self.plain = self.plan.make_model()
        self.model = self.plan.shard(self.plan.make_model(), world.mesh)
        self.both: tuple[Any, Any] = (self.model, self.plain)
        self.optimizers = [self.plan.make_optimizers(model) for model in self.both]
        if self.plan.steps_in_backward:
            for p, optimizer in zip(self.model.parameters(), self.optimizers[0], strict=True):
                p.register_post_accumulate_grad_hook(
                    lambda _, each=optimizer: step_and_forget(each)
                )
        self.num_batches = 0
        self.kept: list[Any] = []  # states of both, in memory
        self.path = ""
        self.saved: list[Any] | None = None  # states of the plain twin, as they are on disk
        self.saving: Any = None  # a future

    # Data and values

    def points(self, rank: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * number + rank)
        return torch.randn(BATCH, WIDTH, generator=generator)

    def value(self, model: nn.Module, rank: int, number: int, extra: list[bool]) -> torch.Tensor:
        return F.mse_loss(model(self.points(rank, number), extra[rank]), torch.ones(BATCH, WIDTH))

    def next_batch(self) -> Batch:
        self.num_batches += 1
        kind = self.choose.choice(["all", "none", "some"])
        draws = [self.choose.random() < 0.5 for _ in range(WORLD)]
        extra = {"all": [True] * WORLD, "none": [False] * WORLD, "some": draws}[kind]
        return self.num_batches, extra

    # Evaluation

    def evaluate(self) -> None:
        batch = self.next_batch()
        context = self.choose.choice([torch.no_grad, torch.inference_mode])
        with context():
            close(*(self.value(model, self.rank, *batch) for model in self.both))

    def evaluate_frozen(self) -> None:
        """With grad mode: a reference."""
        batch, index = self.next_batch(), self.choose.randrange(-1, len(self.plan.layers))
        with contextlib.ExitStack() as stack:
            for model in self.both:
                part = model if index < 0 else model.layers[index]
                stack.enter_context(frozen(part.parameters()))
            values = [self.value(model, self.rank, *batch) for model in self.both]
        assert values[0].requires_grad == values[1].requires_grad
        close(*(value.detach() for value in values))

    def drop_a_forward(self) -> None:
        self.value(self.model, self.rank, *self.next_batch())

    def unshard_by_hand(self) -> None:
        self.model.unshard()
        self.evaluate()
        self.model.reshard()

    # Writes

    def write(self) -> None:
        self.write_by(self.choose.choice(WRITES))

    def write_by(self, how: Callable[[Parameters], None]) -> None:
        names = [name for name, _ in self.plain.named_parameters()]
        if self.choose.random() < 0.5:
            names = [self.choose.choice(names)]
        for model in self.both:
            found = dict(model.named_parameters())
            with torch.no_grad():
                how([found[name] for name in names])

    def write_in_place(self) -> None:
        self.write_by(write_in_place)

    def unshard_write_and_reshard(self) -> None:
        unit = self.choose.choice([self.model, *(self.model.layers[i] for i in self.plan.units)])
        kept = [list(model.parameters()) for model in self.both]
        how = self.choose.choice(WRITES)
        unit.unshard()
        with torch.no_grad():
            for parameters in kept:
                how(parameters)
        if how is not write_in_place or self.choose.random() < 0.5:
            unit.reshard()
        self.evaluate()
        unit.reshard()

    def write_unsharded(self) -> None:
        with mics.unsharded(self.model, writeback=True), torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.95)
        with torch.no_grad():
            for parameter in self.plain.parameters():
                parameter.mul_(0.95)

    # requires_grad

    def toggle(self) -> None:
        index = self.choose.randrange(-1, len(self.plan.layers))
        for model in self.both:
            with frozen((model if index < 0 else model.layers[index]).parameters()):
                pass

    def freeze(self) -> None:
        for model in self.both:
            model.zero_grad()
        self.freeze_a_layer()

    def freeze_a_layer(self) -> None:
        is_frozen = self.choose.random() < 0.5
        index = self.choose.randrange(len(self.plan.layers))
        for model in self.both:
            model.layers[index].requires_grad_(not is_frozen)

    # Children

    def child_alone(self) -> None:
        number, _ = self.next_batch()
        if self.plan.units:
            index = self.choose.choice(self.plan.units)
            with torch.no_grad():
                close(*(model.layers[index](self.points(0, number), True) for model in self.both))

    def train_child(self) -> None:
        """Forward and backward of some layers, one after the other, without the root's."""
        number, extra = self.next_batch()
        chosen = [index for index in self.plan.units if self.choose.random() < 0.6]
        if not chosen:
            return

        def value(model: Any, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
            y = x = self.points(rank, number).requires_grad_()
            for index in chosen:
                y = model.layers[index](y, extra[rank])
            return x, y.square().mean()

        x, mine = value(self.model, self.rank)
        mine.backward()
        for rank in range(WORLD):
            other_x, other = value(self.plain, rank)
            (other / WORLD).backward()
            if rank == self.rank:
                close(x.grad, other_x.grad * WORLD)
        self.after_boundary()

    def after_boundary(self) -> None:
        """What the sharded model has done in its hooks."""
        if self.plan.steps_in_backward:
            for p, optimizer in zip(self.plain.parameters(), self.optimizers[1], strict=True):
                if p.grad is not None:
                    step_and_forget(optimizer)

    # States in memory and on disk

    def load(self) -> None:
        for model in self.both:
            model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})

    def states(self, which: int) -> list[dict[str, Any]]:
        model, optimizers = self.both[which], self.optimizers[which]
        return [model.state_dict(), *(each.state_dict() for each in optimizers)]

    def keep_states(self) -> None:
        duplicate = self.choose.choice(COPIES)
        self.kept = [duplicate(self.states(which)) for which in range(2)]

    def restore_states(self) -> None:
        for which, states in enumerate(self.kept):
            self.set_states(which, states)

    def set_states(self, which: int, states: list[dict[str, Any]]) -> None:
        self.both[which].load_state_dict(states[0])
        for optimizer, state in zip(self.optimizers[which], states[1:], strict=False):
            optimizer.load_state_dict(copy.deepcopy(state))

    def train_state(self) -> mics.checkpoint.TrainState:
        optimizers = self.optimizers[0]
        return mics.checkpoint.TrainState(
            self.model, None if self.plan.steps_in_backward else optimizers[0]
        )

    def note_saved(self) -> str:
        """Where to save."""
        self.finish_saving()
        if not self.path:
            self.path = self.world.gather(tempfile.mkdtemp() if self.rank == 0 else "")[0]
        states = self.states(1)
        self.saved = copy.deepcopy(states[:1] if self.plan.steps_in_backward else states)
        return f"{self.path}/{self.num_batches}-{self.choose.randrange(10**6)}"

    def save(self) -> None:
        self.last_path = self.note_saved()
        self.train_state().save(self.last_path)

    def save_asynchronously(self) -> None:
        self.last_path = self.note_saved()
        self.saving = dcp.async_save(
            {"train": self.train_state()},
            checkpoint_id=self.last_path,
            process_group=saving_group(),
        )

    def finish_saving(self) -> None:
        if self.saving is not None:
            self.saving.result()
            self.saving = None

    def load_saved(self) -> None:
        self.finish_saving()
        if self.saved is not None:
            if not self.plan.steps_in_backward and self.choose.random() < 0.5:
                self.optimizers = [self.plan.make_optimizers(model) for model in self.both]
            self.train_state().load(self.last_path)
            self.set_states(1, self.saved)

    def clean_up(self) -> None:
        self.finish_saving()
        if self.path and self.rank == 0:
            shutil.rmtree(self.path, ignore_errors=True)

    # Settings

    def release(self) -> None:
        self.model.release_memory()

    def change_settings(self) -> None:
        self.model.set_reshard_after_forward(self.choose.choice([True, False]))
        if "hierarchical_gather" in self.plan.options:
            self.model.set_keep_between_microsteps(self.choose.choice(["shard", "full"]))


def step_and_forget(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad()
