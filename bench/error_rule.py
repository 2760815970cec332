"""The error rule that tests and benches share; it needs torch alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Errors(NamedTuple):
    """Largest errors of a result against float64.

    Attributes:
        ours: of the result.
        torch: of PyTorch in the same dtype.
        rounding: what the float64 truth loses when it is rounded once to the dtype of the result.
    """

    ours: float
    torch: float
    rounding: float

    @property
    def allowed(self) -> float:
        """The largest error that the rule allows."""
        return 2 * self.torch + self.rounding


def largest_errors(ours: Tensor, same_dtype: Tensor, truth: Tensor, what: str = "result") -> Errors:
    """The errors over all elements whose truth is finite.

    Raises:
        AssertionError: if shapes or infinities differ, or if a value is not finite where the truth is.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    assert (ours.isinf() == truth.isinf()).all(), f"{what}: infinities differ from the reference"
    finite = truth.isfinite()
    ours64, same64, truth64 = (t.double()[finite] for t in (ours, same_dtype, truth))
    n_bad = int((~ours64.isfinite()).sum())
    assert not n_bad, f"{what}: {n_bad} values are not finite"
    if truth64.numel() == 0:
        return Errors(0.0, 0.0, 0.0)
    rounded = truth64.to(ours.dtype).double()
    return Errors(*((t - truth64).abs().max().item() for t in (ours64, same64, rounded)))


def assert_as_accurate(ours: Tensor, same_dtype: Tensor, truth: Tensor, what: str = "result") -> Errors:
    """The error rule: max|ours - float64| <= 2 max|torch in the same dtype - float64| + rounding of the reference.

    Returns:
        The errors that keep it.
    """
    found = largest_errors(ours, same_dtype, truth, what)
    assert found.ours <= found.allowed, (
        f"{what}: max error {found.ours:.3e}, torch {found.torch:.3e}, rounding {found.rounding:.3e}, "
        f"allowed {found.allowed:.3e}"
    )
    return found
