"""fully_shard: makes a unit of one module, or of several together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from torch_mics._groups import HierarchicalGather
from torch_mics._hooks import lend, register_hooks
from torch_mics._mesh import ShardSize, default_mesh, ensure_process_group, groups_of
from torch_mics._module import MiCSModule
from torch_mics._optimizer_checks import install_optimizer_checks
from torch_mics._parameters import Place
from torch_mics._policy import resolve_policy
from torch_mics._settings import (
    Settings,
    check_depths,
    resolve_accumulate,
    resolve_keep,
    resolve_reshard,
)
from torch_mics._state_dict_hooks import register_state_dict_hooks
from torch_mics._unit import ShardedUnit

# One subclass per module class, so that all sharded Linears have one type. The key also says whether the
# module holds parameters itself.
_sharded_classes: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}

Found = list[tuple[str, nn.Parameter, list[Place]]]


def fully_shard(
    module: nn.Module | list[nn.Module],
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    mp_policy: MixedPrecisionPolicy | str | None = None,
    offload_policy: OffloadPolicy | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    dp_mesh_dims: object = None,
    shard_size: ShardSize | None = None,
    hierarchical_gather: HierarchicalGather = "auto",
    accumulate: str = "two_hop",
    keep_between_microsteps: str = "shard",
    prefetch_depths: tuple[int, int] = (1, 2),
) -> Any:
    """Shards the parameters of `module` over a partition group, in place; FSDP2's signature.

    Parameters below `module` that belong to no unit yet become one unit: gathered, reduced and freed
    together. Call it bottom-up, on blocks and then on the root; shard_model() does that by itself. The
    parameters become DTensors on the mesh, so the optimizer is made afterwards. The full parameters are
    freed as soon as nothing else refers to them.

    Args:
        module: a module, or several whose parameters form one unit (tied ones must).
        mesh: 1-D (shard) or 2-D (replicate, shard); see init_mesh().
        reshard_after_forward: free the full parameters after forward and gather them again in
            backward. The number of ranks of a node: keep the node block, so that backward gathers
            inside the node only. None: True, but False for the root. What is kept between
            micro-steps is kept after forward too.
        shard_placement_fn: must be None; parameters are cut along dim 0.
        mp_policy: a MixedPrecisionPolicy, or "bf16" or "fp16" (gradients then reduced in fp32).
        offload_policy: must be the default; parameters stay on the device.
        ignored_params: parameters to leave alone; the caller keeps them in sync.
        dp_mesh_dims: must be None.
        shard_size: without a mesh: ranks per partition group; "node" (default), "world" or a number.
        hierarchical_gather: gather across nodes first, then inside them; "auto": if a group spans nodes.
        accumulate: what set_requires_gradient_sync(False) means: "two_hop" reduces inside the
            partition group and keeps shards; "block" reduces inside the node, keeps a node block
            and crosses nodes once per step; "local" keeps full gradients, as FSDP2.
        keep_between_microsteps: what stays of the full parameters from one micro-step to the next:
            "shard" (nothing), "block" (the node block: nodes are crossed once per step) or "full".
            Every accumulation starts with a gather of the weights as they are.
        prefetch_depths: (intra, rail), as set_prefetch_depths(); the root's value holds for all units.

    Returns:
        `module`, whose class is now a subclass of MiCSModule and of its own class.

    Raises:
        ValueError, TypeError: an argument or parameter that breaks a rule; nothing has been changed.
    """
    modules = _as_list(module)
    _check_arguments(mesh, shard_size, offload_policy)
    if shard_placement_fn is not None:
        raise ValueError("shard_placement_fn must be None: parameters are cut along dim 0.")
    if dp_mesh_dims is not None:
        raise ValueError(
            "dp_mesh_dims must be None: the mesh has one dimension (shard) or two (replicate, shard)."
        )
    policy = resolve_policy(mp_policy)
    ensure_process_group()
    if mesh is None:
        mesh = default_mesh("node" if shard_size is None else shard_size)
    groups = groups_of(mesh)
    variant = groups.variant(hierarchical_gather)
    settings = Settings(
        resolve_reshard(reshard_after_forward, groups.topology, variant),
        resolve_keep(keep_between_microsteps, groups.topology, variant),
        accumulate=resolve_accumulate(accumulate, groups.topology, variant),
        prefetch_depths=check_depths(prefetch_depths),
    )
    found = _find_parameters(modules, ignored_params or set())
    _check_parameters(found)
    _move_to_device(modules, found, groups.device)
    units = []
    for parameters in _by_dtype(found):
        # A copy for each unit: the methods of the module set them on all its units.
        own = dataclasses.replace(settings)
        units.append(ShardedUnit(modules, groups, variant, policy, own))
        with torch.no_grad():
            units[-1].cut(parameters, groups.device)
    units[0].companions = units[1:]
    for ignored in ignored_params or set():
        ignored._mics_ignored = True  # type: ignore[attr-defined]
    _attach(units[0])
    install_optimizer_checks()
    return module


def _attach(unit: ShardedUnit) -> None:
    """Turns the unit's modules into sharded ones."""
    for module in unit.modules:
        module._mics_unit = unit  # type: ignore[assignment]
        _swap_class(module)
        # replicate() of torch looks here, and leaves such modules alone.
        registry = module.__dict__.setdefault(REGISTRY_KEY, collections.OrderedDict())
        registry["fully_shard"] = RegistryItem()
    register_hooks(unit)
    register_state_dict_hooks(unit)


