"""Links with a delay: TAP devices whose frames the relay holds back."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path

from isolation import NotPermitted

SOURCE = Path(__file__).with_name("relay.cc")
BUILD = Path(__file__).resolve().parents[2] / ".build" / "emulated_cluster"

# linux/if_tun.h
TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02


def build_relay() -> Path:
    """Compiles the relay when its source is newer. Gives the program.

    Raises:
        NotPermitted: there is no compiler, or it fails.
    """
    program = BUILD / "relay"
    if program.exists() and program.stat().st_mtime >= SOURCE.stat().st_mtime:
        return program
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise NotPermitted("links with a delay need a C++ compiler: got none. Set CXX.")
    BUILD.mkdir(parents=True, exist_ok=True)
    new = BUILD / f"relay.{os.getpid()}"
    command = [compiler, "-O2", "-std=c++20", "-o", str(new), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotPermitted(f"links with a delay need `{' '.join(command)}`: got {done.stderr}.")
    new.replace(program)
    return program


def open_tap(name: str) -> int:
    """Makes a TAP device in the network namespace of the caller. Gives its file.

    Raises:
        NotPermitted: the kernel has none, or refuses.
    """
    try:
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        # Frames pass as the kernel makes them, up to 64 kB, and are never split on the way.
        fcntl.ioctl(file, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    except OSError as error:
        raise NotPermitted(f"links with a delay need TAP devices: got {error}.") from error
    return file


class Relay:
    """The running relay of a network."""

    def __init__(self, files: list[int], delay_s: float, rate: int) -> None:
        """Starts it.

        Args:
            files: TAP devices of the nodes, in order; closed here.
            delay_s: from one node to another.
            rate: at which a node receives at most, in bits per second.
        """
        words = [str(build_relay()), str(round(delay_s * 1e6)), str(rate), *map(str, files)]
        self._process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, pass_fds=files, start_new_session=True
        )
        for file in files:
            os.close(file)

    def start_over(self) -> None:
        """Sets all counters to 0."""
        self._process.send_signal(signal.SIGUSR1)

    def stop(self) -> dict[str, object]:
        """Ends it, and with it the links. Gives what it counted; see relay.cc."""
        self._process.send_signal(signal.SIGTERM)
        text, _ = self._process.communicate()
        return json.loads(text)
