"""Text from the model."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["sample_tokens"]


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    *,
    start: int,
    num_tokens: int,
    context: int,
    seed: int,
    device: torch.device,
    temperature: float = 0.8,
    top_k: int = 40,
) -> list[int]:
    """Draws `num_tokens` tokens after the token `start`.

    Collective: the sharded model runs on every rank, equally often. All ranks draw from the same
    seed on CPU, so all return the same tokens.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    tokens = [start]
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1].cpu() / temperature
        best = torch.topk(logits, min(top_k, logits.numel()))
        drawn = torch.multinomial(best.values.softmax(dim=0), 1, generator=generator)
        tokens.append(int(best.indices[drawn]))
    model.train(was_training)
    return tokens[1:]
