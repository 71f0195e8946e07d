"""report_after(): a run is held to its prediction, and the report says which term is off."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

import pytest
import torch
from support.bodies import World, on_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import torch_mics as mics
from torch_mics._unit import units_of

STEPS = 4
MICRO_STEPS = 3


class Model(nn.Module):
    """Rows that no partition size divides, and a unit of several parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 10)
        self.blocks = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.head = nn.Linear(10, 7, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


TOKENS = torch.arange(6).view(2, 3)


def sharded(world: World, model: nn.Module | None = None, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return mics.shard_model(model or Model(), mesh=world.mesh, **arguments)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = STEPS,
    between: Callable[[int], None] = lambda step: None,
    *,
    defer: bool = True,
) -> None:
    for step in range(steps):
        between(step)
        for i in range(MICRO_STEPS):
            with mics.microbatch(model, is_last=i == MICRO_STEPS - 1 or not defer):
                model(TOKENS).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def watched(model: nn.Module, **options: object) -> tuple[mics.StepReport, str]:
    """Trains a watched model; gives its report and what was printed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        watch = mics.report_after(model, STEPS)
        train(model, optimizer, STEPS - 1, **options)
        assert watch.report is None
        train(model, optimizer, 1, **options)
    assert watch.report is not None
    return watch.report, said.getvalue()


SETTINGS = {
    "auto": {},
    "flat": {"hierarchical_gather": False},
    "kept": {"reshard_after_forward": False},
    "bf16": {"mp_policy": "bf16"},
    "local": {"accumulate": "local"},
    "one unit": {"units": 10**9},
}


@on_ranks(4, 2, 1, cases=list(SETTINGS))
def test_every_byte_is_predicted(world, case):
    report, said = watched(sharded(world, **SETTINGS[case]))
    assert report.bytes_agree, report.text()
    assert report.num_steps == STEPS - 1
    assert (report.shape.num_microsteps, report.shape.num_boundaries) == (MICRO_STEPS, 1)
    moved = [row for row in report.rows if row.unit == "bytes"]
    assert sum(row.measured for row in moved) > 0
    assert said.startswith("torch_mics: 3 steps compared") == (world.rank == 0)
    assert bool(said) == (world.rank == 0)


@on_ranks(4)
def test_bytes_of_kept_blocks_are_predicted(world):
    report, _ = watched(sharded(world, keep_between_microsteps="block", accumulate="block"))
    assert report.bytes_agree, report.text()
    model = sharded(world, reshard_after_forward=2)
    report, _ = watched(model, defer=False)
    assert report.bytes_agree, report.text()


@on_ranks()
def test_settings_of_the_module_are_followed(world):
    model = sharded(world, reshard_after_forward=False)
    model.set_reshard_after_backward(False)
    model.head.weight.requires_grad_(False)
    report, _ = watched(model)
    assert report.bytes_agree, report.text()


@on_ranks()
def test_recomputed_units_are_gathered_once_for_backward(world):
    model = Model()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    report, _ = watched(sharded(world, model))
    assert report.bytes_agree, report.text()


@on_ranks(2)
def test_every_boundary_is_counted(world):
    report, _ = watched(sharded(world), defer=False)
    assert report.shape.num_boundaries == MICRO_STEPS
    assert report.bytes_agree, report.text()


@on_ranks()
def test_what_is_kept_is_gathered_once_per_boundary(world):
    kept = {"reshard_after_forward": False, "keep_between_microsteps": "full"}
    report, _ = watched(sharded(world, **kept), defer=False)
    assert report.shape.num_boundaries == MICRO_STEPS
    assert report.bytes_agree, report.text()


@on_ranks()
def test_steps_with_an_evaluation_are_not_compared(world):
    model = sharded(world)

    def evaluate(step):
        if step == 1:
            with torch.no_grad():
                model(TOKENS)

    report, _ = watched(model, between=evaluate)
    assert report.num_steps == STEPS - 2
    assert report.bytes_agree, report.text()


@on_ranks()
def test_a_byte_too_many_is_named(world):
    model = sharded(world)

    def gather_once_more(step):
        if step == 2:
            model.blocks[0].unshard()
            model.blocks[0].reshard()

    report, said = watched(model, between=gather_once_more)
    assert not report.bytes_agree
    wrong = {row.term.split()[0] for row in report.off if row.unit == "bytes"}
    assert wrong == {"gather/intra", "all"} | (
        {"gather/rail"} if world.partition_size == 4 else set()
    )
    assert "gather/intra" in said.splitlines()[-1]
    if world.rank != 0:
        assert said.startswith(f"torch_mics: bytes differ on world_rank {world.rank}: ")


@on_ranks()
def test_states_and_working_memory_are_compared(world):
    report, _ = watched(sharded(world))
    rows = {row.term: row for row in report.rows}
    # 16 bytes for each of 470 parameters; rows that are no multiple of p are padded.
    assert rows["memory of states"].predicted * 1e6 == 16 * 470 / world.partition_size
    model = sharded(world)
    # A shard, its gradient, and two states of the rows that this rank owns; the last may own none.
    padded = sum(unit.layout().shard_numel for unit in units_of(model) if unit.parameters)
    assert 8 * padded <= rows["memory of states"].measured * 1e6 <= 16 * padded
    planned = sum(n for part, n in mics.memory(model).items() if part != "unplanned")
    parts = [r.measured for name, r in rows.items() if "gathered" in name or "gradients" in name]
    assert sum(parts) * 1e6 == pytest.approx(planned)
    assert rows["peak memory of the process"].measured > 50
    assert rows["peak memory of the process"].predicted is None


@on_ranks(2)
def test_an_optimizer_with_less_state_is_off(world):
    model = sharded(world)
    watch = mics.report_after(model, 2, show=False)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    assert "memory of states" in [row.term for row in watch.report.off]


@on_ranks()
def test_a_plan_brings_the_time_and_says_where_the_run_differs(world):
    latencies = ("launch", "rail_launch", "inter_latency", "intra_latency")
    v100 = mics.load_calibration("p3dn").replace(ranks_per_node=2, **dict.fromkeys(latencies, 0.0))
    plan = mics.plan(
        Model(),
        instance=v100,
        world_size=4,
        global_batch=8 * MICRO_STEPS,
        sample=(TOKENS[:1],),
        shard_sizes=[4],
        micro_batches=[2],
        vary_residency=False,
    )
    model = sharded(world)
    watch = mics.report_after(model, STEPS, plan=plan, show=False)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    report = watch.report
    rows = {row.term: row for row in report.rows}
    assert rows["step"].predicted < rows["step"].measured  # microseconds of a V100
    assert rows["step"].is_off
    assert rows["optimizer"].measured + rows["forward and backward"].measured == pytest.approx(
        rows["step"].measured
    )
    assert rows["compute"].measured is None
    notes = "\n".join(report.notes)
    assert ("partition_size is 2, the plan has 4" in notes) == (world.partition_size == 2)
    assert "step" in report.text().splitlines()[-1]


@on_ranks(2)
def test_a_watch_can_be_stopped(world):
    model = sharded(world)
    watch = mics.report_after(model, 2)
    watch.stop()
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 2)
    assert watch.report is None


def test_what_cannot_be_watched_is_refused():
    with pytest.raises(TypeError, match="report_after needs a sharded model"):
        mics.report_after(nn.Linear(2, 2))
    model = mics.shard_model(Model())
    with pytest.raises(ValueError, match="at least two steps: got num_steps=1"):
        mics.report_after(model, 1)


def test_a_single_process_is_watched_too(capsys: pytest.CaptureFixture[str]):
    model = mics.shard_model(Model())
    mics.report_after(model, 2)
    train(model, mics.optim.AdamW(model.parameters(), lr=1e-3), 2)
    said = capsys.readouterr().out
    assert said.count("torch_mics: 1 steps compared with the prediction") == 1
    assert "without a plan" in said
