"""The backward pass of gather_gate on the PTX simulator: against float64 autograd of the reference, and what it costs."""
import ctypes
import functools
import re

import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, build
from cuda_sim.params import DTYPES, ROW_FORMATS, GatherGateBwdParams
from cuda_sim.sass_path import longest_path, token_loop
from test_gate_cuda_sim import branch_rows
from test_gather_gate_cuda_sim import WORDS, Table, gather_gate_params, make_inputs

from engram_kernels.reference.gate import gate as reference_gate
from engram_kernels.reference.gather_rows import gather_rows as reference_rows
from engram_kernels.testing import assert_as_accurate_as_torch
from engram_kernels.testing.draws import worst_draw

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "gather_gate_bwd_cuda"
NAMES = ("hidden", "rows", "w_hidden", "w_key")


def simulate(table, inputs, grad_out, mask=None, device=None, **options):
    """(gradients of hidden, of each token's rows and of the weights, launches)."""
    device = device or Device()
    hidden, ids, *weights = inputs
    at = device.address
    shapes = {"grad_hidden": hidden, "grad_rows": hidden[:, 0], "grad_w_hidden": weights[0], "grad_w_key": weights[1]}
    grads = {name: torch.full(like.shape, float("nan"), dtype=like.dtype) for name, like in shapes.items()}
    params = GatherGateBwdParams(
        forward=gather_gate_params(device, table, inputs, mask, **options), grad_out=branch_rows(device, grad_out, "grad_out"),
        grad_hidden=branch_rows(device, grads["grad_hidden"], "grad_hidden", readonly=False),
        **{name: at(grads[name], name) for name in list(shapes)[1:]})
    scratch_bytes = device.library.gather_gate_bwd_cuda_scratch_bytes
    scratch_bytes.restype = ctypes.c_int64
    device.library.fake_cudart_set(device.callback, device.multiprocessors)
    params.scratch = at(torch.full((scratch_bytes(ctypes.byref(params)) // 4,), float("nan")), "scratch")
    return list(grads.values()), device.run(OP, params)


def gradients(mask, words, *tensors):
    """By autograd of the reference of gate, with the memory vector for key and value."""
    *leaves, grad_out = (x.detach().clone().requires_grad_() for x in tensors)
    hidden, memory, w_hidden, w_key = leaves
    out = reference_gate(hidden, memory[:, None].expand(hidden.shape), memory, w_hidden, w_key, mask, *words)
    return torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def check(table, inputs, grad_out, mask=None, device=None, **options):
    got, launches = simulate(table, inputs, grad_out, mask, device, **options)
    hidden, ids, *weights = inputs
    run = functools.partial(gradients, mask, [options.get(name, default) for name, default in WORDS])
    ids = ids if mask is None else ids.masked_fill(mask[:, None], -1)
    memory = reference_rows(table.rows, table.scales, ids, table.row_format, table.row_dim, table.zero_scale,
                            torch.float32).flatten(1)
    want = run(*(x.double() for x in (hidden, memory, *weights, grad_out)))
    plain = worst_draw(run, (hidden, memory.to(hidden.dtype), *weights, grad_out), want)
    for name, a, b, c in zip(NAMES, got, plain, want, strict=True):
        try:
            assert_as_accurate_as_torch(a, b, c)
        except AssertionError as err:
            raise AssertionError(f"{name}: {err}") from None
    return got, launches


def random_grad(inputs, seed=2):
    return torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).to(inputs[0].dtype)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_gate_bwd_matches_autograd(row_format, dtype):
    for shape in ((7, 3, 3, 64), (1, 1, 1, 32), (5, 4, 2, 256)):
        inputs = make_inputs(*shape, dtype, weight_dtype=dtype)
        device = Device(multiprocessors=2, options={"cta_order": "random"})
        check(Table(row_format, shape[3]), inputs, random_grad(inputs), torch.arange(shape[0]) % 3 == 1, device)
