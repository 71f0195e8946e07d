"""Which initialisers a model has, and in which order one process would run them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torch_mics._construction import Construction, meta_device
from torch_mics._exchange import check_same
from torch_mics._first_values import FirstValues, Loose
from torch_mics._parameters import Place
from torch_mics._random_state import RandomState, RandomStream
from torch_mics._replay import Replay
from torch_mics._standins import Slot
from torch_mics._unit import original_class

Initialiser = Callable[[nn.Module], Any]


def run_initialisers(
    model: nn.Module,
    values: FirstValues,
    init_fn: Callable[[nn.Module], None] | None,
    starts: list[RandomState],
    stream: RandomStream,
) -> None:
    """Runs what one process would run, on stand-ins: first construction, then initialisation.

    Args:
        model: the root module.
        values: its parameters and buffers.
        init_fn: takes the place of the model's own initialisers.
        starts: rank 0's random states at the start of each construction.
        stream: of the whole call.
    """
    order = _children_first(model)
    waiting = _with_work_below(order, values.unfilled)
    for construction, start in zip(values.constructions(), starts, strict=True):
        _play(values, construction, stream, start)
    if init_fn is not None:
        for module in waiting:
            _run(init_fn, module, values)
        for module in waiting:
            if id(module) in values.unfilled and values.unwritten_in(module):
                with _kept(values, [s for s in values.slots if s.is_touched]):
                    _reset(module, values, always=True)
        return
    frameworks = [m for m in order if _is_framework_model(m)]
    inner = {id(m) for outer in frameworks for m in outer.modules() if m is not outer}
    outermost = [m for m in frameworks if id(m) not in inner]
    asked = _asked(model, outermost)
    unrecorded = values.unrecorded()
    with _tied_apart(outermost, values):
        with _kept(values, [s for s in values.slots if s.is_recorded]):
            for module in _with_work_below(order, unrecorded):
                _reset(module, values, always=id(module) in unrecorded)
                for owner in asked.get(id(module), []):
                    _run(owner._init_weights, module, values)  # type: ignore[arg-type]
        for owner in outermost:
            if any(id(module) in values.unfilled for module in owner.modules()):
                _initialise_framework_model(owner, values, waiting)


def construct_again(model: nn.Module, values: FirstValues, missing: set[str]) -> None:
    """Fills in what only constructors set: those of Hugging Face can be called again, with the config."""
    done: set[int] = set()
    for owner in model.modules():
        if not _is_framework_model(owner) or id(owner) in done:
            continue
        done |= {id(module) for module in owner.modules()}
        dtypes = [s.dtype for s in values.slots if id(s.parameter.places[0].module) in done]
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtypes[0] if dtypes else before)
            with meta_device() as construction:
                twin = original_class(owner)(copy.deepcopy(owner.config))
        except Exception:
            continue  # materialize() names what is still missing
        finally:
            torch.set_default_dtype(before)
        prefix = values.names[id(owner)]
        _take_from_twin(values, missing, f"{prefix}." if prefix else "", twin, construction)


def _take_from_twin(
    values: FirstValues,
    missing: set[str],
    prefix: str,
    twin: nn.Module,
    construction: Construction,
) -> None:
    replay = Replay(construction, values.device)
    modules = dict(twin.named_modules())

    def twin_of(module: nn.Module, name: str) -> nn.Module | None:
        path = values.names.get(id(module), "")
        other = modules.get(path.removeprefix(prefix) if path != prefix[:-1] else "")
        is_same = type(other) is original_class(module)
        return other if is_same and values.name_of(module, name) in missing else None

    def same(module: nn.Module, name: str, shape: torch.Size) -> torch.Tensor | None:
        other = twin_of(module, name)
        if other is None:
            return None
        found = other._parameters.get(name, other._buffers.get(name))
        return found if found is not None and found.shape == shape and found.is_meta else None

    buffers = []
    for slot in values.slots:
        place = slot.parameter.places[0]
        meta = same(place.module, place.name, slot.parameter.sizes)
        if meta is not None and replay.give(slot, meta):
            slot.has_values, slot.is_determined = False, True
    for buffer in values.buffers:
        meta = same(buffer.module, buffer.name, buffer.before.shape)
        if meta is not None and replay.keep(meta):
            buffers.append((buffer, meta))
    loose, kept = [], set()
    for item in values.loose:
        other = twin_of(item.module, item.name)
        if other is not None:
            loose.append((item, other.__dict__.get(item.name)))
            kept |= {id(t) for t in Loose(other, item.name, None).tensors if replay.keep(t)}
    replay.play(None)
    for buffer, meta in buffers:
        buffer.record(replay.tensor_of(meta))
    for item, made in loose:
        item.module.__dict__[item.name] = made
        item.put(lambda meta: replay.tensor_of(meta) if id(meta) in kept else None)


def _play(
    values: FirstValues, construction: Construction, stream: RandomStream, start: RandomState
) -> None:
    replay = Replay(construction, values.device)
    slots = [
        slot
        for slot in values.slots
        if not slot.is_kept
        and slot.parameter.source is not None
        and replay.give(slot, slot.parameter.source)
    ]
    buffers = [b for b in values.buffers if b.before.is_meta and replay.keep(b.before)]
    loose = {id(t) for item in values.loose for t in item.tensors if replay.keep(t)}
    # Drawn from a rank's own generator outside the meta device, say: they cannot be made again.
    check_same("what constructors bring to parameters", {"digest of values": replay.digest()})
    replay.play(stream, start)
    for slot in slots:
        slot.is_recorded = not slot.is_incomplete
    for buffer in buffers:
        buffer.record(replay.tensor_of(buffer.before))
    for item in values.loose:
        item.put(lambda meta: replay.tensor_of(meta) if id(meta) in loose else None)


def _children_first(model: nn.Module) -> list[nn.Module]:
    order: list[nn.Module] = []
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for child in module._modules.values():
            if child is not None:
                visit(child)
        order.append(module)

    visit(model)
    return order


def _with_work_below(order: list[nn.Module], todo: set[int]) -> list[nn.Module]:
    busy = set(todo)
    for module in order:
        if any(id(child) in busy for child in module._modules.values() if child is not None):
            busy.add(id(module))
    return [module for module in order if id(module) in busy]


def _is_framework_model(module: nn.Module) -> bool:
    """Whether it is a Hugging Face model: initialize_weights() runs the initialisers of sub-models too."""
    names = ("initialize_weights", "_initialize_weights", "_init_weights")
    return all(callable(getattr(module, name, None)) for name in names)


def _asked(model: nn.Module, frameworks: list[nn.Module]) -> dict[int, list[nn.Module]]:
    """Gives, for each module, the modules whose _init_weights() is called on it, innermost first."""
    asked: dict[int, list[nn.Module]] = {}

    def visit(module: nn.Module, owners: list[nn.Module]) -> None:
        if any(module is framework for framework in frameworks) or id(module) in asked:
            return
        if callable(getattr(module, "_init_weights", None)) and not _is_framework_model(module):
            owners = [module, *owners]
        asked[id(module)] = owners
        for child in module._modules.values():
            if child is not None:
                visit(child, owners)

    visit(model, [])
    return asked


def _own_reset(module: nn.Module) -> Callable[[], Any] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if not callable(reset):
            continue
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(reset).bind()
            return reset
    return None


def _is_as_constructed(module: nn.Module, values: FirstValues) -> bool:
    """Whether all below was written as often as in construction: then that did no reset of its own."""
    slots = [
        slot for m in module.modules() for slot in values.owned.get(id(m), []) if not slot.is_kept
    ]
    return all(
        slot.parameter.source is not None and slot.writes == slot.parameter.source._version
        for slot in slots
    )


def _reset(module: nn.Module, values: FirstValues, *, always: bool) -> None:
    """Calls the module's own reset; unless `always`, only when its constructor seems to have called it."""
    reset = _own_reset(module)
    if reset is None or (not always and _is_as_constructed(module, values)):
        return
    slots = values.owned.get(id(module), [])
    before = [slot.writes for slot in slots]
    _run(lambda _: reset(), module, values)
    for slot, writes in zip(slots, before, strict=True):
        slot.reset_writes = slot.writes - writes
        slot.num_resets += slot.writes > writes


