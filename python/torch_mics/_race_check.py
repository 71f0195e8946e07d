"""MICS_RACE_CHECK=1: every access to memory is checked for races between streams.

A dispatch mode tells the core's race detector what each operator reads and writes, and torch's trace of
CUDA tells it of events, memory and waits of the script. What the library queues itself, the detector
sees at its streams.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_mics import _C

VARIABLE = "MICS_RACE_CHECK"


def is_asked_for() -> bool:
    """Reads MICS_RACE_CHECK."""
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f'{VARIABLE} must be "0" or "1": got "{value}".')
    return value == "1"


@dataclasses.dataclass(frozen=True)
class _Uses:
    """Which arguments an operator reads and writes; those that it only makes a view of are in neither."""

    reads: tuple[tuple[int, str], ...]  # position and name
    writes: tuple[tuple[int, str], ...]
    makes: tuple[int, ...]  # positions of returned tensors that are no views


@functools.cache
def _uses_of(func: Any) -> _Uses:
    reads, writes = [], []
    for index, argument in enumerate(func._schema.arguments):
        place = (-1 if argument.kwarg_only else index, argument.name)
        if argument.alias_info is None:
            reads.append(place)
        elif argument.alias_info.is_write:
            writes.append(place)
    makes = [index for index, made in enumerate(func._schema.returns) if made.alias_info is None]
    return _Uses(tuple(reads), tuple(writes), tuple(makes))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _current_cuda_stream() -> int:
    handle: int = torch.cuda.current_stream().cuda_stream
    return handle


def _places(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], int | None]:
    """Gives those that a device holds, and the handle of its stream; without any, those of the host.

    What the host holds is used in the order of its own program: copies from and to it wait.
    """
    on_device = [tensor for tensor in tensors if tensor.device.type not in ("cpu", "meta")]
    if on_device:
        return on_device, _current_cuda_stream() if on_device[0].is_cuda else None
    return [tensor for tensor in tensors if tensor.is_cpu], None


def _arguments(
    places: tuple[tuple[int, str], ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    found = []
    for index, name in places:
        found += _tensors(args[index] if 0 <= index < len(args) else kwargs.get(name))
    return found


class RaceCheck(TorchDispatchMode):
    """Tells a detector what each operator of this thread, and of autograd, reads and writes."""

    def __init__(self, detector: _C.RaceDetector) -> None:
        super().__init__()
        self.detector = detector

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operator between what it reads and what it makes."""
        kwargs = kwargs or {}
        subclasses = [kind for kind in types if kind not in (torch.Tensor, torch.nn.Parameter)]
        if any(hasattr(kind, "__tensor_flatten__") for kind in subclasses):
            return NotImplemented  # it comes back with the tensors that it wraps, as a DTensor does
        if subclasses:
            return func(*args, **kwargs)  # without memory, as a FakeTensor
        uses = _uses_of(func)
        reads = _arguments(uses.reads, args, kwargs)
        writes = _arguments(uses.writes, args, kwargs)
        seen, stream = _places(reads + writes)
        if seen:
            device_type = seen[0].device.type
            self.detector.access(
                func.name(),
                [tensor for tensor in reads if tensor.device.type == device_type],
                [tensor for tensor in writes if tensor.device.type == device_type],
                stream,
            )
        result = func(*args, **kwargs)
        results = result if isinstance(result, (list, tuple)) else (result,)
        made = [new for i in uses.makes if i < len(results) for new in _tensors(results[i])]
        if made:
            # An operator may return its argument where its schema does not say so.
            known = {tensor.untyped_storage()._cdata for tensor in reads}
            new, stream = _places([t for t in made if t.untyped_storage()._cdata not in known])
            self.detector.made(func.name(), new, stream)
        return result


def _trace_cuda(detector: _C.RaceDetector) -> None:
    """Lets torch tell the detector of events, memory and waits of the script."""
    from torch.cuda import _gpu_trace

    torch._C._activate_gpu_trace()
    _gpu_trace.register_callback_for_event_record(detector.record_event)
    _gpu_trace.register_callback_for_event_wait(detector.wait_for_event)
    # Of an allocation only the address is told; its bytes become known by the tensors in it.
    _gpu_trace.register_callback_for_memory_allocation(
        lambda address: detector.allocate(address, 0, _current_cuda_stream())
    )
    _gpu_trace.register_callback_for_memory_deallocation(detector.free)
    _gpu_trace.register_callback_for_stream_synchronization(detector.synchronize)
    _gpu_trace.register_callback_for_device_synchronization(lambda: detector.synchronize(None))


@functools.cache
def of_process() -> _C.RaceDetector | None:
    """Gives the detector of this process; None where MICS_RACE_CHECK does not ask for one.

    The first call starts it: from there on it checks this thread, and what autograd runs for it, to the
    end of the process. It must not be made in a block that restores torch's modes at its end, so it is
    made when torch_mics is imported.
    """
    if not is_asked_for():
        return None
    check = RaceCheck(_C.RaceDetector(keeps_trace=False, throws=True))
    if torch.cuda.is_available():
        _trace_cuda(check.detector)
    check.__enter__()
    return check.detector
