"""Files of a checkpoint: published by one rename, and read without running what they say.

They are those of torch.distributed.checkpoint: data files, and `.metadata`, which names every part of them.
A save writes data files under new names, and puts its metadata in place of the former by a rename, which
every POSIX file system does at once. Until then the former checkpoint is whole; afterwards the new one is.
Data files that no metadata names are of a save that was ended, or of the former checkpoint: the next save
removes them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import os
import pathlib
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

METADATA = ".metadata"

# What the metadata of torch.distributed.checkpoint is made of, beside the classes of its own module.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): None,
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): None,
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): None,
    ("pathlib", "PosixPath"): pathlib.PurePath,
    ("pathlib._local", "PosixPath"): pathlib.PurePath,
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the classes of checkpoint metadata and nothing else, so no file can name what to run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name] or super().find_class(module, name)
        if module == dcp_metadata.__name__:
            found = getattr(dcp_metadata, name, None)
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """Reads the metadata of the checkpoint in a directory; runs no code that the file names.

    Raises:
        ValueError: it holds something else, or is damaged.
    """
    content = (pathlib.Path(path) / METADATA).read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(type(metadata).__name__)
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(
            "the metadata of a checkpoint must be what torch.distributed.checkpoint writes: got "
            f"{error!r} in {pathlib.Path(path) / METADATA}. The file is damaged or not of a checkpoint."
        ) from None
    return metadata


def check_files(path: str | os.PathLike[str], metadata: Metadata) -> None:
    """Checks that all data files are there and as long as the metadata says.

    Raises:
        ValueError: some are not; the first is named.
    """
    ends: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, nbytes in ends.items():
        try:
            found = (pathlib.Path(path) / name).stat().st_size
        except FileNotFoundError:
            found = -1
        if found < nbytes:
            what = "no such file" if found < 0 else f"{found} bytes"
            raise ValueError(
                f"the data files of a checkpoint must be whole: got {what} for {name} in {path}, which has "
                f"{nbytes} bytes. It was copied or moved in part: load another checkpoint."
            )


class _PublishingFileSystem(FileSystem):
    """Replaces a file in one step, and makes sure first that what it names is on the disk."""

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Leaves the former metadata in place until rename() replaces it."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        folder = pathlib.Path(new_path).parent
        sync_folder(folder)
        pathlib.Path(path).replace(new_path)
        sync_folder(folder)


def sync_folder(folder: pathlib.Path) -> None:
    """Brings a directory's names to the disk, where the file system knows that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer(FileSystemWriter):
    """Writes a checkpoint beside the one that is there, and publishes it in one step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.fs = _PublishingFileSystem()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the directory; a checkpoint that is there stays."""
        folder = pathlib.Path(self.path)
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: frees what is of no use, and gives each rank names of its own."""
        folder = pathlib.Path(self.path)
        used: set[str] = set()
        if (folder / METADATA).exists():
            try:
                used = _files_of(read_metadata(folder))
            except ValueError:  # nothing can be loaded from it, nor known of its files
                used = {file.name for file in folder.iterdir()}
        _remove_unused(folder, used)
        plans = super().prepare_global_plan(plans)
        for plan in plans:
            prefix = plan.storage_data.prefix.removeprefix("__")
            plan.storage_data.prefix = f"__{self.save_id}_{prefix}"
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when every rank has written: publishes, and removes the former files."""
        super().finish(metadata, results)
        used = {result.storage_data.relative_path for each in results for result in each}
        _remove_unused(pathlib.Path(self.path), used)


def _files_of(metadata: Metadata) -> set[str]:
    return {info.relative_path for info in (metadata.storage_data or {}).values()}


def _remove_unused(folder: pathlib.Path, used: set[str]) -> None:
    for file in folder.iterdir():
        is_data = file.name.startswith("__") and file.name.endswith(DEFAULT_SUFFIX)
        if (is_data and file.name not in used) or file.name == f"{METADATA}.tmp":
            with contextlib.suppress(OSError):  # the next save tries again
                file.unlink()


class Reader(FileSystemReader):
    """Reads a checkpoint without running what its metadata names."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """See read_metadata()."""
        metadata = read_metadata(self.path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@functools.cache
def _numpy_globals() -> list[Any]:
    """What pickles of numpy's numbers and arrays are made of; none of it runs code of a file."""
    try:
        import numpy as np
    except ImportError:
        return []
    multiarray = (getattr(np, "_core", None) or np.core).multiarray
    makers = [
        (getattr(multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ]
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFD"}
    return [*makers, np.ndarray, np.dtype, *kinds]


def _load_plain(stream: io.BytesIO) -> Any:
    """Reads a value that torch.save() wrote; raises UnpicklingError where that would run code."""
    with torch.serialization.safe_globals(_numpy_globals()):
        return torch.load(stream, weights_only=True)


def _is_plain(value: Any) -> bool:
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
        stream.seek(0)
        _load_plain(stream)
    except Exception:  # pickles raise anything
        return False
    return True


def _refuse(refused: list[str]) -> TypeError:
    return TypeError(
        "what is saved must be tensors, numbers, strings, and lists and dicts of them, so that loading "
        f"runs no code: got {', '.join(refused)}. Let state_dict() give such values."
    )


def check_plain(state: dict[str, Any]) -> None:
    """Checks that all values that are no tensors can be read again without running code.

    Raises:
        TypeError: some cannot; all are named.
    """
    refused = [
        f"{name} ({type(value).__name__})"
        for name, value in flatten_state_dict(state)[0].items()
        if not isinstance(value, torch.Tensor) and not _is_plain(value)
    ]
    if refused:
        raise _refuse(refused)


class SavePlanner(DefaultSavePlanner):
    """Writes of equal shards the first only, and no value that could not be read again."""

    def __init__(self) -> None:
        super().__init__(dedup_save_to_lowest_rank=True)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Gives what is written.

        Raises:
            TypeError: see check_plain().
        """
        value = super().resolve_data(write_item)
        if isinstance(value, io.BytesIO):
            try:
                _load_plain(io.BytesIO(value.getvalue()))
            except pickle.UnpicklingError:
                raise _refuse([write_item.index.fqn]) from None
        return value


class LoadPlanner(DefaultLoadPlanner):
    """Reads what is no tensor without running what it names."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Puts a value in its place.

        Raises:
            ValueError: it is of a class that would run code.
        """
        name = read_item.dest_index.fqn
        try:
            _load_plain(value)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"a value in a checkpoint must be plain: got another one in {name}: "
                f"{str(error).splitlines()[0]} It would run code, so it is not read."
            ) from None
        value.seek(0)
        super().load_bytes(read_item, value)
