"""Namespaces of Linux, so that nothing of an emulated cluster can outlive it or leave it.

Everything runs below one process that is number 1 of a PID namespace of its own. It gets SIGKILL when
the process that started it ends, however that ends, and the kernel then kills all that is below it.
Network namespaces have no names: with their last process go their links, addresses and shaping.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Iterator

# linux/sched.h, sys/mount.h, linux/prctl.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG = 1

SECONDS_TO_END = 5.0

_libc = ctypes.CDLL(None, use_errno=True)


class NotPermitted(RuntimeError):
    """The kernel, or the container, does not let this process do it."""


def _system(what: str, result: int) -> None:
    if result != 0:
        reason = os.strerror(ctypes.get_errno())
        raise NotPermitted(f"an emulated cluster must be able to {what}: got {reason}.")


def unshare(flags: int, what: str) -> None:
    """Puts this process, or for PIDs its children, into new namespaces."""
    _system(what, _libc.unshare(flags))


class Place:
    """A network namespace and a host name of their own."""

    def __init__(self, host_name: str) -> None:
        before = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
        unshare(CLONE_NEWNET | CLONE_NEWUTS, "make network and host name namespaces")
        encoded = host_name.encode()
        _system("set a host name", _libc.sethostname(encoded, len(encoded)))
        self._files = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
        _enter(before)
        for file in before:
            os.close(file)

    @property
    def path(self) -> str:
        """Names the network namespace for iproute2."""
        return f"/proc/{os.getpid()}/fd/{self._files[0]}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, this process, which must have one thread, and those that it starts are in the place."""
        before = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts")]
        _enter(self._files)
        try:
            yield
        finally:
            _enter(before)
            for file in before:
                os.close(file)


def _enter(files: list[int]) -> None:
    for file in files:
        _system("enter a namespace", _libc.setns(file, 0))


class Ended(BaseException):
    """A signal has asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _raise_ended(number: int, _frame: object) -> None:
    raise Ended(number)


def run_isolated(body: Callable[[], int]) -> int:
    """Runs `body` as number 1 of new PID, mount, network and host name namespaces.

    SIGINT, SIGTERM and SIGHUP end it, and with it everything that it started.

    Returns:
        What `body` returns, or 128 and the signal's number.

    Raises:
        NotPermitted: this process may not make the namespaces.
    """
    unshare(CLONE_NEWPID, "make a PID namespace")
    alive, mine = os.pipe()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        signal.signal(number, _raise_ended)
    child = os.fork()
    if child == 0:
        os.close(mine)
        os._exit(_as_first(body, alive))
    os.close(alive)
    ended = 0
    while True:
        try:
            _, status = os.waitpid(child, 0)
            break
        except Ended as signalled:
            ended = signalled.number
            _end(child)
    code = os.waitstatus_to_exitcode(status)
    return 128 + ended if ended else (code if code >= 0 else 128 - code)


def _end(child: int) -> None:
    """Asks `child` to end, and kills it if it has not ended in time."""
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)


def _as_first(body: Callable[[], int], alive: int) -> int:
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([alive], [], [], 0)[0]:  # the parent has ended already
            return 1
        unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS, "make mount and network namespaces")
        # Process ids in /proc are those of the new namespace; nobody else sees this mount.
        _system(
            "make its mounts private", _libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        )
        _system("mount /proc", _libc.mount(b"proc", b"/proc", b"proc", 0, None))
        return body()
    except Ended as signalled:
        return 128 + signalled.number
    except NotPermitted as error:
        print(error, flush=True)
        return NOT_PERMITTED
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


NOT_PERMITTED = 77  # what test runners take for "skipped"
