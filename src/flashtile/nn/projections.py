"""What the attention modules share: projections into heads and out of them, the options, dense and packed attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashtile.errors import invalid
from flashtile.functional import attention, attention_varlen
from flashtile.nn import torch_state
from flashtile.nn.padding import Packing, packed_positions
from flashtile.nn.rotary import Rotary
from flashtile.spec.options import (
    check_count,
    check_divides,
    check_dropout_p,
    check_flag,
    check_mask_spec,
    check_scale,
    check_softcap,
    describe,
)


class ProjectedAttention(nn.Module):
    """Attention between linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``; base of the public modules.

    The constructor's arguments are explained in ``MultiheadAttention``.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        *,
        n_head_kv: int | None = None,
        head_dim: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        causal: bool = False,
        window: Sequence[int | None] | None = None,
        scale: float | None = None,
        softcap: float = 0.0,
        rotary: Rotary | None = None,
        dropout_p: float = 0.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model, minimum=1)
        self.d_model = d_model
        self.n_head = check_count("n_head", n_head, minimum=1)
        self.n_head_kv = n_head if n_head_kv is None else check_count("n_head_kv", n_head_kv, minimum=1)
        check_divides("n_head_kv", self.n_head_kv, "n_head", n_head)
        if head_dim is None:
            check_divides("n_head", n_head, "d_model", d_model)
            head_dim = d_model // n_head
        self.head_dim = check_count("head_dim", head_dim, minimum=1)
        self.d_key = d_model if d_key is None else check_count("d_key", d_key, minimum=1)
        self.d_value = self.d_key if d_value is None else check_count("d_value", d_value, minimum=1)
        self.causal, self.window, self.scale, self.softcap = causal, window, scale, softcap
        self.rotary, self.dropout_p = rotary, dropout_p
        self._check_options()
        check_flag("qkv_bias", qkv_bias)
        check_flag("out_bias", out_bias)

        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        rows, rows_kv = n_head * head_dim, self.n_head_kv * head_dim
        self.q_proj = nn.Linear(d_model, rows, bias=qkv_bias, **placed)
        self.k_proj = nn.Linear(self.d_key, rows_kv, bias=qkv_bias, **placed)
        self.v_proj = nn.Linear(self.d_value, rows_kv, bias=qkv_bias, **placed)
        self.out_proj = nn.Linear(rows, d_model, bias=out_bias, **placed)

    def extra_repr(self) -> str:
        """The sizes, and the options that differ from their defaults."""
        shown: dict[str, Any] = {"d_model": self.d_model, "n_head": self.n_head}
        defaults = {"n_head_kv": self.n_head, "head_dim": self.d_model // self.n_head}
        defaults |= {"causal": False, "window": None, "scale": None, "softcap": 0.0, "rotary": None, "dropout_p": 0.0}
        shown |= {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _check_options(self) -> None:
        check_mask_spec(causal=self.causal, window=self.window)
        check_scale(self.scale, self.head_dim)
        check_softcap(self.softcap)
        check_dropout_p(self.dropout_p)
        if self.rotary is None:
            return
        if not isinstance(self.rotary, Rotary):
            raise invalid(
                "rotary", got=describe(self.rotary), wanted="a flashtile.nn.Rotary or None", remedy="rotary=Rotary()"
            )
        turning = self.rotary.dim or self.head_dim
        if turning > self.head_dim or turning % 2:
            raise invalid(
                "rotary",
                got=f"{turning} turning coordinates in heads of {self.head_dim}",
                wanted="an even number, no more than head_dim",
                remedy="pass Rotary(dim=...)",
            )

    def _options(self) -> dict[str, Any]:
        """Those of ``flashtile.attention``; dropout only while training."""
        return {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p if self.training else 0.0,
        }

    def _check_input(self, name: str, x: Any, width: int) -> None:
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != width:
            raise invalid(
                name,
                got=describe(x),
                wanted=f"a tensor [batch, seqlen, {width}]",
                remedy="put the batch first: x.transpose(0, 1) for [seqlen, batch, ...], x[None] for a single sequence",
            )
        weight = self.q_proj.weight
        if x.dtype != weight.dtype and weight.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            raise invalid(
                name,
                got=f"{x.dtype} beside parameters of {weight.dtype}",
                wanted="the dtype of the parameters, or torch.autocast",
                remedy=f"pass {name}.to({weight.dtype}), or convert the module",
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., width] each -> q [..., n_head, head_dim], k and v [..., n_head_kv, head_dim]."""
        return self._project_q(query), *self._project_kv(key, value)

    def _project_q(self, query: Tensor) -> Tensor:
        return self.q_proj(query).unflatten(-1, (self.n_head, self.head_dim))

    def _project_kv(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.n_head_kv, self.head_dim)
        return self.k_proj(key).unflatten(-1, heads), self.v_proj(value).unflatten(-1, heads)

    def _joined(self, out: Tensor) -> Tensor:
        """[..., n_head, head_dim] -> [..., d_model]."""
        return self.out_proj(out.flatten(-2))

    def _attend_dense(self, x: Tensor, value: Tensor) -> Tensor:
        """Self-attention of [batch, seqlen, d_model] without padding."""
        q, k, v = self._project(x, x, value)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, k, torch.arange(q.shape[1], device=q.device))
        return self._joined(attention(q, k, v, **self._options()))

    def _attend_packed(self, x: Tensor, value: Tensor, rows: Packing) -> Tensor:
        """``_attend_dense`` for padded batches; everything but packing and unpacking sees tokens alone."""
        tokens = rows.pack(x)
        q, k, v = self._project(tokens, tokens, tokens if value is x else rows.pack(value))
        if self.rotary is not None:
            _, positions = packed_positions(rows.cu_seqlens, num_tokens=len(q))
            q, k = self.rotary.turn(q, k, positions)
        return rows.unpack(self._joined(self._attend_varlen(q, k, v, rows, rows)))

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, rows: Packing, rows_kv: Packing) -> Tensor:
        """[tokens, heads, head_dim] each."""
        return attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q=rows.cu_seqlens,
            cu_seqlens_kv=rows_kv.cu_seqlens,
            max_seqlen_q=rows.max_seqlen,
            max_seqlen_kv=rows_kv.max_seqlen,
            **self._options(),
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also takes what ``torch.nn.MultiheadAttention`` saved."""
        rows_kv = self.n_head_kv * self.head_dim
        rows = {"q_proj": self.n_head * self.head_dim, "k_proj": rows_kv, "v_proj": rows_kv}
        error_msgs.extend(torch_state.translate(state_dict, prefix, rows))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
