"""Wrong calls of flash_attn's functions: each error names the argument, and everything else, as the caller does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile.integrations.flash_attn as flash_attn
from flashtile import InvalidArgument
from flashtile.integrations.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from flashtile.integrations.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb

OURS = re.compile(
    r"cu_seqlens_kv|max_seqlen_kv|(?<![a-z_])window=|(?<!softmax_)scale=|attention_varlen|bias=|dropout_seed"
)
"""Words of flashtile's own functions that a caller of these has never seen."""


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def integers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def func(**changes: Any) -> Any:
    tensors: dict[str, Any] = {"q": zeros(2, 6, 4, 8), "k": zeros(2, 7, 2, 8), "v": zeros(2, 7, 2, 8)}
    return flash_attn.flash_attn_func(**tensors | changes)


def kvpacked(**changes: Any) -> Any:
    call: dict[str, Any] = {"q": zeros(2, 6, 4, 8), "kv": zeros(2, 7, 2, 2, 8)}
    return flash_attn.flash_attn_kvpacked_func(**call | changes)


def qkvpacked(**changes: Any) -> Any:
    call: dict[str, Any] = {"qkv": zeros(2, 6, 3, 4, 8)}
    return flash_attn.flash_attn_qkvpacked_func(**call | changes)


def varlen(**changes: Any) -> Any:
    call: dict[str, Any] = {"q": zeros(10, 4, 8), "k": zeros(12, 2, 8), "v": zeros(12, 2, 8)}
    call |= {"cu_seqlens_q": integers(0, 4, 10), "cu_seqlens_k": integers(0, 7, 12)}
    call |= {"max_seqlen_q": 6, "max_seqlen_k": 7}
    return flash_attn.flash_attn_varlen_func(**call | changes)


def paged(**changes: Any) -> Any:
    pages: dict[str, Any] = {
        "k": zeros(9, 4, 2, 8),
        "v": zeros(9, 4, 2, 8),
        "block_table": integers(0, 1, 2, 3).view(2, 2),
    }
    return varlen(**pages | changes)


def varlen_kvpacked(**changes: Any) -> Any:
    packing: dict[str, Any] = {"cu_seqlens_q": integers(0, 4, 10), "cu_seqlens_k": integers(0, 7, 12)}
    packing |= {"q": zeros(10, 4, 8), "kv": zeros(12, 2, 2, 8), "max_seqlen_q": 6, "max_seqlen_k": 7}
    return flash_attn.flash_attn_varlen_kvpacked_func(**packing | changes)


def varlen_qkvpacked(**changes: Any) -> Any:
    call: dict[str, Any] = {"qkv": zeros(10, 3, 4, 8), "cu_seqlens": integers(0, 4, 10), "max_seqlen": 6}
    return flash_attn.flash_attn_varlen_qkvpacked_func(**call | changes)


def unpadded(**changes: Any) -> Any:
    call: dict[str, Any] = {
        "qkv": zeros(10, 3, 4, 8),
        "cu_seqlens": integers(0, 4, 10),
        "max_seqlen": 6,
        "dropout_p": 0.0,
    }
    return flash_attn.flash_attn_unpadded_qkvpacked_func(**call | changes)


def kvcache(**changes: Any) -> Any:
    call: dict[str, Any] = {"q": zeros(2, 1, 4, 8), "k_cache": zeros(2, 7, 2, 8), "v_cache": zeros(2, 7, 2, 8)}
    call |= {"k": zeros(2, 1, 2, 8), "v": zeros(2, 1, 2, 8), "cache_seqlens": integers(3, 6)}
    return flash_attn.flash_attn_with_kvcache(**call | changes)


def paged_kvcache(**changes: Any) -> Any:
    pages: dict[str, Any] = {
        "k_cache": zeros(9, 4, 2, 8),
        "v_cache": zeros(9, 4, 2, 8),
        "block_table": integers(0, 1, 2, 3).view(2, 2),
    }
    return kvcache(**pages | changes)


def rotary(**changes: Any) -> Any:
    call: dict[str, Any] = {"x": zeros(2, 6, 4, 8), "cos": zeros(9, 4), "sin": zeros(9, 4)}
    return apply_rotary_emb(**call | changes)


