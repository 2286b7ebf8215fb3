"""Comparison rules of the test suite. Exact ops: `torch.testing.assert_close(..., rtol=0, atol=0)`."""
import torch
from torch import Tensor


def assert_as_accurate_as_torch(got: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Fails unless each row of `got` is about as close to `exact` as plain PyTorch is.

    The error of a row is its largest absolute error; allowed are `factor` times that of `plain`, plus one unit in the last
    place of the row's largest value (plain may be exact by luck). The rule is FlashAttention's, held per row, since a
    global measure hides a wrong row.

    Args:
        got: kernel output, [..., dim].
        plain: the reference computed in the dtype of `got`, same shape.
        exact: the reference computed in float64, same shape.
        factor: how many times the error of `plain` is allowed, per row.

    Raises:
        AssertionError: dtype, shape or a row is off; names the first such row. NaN anywhere is off.
    """
    if got.dtype != plain.dtype or got.shape != plain.shape or got.shape != exact.shape:
        raise AssertionError(f"got {got.dtype} {tuple(got.shape)}, expected {plain.dtype} {tuple(plain.shape)}")
    if got.numel() == 0:
        return
    exact = exact.double()
    one_ulp = torch.finfo(got.dtype).eps * exact.abs().amax(-1)
    error = (got.double() - exact).abs().amax(-1)
    allowed = factor * (plain.double() - exact).abs().amax(-1) + one_ulp
    bad = ~(error <= allowed)  # also true for NaN
    if bad.any():
        row = int(bad.flatten().nonzero()[0].item())
        raise AssertionError(f"{int(bad.sum())} of {bad.numel()} rows are off; first is row {row}: "
                             f"error {error.flatten()[row]:.3e}, allowed {allowed.flatten()[row]:.3e}")


def assert_rounded_once(got: Tensor, exact: Tensor, share: float = 0.01) -> None:
    """Fails unless `got` (bfloat16 or float16) is `exact` (float64) rounded once, but for a `share` of elements next to a tie.

    Those may be one unit in the last place off: float32 sums move a value across the middle between two neighbours now and
    then. A second rounding in between, truncation, or a wrong factor shows as a share far larger.

    Raises:
        AssertionError: too many elements differ from the rounded float64 value, or one by more than a unit.
    """
    rounded = exact.to(got.dtype)
    differ = got != rounded
    unit = torch.finfo(got.dtype).eps * rounded.double().abs().clamp_min(torch.finfo(got.dtype).tiny)
    unit = unit + 2.0**-20 * exact.abs().amax(-1, keepdim=True)  # what float32 leaves where large terms cancel
    far = (got.double() - rounded.double()).abs() > unit
    if far.any() or differ.double().mean() > share:
        raise AssertionError(f"{int(differ.sum())} of {differ.numel()} elements are not the value rounded once, "
                             f"{int(far.sum())} by more than a unit in the last place")
