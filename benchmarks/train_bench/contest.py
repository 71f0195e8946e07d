"""Contestants take turns, step by step, on the same batches; each step is timed, checked and counted."""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from contestant import Contestant, first_line
from torch import nn

TOLERANCE = 1e-5  # of losses, and relative of gradient norms

Loss = Callable[[nn.Module, int, int, int], torch.Tensor]  # (model, step, micro-step, rank)


@dataclasses.dataclass
class Record:
    """What one contestant did. Times are of the slowest rank; bytes of this rank's node."""

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    exposed: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)  # of all ranks together
    counted_intra_nbytes: int = 0  # of one step, of all ranks of the node
    counted_inter_nbytes: int = 0
    link_nbytes: float | None = None  # median of the steps; None without a link: see interfaces()
    loopback_nbytes: float | None = None
    parity: str = "not checked"
    why_not: str = ""  # the message, if it did not run


def interfaces() -> tuple[str | None, str]:
    """Names the link that GLOO_SOCKET_IFNAME asks for, None if that is no link, and the loopback."""
    loopback = socket.if_indextoname(1)  # Linux: in every network namespace
    link = os.environ.get("GLOO_SOCKET_IFNAME")
    return None if link == loopback else link, loopback


def sent_nbytes() -> tuple[int | None, int | None]:
    """Gives the bytes that this network namespace has sent over the link and over the loopback."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    counters = {name.strip(): rest.split() for name, _, rest in (x.partition(":") for x in lines)}
    link, loopback = (int(counters[name][8]) if name in counters else None for name in interfaces())
    return link, loopback


def one_process(
    model: nn.Module, optimizer: Any, loss: Loss, steps: int, micro_steps: int, world_size: int
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one process that sees the batches of all ranks."""
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for micro_step in range(micro_steps):
            for rank in range(world_size):
                part = loss(model, step, micro_step, rank) / (world_size * micro_steps)
                part.backward()
                total += part.item()
        losses.append(total)
        gradients = [
            p.grad.double().square().sum() for p in model.parameters() if p.grad is not None
        ]
        norms.append(torch.stack(gradients).sum().sqrt().item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def _over_ranks(values: list[float], how: Any) -> list[float]:
    """Gives the largest, or the sum, of each value over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=how)
    return tensor.tolist()


def sum_over_node(values: Iterable[int], ranks_per_node: int) -> list[int]:
    """Adds up numbers of this rank over the ranks of its node."""
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, list(values))
    first = dist.get_rank() // ranks_per_node * ranks_per_node
    return [sum(column) for column in zip(*everyone[first : first + ranks_per_node], strict=True)]


class Contest:
    """Runs contestants in turn and keeps their records."""

    def __init__(
        self, contestants: list[Contestant], loss: Loss, micro_steps: int, ranks_per_node: int
    ) -> None:
        self._contestants = contestants
        self._loss = loss
        self._micro_steps = micro_steps
        self._ranks_per_node = ranks_per_node
        self._links: dict[str, list[tuple[int | None, int | None]]] = {}
        self._device = next(contestants[0].model.parameters()).device
        self.records = {
            contestant.name: Record(why_not=contestant.why_not) for contestant in contestants
        }

    def turn(self, step: int, is_timed: bool) -> None:
        """Runs one step of every contestant, starting with another one each time. Collective."""
        first = step % len(self._contestants)
        for contestant in self._contestants[first:] + self._contestants[:first]:
            if self.records[contestant.name].why_not:
                continue
            try:
                self._step(contestant, step, is_timed)
            except Exception as error:
                if step > 0 or not contestant.may_fail:
                    raise
                # If a peer cannot run this, it cannot on any rank.
                self.records[contestant.name].why_not = first_line(error)

    def _step(self, contestant: Contestant, step: int, is_timed: bool) -> None:
        record = self.records[contestant.name]
        counted, exposed = contestant.counted(), contestant.exposed()
        dist.barrier()
        before = sent_nbytes()
        start, cpu_start = time.perf_counter(), time.process_time()
        total = torch.zeros((), device=self._device)
        for micro_step in range(self._micro_steps):
            with contestant.micro_step(micro_step == self._micro_steps - 1):
                loss = self._loss(contestant.model, step, micro_step, dist.get_rank())
                contestant.backward(loss, self._micro_steps)
            total += loss.detach()
        norm = None if is_timed else contestant.gradient_norm()
        contestant.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        dist.barrier()
        after = sent_nbytes()
        dist.all_reduce(total)
        record.losses.append(total.item() / dist.get_world_size() / self._micro_steps)
        if norm is not None:
            record.norms.append(norm)
            return
        record.seconds.append(seconds)
        record.cpu.append(cpu)
        record.exposed.append(contestant.exposed() - exposed)
        differences = tuple(
            None if b is None or a is None else a - b for b, a in zip(before, after, strict=True)
        )
        self._links.setdefault(contestant.name, []).append(differences)  # type: ignore[arg-type]
        intra, inter = (now - then for now, then in zip(contestant.counted(), counted, strict=True))
        record.counted_intra_nbytes, record.counted_inter_nbytes = intra, inter

    def finish(self, reference: tuple[list[float], list[float]] | None) -> dict[str, Record]:
        """Joins what all ranks measured, and compares with one process. Collective."""
        for contestant in self._contestants:
            record = self.records[contestant.name]
            if record.why_not:
                continue
            record.seconds = _over_ranks(record.seconds, dist.ReduceOp.MAX)
            record.cpu = _over_ranks(record.cpu, dist.ReduceOp.SUM)
            record.counted_intra_nbytes, record.counted_inter_nbytes = sum_over_node(
                (record.counted_intra_nbytes, record.counted_inter_nbytes), self._ranks_per_node
            )
            links = self._links.get(contestant.name, [])
            for place, field in enumerate(("link_nbytes", "loopback_nbytes")):
                values = [pair[place] for pair in links if pair[place] is not None]
                setattr(record, field, statistics.median(values) if values else None)
            if reference is not None:
                record.parity = _parity(record, *reference)
        return self.records


def _parity(record: Record, losses: list[float], norms: list[float]) -> str:
    """ "exact" within the tolerance, or what differs most."""
    loss = max(abs(a - b) for a, b in zip(record.losses, losses, strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(record.norms, norms, strict=False))
    if loss <= TOLERANCE and norm <= TOLERANCE:
        return "exact"
    return f"loss differs by {loss:.1e}, gradient norm by {norm:.1e}"
