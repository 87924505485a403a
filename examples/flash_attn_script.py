"""A script written for flash_attn, of which one line was changed: it trains on packed sequences, then generates.

A small transformer learns to continue arithmetic sequences modulo 8, such as 3 6 1 4 7. Runs in seconds on a CPU.
"""

import torch
from torch import nn

import flashtile.integrations.flash_attn as flash_attn  # was: import flash_attn

MODULUS, WIDTH, HEADS, LAYERS = 8, 64, 4, 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SLOPES = torch.tensor([2.0, 1.0, 0.25, 0.0], device=DEVICE)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, attend):
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        x = x + self.out(attend(qkv).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(MODULUS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, MODULUS))

    def forward(self, tokens, cu_seqlens, max_seqlen):
        """tokens [total] of packed sequences -> logits [total, MODULUS]."""

        def attend(qkv):
            return flash_attn.flash_attn_varlen_qkvpacked_func(
                qkv, cu_seqlens, max_seqlen, causal=True, alibi_slopes=SLOPES
            )

        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, attend)
        return self.head(x)

    @torch.no_grad()
    def generate(self, prompts, length):
        """prompts [batch, seqlen] -> [batch, length], each step attending to the caches of keys and values."""
        batch = prompts.shape[0]
        shape = (LAYERS, 2, batch, length, HEADS, WIDTH // HEADS)
        caches = torch.empty(shape, device=DEVICE, dtype=DTYPE)
        tokens, done = prompts, 0
        while tokens.shape[1] < length:
            x = self.embedding(tokens[:, done:])
            for layer, (k_cache, v_cache) in zip(self.layers, caches, strict=True):

                def attend(qkv, k_cache=k_cache, v_cache=v_cache, done=done):
                    q, k, v = qkv.unbind(2)
                    return flash_attn.flash_attn_with_kvcache(
                        q, k_cache, v_cache, k, v, cache_seqlens=done, causal=True, alibi_slopes=SLOPES
                    )

                x = layer(x, attend)
            done = tokens.shape[1]
            tokens = torch.cat([tokens, self.head(x[:, -1:]).argmax(-1)], dim=1)
        return tokens


def packed_batch(num_sequences):
    """(tokens, targets, cu_seqlens, max_seqlen) of sequences of 4 to 20 numbers; no target for the first of each."""
    lengths = torch.randint(4, 21, (num_sequences,)).tolist()
    starts, steps = torch.randint(0, MODULUS, (2, num_sequences)).tolist()
    rows = [torch.arange(length + 1) * step + start for length, start, step in zip(lengths, starts, steps, strict=True)]
    tokens = torch.cat([row[:-1] for row in rows]) % MODULUS
    targets = torch.cat([nn.functional.pad(row[2:] % MODULUS, (1, 0), value=-100) for row in rows])
    cu_seqlens = nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    return tokens.to(DEVICE), targets.to(DEVICE), cu_seqlens.to(DEVICE), max(lengths)


def main():
    torch.manual_seed(0)
    model = Model().to(DEVICE, DTYPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(201):
        tokens, targets, cu_seqlens, max_seqlen = packed_batch(12)
        logits = model(tokens, cu_seqlens, max_seqlen)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    prompts = torch.tensor([[3, 6, 1], [0, 1, 2], [7, 5, 3]], device=DEVICE)
    generated = model.generate(prompts, 12)
    expected = (prompts[:, :1] + (prompts[:, 1:2] - prompts[:, :1]) * torch.arange(12, device=DEVICE)) % MODULUS
    for row in generated.tolist():
        print(*row)
    share = (generated == expected).float().mean().item()
    print(f"{share:.0%} right, by {flash_attn.__name__}")
    if share < 0.9:
        raise SystemExit("the model has not learned to count")


if __name__ == "__main__":
    main()
