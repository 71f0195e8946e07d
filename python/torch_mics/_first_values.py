"""FirstValues: the state of a model while its parameters get first values, and how to undo that."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from torch_mics._construction import Construction
from torch_mics._context import release
from torch_mics._parameters import Parameter
from torch_mics._standins import (
    FullValues,
    Slot,
    is_exactly_poison,
    poison,
)
from torch_mics._unit import ShardedUnit, original_class


@dataclasses.dataclass
class Buffer:
    """One buffer: `before` is what the module held, `working` what initialisers see.

    Attributes:
        is_due: it has values, but the framework's initialisation may give it others.
        is_recorded: it has the values of its recorded construction.
    """

    module: nn.Module
    name: str
    before: torch.Tensor
    working: torch.Tensor
    version: int
    is_due: bool = False
    is_recorded: bool = False

    @property
    def is_kept(self) -> bool:
        return not self.before.is_meta

    @property
    def now(self) -> torch.Tensor | None:
        return self.module._buffers.get(self.name)

    @property
    def writes(self) -> int:
        now = self.now
        return self.working._version - self.version if now is self.working else 1

    def record(self, tensor: torch.Tensor) -> None:
        """Registers the tensor that a replayed construction has made."""
        self.working, self.version, self.is_recorded = tensor, tensor._version, True
        self.module._buffers[self.name] = tensor

    @property
    def is_unwritten(self) -> bool:
        now = self.now
        if now is None:
            return False
        if now.is_meta or (
            now is self.working
            and self.writes == 0
            and not self.is_recorded
            and now.dtype in (torch.bool, torch.uint8, torch.int8)
        ):
            return True
        return is_exactly_poison(now)


@dataclasses.dataclass
class Loose:
    """A tensor on the meta device that is a plain attribute, or in a list, tuple or dict that is one."""

    module: nn.Module
    name: str
    before: Any

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those of its tensors that are still on the meta device."""
        return _loose_tensors(self.module.__dict__.get(self.name))

    def put(self, value_of: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Replaces meta tensors by their values; one for which `value_of` gives None stays."""

        def replaced(value: Any) -> Any:
            found = value_of(value) if _is_loose(value) else None
            return value if found is None else found

        self.module.__dict__[self.name] = tree_map(replaced, self.module.__dict__[self.name])


def _is_loose(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta and not isinstance(value, nn.Parameter)


def _loose_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if _is_loose(value) else []
    if type(value) not in (list, tuple, dict):
        return []
    members = list(value.values()) if isinstance(value, dict) else list(value)
    return [member for member in members if _is_loose(member)]


class FirstValues:
    """Puts stand-ins and working buffers into the modules, and takes them out again.

    Attributes:
        slots: one for every parameter of every unit, also for those that have their values.
        is_needed: something is on the meta device.
    """

    def __init__(self, model: nn.Module, units: list[ShardedUnit], device: torch.device) -> None:
        self.model = model
        self.device = device
        self.names = {id(m): name for name, m in model.named_modules()}
        self._all_units = units
        self.units = [unit for unit in units if unit.shard.is_meta and unit.parameters]
        self.is_needed = bool(self.units) or any(buffer.is_meta for buffer in model.buffers())
        self.slots: list[Slot] = []
        self.buffers: list[Buffer] = []
        self.loose: list[Loose] = []
        self._before: list[tuple[ShardedUnit, Parameter, nn.Parameter, torch.Tensor | None]] = []
        self._flagged = {id(m) for m in model.modules() if getattr(m, "_is_hf_initialized", False)}
        if not self.is_needed:
            return
        with torch.no_grad():
            self._allocate_shards()
        budget = max(
            sum(p.sizes.numel() * p.sharded.dtype.itemsize for p in u.parameters) for u in units
        )
        self.values = FullValues(device, budget)
        self.owned: dict[int, list[Slot]] = {}
        for unit in units:
            waiting = {id(p): kept for u, p, _, kept in self._before if u is unit}
            for index, parameter in enumerate(unit.parameters):
                has_values = id(parameter) not in waiting or waiting[id(parameter)] is not None
                slot = Slot(self.values, unit, index, parameter, has_values=has_values)
                self.slots.append(slot)
                for place in parameter.places:
                    self.owned.setdefault(id(place.module), []).append(slot)
                slot.place()
        workings: dict[int, torch.Tensor] = {}  # modules may share a buffer
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    working = workings.setdefault(id(buffer), self._working(buffer))
                    module._buffers[name] = working
                    self.buffers.append(Buffer(module, name, buffer, working, working._version))
            for name, value in vars(module).items():
                if name not in ("_parameters", "_buffers") and _loose_tensors(value):
                    self.loose.append(Loose(module, name, value))
        self._make_plain()
        self.unfilled = {
            id(p.module) for s in self.slots if not s.is_kept for p in s.parameter.places
        }
        self.unfilled |= {id(buffer.module) for buffer in self.buffers if not buffer.is_kept}

    def _make_plain(self) -> None:
        """Takes off hooks and sharded classes: initialisers may call modules, or ask for their class."""
        self._hooks = []
        self._classes = []
        for unit in self._all_units:
            unit.forward.is_full_elsewhere = True
            for module in unit.modules:
                self._hooks.append((module, module._forward_pre_hooks, module._forward_hooks))
                module._forward_pre_hooks = OrderedDict()
                module._forward_hooks = OrderedDict()
                self._classes.append((module, type(module)))
                module.__class__ = original_class(module)

    def _allocate_shards(self) -> None:
        release(self.units)
        for unit in self.units:
            for parameter in unit.parameters:
                self._before.append((unit, parameter, parameter.sharded, parameter.kept))
                local = torch.zeros_like(parameter.local, device=self.device)
                if parameter.kept is not None:
                    local.copy_(parameter.kept)
                unit.replace(parameter, local)
                parameter.kept = None
            unit.repack()

    def _working(self, buffer: torch.Tensor) -> torch.Tensor:
        if not buffer.is_meta:
            return buffer.detach().clone()
        working = torch.empty_like(buffer, device=self.device)
        poison(working)
        return working

    def unrecorded(self) -> set[int]:
        """Ids of the modules that hold tensors whose construction was not recorded."""
        slots = [slot for slot in self.slots if not slot.is_kept and not slot.is_recorded]
        buffers = [b for b in self.buffers if not b.is_kept and not b.is_recorded]
        places = [place for slot in slots for place in slot.parameter.places]
        return {id(place.module) for place in places} | {id(b.module) for b in buffers}

    def unwritten_in(self, module: nn.Module) -> bool:
        """Whether a tensor that `module` holds itself was never touched."""
        return any(
            not slot.is_kept and not slot.is_touched for slot in self.owned.get(id(module), [])
        ) or any(
            buffer.is_unwritten
            for buffer in self.buffers
            if buffer.module is module and not buffer.is_kept
        )

    def finish_module(self, module: nn.Module) -> None:
        """Cuts full parameters to shards, and takes over tensors that an initialiser put in their place."""
        for slot in self.owned.get(id(module), []):
            slot.take_replaced(slot.parameter.places)
        self.values.cut_all()

    def finish(self) -> None:
        """As finish_module(), for all modules."""
        for slot in self.slots:
            slot.take_replaced(slot.parameter.places)
        self.values.cut_all()

    def name_of(self, module: nn.Module, tensor: str) -> str:
        """The name of a parameter or buffer that `module` holds."""
        prefix = self.names.get(id(module), "")
        return f"{prefix}.{tensor}" if prefix else tensor

    def problems(self, *, checks_writes: bool) -> dict[str, list[str]]:
        """Names tensors that have no values here, and those that their constructor wrote more often."""
        modules: list[str] = []
        unwritten: list[str] = []
        rewritten: list[str] = []

        def add(module: nn.Module, tensor: str) -> None:
            name = self.names.get(id(module)) or "the root"
            modules.append(f"{name} ({original_class(module).__name__})")
            unwritten.append(self.name_of(module, tensor))

        for slot in self.slots:
            if slot.is_kept or not slot.parameter.sizes.numel():
                continue
            place = slot.parameter.places[0]
            if not slot.has_values or slot.is_incomplete:
                add(place.module, place.name)
            elif not slot.is_determined and self._is_rewritten(slot, checks_writes):
                rewritten.append(self.name_of(place.module, place.name))
        for buffer in self.buffers:
            if not buffer.is_kept and buffer.is_unwritten:
                add(buffer.module, buffer.name)
        for loose in self.loose:
            if loose.tensors:
                add(loose.module, loose.name)
        return {
            "modules": list(dict.fromkeys(modules)),
            "unwritten": unwritten,
            "rewritten": rewritten,
        }

    def _is_rewritten(self, slot: Slot, checks_writes: bool) -> bool:
        source = slot.parameter.source
        if source is None:
            return False
        if slot.is_recorded:
            known = slot.parameter.marks.get("_mics_construction")
            return known is not None and known[1] != source._version
        return checks_writes and (slot.writes < source._version or self._is_replaced(slot))

    def _is_replaced(self, slot: Slot) -> bool:
        """Whether its constructor ran the same initialiser on its neighbours, but not on this tensor."""
        source = slot.parameter.source
        if source is None or source._version >= slot.reset_writes or self._is_tied(slot):
            return False
        return any(
            other.parameter.source is not None
            and 0 < other.writes <= other.parameter.source._version
            for other in self.owned[id(slot.parameter.places[0].module)]
            if not self._is_tied(other)
        )

    @staticmethod
    def _is_tied(slot: Slot) -> bool:
        return len(slot.parameter.places) > 1

    def ambiguous(self) -> list[str]:
        """Names tied parameters whose values come from the resets of several modules."""
        return [
            self.name_of(slot.parameter.places[0].module, slot.parameter.places[0].name)
            for slot in self.slots
            if self._is_tied(slot)
            and not slot.is_kept
            and not slot.is_recorded
            and not slot.is_determined
            and slot.num_resets > 1
        ]

    def constructions(self) -> list[Construction]:
        """Lists the recorded constructions of the model, each once."""
        tags = [slot.parameter.marks.get("_mics_construction") for slot in self.slots]
        tags += [getattr(buffer.before, "_mics_construction", None) for buffer in self.buffers]
        return list({id(tag[0]): tag[0] for tag in tags if tag is not None}.values())

    def keep(self) -> None:
        """Ends with the new values: registers the DTensors, and leaves the buffers in the modules."""
        self._leave()
        for slot in self.slots:
            slot.parameter.sharded.requires_grad_(slot.stand_in.requires_grad)
            slot.parameter.source = None
            slot.parameter.marks.pop("_mics_construction", None)
        for buffer in self.buffers:
            if buffer.is_kept and not buffer.is_due:
                buffer.module._buffers[buffer.name] = buffer.before

    def undo(self) -> None:
        """Puts everything back to how it was found."""
        for slot in self.slots:
            slot.full = None
        for _, parameter, sharded, kept in self._before:
            parameter.sharded, parameter.kept = sharded, kept
            sharded.__dict__.pop("_mics_replaced", None)
        self._leave()
        for unit in self.units:
            unit.repack()
        for buffer in self.buffers:
            buffer.module._buffers[buffer.name] = buffer.before
        for loose in self.loose:
            loose.module.__dict__[loose.name] = loose.before
        for module in self.model.modules():
            if id(module) not in self._flagged:
                module.__dict__.pop("_is_hf_initialized", None)

    def _leave(self) -> None:
        for unit in self._all_units:
            unit.forward.is_full_elsewhere = False
        for module, cls in self._classes:
            module.__class__ = cls
        for module, before, after in self._hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
        for slot in self.slots:
            slot.parameter.register(slot.parameter.sharded)
