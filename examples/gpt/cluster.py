"""The ranks of the job, this rank's device, and the few collectives the trainer needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gpt.config import ConfigError

__all__ = ["Cluster", "name_simulated_node", "open_cluster"]

T = TypeVar("T")


def name_simulated_node(environment: MutableMapping[str, str]) -> None:
    """Splits one machine into simulated nodes of MICS_RANKS_PER_NODE ranks, if that is set.

    Raises:
        ConfigError: MICS_RANKS_PER_NODE is not a positive number.
    """
    text = environment.get("MICS_RANKS_PER_NODE")
    if text is None:
        return
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            "MICS_RANKS_PER_NODE must be a positive number: got "
            f"MICS_RANKS_PER_NODE={text!r}. Unset it to use the real nodes."
        )
    world_rank = int(environment.get("RANK", "0"))
    environment.setdefault("MICS_NODE_ID", str(world_rank // int(text)))


@dataclass(frozen=True)
class Cluster:
    """This rank's place in the job. Every method is collective unless it says otherwise."""

    world_rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is world rank 0, the one that writes. Not collective."""
        return self.world_rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Adds `values` over all ranks, element by element."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """Collects one picklable value per rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 while the others wait; all get its result, or all raise.

        Raises:
            ConfigError: `work` raised it on rank 0.
            RuntimeError: `work` raised anything else on rank 0, which itself raises that.
        """
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            try:
                outcome[0] = work()
            except Exception as caught:  # raised below on every rank, so that none waits for ever
                error = caught
                outcome[1] = (isinstance(caught, ConfigError), str(caught))
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if error is not None:
            raise error
        if outcome[1] is not None:
            expected, text = outcome[1]
            raise ConfigError(text) if expected else RuntimeError(f"world rank 0 failed: {text}")
        return outcome[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.sum([0.0])

    def num_nodes(self) -> int:
        """Counts the nodes, real or simulated."""
        return len(set(self.gather(os.environ.get("MICS_NODE_ID") or socket.gethostname())))

    def num_hosts(self) -> int:
        """Counts the distinct host names."""
        return len(set(self.gather(socket.gethostname())))


def open_cluster(device: str) -> Cluster:
    """Joins the process group torchrun describes; without a launcher, a world of one.

    Args:
        device: "cpu", "cuda" or "auto".

    Raises:
        ConfigError: there is no CUDA device for this rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    world_rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = torch.device("cpu")
    if device == "cuda":
        num_devices = torch.cuda.device_count()
        if local_rank >= num_devices:
            raise ConfigError(
                f"every rank of a node needs its own CUDA device: got local_rank={local_rank}, "
                f"devices={num_devices} (world_rank={world_rank}). "
                "Start fewer processes per node or use --device cpu."
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if world_size > 1:
        if device == "cuda":
            dist.init_process_group("nccl", device_id=place)
        else:
            dist.init_process_group("gloo")
    return Cluster(world_rank=world_rank, world_size=world_size, device=place)
