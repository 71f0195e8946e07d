"""Random states: of the CPU's generator, and of the device's, from which initialisers may draw too."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch

# A generator's state; or a seed, where the device's library has not been started and must not be.
State = bytes | int


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The states of both generators at one moment; `device` is None where there is only a CPU."""

    cpu: State
    device: State | None

    def to_json(self) -> list[Any]:
        """Gives what from_json() reads."""
        return [_to_json(self.cpu), _to_json(self.device)]

    @staticmethod
    def from_json(value: list[Any]) -> RandomState:
        """Reads what to_json() gave."""
        cpu, device = map(_from_json, value)
        assert cpu is not None
        return RandomState(cpu, device)


def _to_json(state: State | None) -> Any:
    return base64.b64encode(state).decode() if isinstance(state, bytes) else state


def _from_json(value: Any) -> State | None:
    return base64.b64decode(value) if isinstance(value, str) else value


def drawing_device(target: torch.device | None = None) -> torch.device | None:
    """Gives the device, beside the CPU, whose generator initialisers draw from; None: there is none.

    Args:
        target: where the tensors are; by default, and for tensors on the CPU, torch's current accelerator.
    """
    if target is None or target.type in ("cpu", "meta"):
        target = torch.accelerator.current_accelerator(check_available=True)
    if target is None or not hasattr(torch.get_device_module(target), "get_rng_state"):
        return None
    return torch.device(target.type) if target.index is None else target


class _Generator:
    """Reads and sets the state of one generator; `device` None: the CPU's."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device

    def read(self) -> State:
        if self._device is None:
            state: bytes = torch.get_rng_state().numpy().tobytes()
            return state
        module = torch.get_device_module(self._device)
        if not getattr(module, "is_initialized", lambda: True)():
            # Starting it would take memory of a device that the program may not want. Nothing has drawn
            # from it, so its seed, which torch.manual_seed() gives to all devices, tells all.
            return torch.initial_seed()
        state = module.get_rng_state(self._device).numpy().tobytes()
        return state

    def write(self, state: State) -> None:
        if isinstance(state, int):
            module = torch.get_device_module(self._device)
            index = None if self._device is None else self._device.index
            with module.device(module.current_device() if index is None else index):
                module.manual_seed(state)
            return
        tensor = torch.frombuffer(bytearray(state), dtype=torch.uint8)
        if self._device is None:
            torch.set_rng_state(tensor)
        else:
            torch.get_device_module(self._device).set_rng_state(tensor, self._device)


def random_state(device: torch.device | None = None) -> RandomState:
    """Gives the random states of the CPU and of `device`, by default drawing_device()."""
    device = device or drawing_device()
    return RandomState(_Generator(None).read(), _Generator(device).read() if device else None)


def set_random_state(state: RandomState, device: torch.device | None = None) -> None:
    """Sets the random states of the CPU and of `device`, by default drawing_device()."""
    device = device or drawing_device()
    _Generator(None).write(state.cpu)
    if device is not None and state.device is not None:
        _Generator(device).write(state.device)


class _Track:
    """One generator of a RandomStream."""

    def __init__(self, generator: _Generator) -> None:
        self._generator = generator
        self._left: dict[State, State] = {}
        self._seeds: dict[State, State] = {}  # by the state that a seed gives
        self.noted: State | None = None

    def go_to(self, noted: State) -> None:
        noted = self._seeds.get(noted, noted)
        if noted == self.noted:
            return
        if self.noted is not None:
            self._left[self.noted] = self._generator.read()
        self._generator.write(self._left.get(noted, noted))
        if isinstance(noted, int) and noted not in self._left:
            self._seeds[self._generator.read()] = noted
        self.noted = noted


class RandomStream:
    """The random states of one process that runs all constructions, one after the other.

    On the meta device nothing is drawn, so a recording may return to a state that it has left. The replay
    then goes on from where it left that state; each generator has left its own.

    Args:
        device: whose generator is drawn from beside the CPU's, or None.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._cpu = _Track(_Generator(None))
        self._device = None if device is None else _Track(_Generator(device))

    def go_to(self, noted: RandomState) -> None:
        """Sets the states that correspond to those noted on the meta device."""
        self._cpu.go_to(noted.cpu)
        if self._device is not None and noted.device is not None:
            self._device.go_to(noted.device)

    def is_at(self, noted: RandomState) -> None:
        """Says that the present states correspond to those noted: both processes have drawn."""
        self._cpu.noted = noted.cpu
        if self._device is not None:
            self._device.noted = noted.device

    def go_on_at(self, now: RandomState) -> None:
        """Ends a replay: returns to `now` what the program has set since the last construction."""
        if self._cpu.noted is not None:
            self.go_to(now)
