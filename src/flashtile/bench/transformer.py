"""The transformer of the benchmarks and the demo: a decoder whose attention function is a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from flashtile.bench.formula import AttentionFn

NUM_BYTES = 256
_RESIDUAL_INIT = 0.2
"""Blocks start close to the identity: of 0, 0.2 and 1 this learns fastest."""
_ROTARY_BASE = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a model."""

    layers: int
    d_model: int
    heads: int
    vocabulary: int = NUM_BYTES
    """Tokens that there are; by default one for each byte."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def num_weights(self) -> int:
        """Elements of all matrices: the embedding, which is the output head too, and twelve squares for each layer."""
        return self.vocabulary * self.d_model + 12 * self.layers * self.d_model**2


class KVCache:
    """Keys and values of the tokens that a model has read, of every layer.

    They are stored head by head, as most models' are: the naive formula multiplies them without copying them first.

    Args:
        shape: the model's.
        batch: sequences, all of one length.
        capacity: tokens of each that it has room for.
        dtype, device: of the keys and values.
    """

    def __init__(
        self, shape: ModelShape, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        sizes = (shape.layers, batch, shape.heads, capacity, shape.head_dim)
        self.k, self.v = (torch.zeros(sizes, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        """Tokens that it holds; the model reads on from there."""

    def extended(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' k and v [batch, new, heads, head_dim]; returns all of the layer's, old and new."""
        begin, end = self.length, self.length + k.shape[1]
        for stored, new in ((self.k, k), (self.v, v)):
            stored[layer_idx, :, :, begin:end] = new.transpose(1, 2)
        return self.k[layer_idx, :, :, :end].transpose(1, 2), self.v[layer_idx, :, :, :end].transpose(1, 2)


class Transformer(nn.Module):
    """Decoder-only transformer: pre-norm blocks, rotary positions, an MLP four times as wide, output head tied to the
    embedding.

    Args:
        shape: the sizes.
        attention: the attention function of every block, causal and aligned at the last key; may be replaced at any
            time.
        attention_dtype: q, k, v are handed to it in this dtype; everything else follows the surrounding autocast.
        generator: draws the initial weights, so that equal seeds give equal models; of the device on which the model
            is made (the current default device).
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        attention: AttentionFn,
        attention_dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.embedding = nn.Embedding(shape.vocabulary, shape.d_model)
        self.blocks = nn.ModuleList(_Block(shape, attention_dtype) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head_dim = shape.head_dim
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes_residual = name.endswith(("from_heads.weight", "mlp.2.weight"))
                std = weight.shape[1] ** -0.5 * (_RESIDUAL_INIT if writes_residual else 1.0)
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seqlen, vocabulary] of the token after each of ``tokens`` [batch, seqlen]."""
        return self.logits(self.features(tokens))

    def features(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the blocks make of each of ``tokens`` [batch, new]: [batch, new, d_model], after the last norm.

        With a ``cache`` the tokens follow those that it holds, and it holds them too afterwards.
        """
        x = self.embedding(tokens)
        begin = 0 if cache is None else cache.length
        rotation = _rotation(begin, begin + tokens.shape[1], self.head_dim, tokens.device)
        for layer_idx, block in enumerate(self.blocks):
            x = block(x, rotation, partial(self._attend, cache, layer_idx))
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """[..., vocabulary] of features [..., d_model]."""
        return linear(features, self.embedding.weight)

    def _attend(self, cache: KVCache | None, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cache is not None:
            k, v = cache.extended(layer_idx, k, v)
        # All functions get the same dtype and no autocast, so that it cannot choose their precision for them.
        with torch.autocast(q.device.type, enabled=False):
            return self.attention(q, k, v)


class _Block(nn.Module):
    def __init__(self, shape: ModelShape, attention_dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.attention_dtype = shape.heads, attention_dtype
        self.attention_norm = nn.LayerNorm(shape.d_model)
        self.to_qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.from_heads = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.mlp_norm = nn.LayerNorm(shape.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(shape.d_model, 4 * shape.d_model, bias=False),
            nn.GELU(),
            nn.Linear(4 * shape.d_model, shape.d_model, bias=False),
        )

    def forward(self, x: Tensor, rotation: Tensor, attend: AttentionFn) -> Tensor:
        qkv = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k = _rotated(qkv[:, :, :2], rotation).to(self.attention_dtype).unbind(dim=2)
        heads = attend(q, k, qkv[:, :, 2].to(self.attention_dtype))  # [batch, seqlen, heads, head_dim]
        x = x + self.from_heads(heads.flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def _rotation(begin: int, end: int, head_dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers [end - begin, 1, 1, head_dim / 2]: each position's angle for each pair of channels."""
    speeds = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(begin, end, device=device)[:, None, None, None] * speeds
    return torch.polar(torch.ones_like(angles), angles)


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [batch, seqlen, 2, heads, head_dim], each two adjacent channels turned by their position's angle; float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)
