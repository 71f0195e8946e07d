"""The training loop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

import torch_mics as mics
from gpt.checkpoint import Progress, check_same_run, find_checkpoint, mark_complete, step_directory
from gpt.cluster import Cluster
from gpt.config import TrainConfig
from gpt.data import TokenData, open_cache, prepare_cache
from gpt.meter import peak_flops, peak_memory_nbytes
from gpt.model import GPT, GPTConfig
from gpt.optim import learning_rate, make_optimizer
from gpt.plot import plot_losses
from gpt.report import Console, MetricsFile, StepStats, step_line
from gpt.sample import sample_tokens
from gpt.stop import StopRequest
from gpt.summary import add_traffic, header, write_summary

__all__ = ["Trainer", "run"]


class Trainer:
    """One run on one rank. Every method is collective: all ranks call it together."""

    def __init__(self, config: TrainConfig, cluster: Cluster, data: TokenData) -> None:
        self.config, self.cluster, self.data = config, cluster, data
        self.output_dir = Path(config.output_dir)
        mesh = mics.init_mesh(config.shard_size)
        self.partition_size = mesh.size(-1)

        torch.manual_seed(config.seed)  # the same initial weights on every rank
        shape = GPTConfig(
            vocab_size=data.tokenizer.vocab_size,
            layers=config.layers,
            heads=config.heads,
            width=config.width,
            activation_checkpointing=config.activation_checkpointing,
        )
        model = GPT(shape).to(cluster.device)
        self.num_parameters = model.num_parameters()
        self.flops_per_token = model.flops_per_token(config.sequence_length)
        self.model = mics.shard_model(
            model,
            mesh=mesh,
            hierarchical_gather=config.hierarchical_gather,
            mp_policy=None if config.precision == "fp32" else config.precision,
        )
        # The optimizer comes after sharding: it must see the sharded parameters.
        self.optimizer = make_optimizer(
            self.model, peak=config.learning_rate, weight_decay=config.weight_decay
        )
        self.scaler = GradScaler(cluster.device.type, enabled=config.precision == "fp16")
        self.progress = Progress()
        extras: dict[str, Any] = {"progress": self.progress}
        if self.scaler.is_enabled():
            extras["scaler"] = self.scaler
        self.state = mics.checkpoint.TrainState(self.model, self.optimizer, **extras)
        self.fixed = {
            "vocab_size": shape.vocab_size,
            "layers": shape.layers,
            "heads": shape.heads,
            "width": shape.width,
            "data": data.key,
            "loss_scaling": self.scaler.is_enabled(),
        }
        self.tokens_per_step = (
            config.batch_size
            * config.sequence_length
            * config.accumulation_steps
            * cluster.world_size
        )

    def resume(self) -> Path | None:
        """Loads the checkpoint that `--resume` names, and returns it."""
        directory = find_checkpoint(self.config.resume, self.output_dir)
        if directory is not None:
            check_same_run(directory, {"fixed": self.fixed})
            self.state.load(directory)
        return directory

    def save(self) -> None:
        """Writes a checkpoint; it becomes the latest one when every rank has written its part."""
        directory = step_directory(self.output_dir, self.progress.step)
        self.state.save(directory)
        self.cluster.barrier()
        run = {
            "step": self.progress.step,
            "world_size": self.cluster.world_size,
            "partition_size": self.partition_size,
            "fixed": self.fixed,
        }
        self.cluster.on_first(lambda: mark_complete(directory, run))

    def train_step(self, step: int, stop: StopRequest) -> dict[str, Any]:
        """Runs one step; returns its record, the same on every rank but for the memory."""
        config, cluster = self.config, self.cluster
        began, sent_before = time.perf_counter(), self._sent()
        rate = learning_rate(
            step, peak=config.learning_rate, warmup_steps=config.warmup_steps, steps=config.steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss_sum = torch.zeros((), device=cluster.device)
        for micro_step in range(config.accumulation_steps):
            first = (micro_step * cluster.world_size + cluster.world_rank) * config.batch_size
            tokens, targets = self.data.batch(step, first, config.batch_size)
            is_last = micro_step == config.accumulation_steps - 1
            with mics.microbatch(self.model, is_last=is_last):
                loss = self.model(tokens.to(cluster.device), targets.to(cluster.device))
                self.scaler.scale(loss / config.accumulation_steps).backward()
            loss_sum += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = mics.clip_grad_norm_(self.model.parameters(), config.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        sent = [after - before for after, before in zip(self._sent(), sent_before, strict=True)]
        total_loss, sent_inter, sent_intra, stopping = cluster.sum(
            [loss_sum.item(), *sent, float(stop.received)]
        )
        seconds = time.perf_counter() - began
        loss_mean = total_loss / (config.accumulation_steps * cluster.world_size)
        if not math.isfinite(loss_mean):
            raise RuntimeError(
                f"the loss must stay finite: got loss={loss_mean} (step={step}). "
                "Lower --learning-rate, or use --precision bf16 or fp32."
            )
        self.progress.step = step
        self.progress.seconds += seconds
        return {
            "step": step,
            "loss": loss_mean,
            "gradient_norm": float(norm),
            "learning_rate": rate,
            "tokens": self.tokens_per_step,
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_step / seconds,
            "sent_inter_nbytes": int(sent_inter),
            "sent_intra_nbytes": int(sent_intra),
            "memory_nbytes": peak_memory_nbytes(cluster.device),
            "stopping": bool(stopping),
        }

    def _sent(self) -> tuple[int, int]:
        counters = mics.traffic(self.model).values()
        inter = sum(counter["sent_inter_nbytes"] for counter in counters)
        return inter, sum(counter["sent_intra_nbytes"] for counter in counters)

    @torch.no_grad()
    def validate(self) -> float:
        """Returns the mean loss over the validation samples."""
        config, cluster = self.config, self.cluster
        self.model.eval()
        loss_sum, num_samples = 0.0, 0
        for tokens, targets, counted in self.data.validation_batches(
            config.validation_samples, config.batch_size, cluster.world_rank, cluster.world_size
        ):
            loss = self.model(tokens.to(cluster.device), targets.to(cluster.device))
            loss_sum += loss.item() * counted
            num_samples += counted
        self.model.train()
        total_loss, total_samples = cluster.sum([loss_sum, float(num_samples)])
        return total_loss / total_samples

    def sample(self) -> str:
        """Returns sampled text."""
        tokenizer = self.data.tokenizer
        tokens = sample_tokens(
            self.model,
            start=tokenizer.end,
            num_tokens=self.config.sample,
            context=self.config.sequence_length,
            seed=self.config.seed,
            device=self.cluster.device,
        )
        return tokenizer.decode(tokens)

    def loop(self, console: Console, metrics: MetricsFile) -> dict[str, Any]:
        """Trains from the current step to the end or to SIGTERM; returns the run's results."""
        config = self.config
        first_step, began = self.progress.step, time.perf_counter()
        window: list[dict[str, Any]] = []
        results: dict[str, Any] = {"status": "complete", "loss": None, "validation_loss": None}
        with StopRequest() as stop:
            for step in range(first_step + 1, config.steps + 1):
                record = self.train_step(step, stop)
                stopping = record.pop("stopping")
                last = step == config.steps
                window.append(record)
                if step % config.log_every == 0 or last or stopping:
                    pace = (time.perf_counter() - began) / (step - first_step)
                    console.line(step_line(self._stats(window, pace * (config.steps - step))))
                    window = []
                if config.validate_every and (step % config.validate_every == 0 or last):
                    record["validation_loss"] = results["validation_loss"] = self.validate()
                    width = len(str(config.steps)) + 1
                    console.line(
                        f"step {step:>{width}}/{config.steps} | "
                        f"validation loss {record['validation_loss']:.3f}"
                    )
                results["loss"] = record["loss"]
                if self.cluster.is_first:
                    metrics.write(record)
                due = config.checkpoint_every and (step % config.checkpoint_every == 0 or last)
                if due or stopping:
                    self.save()
                console.advance(step)
                if stopping and not last:
                    console.line(f"SIGTERM: saved step {step}; go on with --resume auto")
                    results["status"] = "stopped"
                    break
        return results

    def _stats(self, window: list[dict[str, Any]], seconds_left: float) -> StepStats:
        seconds = sum(record["seconds"] for record in window)
        speed = len(window) * self.tokens_per_step / seconds
        on_cuda = self.cluster.device.type == "cuda"
        return StepStats(
            step=window[-1]["step"],
            steps=self.config.steps,
            loss=window[-1]["loss"],
            gradient_norm=window[-1]["gradient_norm"],
            tokens_per_second=speed,
            world_size=self.cluster.world_size,
            sent_inter_nbytes=sum(r["sent_inter_nbytes"] for r in window) / len(window),
            memory_nbytes=window[-1]["memory_nbytes"],
            seconds_left=seconds_left,
            flops_per_second=speed * self.flops_per_token if on_cuda else None,
            peak_flops=(
                peak_flops(torch.cuda.get_device_name(self.cluster.device))
                if on_cuda and self.config.precision != "fp32"
                else None
            ),
        )


