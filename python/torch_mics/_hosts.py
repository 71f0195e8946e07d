"""Where this rank runs: its host, and its node."""

from __future__ import annotations

import os
import pathlib
import socket


def host() -> str:
    """Identifies the host by its name and boot id."""
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text().strip() if boot_id.exists() else "unknown boot"
    return f"{socket.gethostname()}/{boot}"


def node() -> str:
    """Names this rank's node: MICS_NODE_ID if set, else the host."""
    return os.environ.get("MICS_NODE_ID") or host()
