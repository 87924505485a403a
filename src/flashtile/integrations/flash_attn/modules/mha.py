"""``flash_attn.modules.mha``: attention modules with flash_attn's constructor, parameters and state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashtile.errors import UnsupportedProblem, invalid
from flashtile.functional import attention
from flashtile.integrations.flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashtile.integrations.flash_attn.layers.rotary import RotaryEmbedding
from flashtile.integrations.flash_attn.translation import check_tensor, in_callers_words, options_of, window_of
from flashtile.nn.alibi import alibi_slopes as slopes_of
from flashtile.nn.padding import packed_positions
from flashtile.spec.options import check_count, check_divides, describe

__all__ = ["MHA", "FlashCrossAttention", "FlashSelfAttention"]


class _Inner(nn.Module):
    """What FlashSelfAttention and FlashCrossAttention share: everything but the tensors."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        window_of(window_size)
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the slopes with the module, but leaves them their precision, whatever dtype the module is cast to."""
        exact = self.alibi_slopes
        super()._apply(fn, recurse)
        if exact is not None and self.alibi_slopes is not None:
            self.alibi_slopes = exact.to(self.alibi_slopes.device)
        return self

    def options(self, causal: bool | None) -> dict[str, Any]:
        """Those of the flash_attn functions; dropout only while training."""
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Inner):
    """Attention of a qkv tensor to itself; no parameters.

    Args:
        causal: see ``flash_attn_func``, as for all of these.
        softmax_scale: None is head_dim ** -0.5.
        attention_dropout: probability of dropping an attention weight while training.
        window_size: (left, right), -1 = unlimited.
        alibi_slopes: [heads] or [batch, heads] float32.
        deterministic: ask for a bitwise repeatable backward.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """[batch, seqlen, 3, heads, head_dim] -> [batch, seqlen, heads, head_dim]; with cu_seqlens [batch + 1] int32
        and max_seqlen, [total, 3, heads, head_dim] -> [total, heads, head_dim]. ``causal`` overrides the module's.
        """
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self.options(causal))
        packing: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return flash_attn_varlen_qkvpacked_func(qkv, **packing, **self.options(causal))


class FlashCrossAttention(_Inner):
    """Attention of q to a kv tensor; no parameters. The arguments are FlashSelfAttention's, in flash_attn's order."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    @in_callers_words({"cu_seqlens_q": "cu_seqlens", "max_seqlen_q": "max_seqlen"})
    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q [batch, seqlen_q, heads, head_dim], kv [batch, seqlen_k, 2, heads_k, head_dim] -> like q; with cu_seqlens,
        max_seqlen of q and cu_seqlens_k, max_seqlen_k of kv, [total_q, ...] and [total_k, 2, ...] -> [total_q, ...].
        """
        if cu_seqlens is None and cu_seqlens_k is None:
            return flash_attn_kvpacked_func(q, kv, **self.options(causal))
        packing: dict[str, Any] = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens_k}
        packing |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen_k}
        return flash_attn_varlen_kvpacked_func(q, kv, **packing, **self.options(causal))


