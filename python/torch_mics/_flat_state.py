"""Optimizer state in flat tensors: which parameters of a unit one operation can step together.

A segment is a group's parameters that lie next to each other in a unit's shard; their state lies in
flat tensors spaced like the shard. A run is a part of a segment that can be stepped at once now: each of
its parameters has a gradient, in one buffer spaced like the shard, and all have taken as many steps.
`optimizer.state` holds, per parameter, views of the flat tensors.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from torch_mics import _C
from torch_mics._parameters import wrap
from torch_mics._unit import ShardedUnit, unit_of_parameter

# optimizer.state: what torch keeps per parameter.
State = dict[torch.Tensor, dict[str, Any]]
STEP = "step"


@dataclasses.dataclass
class Run:
    """Neighbours in a segment that can be stepped at once now, and their flat tensors."""

    is_new: bool  # the state had no value
    parameter: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    counters: slice  # its part of the step counters


class Segment:
    """Parameters of one unit and one group that lie next to each other in the shard."""

    def __init__(self, parameters: list[torch.Tensor], counters: torch.Tensor, first: int) -> None:
        """`counters[first:]` count the steps of `parameters`."""
        self.parameters = parameters
        self._first_counter = first
        self._counters = counters[first : first + len(parameters)]
        shards = [_local(parameter) for parameter in parameters]
        self._starts = [_distance(shards[0], shard) or 0 for shard in shards]
        self._ends = [s + t.numel() for s, t in zip(self._starts, shards, strict=True)]
        self._values = _C.span_from(shards[0], self._ends[-1])
        self._flat: dict[str, torch.Tensor] = {}
        # Per key, the views that were made: DTensors, and for the steps 0-dim tensors.
        self._views: dict[str, dict[int, torch.Tensor]] = {}
        # As runs() found them: the gradients, and what optimizer.state holds (entry, key, view).
        self.gradients: list[torch.Tensor | None] = []
        self.bound: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def runs(self, state: State, keys: tuple[str, ...], *, counts_steps: bool) -> list[Run]:
        """Gives the present runs, and puts our views into `state` where it holds other tensors or none.

        Args:
            state: of the optimizer.
            keys: names of the states that have the parameter's shape.
            counts_steps: whether the state has a "step".
        """
        self.gradients = [parameter.grad for parameter in self.parameters]
        is_new = self._bind(state, keys, counts_steps=counts_steps)
        return list(self._find_runs(keys, is_new))

    def _bind(self, state: State, keys: tuple[str, ...], *, counts_steps: bool) -> list[bool]:
        """Takes over the state of the parameters that have a gradient; says which had no state."""
        is_new = [False] * len(self.parameters)
        self.bound = []
        for index, gradient in enumerate(self.gradients):
            if gradient is None or not (keys or counts_steps):
                continue
            entry = state[self.parameters[index]]
            if counts_steps:
                view = self._step_view(index)
                present = entry.get(STEP)
                if present is not view:
                    self._counters[index] = 0.0 if present is None else float(present)
                    entry[STEP] = view
                self.bound.append((entry, STEP, view))
            for key in keys:
                view = self._view(key, index)
                present = entry.get(key)
                if present is None:
                    is_new[index] = True
                    _local(view).zero_()
                elif present is not view:
                    _local(view).copy_(_local_like(present, self.parameters[index], key))
                entry[key] = view
                self.bound.append((entry, key, view))
        return is_new

    def _step_view(self, index: int) -> torch.Tensor:
        views = self._views.setdefault(STEP, {})
        if index not in views:
            views[index] = self._counters[index]
        return views[index]

    def _view(self, key: str, index: int) -> torch.Tensor:
        if key not in self._flat:
            self._flat[key] = torch.zeros_like(self._values)
        views = self._views.setdefault(key, {})
        if index not in views:
            parameter = self.parameters[index]
            assert isinstance(parameter, DTensor)
            local = _C.make_part(self._flat[key], self._starts[index], _local(parameter).shape)
            mesh, placements = parameter.device_mesh, parameter.placements
            views[index] = wrap(local, mesh, placements, parameter.shape)
        return views[index]

    def _find_runs(self, keys: tuple[str, ...], is_new: list[bool]) -> Iterator[Run]:
        counts = self._counters.tolist()
        found: list[list[int]] = []
        parts: list[torch.Tensor | None] = [
            None if g is None else _local_like(g, p, "the gradient")
            for g, p in zip(self.gradients, self.parameters, strict=True)
        ]
        for index, part in enumerate(parts):
            if part is None:
                continue
            before = parts[index - 1] if found and found[-1][-1] == index - 1 else None
            joins = (
                before is not None
                and counts[index] == counts[index - 1]
                and is_new[index] == is_new[index - 1]
                and _distance(before, part) == self._starts[index] - self._starts[index - 1]
            )
            if joins:
                found[-1].append(index)
            else:
                found.append([index])
        for members in found:
            first, last = members[0], members[-1]
            begin, end = self._starts[first], self._ends[last]
            part = parts[first]
            assert part is not None
            yield Run(
                is_new[first],
                parameter=self._values[begin:end],
                gradient=_C.span_from(part, end - begin) if first != last else part.reshape(-1),
                state={key: self._flat[key][begin:end] for key in keys},
                counters=slice(self._first_counter + first, self._first_counter + last + 1),
            )


@dataclasses.dataclass
class Group:
    """One parameter group: what can be stepped now, and its parameters that are in no unit."""

    parameters: list[torch.Tensor]
    segments: list[Segment]
    rest: list[torch.Tensor]
    runs: list[Run] = dataclasses.field(default_factory=list)
    handles: list[Any] = dataclasses.field(default_factory=list)  # make_handle() of each run
    steps: list[float] = dataclasses.field(default_factory=list)  # steps that each run has taken


class FlatState:
    """The runs of an optimizer. They are found again when anything that they depend on has changed."""

    def __init__(self, make_handle: Callable[[Run], Any], *, counts_steps: bool) -> None:
        self._make_handle = make_handle
        self._counts_steps = counts_steps
        self._groups: list[Group] = []
        # On the CPU, as torch's, whatever the default device: the host reads them in every step.
        self._counters = torch.zeros(0, device="cpu")
        self._is_stepped = self._counters  # 1 where the parameter is in a run
        # What the runs depend on, as it was when they were found.
        self._shards: list[tuple[weakref.ref[ShardedUnit], torch.Tensor]] = []
        self._keys: list[tuple[str, ...]] = []
        self._entries: list[dict[str, Any]] = []
        self._parameters: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = []
        self._bound: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def groups(
        self, groups: list[dict[str, Any]], state: State, keys: list[tuple[str, ...]]
    ) -> list[Group]:
        """Gives one Group per parameter group, and counts a step of every run.

        Args:
            groups, state: of the optimizer.
            keys: per group, names of the states that have the parameter's shape.
        """
        if not self._has_segments_of(groups):
            self._find_segments(groups)
            self._find_runs(state, keys)
        elif not self._has_runs_of(state, keys) or not self._read_steps():
            self._find_runs(state, keys)
        if self._counts_steps:
            self._counters += self._is_stepped
        return self._groups

    def _has_segments_of(self, groups: list[dict[str, Any]]) -> bool:
        return (
            len(groups) == len(self._groups)
            and all(
                are_same(group["params"], known.parameters)
                for group, known in zip(groups, self._groups, strict=True)
            )
            and all(_shard_of(reference) is shard for reference, shard in self._shards)
        )

    def _find_segments(self, groups: list[dict[str, Any]]) -> None:
        units: dict[int, ShardedUnit] = {}
        found: list[tuple[list[torch.Tensor], list[list[torch.Tensor]], list[torch.Tensor]]] = []
        for group in groups:
            parameters = list(group["params"])
            chosen: dict[int, set[int]] = {}  # per unit, its parameters in this group
            rest = []
            for parameter in parameters:
                unit = unit_of_parameter(parameter)
                if unit is None:
                    rest.append(parameter)
                else:
                    units.setdefault(id(unit), unit)
                    chosen.setdefault(id(unit), set()).add(id(parameter))
            parts = [part for key, ids in chosen.items() for part in _neighbours(units[key], ids)]
            found.append((parameters, parts, rest))
        self._shards = [(weakref.ref(unit), unit.shard) for unit in units.values()]
        self._parameters = [p for _, parts, _ in found for part in parts for p in part]
        self._counters = torch.zeros(len(self._parameters), dtype=_counter_dtype(), device="cpu")
        self._groups = []
        first = 0
        for parameters, parts, rest in found:
            segments = []
            for part in parts:
                segments.append(Segment(part, self._counters, first))
                first += len(part)
            self._groups.append(Group(parameters, segments, rest))

    def _has_runs_of(self, state: State, keys: list[tuple[str, ...]]) -> bool:
        return (
            keys == self._keys
            and are_same(state.values(), self._entries)
            and _C.gradients_are(self._parameters, self._gradients)
            and _C.entries_are(self._bound)
            and not any(run.is_new for group in self._groups for run in group.runs)
        )

    def _find_runs(self, state: State, keys: list[tuple[str, ...]]) -> None:
        for group, names in zip(self._groups, keys, strict=True):
            group.runs = [
                run
                for segment in group.segments
                for run in segment.runs(state, names, counts_steps=self._counts_steps)
            ]
            group.handles = [self._make_handle(run) for run in group.runs]
        segments = [segment for group in self._groups for segment in group.segments]
        self._keys = keys
        self._entries = list(state.values())
        self._gradients = [gradient for segment in segments for gradient in segment.gradients]
        self._bound = [triple for segment in segments for triple in segment.bound]
        is_stepped = [float(g is not None) for g in self._gradients]
        self._is_stepped = torch.tensor(is_stepped, device="cpu")
        self._read_steps()

    def _read_steps(self) -> bool:
        """Reads the number of steps of each run; False when parameters of one run differ in it."""
        counts = self._counters.tolist()
        for group in self._groups:
            group.steps = [counts[run.counters.start] for run in group.runs]
            for run, steps in zip(group.runs, group.steps, strict=True):
                size = run.counters.stop - run.counters.start
                if size > 1 and counts[run.counters].count(steps) != size:
                    return False
        return True


def are_same(left: Iterable[object], right: Iterable[object]) -> bool:
    """Whether both hold the same objects in the same order."""
    left, right = list(left), list(right)
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _distance(first: torch.Tensor, second: torch.Tensor) -> int | None:
    """Elements from one to the other; None unless both are contiguous and lie in one buffer."""
    return _C.distance_between(first, second)


def _neighbours(unit: ShardedUnit, chosen: set[int]) -> Iterator[list[torch.Tensor]]:
    """Cuts the unit's parameters where one is not chosen, or does not follow in memory."""
    members: list[torch.Tensor] = []
    for parameter in unit.parameters:
        is_chosen = id(parameter.sharded) in chosen
        if members and not (is_chosen and _follows(_local(members[-1]), parameter.local)):
            yield members
            members = []
        if is_chosen:
            members.append(parameter.sharded)
    if members:
        yield members


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    distance = _distance(first, second)
    return distance is not None and distance >= first.numel()


def _shard_of(reference: weakref.ref[ShardedUnit]) -> torch.Tensor | None:
    unit = reference()
    return None if unit is None else unit.shard


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor  # type: ignore[attr-defined]


def _local_like(value: object, parameter: torch.Tensor, what: str) -> torch.Tensor:
    """This rank's rows of a gradient or state."""
    assert isinstance(parameter, DTensor)
    if (
        isinstance(value, DTensor)
        and value.shape == parameter.shape
        and value.placements == parameter.placements
        and value.device_mesh == parameter.device_mesh
    ):
        return value._local_tensor
    found = value.placements if isinstance(value, DTensor) else type(value).__name__
    raise ValueError(
        "the gradient and the state of a sharded parameter must be cut as it is: got "
        f"{what} of {found} for a parameter of shape {tuple(parameter.shape)} and placements "
        f"{parameter.placements}. Redistribute it, or load the state through "
        "torch.distributed.checkpoint.state_dict."
    )


def _counter_dtype() -> torch.dtype:
    """The dtype of step counters in torch's optimizers."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
