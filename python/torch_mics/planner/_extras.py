"""Libraries that only the extra `plan` of setup.py installs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(rule: str) -> Iterator[None]:
    """Imports inside may fail; `rule` says what needs the library, as "tables need rich".

    Raises:
        ModuleNotFoundError: the library is not installed; the message names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{rule}: got no module of that name. Run pip install "torch-mics[plan]".'
        ) from error
