"""Rotary position embedding: each pair of coordinates is turned by an angle that grows with the token's position.

Source: Su et al. 2021, "RoFormer", section 3.2.2 (its theta_i are our inverse frequencies); for ``xpos_decay``, Sun et
al. 2022, "A Length-Extrapolatable Transformer", algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.spec.options import check_count, check_flag, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The rotary embedding of an attention module; it has no tables, so sequences may be of any length.

    Args:
        dim: how many coordinates of each head turn, an even number; None for all.
        base: larger bases turn more slowly.
        interleaved: pairs are coordinates (0, 1), (2, 3), ...; otherwise (0, dim / 2), (1, dim / 2 + 1), ...

    Raises:
        InvalidArgument: an odd or non-positive ``dim``, a ``base`` that is not positive.

    Example:
        >>> from flashtile.nn import MultiheadAttention, Rotary
        >>> attention = MultiheadAttention(512, 8, causal=True, rotary=Rotary(base=500000.0))
    """

    dim: int | None = None
    base: float = 10000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dim is not None:
            _check_rotary_dim("dim", self.dim)
        if not isinstance(self.base, (int, float)) or not self.base > 0:
            raise invalid("base", got=describe(self.base), wanted="a positive number", remedy="leave it out for 10000")
        check_flag("interleaved", self.interleaved)

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [..., seqlen, heads, head_dim] at ``positions`` [..., seqlen], turned."""
        cos, sin = rotary_cos_sin(positions, self.dim or q.shape[-1], base=self.base)
        turned_q = apply_rotary(q, cos, sin, interleaved=self.interleaved)
        return turned_q, apply_rotary(k, cos, sin, interleaved=self.interleaved)


def rotary_cos_sin(positions: Tensor, rotary_dim: int, *, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles ``position / base ** (2 * i / rotary_dim)``, i counting coordinate pairs.

    Args:
        positions: any shape, integers or floats, on any device.
        rotary_dim: even; the number of coordinates that turn.
        base: larger bases turn more slowly.

    Returns:
        Two float32 tensors [*positions.shape, rotary_dim / 2]. ``torch.arange(seqlen)`` as positions makes a table.

    Raises:
        InvalidArgument: an odd or non-positive ``rotary_dim``.

    Example:
        >>> import torch
        >>> from flashtile.nn.rotary import rotary_cos_sin
        >>> cos, sin = rotary_cos_sin(torch.arange(128), 64)
        >>> cos.shape
        torch.Size([128, 32])
    """
    _check_rotary_dim("rotary_dim", rotary_dim)
    inverse_frequencies = base ** -_fractions(rotary_dim, positions.device)
    angles = positions[..., None].to(torch.float32) * inverse_frequencies
    return angles.cos(), angles.sin()


def xpos_decay(positions: Tensor, rotary_dim: int, *, scale_base: float) -> Tensor:
    """The factor on a query's cosines and sines, whose inverse goes on the key's, that makes far pairs weigh less.

    Args:
        positions: any shape; only their differences matter, so count from the middle of long sequences.
        rotary_dim: even; the number of coordinates that turn.
        scale_base: how many positions it takes for the decay to act once.

    Returns:
        float32, [*positions.shape, rotary_dim / 2].

    Raises:
        InvalidArgument: an odd or non-positive ``rotary_dim``.

    Example:
        >>> import torch
        >>> from flashtile.nn.rotary import xpos_decay
        >>> xpos_decay(torch.zeros(1), 4, scale_base=512.0).tolist()
        [[1.0, 1.0]]
    """
    _check_rotary_dim("rotary_dim", rotary_dim)
    per_step = (_fractions(rotary_dim, positions.device) + 0.4) / 1.4
    return per_step ** (positions[..., None].to(torch.float32) / scale_base)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turns the first ``rotary_dim`` coordinates of every head by its token's angles; the others stay as they are.

    Args:
        x: [..., seqlen, heads, head_dim], or packed [tokens, heads, head_dim]; floating point.
        cos, sin: [..., seqlen, rotary_dim / 2], or [tokens, rotary_dim / 2]: one row per token, broadcast to x's
            leading axes; any floating dtype.
        interleaved: pairs are coordinates (0, 1), (2, 3), ...; otherwise (0, rotary_dim / 2), (1, rotary_dim / 2 + 1).

    Returns:
        A tensor like x. Differentiable with respect to all three tensors.

    Raises:
        InvalidArgument: cos and sin of unlike shapes, or more coordinates than a head has.

    Cost: reads and writes x once, if compiled. Numerics: float32 (float64 for float64 inputs), rounded once.

    Example:
        >>> import torch
        >>> from flashtile.nn.rotary import apply_rotary, rotary_cos_sin
        >>> q = torch.randn(2, 128, 8, 64)
        >>> cos, sin = rotary_cos_sin(torch.arange(128), 64)
        >>> apply_rotary(q, cos, sin).shape
        torch.Size([2, 128, 8, 64])
    """
    if cos.shape != sin.shape:
        raise invalid(
            "sin",
            got=f"shape {list(sin.shape)} beside cos of shape {list(cos.shape)}",
            wanted="the shape of cos",
            remedy="make both from the same positions",
        )
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise invalid(
            "cos",
            got=f"{cos.shape[-1]} angles per token, for heads of {x.shape[-1]} coordinates",
            wanted="at most head_dim / 2 angles",
            remedy="each angle turns two coordinates: pass one cosine per pair, not one per coordinate",
        )
    turning = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32))
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # an axis for the heads
    turned = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([joined.to(x.dtype), x[..., rotary_dim:]], dim=-1)


def _fractions(rotary_dim: int, device: torch.device) -> Tensor:
    """2 * i / rotary_dim for each pair i: float32 [rotary_dim / 2]."""
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim


def _check_rotary_dim(name: str, rotary_dim: int) -> None:
    if check_count(name, rotary_dim, minimum=2) % 2:
        raise invalid(name, got=str(rotary_dim), wanted="an even number", remedy="coordinates turn in pairs; drop one")
