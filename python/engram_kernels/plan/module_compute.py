"""What the module computes beside its lookups, wherever the table lies: the products of its projections, and what gate and
convolution move through device memory."""
from __future__ import annotations

from engram_kernels.plan.hardware import Hardware
from engram_kernels.plan.quantity import Quantity, derived, total
from engram_kernels.spec import EngramSpec

_BYTES = 2  # of a weight and of an activation: bf16


def products(spec: EngramSpec, tokens: Quantity, node: Hardware) -> Quantity | None:
    """Seconds of one layer's products, as `EngramSpec` counts them: arithmetic, or reading the weights once.

    None: the spec names no module, or the machine has no GPU.
    """
    if spec.variant == "none" or node.device_stream is None or node.flops is None:
        return None
    layers = len(spec.layer_ids)
    weights, work = spec.num_module_parameters / layers, spec.flops_per_token() / layers
    return derived("s", lambda t, rate, flops: max(weights * _BYTES / rate, t * work / flops), tokens, node.device_stream,
                   node.flops)


def _vectors(spec: EngramSpec) -> int:
    """Vectors of H that the projection gives for a token."""
    return 1 if spec.variant == "longcat" else spec.branches + 1


def passes(hidden_size: int, count: int, tokens: Quantity, node: Hardware) -> Quantity:
    """Seconds to read or write a vector of H values of each token `count` times."""
    assert node.device_stream is not None, "what has no device memory has no such passes"
    return derived("s", lambda t, rate: t * count * hidden_size * _BYTES / rate, tokens, node.device_stream)


def module_seconds(spec: EngramSpec, tokens: Quantity, node: Hardware) -> Quantity | None:
    """Seconds per step that the modules of all layers compute with this library's ops; None: as for `products`.

    The projections write M + 1 vectors of H per token, the gate reads 2 M + 1 and writes M, the convolution reads and writes M.
    "longcat" writes one, reads it with the word embedding, and writes the average.
    """
    product = products(spec, tokens, node)
    if product is None:
        return None
    m = spec.branches
    count = _vectors(spec) + (3 * m + 1 if spec.variant != "longcat" else 3) + (0 if spec.conv_width is None else 2 * m)
    one = total("s", [product, passes(spec.hidden_size, count, tokens, node)])
    return derived("s", lambda seconds: seconds * len(spec.layer_ids), one)
