"""MiCS for PyTorch: sharded data parallelism whose cost does not grow with the cluster."""

from torch_mics._build_check import check_import as _check_import

_check_import()

from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy  # noqa: E402

from torch_mics import checkpoint, collectives, optim  # noqa: E402
from torch_mics._C import CommError, InternalError, RaceError, TimeoutError  # noqa: E402
from torch_mics._construction import meta_device  # noqa: E402
from torch_mics._exit_rank import exit_rank  # noqa: E402
from torch_mics._full_state import full_state_dict, load_full_state_dict  # noqa: E402
from torch_mics._fully_shard import fully_shard  # noqa: E402
from torch_mics._materialize import materialize  # noqa: E402
from torch_mics._mesh import init_mesh  # noqa: E402
from torch_mics._module import MiCSModule, UnshardHandle  # noqa: E402
from torch_mics._race_check import of_process as _check_races  # noqa: E402
from torch_mics._shard_model import shard_model  # noqa: E402
from torch_mics._training import clip_grad_norm_, microbatch  # noqa: E402
from torch_mics._unsharded import unsharded  # noqa: E402
from torch_mics._version import __version__  # noqa: E402
from torch_mics.planner import (  # noqa: E402
    Plan,
    StepReport,
    load_calibration,
    plan,
    predicted_bytes,
    report_after,
)
from torch_mics.report._flight import (  # noqa: E402
    export_chrome_trace,
    export_flight_recorder,
    flight_log,
)
from torch_mics.report._model import backends, describe, exposed, memory, traffic  # noqa: E402

_check_races()

__all__ = [
    "CommError",
    "InternalError",
    "MiCSModule",
    "MixedPrecisionPolicy",
    "OffloadPolicy",
    "Plan",
    "RaceError",
    "StepReport",
    "TimeoutError",
    "UnshardHandle",
    "__version__",
    "backends",
    "checkpoint",
    "clip_grad_norm_",
    "collectives",
    "describe",
    "exit_rank",
    "export_chrome_trace",
    "export_flight_recorder",
    "exposed",
    "flight_log",
    "full_state_dict",
    "fully_shard",
    "init_mesh",
    "load_calibration",
    "load_full_state_dict",
    "materialize",
    "memory",
    "meta_device",
    "microbatch",
    "optim",
    "plan",
    "predicted_bytes",
    "report_after",
    "shard_model",
    "traffic",
    "unsharded",
]
