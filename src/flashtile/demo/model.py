"""A small byte-level language model whose attention function is a parameter, and how to sample text from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import flashtile

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: q, k, v [batch, seqlen, heads, head_dim] -> out of the same shape."""

NUM_BYTES = 256
_RESIDUAL_INIT = 0.2
"""Blocks start close to the identity: of 0, 0.2 and 1 this learns fastest."""
_ROTARY_BASE = 10_000.0


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as it is usually written in PyTorch: stores [batch, heads, seqlen, seqlen] scores."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    seqlen = q.shape[-2]
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    is_future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(is_future, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return (weights @ v).transpose(1, 2)


def flashtile_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function of the same inputs, through the library."""
    return flashtile.attention(q, k, v, causal=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of the model."""

    layers: int
    d_model: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


class ByteTransformer(nn.Module):
    """Decoder-only transformer over bytes: pre-norm blocks, rotary positions, output head tied to the embedding.

    Args:
        shape: the sizes.
        attention: the attention function of every block.
        attention_dtype: q, k, v are handed to it in this dtype; everything else follows the surrounding autocast.
        generator: draws the initial weights, on the CPU, so that equal seeds give equal models on every device.
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        attention: AttentionFunction,
        attention_dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, shape.d_model)
        self.blocks = nn.ModuleList(_Block(shape, attention, attention_dtype) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head_dim = shape.head_dim
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes_residual = name.endswith(("from_heads.weight", "mlp.2.weight"))
                std = weight.shape[1] ** -0.5 * (_RESIDUAL_INIT if writes_residual else 1.0)
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seqlen, 256] of the byte after each of ``tokens`` [batch, seqlen]."""
        x = self.embedding(tokens)
        rotation = _rotation(tokens.shape[1], self.head_dim, tokens.device)
        for block in self.blocks:
            x = block(x, rotation)
        return linear(self.norm(x), self.embedding.weight)


class _Block(nn.Module):
    def __init__(self, shape: ModelShape, attention: AttentionFunction, attention_dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.attention, self.attention_dtype = shape.heads, attention, attention_dtype
        self.attention_norm = nn.LayerNorm(shape.d_model)
        self.to_qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.from_heads = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(shape.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(shape.d_model, 4 * shape.d_model, bias=False),
            nn.GELU(),
            nn.Linear(4 * shape.d_model, shape.d_model, bias=False),
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.unbind(dim=2)  # [batch, seqlen, heads, head_dim]
        # Both functions get the same dtype and no autocast, so that it cannot choose their precision for them.
        with torch.autocast(x.device.type, enabled=False):
            out = self.attention(
                _rotated(q, rotation).to(self.attention_dtype),
                _rotated(k, rotation).to(self.attention_dtype),
                v.to(self.attention_dtype),
            )
        x = x + self.from_heads(out.flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def _rotation(seqlen: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [seqlen, 1, head_dim / 2]: the angle of each position for each pair of channels."""
    speeds = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(seqlen, device=device)[:, None, None] * speeds
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x [batch, seqlen, heads, head_dim], its channel pairs (i, i + head_dim / 2) turned by their position's angle."""
    cos, sin = rotation
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


@torch.no_grad()
def sample(
    model: ByteTransformer,
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
