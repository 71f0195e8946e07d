"""exit_rank: ends a process while torch may still be releasing its last collectives."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def exit_rank(status: int = 0) -> NoReturn:
    """Ends this rank at once: output is flushed, no object is destroyed, and no atexit handler runs.

    A thread of Gloo releases the tensors of a script's last collectives, and needs the GIL for it. If the
    interpreter ends meanwhile, the process aborts. If a process group is destroyed meanwhile, by
    destroy_process_group() or with the model that holds it, the process hangs. Call this as the last line,
    while process group and models still exist. With `status` 0 it is collective: no rank closes its sockets
    while another is in a collective. See docs/errors.md#a-cpu-rank-aborts-or-hangs-at-its-end.

    Args:
        status: exit status of the process. With any other than 0 it waits for no other rank.

    Raises:
        RuntimeError: another rank has already ended, so it cannot be waited for.
    """
    if status == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
