"""Settings of one run: the dataclass, its command line, its rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

__all__ = ["ConfigError", "TrainConfig", "parse_config", "validate"]

BPE_VOCAB_SIZE = 1024


class ConfigError(ValueError):
    """The request cannot be met; the message says why and what to do."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. Each field is the option of the same name, with dashes."""

    shard_size: int | Literal["node", "world"] = _option(
        "node", "Ranks per partition group: a number, one node, or all ranks."
    )
    hierarchical_gather: bool | Literal["auto"] = _option(
        "auto", "Gather between nodes first, then within the node."
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "auto is cuda where there is one.")
    precision: Literal["fp32", "bf16", "fp16"] = _option(
        "fp32", "Type of gathered parameters and of compute; the model states stay fp32."
    )
    activation_checkpointing: bool = _option(False, "Recompute each block in backward.")

    steps: int = _option(60, "Optimizer steps.")
    accumulation_steps: int = _option(4, "Micro-steps per step.")
    batch_size: int = _option(4, "Sequences per rank and micro-step.")
    sequence_length: int = _option(128, "Tokens per sequence.")
    layers: int = _option(4, "Transformer blocks.")
    heads: int = _option(4, "Attention heads per block.")
    width: int = _option(128, "Width of the residual stream.")

    learning_rate: float = _option(5e-3, "Peak learning rate; falls to a tenth along a cosine.")
    warmup_steps: int = _option(10, "Steps of linear warm-up.")
    weight_decay: float = _option(0.1, "AdamW weight decay, on matrices only.")
    clip: float = _option(1.0, "Largest gradient norm; 0 does not clip.")
    seed: int = _option(1234, "Fixes the initial weights, the order of the data and the sample.")

    data: tuple[str, ...] = _option(
        ("python",),
        "Files or directories of text; 'python' is the source of the standard library, "
        "'english' the installed English documentation.",
    )
    tokenizer: Literal["byte", "bpe"] = _option("bpe", "bpe is trained on the data and cached.")
    vocab_size: int | None = _option(
        None, f"Entries of the bpe vocabulary (default: {BPE_VOCAB_SIZE}); byte always has 257."
    )

    output_dir: str = _option("runs/gpt", "Cache, metrics and checkpoints; all ranks must see it.")
    checkpoint_every: int = _option(
        100, "Steps between checkpoints; also one at the end. 0 saves only on SIGTERM."
    )
    resume: str | None = _option(
        None, "A checkpoint, a 'latest' file, a run directory, or 'auto': the last one if any."
    )
    log_every: int = _option(1, "Steps between step lines.")
    validate_every: int = _option(20, "Steps between validations; also one at the end. 0: never.")
    validation_samples: int = _option(64, "Sequences per validation, over all ranks.")
    sample: int = _option(0, "Tokens of text to sample at the end.")


_AT_LEAST = {
    "steps": 1,
    "accumulation_steps": 1,
    "batch_size": 1,
    "sequence_length": 1,
    "layers": 1,
    "heads": 1,
    "width": 1,
    "warmup_steps": 0,
    "weight_decay": 0,
    "clip": 0,
    "seed": 0,
    "checkpoint_every": 0,
    "log_every": 1,
    "validate_every": 0,
    "validation_samples": 1,
    "sample": 0,
}


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Reads the command line (and `--config FILE`); exits on `--help` and `--print_config`.

    Raises:
        ConfigError: a value breaks a rule.
    """
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(
        prog="train_gpt.py",
        description="Trains a small GPT with MiCS, on CPU or CUDA, with or without torchrun.",
    )
    parser.add_argument("--config", action="config", help="YAML file of the options below.")
    hints = get_type_hints(TrainConfig)
    defaults = TrainConfig()
    for item in fields(TrainConfig):
        name = "--" + item.name.replace("_", "-")
        kind = hints[item.name]
        default = getattr(defaults, item.name)
        how: dict[str, Any] = {"default": default, "help": item.metadata["help"]}
        if kind is bool:
            how |= {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
        elif item.name == "data":
            how |= {"type": str, "nargs": "+", "default": list(default)}
        else:
            how["type"] = kind
        parser.add_argument(name, **how)
    values = parser.parse_args(arguments)
    given = {item.name: values[item.name] for item in fields(TrainConfig)}
    config = TrainConfig(**given | {"data": tuple(given["data"])})
    validate(config)
    return config


def validate(config: TrainConfig) -> None:
    """Checks the rules that need neither data nor ranks.

    Raises:
        ConfigError: a value breaks a rule.
    """
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value < least:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be at least {least}: got {name}={value}.")
    if config.learning_rate <= 0:
        raise ConfigError(
            f"--learning-rate must be positive: got learning_rate={config.learning_rate}."
        )
    if isinstance(config.shard_size, int) and config.shard_size < 1:
        raise ConfigError(
            f"--shard-size must be at least 1: got shard_size={config.shard_size}. "
            "Use a divisor of the number of ranks, 'node' or 'world'."
        )
    if config.width % config.heads:
        divisors = [n for n in range(1, config.width + 1) if config.width % n == 0]
        raise ConfigError(
            f"--heads must divide --width: got heads={config.heads}, width={config.width}. "
            f"Use one of {', '.join(map(str, divisors))} heads."
        )
    if config.width // config.heads % 2:
        raise ConfigError(
            "width / heads must be even, because rotary positions turn pairs: got "
            f"width={config.width}, heads={config.heads}, "
            f"width / heads={config.width // config.heads}. Use another --heads."
        )
    if config.tokenizer == "byte" and config.vocab_size not in (None, 257):
        raise ConfigError(
            f"--vocab-size is for --tokenizer bpe; byte has 257: got vocab_size={config.vocab_size}"
            ". Leave it out."
        )
    if config.vocab_size is not None and not 257 <= config.vocab_size <= 65536:
        raise ConfigError(
            "--vocab-size must lie in 257..65536, because the cache holds 16-bit tokens and every "
            f"byte is an entry: got vocab_size={config.vocab_size}."
        )
