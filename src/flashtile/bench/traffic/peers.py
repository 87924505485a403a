"""The two methods whose traffic is predicted, and the prediction."""

from __future__ import annotations

from functools import partial

import torch

import flashtile
from flashtile import dispatch
from flashtile.bench.baselines import FLASHTILE, NAIVE, Peer
from flashtile.bench.cases import BenchCase
from flashtile.bench.formula import AttentionFn
from flashtile.bench.tensors import CaseTensors
from flashtile.explain import tilings
from flashtile.spec import accounting, devices
from flashtile.spec.accounting import Cost


def _attention(backend: str, tensors: CaseTensors) -> AttentionFn:
    return partial(flashtile.attention, backend=backend, **tensors.call_options)


def _naive_scratch_bytes(case: BenchCase) -> int:
    return accounting.naive_cost(case.problem, _direction(case)).extra_bytes


PEERS: tuple[Peer, ...] = (
    Peer(name=FLASHTILE, prepare=partial(_attention, "auto")),
    Peer(name=NAIVE, prepare=partial(_attention, "naive"), scratch_bytes=_naive_scratch_bytes),
)
"""The naive formula is flashtile's own ``naive`` backend, whose scores are float32 as in the prediction."""


def predicted(case: BenchCase, peer: str, device: torch.device) -> Cost:
    """What the model of ``spec.accounting`` says of a case that is ``forward`` or ``backward``."""
    problem, direction = case.problem, _direction(case)
    if peer == NAIVE:
        return accounting.naive_cost(problem, direction)
    spec = devices.detect(device)
    tiling = tilings.tiling(problem, spec, dispatch.choose(problem, spec), direction)
    return accounting.tiled_cost(problem, direction, tiling)


def _direction(case: BenchCase) -> accounting.Direction:
    assert case.direction != "forward+backward", "traffic is predicted for one direction at a time"
    return case.direction