def _as_list(module: nn.Module | list[nn.Module]) -> list[nn.Module]:
    modules = list(module) if isinstance(module, list | tuple) else [module]
    if not modules:
        raise ValueError("fully_shard needs at least one module: got an empty list.")
    for each in modules:
        if not isinstance(each, nn.Module):
            raise TypeError(f"fully_shard takes modules: got {type(each).__name__}.")
        if isinstance(each, MiCSModule):
            raise ValueError(f"a module may be sharded once: got {type(each).__name__} again.")
        if isinstance(each, nn.ModuleList | nn.ModuleDict) and type(each).forward is (
            nn.Module.forward
        ):
            raise ValueError(
                f"fully_shard needs modules with a forward: got {type(each).__name__}. Shard its "
                "members."
            )
    return modules


def _check_arguments(
    mesh: DeviceMesh | None,
    shard_size: ShardSize | None,
    offload_policy: OffloadPolicy | None,
) -> None:
    if mesh is not None and shard_size is not None:
        raise ValueError(
            f"give either a mesh or a shard_size: got both (shard_size={shard_size!r})."
        )
    if offload_policy is not None and type(offload_policy) is not OffloadPolicy:
        raise ValueError(
            f"offload_policy must be OffloadPolicy(): got {type(offload_policy).__name__}. Offloading "
            "to the CPU is not available."
        )


def _find_parameters(modules: list[nn.Module], ignored: set[nn.Parameter]) -> Found:
    """Lists the parameters that belong to no unit below, each with every place that holds it."""
    found: dict[int, tuple[str, nn.Parameter, list[Place]]] = {}
    visited: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        if id(module) in visited or isinstance(module, MiCSModule):
            return
        visited.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is None or parameter in ignored:
                continue
            _check_not_taken(f"{prefix}{name}", parameter)
            entry = found.setdefault(id(parameter), (f"{prefix}{name}", parameter, []))
            entry[2].append(Place(module, name))
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    for index, module in enumerate(modules):
        visit(module, f"{index}." if len(modules) > 1 else "")
    return list(found.values())


def _check_not_taken(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor) or hasattr(parameter, "_mics_replaced"):
        raise ValueError(
            f'a parameter may be in one unit: got "{name}", which is tied to a parameter of another '
            "unit, or is a DTensor already. Shard tied modules together: fully_shard([a, b])."
        )


def _check_parameters(found: Found) -> None:
    for name, parameter, _ in found:
        problem = _problem_of(parameter)
        if problem is not None:
            rule, got, remedy = problem
            raise ValueError(
                f'a sharded parameter must {rule}: got {got} for "{name}". {remedy} before sharding.'
            )
    dtypes = {parameter.dtype: name for name, parameter, _ in found if parameter.requires_grad}
    if len(dtypes) > 1:
        described = ", ".join(f'{dtype} ("{name}")' for dtype, name in dtypes.items())
        raise ValueError(
            "the trainable parameters of a unit must have one dtype: got "
            f"{described}. Cast them, freeze them, or give them units of their own."
        )


