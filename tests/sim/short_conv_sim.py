"""What the simulator tests of short_conv share: inputs, plain torch, and calls of the launchers."""
import ctypes

import numpy as np
import torch
from cuda_sim import Device, poisoned
from cuda_sim.params import DTYPES, ShortConvBwdParams, ShortConvParams

EPS = 1e-5
OP, BWD = "short_conv_cuda", "short_conv_bwd_cuda"


def forward_params(device, x, weight, norm_weight, cu, dilation, state=None, positions=None, out=0, errors=None, eps=EPS,
                   indices=None, ends=None):
    """x may be a strided view. Inputs are read-only to the kernels but for `state` and `ends`."""
    at = device.address
    branches, size, width = weight.shape
    rings, slots, ring_stride = (0, 0, 0) if state is None else (*state.shape[:2], state.stride(0))
    position_stride, index_stride = (0 if a is None else a.stride(0) for a in (positions, indices))
    return ShortConvParams(
        x=at(x, "x", readonly=True), weight=at(weight, "weight", readonly=True),
        norm_weight=at(norm_weight, "norm_weight", readonly=True), cu_seqlens=at(cu, "cu_seqlens", readonly=True),
        positions=at(positions, "positions", readonly=True), state_indices=at(indices, "state_indices", readonly=True),
        state=at(state, "state"), state_ends=at(ends, "state_ends"), out=out, num_tokens=len(x), num_sequences=len(cu) - 1,
        x_token_stride=x.stride(0), x_branch_stride=x.stride(1), position_stride=position_stride, index_stride=index_stride,
        state_ring_stride=ring_stride, num_rings=rings, slots=slots, branches=branches, hidden_size=size, width=width,
        dilation=dilation, eps=eps, dtype=DTYPES[x.dtype], weight_dtype=DTYPES[weight.dtype],
        positions_are_64=positions is not None and positions.dtype == torch.int64, error_count=at(errors, "errors"))


def simulate(x, weight, norm_weight, cu, dilation, state=None, positions=None, device=None, out_lead=0, indices=None, ends=None):
    """(out, errors counted, launches); state and ends are changed in place. out_lead: elements before the first of out."""
    device = device or Device()
    room, errors = poisoned((x.numel() + out_lead) * x.element_size(), np.uint8), np.zeros(1, np.uint32)
    out = device.address(room, "out") + out_lead * x.element_size()
    launches = device.run(OP, forward_params(device, x, weight, norm_weight, cu, dilation, state, positions, out, errors,
                                             indices=indices, ends=ends))
    got = torch.from_numpy(room.copy()).view(x.dtype)[out_lead:].reshape(x.shape) if x.numel() else torch.empty_like(x)
    return got, int(errors[0]), launches


def kernel_of(launches):
    """Of the three kernels, the one that computed the outputs."""
    return next(name for name in ("walk", "taps", "plain") if f"short_conv_{name}" in launches[0].kernel)


def simulate_bwd(grad_out, x, weight, norm_weight, cu, dilation, device=None):
    """((grad_x, grad_weight, grad_norm_weight), errors counted, launches)."""
    device, errors = device or Device(), np.zeros(1, np.uint32)
    params = ShortConvBwdParams(
        forward=forward_params(device, x, weight, norm_weight, cu, dilation, errors=errors),
        grad_out=device.address(grad_out, "grad_out", readonly=True), grad_token_stride=grad_out.stride(0),
        grad_branch_stride=grad_out.stride(1))
    grads = {}
    for name, like in (("grad_x", x), ("grad_weight", weight), ("grad_norm_weight", norm_weight)):
        grads[name] = (poisoned(like.numel() * like.element_size(), np.uint8), like)
        setattr(params, name, device.address(grads[name][0], name))
    device.set_runtime()
    scratch_bytes = device.library.short_conv_bwd_cuda_scratch_bytes
    scratch_bytes.restype = ctypes.c_int64
    scratch = poisoned(scratch_bytes(ctypes.byref(params)), np.uint8)
    params.scratch = device.address(scratch, "scratch")
    launches = device.run(BWD, params)
    got = tuple(torch.from_numpy(room).view(like.dtype).reshape(like.shape) if like.numel() else torch.empty_like(like)
                for room, like in grads.values())
    return got, int(errors[0]), launches