def _run(initialise: Initialiser, module: nn.Module, values: FirstValues) -> None:
    try:
        initialise(module)
    except Exception as error:
        name = values.names.get(id(module)) or "the root"
        raise ValueError(
            "an initialiser must run on the parameters of its module: got "
            f"{type(error).__name__}: {error} ({name}). Pass init_fn, or build the module outside the "
            "meta device."
        ) from error
    values.finish_module(module)


@contextlib.contextmanager
def _kept(values: FirstValues, slots: list[Slot]) -> Iterator[None]:
    """Drops what is written to `slots` inside."""
    slots = [slot for slot in slots if not slot.is_kept]
    values.values.cut_all()
    for slot in slots:
        slot.is_kept = True
    try:
        yield
    finally:
        values.values.cut_all()
        for slot in slots:
            slot.is_kept = False


def _initialise_framework_model(
    owner: nn.Module, values: FirstValues, built_here: list[nn.Module]
) -> None:
    """Runs initialize_weights(), with all that has its values marked as initialised.

    The framework's constructors skip it on the meta device. So it is due for all tensors of a module that
    was built there, also for those that the constructor made elsewhere (torch.FloatTensor(...)).
    """
    below = {id(module) for module in owner.modules()}
    due = {id(m) for m in built_here if not getattr(m, "_is_hf_initialized", False)}
    slots = [s for s in values.slots if any(id(p.module) in below for p in s.parameter.places)]
    for slot in slots:
        slot.is_touched = False
        if slot.is_kept and any(id(place.module) in due for place in slot.parameter.places):
            slot.is_kept = (
                slot.unit not in values.units or "_is_hf_initialized" in slot.parameter.marks
            )
        if slot.is_kept:
            slot.stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    for buffer in values.buffers:
        if buffer.is_kept and (id(buffer.module) not in due or id(buffer.module) not in below):
            buffer.working._is_hf_initialized = True  # type: ignore[attr-defined]
        elif buffer.is_kept:
            buffer.is_due = True
    _run(lambda _: owner.initialize_weights(), owner, values)  # type: ignore[operator]
    for slot in slots:
        slot.is_determined = slot.is_touched


@contextlib.contextmanager
def _tied_apart(owners: list[nn.Module], values: FirstValues) -> Iterator[None]:
    """Inside, gives each place that the framework will tie a tensor of its own; drops it at the end.

    In one process, too, such a place is initialised before it is tied.
    """
    targets = {
        (id(module), name) for owner in owners for module, name in _places_tied_by_framework(owner)
    }
    replaced: list[tuple[Slot, Place]] = []
    for slot in values.slots:
        places = slot.parameter.places
        tied = [place for place in places if (id(place.module), place.name) in targets]
        for place in tied if len(tied) < len(places) else tied[1:]:
            place.module._parameters[place.name] = slot.apart().stand_in
            replaced.append((slot, place))
    try:
        yield
    finally:
        for slot, place in replaced:
            place.module._parameters[place.name] = slot.stand_in


def _places_tied_by_framework(owner: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for target in getattr(owner, "all_tied_weights_keys", None) or {}:
        path, _, name = target.rpartition(".")
        with contextlib.suppress(AttributeError):
            yield owner.get_submodule(path), name
