"""The command line: `python -m torch_mics COMMAND`, or the console script `torch_mics`."""

import sys

from torch_mics.cli import main

if __name__ == "__main__":
    sys.exit(main())
