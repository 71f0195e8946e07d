"""What bad input gets: the same clear error on every rank, within seconds, and nothing broken.

Functions that run on the ranks begin with an underscore; the tests say what must come of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Block, TinyGPT, batch, loss, make_gpt
from support.ranks import Outcome, run_outcomes, run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import torch_mics as mics

WORLD = 4
# Far above what a test takes here, far below every time-out of the library.
SECONDS = 900.0
REPLACED = "a sharded parameter must not be replaced"


@pytest.fixture(scope="module", autouse=True)
def started_ranks() -> None:
    # Starting the processes imports torch in each, which is no part of a test's seconds.
    run_ranks(WORLD, _nothing)


def _nothing(rank: int) -> None:
    pass


def outcomes_of(function: Callable[..., Any], *args: Any, **options: Any) -> list[Outcome]:
    """Runs on four ranks that must all come back within seconds."""
    return run_outcomes(WORLD, function, *args, timeout=SECONDS, **options)


def expect(outcomes: list[Outcome], error_type: str, *parts: str) -> None:
    """Every rank raised `error_type`, with all `parts` in its message."""
    # The core raises a ValueError of its own.
    names = {"ValueError": {"ValueError", mics._C.InvalidArgument.__name__}}
    for rank, outcome in enumerate(outcomes):
        found = outcome.error_type
        assert found in names.get(error_type, {error_type}), f"rank {rank}: {outcome}"
        for part in parts:
            assert part in str(outcome.error_text), f"rank {rank}: {outcome.error_text}"


def caught(function: Callable[[], object]) -> tuple[str, str]:
    """What `function` raises: type and text; ("", "") when it returns."""
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def expect_caught(results: list[tuple[str, str]], error_type: str, *parts: str) -> None:
    """As expect(), for errors that the function caught itself."""
    expect(
        [Outcome(error_type=kind, error_text=text) for kind, text in results], error_type, *parts
    )


def sharded_gpt(shard_size: int = 2, **options: Any) -> TinyGPT:
    return mics.shard_model(make_gpt(blocks=2), shard_size=shard_size, **options)


def parameters_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().full_tensor().clone() for parameter in model.parameters()]


# --- groups ---------------------------------------------------------------------------------------


def _make_mesh(rank: int, shard_size: Any) -> None:
    mics.init_mesh(shard_size)


def test_shard_size_that_does_not_divide_the_world_lists_the_legal_ones():
    expect(
        outcomes_of(_make_mesh, 3),
        "ValueError",
        "partition_size must divide world_size",
        "partition_size=3, world_size=4",
        "Use 1, 2 or 4",
    )


@pytest.mark.parametrize("shard_size", [0, -2])
def test_shard_size_below_one_lists_the_legal_ones(shard_size: int):
    expect(
        outcomes_of(_make_mesh, shard_size),
        "ValueError",
        "partition_size must be at least 1",
        f"partition_size={shard_size}",
        "Use 1, 2 or 4",
    )


def test_shard_size_that_does_not_fit_the_nodes_lists_the_legal_ones():
    # Every divisor of four fits nodes of equal size; the topology is where sizes are judged.
    with pytest.raises(
        ValueError, match="must divide the ranks per node or be a multiple"
    ) as error:
        mics._C.Topology(node_of_rank=list("aaabbb"), partition_size=2)
    assert "partition_size=2, ranks_per_node=3, world_size=6" in str(error.value)
    assert "Use 1, 3 or 6" in str(error.value)


@pytest.mark.parametrize(
    ("shard_size", "error_type"),
    [("nodes", "ValueError"), (True, "TypeError"), (2.0, "TypeError")],
)
def test_shard_size_of_another_kind_is_refused(shard_size: Any, error_type: str):
    expect(
        outcomes_of(_make_mesh, shard_size),
        error_type,
        'shard_size must be an int, "node" or "world"',
        f"got {shard_size!r}",
    )


def _make_mesh_of_unequal_nodes(rank: int) -> None:
    mics.init_mesh(2, gpus_per_node=3)


def test_gpus_per_node_that_does_not_divide_the_world_is_refused():
    expect(
        outcomes_of(_make_mesh_of_unequal_nodes),
        "ValueError",
        "gpus_per_node must divide the world size",
        "gpus_per_node=3, world_size=4",
    )


def _shard_size_of_own(rank: int) -> None:
    sharded_gpt(shard_size=4 if rank == 3 else 2)


def test_shard_size_that_differs_between_ranks_is_named():
    expect(
        outcomes_of(_shard_size_of_own),
        "ValueError",
        "must be the same on every rank",
        "shard_size = 2 on world_rank 0 and 4 on world_rank 3",
    )


def _shard_size_of_own_after_another_model(rank: int) -> None:
    sharded_gpt(shard_size=2)
    model = sharded_gpt(shard_size=4 if rank == 3 else 2)
    loss(model, batch(0, 0, rank)).backward()


def test_shard_size_that_differs_is_named_when_some_ranks_have_that_mesh_already():
    outcomes = outcomes_of(_shard_size_of_own_after_another_model)
    assert {outcome.error_type for outcome in outcomes} == {"ValueError"}
    for outcome in outcomes:
        assert "must be the same on every rank" in str(outcome.error_text)


SCATTERED = ["a", "b", "a", "b"]


def _shard_on_scattered_nodes(rank: int, shard_size: Any, hierarchical: Any) -> float:
    model = mics.shard_model(
        make_gpt(blocks=1), shard_size=shard_size, hierarchical_gather=hierarchical
    )
    value = loss(model, batch(0, 0, rank))
    value.backward()
    return value.item()


@pytest.mark.parametrize(("shard_size", "hierarchical"), [(4, True), (2, True), ("node", "auto")])
def test_nodes_whose_ranks_are_not_consecutive_are_shown_as_a_map(
    shard_size: Any, hierarchical: Any
):
    expect(
        outcomes_of(_shard_on_scattered_nodes, shard_size, hierarchical, nodes=SCATTERED),
        "ValueError",
        "nodes of equal size whose ranks are consecutive",
        "4 ranks on 2 nodes",
        "node 0 (a) [r0 r2]",
        "node 1 (b) [r1 r3]",
        "Start the ranks node by node",
    )


def test_nodes_whose_ranks_are_not_consecutive_work_when_flat():
    scattered = [
        run_ranks(WORLD, _shard_on_scattered_nodes, 4, hierarchical, nodes=SCATTERED)
        for hierarchical in ("auto", False)
    ]
    together = run_ranks(WORLD, _shard_on_scattered_nodes, 4, False)
    assert scattered == [together, together]


def _mesh_of(rank: int, ranks: list[Any]) -> None:
    mesh = DeviceMesh("cpu", ranks)
    mics.fully_shard(make_gpt(blocks=1), mesh=mesh)


@pytest.mark.parametrize("ranks", [[[0, 2], [1, 3]], [3, 2, 1, 0], [0, 1]])
def test_mesh_that_is_permuted_or_partial_is_refused(ranks: list[Any]):
    flat = [rank for row in ranks for rank in (row if isinstance(row, list) else [row])]
    expect(
        outcomes_of(_mesh_of, ranks),
        "ValueError",
        "the mesh must hold all ranks in natural order",
        f"got {flat} in a world of 4",
        "torch_mics.init_mesh(shard_size)",
    )


def test_mesh_of_three_dimensions_is_refused():
    expect(outcomes_of(_mesh_of, [[[0, 1]], [[2, 3]]]), "ValueError", "1-D", "2-D", "got 3 dim")


def _without_process_group(rank: int, call: str) -> None:
    if call == "init_mesh":
        mics.init_mesh(2)
    elif call == "shard_model":
        mics.shard_model(make_gpt(blocks=1))
    else:
        mics.fully_shard(make_gpt(blocks=1))


@pytest.mark.parametrize("call", ["init_mesh", "shard_model", "fully_shard"])
def test_world_without_process_group_says_what_to_call(call: str):
    expect(
        outcomes_of(_without_process_group, call, initialise=False),
        "RuntimeError",
        "torch.distributed must be initialised before sharding",
        "WORLD_SIZE=4",
        "init_process_group()",
    )


# --- what differs between ranks -------------------------------------------------------------------


def _differ(rank: int, what: str) -> None:
    odd = rank == 2
    options: dict[str, Any] = {"shard_size": 2}
    model = make_gpt(blocks=2)
    if what == "shape" and odd:
        model.blocks[1].up = nn.Linear(12, 27)
        model.blocks[1].down = nn.Linear(27, 12)
    elif what == "name" and odd:
        model.blocks[0].norm3 = nn.LayerNorm(12)
    elif what == "dtype" and odd:
        model.blocks[1].to(torch.float64)
    elif what == "requires_grad" and odd:
        model.blocks[0].up.weight.requires_grad_(False)
    elif what == "order":
        blocks = list(model.blocks)
        options["units"] = blocks if not odd else blocks[1:] + [blocks[0].up]
    elif what == "number":
        options["units"] = list(model.blocks)[: 1 if odd else 2]
    elif what == "policy":
        options["mp_policy"] = "bf16" if odd else None
    elif what == "reshard_after_forward":
        options["reshard_after_forward"] = not odd
    elif what == "accumulate":
        options["accumulate"] = "local" if odd else "two_hop"
    mics.shard_model(model, **options)
    model(batch(0, 0, rank)[0])


@pytest.mark.parametrize(
    ("what", "path"),
    [
        ("shape", "blocks.1 / parameters / up.weight / shape / 0 = 26 on world_rank 0 and 27"),
        ("name", "blocks.0 / parameters / norm3.weight = nothing on world_rank 0 and "),
        ("dtype", "blocks.1 / dtype = torch.float32 on world_rank 0 and torch.float64"),
        (
            "requires_grad",
            "blocks.0 / parameters / up.weight / requires_grad = True on world_rank 0 and False",
        ),
        ("order", "order of units / 1 = blocks.0 on world_rank 0 and blocks.0.up"),
        ("number", "order of units = "),
        ("policy", "param_dtype = torch.float32 on world_rank 0 and torch.bfloat16"),
        ("reshard_after_forward", "reshard_after_forward = True on world_rank 0 and False"),
        ("accumulate", "accumulate = two_hop on world_rank 0 and local"),
    ],
)
def test_model_that_differs_between_ranks_is_named_with_both_values(what: str, path: str):
    expect(
        outcomes_of(_differ, what),
        "ValueError",
        "the sharded model must be the same on every rank",
        path,
        "on world_rank 2",
        "Build the model with the same code and arguments on every rank",
    )


def _replicas_with_different_values(rank: int, difference: float) -> None:
    model = make_gpt(blocks=2)
    if rank >= 2:
        with torch.no_grad():
            model.blocks[1].up.weight[-1, -1] += difference
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])


def test_replicas_with_different_values_name_the_unit_and_both_ranks():
    # Row 25 of 26 is on the second rank of each partition group.
    expect(
        outcomes_of(_replicas_with_different_values, 0.5),
        "ValueError",
        "replicas must start from the same values",
        'unit "blocks.1" differs between world_rank 1 and 3',
        "torch.manual_seed",
    )


def _replicas_that_differ_in_few_bits(rank: int, case: str) -> None:
    model = make_gpt(blocks=2)
    weight = model.blocks[0].up.weight
    with torch.no_grad():
        if case == "tiny":
            weight[0, 0] = 1e-30 if rank < 2 else 2e-30
        elif case == "sign of zero":
            weight[0, 0] = 0.0 if rank < 2 else -0.0
        elif case == "beside infinity":
            weight[0, 0] = float("inf")
            weight[0, 1] = 1.0 if rank < 2 else 2.0
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])


@pytest.mark.parametrize("case", ["tiny", "sign of zero", "beside infinity"])
def test_replicas_that_differ_in_few_bits_are_found(case: str):
    expect(
        outcomes_of(_replicas_that_differ_in_few_bits, case),
        "ValueError",
        "replicas must start from the same values",
        'unit "blocks.0" differs between world_rank 0 and 2',
    )


# --- parameters -----------------------------------------------------------------------------------


class Odd(nn.Module):
    """A Linear with one more parameter."""

    def __init__(self, extra: nn.Parameter | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _make_odd(kind: str) -> Odd:
    if kind == "non-contiguous":
        return Odd(nn.Parameter(torch.ones(4, 3).t()))
    if kind == "sparse":
        return Odd(nn.Parameter(torch.eye(4).to_sparse()))
    if kind == "complex":
        return Odd(nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    if kind == "0-dim":
        return Odd(nn.Parameter(torch.tensor(1.0)))
    assert kind == "mixed dtypes"
    return Odd(nn.Parameter(torch.ones(4, dtype=torch.bfloat16)))


ODD_PARAMETERS = {
    "non-contiguous": ("must be contiguous", "strides=(1, 3)", '"extra"', "Convert it, or ignore"),
    "sparse": ("must be dense", "layout=torch.sparse_coo", '"extra"', "Convert it, or ignore it"),
    "complex": (
        "must be floating point or frozen",
        "dtype=torch.complex64",
        '"extra"',
        "Convert it, or ignore",
    ),
    "0-dim": ("at least one dimension", "a 0-dim tensor", '"extra"', "Make it 1-dim"),
    "mixed dtypes": (
        "must have one dtype",
        'torch.float32 ("linear.',
        'torch.bfloat16 ("extra")',
        "Cast them",
    ),
}


def _shard_odd_parameters(rank: int) -> dict[str, tuple[tuple[str, str], bool]]:
    found = {}
    for kind in ODD_PARAMETERS:
        model = _make_odd(kind)
        before = dict(model.named_parameters())
        error = caught(lambda model=model: mics.fully_shard(model))
        same = all(before[name] is now for name, now in model.named_parameters())
        found[kind] = (error, same and type(model) is Odd)
    return found


@pytest.fixture(scope="module")
def odd_parameters(started_ranks: None) -> list[dict[str, tuple[tuple[str, str], bool]]]:
    return run_ranks(WORLD, _shard_odd_parameters, timeout=SECONDS)


@pytest.mark.parametrize("kind", ODD_PARAMETERS)
def test_parameter_that_cannot_be_cut_is_named_and_nothing_is_changed(
    kind: str, odd_parameters: list[dict[str, tuple[tuple[str, str], bool]]]
):
    expect_caught([found[kind][0] for found in odd_parameters], "ValueError", *ODD_PARAMETERS[kind])
    assert all(found[kind][1] for found in odd_parameters)


def _ignored_odd_parameter_trains(rank: int) -> bool:
    torch.manual_seed(0)
    model = _make_odd("0-dim")
    assert model.extra is not None
    mics.fully_shard(model, ignored_params={model.extra}, shard_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.ones(2, 4)).sum() + model.extra).backward()
    optimizer.step()
    return model.extra.item() == pytest.approx(0.9)


def test_ignored_parameter_may_be_of_any_kind():
    assert run_ranks(WORLD, _ignored_odd_parameter_trains) == [True] * WORLD


def _tie_over_two_units(rank: int) -> None:
    model = make_gpt(tied=True, blocks=1)
    mics.fully_shard(model.tokens)
    mics.fully_shard(model.head)


def test_parameter_tied_over_two_units_is_named():
    expect(
        outcomes_of(_tie_over_two_units),
        "ValueError",
        "a parameter may be in one unit",
        '"weight"',
        "fully_shard([a, b])",
    )


def _leave_a_parameter_out(rank: int, when: str) -> None:
    model = make_gpt(blocks=2)
    mesh = mics.init_mesh(2)
    for block in model.blocks:
        mics.fully_shard(block, mesh=mesh)
    if when == "added later":
        mics.fully_shard(model, mesh=mesh)
        model.extra = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW(model.parameters())
    loss(model, batch(0, 0, rank)).backward()
    with pytest.warns(UserWarning, match="is in no unit") as caught:
        optimizer.step()
    raise UserWarning(str(caught[0].message))


@pytest.mark.parametrize(
    ("when", "shape"), [("never sharded", "(37, 12)"), ("added later", "(5,)")]
)
def test_trainable_parameter_in_no_unit_is_named_at_the_step(when: str, shape: str):
    expect(
        outcomes_of(_leave_a_parameter_out, when),
        "UserWarning",
        "is in no unit: torch_mics does not average its gradient",
        f"of shape {shape}",
        "fully_shard() on the root module too, or list it in ignored_params",
    )


def _step_with_an_old_optimizer(rank: int, when: str) -> None:
    if when == "stepped before too":
        # The checks are there from the first sharding in the process on.
        mics.shard_model(make_gpt(blocks=1), shard_size=2)
    model = make_gpt(blocks=2)
    optimizer = torch.optim.AdamW(model.parameters())
    if when == "stepped before too":
        loss(model, batch(0, 0, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    mics.shard_model(model, shard_size=2)
    if when != "before the first forward":
        loss(model, batch(0, 0, rank)).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "when", ["before the first forward", "after a backward", "stepped before too"]
)
def test_optimizer_made_before_sharding_is_refused_at_the_step(when: str):
    expect(
        outcomes_of(_step_with_an_old_optimizer, when),
        "RuntimeError",
        "an optimizer must be made after sharding",
        "weight",
        "Make the optimizer after shard_model() or fully_shard()",
    )


def _replace_a_parameter(rank: int, when: str, how: str) -> None:
    model = sharded_gpt()
    if when == "after a step":
        loss(model, batch(0, 0, rank)).backward()
    up = model.blocks[1].up
    if how == "plain":
        up.weight = nn.Parameter(torch.zeros(26, 12))
    elif how == "another DTensor":
        up.weight = nn.Parameter(up.weight.detach().clone())
    else:
        del up.weight
        up.weight = torch.zeros(26, 12)
    loss(model, batch(1, 0, rank)).backward()


@pytest.mark.parametrize("when", ["before the first forward", "after a step"])
@pytest.mark.parametrize("how", ["plain", "another DTensor", "deleted"])
def test_parameter_replaced_after_sharding_is_named_at_the_forward(when: str, how: str):
    expect(
        outcomes_of(_replace_a_parameter, when, how),
        "ValueError",
        REPLACED,
        '"blocks.1.up.weight"',
        "copy_() or load_state_dict()",
    )


# --- arguments ------------------------------------------------------------------------------------


def _bad_arguments(rank: int) -> dict[str, tuple[str, str]]:
    mesh = mics.init_mesh(2)
    override = MixedPrecisionPolicy()
    calls: dict[str, Callable[[], object]] = {}

    def shard(name: str, **options: Any) -> None:
        calls[f"shard_model {name}"] = lambda: mics.shard_model(make_gpt(blocks=2), **options)
        if "units" not in options:
            calls[f"fully_shard {name}"] = lambda: mics.fully_shard(make_gpt(blocks=2), **options)

    shard("mesh and shard_size", mesh=mesh, shard_size=2)
    shard("mp_policy string", mesh=mesh, mp_policy="fp8")
    shard("mp_policy type", mesh=mesh, mp_policy=torch.bfloat16)
    shard("accumulate", mesh=mesh, accumulate="global")
    shard("reshard_after_forward", mesh=mesh, reshard_after_forward=3)
    shard("units string", mesh=mesh, units="blocks")
    shard("units type", mesh=mesh, units=1.5)
    shard("units bool", mesh=mesh, units=True)
    shard("units number", mesh=mesh, units=0)
    shard("units elsewhere", mesh=mesh, units=[nn.Linear(2, 2)])
    shard("units not found", mesh=mesh, units={nn.Conv2d})
    calls["offload_policy"] = lambda: mics.fully_shard(
        make_gpt(blocks=1), mesh=mesh, offload_policy=CPUOffloadPolicy()
    )
    calls["shard_placement_fn"] = lambda: mics.fully_shard(
        make_gpt(blocks=1), mesh=mesh, shard_placement_fn=lambda parameter: None
    )
    calls["empty list"] = lambda: mics.fully_shard([], mesh=mesh)
    calls["not a module"] = lambda: mics.fully_shard(make_gpt(blocks=1).head.weight, mesh=mesh)
    calls["ModuleList"] = lambda: mics.fully_shard(make_gpt(blocks=2).blocks, mesh=mesh)
    if hasattr(override, "param_dtype_override_fn"):
        override = MixedPrecisionPolicy(param_dtype_override_fn=lambda *_: torch.float32)
        calls["override"] = lambda: mics.fully_shard(
            make_gpt(blocks=1), mesh=mesh, mp_policy=override
        )
    calls["set_reshard_after_forward"] = lambda: sharded_gpt().set_reshard_after_forward(3)
    calls["divide factor"] = lambda: sharded_gpt().set_gradient_divide_factor(0.0)
    calls["prefetch"] = lambda: sharded_gpt().set_modules_to_forward_prefetch([nn.Linear(2, 2)])
    calls["microbatch"] = lambda: mics.microbatch(nn.Linear(2, 2), is_last=True).__enter__()
    calls["full_state_dict"] = lambda: mics.full_state_dict(nn.Linear(2, 2))
    calls["rank0_only"] = lambda: mics.full_state_dict(sharded_gpt(), cpu_offload=False)
    calls["extra"] = lambda: mics.checkpoint.TrainState(sharded_gpt(), counter=3)
    return {name: caught(call) for name, call in calls.items()}


BOTH = ("ValueError", "give either a mesh or a shard_size", "got both (shard_size=2)")
BAD_ARGUMENTS = {
    "shard_model mesh and shard_size": BOTH,
    "fully_shard mesh and shard_size": BOTH,
    "shard_model mp_policy string": ("ValueError", '"bf16", "fp16" or a MixedPrec', "got 'fp8'"),
    "fully_shard mp_policy string": ("ValueError", '"bf16", "fp16" or a MixedPrec', "got 'fp8'"),
    "shard_model mp_policy type": ("TypeError", "or a MixedPrecisionPolicy", "got dtype"),
    "fully_shard mp_policy type": ("TypeError", "or a MixedPrecisionPolicy", "got dtype"),
    "shard_model accumulate": ("ValueError", '"two_hop", "block" or "local"', "got 'global'"),
    "fully_shard accumulate": ("ValueError", '"two_hop", "block" or "local"', "got 'global'"),
    "shard_model reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "fully_shard reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "shard_model units string": ("ValueError", 'units must be "auto"', "got 'blocks'"),
    "shard_model units type": ("TypeError", 'must be "auto"', "got float"),
    "shard_model units bool": ("TypeError", "must not be a bool", "got True"),
    "shard_model units number": ("ValueError", "must be at least 1", "got 0"),
    "shard_model units elsewhere": ("ValueError", "must be modules of the model", "Linear"),
    "shard_model units not found": ("ValueError", "no module of TinyGPT is a unit", "Conv2d"),
    "offload_policy": ("ValueError", "must be OffloadPolicy()", "got CPUOffloadPolicy"),
    "shard_placement_fn": ("ValueError", "shard_placement_fn must be None", "along dim 0"),
    "empty list": ("ValueError", "at least one module", "empty list"),
    "not a module": ("TypeError", "takes modules", "got Parameter"),
    "ModuleList": ("ValueError", "modules with a forward", "got ModuleList", "Shard its members"),
    "set_reshard_after_forward": (
        "ValueError",
        "reshard_after_forward=3 needs",
        "partition_size=2",
    ),
    "divide factor": ("ValueError", "must be positive", "factor=0.0"),
    "prefetch": ("ValueError", "must be sharded by torch_mics", "got Linear"),
    "microbatch": ("TypeError", "microbatch needs a sharded model", "got Linear", "shard_model()"),
    "full_state_dict": ("TypeError", "full_state_dict needs a sharded model", "got Linear"),
    "rank0_only": ("ValueError", "rank0_only needs cpu_offload", "Pass rank0_only=False"),
    "extra": ("TypeError", "must have state_dict() and load_state_dict()", "counter=int"),
}


@pytest.fixture(scope="module")
def bad_arguments(started_ranks: None) -> list[dict[str, tuple[str, str]]]:
    return run_ranks(WORLD, _bad_arguments, timeout=SECONDS)


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_argument_that_breaks_a_rule_is_refused(
    case: str, bad_arguments: list[dict[str, tuple[str, str]]]
):
    expect_caught([found[case] for found in bad_arguments], *BAD_ARGUMENTS[case])


def test_every_bad_argument_is_looked_at(bad_arguments: list[dict[str, tuple[str, str]]]):
    # param_dtype_override_fn came after torch 2.11.
    for found in bad_arguments:
        error = found.pop("override", None)
        assert error is None or (error[0] == "ValueError" and "param_dtype_override_fn" in error[1])
        assert set(found) == set(BAD_ARGUMENTS)


def _bad_argument_leaves_the_model_alone(rank: int) -> bool:
    model = make_gpt(blocks=2)
    before = dict(model.named_parameters())
    for options in ({"mp_policy": "fp8"}, {"accumulate": "x"}, {"reshard_after_forward": 3}):
        assert caught(lambda options=options: mics.shard_model(model, shard_size=2, **options))[0]
    unchanged = type(model) is TinyGPT and all(type(block) is Block for block in model.blocks)
    return unchanged and all(before[name] is now for name, now in model.named_parameters())


def test_bad_argument_leaves_the_model_as_it_was():
    assert run_ranks(WORLD, _bad_argument_leaves_the_model_alone) == [True] * WORLD


# --- wrong use ------------------------------------------------------------------------------------


def _wrong_uses(rank: int) -> dict[str, tuple[str, str]]:
    model = sharded_gpt()
    block = model.blocks[0]
    x = torch.zeros(1, 12)
    found = {
        "shard twice": caught(lambda: mics.shard_model(model, shard_size=2)),
        "shard a unit twice": caught(lambda: mics.fully_shard(block, shard_size=2)),
        "deepcopy": caught(lambda: copy.deepcopy(model)),
        "deepcopy of a unit": caught(lambda: copy.deepcopy(block)),
        "inner module before a forward": caught(lambda: block.up(x)),
    }
    loss(model, batch(0, 0, rank)).backward()
    found["inner module"] = caught(lambda: block.up(x))
    found["a method that is no forward"] = caught(lambda: model.encode(batch(0, 0, rank)[0]))
    with mics.unsharded(model):
        found["forward inside unsharded"] = caught(lambda: model(batch(0, 0, rank)[0]))
        found["inner module inside unsharded"] = caught(lambda: block.up(x))
    block.unshard()
    found["inner module of an unsharded unit"] = caught(lambda: block.up(x))
    block.reshard()
    found["inner module of a resharded unit"] = caught(lambda: block.up(x))
    # None of this has broken anything.
    found["training"] = caught(lambda: loss(model, batch(1, 0, rank)).backward())
    return found


INSIDE = ("RuntimeError", "must run inside the unit's forward", "Call the unit, or unshard() it")
WRONG_USES = {
    "shard twice": ("ValueError", "may be sharded once"),
    "shard a unit twice": ("ValueError", "may be sharded once", "Block"),
    "deepcopy": ("RuntimeError", "must not be copied", "TinyGPT", "Copy before sharding"),
    "deepcopy of a unit": ("RuntimeError", "must not be copied", "Block", "Copy before sharding"),
    "inner module before a forward": (*INSIDE, "a call of Linear while its unit"),
    "inner module": (*INSIDE, 'a call of Linear while its unit "blocks.0" is sharded'),
    "a method that is no forward": ("",),
    "forward inside unsharded": ("RuntimeError", "forward must not run inside unsharded()"),
    "inner module inside unsharded": ("",),
    "inner module of an unsharded unit": ("",),
    "inner module of a resharded unit": (*INSIDE, '"blocks.0"'),
    "training": ("",),
}


@pytest.fixture(scope="module")
def wrong_uses(started_ranks: None) -> list[dict[str, tuple[str, str]]]:
    return run_ranks(WORLD, _wrong_uses, timeout=SECONDS)


@pytest.mark.parametrize("case", WRONG_USES)
def test_wrong_use_is_told_from_right_use(case: str, wrong_uses: list[dict[str, tuple[str, str]]]):
    expect_caught([found[case] for found in wrong_uses], *WRONG_USES[case])


def _deepcopy_of_a_container(rank: int) -> tuple[str, str]:
    holder = nn.Sequential(nn.Identity(), sharded_gpt())
    return caught(lambda: copy.deepcopy(holder))


def test_deepcopy_of_what_holds_a_sharded_module_is_refused():
    expect_caught(run_ranks(WORLD, _deepcopy_of_a_container), "RuntimeError", "must not be copied")


def _step_inside_an_accumulation(rank: int, how: str) -> None:
    model = sharded_gpt(accumulate="local" if how == "local" else "two_hop")
    optimizer = torch.optim.AdamW(model.parameters())
    if how == "microbatch":
        with mics.microbatch(model, is_last=False):
            loss(model, batch(0, 0, rank)).backward()
    elif how == "set_requires_all_reduce":
        model.set_requires_all_reduce(False)
        loss(model, batch(0, 0, rank)).backward()
    else:
        with model.no_sync():
            loss(model, batch(0, 0, rank)).backward()
    before = parameters_of(model)
    kind, text = caught(optimizer.step)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(model), strict=True))
    assert kind == "RuntimeError", (kind, text)
    # The boundary makes it right again.
    model.set_requires_all_reduce(True)
    loss(model, batch(0, 1, rank)).backward()
    optimizer.step()
    raise RuntimeError(text)


@pytest.mark.parametrize("how", ["microbatch", "no_sync", "set_requires_all_reduce", "local"])
def test_step_with_unfinished_accumulation_names_the_units(how: str):
    expect(
        outcomes_of(_step_inside_an_accumulation, how),
        "RuntimeError",
        "an optimizer may step only after an accumulation boundary",
        '"blocks.0"',
        '"blocks.1"',
        '"tokens"',
        "microbatch(model, is_last=True)",
    )


def _move_inside_an_accumulation(rank: int) -> None:
    model = sharded_gpt()
    with model.no_sync():
        loss(model, batch(0, 0, rank)).backward()
    model.to(torch.bfloat16)


def test_moving_parameters_inside_an_accumulation_is_refused():
    expect(
        outcomes_of(_move_inside_an_accumulation),
        "RuntimeError",
        "must not be moved or replaced during an accumulation",
        "not synchronised",
        "reset()",
    )


def _forward_on_meta(rank: int) -> None:
    with torch.device("meta"):
        model = TinyGPT(blocks=1)
    mics.shard_model(model, shard_size=2)
    model(batch(0, 0, rank)[0])


def test_forward_on_the_meta_device_asks_for_materialize():
    expect(
        outcomes_of(_forward_on_meta),
        "RuntimeError",
        "parameters must have values before the first forward",
        "is on the meta device",
        "torch_mics.materialize(model), or load a state dict",
    )


class NoInitialiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def _materialize_without_initialiser(rank: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), NoInitialiser(), NoInitialiser())
    mics.fully_shard(model, shard_size=2)
    mics.materialize(model)


def test_materialize_names_every_module_without_initialiser():
    expect(
        outcomes_of(_materialize_without_initialiser),
        "ValueError",
        "needs an initialiser",
        "1 (NoInitialiser), 2 (NoInitialiser)",
        "reset_parameters(), or pass init_fn",
    )


# --- states of other models -----------------------------------------------------------------------


def _save_and_load_in_another(rank: int, path: str, difference: str) -> tuple[str, str, bool]:
    model = sharded_gpt()
    mics.checkpoint.TrainState(model, torch.optim.AdamW(model.parameters())).save(path)
    other = make_gpt(blocks=3 if difference == "more" else 1 if difference == "fewer" else 2)
    if difference == "shape":
        other.blocks[1].up = nn.Linear(12, 27)
        other.blocks[1].down = nn.Linear(27, 12)
    torch.manual_seed(5)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    mics.shard_model(other, shard_size=4)
    before = parameters_of(other)
    state = mics.checkpoint.TrainState(other, torch.optim.AdamW(other.parameters()))
    kind, text = caught(lambda: state.load(path))
    same = all(torch.equal(a, b) for a, b in zip(before, parameters_of(other), strict=True))
    return kind, text, same


@pytest.mark.parametrize(
    ("difference", "parts"),
    [
        ("more", ('got no "blocks.2.', "names are missing")),
        ("fewer", ('got an unknown "blocks.1.', "names are unknown")),
        ("shape", ('got shape [26, 12] for "blocks.1.up.weight", which has [27, 12] here',)),
    ],
)
def test_checkpoint_of_another_model_is_refused_and_nothing_is_changed(
    tmp_path: Path, difference: str, parts: tuple[str, ...]
):
    results = run_ranks(
        WORLD, _save_and_load_in_another, str(tmp_path), difference, timeout=SECONDS
    )
    expect_caught(
        [(kind, text) for kind, text, _ in results],
        "ValueError",
        "the checkpoint must be of this model",
        *parts,
    )
    assert all(same for _, _, same in results)


def _load_full_state_of_another(rank: int, what: str) -> None:
    model = sharded_gpt()
    state: dict[str, Any] = {}
    if rank == 0:
        state = make_gpt(
            blocks=3 if what == "unknown" else 1 if what == "missing" else 2
        ).state_dict()
        if what == "shape":
            state["blocks.1.up.weight"] = torch.zeros(27, 12)
    mics.load_full_state_dict(model, state)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("missing", 'got no "blocks.1.'),
        ("unknown", 'got an unknown "blocks.2.'),
        ("shape", 'got shape [27, 12] for "blocks.1.up.weight", which has [26, 12] here'),
    ],
)
def test_full_state_of_another_model_on_rank_0_is_refused_on_all_ranks(what: str, part: str):
    expect(
        outcomes_of(_load_full_state_of_another, what),
        "ValueError",
        "the state dict must be one of this model",
        part,
    )


# --- after an exception ---------------------------------------------------------------------------


class Trap(nn.Module):
    """Stands behind a block and raises when it is told to."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.raises_in = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x)
        if self.raises_in == "forward":
            raise ArithmeticError("the user's own")
        if self.raises_in == "backward" and x.requires_grad:
            x.register_hook(self._fail)
        return x

    def _fail(self, gradient: torch.Tensor) -> None:
        raise ArithmeticError("the user's own")


