"""Multi-head attention with everything that models ask of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtile.errors import UnsupportedProblem, invalid
from flashtile.functional import attention
from flashtile.nn import torch_state
from flashtile.nn.kv_cache import KVCache
from flashtile.nn.memory import Memory
from flashtile.nn.padding import Packing, packing_of
from flashtile.nn.projections import ProjectedAttention
from flashtile.spec.options import describe


class MultiheadAttention(ProjectedAttention):
    """Multi-head attention of a batch to itself, to another, or to a cache; padding costs nothing.

    Loads the state dict of ``torch.nn.MultiheadAttention``; see ``from_torch``.

    Args:
        d_model: size of the query's and the output's last axis.
        n_head: heads of the queries; divides d_model unless head_dim is given.
        n_head_kv: heads of keys and values, divides n_head; None is n_head.
        head_dim: size of a head; None is d_model / n_head.
        d_key: size of the key's last axis, for cross-attention; None is d_model.
        d_value: size of the value's last axis, for cross-attention; None is d_key.
        causal: query i sees keys j <= i + seqlen_kv - seqlen_q (the last query is aligned with the last key).
        window: (left, right), how far a query sees to either side of that; None on a side = unlimited.
        scale: factor on the scores; None is head_dim ** -0.5.
        softcap: c > 0 replaces scores s by c * tanh(s / c).
        rotary: a ``Rotary`` that turns queries and keys by their positions; for self-attention.
        dropout_p: probability of dropping an attention weight while training.
        qkv_bias, out_bias: whether the projections into heads, and the one out of them, have biases.
        device, dtype: of the parameters.

    Raises:
        InvalidArgument: a wrong argument, which the text names.

    Cost: as ``flashtile.attention``, plus the projections.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2; Ainslie et al. 2023, "GQA", section 2.2.

    Example:
        >>> import torch
        >>> from flashtile.nn import MultiheadAttention, Rotary
        >>> attention = MultiheadAttention(64, 8, n_head_kv=2, causal=True, rotary=Rotary())
        >>> x = torch.randn(1, 10, 64)
        >>> with torch.inference_mode():
        ...     cache = attention.new_cache(1, capacity=10)
        ...     prompt = attention(x[:, :9], cache=cache)
        ...     token = attention(x[:, 9:], cache=cache)
        ...     torch.allclose(token, attention(x)[:, 9:], atol=1e-5)
        True
    """

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention, **options: Any) -> MultiheadAttention:
        """The module that computes what a ``torch.nn.MultiheadAttention`` does, with copies of its parameters.

        Any ``embed_dim``, ``num_heads``, ``kdim``, ``vdim``, ``bias`` and ``dropout``. Calls differ: the batch comes
        first, the output is a tensor alone, padding is ``~key_padding_mask`` (``pad_mask`` in self-attention, else
        ``pad_mask_kv``), and ``causal`` is an option of the module.

        Args:
            module: it needs ``batch_first=True``.
            options: further ones of the constructor, for example ``causal=True``.

        Raises:
            InvalidArgument: no torch.nn.MultiheadAttention, or one whose inputs have the batch second.
            UnsupportedProblem: one made with add_bias_kv or add_zero_attn.
        """
        made = cls(**{**torch_state.options_of(module), **options})
        made.load_state_dict(module.state_dict())
        return made.train(module.training)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for this layer, on its device.

        Args:
            batch: how many sequences.
            capacity: how many keys each of them can have.
            dtype: None is the parameters' dtype; under torch.autocast pass that of autocast.
        """
        weight = self.k_proj.weight
        return KVCache(
            batch,
            capacity,
            heads_kv=self.n_head_kv,
            head_dim=self.head_dim,
            device=weight.device,
            dtype=dtype or weight.dtype,
        )

    def new_memory(
        self, key: Tensor, value: Tensor | None = None, *, pad_mask_kv: Tensor | Packing | None = None
    ) -> Memory:
        """What cross-attention attends to, projected once for many queries: the steps of a generation, say.

        Pass it as the key of the calls; they give what they give with these arguments.

        Args:
            key: [batch, seqlen_kv, d_key].
            value: [batch, seqlen_kv, d_value]; None is the key.
            pad_mask_kv: [batch, seqlen_kv] boolean, True = a token, or its ``Packing``. Padding is not projected.

        Raises:
            InvalidArgument: a wrong argument, which the text names.

        Example:
            >>> import torch
            >>> from flashtile.nn import MultiheadAttention
            >>> attention = MultiheadAttention(64, 8)
            >>> encoded, token = torch.randn(1, 100, 64), torch.randn(1, 1, 64)
            >>> torch.allclose(attention(token, attention.new_memory(encoded)), attention(token, encoded))
            True
        """
        value = key if value is None else value
        self._check_sources(key, value)
        if pad_mask_kv is None:
            k, v = self._project_kv(key, value)
            return Memory(k=k, v=v)
        rows = packing_of("pad_mask_kv", pad_mask_kv, key)
        tokens = rows.pack(key)
        k, v = self._project_kv(tokens, tokens if value is key else rows.pack(value))
        return Memory(k=k, v=v, packing=rows)

    def forward(
        self,
        query: Tensor,
        key: Tensor | Memory | None = None,
        value: Tensor | None = None,
        *,
        pad_mask: Tensor | Packing | None = None,
        pad_mask_kv: Tensor | Packing | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attention of the query to itself, to key and value, or to a cache with the query appended.

        Args:
            query: [batch, seqlen_q, d_model], in the parameters' dtype unless torch.autocast is on.
            key: [batch, seqlen_kv, d_key], or the ``new_memory`` of one; None, or the very same tensor as the query, is
                self-attention.
            value: [batch, seqlen_kv, d_value]; None is the key.
            pad_mask: [batch, seqlen_q] boolean, True = a token; padding may be on either side and in between. Or the
                mask's ``Packing``, made once for all layers: making one from a mask on a GPU waits for the mask.
                In compiled code, which cannot wait, the projections compute the padding too, and attention does not.
            pad_mask_kv: the same for key and value, [batch, seqlen_kv]; in self-attention pad_mask serves them too.
            cache: of this layer, from ``new_cache``, for self-attention. Keys and values of the tokens are appended to
                it, and every query sees what is in it, as causal and window allow. Needs torch.no_grad() or
                inference_mode().

        Returns:
            Like query. Each sequence gives what it gives without its padding; padded positions are 0, and so are their
            gradients, whatever they hold.

        Raises:
            InvalidArgument: a wrong argument, or one that does not go with the others; a cache that is full.
            UnsupportedProblem: rotary embedding or a cache with a key that is not the query.
        """
        key = query if key is None else key
        is_self = key is query
        self._check_input("query", query, self.d_model)
        self._check_together(is_self, pad_mask_kv, cache)
        if isinstance(key, Memory):
            self._check_memory(key, value=value, pad_mask_kv=pad_mask_kv)
            return self._attend_memory(query, key, pad_mask)
        if not is_self:
            return self._attend_memory(query, self.new_memory(key, value, pad_mask_kv=pad_mask_kv), pad_mask)
        value = query if value is None else value
        self._check_sources(query, value)
        if cache is not None:
            self._check_cache(cache, query)
            return self._attend_cached(query, value, pad_mask, cache)
        if pad_mask is None:
            return self._attend_dense(query, value)
        return self._attend_packed(query, value, packing_of("pad_mask", pad_mask, query))

    def _attend_memory(self, query: Tensor, memory: Memory, pad_mask: Tensor | Packing | None) -> Tensor:
        if memory.batch != query.shape[0]:
            raise invalid(
                "key",
                got=f"batch {memory.batch} beside the query's {query.shape[0]}",
                wanted="the batch size of the query",
                remedy="expand key and value to the query's batch",
            )
        if memory.packing is None and pad_mask is None:
            return self._joined(attention(self._project_q(query), memory.k, memory.v, **self._options()))
        rows, (k, v, rows_kv) = _packing("pad_mask", pad_mask, query), memory.packed()
        q = self._project_q(rows.pack(query))
        return rows.unpack(self._joined(self._attend_varlen(q, k, v, rows, rows_kv)))

    def _attend_cached(self, query: Tensor, value: Tensor, pad_mask: Tensor | Packing | None, cache: KVCache) -> Tensor:
        """The query is also the key."""
        rows = _packing("pad_mask", pad_mask, query)
        tokens = rows.pack(query)
        q, k, v = self._project(tokens, tokens, tokens if value is query else rows.pack(value))
        if self.rotary is not None:
            _, positions = cache.next_positions(rows)
            q, k = self.rotary.turn(q, k, positions)
        cache.append(k, v, packing=rows)
        return rows.unpack(self._joined(cache.attend(q, packing=rows, **self._options())))

    def _check_sources(self, key: Any, value: Any) -> None:
        self._check_input("key", key, self.d_key)
        self._check_input("value", value, self.d_value)
        if value.shape[:2] != key.shape[:2]:
            raise invalid(
                "value",
                got=f"[batch, seqlen] = {list(value.shape[:2])} beside the key's {list(key.shape[:2])}",
                wanted="those of the key",
                remedy="pass one value for each key",
            )

    def _check_memory(self, memory: Memory, **beside: Any) -> None:
        for name, given in beside.items():
            if given is not None:
                raise invalid(
                    name,
                    got=describe(given),
                    wanted="None beside a Memory",
                    remedy="pass it to new_memory, which has it",
                )
        if memory.k.shape[-2:] != (self.n_head_kv, self.head_dim):
            raise invalid(
                "key",
                got=f"a Memory of [heads, head_dim] = {list(memory.k.shape[-2:])}",
                wanted=f"those of this layer, {[self.n_head_kv, self.head_dim]}",
                remedy="make one for each layer, with its new_memory",
            )

    def _check_together(self, is_self: bool, pad_mask_kv: Any, cache: Any) -> None:
        """Raises if something was passed that self-attention has not, or that it alone has."""
        if is_self and pad_mask_kv is not None:
            raise invalid(
                "pad_mask_kv",
                got=describe(pad_mask_kv),
                wanted="None in self-attention",
                remedy="pass it as pad_mask, which serves queries and keys",
            )
        if self.rotary is not None and not is_self:
            raise UnsupportedProblem("rotary turns positions of one sequence: it excludes a key of its own.", {})
        if cache is not None and not is_self:
            raise UnsupportedProblem("cache holds keys of the query's own sequence: it excludes a key of its own.", {})

    def _check_cache(self, cache: Any, query: Tensor) -> None:
        if not isinstance(cache, KVCache) or cache.batch != query.shape[0]:
            raise invalid(
                "cache",
                got=repr(cache),
                wanted=f"a KVCache of {query.shape[0]} sequences, the batch of the query",
                remedy="make it with new_cache(batch, capacity); cache.reorder(rows) changes how many it holds",
            )
        if torch.is_grad_enabled() and (query.requires_grad or self.k_proj.weight.requires_grad):
            raise invalid(
                "cache",
                got="a call that records gradients",
                wanted="one that does not: there are none through what is written in place",
                remedy="call it under torch.inference_mode() or torch.no_grad()",
            )


def _packing(name: str, pad_mask: Tensor | Packing | None, x: Tensor) -> Packing:
    return Packing.full(*x.shape[:2], device=x.device) if pad_mask is None else packing_of(name, pad_mask, x)
