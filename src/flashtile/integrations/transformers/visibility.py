"""Which keys a query sees, as transformers asks for it, without a dense mask wherever positions and padding decide it.

transformers hands what ``attention_mask`` returns through the model to every layer's attention, as it does with its own
masks, which are tensors [batch, 1, seqlen_q, seqlen_kv].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Window = tuple[int | None, int | None]


class Visibility:
    """What a layer's queries see; code that takes it for a mask gets the dense one.

    Query i sees key j if all of these allow it:

    * ``window``: (left, right), aligned bottom-right;
    * ``keys``: [batch, seqlen_kv], False for padding; None: no key is;
    * ``sequences``: [batch, seqlen], equal numbers for tokens of one packed sequence; None: one sequence.
    """

    def __init__(self, *, window: Window, keys: Tensor | None, sequences: Tensor | None, dense: Callable[[], Tensor]):
        self.window = window
        self.keys = keys
        self.sequences = sequences
        self._dense = dense
        self._compact: Tensor | None = None

    def dense(self) -> Tensor:
        """All of it as one boolean mask [batch, 1, seqlen_q, seqlen_kv], True = may attend."""
        return self._dense()

    def compact_mask(self) -> Tensor | None:
        """What ``window`` leaves to a mask: [batch, 1, 1, seqlen_kv], and the whole square for packed sequences."""
        if self._compact is None and self.sequences is not None:
            self._compact = self.sequences[:, None, :, None] == self.sequences[:, None, None, :]
        elif self._compact is None and self.keys is not None:
            self._compact = self.keys[:, None, None, :]
        return self._compact

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda value: value.dense() if isinstance(value, cls) else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def attention_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | Visibility | None = None,
    **options: Any,
) -> Tensor | Visibility:
    """A mask function for transformers' ``AttentionMaskInterface``.

    Returns:
        A ``Visibility`` where the mask is causal or bidirectional, with or without a sliding window, padding or packed
        sequences. A dense boolean mask [batch, 1, seqlen_q, seqlen_kv] for everything else: chunked attention, masks
        that models or users compose, and static caches, whose length on the GPU is not read.
    """
    if isinstance(attention_mask, Visibility):
        return attention_mask
    from transformers.masking_utils import sdpa_mask

    def dense() -> Tensor:
        mask = sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]  # annotated as int, but transformers passes tensors too
            kv_offset=kv_offset,  # type: ignore[arg-type]
            mask_function=mask_function,
            attention_mask=attention_mask,
            **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        assert mask is not None
        return mask

    window, sequences = _window_and_sequences(mask_function, options)
    is_aligned = window == (None, None) or _ends_with_the_last_query(q_offset, q_length, kv_offset, kv_length)
    if not is_aligned or window is None or (attention_mask is not None and attention_mask.dim() != 2):
        return dense()
    keys = None if attention_mask is None else _keys(attention_mask, kv_length, kv_offset)
    return Visibility(window=window, keys=keys, sequences=sequences, dense=dense)


def _ends_with_the_last_query(q_offset: int | Tensor, q_length: int, kv_offset: int | Tensor, kv_length: int) -> bool:
    """Whether the last key is the last query's own, so that windows are aligned bottom-right; False if unknown here."""
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    return q_offset + q_length == kv_offset + kv_length


def _window_and_sequences(
    mask_function: Callable[..., Any], options: dict[str, Any]
) -> tuple[Window | None, Tensor | None]:
    """(window, packed sequences) if these two are the whole of a mask function, else (None, None).

    transformers says so by permission to leave a mask out: what remains is causality or nothing, within a local size.
    Packed sequences it never lets out, so those are read off the function itself.
    """
    local_size = options.get("local_size")
    is_chunked = local_size is not None and getattr(options.get("config"), "attention_chunk_size", None) is not None
    if is_chunked:
        return None, None
    if options.get("allow_is_causal_skip", False):
        return (None if local_size is None else local_size - 1, 0), None
    if options.get("allow_is_bidirectional_skip", False):
        return (local_size, local_size), None
    return _packed(mask_function) if not torch.compiler.is_compiling() else (None, None)


def _packed(mask_function: Callable[..., Any]) -> tuple[Window | None, Tensor | None]:
    """(window, packed sequences) of "causal, maybe within a window, and within one sequence"; else (None, None)."""
    from transformers import masking_utils

    left: int | None = None
    is_causal, sequences = False, None
    pending = [mask_function]
    while pending:
        function = pending.pop()
        inner = _closure(function)
        if function is masking_utils.causal_mask_function:
            is_causal = True
        elif _is_made_by(masking_utils.and_masks, function):
            pending += inner["mask_functions"]
        elif _is_made_by(masking_utils.sliding_window_overlay, function):
            reach = inner["sliding_window"] - 1  # the query itself is one of the window's tokens
            left = reach if left is None else min(left, reach)
        elif _is_made_by(masking_utils.packed_sequence_mask_function, function):
            sequences = inner["packed_sequence_mask"]
        elif _is_made_by(getattr(masking_utils, "remap_positions_for_packed_sequence", None), function):
            pending.append(inner["mask_function"])  # within a sequence, distances are the same
        else:
            return None, None
    return ((left, 0), sequences) if is_causal and sequences is not None else (None, None)


def _is_made_by(factory: Callable[..., Any] | None, function: Callable[..., Any]) -> bool:
    """Whether ``function`` is the inner function that ``factory`` returns, by the code that both share."""
    code = getattr(function, "__code__", None)
    return factory is not None and code is not None and code in factory.__code__.co_consts


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _keys(attention_mask: Tensor, kv_length: int, kv_offset: Any) -> Tensor | None:
    """[batch, seqlen_kv]: which keys are no padding; None if none is and finding out costs no synchronisation."""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    padded = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    keys = padded[:, kv_offset : kv_offset + kv_length].bool()
    if keys.device.type == "cpu" and not torch.compiler.is_compiling() and bool(keys.all()):
        return None
    return keys
