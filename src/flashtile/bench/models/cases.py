"""What ``bench models`` measures: which models, doing what, on how many tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from flashtile.bench.cases import DTYPES
from flashtile.bench.transformer import ModelShape

_GPT2_VOCABULARY = 50_304
"""GPT-2's 50,257, filled up to a multiple of 64 as its trainers do."""

SIZES: dict[str, ModelShape] = {
    "tiny": ModelShape(layers=4, d_model=128, heads=2),
    "small": ModelShape(layers=12, d_model=768, heads=12, vocabulary=_GPT2_VOCABULARY),
    "medium": ModelShape(layers=24, d_model=1024, heads=16, vocabulary=_GPT2_VOCABULARY),
    "large": ModelShape(layers=48, d_model=1600, heads=25, vocabulary=_GPT2_VOCABULARY),
}
"""small, medium and large have the sizes of GPT-2, GPT-2 medium and GPT-2 XL; tiny is for CPUs, and reads bytes."""

Mode = Literal["train", "prefill", "decode"]
MODES: dict[Mode, str] = {
    "train": "a training step: forward, loss, backward, AdamW; weights in float32, autocast to the dtype",
    "prefill": "inference: a whole prompt into the cache, and the logits after it; weights in the dtype",
    "decode": "inference: one more token for each sequence, with that many tokens in the cache; weights in the dtype",
}
Axis = Literal["batch", "seqlen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCase:
    """One model doing one thing; holds no tensor and no device."""

    mode: Mode
    size: str
    """What people call the shape; a key of ``SIZES``."""
    shape: ModelShape
    seqlen: int
    """Tokens of each sequence; those that the new one of ``decode`` sees, itself included."""
    batch: int
    dtype: str
    """What matrix products and attention are computed in; a key of ``DTYPES``."""

    @property
    def label(self) -> str:
        """The case in words that a filter matches, for example
        ``train small layers=12 seqlen=512 batch=32 bfloat16``."""
        return (
            f"{self.mode} {self.size} layers={self.shape.layers} seqlen={self.seqlen} batch={self.batch} {self.dtype}"
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def least_bytes(self) -> int:
        """A lower bound of the memory that it takes with any attention function.

        To train: float32 weights and two sums of AdamW, and the gradients or, if that is more, what the weights'
        gradients need of each layer's activations, and the logits twice.
        """
        num_weights, itemsize, tokens = self.shape.num_weights, self.torch_dtype.itemsize, self.batch * self.seqlen
        if self.mode == "train":
            activations = self.shape.layers * 14 * self.shape.d_model * itemsize + self.shape.vocabulary * 8
            return 12 * num_weights + max(4 * num_weights, tokens * activations)
        return num_weights * itemsize + 2 * tokens * self.shape.layers * self.shape.d_model * itemsize

    @property
    def score_matrix_bytes(self) -> int:
        """One [batch, heads, queries, keys] tensor of one layer, in the dtype."""
        queries = 1 if self.mode == "decode" else self.seqlen
        return self.batch * self.shape.heads * queries * self.seqlen * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitCase:
    """A question: the most of one axis at which a training step fits into memory."""

    size: str
    shape: ModelShape
    axis: Axis
    other: int
    """Of the other axis: the length of the sequences, or how many there are."""
    dtype: str

    @property
    def label(self) -> str:
        """For example ``limits small largest-batch seqlen=1024 bfloat16``."""
        other = "seqlen" if self.axis == "batch" else "batch"
        return f"limits {self.size} largest-{self.axis} {other}={self.other} {self.dtype}"

    def at(self, value: int) -> ModelCase:
        """The training step with ``value`` on the axis."""
        sizes = {"batch": self.other, "seqlen": self.other, self.axis: value}
        return ModelCase(mode="train", size=self.size, shape=self.shape, dtype=self.dtype, **sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGrid:
    """Every combination of modes, sizes and lengths."""

    modes: tuple[Mode, ...] = tuple(MODES)
    sizes: tuple[str, ...]
    seqlens: tuple[int, ...]
    dtype: str
    train_tokens: int
    """A training step's batch is this many tokens over the length, at least 1."""
    decode_batch: int
    batch: int | None = None
    """For all modes, if given; else a prompt is alone."""
    limit_seqlen: int
    """At which the largest batch is looked for."""
    has_limits: bool = True

    def cases(self) -> tuple[ModelCase, ...]:
        """What is timed, slowest axis first: mode, size, length."""
        return tuple(
            ModelCase(
                mode=mode,
                size=size,
                shape=SIZES[size],
                seqlen=seqlen,
                batch=self.batch or self._default_batch(mode, seqlen),
                dtype=self.dtype,
            )
            for mode, size, seqlen in itertools.product(self.modes, self.sizes, self.seqlens)
        )

    def limit_cases(self) -> tuple[LimitCase, ...]:
        """What is asked about the largest that fits; nothing without ``has_limits``."""
        others: dict[Axis, int] = {"batch": self.limit_seqlen, "seqlen": 1}
        return tuple(
            LimitCase(size=size, shape=SIZES[size], axis=axis, other=other, dtype=self.dtype)
            for size, (axis, other) in itertools.product(self.sizes if self.has_limits else (), others.items())
        )

    def _default_batch(self, mode: Mode, seqlen: int) -> int:
        return {"train": max(1, self.train_tokens // seqlen), "prefill": 1, "decode": self.decode_batch}[mode]


GRIDS: dict[str, ModelGrid] = {
    "cpu": ModelGrid(
        sizes=("tiny",),
        seqlens=(128, 512, 1024, 2048),
        dtype="float32",
        train_tokens=512,
        decode_batch=1,
        limit_seqlen=512,
    ),
    "cuda": ModelGrid(
        sizes=("small", "medium", "large"),
        seqlens=(128, 512, 1024, 2048, 4096, 8192, 16384),
        dtype="bfloat16",
        train_tokens=16384,
        decode_batch=8,
        limit_seqlen=1024,
    ),
}
QUICK_AXES: dict[str, dict[str, Sequence[int] | Sequence[str]]] = {
    "cpu": {"seqlens": (128, 512)},
    "cuda": {"sizes": ("small",), "seqlens": (512, 4096)},
}
