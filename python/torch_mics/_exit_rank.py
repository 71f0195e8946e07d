"""exit_rank: ends a process whose collectives torch may still be letting go of."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def exit_rank(status: int = 0) -> NoReturn:
    """Ends this rank at once: its output is written, nothing is destroyed, no atexit handler runs.

    A thread of Gloo lets go of the tensors of a script's last collectives, and needs the GIL for it. When
    the interpreter ends meanwhile the process aborts; when a process group is destroyed meanwhile, by
    destroy_process_group() or with the model that holds it, the process hangs. Call this as the last line,
    where process group and models still exist. With `status` 0 it is collective: no rank takes its sockets
    away while another is in a collective. See docs/errors.md#a-cpu-rank-aborts-or-hangs-at-its-end.

    Args:
        status: of the process. Other than 0 waits for nobody.

    Raises:
        RuntimeError: another rank has ended before, so that it cannot be waited for.
    """
    if status == 0 and dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
