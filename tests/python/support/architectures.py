"""Small models of every architecture of transformers, from their configurations, and what they learn.

model = build("causal", "gpt2")
loss_of(model, inputs(rank=0, micro_step=0)).backward()
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

VOCABULARY = 96
LENGTH = 16
SEQUENCES = 2

# What a configuration may call each size. A name that it lacks, or that holds a list, is passed over.
_SIZES: tuple[tuple[int | float, str], ...] = (
    (
        0.0,
        "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout activation_dropout "
        "resid_pdrop embd_pdrop attn_pdrop hidden_dropout dropout_rate embedding_dropout residual_dropout "
        "layerdrop encoder_layerdrop decoder_layerdrop classifier_dropout router_jitter_noise",
    ),
    (0, "pad_token_id"),
    (
        1,
        "bos_token_id n_group topk_group n_shared_experts first_k_dense_replace decoder_start_token_id",
    ),
    (
        2,
        "eos_token_id num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers num_key_value_heads num_experts_per_tok top_k moe_topk "
        "type_vocab_size linear_num_key_heads mamba_expand num_hash_functions",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank conv_kernel "
        "mamba_n_heads linear_num_value_heads",
    ),
    (
        8,
        "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim state_size ssm_state_size "
        "mamba_d_state attention_window sliding_window patch_size linear_key_head_dim "
        "linear_value_head_dim relative_attention_num_buckets hidden_size_per_layer_input laurel_rank",
    ),
    (16, "kv_lora_rank q_lora_rank qk_head_dim mamba_d_head"),
    (
        32,
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim image_size lru_width "
        "moe_intermediate_size shared_expert_intermediate_size attention_hidden_size",
    ),
    (
        64,
        "intermediate_size max_position_embeddings n_inner d_ff ffn_dim hidden_dim n_positions n_ctx "
        "encoder_ffn_dim decoder_ffn_dim",
    ),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
)
# What must be given to the constructor, and stays: here the settings of each layer follow from their
# number, and a part of a head is split in three.
_ARGUMENTS = {"neomme": {"num_hidden_layers": 2, "head_dim": 32}}
_PARTS = ("text_config", "vision_config", "encoder_config", "decoder_config", "backbone_config")
_KINDS_OF_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def names(kind: str) -> dict[str, str]:
    """The class of each architecture: "causal" or "masked"."""
    from transformers.models.auto import modeling_auto

    found = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }[kind]
    return {name: cls if isinstance(cls, str) else cls[0] for name, cls in found.items()}


def build(kind: str, name: str) -> Any:
    """A model of two layers, the same on every rank, in training mode; raises what its class raises."""
    config = _small_config(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _class_of(kind, name)(config).train()


def size(kind: str, name: str) -> int:
    """The number of parameters that build() would give; allocates none."""
    with torch.device("meta"):
        model = _class_of(kind, name)(_small_config(name))
    return sum(parameter.numel() for parameter in model.parameters())


def _class_of(kind: str, name: str) -> Any:
    import transformers

    return getattr(transformers, names(kind)[name])


def _small_config(name: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    arguments = _ARGUMENTS.get(name, {})
    config = CONFIG_MAPPING[name](**arguments)
    for part in (config, *(getattr(config, each, None) for each in _PARTS)):
        if isinstance(part, transformers.PreTrainedConfig):
            _shrink(part, set(arguments))
    return config


def _shrink(config: Any, kept: set[str]) -> None:
    known = {*config.__dict__, *config.attribute_map} - kept
    for size, words in _SIZES:
        for word in set(words.split()) & known:
            with contextlib.suppress(Exception):  # some refuse to be read, or set
                if not isinstance(getattr(config, word, None), list | tuple):
                    setattr(config, word, size)
    for word in _KINDS_OF_LAYERS:
        kinds = getattr(config, word, None)
        if isinstance(kinds, list):
            # Two layers, of different kinds where there are some.
            with contextlib.suppress(Exception):
                setattr(config, word, (list(dict.fromkeys(kinds)) * 2)[:2])
    config.use_cache = False


def inputs(rank: int, micro_step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * micro_step + rank)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def loss_of(model: nn.Module, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**data).loss


@torch.no_grad()
def generate(model: Any) -> torch.Tensor:
    """Greedy continuations of a batch, from the model in evaluation mode."""
    model.eval()
    ids = inputs(0, 0)["input_ids"][:, :5]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=4,
        max_new_tokens=4,
    )
    model.train()
    return found