def run(config: TrainConfig, cluster: Cluster) -> None:
    """Does one whole run: data, model, training, results."""
    began = time.perf_counter()
    output_dir = Path(config.output_dir)
    find_checkpoint(config.resume, output_dir)  # a wrong --resume fails before the slow parts
    cache = cluster.on_first(
        lambda: prepare_cache(
            config.data, config.tokenizer, config.vocab_size, output_dir / "cache"
        )
    )
    data = open_cache(cache, config.sequence_length, config.seed)
    trainer = Trainer(config, cluster, data)
    resumed = trainer.resume()
    num_nodes, num_hosts = cluster.num_nodes(), cluster.num_hosts()
    first_step = trainer.progress.step
    metrics = MetricsFile(output_dir / "metrics.jsonl", first_step, writable=cluster.is_first)
    console = Console(enabled=cluster.is_first, steps=config.steps, first_step=first_step)
    for line in header(trainer, num_nodes, resumed):
        console.line(line)
    with console:
        results = trainer.loop(console, metrics)
    if first_step >= config.steps:
        console.line(f"step {first_step} of {config.steps} is done already; raise --steps to go on")
    if config.sample and results["status"] == "complete":
        results["sample"] = trainer.sample()
        console.line(f"sample | {results['sample']!r}")
    traffic = add_traffic(cluster.gather(mics.traffic(trainer.model)))
    if not cluster.is_first:
        return
    write_summary(
        output_dir / "summary.json",
        trainer,
        results,
        traffic,
        num_nodes=num_nodes,
        num_hosts=num_hosts,
        seconds=time.perf_counter() - began,
    )
    if not plot_losses(metrics.read(output_dir / "metrics.jsonl"), output_dir / "loss.png"):
        console.line("loss.png is not drawn: matplotlib is not installed")
    console.line(f"results are in {output_dir}")