class MHA(nn.Module):
    """Multi-head attention with its projections, loadable from the state dict of flash_attn's.

    Submodules with parameters: ``Wqkv`` (its rows are queries, keys, values), or ``Wq`` and ``Wkv`` with cross_attn;
    ``out_proj``; and with dwconv ``dwconv_qkv``, or ``dwconv_q`` and ``dwconv_kv``.

    Args:
        embed_dim: size of x's last axis; num_heads divides it.
        num_heads: of the queries.
        num_heads_kv: of keys and values, divides num_heads; None is num_heads.
        cross_attn: queries come from x, keys and values from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout: probability of dropping an attention weight while training.
        softmax_scale, causal, window_size: see ``flash_attn_func``.
        layer_idx: the key of this layer's cache in ``inference_params``.
        dwconv: a causal depth-wise convolution of width 3 over the projected sequence.
        rotary_emb_dim: how many coordinates of each head turn; 0 for none. The other three ``rotary_emb`` arguments are
            RotaryEmbedding's.
        use_alibi: ALiBi with the slopes of its authors.
        fused_bias_fc: accepted; torch fuses the bias into the product itself.
        use_flash_attn: accepted; it is flashtile either way, and no option depends on it.
        return_residual: return (out, x).
        checkpointing: keep nothing of the attention for the backward, compute it again.
        device, dtype: of the parameters.

    Raises:
        InvalidArgument: sizes that do not divide.
        UnsupportedProblem: rotary embedding with cross_attn.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        check_divides("num_heads_kv", num_heads_kv, "num_heads", num_heads)
        if cross_attn and rotary_emb_dim > 0:
            raise UnsupportedProblem("MHA turns positions of one sequence: rotary_emb_dim > 0 excludes cross_attn.", {})
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx, self.dwconv = cross_attn, causal, layer_idx, dwconv
        self.rotary_emb_dim, self.return_residual, self.checkpointing = rotary_emb_dim, return_residual, checkpointing
        self.fused_bias_fc, self.use_flash_attn = fused_bias_fc, use_flash_attn

        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * num_heads_kv
        projections = {"q": embed_dim, "kv": kv_dim} if cross_attn else {"qkv": embed_dim + kv_dim}
        for name, width in projections.items():
            self.add_module(f"W{name}", nn.Linear(embed_dim, width, bias=qkv_proj_bias, **placed))
            if dwconv:
                conv = nn.Conv1d(width, width, kernel_size=3, padding=2, groups=width, **placed)
                self.add_module(f"dwconv_{name}", conv)
        slopes = slopes_of(num_heads, device=device) if use_alibi else None
        options: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        options |= {"window_size": window_size, "alibi_slopes": slopes}
        self.inner_attn = FlashSelfAttention(**options)
        self.inner_cross_attn = FlashCrossAttention(**options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **placed)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """A layer's cache of keys and values: [batch_size, max_seqlen, 2, num_heads_kv, head_dim]."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of x to itself, or to x_kv.

        Args:
            x: [batch, seqlen, embed_dim], or with cu_seqlens [total, embed_dim].
            x_kv: the same for keys and values, with cross_attn only; None is x.
            key_padding_mask: [batch, seqlen_k] boolean, True = a key, for padded batches. Packing them with
                ``bert_padding.unpad_input`` and cu_seqlens is faster.
            cu_seqlens, max_seqlen: [batch + 1] int32 boundaries of packed sequences, and the longest of them.
            mixer_subset: an index of x's sequence axis: the queries, with cross_attn only.
            inference_params: an object with ``key_value_memory_dict``, ``max_seqlen``, ``max_batch_size``,
                ``seqlen_offset``, ``batch_size_offset`` and ``lengths_per_sample``. Keys and values of x are appended
                to the cache at layer_idx, made at the first call, behind ``seqlen_offset`` tokens; or, if that is not 0
                and ``lengths_per_sample`` [max_batch_size] int32 is not None, behind so many. Has no gradient.
            cu_seqlens_k, max_seqlen_k: of x_kv, with cross_attn and cu_seqlens.

        Returns:
            Like x (rows of mixer_subset only); (out, x) with return_residual.

        Raises:
            InvalidArgument, UnsupportedProblem: arguments that do not go together, which the text names.
        """
        for_keys = {"x_kv": x_kv, "mixer_subset": mixer_subset}
        for_keys |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
        self._check_together(key_padding_mask, cu_seqlens, inference_params, for_keys)
        packing: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if self.cross_attn:
            if x_kv is None:
                x_kv, cu_seqlens_k, max_seqlen_k = x, cu_seqlens, max_seqlen
            packing |= {"cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
            q = self._projected("q", x if mixer_subset is None else x[:, mixer_subset])
            kv = self._projected("kv", x_kv).unflatten(-2, (2, self.num_heads_kv))
            context = self._attend(self.inner_cross_attn, (q, kv), packing, key_padding_mask)
        elif inference_params is not None:
            context = self._attend_cached(self._projected("qkv", x), inference_params)
        else:
            context = self._attend_self(self._projected("qkv", x), packing, key_padding_mask)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _projected(self, name: str, x: Tensor) -> Tensor:
        """[..., heads of everything projected, head_dim]."""
        y = self.get_submodule(f"W{name}")(x)
        if self.dwconv:
            y = self.get_submodule(f"dwconv_{name}")(y.mT)[..., :-2].mT
        return y.unflatten(-1, (-1, self.head_dim))

    def _attend_self(self, qkv: Tensor, packing: dict[str, Any], mask: Tensor | None) -> Tensor:
        """qkv [..., num_heads + 2 * num_heads_kv, head_dim] -> [..., num_heads, head_dim]."""
        cu_seqlens, max_seqlen = packing["cu_seqlens"], packing["max_seqlen"]
        if self.rotary_emb_dim > 0:
            if cu_seqlens is None:
                positions, max_seqlen = torch.arange(qkv.shape[1], device=qkv.device), qkv.shape[1]
            else:
                check_count("max_seqlen", max_seqlen, minimum=0)
                _, positions = packed_positions(cu_seqlens, num_tokens=qkv.shape[0])
            self._turn(qkv, positions, max_seqlen)
        if self.num_heads_kv == self.num_heads:
            return self._attend(self.inner_attn, (qkv.unflatten(-2, (3, self.num_heads)),), packing, mask)
        q, kv = qkv.split((self.num_heads, 2 * self.num_heads_kv), dim=-2)
        packing = packing | {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": packing["max_seqlen"]}
        return self._attend(self.inner_cross_attn, (q, kv.unflatten(-2, (2, self.num_heads_kv))), packing, mask)

    def _turn(self, qkv: Tensor, positions: Tensor, max_seqlen: int) -> None:
        """Rotary embedding of queries and keys, in place."""
        q, k = qkv[..., : self.num_heads, :], qkv[..., self.num_heads : self.num_heads + self.num_heads_kv, :]
        for part, is_key in ((q, False), (k, True)):
            part.copy_(self.rotary_emb.turned(part, positions, is_key=is_key, max_seqlen=max_seqlen))

    def _attend(
        self, inner: _Inner, tensors: tuple[Tensor, ...], packing: dict[str, Any], mask: Tensor | None
    ) -> Tensor:
        run, arguments = (inner, packing) if mask is None else (_attend_masked, {"inner": inner, "mask": mask})
        if self.checkpointing:
            return checkpoint(run, *tensors, use_reentrant=False, **arguments)  # pyright: ignore[reportReturnType]
        return run(*tensors, **arguments)

    def _attend_cached(self, qkv: Tensor, params: Any) -> Tensor:
        """Appends keys and values to the layer's cache, and attends to all of it."""
        if self.layer_idx is None:
            raise invalid(
                "layer_idx", got="None beside inference_params", wanted="an int", remedy="MHA(..., layer_idx=...)"
            )
        batch, seqlen = qkv.shape[:2]
        if self.layer_idx not in params.key_value_memory_dict:
            params.key_value_memory_dict[self.layer_idx] = self.allocate_inference_cache(
                params.max_batch_size, params.max_seqlen, qkv.dtype
            )
        rows = slice(params.batch_size_offset, params.batch_size_offset + batch)
        k_cache, v_cache = params.key_value_memory_dict[self.layer_idx][rows].unbind(2)
        begin = params.seqlen_offset
        if begin != 0 and params.lengths_per_sample is not None:
            begin = params.lengths_per_sample[rows]
        if self.rotary_emb_dim > 0:
            first = begin[:, None] if isinstance(begin, Tensor) else begin
            self._turn(qkv, first + torch.arange(seqlen, device=qkv.device), params.max_seqlen)
        q, k, v = qkv.split((self.num_heads, self.num_heads_kv, self.num_heads_kv), dim=-2)
        options = self.inner_cross_attn.options(None)
        del options["dropout_p"], options["deterministic"]
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=begin, **options)

    def _check_together(
        self, key_padding_mask: Any, cu_seqlens: Any, inference_params: Any, for_keys: dict[str, Any]
    ) -> None:
        if not self.cross_attn:
            for name, value in for_keys.items():
                if value is not None:
                    raise invalid(
                        name,
                        got=describe(value),
                        wanted="None: this module attends to x alone",
                        remedy="MHA(..., cross_attn=True)",
                    )
        present = {
            "key_padding_mask": key_padding_mask is not None,
            "cu_seqlens": cu_seqlens is not None,
            "inference_params": inference_params is not None,
            "mixer_subset": for_keys["mixer_subset"] is not None,
            "dwconv": self.dwconv,
            "cross_attn": self.cross_attn,
        }
        for name, others in _EXCLUDED.items():
            clashing = [other for other in others if present[other]]
            if present[name] and clashing:
                raise UnsupportedProblem(f"MHA takes no {name} together with {', '.join(clashing)}.", {})


_EXCLUDED = {
    "cu_seqlens": ("key_padding_mask", "mixer_subset", "dwconv"),
    "inference_params": ("key_padding_mask", "cu_seqlens", "dwconv", "cross_attn"),
}


@in_callers_words({"mask": "key_padding_mask"})
def _attend_masked(*tensors: Tensor, inner: _Inner, mask: Tensor) -> Tensor:
    """(qkv,) or (q, kv), padded, of which only the keys in mask [batch, seqlen_k] are visible."""
    check_tensor("mask", mask, "[batch, seqlen_k]", dtypes=(torch.bool,))
    *q, packed = tensors
    q, k, v = (*q, *packed.unbind(-3))
    options = options_of(**{"softcap": 0.0, **inner.options(None)})
    return attention(q, k, v, mask=mask[:, None, None, :], **options)
