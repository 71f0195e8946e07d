"""The ranks of an emulated cluster: one process each, with the environment that torchrun gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from network import Network

MASTER_PORT = 29500
GRACE_S = 10.0  # for the others when one has failed
TAIL_NBYTES = 4000


def environment(
    network: Network, node: int, local_rank: int, ranks_per_node: int
) -> dict[str, str]:
    """Gives what torchrun sets, and the interfaces to use. Ranks are numbered node by node."""
    num_nodes = len(network.nodes)
    return {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "RANK": str(node * ranks_per_node + local_rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(num_nodes * ranks_per_node),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "GROUP_WORLD_SIZE": str(num_nodes),
        "MASTER_ADDR": network.address(0),
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": "e0",
        "NCCL_SOCKET_IFNAME": "e0",
    }


def run_ranks(
    network: Network,
    ranks_per_node: int,
    command: list[str],
    logs: Path,
    timeout_s: float | None,
) -> int:
    """Runs `command` once per rank. Rank 0 writes to the terminal, the others to files in `logs`.

    Returns:
        0, or the first other exit status, after which the other ranks get 10 s; 124 after a time-out.
        The end of the failing rank's output is printed.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    for node, place in enumerate(network.nodes):
        with place.entered():
            for local_rank in range(ranks_per_node):
                output = None if not ranks else _log(logs, len(ranks)).open("wb")
                ranks.append(
                    subprocess.Popen(
                        command,
                        env=environment(network, node, local_rank, ranks_per_node),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output and subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
                if output is not None:
                    output.close()
    try:
        return _wait(ranks, logs, timeout_s)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
                rank.wait()


def _log(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.log"


def _wait(ranks: list[subprocess.Popen[bytes]], logs: Path, timeout_s: float | None) -> int:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    status = 0
    while any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
        failed = [index for index, rank in enumerate(ranks) if rank.returncode not in (None, 0)]
        if status == 0 and failed:
            code = ranks[failed[0]].returncode
            status = code if code > 0 else 128 - code
            _show(logs, failed[0], f"ended with status {status}")
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            if status == 0:
                print(f"the ranks did not end within {timeout_s:.0f} s.", file=sys.stderr)
            return status or 124
    codes = [rank.returncode for rank in ranks]
    first = next((index for index, code in enumerate(codes) if code != 0), None)
    if status == 0 and first is not None:
        status = codes[first] if codes[first] > 0 else 128 - codes[first]
        _show(logs, first, f"ended with status {status}")
    return status


def _show(logs: Path, rank: int, what: str) -> None:
    print(f"rank {rank} {what}.", file=sys.stderr)
    if rank != 0:
        tail = _log(logs, rank).read_bytes()[-TAIL_NBYTES:]
        print(tail.decode(errors="replace"), file=sys.stderr)
