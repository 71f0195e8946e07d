"""The token cache, and batches that depend only on seed, step and place in the step."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt.config import BPE_VOCAB_SIZE, ConfigError
from gpt.corpus import Document, collect
from gpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["TokenData", "open_cache", "prepare_cache", "window_starts"]

_VALIDATION_SHARE = 0.05
_ENCODE_GROUP = 256


def _cache_key(documents: Sequence[Document], tokenizer: str, vocab_size: int) -> str:
    digest = hashlib.sha256(f"1 {tokenizer} {vocab_size}".encode())
    for document in documents:
        digest.update(f"\0{document.name}\0{len(document.content)}\0".encode())
        digest.update(document.content)
    return digest.hexdigest()[:16]


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    end = np.array([tokenizer.end], dtype=np.uint16)
    pieces: list[npt.NDArray[np.uint16]] = []
    for first in range(0, len(documents), _ENCODE_GROUP):
        group = documents[first : first + _ENCODE_GROUP]
        for tokens in tokenizer.encode([document.text for document in group]):
            pieces += [tokens, end]
    return np.concatenate(pieces)


def prepare_cache(
    sources: Sequence[str], tokenizer: str, vocab_size: int | None, cache_dir: Path
) -> Path:
    """Tokenizes `sources` unless that is done already. One rank calls it.

    Returns:
        The directory of tokens.npy, cache.json and tokenizer.json. Its name is a hash of the
        documents and of the tokenizer's settings.
    """
    size = BPE_VOCAB_SIZE if vocab_size is None else vocab_size
    documents = collect(sources)
    target = cache_dir / _cache_key(documents, tokenizer, size if tokenizer == "bpe" else 257)
    if (target / "cache.json").is_file():
        return target
    # Written aside and renamed, so that a killed run leaves nothing that looks complete.
    draft = cache_dir / f"{target.name}.draft-{os.getpid()}"
    draft.mkdir(parents=True)
    trained = train_tokenizer(tokenizer, [document.text for document in documents], size)
    trained.save(draft)
    tokens = _encode(documents, trained)
    np.save(draft / "tokens.npy", tokens)
    about = {"tokenizer": tokenizer, "documents": len(documents), "tokens": len(tokens)}
    (draft / "cache.json").write_text(json.dumps(about) + "\n")
    if target.exists():
        shutil.rmtree(target)
    draft.rename(target)
    return target


def open_cache(directory: Path, sequence_length: int, seed: int) -> TokenData:
    """Maps the tokens that `prepare_cache` wrote.

    Raises:
        ConfigError: this rank cannot see the cache, or it is shorter than a sequence.
    """
    if not (directory / "cache.json").is_file():
        raise ConfigError(
            "--output-dir must be one directory that all ranks see: got no "
            f"{directory} (world_rank={os.environ.get('RANK', '0')}). Use a shared file system."
        )
    about = json.loads((directory / "cache.json").read_text())
    tokens = np.load(directory / "tokens.npy", mmap_mode="r")
    num_train = len(tokens) - int(len(tokens) * _VALIDATION_SHARE)
    train, validation = tokens[:num_train], tokens[num_train:]
    for name, part in (("training", train), ("validation", validation)):
        if len(part) <= sequence_length:
            raise ConfigError(
                f"--sequence-length must be less than the tokens of the {name} part of the data: "
                f"got sequence_length={sequence_length}, {name} tokens={len(part)}. "
                "Use shorter sequences or more --data."
            )
    return TokenData(
        key=directory.name,
        tokenizer=load_tokenizer(about["tokenizer"], directory),
        train=train,
        validation=validation,
        sequence_length=sequence_length,
        seed=seed,
    )


def window_starts(seed: int, step: int, samples: range, num_starts: int) -> npt.NDArray[np.int64]:
    """Draws where each sample of a step starts, [len(samples)], uniform in 0..num_starts - 1.

    A pure function (the splitmix64 mixer over its arguments): a sample's text depends on seed,
    step and place in the step, and on no rank, group or earlier draw.
    """
    with np.errstate(over="ignore"):
        state = np.asarray(samples, dtype=np.uint64)
        for value in (step, seed):
            state = _mix(state) + np.uint64(value % 2**64)
        drawn = _mix(_mix(state))
    return (drawn % np.uint64(num_starts)).astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class TokenData:
    """The two parts of a token stream, and the batches cut from them."""

    key: str
    tokenizer: Tokenizer
    train: npt.NDArray[np.uint16]
    validation: npt.NDArray[np.uint16]
    sequence_length: int
    seed: int

    def _cut(
        self, tokens: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        rows = [tokens[start : start + self.sequence_length + 1] for start in starts]
        window = torch.from_numpy(np.stack(rows).astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def batch(self, step: int, first_sample: int, num_samples: int) -> tuple[Tensor, Tensor]:
        """Returns tokens and targets, each [num_samples, sequence_length].

        Args:
            step: the optimizer step.
            first_sample: index of the first sample within the step, counted over all micro-steps
                and ranks: (micro_step * world_size + world_rank) * batch_size.
            num_samples: samples in this batch.
        """
        samples = range(first_sample, first_sample + num_samples)
        num_starts = len(self.train) - self.sequence_length
        return self._cut(self.train, window_starts(self.seed, step, samples, num_starts))

    def validation_batches(
        self, num_samples: int, batch_size: int, world_rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yields this rank's share of `num_samples` evenly spread windows.

        Every rank gets the same number of batches, because the model's forward is collective.

        Yields:
            tokens, targets, and how many samples of them count; where a rank has none left, one
            sample that does not.
        """
        last = len(self.validation) - self.sequence_length - 1
        starts = np.linspace(0, last, num_samples).astype(np.int64)
        for first in range(0, num_samples, batch_size * world_size):
            begin = first + world_rank * batch_size
            chosen = starts[begin : begin + batch_size]
            tokens, targets = self._cut(self.validation, chosen if len(chosen) else starts[:1])
            yield tokens, targets, len(chosen)
