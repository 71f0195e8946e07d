"""A device for tests without a GPU, of type "fakegpu": csrc/fake_device*.cc, which the C++ tests build.

    run_ranks(2, body, device="fakegpu")             # body: mics.init_mesh(2, device_type="fakegpu")
    core = fake_device.install()                     # in a rank: the module that looks inside

Its memory is the host's and its work is done at once by the kernels for CPUs, so what it computes is, bit
for bit, what the CPU computes. Like a GPU it refuses to mix its tensors with those of the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from support.built import load_built, needs_built

NAME = "fakegpu"
BACKEND = f"cpu:gloo,{NAME}:fakecomm"  # for torch.distributed.init_process_group
needs_fake_device = needs_built("fake_device")


@functools.cache
def install() -> Any:
    """Makes the device known to torch, and gives the module that looks inside."""
    core = load_built("fake_device")
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module(core))
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(
        "fakecomm", functools.partial(_make_backend, core), devices=[NAME]
    )
    return core


class Stream:
    """The only one: everything on it is done."""

    def synchronize(self) -> None:
        """Has nothing to wait for."""

    def wait_stream(self, other: Stream) -> None:
        """Has nothing to wait for."""


def _device_module(core: Any) -> types.ModuleType:
    """What torch.get_device_module() gives for the device."""
    module: Any = types.ModuleType(f"torch.{NAME}")

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        found = torch.device(NAME if device is None else device).index
        return core.current_device() if found is None else found

    @contextlib.contextmanager
    def device(chosen: Any) -> Iterator[None]:
        before = core.current_device()
        core.set_device(index(chosen))
        try:
            yield
        finally:
            core.set_device(before)

    def set_device(chosen: Any) -> None:
        core.set_device(index(chosen))
        module.is_started = True

    def manual_seed_all(seed: int) -> None:
        for each in range(core.num_devices()):
            core.default_generator(each).manual_seed(seed)

    module.device = device
    module.is_available = lambda: True
    module.is_started = True  # a test may set it to False
    module.is_initialized = lambda: module.is_started
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.device_count = core.num_devices
    module.current_device = core.current_device
    module.set_device = set_device
    module.manual_seed_all = manual_seed_all
    module.manual_seed = lambda seed: core.default_generator(-1).manual_seed(seed)
    module.get_rng_state = lambda device=None: core.default_generator(index(device)).get_state()
    module.set_rng_state = lambda state, device=None: core.default_generator(
        index(device)
    ).set_state(state)
    stream = Stream()
    module.Stream = Stream
    module.current_stream = lambda device=None: stream
    module.stream = lambda chosen: contextlib.nullcontext()
    module.synchronize = lambda device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def _make_backend(core: Any, store: dist.Store, rank: int, size: int, timeout: Any) -> dist.Backend:
    return core.over_host(
        dist.ProcessGroupGloo(dist.PrefixStore("fake", store), rank, size, timeout)
    )
