"""ShardedParameters: parameters cut into shards, and the module places that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torch_mics import _C
from torch_mics._groups import Groups


@dataclasses.dataclass
class Place:
    """One module attribute that holds a parameter; a tied parameter has several."""

    module: nn.Module
    name: str


@dataclasses.dataclass
class Parameter:
    """One parameter of a unit.

    Attributes:
        name: its name below the unit's first module.
        sizes: of the full parameter.
        places: where modules hold it.
        sharded: the DTensor that the optimizer sees; its local tensor is a part of the shard.
        marks: attributes of frameworks and users (_no_weight_decay), also put on tensors that replace it.
        kept: this rank's rows, if the parameter had values while its shard is on the meta device.
        source: the full parameter on the meta device, which knows how it was built; takes no memory.
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
        """This rank's rows, a part of the shard; may have none."""
        return self.sharded._local_tensor  # type: ignore[attr-defined]

    def register(self, tensor: nn.Parameter) -> None:
        """Puts `tensor` into this parameter's places in the modules."""
        for place in self.places:
            place.module._parameters[place.name] = tensor


def copy_marks(marks: dict[str, Any], tensor: torch.Tensor) -> None:
    """Gives a tensor the attributes of the parameter that it stands for."""
    # One by one: Dynamo can trace this, but not an update of __dict__.
    for name, value in marks.items():
        if not name.startswith("_mics_"):
            setattr(tensor, name, value)


def wrap(
    local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], sizes: torch.Size
) -> DTensor:
    """Makes a contiguous DTensor of `sizes` over this rank's rows; no copy, no communication."""
    stride = torch.empty(sizes, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=sizes, stride=stride)


