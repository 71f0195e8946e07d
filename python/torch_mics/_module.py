"""MiCSModule: what a sharded module can do; the methods of FSDPModule under the same names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from torch_mics import _C
from torch_mics._context import Context, context_of, contexts_of, release
from torch_mics._hooks import ForwardAdapter, ensure_context
from torch_mics._settings import check_depths, resolve_keep, resolve_reshard
from torch_mics._unit import ShardedUnit, units_of

_FORWARD_ADAPTER = ForwardAdapter()

_Resolve = Callable[[object, _C.Topology, _C.Variant], object]


class UnshardHandle:
    """Returned by unshard(async_op=True)."""

    def __init__(self, unit: ShardedUnit) -> None:
        self._unit: ShardedUnit | None = unit

    def wait(self) -> None:
        """Returns when the unit is unsharded; only the first call does anything."""
        for unit in self._unit.all if self._unit is not None else []:
            unit.unshard()
        self._unit = None


class MiCSModule(FSDPModule):
    """A module whose parameters are sharded over a partition group.

    fully_shard() changes the class of a module in place to a subclass of its own class and this one.
    Methods that FSDPModule has keep their names and meaning; where MiCS differs, the docstring says so.
    Methods with `recurse` act on the units at and below the module, or on its own unit alone.
    """

    # FSDPModule.__new__ reads it to find the original class: [new class, MiCSModule, FSDPModule, cls].
    _orig_cls_mro_index = 3

    # --- state ---------------------------------------------------------------------------------------

    @property
    def _unit(self) -> ShardedUnit:
        return cast(ShardedUnit, self._mics_unit)  # type: ignore[attr-defined]

    def _units(self, *, recurse: bool = True) -> list[ShardedUnit]:
        return units_of(cast(nn.Module, self)) if recurse else self._unit.all

    def _contexts(self) -> list[Context]:
        return contexts_of(self._units())

    def _context(self) -> Context:
        return ensure_context(cast(nn.Module, self), self._unit)

    def _set(self, field: str, value: object, *, recurse: bool = True) -> None:
        self._resolve(field, lambda *_: value, None, recurse=recurse)

    def _resolve(self, field: str, resolve: _Resolve, asked: object, *, recurse: bool) -> None:
        units = self._units(recurse=recurse)
        # All are resolved before one is set: a call that is refused changes nothing.
        found = [resolve(asked, unit.groups.topology, unit.variant) for unit in units]
        for unit, value in zip(units, found, strict=True):
            setattr(unit.settings, field, value)
            unit.push_settings()

    def _get_fsdp_state(self) -> Any:
        return _FORWARD_ADAPTER

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Moves or casts the parameters, and lays out the shard again around them."""
        release(self._units())
        # _apply of FSDPModule needs the state of FSDP2, which these modules do not have.
        result = super(FSDPModule, self)._apply(fn, recurse)  # type: ignore[misc]
        for unit in self._unit.all:
            unit.repack()
        return result

    def extra_repr(self) -> str:
        """Adds a summary of the unit to the module's own line."""
        unit = self._unit
        topology = unit.groups.topology
        num_parameters = sum(len(each.parameters) for each in unit.all)
        sharded = (
            f"mics: {num_parameters} parameters over {topology.partition_size} of "
            f"{topology.world_size} ranks, {unit.variant.name.lower()}"
        )
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, {sharded}" if own else sharded

    # --- parameters ----------------------------------------------------------------------------------

    def unshard(self, async_op: bool = False) -> UnshardHandle | None:  # type: ignore[override]
        """Gathers this module's own unit; its full parameters stay registered until reshard().

        Args:
            async_op: return a handle; the parameters may be used after its wait().
        """
        context = self._context()
        gather = context.engine.prefetch if async_op else context.engine.unshard
        for unit in self._unit.all:
            gather(unit.index)
        return UnshardHandle(self._unit) if async_op else None

    def reshard(self) -> None:
        """Frees the full parameters of this module's own unit and registers the sharded ones."""
        for unit in self._unit.all:
            unit.reshard()

    def set_reshard_after_forward(
        self, reshard_after_forward: bool | int, recurse: bool = True
    ) -> None:
        """Sets what forward frees; the values are those of fully_shard()."""
        self._resolve(
            "reshard_after_forward", resolve_reshard, reshard_after_forward, recurse=recurse
        )

    def set_keep_between_microsteps(self, keep: str, *, recurse: bool = True) -> None:
        """Sets what stays between micro-steps; the values are those of fully_shard()."""
        self._resolve("keep_between_microsteps", resolve_keep, keep, recurse=recurse)

    def set_reshard_after_backward(
        self, reshard_after_backward: bool, *, recurse: bool = True
    ) -> None:
        """Sets whether backward frees the full parameters.

        False keeps them from backward to the next forward of the same accumulation, which frees them as
        set_reshard_after_forward() says; set_keep_between_microsteps("full") keeps them in between too.
        """
        self._set("reshard_after_backward", reshard_after_backward, recurse=recurse)

    def set_unshard_in_backward(self, unshard_in_backward: bool) -> None:
        """Sets whether backward gathers this unit; False only if its backward needs no parameter."""
        self._set("unshard_in_backward", unshard_in_backward, recurse=False)

    def set_modules_to_forward_prefetch(self, modules: list[FSDPModule]) -> None:
        """Gathers the units of `modules`, in this order, when this module's forward begins."""
        self._set_prefetch("forward_prefetch", modules)

    def set_modules_to_backward_prefetch(self, modules: list[FSDPModule]) -> None:
        """Gathers the units of `modules`, in this order, when this module's backward begins."""
        self._set_prefetch("backward_prefetch", modules)

    def set_prefetch_depths(self, *, intra: int, rail: int) -> None:
        """Sets how many units to prefetch in the recorded execution order; the root's value holds for all.

        Deeper prefetch hides more communication and takes more memory. After the first forward the
        call is collective, and must come between steps.

        Args:
            intra: units whose full parameters are gathered ahead of their use; 1 by default.
            rail: units whose node blocks are gathered ahead, at least `intra`; 2 by default.

        Raises:
            ValueError: the depths are not 0 <= intra <= rail; it is called during a step; or, on every
                rank, ranks differ.
        """
        self._set_depths("prefetch_depths", check_depths((intra, rail)), recurse=True)

    def _set_depths(self, field: str, value: object, *, recurse: bool) -> None:
        before = [getattr(unit.settings, field) for unit in self._units(recurse=recurse)]
        self._set(field, value, recurse=recurse)
        try:
            for context in self._contexts():
                context.push_depths()
        except ValueError:
            for unit, old in zip(self._units(recurse=recurse), before, strict=True):
                setattr(unit.settings, field, old)
            raise

    def _set_prefetch(self, direction: str, modules: list[FSDPModule]) -> None:
        for unit in self._unit.all:
            setattr(unit, direction, _prefetch_units(modules))
        if (context := context_of(self._unit)) is not None:
            context.push_prefetch()

    def set_post_optim_event(self, event: torch.Event) -> None:
        """Makes the next forward's gathers wait for `event`."""
        self._unit.forward.post_optim_event = event
        self._unit.connect_hooks()

    # --- gradients -----------------------------------------------------------------------------------

    def set_requires_gradient_sync(
        self, requires_gradient_sync: bool, *, recurse: bool = True
    ) -> None:
        """False starts an accumulation: the next backwards are not a boundary.

        Unlike FSDPModule, gradients are still reduced inside the partition group in every backward, and
        kept as shards; only the all-reduce over replicas waits for the boundary. fully_shard(...,
        accumulate="local") gives the literal meaning.
        """
        self._set("requires_gradient_sync", requires_gradient_sync, recurse=recurse)

    def set_requires_all_reduce(self, requires_all_reduce: bool, *, recurse: bool = True) -> None:
        """False defers the all-reduce over replicas; gradients are not visible until it has run."""
        self._set("requires_all_reduce", requires_all_reduce, recurse=recurse)

    def set_is_last_backward(self, is_last_backward: bool) -> None:
        """False: another backward of the same micro-step follows, so this one is no boundary."""
        self._set("is_last_backward", is_last_backward)

    def set_gradient_divide_factor(self, factor: float) -> None:
        """Divides the sum of the gradients over all ranks by `factor` instead of the world size."""
        if not factor > 0:
            raise ValueError(f"the gradient divide factor must be positive: got factor={factor}.")
        self._set("gradient_divide_factor", float(factor), recurse=False)

    def set_reduce_scatter_divide_factor(self, factor: float) -> None:
        """The old name of set_gradient_divide_factor."""
        self.set_gradient_divide_factor(factor)

    def set_all_reduce_hook(
        self,
        hook: Callable[[torch.Tensor], None],
        *,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Calls `hook` with the synchronised gradient shard [numel] of this unit before it is visible.

        The tensor may be changed in place.
        """
        if stream is not None:
            raise ValueError(
                "the hook runs on the stream of the all-reduce: got a stream of its own."
            )
        self._unit.gradient_hook = hook
        if self._unit.handle is not None:
            self._unit.handle.set_gradient_hook(hook)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside are no accumulation boundary; see set_requires_gradient_sync."""
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)

    def set_manual_backward_finalization(self, enabled: bool) -> None:
        """True: gradients become visible in finalize_backward() and not when backward ends."""
        self._context()
        for context in self._contexts():
            context.engine.set_manual_finalization(enabled)

    def finalize_backward(self, *, async_op: bool = False) -> None:
        """Ends a backward under set_manual_backward_finalization(True)."""
        if async_op:
            raise ValueError("finalize_backward must be called with async_op=False: got True.")
        for context in self._contexts():
            context.engine.finish_backward()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As nn.Module.zero_grad(); also drops an accumulation that has not reached its boundary."""
        for unit in self._units():
            if unit.engine is not None:
                unit.engine.drop_gradients(unit.index)
        super(FSDPModule, self).zero_grad(set_to_none)  # type: ignore[misc]

    def reset(self) -> None:
        """Drops what is in flight after an exception; to be called on every rank.

        Full parameters, recorded forwards and gradients that wait for their boundary are dropped.
        Shards, `.grad` and optimizer states stay as they are.
        """
        for unit in self._units():
            unit.forward.close_group()
        for context in self._contexts():
            context.engine.reset()
            if context.flight_log is not None:
                context.flight_log.begin_incident()  # the next failure is reported again

    def release_memory(self) -> None:
        """Frees the runtime's working memory until the next forward; see torch_mics.memory().

        For phases without training. What residency settings keep is gathered again afterwards.

        Raises:
            ValueError: during an accumulation, or while a module is unsharded.
        """
        for context in self._contexts():
            context.engine.release_memory()

    def reset_iter_state(self) -> None:
        """The name of reset() in FSDPModule."""
        self.reset()

    # --- settings of FSDP2 that are fixed here -------------------------------------------------------

    def set_force_sum_reduction_for_comms(self, enable: bool) -> None:
        """Has no effect: reductions are always sums, scaled once in fp32."""

    def set_keep_unsharded_storage(self, keep: bool, *, recurse: bool = True) -> None:
        """Refused when True: the buffer is freed by reshard()."""
        _refuse("set_keep_unsharded_storage", keep, "use set_reshard_after_backward(False)")

    def set_reduce_scatter_unused_params(
        self, reduce_scatter_unused_params: bool, *, recurse: bool = True
    ) -> None:
        """Refused when False: unused parameters always take part, as zeros, so ranks may differ."""
        _refuse(
            "set_reduce_scatter_unused_params",
            not reduce_scatter_unused_params,
            "leave it True",
        )

    def set_separate_reduce_scatter_group(
        self, enable: bool = True, *, recurse: bool = True
    ) -> None:
        """Refused when False: gathers and reductions always have communicators of their own."""
        _refuse("set_separate_reduce_scatter_group", not enable, "leave it True")

    def set_reduce_scatter_max_input_buffers(
        self, max_input_buffers: int, *, recurse: bool = True
    ) -> None:
        """Sets how many reductions may be in flight; 2 by default. The root's value holds for all units.

        More of them overlap better where communication is slower than backward, and hold more gradients.
        After the first forward the call is collective, and must come between steps.

        Raises:
            ValueError: it is below 1; it is called during a step; or, on every rank, ranks differ.
        """
        if max_input_buffers < 1:
            raise ValueError(
                "at least one reduction must be in flight: got "
                f"max_input_buffers={max_input_buffers}."
            )
        self._set_depths("reductions_in_flight", max_input_buffers, recurse=recurse)

    def set_custom_all_gather(self, comm: Any) -> None:
        """Refused: the gather is the library's own."""
        _refuse("set_custom_all_gather", True, "use hierarchical_gather to choose the gather")

    def set_custom_reduce_scatter(self, comm: Any) -> None:
        """Refused: the reduction is the library's own."""
        _refuse("set_custom_reduce_scatter", True, "use set_all_reduce_hook for the result")

    def set_allocate_memory_from_process_group_for_comm(self, enable: bool) -> None:
        """Refused when True: MICS_NCCL_REGISTRATION=buffers registers the library's own buffers."""
        _refuse(
            "set_allocate_memory_from_process_group_for_comm",
            enable,
            "set MICS_NCCL_REGISTRATION=buffers on every rank",
        )

    def set_symm_mem_for_comm(self, backend: str = "NCCL") -> None:
        """Refused: MICS_NCCL_REGISTRATION=windows asks for symmetric memory, for all communicators."""
        _refuse("set_symm_mem_for_comm", True, "set MICS_NCCL_REGISTRATION=windows on every rank")

    def _set_unshard_async_op(self, async_op: bool) -> None:
        """Has no effect: gathers always run beside compute, on streams of their own."""


def _refuse(method: str, asked: bool, remedy: str) -> None:
    if asked:
        raise ValueError(f"{method} does not apply to MiCSModule: {remedy}.")


def _prefetch_units(modules: list[FSDPModule]) -> list[ShardedUnit]:
    for module in modules:
        if not isinstance(module, MiCSModule):
            raise ValueError(
                f"modules to prefetch must be sharded by torch_mics: got {type(module).__name__}."
            )
    return [unit for module in modules for unit in cast(MiCSModule, module)._unit.all]


def sharded_module(model: nn.Module, caller: str) -> nn.Module:
    """Gives `model` itself, or the sharded module that torch.compile has wrapped in it.

    Raises:
        TypeError: `model` is not sharded.
    """
    while "_orig_mod" in getattr(model, "_modules", ()):
        model = model.get_submodule("_orig_mod")
    if not isinstance(model, MiCSModule):
        raise TypeError(
            f"{caller} needs a sharded model: got {type(model).__name__}. Call shard_model() first."
        )
    return model


def sharded_unit(model: nn.Module, caller: str) -> ShardedUnit:
    """Gives the unit of sharded_module()."""
    return cast(MiCSModule, sharded_module(model, caller))._unit
