"""plan(), its command, and the workloads of modules."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from gpt.model import GPT, GPTConfig
from support.bodies import fail_text
from support.ranks import run_ranks
from torch import nn

import torch_mics as mics
from torch_mics import _C
from torch_mics._context import units_of
from torch_mics.cli import main
from torch_mics.planner._calibration import dump_calibration
from torch_mics.planner._models import published_model
from torch_mics.planner._report import explanation, plan_json, verdict
from torch_mics.planner._workload import module_workload


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int = 64, layers: int = 5, vocabulary: int = 100) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# --- workloads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_forward_is_counted_unit_by_unit(device: str) -> None:
    with torch.device(device):
        model = Model()
    sample = (torch.zeros(1, 16, dtype=torch.long),)
    workload = module_workload(model, sample=sample)
    embedding, block, head = workload.units
    assert (embedding.numel, block.numel, head.numel) == (6400, 2 * 4 * 64 * 64, 6400)
    assert (block.num_units, head.num_units) == (5, 1)
    assert block.forward_flops == 2 * 16 * 2 * 4 * 64 * 64
    assert head.forward_flops == 2 * 16 * 64 * 100
    assert workload.tokens_per_sample == 16
    # The input of `up`, what relu gives (kept for relu and `down`), in 16 bits.
    assert block.saved_nbytes == 2 * 16 * (64 + 4 * 64)
    assert block.input_nbytes == 2 * 16 * 64
    assert block.can_recompute
    assert not embedding.can_recompute
    assert workload.numel == sum(p.numel() for p in model.parameters())
    assert {p.device.type for p in model.parameters()} == {device}


def test_the_rule_without_a_sample_counts_the_same_products() -> None:
    with torch.device("meta"):
        model = Model()
    ruled = module_workload(model, tokens_per_sample=16)
    counted = module_workload(model, sample=(torch.zeros(1, 16, dtype=torch.long),))
    assert [u.forward_flops for u in ruled.units] == [u.forward_flops for u in counted.units]
    assert ruled.width == 64
    with pytest.raises(ValueError, match="needs a sample or a number of tokens"):
        module_workload(model)


def test_the_gpt_of_the_examples_is_near_the_formula_of_its_shape() -> None:
    config = GPTConfig(vocab_size=1024, layers=4, heads=4, width=128)
    with torch.device("meta"):
        model = GPT(config)
    tokens = torch.zeros(1, 64, dtype=torch.long)
    counted = module_workload(model, sample=(tokens, tokens))
    shape = _C.TransformerShape(layers=4, hidden=128, heads=4, vocabulary=1024, sequence=64)
    formula = _C.transformer_workload(shape)
    assert counted.flops(recompute=False) == pytest.approx(formula.flops(recompute=False), rel=0.15)


# --- plans ----------------------------------------------------------------------------------------


def test_plan_of_a_175b_model_over_2048_ranks_is_fast() -> None:
    workload = published_model("gpt3_175b")
    start = time.process_time()
    found = mics.plan(workload, instance="p4de", world_size=2048, global_batch=16384)
    assert time.process_time() - start < 2
    assert found.best.memory.peak <= 0.96 * found.calibration["memory"]
    assert found.shard_size >= 64


def test_plan_takes_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Model(width=2048, layers=24, vocabulary=32000)
    found = mics.plan(
        model, instance="p3dn", world_size=32, global_batch=256, tokens_per_sample=512
    )
    assert found.arguments()["shard_size"] == found.shard_size
    assert found.ranked[0].time.total <= found.ranked[-1].time.total
    assert json.loads(json.dumps(plan_json(found)))["parameters"] == found.workload.numel


@pytest.mark.parametrize(
    ("residency", "arguments"),
    [
        (("SHARD", "SHARD", "SHARD"), (True, "shard", "two_hop")),
        (("BLOCK", "BLOCK", "BLOCK"), (8, "block", "block")),
        (("FULL", "BLOCK", "FULL"), (False, "block", "local")),
    ],
)
def test_arguments_say_what_is_kept(
    residency: tuple[str, str, str], arguments: tuple[bool | int, str, str]
) -> None:
    found = mics.plan(
        published_model("bert_50b"), instance="p3dn", world_size=64, global_batch=8192
    )
    settings = found.best.settings.residency
    settings.after_forward, settings.between_microsteps, settings.gradient_accumulation = (
        getattr(_C.Residency, name) for name in residency
    )
    given = found.arguments()
    names = ("reshard_after_forward", "keep_between_microsteps", "accumulate")
    assert tuple(given[name] for name in names) == arguments
    assert set(given) <= set(inspect.signature(mics.shard_model).parameters)


def test_paper_settings_give_the_paper_choice() -> None:
    # Shards only, micro-batch 8, recomputed: the smallest group that fits is the fastest.
    for model, p in (("bert_10b", 8), ("bert_15b", 16), ("bert_50b", 64)):
        found = mics.plan(
            published_model(model),
            instance="p3dn",
            world_size=128,
            global_batch=8192,
            micro_batches=[8],
            recompute=True,
            vary_residency=False,
        )
        assert found.shard_size == p
        assert found.best.settings.gather.name == ("FLAT" if p == 8 else "HIERARCHICAL")


def test_a_margin_within_the_error_is_called_a_tie() -> None:
    workload = published_model("bert_10b")
    sizes = {"instance": "p3dn", "world_size": 64, "global_batch": 8192}
    found = mics.plan(workload, **sizes, vary_residency=False, micro_batches=[8])
    assert found.margin is not None
    assert found.is_tie == (found.margin <= found.calibration.time_error)
    clear = mics.plan(
        workload, **sizes, vary_residency=False, micro_batches=[8], shard_sizes=[8, 64]
    )
    assert not clear.is_tie
    assert "A tie" not in verdict(clear)
    tied = mics.plan(workload, **sizes, shard_sizes=[32, 64])
    assert tied.is_tie
    assert "A tie: times are known to 6%" in verdict(tied)


def test_explanation_adds_up() -> None:
    found = mics.plan(
        published_model("bert_15b"), instance="p3dn", world_size=64, global_batch=8192
    )
    seconds = {row[0]: float(row[1]) for row in explanation(found)[0].rows}
    together = seconds.pop("together")
    assert sum(seconds.values()) == pytest.approx(together, abs=3e-3)
    assert together == pytest.approx(found.best.time.total, abs=1e-3)


def test_nothing_fits_names_misses_and_a_remedy_that_works() -> None:
    workload = published_model("gpt3_175b")
    with pytest.raises(ValueError, match="a model must fit into memory") as caught:
        mics.plan(workload, instance="p4d", world_size=64, global_batch=512)
    message = str(caught.value)
    assert "shard_size=64 with micro-batch 1 needs" in message
    ranks = int(re.findall(r"use (\d+) ranks", message)[0])
    assert mics.plan(workload, instance="p4d", world_size=ranks, global_batch=8 * ranks).ranked
    with pytest.raises(ValueError, match="leave shard size, micro-batch and recomputation"):
        mics.plan(
            published_model("bert_10b"),
            instance="p3dn",
            world_size=64,
            global_batch=8192,
            shard_sizes=[8],
            micro_batches=[128],
            recompute=False,
        )


# --- the command ----------------------------------------------------------------------------------

PLAN_10B = ["plan", "--model", "bert_10b", "--instance", "p3dn", "--gpus", "64"]


def test_command_prints_tables_and_plots(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "plan.png"
    command = [*PLAN_10B, "--global-batch", "8192", "--explain", "--plot", str(picture)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "waiting for communication" in out
    assert out.splitlines()[-1].startswith("Best: shard_size=")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--gpt", "96x12288x96", "--sequence", "2048", "--fused-attention"]
    command = ["plan", *shape, "--instance", "p5", "--gpus", "256", "--global-batch", "1024"]
    assert main([*command, "--json", "--hierarchical", "--recompute", "--shards-only"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == pytest.approx(175e9, rel=0.01)
    assert {c["variant"] for c in found["leaders"]} == {"hierarchical"}
    assert all(c["recompute"] for c in found["ranked"])
    assert {c["between_microsteps"] for c in found["ranked"]} == {"shard"}


def test_command_plans_a_module(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mymodel.py").write_text(
        "from torch import nn\ndef make(): return nn.Linear(8, 8)\n"
    )
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        command = ["plan", "--module", "mymodel:make", "--instance", "p4d", "--gpus", "8"]
        assert main([*command, "--global-batch", "8"]) == 0
    finally:
        os.chdir(here)
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN_10B, "--global-batch", "100"], "micro-batches on every rank"),
        ([*PLAN_10B, "--global-batch", "8192", "--shard-size", "12"], "must be legal"),
        ([*PLAN_10B, "--global-batch", "8192", "--sequence", "9"], "has its own sequence"),
        ([*PLAN_10B[:4], "p9", "--gpus", "8", "--global-batch", "8"], "must have a calibration"),
        (["plan", "--gpt", "3", *PLAN_10B[3:], "--global-batch", "64"], "a shape must be"),
        (["plan", "--model", "x", *PLAN_10B[3:], "--global-batch", "64"], "a published one"),
        (["plan", "--module", "x", *PLAN_10B[3:], "--global-batch", "64"], "PACKAGE:CALLABLE"),
        ([*PLAN_10B[:-1], "0", "--global-batch", "64"], "needs ranks, samples"),
        ([*PLAN_10B[:-1], "-8", "--global-batch", "64"], "needs ranks, samples"),
        ([*PLAN_10B[:-1], "63", "--global-batch", "63"], "must fill them: got num_ranks=63"),
        ([*PLAN_10B, "--global-batch", "0"], "needs ranks, samples"),
        ([*PLAN_10B, "--global-batch", "64", "--micro-batch", "0"], "micro-batches on every rank"),
        ([*PLAN_10B[:4], "nothing.json", *PLAN_10B[5:], "--global-batch", "64"], "nothing.json"),
        (
            ["plan", "--gpt", "96x12288x96", *PLAN_10B[3:-1], "16", "--global-batch", "16"],
            "shard_size=16 with micro-batch 1 needs 194.4 GB",
        ),
    ],
)
def test_bad_input_is_said_and_status_is_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_malformed_calibration_is_named_by_line_and_field(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "bad.json"
    text = json.dumps(dump_calibration(mics.load_calibration("p4d")), indent=1)
    file.write_text(text.replace('"value": 0.96', '"value": 96'))
    command = ["plan", "--model", "bert_10b", "--instance", str(file)]
    assert main([*command, "--gpus", "8", "--global-batch", "8"]) == 2
    line = 1 + file.read_text().splitlines().index('   "value": 96,')
    said = capsys.readouterr().err
    assert f"bad.json, line {line}, field values.usable_memory.value: must be a number" in said


# --- with ranks -----------------------------------------------------------------------------------


def _count(rank: int, cases: list[tuple[int, bool, bool, int]]) -> list[tuple[dict, dict]]:
    found = []
    for shard_size, hierarchical, reshard, num_microsteps in cases:
        torch.manual_seed(0)
        model = mics.shard_model(
            Model(width=10, layers=3, vocabulary=7),
            mesh=mics.init_mesh(shard_size, device_type="cpu"),
            hierarchical_gather=hierarchical,
            reshard_after_forward=reshard,
        )
        for microstep in range(num_microsteps):
            with mics.microbatch(model, is_last=microstep == num_microsteps - 1):
                model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        units = []
        for unit in units_of(model):
            if not unit.parameters:
                continue
            layout, trainable = unit.layout(), unit.gradient_layout()
            units.append(
                _C.UnitSize(
                    shard_numel=layout.shard_numel,
                    payload_numel=layout.payload_numel,
                    gradient_shard_numel=trainable.shard_numel,
                    gradient_payload_numel=trainable.payload_numel,
                    parameter_nbytes=4,
                )
            )
        kept = _C.Residency.SHARD if reshard else _C.Residency.FULL
        predicted = mics.predicted_bytes(
            units,
            world_size=4,
            partition_size=shard_size,
            ranks_per_node=2,
            hierarchical=hierarchical,
            num_microsteps=num_microsteps,
            residency=_C.ResidencySettings(after_forward=kept),
        )
        counters = mics.traffic(model)
        counted = {
            name: counters[name]["received_intra_nbytes"] + counters[name]["received_inter_nbytes"]
            if name in counters
            else 0
            for name in predicted
        }
        found.append((predicted, counted))
    return found


def test_predicted_bytes_are_what_a_run_counts() -> None:
    cases = [
        (p, hierarchical, reshard, s)
        for p in (1, 2, 4)
        for hierarchical in (False, True)
        for reshard in (True, False)
        for s in (1, 3)
    ]
    for found in run_ranks(4, _count, cases, ranks_per_node=2):
        for case, (predicted, counted) in zip(cases, found, strict=True):
            assert predicted == counted, case


def _shard_auto(rank: int, calibration: str) -> tuple[int, str]:
    os.environ["MICS_CALIBRATION"] = calibration
    try:
        model = mics.shard_model(Model(width=64, layers=4), shard_size="auto")
    finally:
        del os.environ["MICS_CALIBRATION"]
    size = sum(unit.layout().shard_numel for unit in units_of(model) if unit.parameters)
    return size, fail_text(lambda: mics.shard_model(Model(), shard_size="auto"), ValueError)


def test_auto_shards_over_what_fits(tmp_path: Path) -> None:
    p3dn = mics.load_calibration("p3dn")
    sizes = {}
    # States are 16 bytes for each of 144,000 parameters; activations of 2048 tokens are about 3 MB.
    for memory in (1e9, 6e6):
        file = tmp_path / f"{memory:.0f}.json"
        small = p3dn.replace(memory=memory, context=0, communicator=0)
        file.write_text(json.dumps(dump_calibration(small)))
        found = run_ranks(4, _shard_auto, str(file), ranks_per_node=2)
        assert len({size for size, _ in found}) == 1
        sizes[memory] = found[0][0]
        assert "needs the calibration of this cluster: got no GPU" in found[0][1]
    assert sizes[6e6] < sizes[1e9]
