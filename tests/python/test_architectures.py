"""Architectures of transformers: first values from the meta device, training, generation, files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import architectures
from support.meta_models import SEED
from support.ranks import RankFailure, run_ranks
from torch import nn

import torch_mics as mics

# --- training -------------------------------------------------------------------------------------


RANKS = 2
STEPS = 2
MICRO_STEPS = 2
MAX_SIZE = 5_000_000
# One of each kind of sharing and calling; with MICS_WIDE=1 all that transformers has.
ARCHITECTURES = (
    ("causal", "roberta"),  # a head of several modules, of which one is tied to an embedding
    ("masked", "albert"),  # one layer, run several times, and a tied head
    ("masked", "ibert"),  # its modules return pairs
    ("masked", "neomme"),  # a tied head inside the model
    ("masked", "funnel"),  # lists in a list
    ("causal", "prophetnet"),  # only children of some units are called
    ("masked", "modernvbert"),  # an embedding that others read
    ("masked", "squeezebert"),  # layers with other layers in them
    ("causal", "gpt2"),
    ("causal", "llama"),
    ("causal", "bart"),
    ("causal", "mamba"),
    ("causal", "mixtral"),
)


def train(model: Any, data: Callable[[int], list[dict[str, torch.Tensor]]], micro: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            parts = data(micro_step)
            with micro(micro_step):
                for part in parts:
                    loss = architectures.loss_of(model, part)
                    (loss / (MICRO_STEPS * len(parts))).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_training(rank: int, kind: str, name: str, folder: str | None) -> str | None:
    """Trains, generates, saves and loads as one process; gives why one process cannot, or None."""
    try:
        if architectures.size(kind, name) > MAX_SIZE:
            return "its configuration has parts that cannot be shrunk"
        plain = architectures.build(kind, name)
        start = {key: p.detach().clone() for key, p in plain.named_parameters()}
        written = architectures.generate(plain) if kind == "causal" and folder else None
        train(
            plain,
            lambda i: [architectures.inputs(r, i) for r in range(RANKS)],
            lambda i: contextlib.nullcontext(),
        )
        if not all(p.isfinite().all() for p in plain.parameters()):
            return "it diverges"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    model = architectures.build(kind, name)
    mics.shard_model(model, shard_size=RANKS)
    if written is not None:
        # Before any training, so that every bit is the same.
        assert torch.equal(architectures.generate(model), written)
    train(
        model,
        lambda i: [architectures.inputs(rank, i)],
        lambda i: mics.microbatch(model, is_last=i == MICRO_STEPS - 1),
    )
    full = {key: p.detach().full_tensor() for key, p in model.named_parameters()}
    compare(full, plain, start)
    if folder is not None:
        check_saving(rank, model, plain, folder)
    return None


def check_saving(rank: int, model: Any, plain: Any, folder: str) -> None:
    state = mics.full_state_dict(model)  # empty on the other rank
    if rank != 0:
        return
    model.save_pretrained(f"{folder}/sharded", state_dict=dict(state))
    plain.save_pretrained(f"{folder}/plain")
    mine, right = (type(plain).from_pretrained(f"{folder}/{each}") for each in ("sharded", "plain"))
    assert mine.config.architectures == [type(plain).__name__]
    before = dict(plain.named_parameters())
    for (name, p), q in zip(mine.named_parameters(), right.parameters(), strict=True):
        if torch.equal(q, before[name]):
            assert torch.equal(p, state[name]), name
        else:  # Funnel's rows of padding become zero
            torch.testing.assert_close(p, q, msg=name)


def compare(found: dict[str, Any], plain: Any, start: dict[str, torch.Tensor]) -> None:
    """Parameters only: buffers of statistics (I-BERT's ranges) are those of each rank's data."""
    right = {key: p.detach() for key, p in plain.named_parameters()}
    assert list(found) == list(right)
    movement = max(float((p - start[key]).abs().max()) for key, p in right.items())
    assert movement > 0
    for key, p in right.items():
        # fp32 sums in another order; the nearly unused parameters of some move by little else.
        error = float((found[key].detach() - p).abs().max())
        assert error <= 2e-3 * movement, f"{key}: {error / movement:.1e} of the movement"


@pytest.mark.parametrize(("kind", "name"), ARCHITECTURES)
def test_architecture_trains_generates_and_saves_as_one_process(kind, name, tmp_path):
    pytest.importorskip("transformers")
    assert run_ranks(RANKS, check_training, kind, name, str(tmp_path)) == [None, None]


@pytest.mark.skipif("MICS_WIDE" not in os.environ, reason="every architecture takes minutes")
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_every_architecture_trains_as_one_process_or_not_at_all(kind):
    pytest.importorskip("transformers")
    trained, failed = [], {}
    for name in architectures.names(kind):
        try:
            if run_ranks(RANKS, check_training, kind, name, None, timeout=300) == [None, None]:
                trained.append(name)
        except RankFailure as error:
            failed[name] = str(error)[-300:]
    # The rest cannot be built small, or need other inputs, in one process either.
    assert not failed, failed
    assert len(trained) >= {"causal": 140, "masked": 34}[kind], trained


# --- first values ---------------------------------------------------------------------------------


WIDE = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 128}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128}
# The class of a model, and the class and sizes of its configuration.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", GPT | IDS),
    "OpenAIGPTLMHeadModel": ("OpenAIGPTConfig", GPT),
    "LlamaForCausalLM": (
        "LlamaConfig",
        WIDE | IDS | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
    "BertForMaskedLM": ("BertConfig", WIDE | {"intermediate_size": 64}),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        WIDE | IDS | {"intermediate_size": 64, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "MambaForCausalLM": ("MambaConfig", WIDE | IDS | {"state_size": 8, "time_step_rank": 4}),
    "DiffLlamaForCausalLM": (
        "DiffLlamaConfig",
        WIDE | IDS | {"intermediate_size": 64, "num_key_value_heads": 2},
    ),
    "XLNetLMHeadModel": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "SiglipModel": ("SiglipConfig", {}),
    "Data2VecTextForMaskedLM": ("Data2VecTextConfig", WIDE | IDS | {"intermediate_size": 64}),
}


def of_transformers(name: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config_name, sizes = CONFIGURATIONS[name]
    config_class = getattr(transformers, config_name)
    if name == "SiglipModel":
        tower = {k: v for k, v in WIDE.items() if k != "vocab_size"} | {"intermediate_size": 64}
        vision = tower | {"image_size": 32, "patch_size": 8}
        config = config_class(text_config=tower | {"vocab_size": 128}, vision_config=vision)
    else:
        config = config_class(**sizes)
    torch.manual_seed(SEED)
    return getattr(transformers, name)(config)


def unlike(model: nn.Module, plain: nn.Module) -> list[str]:
    """Buffers that differ, and parameters that differ in mean or spread. Collective."""
    found = [
        name
        for name, right in plain.named_buffers()
        if not torch.equal(model.get_buffer(name), right)
    ]
    for name, right in plain.named_parameters():
        if name == "transformer.mask_emb":
            continue  # XLNet's constructor leaves it as memory was
        value, right = model.get_parameter(name).detach().full_tensor(), right.detach()
        if right.numel() < 2 or right.std() == 0:
            same = torch.equal(value, right)
        else:
            # The spread of n draws is known to 1/sqrt(2n): 5 of these.
            tolerance = 5 / math.sqrt(2 * right.numel()) * 2
            same = bool(abs(value.std() / right.std() - 1) < tolerance)
        if not same:
            found.append(f"{name}: {value.mean():.3g} and {value.std():.3g}")
    return found


def run_transformers(rank: int, recorded: bool) -> dict[str, list[str]]:
    found = {}
    for name in CONFIGURATIONS:
        with mics.meta_device() if recorded else torch.device("meta"):
            model = of_transformers(name)
        mics.shard_model(model, shard_size="world")
        mics.materialize(model)
        found[name] = unlike(model, of_transformers(name))
        if name == "LlamaForCausalLM":
            model(input_ids=torch.arange(8).view(1, 8)).logits.sum().backward()
    return found


def run_real_part(rank: int) -> bool:
    with torch.device("meta"):
        model = of_transformers("LlamaForCausalLM")
    weight = torch.arange(128.0 * 32).view(128, 32)
    model.model.embed_tokens = nn.Embedding.from_pretrained(weight)
    mics.shard_model(model, shard_size="world")
    mics.materialize(model)
    return torch.equal(model.model.embed_tokens.weight.full_tensor(), weight)


def test_part_that_was_put_in_with_values_keeps_them() -> None:
    assert run_ranks(2, run_real_part) == [True, True]


@pytest.mark.parametrize("recorded", [False, True])
def test_architectures_of_transformers_start_as_in_one_process(recorded: bool) -> None:
    nothing = {name: [] for name in CONFIGURATIONS}
    assert run_ranks(2, run_transformers, recorded) == [nothing] * 2
