"""A vision transformer written for PyTorch's own attention, on flashtile without a change to its code.

    python examples/sdpa_vit.py

The one changed line is ``with sdpa.override():``. On a GPU in float16 or bfloat16, ``sdpa.activate()`` once at the
start does it for the whole process.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashtile.integrations import sdpa

HEADS, DIM, PATCH, IMAGE = 4, 128, 8, 64


class Block(nn.Module):
    """Pre-norm transformer block; knows nothing of flashtile."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor, is_visible: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # [batch, heads, patches, head_dim]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=is_visible[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class VisionTransformer(nn.Module):
    """Classifies images of which some patches are hidden, as masked pretraining does."""

    def __init__(self, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2, DIM) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(DIM, classes)

    def forward(self, images: Tensor, is_visible: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, is_visible)
        return self.head(x.mean(dim=1))


def step(model: nn.Module, images: Tensor, is_visible: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, gradient of the first layer) of a training step."""
    model.zero_grad()
    logits = model(images, is_visible)
    logits.square().mean().backward()
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return logits.detach(), gradient.clone()


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VisionTransformer().to(device)
    images = torch.randn(4, 3, IMAGE, IMAGE, device=device)
    is_visible = torch.rand(4, (IMAGE // PATCH) ** 2, device=device) < 0.5

    logits, gradient = step(model, images, is_visible)
    with sdpa.override():
        logits_tiled, gradient_tiled = step(model, images, is_visible)

    print(f"torch against flashtile on {device}")
    print(f"largest difference of the logits: {(logits - logits_tiled).abs().max():.1e}")
    print(f"largest difference of the first layer's gradient: {(gradient - gradient_tiled).abs().max():.1e}")
    torch.testing.assert_close(logits_tiled, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient_tiled, gradient, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
