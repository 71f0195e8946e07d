"""Whether a run on this machine can be trusted: link rates, processor time, timers, drops."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from network import Counters, Network

PROBE_PORT = 5001
WARM_UP_S, PROBE_S = 0.3, 1.0
CHUNK_NBYTES = 1 << 18
TICK_S = 0.01
QUIET_S, QUIET_LIMIT_S = 0.2, 10.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Beyond these, the times of a run cannot be trusted."""

    cpu: float = 0.70  # mean share of all cores
    link: float = 0.90  # least share of its rate that a link must reach when all are busy
    timer_s: float = 0.005  # by which 99 of 100 sleeps may end late


class Watch:
    """Measures the machine from its start to stop()."""

    def __init__(self) -> None:
        self._busy, self._total = _processor_ticks()
        self._pressure = _pressure_us()
        self._begin = time.monotonic()
        reading, writing = os.pipe()
        self._file = os.fdopen(reading)
        self._child = os.fork()  # a process: a thread would wait for the GIL of this one
        if self._child == 0:
            _measure_lateness(writing)
        os.close(writing)

    def stop(self) -> dict[str, float]:
        """Gives what was measured: shares of processor time, and lateness of timers in seconds."""
        os.kill(self._child, signal.SIGUSR1)
        late = sorted(json.loads(self._file.read()))
        os.waitpid(self._child, 0)
        busy, total = _processor_ticks()
        seconds = time.monotonic() - self._begin
        return {
            "seconds": seconds,
            "cpu": (busy - self._busy) / max(total - self._total, 1),
            "cpu_pressure": (_pressure_us() - self._pressure) / 1e6 / seconds,
            "timer_median_s": late[len(late) // 2],
            "timer_p99_s": late[len(late) * 99 // 100],
        }


def _processor_ticks() -> tuple[int, int]:
    """Busy and all ticks of all cores since boot."""
    fields = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _pressure_us() -> int:
    """Microseconds in which something waited for a core, since boot; 0 if the kernel does not count it."""
    try:
        return int(Path("/proc/pressure/cpu").read_text().split("total=")[1].split()[0])
    except OSError:
        return 0


def _measure_lateness(writing: int) -> None:
    late: list[float] = []

    def answer(_number: int, _frame: object) -> None:
        with os.fdopen(writing, "w") as file:
            json.dump(late or [0.0], file)
        os._exit(0)

    signal.signal(signal.SIGUSR1, answer)
    while True:
        wanted = time.monotonic() + TICK_S
        time.sleep(TICK_S)
        late.append(time.monotonic() - wanted)


def probe(network: Network) -> list[float]:
    """Lets all nodes send to the next one at once. Gives the bytes per second that each received."""
    files, children = [], []
    for index, node in enumerate(network.nodes):
        reading, writing = os.pipe()
        following = network.address((index + 1) % len(network.nodes))
        with node.entered():
            child = os.fork()
            if child == 0:
                rate = _send_and_receive(network.address(index), following)
                os.write(writing, json.dumps(rate).encode())
                os._exit(0)
        os.close(writing)
        files.append(os.fdopen(reading))
        children.append(child)
    texts = [file.read() for file in files]
    for child in children:
        os.waitpid(child, 0)
    _wait_until_quiet(network)
    return [float(json.loads(text)) if text else 0.0 for text in texts]


def _wait_until_quiet(network: Network) -> None:
    """Waits for bytes that are still on their way: they would be counted for the run that follows."""
    before, end = network.counters(), time.monotonic() + QUIET_LIMIT_S
    while time.monotonic() < end:
        time.sleep(QUIET_S)
        now = network.counters()
        if now == before:
            return
        before = now


def _send_and_receive(own: str, following: str) -> float:
    server = socket.create_server((own, PROBE_PORT))

    def send() -> None:
        deadline = time.monotonic() + 10.0
        while True:
            try:
                sender = socket.create_connection((following, PROBE_PORT), timeout=1.0)
                break
            except OSError:  # it does not listen yet
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
        data = bytes(CHUNK_NBYTES)
        end = time.monotonic() + WARM_UP_S + PROBE_S + 1.0  # so that the receiver never waits
        with sender:
            while time.monotonic() < end:
                try:
                    sender.sendall(data)
                except OSError:
                    return

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    server.settimeout(15.0)
    receiver, _ = server.accept()
    buffer = bytearray(CHUNK_NBYTES)
    nbytes = 0
    warm = time.monotonic() + WARM_UP_S
    while time.monotonic() < warm:
        receiver.recv_into(buffer)
    begin = time.monotonic()
    while (now := time.monotonic()) < begin + PROBE_S:
        nbytes += receiver.recv_into(buffer)
    # The others still measure: receive until they have ended.
    threading.Thread(target=_drain, args=(receiver,), daemon=True).start()
    sender.join()
    return nbytes / (now - begin)


def _drain(receiver: socket.socket) -> None:
    try:
        while receiver.recv(CHUNK_NBYTES):
            pass
    except OSError:
        pass


def broken(
    limits: Limits,
    machine: dict[str, float],
    probed: list[float],
    rate: int,
    links: dict[str, Counters],
    relayed: dict[str, object] | None,
) -> list[str]:
    """Lists in words what makes the times of a run worthless; its bytes are still right."""
    found = []
    if machine["cpu"] > limits.cpu:
        found.append(f"processors were busy for {machine['cpu']:.0%}: at most {limits.cpu:.0%}")
    if machine["timer_p99_s"] > limits.timer_s:
        found.append(
            f"1 of 100 sleeps ended {machine['timer_p99_s'] * 1e3:.1f} ms late: at most "
            f"{limits.timer_s * 1e3:.1f} ms"
        )
    for index, received in enumerate(probed):
        share = received * 8 / rate
        if share < limits.link:
            found.append(
                f"node {index} received {share:.0%} of its rate in the probe: at least "
                f"{limits.link:.0%}"
            )
    for name, counters in links.items():
        if counters.dropped:
            found.append(f"{name} dropped {counters.dropped} packets: none")
    if relayed is not None and relayed["dropped"]:
        found.append(f"the relay dropped {relayed['dropped']} frames: none")
    return found
