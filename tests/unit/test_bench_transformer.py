"""The transformer of the benchmarks and the demo: positions, the cache, and what it is made of."""

from __future__ import annotations

import pytest
import torch

from flashtile.bench import transformer
from flashtile.bench.formula import AttentionFn
from flashtile.bench.models import peers
from flashtile.bench.models.cases import SIZES
from flashtile.bench.transformer import KVCache, ModelShape, Transformer

SHAPE = ModelShape(layers=2, d_model=32, heads=2, vocabulary=61)
FUNCTIONS = {peer.name: peer.make for peer in peers.PEERS}


def model(attention: AttentionFn) -> Transformer:
    return Transformer(
        SHAPE, attention=attention, attention_dtype=torch.float32, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_reading_with_a_cache_is_reading_at_once(name: str) -> None:
    reader = model(FUNCTIONS[name]())
    tokens = torch.randint(SHAPE.vocabulary, (3, 12))
    whole = reader.features(tokens)
    cache = KVCache(SHAPE, batch=3, capacity=12, dtype=torch.float32, device=torch.device("cpu"))
    parts = [reader.features(tokens[:, begin:end], cache) for begin, end in ((0, 8), (8, 9), (9, 10), (10, 11))]
    assert cache.length == 11
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, :11])


def test_a_cache_that_is_full_says_so() -> None:
    cache = KVCache(SHAPE, batch=1, capacity=4, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(RuntimeError), torch.inference_mode():
        model(FUNCTIONS["naive"]()).features(torch.zeros(1, 5, dtype=torch.long), cache)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    x = torch.randn(1, 1, 2, 1, 8).expand(1, 20, 2, 1, 8)
    rotation = transformer._rotation(0, 20, 8, torch.device("cpu"))
    q, k = transformer._rotated(x, rotation)[0, :, :, 0].unbind(1)  # [20, 8] each, the same token everywhere
    scores = q @ k.T
    for offset in (0, 1, 7):
        along = scores.diagonal(offset)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert not torch.allclose(scores[0, 0], scores[0, 7])
    later = transformer._rotation(5, 20, 8, torch.device("cpu"))
    torch.testing.assert_close(later, rotation[5:])


def test_the_number_of_weights_is_that_of_the_matrices() -> None:
    matrices = [weight for weight in model(FUNCTIONS["naive"]()).parameters() if weight.dim() == 2]
    assert sum(weight.numel() for weight in matrices) == SHAPE.num_weights
    millions = {name: round(shape.num_weights / 1e6) for name, shape in SIZES.items()}
    assert millions == {"tiny": 1, "small": 124, "medium": 354, "large": 1555}
    assert {shape.head_dim for shape in SIZES.values()} == {64}


def test_the_same_seed_gives_the_same_weights() -> None:
    one, other = (model(FUNCTIONS["naive"]()).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
