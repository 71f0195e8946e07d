"""Random programs of what a training script may do, compared with one process after every action.

Each seed draws a model with uneven and shared weights, which of its layers are units, their settings, and
a program. The plain model does the same with the data of all ranks.

    RandomProgram(world, seed).run()
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_mics as mics
from support.bodies import WORLD
from support.parity import own_rows
from support.program_habits import Batch, Habits
from support.program_models import Error

NUM_ACTIONS = 12
Action = Callable[[], None]


class RandomProgram(Habits):
    """A sharded model and its plain twin, through the same actions."""

    def __init__(self, world: Any, seed: int) -> None:
        super().__init__(world, seed)
        self.late_zero = ""  # where in the next step gradients are zeroed, if they still are to be
        self.done: list[str] = []
        # Between a forward and its backward.
        self.after_forward: list[Action] = [
            self.evaluate,
            self.evaluate_frozen,
            self.toggle,
            self.child_alone,
            self.drop_a_forward,
            self.keep_states,
            self.save,
            self.save_asynchronously,
        ]
        # Between two micro-steps.
        self.after_backward: list[Action] = [*self.after_forward, self.write_in_place]
        if not self.plan.steps_in_backward:
            # There a layer would step alone, or not when it was frozen.
            self.after_forward.append(self.train_child)
            self.after_backward += [self.train_child, self.freeze_a_layer]
        self.between: list[Action] = [
            *self.after_forward,
            self.write,
            self.write,
            self.write_unsharded,
            self.unshard_write_and_reshard,
            self.load,
            self.restore_states,
            self.load_saved,
            self.freeze,
            self.train_child,
            self.raise_in_forward,
            self.unshard_by_hand,
            self.release,
            self.change_settings,
            self.forget,
        ]

    # Training

    def sometimes(self, actions: list[Action]) -> None:
        if self.choose.random() < 0.2:
            action = self.choose.choice(actions)
            self.done.append(f"({action.__name__})")
            action()

    def zero_late(self, place: str) -> None:
        if self.late_zero == place:
            self.late_zero = ""
            self.zero("optimizer")

    def micro_step(self, batch: Batch, share: float, *, is_last: bool) -> None:
        with mics.microbatch(self.model, is_last=is_last):
            mine = self.value(self.model, self.rank, *batch)
            values = [self.value(self.plain, rank, *batch) for rank in range(WORLD)]
            self.zero_late("before backward")
            self.sometimes(self.after_forward)
            (mine * share).backward()
        for value in values:
            (value * share / WORLD).backward()

    def accumulate(self) -> None:
        self.zero_late("before forward")
        micro_steps = self.choose.randint(1, 3)
        for number in range(micro_steps):
            is_last = number == micro_steps - 1
            self.micro_step(self.next_batch(), 1 / micro_steps, is_last=is_last)
            if not is_last:
                self.sometimes(self.after_backward)
        self.after_boundary()

    def several_forwards(self) -> None:
        self.zero_late("before forward")
        batches = [self.next_batch() for _ in range(2)]
        values = [self.value(self.model, self.rank, *batch) for batch in batches]
        plain_values = [
            self.value(self.plain, rank, *batch) for batch in batches for rank in range(WORLD)
        ]
        self.zero_late("before backward")
        self.sometimes(self.after_forward)
        order = self.choose.choice(["last first", "first first", "together"])
        if order == "together":
            (values[0] + values[1]).backward()
        else:
            first, second = values if order == "first first" else reversed(values)
            with self.model.no_sync():
                first.backward()
            second.backward()
        for value in plain_values:
            (value / WORLD).backward()
        self.after_boundary()

    def step(self) -> None:
        for optimizers in self.optimizers:
            for optimizer in optimizers:
                optimizer.step()
        self.forget()

    def clip_and_step(self) -> None:
        norms = [
            mics.clip_grad_norm_(self.model.parameters(), 0.05),
            nn.utils.clip_grad_norm_(self.plain.parameters(), 0.05),
        ]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=1e-5)
        self.step()

    def step_by_closure(self) -> None:
        """The last micro-step is in the closure."""
        micro_steps = self.choose.randint(1, 2)
        batches = [self.next_batch() for _ in range(micro_steps)]
        zeroes = micro_steps == 1 and self.choose.random() < 0.5
        if self.late_zero:
            self.late_zero = ""
            self.zero("optimizer")
        for batch in batches[:-1]:
            self.micro_step(batch, 1 / micro_steps, is_last=False)

        def closure(which: int) -> torch.Tensor:
            model, ranks = self.both[which], [self.rank] if which == 0 else range(WORLD)
            if zeroes:
                self.optimizers[which][0].zero_grad()
            for rank in ranks:
                value = self.value(model, rank, *batches[-1]) / micro_steps
                (value / len(ranks)).backward()
            return value

        for which, (optimizer,) in enumerate(self.optimizers):
            optimizer.step(lambda which=which: closure(which))
        self.forget()

    def forget(self) -> None:
        kinds = ["model", "model", "optimizer", "model not to None", "optimizer not to None"]
        kinds += ["by hand", "before forward", "before backward"]
        kind = self.choose.choice(kinds)
        if self.plan.steps_in_backward:
            kind = "model"  # no hook steps what got no gradient
        if kind.startswith("before"):
            self.late_zero = kind
        else:
            self.zero(kind)

    def zero(self, kind: str) -> None:
        sets_to_none = "not to None" not in kind
        for model, optimizers in zip(self.both, self.optimizers, strict=True):
            if kind == "by hand":
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.zero_()
            elif kind.startswith("model"):
                model.zero_grad(set_to_none=sets_to_none)
            else:
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=sets_to_none)

    def raise_in_forward(self) -> None:
        batch = self.next_batch()
        self.model.raises_at = self.choose.randrange(len(self.plan.layers))
        with contextlib.suppress(Error):
            self.value(self.model, self.rank, *batch)
        self.model.raises_at = -1

    # The program

    def turn(self) -> list[Action]:
        """A step and what is done before and after it."""
        trains: list[Action] = [self.accumulate, self.several_forwards]
        if self.plan.steps_in_backward:
            chosen = [self.choose.choice(trains)]
        else:
            steps: list[Action] = [self.step, self.step, self.clip_and_step]
            chosen = [self.choose.choice(trains), self.choose.choice(steps)]
            if self.choose.random() < 0.2:
                chosen = [self.step_by_closure]
            elif self.choose.random() < 0.3:
                chosen.insert(1, self.evaluate)
        return chosen + self.choose.sample(self.between, self.choose.randint(0, 2))

    def run(self) -> list[str]:
        """Gives the names of the actions."""
        actions: list[Action] = []
        if self.choose.random() < 0.3:
            actions = self.choose.choices([self.child_alone, self.train_child], k=2)
        num_actions = 0
        try:
            while num_actions < NUM_ACTIONS:
                for action in actions:
                    self.done.append(action.__name__)
                    self.check(action)
                num_actions += len(actions)
                actions = self.turn()
            self.check(self.finish_saving)
        finally:
            self.clean_up()
        return self.done

    def check(self, action: Action) -> None:
        """Collective. Raises on all ranks what went wrong on any."""
        problem = ""
        try:
            action()
            self.compare()
        except Exception:
            problem = traceback.format_exc()
        problems = self.world.gather(problem)
        for rank, text in enumerate(problems):
            if text:
                raise AssertionError(f"{self.plan}, after {self.done}, rank {rank}: {text}")

    def compare(self) -> None:
        """This rank's rows of parameters and gradients."""
        right = dict(self.plain.named_parameters())
        for name, parameter in self.model.named_parameters():
            pairs = [(parameter.detach(), right[name].detach())]
            assert (parameter.grad is None) == (right[name].grad is None), f"gradient of {name}"
            if parameter.grad is not None:
                pairs.append((parameter.grad, right[name].grad))
            for mine, other in pairs:
                torch.testing.assert_close(
                    *own_rows(mine, other),
                    rtol=1e-3,
                    atol=1e-4,
                    msg=lambda text, name=name: f"{name}: {text}",
                )
