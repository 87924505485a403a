"""The numerics contract as an assertion: how far from the exact result a kernel may be.

The error against the float64 oracle may be twice that of the naive formula in the same dtype, plus one rounding of that
dtype. There is no tolerance to choose: a harder problem has a larger error in the naive formula too, and is allowed it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.testing.oracle import Call, Results, reference
from flashtile.testing.rounding import rounding_errors

FLOAT64_STEP = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def assert_results_within_budget(
    actual: Results,
    call: Call,
    *,
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
    is_small: bool = False,
    scores_dtype: torch.dtype = torch.float32,
) -> None:
    """Raises unless out, lse and every gradient in ``actual`` keep the numerics contract for ``call``.

    Runs the oracle and the naive formula. The root mean square error of each result must be in the budget, and so must
    its largest error, where one rounding of every summand (``rounding_errors``) is allowed on top: the naive formula's
    largest error is now and then small by luck. For float64 inputs, where the naive formula is the oracle, its float32
    errors count, brought down to float64's scale.

    Args:
        actual: what a kernel returned for the call, with the gradients it should be judged by; tensors on any device.
        call: the arguments.
        d_out: the gradient of out that the kernel's backward received; None stands for zeros.
        d_lse: the gradient of lse that the kernel's backward received; None stands for zeros.
        is_small: judge the largest error only, for problems of so few numbers that their mean is luck as well.
        scores_dtype: what the kernel rounds a score to; the naive formula rounds it to the dtype of the inputs.

    Raises:
        AssertionError: the first result that breaks the contract, and how.

    Example:
        >>> from flashtile.testing import CallSpec, Results, assert_results_within_budget, reference
        >>> call = CallSpec(lengths_q=(64,), lengths_kv=(64,), causal=True).build()
        >>> assert_results_within_budget(reference(call, dtype=call.q.dtype), call)
    """
    exact = reference(call, d_out=d_out, d_lse=d_lse).named()
    naive = _naive(call, d_out, d_lse).named()
    floors = rounding_errors(call, d_out=d_out, d_lse=d_lse, scores_dtype=scores_dtype)
    for name, result in actual.named().items():
        assert_within_budget(result, exact=exact[name], naive=naive[name], floor=floors.get(name, 0.0), name=name)
        if not is_small:
            _assert_mean_within_budget(result, exact[name], naive[name], name)


def assert_within_budget(
    actual: Tensor, *, exact: Tensor, naive: Tensor, floor: float = 0.0, name: str = "the result"
) -> None:
    """Raises unless ``actual`` is as close to ``exact`` as the naive formula is, within a factor of two.

    The largest error, ``max |actual - exact|``, may be ``2 * max |naive - exact| + eps * max |exact| + floor``, where
    ``eps`` is that of naive's dtype or of actual's, whichever is coarser. Where ``exact`` is -inf (the lse of a row
    that sees no key) ``actual`` must be -inf, and nowhere else. NaN is never right. Entries at which the naive formula
    itself overflows do not count as its error.

    Args:
        actual: what the kernel returned, any dtype and device.
        exact: the oracle's result, float64, of the same shape.
        naive: the naive formula's result in the dtype that the kernel's inputs had, of the same shape.
        floor: an absolute error that is allowed in any case.
        name: what the error text calls it.

    Raises:
        AssertionError: with where and how large the worst error is, what was allowed, and what the naive formula made.

    Example:
        >>> import torch
        >>> from flashtile.testing import assert_within_budget, oracle
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
        >>> (exact, _), (naive, _) = oracle(q, k, v), oracle(q, k, v, dtype=q.dtype)
        >>> assert_within_budget(naive, exact=exact, naive=naive, name="out")
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, should be {list(exact.shape)}")
    rounded, eps = actual.dtype, _coarser_eps(actual, naive)
    actual, exact, naive = _in_float64(actual, exact, naive)
    _assert_same_infinities(actual, exact, name)

    is_finite = exact.isfinite()
    error = (actual - exact).masked_fill(~is_finite, 0.0).abs()
    naive_error = _largest((naive - exact)[is_finite & naive.isfinite()])
    largest = _largest(exact[is_finite])
    allowed = 2 * naive_error + eps * largest + floor
    wrong = error > allowed
    if not bool(wrong.any()):
        return
    worst = _index_of(error == error.max())
    raise AssertionError(
        f"{name} ({rounded}, shape {list(exact.shape)}): error {error[worst]:.3e} at {list(worst)}, allowed"
        f" {allowed:.3e} = 2 * {naive_error:.3e} (the naive formula's) + {eps:.1e} * {largest:.3e} (one rounding)"
        f" + {floor:.3e}; there it is {actual[worst]:.9g}, should be {exact[worst]:.9g};"
        f" {int(wrong.sum())} of {wrong.numel()} entries exceed the budget, the first at {list(_index_of(wrong))}"
    )


