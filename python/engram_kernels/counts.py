"""What a memory's modules hold and compute, counted from its spec. `EngramSpec` has these as methods."""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_kernels.spec import EngramSpec


def module_parameters(spec: EngramSpec, hidden: int, branches: int) -> int:
    """Parameters of the modules of all layers, tables left out; 0 for variant "none", which has no module.

    With H = `hidden`, M = `branches`, K = C * D values of a token's rows and W taps: a gated module has a projection of
    ``K (M + 1) H`` and norm weights of ``2 M H``; the demo's has biases of ``(M + 1) H``; a convolution has ``M H (W + 1)``, its
    norm included. LongCat's has ``K H``; its word embedding is the model's own and left out.

    Source: the parameters of `engram_kernels.Engram`; docs/ops.md, "The module".
    """
    values = spec.num_columns * spec.row_dim
    if spec.variant == "none":
        return 0
    if spec.variant == "longcat":
        return len(spec.layer_ids) * values * hidden
    one = values * (branches + 1) * hidden + 2 * branches * hidden
    if spec.variant == "demo_v1":
        one += (branches + 1) * hidden
    if spec.conv_width is not None:
        one += branches * hidden * (spec.conv_width + 1)
    return len(spec.layer_ids) * one


def flops_per_token(spec: EngramSpec, hidden: int, branches: int) -> int:
    """Floating-point operations of the modules of all layers for one token, forward; 0 for variant "none".

    A multiply-add is two. Projections: 2 per weight, 1 per bias. Gate, per branch and element: 2 for each of two mean squares,
    4 for the dot product with its two weights, 1 for the weighted value, 1 for the residual. Convolution: 4 for the norm, 2 per
    tap, 1 for SiLU, 1 for the sum. LongCat: 2 per element for the mean. Roots, exponentials and the few
    scalars per branch are left out, and so is decoding a row.

    Source: docs/ops.md, the formulas of `gate` and `short_conv`.
    """
    values, vectors = spec.num_columns * spec.row_dim, branches * hidden
    if spec.variant == "none":
        return 0
    if spec.variant == "longcat":  # one product, then the mean with the word embedding
        return len(spec.layer_ids) * (2 * values + 2) * hidden
    one = 2 * values * (branches + 1) * hidden + (9 + spec.add_residual) * vectors
    if spec.variant == "demo_v1":
        one += (branches + 1) * hidden
    if spec.conv_width is not None:
        one += (6 + 2 * spec.conv_width) * vectors
    return len(spec.layer_ids) * one