def packed_rotary(**changes: Any) -> Any:
    call: dict[str, Any] = {"x": zeros(10, 4, 8), "cu_seqlens": integers(0, 4, 10), "max_seqlen": 6}
    return rotary(**call | changes)


def embedding(**changes: Any) -> Any:
    call: dict[str, Any] = {"qkv": zeros(2, 6, 3, 4, 8)}
    return RotaryEmbedding(8)(**call | changes)


HALF = torch.float16
TABLE = {"rotary_cos": zeros(7, 4), "rotary_sin": zeros(7, 4)}
WRONG: list[tuple[Callable[..., Any], dict[str, Any], str, str]] = [
    # (function, arguments, the argument to blame, something the text says)
    (func, {"q": None}, "q", "torch.as_tensor(q)"),
    (func, {"q": zeros(6, 4, 8)}, "q", "call flash_attn_varlen_func for the other layout"),
    (func, {"k": zeros(2, 7, 3, 8), "v": zeros(2, 7, 3, 8)}, "k", "3 heads beside 4"),
    (func, {"v": zeros(2, 7, 2, 8, dtype=HALF)}, "v", "v.to(torch.float32)"),
    (func, {"softmax_scale": "0.1"}, "softmax_scale", "softmax_scale=float"),
    (func, {"softmax_scale": torch.tensor(0.1)}, "softmax_scale", "None for head_dim ** -0.5"),
    (func, {"window_size": 4}, "window_size", "-1 = unlimited"),
    (func, {"window_size": (None, 4)}, "window_size", "-1 = unlimited"),
    (func, {"window_size": (-2, 4)}, "window_size", "integers >= -1"),
    (func, {"window_size": (4.0, 4)}, "window_size", "integers >= -1"),
    (func, {"window_size": (2**70, 4)}, "window_size", "integers >= -1"),
    (func, {"window_size": (True, False)}, "window_size", "integers >= -1"),
    (func, {"dropout_p": 1.5}, "dropout_p", "[0, 1)"),
    (func, {"dropout_p": 1.5, "return_attn_probs": True}, "dropout_p", "[0, 1)"),
    (func, {"softcap": -1.0}, "softcap", "0.0 to switch it off"),
    (func, {"alibi_slopes": torch.ones(3)}, "alibi_slopes", "one slope per query head"),
    (func, {"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes", "a bias to flashtile's own attention"),
    (func, {"deterministic": None}, "deterministic", "True or False"),
    (func, {"return_attn_probs": 1}, "return_attn_probs", "True or False"),
    (func, {"causal": "no"}, "causal", "True or False"),
    (kvpacked, {"kv": zeros(2, 7, 3, 2, 8)}, "kv", "torch.stack 2 tensors along dim=2"),
    (kvpacked, {"kv": zeros(2, 7, 2, 8)}, "kv", "[batch, seqlen_k, 2, heads_k, head_dim]"),
    (kvpacked, {"kv": None}, "kv", "torch.as_tensor(kv)"),
    (kvpacked, {"kv": zeros(2, 7, 2, 3, 8)}, "kv", "3 heads beside 4 in q"),
    (kvpacked, {"kv": zeros(3, 7, 2, 2, 8)}, "kv", "expand kv to q's batch"),
    (kvpacked, {"kv": zeros(2, 7, 2, 2, 8, dtype=HALF)}, "kv", "kv.to(torch.float32)"),
    (kvpacked, {"kv": zeros(2, 7, 2, 2, 9)}, "kv", "head_dim 9 beside q's 8"),
    (kvpacked, {"q": zeros(6, 4, 8)}, "q", "4 axes"),
    (qkvpacked, {"qkv": zeros(2, 6, 2, 4, 8)}, "qkv", "[batch, seqlen, 3, heads, head_dim]"),
    (qkvpacked, {"qkv": zeros(6, 3, 4, 8)}, "qkv", "[batch, seqlen, 3, heads, head_dim]"),
    (qkvpacked, {"qkv": zeros(2, 6, 3, 4, 8, dtype=torch.int64)}, "qkv", "qkv.to(torch.bfloat16)"),
    (qkvpacked, {"qkv": torch.nested.nested_tensor([zeros(3, 4, 8)])}, "qkv", "a nested tensor"),
    (varlen, {"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q", "torch.as_tensor(cu_seqlens_q)"),
    (varlen, {"cu_seqlens_k": None}, "cu_seqlens_k", "torch.as_tensor(cu_seqlens_k)"),
    (varlen, {"cu_seqlens_k": integers(0, 7, 12).long()}, "cu_seqlens_k", "int32"),
    (varlen, {"cu_seqlens_k": integers(0, 7, 13)}, "cu_seqlens_k", "13 for a buffer of 12"),
    (varlen, {"cu_seqlens_k": integers(0, 12)}, "cu_seqlens_k", "2 entries beside 3 in cu_seqlens_q"),
    (varlen, {"max_seqlen_k": 6}, "max_seqlen_k", "the longest sequence in cu_seqlens_k"),
    (varlen, {"max_seqlen_k": torch.tensor(7)}, "max_seqlen_k", "as a Python int"),
    (varlen, {"max_seqlen_q": None}, "max_seqlen_q", "as a Python int"),
    (varlen, {"q": zeros(1, 10, 4, 8)}, "q", "call flash_attn_func for the other layout"),
    (varlen_kvpacked, {"kv": zeros(12, 2, 8)}, "kv", "[total_k, 2, heads_k, head_dim]"),
    (varlen_kvpacked, {"max_seqlen_k": 2}, "max_seqlen_k", "cu_seqlens_k"),
    (varlen_qkvpacked, {"qkv": zeros(2, 5, 3, 4, 8)}, "qkv", "[total, 3, heads, head_dim]"),
    (varlen_qkvpacked, {"cu_seqlens": integers(0, 10, 4)}, "cu_seqlens", "never decrease"),
    (varlen_qkvpacked, {"max_seqlen": 3}, "max_seqlen", "the longest sequence in cu_seqlens"),
    (unpadded, {"dropout_p": None}, "dropout_p", "[0, 1)"),
    (unpadded, {"max_seqlen": 3}, "max_seqlen", "the longest sequence in cu_seqlens"),
    (paged, {"block_table": integers(0, 1)}, "block_table", "[batch, blocks per sequence]"),
    (paged, {"block_table": integers(0, 1).view(1, 2)}, "block_table", "2, one for each sequence"),
    (paged, {"block_table": integers(0, 1, 2, 9).view(2, 2)}, "block_table", "blocks of the cache, 0 to 8"),
    (paged, {"block_table": integers(0, 1, 2, -1).view(2, 2)}, "block_table", "blocks of the cache, 0 to 8"),
    (paged, {"k": zeros(36, 2, 8)}, "k", "[num_blocks, page_block_size, heads_k, head_dim]"),
    (paged, {"v": zeros(9, 5, 2, 8)}, "v", "what k is"),
    (paged, {"cu_seqlens_k": integers(0, 9, 12)}, "cu_seqlens_k", "there is room for 8"),
    (paged, {"cu_seqlens_k": integers(0, 7, 6)}, "cu_seqlens_k", "[7, -1]"),
    (paged, {"cu_seqlens_k": integers(0, 7, 12).long()}, "cu_seqlens_k", "int32"),
    (paged, {"max_seqlen_k": None}, "max_seqlen_k", "as a Python int"),
    (paged, {"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes", "[batch, heads] = [2, 4]"),
    (paged, {"q": zeros(2, 5, 4, 8)}, "q", "[total_q, heads, head_dim]"),
    (paged, {"dropout_p": 0.1}, "dropout_p", "beside a block_table"),
    (kvcache, {"q": zeros(2, 4, 8)}, "q", "[batch, seqlen_q, heads, head_dim]"),
    (kvcache, {"q": zeros(2, 1, 3, 8)}, "k_cache", "2 heads beside 3 in q"),
    (kvcache, {"q": zeros(2, 1, 4, 8, dtype=HALF)}, "k_cache", "k_cache.to(torch.float16)"),
    (kvcache, {"k_cache": None}, "k_cache", "[batch, seqlen_cache, heads_k, head_dim]"),
    (kvcache, {"k_cache": zeros(2, 7, 2, 9), "k": zeros(2, 1, 2, 9)}, "k_cache", "head_dim 9 beside q's 8"),
    (kvcache, {"k_cache": zeros(1, 7, 2, 8), "v_cache": zeros(1, 7, 2, 8)}, "k_cache", "1 rows for 2 sequences"),
    (kvcache, {"v_cache": zeros(2, 8, 2, 8)}, "v_cache", "what k_cache is"),
    (kvcache, {"k": None}, "k", "[batch, seqlen_new, heads_k, head_dim]"),
    (kvcache, {"v": None}, "v", "[batch, seqlen_new, heads_k, head_dim]"),
    (kvcache, {"v": zeros(2, 2, 2, 8)}, "v", "what k is"),
    (kvcache, {"k": zeros(2, 1, 1, 8), "v": zeros(2, 1, 1, 8)}, "k", "what k_cache holds"),
    (kvcache, {"k": zeros(1, 1, 2, 8), "v": zeros(1, 1, 2, 8)}, "k", "q's, 2"),
    (kvcache, {"cache_seqlens": None}, "cache_seqlens", "pass how many keys the cache holds before this call"),
    (kvcache, {"cache_seqlens": 7}, "cache_seqlens", "there is room for 7, 1 of them new"),
    (kvcache, {"cache_seqlens": integers(3, 7)}, "cache_seqlens", "there is room for 7, 1 of them new"),
    (kvcache, {"cache_seqlens": integers(3, -1)}, "cache_seqlens", "0 to 6 keys"),
    (kvcache, {"cache_seqlens": -1}, "cache_seqlens", "an int >= 0"),
    (kvcache, {"cache_seqlens": torch.tensor([3.0, 4.0])}, "cache_seqlens", "int32"),
    (kvcache, {"cache_seqlens": integers(3, 4, 5)}, "cache_seqlens", "2, one for each sequence"),
    (kvcache, {"cache_seqlens": [3, 4]}, "cache_seqlens", "or an int32 tensor [batch]"),
    (kvcache, {"cache_leftpad": integers(4, 0)}, "cache_seqlens", "beside cache_leftpad [4, 0]"),
    (kvcache, {"cache_leftpad": integers(-1, 0)}, "cache_leftpad", "no negative entry"),
    (kvcache, {"cache_leftpad": 1}, "cache_leftpad", "[batch]"),
    (kvcache, {"cache_batch_idx": integers(0, 2)}, "cache_batch_idx", "rows of the cache, 0 to 1"),
    (kvcache, {"cache_batch_idx": integers(0)}, "cache_batch_idx", "2, one for each sequence"),
    (kvcache, {"rotary_cos": zeros(7, 4)}, "rotary_sin", "[positions, rotary_dim / 2]"),
    (kvcache, TABLE | {"rotary_sin": zeros(7, 3)}, "rotary_sin", "what rotary_cos is"),
    (kvcache, TABLE | {"k": None, "v": None}, "rotary_cos", "a table, but no k"),
    (kvcache, {"rotary_cos": zeros(6, 4), "rotary_sin": zeros(6, 4)}, "rotary_cos", "at least 7 positions"),
    (kvcache, {"rotary_cos": zeros(7, 8), "rotary_sin": zeros(7, 8)}, "rotary_cos", "at most 4 angles"),
    (kvcache, TABLE | {"q": zeros(2, 3, 4, 8)}, "rotary_cos", "at least 9 positions"),
    (kvcache, TABLE | {"rotary_interleaved": 1}, "rotary_interleaved", "True or False"),
    (kvcache, {"alibi_slopes": torch.ones(3, 4)}, "alibi_slopes", "[batch, heads] = [2, 4]"),
    (kvcache, {"alibi_slopes": torch.ones(3)}, "alibi_slopes", "one slope per query head"),
    (kvcache, {"alibi_slopes": [0.5] * 4}, "alibi_slopes", "one slope per query head"),
    (kvcache, {"num_splits": -1}, "num_splits", "an integer >= 0"),
    (kvcache, {"return_softmax_lse": 1}, "return_softmax_lse", "True or False"),
    (kvcache, {"softmax_scale": "x"}, "softmax_scale", "softmax_scale=float"),
    (paged_kvcache, {"cache_batch_idx": integers(0, 1)}, "cache_batch_idx", "block_table[cache_batch_idx]"),
    (paged_kvcache, {"block_table": integers(0, 1, 2, 9).view(2, 2)}, "block_table", "blocks of the cache, 0 to 8"),
    (paged_kvcache, {"block_table": zeros(2, 2)}, "block_table", "torch.int32"),
    (unpad_input, {"hidden_states": zeros(2, 3, 4), "attention_mask": zeros(2, 3)}, "attention_mask", "mask == 0"),
    (unpad_input, {"hidden_states": zeros(2, 4, 4), "attention_mask": zeros(2, 3) == 0}, "hidden_states", "[2, 3]"),
    (unpad_input, {"hidden_states": zeros(2, 4), "attention_mask": [[1]]}, "attention_mask", "[batch, seqlen]"),
    (pad_input, {"hidden_states": zeros(2, 3), "indices": integers(0), "batch": 1, "seqlen": 2}, "hidden_states", "1"),
    (pad_input, {"hidden_states": zeros(2, 3), "indices": zeros(2), "batch": 1, "seqlen": 2}, "indices", "int64"),
    (pad_input, {"hidden_states": zeros(1, 3), "indices": integers(0), "batch": 1.0, "seqlen": 2}, "batch", "integer"),
    (index_first_axis, {"input": zeros(2, 3), "indices": [0]}, "indices", "[total]"),
    (index_first_axis, {"input": None, "indices": integers(0)}, "input", "[rows, ...]"),
    (rotary, {"x": zeros(6, 4, 8)}, "x", "[batch, seqlen, heads, head_dim]"),
    (rotary, {"sin": zeros(9, 3)}, "sin", "the shape of cos"),
    (rotary, {"cos": zeros(9, 5), "sin": zeros(9, 5)}, "cos", "at most head_dim / 2 angles"),
    (rotary, {"cos": zeros(5, 4), "sin": zeros(5, 4)}, "cos", "at least 6"),
    (rotary, {"seqlen_offsets": 4}, "cos", "at least 10"),
    (rotary, {"seqlen_offsets": integers(0, 4)}, "cos", "at least 10"),
    (rotary, {"seqlen_offsets": integers(0)}, "seqlen_offsets", "2, one for each sequence"),
    (rotary, {"seqlen_offsets": -1}, "seqlen_offsets", "an int >= 0"),
    (rotary, {"x": zeros(2, 6, 4, 8).requires_grad_(), "inplace": True}, "x", "x.clone()"),
    (rotary, {"interleaved": 1}, "interleaved", "True or False"),
    (packed_rotary, {"max_seqlen": None}, "max_seqlen", "an integer"),
    (packed_rotary, {"cu_seqlens": integers(0, 10).long()}, "cu_seqlens", "int32"),
    (packed_rotary, {"x": zeros(2, 5, 4, 8)}, "x", "[total, heads, head_dim]"),
    (embedding, {"qkv": zeros(2, 6, 2, 4, 8)}, "qkv", "[batch, seqlen, 3, heads, head_dim]"),
    (embedding, {"qkv": zeros(2, 6, 8, 8)}, "num_heads_q", "an integer"),
    (embedding, {"qkv": zeros(2, 6, 8, 8), "num_heads_q": 7}, "num_heads_q", "as many keys as values"),
    (embedding, {"qkv": zeros(2, 6, 3, 4, 8).requires_grad_()}, "qkv", "qkv.clone()"),
    (embedding, {"qkv": zeros(2, 6, 4, 8), "kv": zeros(2, 6, 4, 8)}, "kv", "[batch, seqlen_k, 2, heads_k, head_dim]"),
    (embedding, {"seqlen_offset": integers(1, 2, 3)}, "seqlen_offset", "2, one for each sequence"),
]


@pytest.mark.parametrize(
    ("call", "arguments", "argument", "says"),
    WRONG,
    ids=[f"{c.__name__}-{a}-{i}" for i, (c, _, a, _) in enumerate(WRONG)],
)
def test_wrong_call(call: Callable[..., Any], arguments: dict[str, Any], argument: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call(**arguments)
    assert caught.value.argument == argument
    assert says in str(caught.value)
    assert not OURS.search(str(caught.value))
    assert caught.value.remedy and len(str(caught.value)) < 500


FUNCTIONS = sorted(
    {call for call, *_ in WRONG} - {unpad_input, pad_input, index_first_axis}, key=lambda call: call.__name__
)


@pytest.mark.parametrize("call", FUNCTIONS)
def test_the_calls_above_are_right_without_their_changes(call: Callable[..., Any]) -> None:
    call()


def test_compiled_code_names_arguments_as_the_caller_does() -> None:
    compiled = torch.compile(func, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"InvalidArgument\('softmax_scale', .*softmax_scale=float"):
        compiled(softmax_scale="x")
