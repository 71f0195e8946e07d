"""The parts of examples/train_gpt.py that need neither torch_mics nor a process group."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from gpt.checkpoint import Progress, check_same_run, find_checkpoint, mark_complete, step_directory
from gpt.cluster import Cluster, name_simulated_node
from gpt.config import ConfigError, TrainConfig, parse_config, validate
from gpt.model import GPT, GPTConfig
from gpt.optim import learning_rate, make_optimizer
from gpt.plot import plot_losses
from gpt.report import Console, MetricsFile, StepStats, format_count, step_line
from gpt.sample import sample_tokens
from gpt.stop import StopRequest
from gpt.summary import add_traffic


def small_gpt(*, activation_checkpointing: bool = False, layers: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            vocab_size=257,
            layers=layers,
            heads=2,
            width=16,
            activation_checkpointing=activation_checkpointing,
        )
    )


# Command line.
def test_options_take_dashes() -> None:
    pytest.importorskip("jsonargparse")
    config = parse_config(
        ["--shard-size", "2", "--hierarchical-gather", "true", "--activation-checkpointing"]
        + ["--data", "a", "b", "--vocab-size", "300"]
    )
    assert config.shard_size == 2
    assert config.hierarchical_gather is True
    assert config.activation_checkpointing is True
    assert config.data == ("a", "b")
    assert config.vocab_size == 300


def test_options_default_to_the_dataclass() -> None:
    pytest.importorskip("jsonargparse")
    assert parse_config([]) == TrainConfig()


def test_options_print_a_config_that_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    with pytest.raises(SystemExit):
        parse_config(["--shard-size", "world", "--resume", "auto", "--print_config"])
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse_config(["--config", str(path)]) == TrainConfig(shard_size="world", resume="auto")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(heads=5), "heads must divide --width: got heads=5, width=128"),
        (TrainConfig(width=12, heads=4), "must be even"),
        (TrainConfig(steps=0), "--steps must be at least 1: got steps=0"),
        (TrainConfig(batch_size=0), "--batch-size must be at least 1"),
        (TrainConfig(shard_size=0), "--shard-size must be at least 1"),
        (TrainConfig(learning_rate=0.0), "--learning-rate must be positive"),
        (TrainConfig(tokenizer="byte", vocab_size=300), "byte has 257"),
        (TrainConfig(vocab_size=70000), "257..65536"),
    ],
)
def test_config_rules_name_the_values(config: TrainConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)


# Ranks.
def test_simulated_nodes_hold_consecutive_ranks() -> None:
    names = []
    for world_rank in range(4):
        environment = {"MICS_RANKS_PER_NODE": "2", "RANK": str(world_rank)}
        name_simulated_node(environment)
        names.append(environment["MICS_NODE_ID"])
    assert names == ["0", "0", "1", "1"]


def test_simulated_nodes_keep_a_given_name_and_reject_a_bad_number() -> None:
    environment = {"MICS_RANKS_PER_NODE": "2", "MICS_NODE_ID": "mine"}
    name_simulated_node(environment)
    assert environment["MICS_NODE_ID"] == "mine"
    with pytest.raises(ConfigError, match="MICS_RANKS_PER_NODE='0'"):
        name_simulated_node({"MICS_RANKS_PER_NODE": "0"})


def test_cluster_of_one_rank_needs_no_process_group() -> None:
    cluster = Cluster(world_rank=0, world_size=1, device=torch.device("cpu"))
    assert cluster.sum([1.5, 2.0]) == [1.5, 2.0]
    assert cluster.gather("x") == ["x"]
    assert cluster.on_first(lambda: 3) == 3
    assert cluster.num_nodes() == cluster.num_hosts() == 1


# Model.
def test_gpt_ties_head_and_embedding() -> None:
    model = small_gpt()
    assert model.head.weight is model.embedding.weight
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_gpt_starts_near_the_loss_of_a_uniform_guess() -> None:
    model = small_gpt()
    tokens, targets = torch.randint(257, (2, 4, 32))
    loss = model(tokens, targets)
    assert loss.item() == pytest.approx(math.log(257), abs=0.1)


def test_gpt_sees_no_later_token() -> None:
    model = small_gpt()
    tokens = torch.randint(257, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 257
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[0, :8], after[0, :8])
    assert not torch.allclose(before[0, 8:], after[0, 8:])


def test_gpt_sees_positions() -> None:
    # Without positions, attention over two orders of the same prefix would be equal.
    model = small_gpt()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight.mul_(50)
    first = model(torch.tensor([[1, 2, 3, 4]]))[0, -1]
    second = model(torch.tensor([[2, 1, 3, 4]]))[0, -1]
    assert (first - second).abs().max() > 1e-4


def test_gpt_scales_what_ends_in_the_residual_stream() -> None:
    model = small_gpt(layers=8)
    for block in model.blocks:
        assert block.mlp.project.weight.std().item() == pytest.approx(0.02 / 4, rel=0.2)
        assert block.mlp.expand.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_gpt_checkpointing_changes_no_gradient() -> None:
    tokens, targets = torch.randint(257, (2, 16)), torch.randint(257, (2, 16))
    gradients = []
    for activation_checkpointing in (False, True):
        model = small_gpt(activation_checkpointing=activation_checkpointing)
        model(tokens, targets).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_gpt_counts_flops_of_a_token() -> None:
    model = small_gpt()
    expected = 6 * sum(p.numel() for p in model.parameters()) + 12 * 2 * 16 * 64
    assert model.flops_per_token(64) == expected


# Optimizer.
def test_optimizer_decays_matrices_only() -> None:
    model = small_gpt()
    decayed, kept = make_optimizer(model, peak=1e-3, weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in kept["params"]} == {1}


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [learning_rate(s, peak=1.0, warmup_steps=4, steps=20) for s in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, peak=1.0, warmup_steps=0, steps=1) == pytest.approx(0.1)


# Checkpoints.
def make_checkpoint(output_dir: Path, step: int) -> Path:
    directory = step_directory(output_dir, step)
    directory.mkdir(parents=True)
    mark_complete(directory, {"step": step, "fixed": {"width": 128, "data": "k"}})
    return directory


def test_resume_finds_the_last_complete_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(None, tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is None
    first, second = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    step_directory(tmp_path, 30).mkdir()  # a save that was cut off
    for resume in ("auto", str(tmp_path), str(tmp_path / "checkpoints" / "latest"), str(second)):
        assert find_checkpoint(resume, tmp_path) == second
    assert find_checkpoint(str(first), tmp_path) == first


def test_resume_names_the_complete_checkpoints(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"resume='nowhere'.*step_00000010"):
        find_checkpoint("nowhere", tmp_path)


def test_resume_rejects_another_model(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, 10)
    check_same_run(directory, {"fixed": {"width": 128, "data": "k"}})
    with pytest.raises(ConfigError, match=r"width=64 \(saved: 128\)"):
        check_same_run(directory, {"fixed": {"width": 64, "data": "k"}})


def test_progress_restores_the_generator() -> None:
    progress = Progress()
    progress.step = 12
    torch.manual_seed(3)
    saved = progress.state_dict()
    expected = torch.rand(4)
    restored = Progress()
    restored.load_state_dict(saved)
    assert restored.step == 12
    assert torch.equal(torch.rand(4), expected)


def test_stop_request_remembers_sigterm_and_restores_the_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) == before


# Reports.
def make_stats(**changes: object) -> StepStats:
    values: dict[str, object] = {
        "step": 12,
        "steps": 60,
        "loss": 3.4121,
        "gradient_norm": 0.8312,
        "tokens_per_second": 41200.0,
        "world_size": 4,
        "sent_inter_nbytes": 12.3e6,
        "memory_nbytes": int(0.52 * 2**30),
        "seconds_left": 74.2,
    }
    return StepStats(**(values | changes))  # type: ignore[arg-type]


def test_step_line_on_cpu() -> None:
    assert step_line(make_stats()) == (
        "step  12/60 | loss 3.412 | gnorm 0.83 | 41.2k tok/s (10.3k/rank) | net 12.3 MB/step"
        " | mem 0.52 GiB | eta 0:01:14"
    )


def test_step_line_on_cuda_adds_flops() -> None:
    line = step_line(make_stats(flops_per_second=4 * 148.3e12, peak_flops=312e12))
    assert "(10.3k/rank) | 148.3 TFLOPS/GPU | MFU 47.5% | net" in line


@pytest.mark.parametrize(
    ("value", "text"), [(812, "812"), (41200, "41.2k"), (1.06e6, "1.06M"), (3.21e9, "3.21G")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert format_count(value) == text


def test_metrics_keep_only_what_the_checkpoint_holds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": math.inf if step == 3 else 1.0})
    assert json.loads(path.read_text().splitlines()[2]) == {"step": 3, "loss": None}
    MetricsFile(path, 3, writable=False)
    assert len(MetricsFile.read(path)) == 3
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a run that was killed while it wrote
    MetricsFile(path, 2).write({"step": 3, "loss": 0.5})
    assert [record["loss"] for record in MetricsFile.read(path)] == [1.0, 1.0, 0.5]


def test_console_prints_on_one_rank_only(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        with Console(enabled=enabled, steps=3) as console:
            console.line("[step] 1/3")
            console.advance(1)
    assert capsys.readouterr().out == "[step] 1/3\n"


def test_traffic_adds_ranks_by_communicator() -> None:
    first = {"gather/rail": {"calls": 1, "sent_inter_nbytes": 10}}
    second = {"gather/rail": {"calls": 2, "sent_inter_nbytes": 20}, "control": {"calls": 1}}
    assert add_traffic([first, second]) == {
        "gather/rail": {"calls": 3, "sent_inter_nbytes": 30},
        "control": {"calls": 1},
    }


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "validation_loss": 2.5}]
    assert plot_losses(records, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_the_same_for_the_same_seed() -> None:
    model = small_gpt()
    draws = [
        sample_tokens(
            model, start=256, num_tokens=12, context=8, seed=seed, device=torch.device("cpu")
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 12
    assert model.training
