"""Trains a small GPT with MiCS.

    torchrun --nproc-per-node 4 examples/train_gpt.py --shard-size 2 --sample 200
    python examples/train_gpt.py --tokenizer byte

The same script runs on CPU and CUDA, with and without torchrun. The default data is the source
of Python's standard library, so nothing is downloaded. `--help` lists the options.

Environment:
    MICS_RANKS_PER_NODE: splits one machine into simulated nodes of that many ranks.
"""

from __future__ import annotations

import os
import sys
import time

from gpt.cluster import name_simulated_node, open_cluster
from gpt.config import ConfigError, parse_config


def main() -> int:
    """Runs the trainer and ends the process; returns exit status 2 if the request cannot be met."""
    try:
        name_simulated_node(os.environ)
        config = parse_config()
        cluster = open_cluster(config.device)
        # Imported late: --help and wrong options work without the library, and the node is named by now.
        from gpt.trainer import run

        import torch_mics as mics

        run(config, cluster)
        mics.exit_rank()
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends all ranks at the first exit; rank 0 must print before
        return 2


if __name__ == "__main__":
    sys.exit(main())