def _assert_mean_within_budget(actual: Tensor, exact: Tensor, naive: Tensor, name: str) -> None:
    """The budget of ``assert_within_budget`` for root mean squares; without luck, and so without a floor."""
    eps = _coarser_eps(actual, naive)
    actual, exact, naive = _in_float64(actual, exact, naive)
    is_finite = exact.isfinite() & naive.isfinite()
    error, naive_error, size = (_mean(values[is_finite]) for values in (actual - exact, naive - exact, exact))
    allowed = 2 * naive_error + eps * size
    if error > allowed:
        raise AssertionError(
            f"{name} (shape {list(exact.shape)}): root mean square error {error:.3e}, allowed {allowed:.3e} ="
            f" 2 * {naive_error:.3e} (the naive formula's) + {eps:.1e} * {size:.3e} (one rounding)"
        )


def _naive(call: Call, d_out: Tensor | None, d_lse: Tensor | None) -> Results:
    """The naive formula in the dtype of the inputs; for float64, the oracle plus the scaled errors of float32."""
    dtype = call.q.dtype
    if dtype != torch.float64:
        return reference(call, dtype=dtype, d_out=d_out, d_lse=d_lse)
    exact = reference(call, d_out=d_out, d_lse=d_lse)
    coarse = reference(call, dtype=torch.float32, d_out=d_out, d_lse=d_lse)

    def scaled(fine: Tensor, rough: Tensor) -> Tensor:
        return fine + ((rough - fine) * FLOAT64_STEP).masked_fill(~fine.isfinite(), 0.0)

    return Results(
        out=scaled(exact.out, coarse.out),
        lse=scaled(exact.lse, coarse.lse),
        gradients={name: scaled(grad, coarse.gradients[name]) for name, grad in exact.gradients.items()},
    )


def _assert_same_infinities(actual: Tensor, exact: Tensor, name: str) -> None:
    """Raises if ``actual`` has a NaN, or an infinity that ``exact`` has not, or the reverse."""
    wrong = actual.isnan() | ((actual != exact) & ~(actual.isfinite() & exact.isfinite()))
    if bool(wrong.any()):
        first = _index_of(wrong)
        raise AssertionError(
            f"{name} (shape {list(exact.shape)}): {actual[first]:.9g} at {list(first)}, should be {exact[first]:.9g};"
            f" {int(wrong.sum())} of {wrong.numel()} entries are NaN or wrongly infinite or finite"
        )


def _coarser_eps(actual: Tensor, naive: Tensor) -> float:
    """One rounding, of whichever of the two dtypes is coarser."""
    return max(torch.finfo(actual.dtype).eps, torch.finfo(naive.dtype).eps)


def _in_float64(actual: Tensor, exact: Tensor, naive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in float64 on the CPU; the naive formula's result is first rounded as the kernel's was."""
    naive = naive.to(actual.dtype)
    actual, exact, naive = (tensor.detach().to("cpu", torch.float64) for tensor in (actual, exact, naive))
    return actual, exact, naive


def _mean(values: Tensor) -> float:
    """The root mean square."""
    return values.square().mean().sqrt().item() if values.numel() else 0.0


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _index_of(condition: Tensor) -> tuple[int, ...]:
    """The index of the first True."""
    return tuple(condition.nonzero()[0].tolist())
