"""ShardedUnit: parameters that are gathered, reduced and freed together, as a context drives them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from torch_mics import _C, _race_check
from torch_mics._groups import Communicators, Groups
from torch_mics._parameters import ShardedParameters, copy_marks
from torch_mics._settings import Settings


class UnitReference:
    """A weak reference to a unit. A copy of it, or one that is read from a file, refers to none.

    Weak, because the unit holds its parameters through the C++ core, where the garbage collector sees no
    cycle.
    """

    def __init__(self, unit: ShardedUnit | None = None) -> None:
        self._unit = None if unit is None else weakref.ref(unit)

    def __call__(self) -> ShardedUnit | None:
        return None if self._unit is None else self._unit()

    def __reduce__(self) -> tuple[Any, ...]:
        return (UnitReference, ())


@dataclasses.dataclass
class Forward:
    """What the forwards of a unit's modules must know about each other.

    Attributes:
        hooks: of the modules; a companion has none.
        modules_to_run: of a group, those that the open forward has still to run.
        running: of a group, those that run now.
        is_full_elsewhere: whether the modules hold full parameters that are not the unit's: in unsharded().
        post_optim_event: what the next forward waits for.
    """

    hooks: _C.UnitHooks | None = None
    modules_to_run: set[nn.Module] = dataclasses.field(default_factory=set)
    running: list[nn.Module] = dataclasses.field(default_factory=list)
    is_full_elsewhere: bool = False
    post_optim_event: torch.Event | None = None

    def close_group(self) -> None:
        """Ends the open forward of a group."""
        self.modules_to_run.clear()
        self.running.clear()


class ShardedUnit(ShardedParameters):
    """State of one call of fully_shard: shared by the modules that were given together."""

    def __init__(
        self,
        modules: list[nn.Module],
        groups: Groups,
        variant: _C.Variant,
        policy: MixedPrecisionPolicy,
        settings: Settings,
    ) -> None:
        super().__init__(groups, policy, UnitReference(self))
        self.modules = modules
        self.variant = variant
        self.settings = settings
        self.name = type(modules[0]).__name__  # the context gives it its qualified name
        self.notes: list[str] = []  # lines of the start-up report, set by shard_model() on its root
        # Frozen parameters of other dtypes, one unit per dtype, gathered and freed with this one.
        self.companions: list[ShardedUnit] = []
        self.forward = Forward()
        self.gradient_hook: Callable[[torch.Tensor], None] | None = None
        self.forward_prefetch: list[ShardedUnit] = []
        self.backward_prefetch: list[ShardedUnit] = []
        # Set by attach(), for as long as a context drives this unit.
        self.owner: object | None = None
        self.engine: _C.Engine | None = None
        self.handle: _C.Unit | None = None
        self.index = -1  # in the engine
        self.is_root = False  # of a root module; its companions too
        self._has_gradient: list[bool] = []  # per parameter, as the C++ unit has it

    @property
    def all(self) -> list[ShardedUnit]:
        """This unit and its companions."""
        return [self, *self.companions]

    def make_handle(self, communicators: Communicators, *, has_nested_units: bool) -> _C.Unit:
        """Makes the C++ unit: gradient buffer, full parameters and their exchange.

        Args:
            communicators: where its collectives run.
            has_nested_units: other units run inside its forward.
        """
        self._has_gradient = [parameter.sharded.requires_grad for parameter in self.parameters]
        gradient, wrapped = self.make_gradients(self._has_gradient)
        described = [
            _C.UnitParameter(
                name=f"{self.name}.{parameter.name}",
                sizes=list(parameter.sizes),
                sharded=parameter.sharded,
                local=parameter.local,
                gradient=each,
            )
            for parameter, each in zip(self.parameters, wrapped, strict=True)
        ]
        handle = _C.Unit(
            name=self.name,
            parameters=described,
            shard=self.shard,
            gradient=gradient,
            parameter_dtype=self.parameter_dtype,
            reduce_dtype=self.reduce_dtype,
            partition_size=self.groups.topology.partition_size,
            has_nested_units=has_nested_units,
            gather_rail=communicators.gather_rail,
            gather_intra=communicators.gather_intra,
            reduce_rail=communicators.reduce_rail,
            reduce_intra=communicators.reduce_intra,
            replicate=communicators.replicate,
        )
        detector = _race_check.of_process()
        if detector is not None:
            detector.name_memory(self.shard, f'shard of unit "{self.name}"')
            detector.name_memory(gradient, f'gradient of unit "{self.name}"')
        registration = _C.ParameterRegistration()
        full_parameters = []
        for view, parameter in zip(handle.full_views(), self.parameters, strict=True):
            full = nn.Parameter(view, requires_grad=parameter.sharded.requires_grad)
            copy_marks(parameter.marks, full)
            full_parameters.append(full)
            for place in parameter.places:
                registration.add(
                    place.module._parameters,
                    place.name,
                    sharded=parameter.sharded,
                    full=full,
                    name=f"{self.name}.{parameter.name}",
                )
        handle.set_full_parameters(full_parameters)
        handle.set_registration(registration)
        if self.gradient_hook is not None:
            handle.set_gradient_hook(self.gradient_hook)
        return handle

    def change_trainable(self) -> None:
        """Follows parameters that were frozen or unfrozen; graphs and accumulations stay as they are.

        A parameter that has accumulated a part of its gradient keeps its place until that is visible.
        """
        assert self.handle is not None
        assert self.engine is not None
        keeps = self.handle.is_accumulating
        self._has_gradient = [
            parameter.sharded.requires_grad or (keeps and had)
            for parameter, had in zip(self.parameters, self._has_gradient, strict=True)
        ]
        gradient, wrapped = self.make_gradients(self._has_gradient)
        self.engine.change_trainable(self.index, wrapped, gradient)

    def attach(
        self, owner: object, engine: _C.Engine, handle: _C.Unit, index: int, *, is_root: bool
    ) -> None:
        """Hands the unit over to a context, which drives it until it detaches it or hands it on."""
        self.owner, self.engine, self.handle = owner, engine, handle
        self.index, self.is_root = index, is_root

    def detach(self) -> None:
        """Drops the C++ unit; the next forward makes another one."""
        self.owner = self.engine = self.handle = None
        self.is_root = False
        self.connect_hooks()

    def unshard(self) -> None:
        """Gathers the full parameters and registers them, where a context drives the unit."""
        if self.engine is not None:
            self.engine.unshard(self.index)

    def reshard(self) -> None:
        """Registers the sharded parameters and frees the full ones."""
        if self.engine is not None:
            self.engine.reshard(self.index)

    def connect_hooks(self) -> None:
        """Lets forwards of this unit take the fast path through C++ when nothing needs the slow one.

        To be called whenever something that it depends on has changed.
        """
        forward, policy = self.forward, self.policy
        if forward.hooks is None:
            return
        if (
            self.engine is None
            or self.is_root
            or len(self.modules) > 1
            or policy.output_dtype is not None
            or forward.is_full_elsewhere
            or forward.post_optim_event is not None
        ):
            forward.hooks.disconnect()
            return
        forward.hooks.connect(
            self.engine,
            [unit.index for unit in self.all],
            input_dtype=policy.param_dtype if policy.cast_forward_inputs else None,
        )

    @property
    def is_unfinished(self) -> bool:
        """Whether gradients wait for their synchronisation."""
        handle = self.handle
        return handle is not None and (handle.has_accumulated or handle.has_full_gradient)

    def push_settings(self) -> None:
        """Writes the settings to the C++ unit."""
        if self.handle is not None:
            self.settings.write_to(
                self.handle.settings,
                is_root=self.is_root,
                world_size=self.groups.topology.world_size,
            )


def original_class(module: nn.Module) -> type[nn.Module]:
    """Gives the class that a module had before it was sharded."""
    cls = type(module)
    return cls.__mro__[getattr(cls, "_orig_cls_mro_index", 0)]


def unit_of(module: nn.Module) -> ShardedUnit | None:
    """Gives the unit that a module was sharded with, without its companions; None for other modules."""
    unit: ShardedUnit | None = getattr(module, "_mics_unit", None)
    return unit


def units_of(module: nn.Module) -> list[ShardedUnit]:
    """Lists the units at and below `module`, each once, in the order of the module tree."""
    units: dict[int, ShardedUnit] = {}
    for child in module.modules():
        unit = unit_of(child)
        if unit is not None:
            units.update((id(each), each) for each in unit.all if id(each) not in units)
    return list(units.values())


def unit_of_parameter(parameter: torch.Tensor) -> ShardedUnit | None:
    """Gives the unit of a sharded parameter; None for other tensors."""
    reference = getattr(parameter, "_mics_unit", None)
    return None if reference is None else reference()
