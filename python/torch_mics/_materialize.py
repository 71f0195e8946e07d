"""materialize: gives a model that was built on the meta device its first values."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from torch_mics._exchange import exchange
from torch_mics._first_values import FirstValues
from torch_mics._initialisers import construct_again, run_initialisers
from torch_mics._module import sharded_module
from torch_mics._random_state import (
    RandomState,
    RandomStream,
    drawing_device,
    random_state,
    set_random_state,
)
from torch_mics._unit import units_of

_log = logging.getLogger("torch_mics")


def materialize(
    model: nn.Module,
    *,
    device: torch.device | str | None = None,
    init_fn: Callable[[nn.Module], None] | None = None,
) -> None:
    """Allocates the shards and gives them the values that building the model in one process gives.

    That process builds it on the device of the shards. What was built under meta_device() is built again,
    from the random states of CPU and device that rank 0 had there. For the rest, every rank runs the
    initialisers on full parameters, from the random states that rank 0 has now, and keeps its rows, so the
    values are the same for every partition size. Afterwards the generators are where that process would
    have them; on a rank whose states differed from rank 0's they are where they were. A parameter is full
    only while it is worked on; those that are full at a time take no more memory than the largest unit.
    Parameters and buffers that are not on the meta device keep their values. Collective.

    Args:
        model: the sharded root module, wholly or partly on the meta device.
        device: of the shards; by default that of the mesh.
        init_fn: called with each module, children first. By default every module's
            reset_parameters(), then the model's own initialisation: initialize_weights() of Hugging
            Face, or `_init_weights(module)` for each module. With `init_fn`, reset_parameters() is
            called only for what it leaves unwritten.

    Raises:
        ValueError: no initialiser writes a tensor, or the constructor wrote to it more often than the
            initialisers do. All such tensors are named, on every rank; nothing has been changed. Or a
            constructor took values for a parameter from outside the meta device, and they differ
            between ranks.
    """
    sharded_module(model, "materialize")
    units = units_of(model)
    target = torch.device(device) if device is not None else units[0].groups.device
    _check_ignored(model)
    values = FirstValues(model, units, target)
    if not values.is_needed:
        return
    try:
        with torch.no_grad(), _random_states_of_rank_0(target, values) as (stream, starts):
            run_initialisers(model, values, init_fn, starts, stream)
            values.finish()
            problems = _of_all_ranks(values.problems(checks_writes=init_fn is None))
            if any(problems.values()) and init_fn is None:
                construct_again(model, values, {*problems["unwritten"], *problems["rewritten"]})
                problems = _of_all_ranks(values.problems(checks_writes=True))
        _check_problems(problems)
    except BaseException:
        values.undo()
        raise
    names = values.ambiguous()
    if names and init_fn is None and (not dist.is_initialized() or dist.get_rank() == 0):
        _log.warning(
            "tied parameters were initialised by each of their modules, and the last one counts: "
            f"{_listed(names)}. Which one a single process would keep is known only of models that were "
            "built under torch_mics.meta_device()."
        )
    values.keep()


def _check_ignored(model: nn.Module) -> None:
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and not isinstance(parameter, DTensor)
    ]
    if names:
        raise ValueError(
            "a parameter outside all units must have its values: got "
            f"{_listed(names)} on the meta device. Build it outside the meta device, or do not ignore "
            "it."
        )


@contextlib.contextmanager
def _random_states_of_rank_0(
    target: torch.device, values: FirstValues
) -> Iterator[tuple[RandomStream, list[RandomState]]]:
    """Inside, this rank draws what rank 0 draws. A rank that had other states gets its own back after it.

    Gives the stream, and rank 0's states at the start of each construction.
    """
    device = drawing_device(target)
    mine = random_state(device)
    states = [mine, *(construction.start for construction in values.constructions())]
    texts = json.dumps([state.to_json() for state in states])
    answers = exchange("the random state in a call of materialize", texts)
    first, *starts = map(RandomState.from_json, json.loads(answers[0]))
    set_random_state(first, device)
    stream = RandomStream(device)
    try:
        yield stream, starts[: len(states) - 1]
        stream.go_on_at(first)
    except BaseException:
        set_random_state(mine, device)
        raise
    now = random_state(device)
    set_random_state(
        RandomState(
            cpu=now.cpu if mine.cpu == first.cpu else mine.cpu,
            device=now.device if mine.device == first.device else mine.device,
        ),
        device,
    )


def _of_all_ranks(problems: dict[str, list[str]]) -> dict[str, list[str]]:
    """Joins the problems of all ranks: a rank without rows of a parameter cannot see its problems."""
    texts = exchange("the first values in a call of materialize", json.dumps(problems))
    answers = [json.loads(text) for text in texts]
    return {
        kind: list(dict.fromkeys(name for answer in answers for name in answer[kind]))
        for kind in problems
    }


def _check_problems(problems: dict[str, list[str]]) -> None:
    if problems["unwritten"]:
        raise ValueError(
            "every tensor on the meta device needs an initialiser: got none for "
            f"{', '.join(problems['modules'])}; without values: {_listed(problems['unwritten'])}. Build "
            "the model under torch_mics.meta_device(), give the modules reset_parameters(), or pass "
            "init_fn; or build them outside the meta device."
        )
    if problems["rewritten"]:
        raise ValueError(
            "initialisers must write what the constructor wrote: got fewer writes than the "
            f"constructor's for {_listed(problems['rewritten'])}. Build the whole model under "
            "torch_mics.meta_device(), which remembers them, pass init_fn, or build the modules outside "
            "the meta device."
        )


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
