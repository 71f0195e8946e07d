"""ShardedUnit: the parameters of one unit, cut into shards, and the module places that hold them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard

from torch_mics import _C
from torch_mics._residency import residency_of, resolve_reshard

if TYPE_CHECKING:
    from torch_mics._context import Context
    from torch_mics._groups import Communicators, Groups, HierarchicalGather


@dataclasses.dataclass
class Place:
    """One module attribute that holds a parameter; a tied parameter has several."""

    module: nn.Module
    name: str


@dataclasses.dataclass
class Parameter:
    """One parameter of a unit.

    Attributes:
        name: as found below the unit's first module.
        sizes: of the full parameter.
        places: where modules hold it.
        sharded: the DTensor that the optimizer sees; its local tensor is a part of the shard.
        marks: attributes of frameworks and users (_no_weight_decay): of every tensor that stands for it.
        kept: this rank's rows while the shard is on the meta device, when the parameter was not.
        source: the full parameter on the meta device, which tells how it was built; no memory.
    """

    name: str
    sizes: torch.Size
    places: list[Place]
    sharded: nn.Parameter
    marks: dict[str, Any] = dataclasses.field(default_factory=dict)
    kept: torch.Tensor | None = None
    source: torch.Tensor | None = None

    @property
    def local(self) -> torch.Tensor:
        """This rank's rows, a part of the shard; maybe none."""
        return self.sharded._local_tensor  # type: ignore[attr-defined]


@dataclasses.dataclass
class Settings:
    """What the methods of MiCSModule set; pushed to the C++ unit when something changes."""

    reshard_after_forward: bool | int | None = None  # None: see residency_of()
    keep_between_microsteps: str = "shard"
    reshard_after_backward: bool = True  # False: as FSDP2, and nothing more is kept after forward
    unshard_in_backward: bool = True
    requires_gradient_sync: bool = True
    requires_all_reduce: bool = True
    is_last_backward: bool = True
    accumulate: str = "two_hop"
    gradient_divide_factor: float | None = None  # None: the world size
    reductions_in_flight: int = 2  # the root's holds for all


def _copy_marks(marks: dict[str, Any], tensor: torch.Tensor) -> None:
    # One by one: Dynamo follows this, and not an update of __dict__.
    for name, value in marks.items():
        if not name.startswith("_mics_"):
            setattr(tensor, name, value)


class UnitReference:
    """A weak reference to a unit; a copy, and what is read from a file, refers to none."""

    def __init__(self, unit: ShardedUnit | None = None) -> None:
        self._unit = None if unit is None else weakref.ref(unit)

    def __call__(self) -> ShardedUnit | None:
        return None if self._unit is None else self._unit()

    def __reduce__(self) -> tuple[Any, ...]:
        return (UnitReference, ())


