"""Nodes joined by a bridge, each link shaped both ways, with counters of each link.

    node 0: e0 ---- p0
    node 1: e0 ---- p1    a bridge in the namespace of the cluster itself, or the relay (delayed.py)
    node n: e0 ---- pn

The shaper of e0 limits what a node sends, that of its port p what it receives. Ranks of one node reach
each other over its loopback, which may have a rate of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from pathlib import Path

from delayed import Relay, open_tap
from isolation import NotPermitted, Place

MTU = 9000
SUBNET = "10.77.0"
CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")
# Above this rate a burst must be longer, or the shaper misses its rate between two timer ticks.
FAST_BPS = 1_000_000_000
UNITS = {"gbit": 10**9, "mbit": 10**6, "kbit": 10**3, "bit": 1}


def bits_per_second(text: str) -> int:
    """Reads "500mbit", as tc writes rates."""
    for unit, factor in UNITS.items():
        if text.endswith(unit):
            return round(float(text[: -len(unit)]) * factor)
    raise ValueError(f'a rate must be as "500mbit" or "1gbit": got "{text}".')


@dataclasses.dataclass(frozen=True)
class Counters:
    """Counters of one interface: bytes with headers, and packets that a shaper dropped."""

    sent_nbytes: int
    received_nbytes: int
    dropped: int

    def since(self, before: Counters) -> Counters:
        return Counters(
            self.sent_nbytes - before.sent_nbytes,
            self.received_nbytes - before.received_nbytes,
            self.dropped - before.dropped,
        )


def tool(*command: str) -> str:
    """Runs ip or tc here.

    Raises:
        NotPermitted: it failed; its own message is quoted.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotPermitted(
            f"an emulated cluster needs `{' '.join(command)}`: got {done.stderr.strip()}."
        )
    return done.stdout


class Network:
    """Links of `num_nodes` nodes, inside the namespace of the caller, who must be isolated."""

    def __init__(
        self, num_nodes: int, rate: int, local_rate: int | None = None, delay_s: float = 0.0
    ) -> None:
        """Makes them.

        Args:
            rate: of each node's link, each way, in bits per second.
            local_rate: of each node's loopback; None: as fast as the machine is.
            delay_s: from one node to another.

        Raises:
            NotPermitted: the kernel cannot do it.
        """
        self.nodes = [Place(f"emulated-{index}") for index in range(num_nodes)]
        self.relay: Relay | None = None
        tool("ip", "link", "set", "lo", "up")
        gso = ("mtu", str(MTU), "gso_max_size", "17800" if rate <= FAST_BPS else "35600")
        if delay_s > 0:
            taps = []
            for node in self.nodes:
                with node.entered():
                    taps.append(open_tap("e0"))
            self.relay = Relay(taps, delay_s, rate)
        else:
            self._join(gso, rate)
        for index, node in enumerate(self.nodes):
            with node.entered():
                self._set_up(index, gso, rate, local_rate)

    def _join(self, gso: tuple[str, ...], rate: int) -> None:
        bridge = ("type", "bridge", "stp_state", "0", "mcast_snooping", "0")
        tool("ip", "link", "add", "bridge", *bridge)
        tool("ip", "link", "set", "bridge", "mtu", str(MTU), "up")
        for index, node in enumerate(self.nodes):
            port = f"p{index}"
            tool(
                *("ip", "link", "add", port, "type", "veth"),
                *("peer", "name", "e0", "netns", node.path),
            )
            tool("ip", "link", "set", port, *gso, "master", "bridge", "up")
            _shape(port, rate)

    def _set_up(self, index: int, gso: tuple[str, ...], rate: int, local_rate: int | None) -> None:
        """Sets up one node, from inside its namespaces."""
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        tool("ip", "link", "set", "lo", "up")
        tool("ip", "addr", "add", f"{self.address(index)}/24", "dev", "e0")
        # The relay finds a node by the end of its address.
        address = f"02:00:00:00:{index >> 8:02x}:{index & 255:02x}"
        tool("ip", "link", "set", "e0", *gso, "address", address, "up")
        _shape("e0", rate)
        if local_rate is not None:
            _shape("lo", local_rate, burst="128kb", limit="4mb")
        # bbr shares a link unevenly between the messages of an all-to-all.
        for name in ("cubic", "reno"):
            with contextlib.suppress(OSError):  # the host may not allow it
                CONGESTION_CONTROL.write_text(name)
                break

    def address(self, node: int) -> str:
        """Gives a node's address on the bridge."""
        return f"{SUBNET}.{node + 1}"

    def congestion_control(self) -> str:
        """Names the congestion control that the nodes' sockets use."""
        with self.nodes[0].entered():
            return CONGESTION_CONTROL.read_text().strip()

    def counters(self) -> dict[str, Counters]:
        """Reads all counters: "node 0 link", "node 0 loopback", and without a delay "node 0 port"."""
        found = {}
        ports = _read_counters()
        for index, node in enumerate(self.nodes):
            with node.entered():
                inside = _read_counters()
            found[f"node {index} link"] = inside["e0"]
            found[f"node {index} loopback"] = inside["lo"]
            if self.relay is None:
                found[f"node {index} port"] = ports[f"p{index}"]
        return found


def _shape(interface: str, rate: int, burst: str | None = None, limit: str = "4mb") -> None:
    # Too long a burst passes unshaped after a pause; one shorter than a packet splits packets in software.
    # The queue must hold what many senders send at once: a link that drops would be another link.
    burst = burst or ("20kb" if rate <= FAST_BPS else "40kb")
    tool(
        *("tc", "qdisc", "add", "dev", interface, "root"),
        *("tbf", "rate", f"{rate}bit", "burst", burst, "limit", limit),
    )


def _read_counters() -> dict[str, Counters]:
    dropped = {
        queue["dev"]: queue.get("drops", 0)
        for queue in json.loads(tool("tc", "-s", "-j", "qdisc", "show"))
        if queue["kind"] == "tbf"
    }
    found = {}
    for link in json.loads(tool("ip", "-s", "-j", "link", "show")):
        name, stats = link["ifname"], link["stats64"]
        found[name] = Counters(stats["tx"]["bytes"], stats["rx"]["bytes"], dropped.get(name, 0))
    return found
