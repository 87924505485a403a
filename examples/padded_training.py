"""Training on padded batches: what the padding costs, and what is left of that once attention skips it.

    python examples/padded_training.py

Sequences of very different lengths are padded to the longest one. The model is causal and the padding on the right, so
no token ever looks at padding, and with ``pad_mask`` or without it the losses are the same. Only the time differs.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashtile.nn import FlashAttention, Packing

VOCABULARY, DIM, HEADS, DEPTH = 64, 128, 4, 2
BATCH, LONGEST, STEPS = 8, 768, 3


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = FlashAttention(DIM, HEADS, causal=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor, padding: Packing | None) -> Tensor:
        x = x + self.attention(self.norm_attention(x), padding)
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    """Predicts each token from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor, padding: Packing | None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x)


def train(batches: list[tuple[Tensor, Tensor]], *, skip_padding: bool, device: str) -> tuple[list[float], float]:
    """The losses of the same model on the same batches, and the seconds of the fastest step."""
    torch.manual_seed(0)
    model = LanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, seconds = [], []
    for tokens, is_token in batches:
        begin = time.perf_counter()
        padding = Packing.of(is_token[:, :-1]) if skip_padding else None  # once per batch, for every layer
        logits = model(tokens[:, :-1], padding)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].masked_fill(~is_token[:, 1:], -100).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return losses, min(seconds)


def made_batch(device: str) -> tuple[Tensor, Tensor]:
    """Tokens [batch, longest] that count upwards, and which of them are not padding; one sequence has full length."""
    lengths = (LONGEST * torch.rand(BATCH, 1) ** 2).long().clamp(min=8)
    lengths[0] = LONGEST
    tokens = (torch.randint(VOCABULARY, (BATCH, 1)) + torch.arange(LONGEST)) % VOCABULARY
    return tokens.to(device), (torch.arange(LONGEST) < lengths).to(device)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    batches = [made_batch(device) for _ in range(STEPS)]
    share = 1 - torch.stack([is_token for _, is_token in batches]).float().mean().item()

    losses_padded, seconds_padded = train(batches, skip_padding=False, device=device)
    losses, seconds = train(batches, skip_padding=True, device=device)

    print(f"{share:.0%} of {BATCH} x {LONGEST} positions are padding ({device})")
    print(f"flashtile, attention over everything: {seconds_padded:.3f} s a step")
    print(f"flashtile, attention that skips padding: {seconds:.3f} s a step, {seconds_padded / seconds:.1f}x as fast")
    print(f"losses of both: {', '.join(f'{loss:.4f}' for loss in losses)}")
    torch.testing.assert_close(losses, losses_padded, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
