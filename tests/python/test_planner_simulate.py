"""Scaling curves of a plan, their files, and the figures of the announcement."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

import torch_mics as mics
from torch_mics import _C
from torch_mics.cli import main
from torch_mics.planner._models import published_model
from torch_mics.planner._scaling import SCALINGS, SYSTEMS, Point, curve, gpu_counts

SIMULATE_10B = ["simulate", "--model", "bert_10b", "--instance", "p3dn", "--gpus", "64"]


def paper_plan(model: str = "bert_10b", shard_size: int = 8) -> mics.Plan:
    """The settings of the paper: micro-batch 8, recomputed, shards only."""
    return mics.plan(
        published_model(model),
        instance="p3dn",
        world_size=64,
        global_batch=8192,
        shard_sizes=[shard_size],
        micro_batches=[8],
        recompute=True,
        vary_residency=False,
    )


def by_gpus(points: list[Point]) -> dict[int, Point]:
    return {point.gpus: point for point in points}


def test_curves_go_from_one_gpu_to_16384() -> None:
    counts = gpu_counts(paper_plan())
    assert counts == [2**i for i in range(15)]
    assert gpu_counts(paper_plan(), 48) == [1, 2, 4, 8, 16, 32]
    with pytest.raises(ValueError, match="at least one GPU"):
        gpu_counts(paper_plan(), 0)


def test_every_number_is_that_of_the_time_and_memory_models() -> None:
    plan = paper_plan()
    point = by_gpus(curve(plan, "strong", "MiCS", gpu_counts(plan)))[64]
    time = _C.step_time(plan.workload, plan.calibration.cluster(2560), plan.best.settings)
    assert point.time.total == time.total == plan.best.time.total
    assert point.memory.peak == plan.best.memory.peak
    assert point.tflops == plan.tflops(plan.best)
    assert point.samples_per_s == pytest.approx(8192 / time.total)


def test_weak_scaling_keeps_the_samples_of_a_gpu_and_strong_those_of_a_step() -> None:
    plan = paper_plan()
    counts = gpu_counts(plan)
    weak = curve(plan, "weak", "MiCS", counts)
    assert {p.samples / p.gpus for p in weak} == {8192 / 64}
    strong = curve(plan, "strong", "MiCS", counts)
    assert {p.samples for p in strong} == {8192}
    # One sample per rank is the end of strong scaling; the micro-batch shrinks before.
    assert strong[-1].gpus == 8192
    assert (strong[-1].settings.micro_batch, strong[-1].settings.num_microsteps) == (1, 1)


def test_systems_differ_in_what_they_decide() -> None:
    plan = paper_plan(shard_size=16)
    counts = gpu_counts(plan)
    curves = {system: by_gpus(curve(plan, "weak", system, counts)) for system in SYSTEMS}
    assert min(curves["MiCS"]) == min(curves["HSDP"]) == 16
    assert min(curves["ZeRO-3"]) == min(curves["ZeRO-2"]) == 1
    at = {system: curves[system][256] for system in SYSTEMS}
    assert {s: at[s].settings.partition_size for s in SYSTEMS} == {
        "MiCS": 16,
        "HSDP": 16,
        "ZeRO-3": 256,
        "ZeRO-2": 256,
    }
    assert at["MiCS"].time.replicate * at["MiCS"].settings.num_microsteps == pytest.approx(
        at["HSDP"].time.replicate
    )
    # One gather of a step instead of two in each micro-step.
    steps = at["ZeRO-3"].settings.num_microsteps
    assert at["ZeRO-2"].time.gather_rail * 2 * steps == pytest.approx(at["ZeRO-3"].time.gather_rail)
    assert at["ZeRO-2"].memory.parameters_kept > 2 * plan.workload.numel * 0.99
    # The plan is not changed by what others decide.
    assert plan.best.settings.partition_size == 16


def test_mics_keeps_its_speed_and_zero3_loses_it() -> None:
    plan = paper_plan()
    counts = gpu_counts(plan)
    mics_curve = by_gpus(curve(plan, "weak", "MiCS", counts))
    zero3 = by_gpus(curve(plan, "weak", "ZeRO-3", counts))
    assert mics_curve[8].efficiency == 1
    assert mics_curve[16384].efficiency > 0.95
    assert zero3[16384].efficiency < 0.2
    assert [p.tflops for p in zero3.values() if p.gpus >= 16] == sorted(
        (p.tflops for p in zero3.values() if p.gpus >= 16), reverse=True
    )


def test_what_does_not_fit_is_marked() -> None:
    plan = paper_plan()
    zero3 = by_gpus(curve(plan, "weak", "ZeRO-3", gpu_counts(plan)))
    assert not zero3[4].fits
    assert zero3[8].fits
    zero2 = by_gpus(curve(plan, "weak", "ZeRO-2", gpu_counts(plan)))
    assert not zero2[16].fits


def test_simulation_of_175b_to_16384_gpus_is_fast(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    table, picture = tmp_path / "scaling.csv", tmp_path / "scaling.svg"
    start = time.process_time()
    command = ["simulate", "--model", "gpt3_175b", "--instance", "p4de", "--gpus", "2048"]
    command += ["--global-batch", "16384", "--csv", str(table), "--plot", str(picture)]
    assert main(command) == 0
    assert time.process_time() - start < 30
    said = capsys.readouterr()
    assert said.err.count("scaling of") == len(SCALINGS) * len(SYSTEMS)
    assert "weak scaling," in said.out
    assert "<svg" in picture.read_text()
    rows = list(csv.DictReader(table.open()))
    assert max(int(row["gpus"]) for row in rows) == 16384
    assert {row["system"] for row in rows} == set(SYSTEMS)
    assert {row["scaling"] for row in rows} == set(SCALINGS)
    for row in rows:
        samples = int(row["micro_batch"]) * int(row["micro_steps"]) * int(row["gpus"])
        assert samples == int(row["global_batch"])
        parts = sum(
            float(row[f"{name}_seconds"])
            for name in ("compute", "contention", "exposed", "optimizer")
        )
        assert parts == pytest.approx(float(row["seconds_per_step"]), rel=1e-4)


@pytest.mark.parametrize("instance", ["p3dn", "p4d", "p4de", "p5", "p5e", "p5en", "p6-b200"])
def test_every_instance_type_can_be_simulated(instance: str) -> None:
    plan = mics.plan(
        published_model("bert_10b"), instance=instance, world_size=64, global_batch=8192
    )
    points = curve(plan, "weak", "MiCS", gpu_counts(plan))
    assert points[-1].gpus == 16384
    assert 0.5 < points[-1].efficiency <= 1.01
    zero3 = curve(plan, "weak", "ZeRO-3", gpu_counts(plan))[-1]
    assert zero3.time.is_extrapolated == ("flat" in plan.calibration.tables)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SIMULATE_10B, "got no --global-batch"),
        (["simulate", "--model", "bert_10b"], "got no --instance, no --gpus, no --global-batch"),
        ([*SIMULATE_10B, "--global-batch", "8192", "--max-gpus", "0"], "at least one GPU"),
        ([*SIMULATE_10B, "--global-batch", "100"], "micro-batches on every rank"),
        ([*SIMULATE_10B, "--global-batch", "8192", "--shard-size", "12"], "must be legal"),
        (
            [*SIMULATE_10B[:4], "p9", "--gpus", "8", "--global-batch", "8"],
            "must have a calibration",
        ),
        (
            [*SIMULATE_10B, "--global-batch", "8192", "--max-gpus", "8", "--plot", "x.nothing"],
            "nothing",
        ),
    ],
)
def test_bad_input_is_said_and_status_is_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