class ShardedUnit:
    """State of one call of fully_shard: shared by the modules that were given together."""

    def __init__(
        self,
        modules: list[nn.Module],
        groups: Groups,
        policy: MixedPrecisionPolicy,
        hierarchical: HierarchicalGather,
        settings: Settings,
    ) -> None:
        self.modules = modules
        self.groups = groups
        self.policy = policy
        self.hierarchical = hierarchical
        self.settings = settings
        self.name = type(modules[0]).__name__  # the context gives it its qualified name
        self.parameters: list[Parameter] = []
        self.shard = torch.empty(0)
        self.gradient_hook: Callable[[torch.Tensor], None] | None = None
        self.forward_prefetch: list[ShardedUnit] = []
        self.backward_prefetch: list[ShardedUnit] = []
        self.post_optim_event: torch.Event | None = None
        # Set by the context.
        self.context: Context | None = None
        self.handle: _C.Unit | None = None
        self.index = -1
        self.hooks: _C.UnitHooks | None = None  # of its modules; a companion has none
        self.has_gradient: list[bool] = []  # per parameter, as the C++ unit has it
        self.notes: list[str] = []  # of shard_model() on its root: lines of the start-up report
        # Frozen parameters of other dtypes, one unit per dtype, gathered and freed with this one.
        self.companions: list[ShardedUnit] = []
        # Of a group: modules that the open forward has still to run, and those that run now.
        self.modules_to_run: set[nn.Module] = set()
        self.running: list[nn.Module] = []
        self.is_full_elsewhere = False  # inside unsharded()

    @property
    def dtype(self) -> torch.dtype:
        """Of the shard."""
        return self.shard.dtype

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the full parameters."""
        return self.policy.param_dtype if self._casts and self.policy.param_dtype else self.dtype

    @property
    def reduce_dtype(self) -> torch.dtype:
        """Of gradients on their way."""
        return (
            self.policy.reduce_dtype
            if self._casts and self.policy.reduce_dtype
            else self.parameter_dtype
        )

    @property
    def _casts(self) -> bool:
        """Integers are codes, not numbers."""
        return self.dtype.is_floating_point

    @property
    def all(self) -> list[ShardedUnit]:
        """This unit and its companions."""
        return [self, *self.companions]

    @property
    def partition_rank(self) -> int:
        """This rank's index in the partition group."""
        return self.groups.mesh.get_local_rank(self.groups.mesh.ndim - 1)

    def layout(self, chosen: list[bool] | None = None) -> _C.ShardLayout:
        """Computes where each parameter lies, or where each one of those that are chosen does."""
        chosen = chosen or [True] * len(self.parameters)
        return _C.ShardLayout(
            [list(p.sizes) for p, is_in in zip(self.parameters, chosen, strict=True) if is_in],
            partition_size=self.groups.topology.partition_size,
            alignment=_C.layout_alignment(self.parameter_dtype, self.reduce_dtype),
        )

    def gradient_layout(self) -> _C.ShardLayout:
        """Where the gradient of each parameter that requires one lies."""
        return self.layout([parameter.sharded.requires_grad for parameter in self.parameters])

    def _view(
        self, buffer: torch.Tensor, layout: _C.ShardLayout, index: int, sizes: torch.Size
    ) -> torch.Tensor:
        """This rank's rows of parameter `index`: a part of a buffer with that layout."""
        first, last = layout.rows_of(index, self.partition_rank)
        return _C.make_part(
            buffer, layout.parameter(index).shard_offset, [last - first, *sizes[1:]]
        )

    def _wrap(self, local: torch.Tensor, sizes: torch.Size) -> DTensor:
        """A DTensor over this rank's rows; no copy, no communication."""
        mesh = self.groups.mesh
        placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
        stride = torch.empty(sizes, device="meta").stride()
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=sizes, stride=stride
        )

    def cut(self, found: list[tuple[str, nn.Parameter, list[Place]]], device: torch.device) -> None:
        """Copies this rank's rows of full parameters into a new shard and registers the DTensors.

        Args:
            found: name, full parameter and places of each parameter of the unit.
            device: of the shard. It stays on the meta device as long as one parameter is there; the rows
                of the others are kept aside.
        """
        dtype = found[0][1].dtype if found else torch.float32
        is_meta = any(full.is_meta for _, full, _ in found)
        self.shard = torch.empty(0, dtype=dtype)
        self.parameters = [
            Parameter(name, full.size(), places, full) for name, full, places in found
        ]
        layout = self.layout()
        self.shard = torch.zeros(
            layout.shard_numel, dtype=dtype, device="meta" if is_meta else device
        )
        for index, parameter in enumerate(self.parameters):
            full = parameter.sharded
            local = self._view(self.shard, layout, index, parameter.sizes)
            first, last = layout.rows_of(index, self.partition_rank)
            if not is_meta:
                local.copy_(full.detach()[first:last])
            elif not full.is_meta:
                parameter.kept = full.detach()[first:last].clone()
            if is_meta:
                parameter.source = full.detach() if full.is_meta else None
            sharded = nn.Parameter(
                self._wrap(local, parameter.sizes), requires_grad=full.requires_grad
            )
            parameter.marks = dict(full.__dict__)
            _copy_marks(parameter.marks, sharded)
            # nn.Parameter detaches, and with it the version counter that tells of writes.
            sharded._local_tensor = local  # type: ignore[attr-defined]
            parameter.sharded = sharded
            full._mics_replaced = parameter.name  # type: ignore[attr-defined]
            for place in parameter.places:
                place.module._parameters[place.name] = sharded
        self.mark_parameters()

    def mark_parameters(self) -> None:
        """Lets an optimizer's parameters be traced back to their unit.

        By a weak reference: the unit holds its parameters through the C++ core, where the garbage
        collector sees no cycle.
        """
        for parameter in self.parameters:
            parameter.sharded._mics_unit = UnitReference(self)  # type: ignore[attr-defined]

    def repack(self) -> None:
        """Moves the local tensors, wherever they are now, into one new shard, and binds them to it.

        After `module.to(...)`, `to_empty(...)` and the like, each DTensor has a local tensor of its own.
        """
        self.release_handle()
        locals_now = [parameter.local.detach() for parameter in self.parameters]
        if not locals_now:
            return
        if not all(local.is_meta for local in locals_now):
            # The others have left the meta device, by to_empty() or assign=True.
            self._bring_back_kept()
            locals_now = [parameter.local.detach() for parameter in self.parameters]
        if len({(local.device, local.dtype) for local in locals_now}) > 1:
            return  # a unit of several modules, of which some have still to be moved
        device, dtype = locals_now[0].device, locals_now[0].dtype
        self.shard = torch.empty(0, dtype=dtype)
        layout = self.layout()
        self.shard = torch.zeros(layout.shard_numel, dtype=dtype, device=device)
        for index, parameter in enumerate(self.parameters):
            view = self._view(self.shard, layout, index, parameter.sizes)
            if not self.shard.is_meta:
                view.copy_(locals_now[index])
            parameter.sharded._local_tensor = view  # type: ignore[attr-defined]
        self.mark_parameters()

    def _bring_back_kept(self) -> None:
        for parameter in self.parameters:
            if parameter.kept is not None and parameter.local.is_meta:
                self.replace(parameter, parameter.kept.to(parameter.sharded.dtype))
            parameter.kept = None

    def replace(self, parameter: Parameter, local: torch.Tensor) -> None:
        """Makes the DTensor of `parameter` anew, on the device of `local`; repack() lays it down."""
        sharded = nn.Parameter(
            self._wrap(local, parameter.sizes), requires_grad=parameter.sharded.requires_grad
        )
        parameter.sharded._mics_replaced = parameter.name  # type: ignore[attr-defined]
        _copy_marks(parameter.marks, sharded)
        parameter.sharded = sharded
        for place in parameter.places:
            place.module._parameters[place.name] = sharded

    def make_handle(self, communicators: Communicators, *, has_nested_units: bool) -> None:
        """Makes the C++ unit: gradient buffer, full parameters and their exchange.

        Args:
            communicators: where its collectives run.
            has_nested_units: other units run inside its forward.
        """
        self.has_gradient = [parameter.sharded.requires_grad for parameter in self.parameters]
        gradient, wrapped = self._make_gradients()
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
        registration = _C.ParameterRegistration()
        full_parameters = []
        for view, parameter in zip(handle.full_views(), self.parameters, strict=True):
            full = nn.Parameter(view, requires_grad=parameter.sharded.requires_grad)
            _copy_marks(parameter.marks, full)
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
        self.handle = handle

    def _make_gradients(self) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """The buffer that `.grad`s are views of, and what they will be; None where there is none."""
        layout = self.layout(self.has_gradient)
        gradient = torch.zeros(layout.shard_numel, dtype=self.dtype, device=self.shard.device)
        places = iter(range(len(self.parameters)))
        return gradient, [
            self._wrap(self._view(gradient, layout, next(places), p.sizes), p.sizes)
            if has
            else None
            for p, has in zip(self.parameters, self.has_gradient, strict=True)
        ]

    def change_trainable(self) -> None:
        """Follows parameters that were frozen or unfrozen; graphs and accumulations stay as they are.

        A parameter that has a part of a gradient keeps its place until that is visible.
        """
        assert self.handle is not None
        assert self.context is not None
        keeps = self.handle.is_accumulating
        self.has_gradient = [
            parameter.sharded.requires_grad or (keeps and had)
            for parameter, had in zip(self.parameters, self.has_gradient, strict=True)
        ]
        gradient, wrapped = self._make_gradients()
        self.context.engine.change_trainable(self.index, wrapped, gradient)

    def connect_hooks(self) -> None:
        """Lets forwards of this unit take the short way through C++ when nothing needs the long one.

        To be called when anything that is asked here has changed.
        """
        if self.hooks is None:
            return
        context, policy = self.context, self.policy
        if (
            context is None
            or self in context.roots
            or len(self.modules) > 1
            or policy.output_dtype is not None
            or self.is_full_elsewhere
            or self.post_optim_event is not None
        ):
            self.hooks.disconnect()
            return
        self.hooks.connect(
            context.engine,
            [unit.index for unit in self.all],
            input_dtype=policy.param_dtype if policy.cast_forward_inputs else None,
        )

    def check_no_accumulation(self) -> None:
        """Raises RuntimeError when gradients wait for their synchronisation."""
        handle = self.handle
        if handle is not None and (handle.has_accumulated or handle.has_full_gradient):
            raise RuntimeError(
                "parameters must not be moved or replaced during an accumulation: unit "
                f'"{self.name}" has gradients that are not synchronised. Finish the step, or call '
                "reset() on the root module."
            )

    def release_handle(self) -> None:
        """Drops the C++ unit, and the engine with all its units; the next forward makes new ones.

        Raises:
            RuntimeError: gradients wait for their synchronisation.
        """
        self.check_no_accumulation()
        if self.context is not None:
            self.context.close()
        self.handle = None

    def push_settings(self, *, is_root: bool) -> None:
        """Brings the C++ unit up to the settings."""
        if self.handle is None:
            return
        settings, target = self.settings, self.handle.settings
        residency = target.residency
        residency.after_forward, residency.between_microsteps = residency_of(
            resolve_reshard(settings.reshard_after_forward, self.groups, self.hierarchical),
            settings.keep_between_microsteps,
            is_root=is_root,
        )
        if not settings.reshard_after_backward:
            residency.between_microsteps = _C.Residency.FULL
        residency.gradient_accumulation = (
            _C.Residency.BLOCK if settings.accumulate == "block" else _C.Residency.SHARD
        )
        target.unshard_in_backward = settings.unshard_in_backward
        target.reduce_gradients = settings.requires_gradient_sync or settings.accumulate != "local"
        target.synchronize_gradients = (
            settings.requires_gradient_sync
            and settings.requires_all_reduce
            and settings.is_last_backward
        )
        divide = settings.gradient_divide_factor or float(self.groups.topology.world_size)
        target.gradient_factor = 1.0 / divide
