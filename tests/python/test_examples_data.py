"""Corpus, tokenizers, cache and batches of examples/train_gpt.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpt.config import ConfigError
from gpt.corpus import collect
from gpt.data import TokenData, open_cache, prepare_cache, window_starts
from gpt.tokenizer import ByteTokenizer, train_tokenizer

TEXT = "for each rank in the partition group: gather, compute, reduce.\n" * 40


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    (directory / "tests").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "c.md", "ignored.bin", "tests/ignored.txt"):
        (directory / name).write_text(f"{name}: {TEXT}")
    return directory


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> TokenData:
    cache = prepare_cache([str(corpus)], "byte", None, tmp_path / "cache")
    return open_cache(cache, sequence_length=16, seed=7)


# Corpus and tokenizers.
def test_corpus_skips_tests_and_other_files(corpus: Path) -> None:
    assert sorted(d.name for d in collect([str(corpus)])) == ["a.txt", "b.txt", "c.md"]


def test_corpus_order_does_not_depend_on_place(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("c.md", "b.txt", "a.txt"):
        (moved / name).write_bytes((corpus / name).read_bytes())
    assert collect([str(moved)]) == collect([str(corpus)])


def test_corpus_of_python_holds_the_standard_library() -> None:
    names = {d.name for d in collect(["python"])}
    assert "argparse.py" in names
    assert not any(name.startswith("test/") for name in names)


def test_corpus_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="existing file or directory"):
        collect([str(tmp_path / "nothing")])
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path))
    with pytest.raises(ConfigError, match="--data english needs installed documentation"):
        collect(["english"])


def test_byte_tokenizer_round_trips() -> None:
    tokenizer = ByteTokenizer()
    (tokens,) = tokenizer.encode(["naïve → text"])
    assert tokenizer.decode([*tokens.tolist(), tokenizer.end]) == "naïve → text"


def test_bpe_tokenizer_round_trips_and_shortens() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = train_tokenizer("bpe", [TEXT], 300)
    (tokens,) = tokenizer.encode([TEXT])
    assert tokenizer.decode(tokens.tolist()) == TEXT
    assert len(tokens) < len(TEXT) / 2
    assert tokenizer.vocab_size <= 300


# Token cache and batches.
def test_cache_is_made_once(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    first = prepare_cache([str(corpus)], "bpe", 300, tmp_path / "cache")
    stamp = (first / "tokens.npy").stat().st_mtime_ns
    assert prepare_cache([str(corpus)], "bpe", 300, tmp_path / "cache") == first
    assert (first / "tokens.npy").stat().st_mtime_ns == stamp
    assert prepare_cache([str(corpus)], "bpe", 290, tmp_path / "cache") != first
    (corpus / "a.txt").write_text("other")
    assert prepare_cache([str(corpus)], "bpe", 300, tmp_path / "cache") != first


def test_cache_parts_do_not_overlap(data: TokenData) -> None:
    tokens = np.concatenate([data.train, data.validation])
    assert len(data.validation) == len(tokens) // 20
    assert (tokens == data.tokenizer.end).sum() == 3


def test_cache_must_hold_a_sequence(corpus: Path, tmp_path: Path) -> None:
    cache = prepare_cache([str(corpus)], "byte", None, tmp_path / "cache")
    with pytest.raises(ConfigError, match="sequence_length=5000, validation tokens="):
        open_cache(cache, sequence_length=5000, seed=0)


def test_cache_must_be_seen_by_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all ranks see"):
        open_cache(tmp_path / "none", sequence_length=16, seed=0)


def test_batch_targets_follow_tokens(data: TokenData) -> None:
    tokens, targets = data.batch(step=3, first_sample=0, num_samples=4)
    assert tokens.shape == targets.shape == (4, 16)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_batch_of_a_step_does_not_depend_on_ranks(
    data: TokenData, world_size: int, accumulation: int
) -> None:
    whole, _ = data.batch(step=5, first_sample=0, num_samples=16)
    parts = [
        data.batch(5, (micro_step * world_size + world_rank) * 2, 2)[0]
        for micro_step in range(accumulation)
        for world_rank in range(world_size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_window_starts_are_pure_and_spread() -> None:
    starts = window_starts(1, 2, range(20000), 10)
    assert np.array_equal(starts, window_starts(1, 2, range(20000), 10))
    assert not np.array_equal(starts, window_starts(1, 3, range(20000), 10))
    assert not np.array_equal(starts, window_starts(2, 2, range(20000), 10))
    # 2000 are expected in each bin, with a deviation of 42; six of them never happen by chance.
    assert np.abs(np.bincount(starts, minlength=10) - 2000).max() < 6 * 42


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_covers_each_window_once(data: TokenData, world_size: int) -> None:
    counts, rounds = 0, set()
    for world_rank in range(world_size):
        batches = list(data.validation_batches(7, 2, world_rank, world_size))
        rounds.add(len(batches))
        counts += sum(counted for _, _, counted in batches)
    assert counts == 7
    assert len(rounds) == 1
