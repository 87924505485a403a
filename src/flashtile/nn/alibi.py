"""The slopes of ALiBi, attention with linear biases."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.spec.options import check_count


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """One slope per head, a geometric sequence from ``2 ** (-8 / heads)`` to ``2 ** -8``.

    If ``heads`` is no power of two, the slopes for the next lower power come first, then every other one of those for
    the next higher power.

    Returns:
        float32 [heads], for the ``alibi_slopes`` of ``flashtile.attention``.

    Raises:
        InvalidArgument: ``heads`` is no integer of at least 1.

    Source: Press et al. 2022, "Train Short, Test Long", section 3 and the authors' code for other numbers of heads.

    Example:
        >>> from flashtile.nn.alibi import alibi_slopes
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    check_count("heads", heads, minimum=1)
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * (head + 1) / power for head in range(power)]
    exponents += [4 * (head + 1) / power for head in range(0, 2 * (heads - power), 2)]
    return 2.0 ** -torch.tensor(exponents, dtype=torch.float32, device=device)
