"""A kernel that is launched again without Triton's look-up of its compiled form, which takes longer than the launch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.assembler import older_assembler
from flashtile.backends.base import Gradients, Saved
from flashtile.backends.gpu import COMPILER_OPTIONS, garbage_kept
from flashtile.backends.library_hash import known_hash
from flashtile.backends.relaunch import Relaunch, Relaunches
from flashtile.spec.operands import FIELDS, Operands, tensors_of
from flashtile.spec.problem import AttentionProblem

MOST_FORMS = 4096
ALIGNMENT_BYTES = 16
"""Kernels are compiled for addresses that are multiples of this, or are not."""

Tensors = tuple[Any, ...]
"""Tensors, or ``None`` where an option is not used."""


class KernelLauncher:
    """A kernel, and how calls that came before launched it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._parameters = getattr(kernel, "arg_names", ())
        self._compiled: dict[Hashable, Any] = {}
        self._ready: dict[Hashable, Relaunch | None] = {}

    def __call__(
        self,
        key: Hashable,
        grid: tuple[int, ...],
        tensors: Tensors,
        arguments: Callable[..., tuple[Any, ...]],
        *,
        num_warps: int,
        num_stages: int | None = None,
        **constants: int | bool | str,
    ) -> Relaunch | None:
        """Launches the kernel on the current device.

        Args:
            key: all that the arguments depend on beside the tensors.
            tensors: those that the arguments hold, each once.
            arguments: the kernel's, from ``*tensors``; asked for only until the form is known.
            num_warps, num_stages: for the compiler.
            constants: the kernel's compile-time values; its parameters end with them.

        Returns:
            What launches the same with other tensors of these sizes and strides, once that is known.
        """
        form = (key, grid, *constants.values(), tensors[0].device.index, *map(_form, tensors))
        ready = self._ready.get(form)
        if ready is not None and not ready.is_watched():
            ready(tensors)
            return ready
        compiled = self._compiled.get(form)
        if compiled is None:
            options = COMPILER_OPTIONS | {"num_warps": num_warps}
            if num_stages is not None:
                options["num_stages"] = num_stages
            if len(self._compiled) >= MOST_FORMS:
                self._compiled.clear()
                self._ready.clear()
            with garbage_kept(), known_hash(), older_assembler() as more:
                self._compiled[form] = self.kernel[grid](*arguments(*tensors), **constants, **options, **more)
            return None
        in_order = tuple(constants[name] for name in self._parameters or constants if name in constants)
        if form not in self._ready:  # comes for the second time, so it may come often
            ready = Relaunch.of(compiled, grid, tensors, arguments, in_order)
            self._ready[form] = ready
            if ready is not None and not ready.is_watched():
                ready(tensors)
                return ready
        compiled[(*grid, 1, 1)[:3]](*arguments(*tensors), *in_order)
        return None


def _form(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT_BYTES


def operands_of(tensors: tuple[Any, ...]) -> tuple[Operands, Tensors]:
    """The call whose tensors come first, as ``tensors_of`` gives them, and the other tensors."""
    return Operands.of(tensors[: len(FIELDS)]), tensors[len(FIELDS) :]


@lru_cache(maxsize=MOST_FORMS)
def result_maker(problem: AttentionProblem, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """Makes out and lse."""
    make_out = tensor_maker(problem.out_shape, problem.dtype, device)
    make_lse = tensor_maker(problem.lse_shape, torch.float32, device)
    return lambda: (make_out(), make_lse())


def tensor_maker(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Makes tensors that are contiguous and not filled; ``torch.empty`` would look for their strides each time."""
    strides = torch.empty(shape, device="meta").stride()
    return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)


def nothing() -> None:
    """Makes no tensor."""


def relaunches(launches: list[Relaunch | None]) -> Relaunch | Relaunches | None:
    """What launches them one after the other, if each is known."""
    known = [launch for launch in launches if launch is not None]
    if len(known) < len(launches):
        return None
    return known[0] if len(known) == 1 else Relaunches(*known)


def given_to_backward(operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None) -> Tensors:
    """What a backward gets from outside, as ``operands_of`` takes it apart."""
    return (*tensors_of(operands), saved.out, d_out, saved.lse, d_lse)


def shortest_backward(
    launch: Relaunch | Relaunches | None,
    given: Tensors,
    launched_with: Tensors,
    make: Callable[[], Tensors],
    gradients: Callable[[Tensors, Tensors], Gradients],
    otherwise: Callable[[Operands, Saved, Tensor | None, Tensor | None], Gradients],
) -> Callable[[Operands, Saved, Tensor | None, Tensor | None], Gradients] | None:
    """(operands, saved, d_out, d_lse) -> gradients, for dense tensors of the sizes and strides of ``given``.

    None without a launch of these themselves.

    Args:
        launch: takes what a call is given, and what ``make`` makes.
        given, launched_with: of a call that came before; they differ where a tensor had to be copied or filled in.
        gradients: from what was given and made, after the launch.
        otherwise: for tensors of other strides or addresses, and while someone wants to be told of launches.
    """
    operands, _ = operands_of(given)
    if launch is None or operands.cu_seqlens_q is not None or any(map(operator.is_not, given, launched_with)):
        return None
    device, forms = operands.q.device.index, _strides_and_alignments(given)

    def run(operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None) -> Gradients:
        given = given_to_backward(operands, saved, d_out, d_lse)
        is_like = _strides_and_alignments(given) == forms and device == torch.cuda.current_device()
        if not is_like or launch.is_watched():
            return otherwise(operands, saved, d_out, d_lse)
        made = make()
        launch((*given, *made))
        return gradients(given, made)

    return run


def _strides_and_alignments(tensors: Tensors) -> list[tuple[tuple[int, ...], int] | None]:
    return [None if tensor is None else (tensor.stride(), tensor.data_ptr() % ALIGNMENT_BYTES) for tensor in tensors]


def shortest(
    launch: Relaunch | Relaunches | None,
    operands: Operands,
    make_results: Callable[[], Tensors],
    otherwise: Callable[[Operands], tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """(q, k, v, bias, mask, alibi_slopes, sinks) -> (out, lse), for dense tensors of the sizes and strides of
    ``operands``; None without a launch.

    Args:
        launch: takes the inputs, q, k and v at multiples of ALIGNMENT_BYTES, and what ``make_results`` makes: out, lse
            and whatever the kernel needs besides.
        otherwise: for tensors that begin at other multiples of bytes, and while someone wants to be told of launches.
    """
    if launch is None:
        return None
    device = operands.q.device.index
    alignments = _alignments(tensors_of(operands)[:7])
    has_options = any(each is not None for each in alignments[3:])

    def run(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        if (
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNMENT_BYTES
            or (has_options and _alignments((q, k, v, *options)) != alignments)
            or device != torch.cuda.current_device()
            or launch.is_watched()
        ):
            return otherwise(Operands.of((q, k, v, *options)))
        results = make_results()
        launch((q, k, v, *options, None, None, None, *results))
        return results[0], results[1]

    return run


def _alignments(tensors: tuple[Any, ...]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() % ALIGNMENT_BYTES for tensor in tensors]