def _train_past_an_exception(
    rank: int, raises_in: str, remedy: str, shard_size: int, micro_step: bool
) -> tuple[list[float], list[torch.Tensor]]:
    model = make_gpt()
    trap = model.blocks[1] = Trap(model.blocks[1])
    mics.shard_model(model, units={Block, nn.Embedding}, shard_size=shard_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(4):
        if step == 2 and raises_in:
            trap.raises_in = raises_in
            with mics.microbatch(model, is_last=not micro_step), pytest.raises(ArithmeticError):
                loss(model, batch(7, 7, rank)).backward()
            trap.raises_in = ""
            if remedy == "reset":
                model.reset()
            elif remedy == "zero_grad":
                optimizer.zero_grad()
        value = loss(model, batch(step, 0, rank))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, parameters_of(model)


@pytest.fixture(scope="module")
def never_failed(started_ranks: None) -> dict[int, list[tuple[list[float], list[torch.Tensor]]]]:
    return {
        p: run_ranks(WORLD, _train_past_an_exception, "", "", p, False, ranks_per_node=2)
        for p in (2, 4)
    }


@pytest.mark.parametrize("shard_size", [2, 4])
@pytest.mark.parametrize(
    ("raises_in", "remedy", "micro_step"),
    [
        ("forward", "", False),
        ("forward", "reset", False),
        ("forward", "", True),
        ("backward", "reset", False),
        ("backward", "reset", True),
    ],
)
def test_exception_on_all_ranks_leaves_the_next_step_bitwise_right(
    raises_in: str,
    remedy: str,
    micro_step: bool,
    shard_size: int,
    never_failed: dict[int, list[tuple[list[float], list[torch.Tensor]]]],
):
    results = run_ranks(
        WORLD,
        _train_past_an_exception,
        raises_in,
        remedy,
        shard_size,
        micro_step,
        ranks_per_node=2,
        timeout=SECONDS,
    )
    for (losses, parameters), (right_losses, right) in zip(
        results, never_failed[shard_size], strict=True
    ):
        assert losses == right_losses
        assert all(torch.equal(a, b) for a, b in zip(parameters, right, strict=True))


def _state_after_an_exception(rank: int, raises_in: str) -> dict[str, bool]:
    model = make_gpt()
    trap = model.blocks[1] = Trap(model.blocks[1])
    mics.shard_model(model, units={Block, nn.Embedding}, shard_size=2)
    loss(model, batch(0, 0, rank)).backward()
    gradients = [p.grad.full_tensor().clone() for p in model.parameters()]
    before = parameters_of(model)
    trap.raises_in = raises_in
    with pytest.raises(ArithmeticError):
        loss(model, batch(1, 0, rank)).backward()
    model.reset()
    after = [parameter.grad for parameter in model.parameters()]
    return {
        "no block holds full parameters": not any(
            p.shape == p.detach().to_local().shape
            for p in trap.block.parameters()
            if p.shape[0] > 1
        ),
        "parameters are as they were": all(map(torch.equal, before, parameters_of(model))),
        "gradients are as they were": all(
            now is not None and torch.equal(now.full_tensor(), then)
            for now, then in zip(after, gradients, strict=True)
        ),
    }


@pytest.mark.parametrize("raises_in", ["forward", "backward"])
def test_reset_after_an_exception_leaves_shards_and_visible_gradients(raises_in: str):
    results = run_ranks(WORLD, _state_after_an_exception, raises_in, timeout=SECONDS)
    for facts in results:
        assert all(facts.values()), facts


# --- calls that do not match ----------------------------------------------------------------------


def _make_different_calls(rank: int) -> None:
    model = sharded_gpt()
    if rank == 1:
        mics.load_full_state_dict(model, make_gpt(blocks=2).state_dict())
    else:
        model(batch(0, 0, rank)[0])


def test_different_calls_on_different_ranks_end_within_seconds():
    outcomes = outcomes_of(_make_different_calls)
    for outcome in outcomes:
        assert outcome.error_type is not None
        assert "a call of load_full_state_dict" in str(outcome.error_text)
        assert "the sharded model" in str(outcome.error_text)
