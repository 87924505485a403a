"""A Hugging Face model on flashtile: one line to register, one word to choose it.

    python examples/transformers_model.py

The model is small and has random weights, so that nothing is downloaded; ``from_pretrained`` takes the same argument.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from flashtile.integrations import transformers as flashtile_transformers

BATCH, SEQLEN, WINDOW = 2, 1024, 128


def made(attn_implementation: str, device: str) -> Any:
    """The same model for the same seed; grouped heads and a sliding window."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        eos_token_id=None,
    )
    model: Any = MistralForCausalLM._from_config(config, attn_implementation=attn_implementation)
    return model.to(device).eval()


def training_step(model: Any, ids: Tensor, is_token: Tensor) -> tuple[float, float]:
    """(loss, seconds) of a forward and a backward over a padded batch, the second time."""
    loss, begin = torch.tensor(0.0), 0.0
    for _ in range(2):
        begin = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=is_token, labels=ids.masked_fill(~is_token, -100)).loss
        loss.backward()
    return loss.item(), time.perf_counter() - begin


def main() -> None:
    flashtile_transformers.register()  # the one line

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(256, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(1)).to(device)
    is_token = torch.ones(BATCH, SEQLEN, dtype=torch.bool, device=device)
    is_token[1, SEQLEN // 2 :] = False  # right padding, as in training; generation pads on the left

    losses, generated = {}, {}
    for attn_implementation in ("eager", "flashtile"):
        model = made(attn_implementation, device)
        losses[attn_implementation], seconds = training_step(model, ids, is_token)
        prompt, mask = ids[:, -32:], is_token.flip(-1)[:, SEQLEN // 2 - 16 : SEQLEN // 2 + 16]
        generated[attn_implementation] = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
        print(f"{attn_implementation:>9}: loss {losses[attn_implementation]:.6f}, {seconds:.2f} s a step ({device})")

    assert abs(losses["eager"] - losses["flashtile"]) < 1e-5
    assert torch.equal(generated["eager"], generated["flashtile"])
    print(f"both generate {generated['eager'][0, -8:].tolist()}")


if __name__ == "__main__":
    main()
