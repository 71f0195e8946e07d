"""The commands of `python -m torch_mics`."""

from torch_mics.cli._main import build_parser, main

__all__ = ["build_parser", "main"]
