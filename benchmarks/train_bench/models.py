"""What is trained: a GPT, a BERT with masked language modelling, or layers that only wait."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MASK = 0  # the token that stands for a hidden one
HIDDEN = 0.15  # share of tokens that BERT predicts


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batches."""

    kind: Literal["gpt", "bert"] = "gpt"
    layers: int = 8
    width: int = 256
    heads: int = 4
    vocabulary: int = 2048
    length: int = 64
    rows: int = 1
    recompute: bool = False  # keep only the input of each block for backward

    def flops(self, recompute: bool) -> float:
        """FLOP of one sample's forward and backward, by the formula of the MiCS paper (section 5).

        Its 96 l L h^2 (1 + l/6h + V/16Lh) counts every block's forward twice; 72 and V/12Lh count it once.
        """
        length, width, layers = self.length, self.width, self.layers
        blocks = (96 if recompute else 72) * length * layers * width**2
        head = self.vocabulary / ((16 if recompute else 12) * layers * width)
        return blocks * (1 + length / (6 * width) + head)


class Block(nn.Module):
    """Pre-norm attention and a perceptron four times as wide."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.is_causal = shape.heads, shape.kind == "gpt"
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.project = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        packed = self.query_key_value(self.norm1(x))
        packed = packed.view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        x = x + self.project(y.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Embedding(nn.Embedding):
    """Starts from small values, because the head is tied to it."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Transformer(nn.Module):
    """Token and position embeddings, blocks, and a head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.recompute = shape.recompute
        self.tokens = Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Parameter(torch.empty(shape.length, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the parameters that it holds itself, as torch's modules do."""
        nn.init.zeros_(self.positions)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


class _Wait(torch.autograd.Function):
    """Takes a layer's time and gives a gradient of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.seconds, ctx.like = seconds, (weight.shape, weight.dtype)
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        time.sleep(2 * ctx.seconds)
        sizes, dtype = ctx.like
        return gradient.clone(), torch.zeros(sizes, dtype=dtype), None


class Waiting(nn.Module):
    """A layer of `numel` parameters whose forward takes `seconds`, and its backward twice that."""

    def __init__(self, numel: int, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(numel))
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        return _Wait.apply(x, self.weight, self.seconds)


class VirtualModel(nn.Module):
    """Layers that wait, so that many ranks fit on few cores."""

    def __init__(self, layers: int, numel: int, seconds: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Waiting(numel, seconds) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def batch(shape: Shape, step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, [rows, length] each; -1 where nothing is predicted."""
    generator = torch.Generator().manual_seed((step * 1000 + micro_step) * 10000 + rank)
    size = (shape.rows, shape.length + 1)
    tokens = torch.randint(1, shape.vocabulary, size, generator=generator)
    if shape.kind == "gpt":
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    tokens = tokens[:, 1:].contiguous()
    is_hidden = torch.rand(tokens.shape, generator=generator) < HIDDEN
    is_hidden[:, 0] = True  # a row without a hidden token would have no loss
    return tokens.masked_fill(is_hidden, MASK), tokens.masked_fill(~is_hidden, -1)
