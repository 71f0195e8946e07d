"""Text to tokens and back: bytes, or a BPE trained on the corpus."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gpt.config import ConfigError

__all__ = ["BpeTokenizer", "ByteTokenizer", "Tokenizer", "load_tokenizer", "train_tokenizer"]

Tokens = npt.NDArray[np.uint16]
_END = "<|end|>"


class Tokenizer(Protocol):
    """What the trainer needs of a tokenizer. `end` is the token between two documents."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> list[Tokens]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, directory: Path) -> None: ...


class ByteTokenizer:
    """One token per byte of UTF-8, and one for the end of a document."""

    vocab_size = 257
    end = 256

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Encodes each text; no end tokens are added."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes; end tokens are dropped and broken characters replaced."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")

    def save(self, directory: Path) -> None:
        """Needs no file."""


class BpeTokenizer:
    """Byte-level BPE of the `tokenizers` package."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocab_size: int = inner.get_vocab_size()
        self.end: int = inner.token_to_id(_END)

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> BpeTokenizer:
        """Learns at most `vocab_size` entries; a small corpus yields fewer."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return cls(inner)

    @classmethod
    def load(cls, directory: Path) -> BpeTokenizer:
        """Reads what `save` wrote."""
        from tokenizers import Tokenizer as Inner

        return cls(Inner.from_file(str(directory / "tokenizer.json")))

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Encodes each text; no end tokens are added."""
        return [np.array(item.ids, dtype=np.uint16) for item in self._inner.encode_batch(texts)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Decodes; end tokens are dropped and broken characters replaced."""
        return self._inner.decode(list(tokens), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json."""
        self._inner.save(str(directory / "tokenizer.json"))


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Makes the tokenizer of `kind` ("byte" or "bpe") for `texts`.

    Raises:
        ConfigError: the `tokenizers` package is missing.
    """
    if kind == "byte":
        return ByteTokenizer()
    # The trainer forks nothing, so the package's threads are safe.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        return BpeTokenizer.train(texts, vocab_size)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "--tokenizer bpe needs the package tokenizers: got none installed. "
            "Install it, or use --tokenizer byte."
        ) from error


def load_tokenizer(kind: str, directory: Path) -> Tokenizer:
    """Reads the tokenizer of `kind` that was saved in `directory`."""
    return ByteTokenizer() if kind == "byte" else BpeTokenizer.load(directory)
