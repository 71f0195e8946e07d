"""A GPT: pre-norm blocks, rotary positions, tied embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["GPT", "Block", "GPTConfig", "rotary_table"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model."""

    vocab_size: int
    layers: int
    heads: int
    width: int
    activation_checkpointing: bool = False


def rotary_table(length: int, head_width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotary angles, each [length, head_width / 2], fp32."""
    pair = torch.arange(head_width // 2, dtype=torch.float32, device=device)
    frequency = 10000.0 ** (-2.0 * pair / head_width)
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = torch.outer(position, frequency)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns each pair of `x` [batch, heads, length, head_width] by its position's angle."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.project = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, width = x.shape
        packed = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.project(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Two matrices with GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width, bias=False)
        self.project = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual path."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.recompute = config.activation_checkpointing

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        # The checkpoint lies inside the block, so hooks that gather the block's parameters
        # run around it and not a second time inside the recomputation.
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, cosine, sine, use_reentrant=False)
        return self._forward(x, cosine, sine)

    def _forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Maps tokens to next-token logits, or to the loss where targets are given."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew from the current generator.

        Projections into the residual stream are scaled down by sqrt(2 * layers), so that the stream's
        variance does not grow with depth.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear) and module is not self.head:
                residual = name.endswith(".project")
                std = 0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Runs the model.

        Args:
            tokens: [batch, length], integer.
            targets: [batch, length], integer, or None.

        Returns:
            The mean loss in nats per token (fp32, 0-dim) with targets, else the logits
            [batch, length, vocab_size] in fp32.
        """
        # The tied matrix is drawn small, for small first logits; the stream needs a larger scale.
        x = self.embedding(tokens) * math.sqrt(self.config.width)
        head_width = self.config.width // self.config.heads
        cosine, sine = rotary_table(tokens.shape[1], head_width, tokens.device)
        for block in self.blocks:
            x = block(x, cosine, sine)
        logits = self.head(self.norm(x)).float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def num_parameters(self) -> int:
        """Counts the parameters, tied ones once. Call it before the model is sharded."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, sequence_length: int) -> int:
        """Counts forward and backward FLOPs of one token, without recomputation."""
        matmul = 6 * self.num_parameters()
        attention = 12 * self.config.layers * self.config.width * sequence_length
        return matmul + attention
