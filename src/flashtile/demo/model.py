"""The demo's two attention functions, and how to sample text from a model that was trained with them."""

from __future__ import annotations

import torch
from torch import Tensor

import flashtile
from flashtile.bench import formula
from flashtile.bench.transformer import Transformer


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as it is usually written in PyTorch: stores [batch, heads, seqlen, seqlen] scores."""
    return formula.naive_attention(q, k, v, hidden=formula.future(q.shape[1], q.device))


def flashtile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function of the same inputs, through the library."""
    return flashtile.attention(q, k, v, causal=True)


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: bytes,
    *,
    num_bytes: int,
    temperature: float,
    max_seqlen: int,
    generator: torch.Generator,
) -> bytes:
    """Continues ``prompt`` (at least one byte) by ``num_bytes``; ``generator`` is a CPU one.

    The model reads at most the last ``max_seqlen`` bytes each time.
    """
    device = model.embedding.weight.device
    tokens = list(prompt)
    for _ in range(num_bytes):
        context = torch.tensor([tokens[-max_seqlen:]], device=device)
        logits = model(context)[0, -1].float().cpu()
        tokens.append(int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)))
    return bytes(tokens[len(prompt) :])


def printable(text: bytes) -> str:
    """Bytes as text that is safe to print: no control characters, so no terminal escape sequences either."""
    decoded = text.decode("utf-8", errors="replace").replace("\r\n", "\n")
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in decoded)
