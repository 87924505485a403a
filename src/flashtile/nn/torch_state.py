"""From ``torch.nn.MultiheadAttention`` to the modules of ``flashtile.nn``: its state dict, and its configuration.

torch stacks the projections of queries, keys and values into ``in_proj_weight`` [3 * d_model, d_model], or has
``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` where ``kdim`` or ``vdim`` differ; their biases are always
stacked in ``in_proj_bias``. ``out_proj`` has the same name here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from flashtile.errors import UnsupportedProblem, invalid
from flashtile.spec.options import describe


def translate(state_dict: dict[str, Any], prefix: str, rows: Mapping[str, int]) -> list[str]:
    """Renames and splits torch's entries under ``prefix`` in place; others stay as they are.

    Args:
        state_dict: of a whole model.
        prefix: of this module in it, "" or ending with a dot.
        rows: the number of output rows of q_proj, k_proj and v_proj, in this order.

    Returns:
        What is wrong, in words for ``load_state_dict``; empty if nothing is.
    """
    wrong = []
    for name in rows:
        if f"{prefix}{name}_weight" in state_dict:
            state_dict[f"{prefix}{name}.weight"] = state_dict.pop(f"{prefix}{name}_weight")
    for kind in ("weight", "bias"):
        stacked = state_dict.pop(f"{prefix}in_proj_{kind}", None)
        if stacked is None:
            continue
        if stacked.shape[0] != sum(rows.values()):
            wrong.append(
                f"{prefix}in_proj_{kind}: got {stacked.shape[0]} rows; wanted {sum(rows.values())}, those of "
                f"{', '.join(f'{name} ({number})' for name, number in rows.items())}."
            )
            continue
        # Copies, so that with assign=True no parameter keeps the stacked one alive.
        parts = (part.clone() for part in stacked.split(list(rows.values())))
        state_dict |= {f"{prefix}{name}.{kind}": part for name, part in zip(rows, parts, strict=True)}
    if state_dict.pop(f"{prefix}bias_k", None) is not None or state_dict.pop(f"{prefix}bias_v", None) is not None:
        wrong.append(f"{prefix}bias_k, {prefix}bias_v: {_NO_BIAS_KV}.")
    return wrong


def options_of(module: nn.MultiheadAttention) -> dict[str, Any]:
    """The constructor's arguments of the ``flashtile.nn.MultiheadAttention`` that computes what ``module`` does.

    Raises:
        InvalidArgument: no torch.nn.MultiheadAttention, or one whose inputs have the batch second.
        UnsupportedProblem: one made with add_bias_kv or add_zero_attn.
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise invalid(
            "module", got=describe(module), wanted="a torch.nn.MultiheadAttention", remedy="pass the layer itself"
        )
    if module.bias_k is not None:
        raise UnsupportedProblem(f"{_NO_BIAS_KV}.", {})
    if module.add_zero_attn:
        raise UnsupportedProblem(
            "add_zero_attn=True appends a key and a value of zeros, which no module here does.", {}
        )
    if not module.batch_first:
        raise invalid(
            "module",
            got="batch_first=False",
            wanted="a module called with [batch, seqlen, d_model], as the new one will be",
            remedy="transpose what you pass to it, then set module.batch_first = True",
        )
    return {
        "d_model": module.embed_dim,
        "n_head": module.num_heads,
        "d_key": module.kdim,
        "d_value": module.vdim,
        "dropout_p": module.dropout,
        "qkv_bias": module.in_proj_bias is not None,
        "out_bias": module.out_proj.bias is not None,
        "device": module.out_proj.weight.device,
        "dtype": module.out_proj.weight.dtype,
    }


_NO_BIAS_KV = "add_bias_kv=True learns one more key and value, which no module here has"
