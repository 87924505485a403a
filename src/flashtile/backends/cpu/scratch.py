"""Memory for tiles, used again by every tile of a sequence.

Otherwise it is luck whether the allocator gives a tile fresh pages, which cost more time than the sums in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """Products and casts of tiles; a result lives until the next one of the same name."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype  # of softmax statistics, sums, and everything between two products
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a [heads, m, n] @ b [heads, n, p] in the dtype of sums; 16-bit products are rounded before."""
        shape = (*a.shape[:-1], b.shape[-1])
        if a.dtype == self._dtype:
            return torch.bmm(a, b, out=self._view(name, shape, self._dtype))
        return self.cast(name, torch.bmm(a, b, out=self._view("product", shape, a.dtype)), self._dtype)

    def cast(self, name: str, tile: Tensor, dtype: torch.dtype) -> Tensor:
        """The tile in a dtype and contiguous, as products want it; itself if it is both already."""
        if tile.dtype == dtype and tile.is_contiguous():
            return tile
        return self._view(name, tile.shape, dtype).copy_(tile)

    def zeros(self, name: str, shape: Sequence[int]) -> Tensor:
        """Zeros in the dtype of sums."""
        return self._view(name, shape, self._dtype).zero_()

    def _view(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size, memory = math.prod(shape), self._memory.get((name, dtype))
        if memory is None or memory.numel() < size:
            memory = self._memory[name, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return memory[:size].view(shape)
