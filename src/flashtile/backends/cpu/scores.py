"""What happens to a tile of raw scores between the product q @ k.T and the softmax, and back in the gradient.

In order: scale, softcap, bias and ALiBi, masks. Only this file knows these options; ``tiled.py`` never asks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashtile.backends.cpu.addressing import Sequence
from flashtile.spec import dropout, masks
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows and columns of one sequence's score matrix."""

    rows: slice
    cols: slice
    is_full: bool
    """Whether window and causality leave every pair of the tile visible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRules:
    """The options of a problem as they apply to the score tiles [heads_q, BLOCK_Q, BLOCK_KV] of one sequence."""

    problem: AttentionProblem
    operands: Operands
    sequence: Sequence
    _hidden_pairs: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def hides(self, tile: Tile) -> bool:
        """Whether the boolean mask empties the whole tile, so that it need not be computed."""
        mask = self.operands.mask
        return mask is not None and not bool(self._tile_of(mask, tile).any())

    def scaled_and_capped(self, s: Tensor) -> Tensor:
        """The scores after scale and softcap, from the product q @ k.T, which they overwrite."""
        s, softcap = s.mul_(self.problem.scale), self.problem.softcap
        return s.div_(softcap).tanh_().mul_(softcap) if softcap > 0 else s

    def slope_of_cap(self, s_capped: Tensor) -> Tensor | None:
        """d(capped score) / d(raw score): tanh' = 1 - tanh ** 2; None without a softcap."""
        softcap = self.problem.softcap
        return 1 - (s_capped / softcap) ** 2 if softcap > 0 else None

    def biased_and_masked(self, s: Tensor, tile: Tile) -> Tensor:
        """The final scores: bias and ALiBi added, hidden pairs at -inf; overwrites the capped ones."""
        operands = self.operands
        if operands.bias is not None:
            s += self._tile_of(operands.bias, tile)
            torch.threshold_(s, masks.HIDDEN_BELOW, -math.inf)
        if operands.alibi_slopes is not None:
            slopes = operands.alibi_slopes.to(s.dtype)
            slopes = slopes if slopes.dim() == 1 else slopes[self.sequence.batch_idx]
            q_pos, kv_pos = self._positions(tile)
            s -= slopes[:, None, None] * (q_pos + self._offset - kv_pos).abs()
        if not tile.is_full:
            self._hide(s, tile)
        if operands.mask is not None:
            s.masked_fill_(~self._tile_of(operands.mask, tile), -math.inf)
        return s

    def add_bias_gradient(self, d_bias: Tensor, d_s: Tensor, tile: Tile) -> None:
        """Adds a tile's share to the gradient accumulator, which has the bias's own (broadcast) shape."""
        target = self._tile_of(d_bias, tile)
        target += d_s.sum_to_size(target.shape)

    def dropped(self, p: Tensor, tile: Tile) -> Tensor:
        """Probabilities (or their gradient) after dropout."""
        seed, dropout_p = self.operands.dropout_seed, self.problem.dropout_p
        if seed is None:
            return p
        keep = dropout.keep_mask(
            seed,
            dropout_p=dropout_p,
            batch_idx=torch.tensor(self.sequence.batch_idx, device="cpu"),
            head_idx=torch.arange(self.problem.heads_q, device="cpu")[:, None, None],
            q_pos=torch.arange(tile.rows.start, tile.rows.stop, device="cpu")[:, None],
            kv_begin=tile.cols.start,
            kv_end=tile.cols.stop,
        )
        return p * keep / (1 - dropout_p)

    def _hide(self, s: Tensor, tile: Tile) -> None:
        """-inf for the pairs that the window hides, whatever stood there: faster than ``masked_fill_``."""
        mask, diagonal = self.problem.mask, tile.rows.start + self._offset - tile.cols.start
        if mask.right is not None:
            s.tril_(diagonal + mask.right)
        if mask.left is not None:
            s.triu_(diagonal - mask.left)
        s += self._hidden(tile, s.dtype)

    def _hidden(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """-inf where the window hides a pair, else 0; tiles of one size and distance from the diagonal share it."""
        rows, cols = tile.rows, tile.cols
        place = (cols.start - rows.start, rows.stop - rows.start, cols.stop - cols.start)
        if place not in self._hidden_pairs:
            q_pos, kv_pos = self._positions(tile)
            hidden = ~masks.is_visible(self.problem.mask, q_pos, kv_pos, self._offset)
            self._hidden_pairs[place] = torch.zeros(hidden.shape, dtype=dtype, device="cpu").masked_fill_(
                hidden, -math.inf
            )
        return self._hidden_pairs[place]

    @property
    def _offset(self) -> int:
        return self.sequence.seqlen_kv - self.sequence.seqlen_q

    def _positions(self, tile: Tile) -> tuple[Tensor, Tensor]:
        rows, cols = (torch.arange(part.start, part.stop, device="cpu") for part in (tile.rows, tile.cols))
        return rows[:, None], cols

    def _tile_of(self, tensor: Tensor, tile: Tile) -> Tensor:
        """A view of the tile's part of a tensor that broadcasts to [batch, heads_q, seqlen_q, seqlen_kv]."""
        batch, _, rows, cols = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        view = tensor[(None,) * (4 - tensor.dim())][self.sequence.batch_idx if batch > 1 else 0]
        return view[:, tile.rows if rows > 1 else slice(None), tile.cols if cols > 1 else slice(None)]
