"""Self-attention as one sketches it, twice with the same parameters: as FlashAttention, and as the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- torch's own name for it

from flashtile.nn.padding import Packing, packing_of
from flashtile.nn.projections import ProjectedAttention
from flashtile.spec.masks import is_visible
from flashtile.spec.options import check_flag, check_mask_spec


class _SelfAttention(ProjectedAttention):
    """The arguments that FlashAttention explains."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        n_head_kv: int | None = None,
        causal: bool = False,
        window: Sequence[int | None] | None = None,
        dropout_p: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_flag("bias", bias)
        super().__init__(
            d_model,
            n_head,
            n_head_kv=n_head_kv,
            causal=causal,
            window=window,
            dropout_p=dropout_p,
            qkv_bias=bias,
            out_bias=bias,
            device=device,
            dtype=dtype,
        )


class FlashAttention(_SelfAttention):
    """Multi-head self-attention that never stores the scores and spends nothing on padding.

    Parameters and state dict are those of ``NaiveAttention`` and of ``MultiheadAttention``, which has more options,
    cross-attention and a cache. The state dict of ``torch.nn.MultiheadAttention`` loads too.

    Args:
        d_model: size of x's last axis.
        n_head: heads of the queries; divides d_model.
        n_head_kv: heads of keys and values, divides n_head; None is n_head.
        causal: token i sees no token after it.
        window: (left, right), how far a token sees to either side, itself not counted; None on a side = unlimited.
        dropout_p: probability of dropping an attention weight while training.
        bias: whether the four projections have biases.
        device, dtype: of the parameters.

    Raises:
        InvalidArgument: a wrong argument, which the text names.

    Cost: as ``flashtile.attention``, plus the projections.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2 (its h is our n_head).

    Example:
        >>> import torch
        >>> from flashtile.nn import FlashAttention
        >>> x, lengths = torch.randn(2, 128, 64), torch.tensor([128, 40])
        >>> pad_mask = torch.arange(128) < lengths[:, None]  # True = a token
        >>> FlashAttention(64, 4, causal=True)(x, pad_mask).shape
        torch.Size([2, 128, 64])
    """

    def forward(self, x: Tensor, pad_mask: Tensor | Packing | None = None) -> Tensor:
        """Attention of each sequence to itself.

        Args:
            x: [batch, seqlen, d_model], in the parameters' dtype unless torch.autocast is on.
            pad_mask: [batch, seqlen] boolean, True = a token; padding may be on either side and in between. Or the
                mask's ``Packing``, made once for all layers: making one from a mask on a GPU waits for the mask.
                In compiled code, which cannot wait, the projections compute the padding too, and attention does not.

        Returns:
            Like x. Each sequence gives what it gives without its padding; padded positions are 0, and so are their
            gradients, whatever they hold.

        Raises:
            InvalidArgument: x of another width or dtype; a mask of another kind or shape.
        """
        self._check_input("x", x, self.d_model)
        if pad_mask is None:
            return self._attend_dense(x, x)
        rows = packing_of("pad_mask", pad_mask, x)
        return self._attend_packed(x, x, rows)


class NaiveAttention(_SelfAttention):
    """``FlashAttention`` as the textbook has it, for comparison: it stores every score and computes the padding.

    Takes the same arguments, has the same parameters and gives the same results; only what dropout drops differs.

    Example:
        >>> import torch
        >>> from flashtile.nn import FlashAttention, NaiveAttention
        >>> flash, naive = FlashAttention(64, 4), NaiveAttention(64, 4)
        >>> naive.load_state_dict(flash.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 10, 64)
        >>> torch.allclose(flash(x), naive(x), atol=1e-5)
        True
    """

    def forward(self, x: Tensor, pad_mask: Tensor | Packing | None = None) -> Tensor:
        """As ``FlashAttention.forward``; memory [batch, n_head, seqlen, seqlen]."""
        self._check_input("x", x, self.d_model)
        is_token = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if pad_mask is not None:
            is_token = packing_of("pad_mask", pad_mask, x).mask
            x = x.masked_fill(~is_token[..., None], 0.0)
        q, k, v = (heads.transpose(1, 2) for heads in self._project(x, x, x))  # [batch, heads, seqlen, head_dim]
        k, v = (heads.repeat_interleave(self.n_head // self.n_head_kv, dim=1) for heads in (k, v))

        scores = q @ k.mT * self.head_dim**-0.5  # [batch, n_head, seqlen, seqlen]
        scores = scores.masked_fill(~self._visible(is_token)[:, None], torch.finfo(scores.dtype).min)
        weights = F.dropout(torch.softmax(scores, dim=-1), self.dropout_p, training=self.training)
        out = self._joined((weights @ v).transpose(1, 2))
        return out.masked_fill(~is_token[..., None], 0.0)

    def _visible(self, is_token: Tensor) -> Tensor:
        """[batch, seqlen, seqlen], True where the row's token sees the column's."""
        positions = is_token.cumsum(dim=1)
        mask = check_mask_spec(causal=self.causal, window=self.window)
        return is_visible(mask, positions[:, :, None], positions[:, None, :], 0) & is_token[:, None, :]