class ShardedParameters:
    """The parameters of one unit: one shard, of which each parameter has its rows of this rank."""

    def __init__(self, groups: Groups, policy: MixedPrecisionPolicy, reference: object) -> None:
        """`reference` traces each sharded parameter back to its unit; see unit_of_parameter()."""
        self.groups = groups
        self.policy = policy
        self.parameters: list[Parameter] = []
        self.shard = torch.empty(0, device="cpu")
        self._reference = reference

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the shard."""
        return self.shard.dtype

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The dtype of the full parameters."""
        return self.policy.param_dtype if self._casts and self.policy.param_dtype else self.dtype

    @property
    def reduce_dtype(self) -> torch.dtype:
        """The dtype in which gradients are reduced.

        fp32 for fp16: a sum over ranks comes before the factor 1/n, and could overflow where the mean does
        not, whether a backend rounds it once or at each addition.
        """
        asked = (
            self.policy.reduce_dtype
            if self._casts and self.policy.reduce_dtype
            else self.parameter_dtype
        )
        return torch.float32 if asked == torch.float16 else asked

    @property
    def _casts(self) -> bool:
        """Whether the policy applies: integers are codes, not numbers, and are never cast."""
        return self.dtype.is_floating_point

    @property
    def partition_rank(self) -> int:
        """This rank's index in the partition group."""
        return self.groups.mesh.get_local_rank(self.groups.mesh.ndim - 1)

    def layout(self, chosen: list[bool] | None = None) -> _C.ShardLayout:
        """Computes where each parameter lies in a buffer of all of them, or of the `chosen` ones only."""
        chosen = chosen or [True] * len(self.parameters)
        return _C.ShardLayout(
            [list(p.sizes) for p, is_in in zip(self.parameters, chosen, strict=True) if is_in],
            partition_size=self.groups.topology.partition_size,
            alignment=_C.layout_alignment(self.parameter_dtype, self.reduce_dtype),
        )

    def gradient_layout(self) -> _C.ShardLayout:
        """Computes where the gradient of each parameter that requires one lies."""
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
        mesh = self.groups.mesh
        return wrap(local, mesh, [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)], sizes)

    def cut(self, found: list[tuple[str, nn.Parameter, list[Place]]], device: torch.device) -> None:
        """Copies this rank's rows of full parameters into a new shard and registers the DTensors.

        Args:
            found: name, full parameter and places of each parameter of the unit.
            device: of the shard. It stays on the meta device as long as one parameter is there; the rows
                of the others are kept aside.
        """
        is_meta = any(full.is_meta for _, full, _ in found)
        self.parameters = [
            Parameter(name, full.size(), places, full, dict(full.__dict__))
            for name, full, places in found
        ]
        dtype = found[0][1].dtype if found else torch.float32
        layout = self._allocate(dtype, torch.device("meta") if is_meta else device)
        for index, parameter in enumerate(self.parameters):
            full = parameter.sharded.detach()
            first, last = layout.rows_of(index, self.partition_rank)
            local = self._view(self.shard, layout, index, parameter.sizes)
            if not is_meta:
                local.copy_(full[first:last])
            elif full.is_meta:
                parameter.source = full
            else:
                parameter.kept = full[first:last].clone()
            self.replace(parameter, local)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> _C.ShardLayout:
        """Makes a new shard and gives its layout."""
        self.shard = torch.empty(0, dtype=dtype, device="cpu")
        layout = self.layout()
        self.shard = torch.zeros(layout.shard_numel, dtype=dtype, device=device)
        return layout

    def repack(self) -> None:
        """Moves the local tensors, wherever they are now, into one new shard, and binds them to it.

        After `module.to(...)`, `to_empty(...)` and the like, each DTensor has a local tensor of its own. No
        context may drive the unit; see release().
        """
        locals_now = [parameter.local.detach() for parameter in self.parameters]
        if not locals_now:
            return
        if not all(local.is_meta for local in locals_now):
            # The others have left the meta device, by to_empty() or assign=True.
            self._bring_back_kept()
            locals_now = [parameter.local.detach() for parameter in self.parameters]
        if len({(local.device, local.dtype) for local in locals_now}) > 1:
            return  # a unit of several modules, of which some have still to be moved
        layout = self._allocate(locals_now[0].dtype, locals_now[0].device)
        for index, parameter in enumerate(self.parameters):
            view = self._view(self.shard, layout, index, parameter.sizes)
            if not self.shard.is_meta:
                view.copy_(locals_now[index])
            parameter.sharded._local_tensor = view  # type: ignore[attr-defined]
            parameter.sharded._mics_unit = self._reference  # type: ignore[attr-defined]

    def _bring_back_kept(self) -> None:
        for parameter in self.parameters:
            if parameter.kept is not None and parameter.local.is_meta:
                self.replace(parameter, parameter.kept.to(parameter.sharded.dtype))
            parameter.kept = None

    def replace(self, parameter: Parameter, local: torch.Tensor) -> None:
        """Makes a new DTensor of `parameter`, over `local`; repack() moves it into the shard."""
        before = parameter.sharded
        sharded = nn.Parameter(
            self._wrap(local, parameter.sizes), requires_grad=before.requires_grad
        )
        # nn.Parameter detaches, which would lose the version counter that tells of writes.
        sharded._local_tensor = local  # type: ignore[attr-defined]
        sharded._mics_unit = self._reference  # type: ignore[attr-defined]
        before._mics_replaced = parameter.name  # type: ignore[attr-defined]
        copy_marks(parameter.marks, sharded)
        parameter.sharded = sharded
        parameter.register(sharded)

    def make_gradients(
        self, has_gradient: list[bool]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Makes the gradient buffer, and the part of it that is the `.grad` of each parameter, or None."""
        layout = self.layout(has_gradient)
        gradient = torch.zeros(layout.shard_numel, dtype=self.dtype, device=self.shard.device)
        places = iter(range(len(self.parameters)))
        return gradient, [
            self._wrap(self._view(gradient, layout, next(places), p.sizes), p.sizes)
            if has
            else None
            for p, has in zip(self.parameters, has_gradient, strict=True)
        ]
