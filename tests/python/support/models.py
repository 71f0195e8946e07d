"""Small models with sizes that nothing divides, and batches that every rank can compute.

    model = make_gpt(tied=True)                    # the same values on every rank
    tokens, targets = batch(step, micro_step, rank)
    loss(model, (tokens, targets)).backward()

With four ranks, `positions` has no row on the last one, and no other number of rows divides by four
but those of the norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 37
WIDTH = 12
HEADS = 3
HIDDEN = 26
BLOCKS = 3
MAX_LENGTH = 9
LENGTH = 8
BATCH = 2

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Causal attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """GPT with learned positions; `tied` makes the head's weight that of the token embedding."""

    def __init__(self, tied: bool = False, *, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(MAX_LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, HIDDEN) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(tokens))

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """What forward() gives to the head."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def make_gpt(tied: bool = False, *, seed: int = 0, blocks: int = BLOCKS) -> TinyGPT:
    """Builds TinyGPT from a seed of its own; the caller's random state stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyGPT(tied, blocks=blocks)
    # Embeddings of unit variance make the logits of a tied head too large to learn from.
    with torch.no_grad():
        model.tokens.weight.mul_(0.2)
        model.positions.weight.mul_(0.2)
    return model


def batch(step: int, micro_step: int, rank: int) -> Batch:
    """Gives (tokens, targets), each [BATCH, LENGTH], the same wherever it is called."""
    generator = torch.Generator().manual_seed(step * 1_000_003 + micro_step * 1_009 + rank)
    text = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return text[:, :-1], text[:, 1:]


def loss(model: nn.Module, data: Batch) -> torch.Tensor:
    """Mean cross entropy of the next token, in fp32."""
    tokens, targets = data
    return F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())


def first_loss(model: nn.Module, rank: int) -> torch.Tensor:
    return loss(model, batch(0, 0, rank))
