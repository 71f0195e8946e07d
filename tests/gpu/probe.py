"""Trains one model in several ways on ranks that share one GPU, or on CPUs; tests/gpu.sh starts it.

Each mode (settings.py) gives one line of JSON from rank 0: losses, norms, times, memory, host
synchronisations. Environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; PROBE_DEVICE, PROBE_PER_NODE
(ranks of a simulated node), OUT (where traces go).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
# NCCL refuses two ranks of one host on one GPU. With a host each, they talk over sockets: right for
# correctness, order and the host's time, worthless for bandwidth.
os.environ.update(
    LOCAL_RANK="0",
    NCCL_HOSTID=f"rank{RANK}",
    NCCL_NET="Socket",
    NCCL_SOCKET_IFNAME="lo",
    NCCL_P2P_DISABLE="1",
    NCCL_SHM_DISABLE="1",
)
if per_node := os.environ.get("PROBE_PER_NODE"):
    os.environ["MICS_NODE_ID"] = f"node{RANK // int(per_node)}"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from settings import Mode, batch, make_model, make_optimizer  # noqa: E402
from torch import nn  # noqa: E402

import torch_mics as mics  # noqa: E402

DEVICE = os.environ.get("PROBE_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
FIRST_STEADY = 3  # steps before it allocate, plan and record


class Run:
    """One mode, step by step."""

    def __init__(self, mode: Mode, num_steps: int, num_micro_steps: int) -> None:
        self.mode = mode
        self.num_steps, self.num_micro_steps = num_steps, num_micro_steps
        self.model: Any = make_model(mode, DEVICE, WORLD_SIZE)
        self.optimizer = make_optimizer(mode, self.model)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0) if "fp16" in mode else None
        self.steps_begun = 0
        self.allocations: list[int] = []
        self.synchronisations: list[str] = []

    def batches(self, step: int) -> list[Any]:
        """This rank's micro-batches."""
        shape = self.mode.shape(DEVICE)
        found = (batch(shape, step, micro, RANK) for micro in range(self.num_micro_steps))
        return [tuple(part.to(DEVICE) for part in each) for each in found]

    def micro_steps(self, batches: list[Any]) -> torch.Tensor:
        """Forward and backward of all; gives the sum of the losses."""
        total = torch.zeros((), device=DEVICE)
        for number, each in enumerate(batches):
            self.steps_begun += number == 0
            if (
                "killed" in self.mode
                and self.steps_begun == 2
                and number == 1
                and RANK == WORLD_SIZE - 1
            ):
                os.kill(
                    os.getpid(), signal.SIGKILL
                )  # the others are in the collectives of this step
            is_last = number == len(batches) - 1
            if self.mode.is_ours:
                self.model.set_requires_gradient_sync(is_last)
            else:
                self.model.set_requires_all_reduce(is_last)
            loss = self.model(*each)
            if "between" in self.mode and number == 0:
                self.optimizer.zero_grad()
            part = loss / len(batches)
            (part if self.scaler is None else self.scaler.scale(part)).backward()
            total += loss.detach()
        return total

    def step(self, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; gives the sum of the losses and the norm of the gradients."""
        total = self.micro_steps(batches)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        clip = mics.clip_grad_norm_ if self.mode.is_ours else nn.utils.clip_grad_norm_
        norm: Any = clip(self.model.parameters(), 1.0)
        if "late" in self.mode and ON_GPU:
            torch.cuda._sleep(100_000_000)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if "keepgrad" in self.mode:
            self.optimizer.zero_grad(set_to_none=False)
        elif "between" not in self.mode:
            self.optimizer.zero_grad()
        return total, norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def disturb(self, step: int, batches: list[Any]) -> None:
        """What the mode asks for before a step."""
        if "boom" in self.mode and step == FIRST_STEADY:
            handle = self.model.blocks[1].register_forward_hook(_raise)
            with contextlib.suppress(ValueError):
                self.model(*batches[0])
            handle.remove()
            self.model.reset()

    @contextlib.contextmanager
    def counting(self, step: int) -> Any:
        """Notes the host synchronisations inside."""
        if "sync" not in self.mode or not ON_GPU or step < FIRST_STEADY:
            yield
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.synchronisations += [
            f"{w.filename}:{w.lineno}: {w.message}"
            for w in caught
            if "synchroniz" in str(w.message)
        ]

    def train(self) -> dict[str, Any]:
        """Takes all steps and gives what was measured."""
        losses, norms, times = [], [], []
        for step in range(self.num_steps):
            batches = self.batches(step)
            self.disturb(step, batches)
            _synchronize()
            dist.barrier()
            begin = time.perf_counter()
            with self.counting(step):
                total, norm = self.step(batches)
            _synchronize()
            times.append(round(1e3 * (time.perf_counter() - begin), 2))
            if "eval" in self.mode:
                with torch.no_grad():
                    self.model(*batches[0])
            value = total.cpu()
            dist.all_reduce(value)
            losses.append(value.item() / WORLD_SIZE / len(batches))
            norms.append(norm.item())
            if ON_GPU:
                self.allocations.append(torch.cuda.memory_stats()["num_device_alloc"])
        return {"losses": losses, "norms": norms, "ms": times, **self.measured()}

    def measured(self) -> dict[str, Any]:
        """Memory, and what carried the collectives."""
        found: dict[str, Any] = {"synchronisations": self.synchronisations}
        if ON_GPU:
            free, total = torch.cuda.mem_get_info()
            found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
            found["used_mib_of_all_ranks"] = round((total - free) / 2**20)
            found["allocations"] = self.allocations
        if self.mode.is_ours:
            found["backends"] = mics.backends(self.model)
            found["memory"] = dict(mics.memory(self.model))
            found["traffic"] = mics.traffic(self.model)
        return found

    def trace(self, path: Path) -> None:
        """Writes a trace of one step more, from rank 0."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
        batches = self.batches(99)
        with profile(activities=activities) as profiler:
            self.step(batches)
            _synchronize()
        if RANK == 0:
            profiler.export_chrome_trace(str(path))


def _raise(*_: Any) -> None:
    raise ValueError("as a script may")


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _run(text: str, num_steps: int, num_micro_steps: int) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        mode = Mode.parse(text, WORLD_SIZE)
        run = Run(mode, num_steps, num_micro_steps)
        result = run.train()
        if "trace" in mode:
            run.trace(Path(os.environ["OUT"]) / f"trace_{mode.contestant}.json.gz")
    except Exception as error:
        traceback.print_exc(limit=8)
        result = {"error": f"{type(error).__name__}: {error}"[:1500]}
    return {"mode": text, "seconds": round(time.perf_counter() - begin, 1), **result}


def main() -> None:
    """Runs the modes one after the other; the first that fails is the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="+")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-steps", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=60, help="seconds of a collective")
    asked = parser.parse_args()
    if ON_GPU:
        torch.cuda.set_device(0)
        torch.cuda.reset_peak_memory_stats()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ON_GPU else "gloo",
        timeout=datetime.timedelta(seconds=asked.timeout),
    )
    for text in asked.modes:
        result = _run(text, asked.steps, asked.micro_steps)
        if RANK == 0:
            print("RESULT " + json.dumps(result), flush=True)
        if "error" in result:
            mics.exit_rank(1)
        if ON_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    mics.exit_rank(0)


if __name__ == "__main__":
    main()