def _problem_of(parameter: nn.Parameter) -> tuple[str, str, str] | None:
    """The rule that a parameter breaks, what it is instead, and the remedy; None where it is right."""
    kind = type(parameter).__name__
    if isinstance(parameter, UninitializedParameter):
        return "have a shape", kind, "Run a forward"
    # A subclass defines how it is gathered or what its operations mean: plain values cannot replace it.
    bases = type(parameter).__mro__
    if nn.Parameter not in bases or hasattr(parameter, "fsdp_pre_all_gather"):
        extension = hasattr(parameter, "fsdp_pre_all_gather")
        what = f"{kind} with fsdp_pre_all_gather" if extension else kind
        return "be a plain tensor", f"a {what}", "Dequantise it, or list it in ignored_params,"
    if parameter.layout != torch.strided:
        return "be dense", f"layout={parameter.layout}", "Convert it, or ignore it"
    if parameter.requires_grad and not parameter.is_floating_point():
        return "be floating point or frozen", f"dtype={parameter.dtype}", "Convert it, or ignore it"
    if parameter.ndim == 0:
        return "have at least one dimension", "a 0-dim tensor", "Make it 1-dim"
    if not parameter.is_contiguous():
        return "be contiguous", f"strides={parameter.stride()}", "Convert it, or ignore it"
    hooks = [parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)]
    if any(hooks):
        return (
            "have no gradient hooks, which stay with the tensor that it replaces",
            "register_hook or register_post_accumulate_grad_hook",
            "Register them on the sharded parameter, and not",
        )
    return None


def _by_dtype(found: Found) -> list[Found]:
    """Splits by dtype, that of the trainable parameters first. Gives at least one part, maybe empty."""
    parts: dict[torch.dtype, Found] = {}
    for entry in sorted(found, key=lambda entry: not entry[1].requires_grad):
        parts.setdefault(entry[1].dtype, []).append(entry)
    order = {id(entry[1]): place for place, entry in enumerate(found)}
    return [sorted(part, key=lambda entry: order[id(entry[1])]) for part in parts.values()] or [[]]


def _move_to_device(
    modules: list[nn.Module],
    found: Found,
    device: torch.device,
) -> None:
    """Moves full parameters and buffers to the mesh's device; meta tensors stay."""
    for _, parameter, _ in found:
        if not parameter.is_meta and parameter.device != device:
            parameter.data = parameter.data.to(device)
    for module in modules:
        for child in module.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None and not buffer.is_meta and buffer.device != device:
                    child._buffers[name] = buffer.to(device)


def _swap_class(module: nn.Module) -> None:
    """Changes the class of `module` to one of the same name that has the methods of MiCSModule first.

    Frameworks write the name of the class into configurations and look modules up by it.
    """
    cls = type(module)
    holds_parameters = any(value is not None for value in module._parameters.values())
    key = (cls, holds_parameters)
    if key not in _sharded_classes:
        members: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__deepcopy__": _refuse_deepcopy,
            "__copy__": _copy,
            "__reduce_ex__": _refuse_pickle,
        }
        if holds_parameters:
            members["__getattr__"] = _make_getattr(cls)
        _sharded_classes[key] = cast(
            type[nn.Module], type(cls.__name__, (MiCSModule, cls), members)
        )
    module.__class__ = _sharded_classes[key]


def _make_getattr(cls: type[nn.Module]) -> Callable[[nn.Module, str], Any]:
    """Lends the unit to whoever reads a parameter of its module outside of the module's forward."""

    def __getattr__(self: nn.Module, name: str) -> Any:
        parameters = self.__dict__["_parameters"]
        if name in parameters and not torch.compiler.is_compiling():
            unit = self.__dict__.get("_mics_unit") or self.__dict__["_modules"].get("_mics_unit")
            if unit is not None:
                lend(unit, [self])
                return parameters[name]
        return cls.__getattr__(self, name)

    return __getattr__


def _refuse_deepcopy(self: nn.Module, memo: dict[int, Any]) -> None:
    raise RuntimeError(
        "a sharded module must not be copied: got copy.deepcopy of "
        f"{type(self).__name__}. Copy before sharding, or build the model again, shard it and load "
        "this one's state_dict() into it."
    )


def _refuse_pickle(self: nn.Module, protocol: object) -> None:
    raise RuntimeError(
        f"a sharded module must not be pickled: got {type(self).__name__}. Save its state_dict(), or "
        "torch_mics.full_state_dict(model), or a TrainState."
    )


def _copy(self: nn.Module) -> nn.Module:
    """copy.copy: another module with the same contents."""
    made: nn.Module = object.__new__(type(self))
    made.__dict__.update(self.__dict__)
    return made
