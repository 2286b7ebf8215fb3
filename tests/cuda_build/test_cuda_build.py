"""The CUDA library under a CUDA build of torch, with or without a device: `make test-cuda-build`."""
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import engram_kernels as ek
from engram_kernels import backends
from engram_kernels._library import COMPILE_ERROR, CUDA_ERROR
from engram_kernels.table.row_table import RowTable

pytestmark = pytest.mark.skipif(CUDA_ERROR is not None and os.environ.get("EK_EXPECT_CUDA_BUILD") != "1", reason=str(CUDA_ERROR))
SCHEMAS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("engram_kernels::"))
WITH_DEVICE = torch.cuda.is_available()
ON_THE_CPU = ("read_rows", "row_update_named")  # rows of a file come out there, and are trained there
OPS = tuple(op for op in backends.ops() if op not in ON_THE_CPU)
T, M, C, D = 6, 2, 24, 32
H = C * D
LAYOUT = ek.EngramSpec.deepseek_v41(vocab_size=500, num_classes=500, table_sizes=(10_000,) * 3).layout()
TOKEN_MAP = ek.TokenMap(torch.arange(500, dtype=torch.int32), 500, "x")


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_the_libraries_are_loaded():
    assert COMPILE_ERROR is None and CUDA_ERROR is None
    assert torch.version.cuda is not None


def test_host_memory_is_registered_with_cuda():
    from engram_kernels import _C, _C_cuda
    registrar = _C.HostRegistrar(*_C_cuda.host_registrar())
    table = RowTable.from_tensor(torch.ones(3, 8), row_format="f32", copy=True)
    if WITH_DEVICE:
        table.pin(registrar)
        assert table.rows.is_pinned()
        return
    with pytest.raises(OSError, match="HostMemory: bytes 0..4096 of 4096 cannot be pinned: .*CUDA"):
        table.pin(registrar)
    with pytest.raises(RuntimeError, match="RowTable.pin: memory is pinned for a GPU; torch finds no GPU"):
        table.pin()


def test_every_op_is_known():
    assert {name.partition("::")[2].partition(".")[0].removesuffix("_bwd").removesuffix("_update") for name in SCHEMAS} \
        >= {op.removesuffix("_update") for op in backends.ops()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_op_has_kernels_and_a_fake(name):
    if not has_kernel(name, "CPU"):
        pytest.skip("no compiled op")
    assert has_kernel(name, "CUDA") == (not name.startswith(tuple(f"engram_kernels::{op}" for op in ON_THE_CPU)))
    assert has_kernel(name, "Meta") or torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


def call_inputs(device, grad=False):
    """op -> (function of no argument, shape, dtype) over tensors on `device`."""
    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)
    tokens = torch.zeros(T, dtype=torch.int64, device=device)
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=device) * T
    ids = torch.zeros(T, C, dtype=torch.int32, device=device)
    hidden, key, value, w_hidden, w_key = randn(T, M, H), randn(T, M, H), randn(T, H), randn(M, H), randn(M, H)
    rows, w_kv = randn(50, D), randn((M + 1) * H, C * D)
    leaves = {"gate": (hidden, key, value, w_hidden, w_key), "gather_gate": (hidden, rows, w_hidden, w_key),
              "engram_forward": (hidden, rows, w_kv, w_hidden, w_key),
              "gather_rows": (rows,), "short_conv": (hidden, conv := randn(M, H, 4), norm := randn(M, H)), "ngram_hash": ()}
    table = RowTable.from_tensor(rows)
    calls = {
        "gate": (lambda: ek.gate(hidden, key, value, w_hidden, w_key), (T, M, H), torch.bfloat16),
        "gather_gate": (lambda: ek.gather_gate(hidden, table, ids, w_hidden, w_key), (T, M, H), torch.bfloat16),
        "engram_forward": (lambda: ek.engram_forward(hidden, table, ids, w_kv, w_hidden, w_key), (T, M, H), torch.bfloat16),
        "gather_rows": (lambda: ek.gather_rows(table, ids, torch.float32), (T, C, D), torch.float32),
        "ngram_hash": (lambda: ek.ngram_hash(tokens, cu_seqlens, LAYOUT.to(device), TOKEN_MAP.to(device)), (2, T, 24),
                       torch.int32),
        "short_conv": (lambda: ek.short_conv(hidden, conv, norm, cu_seqlens, 3), (T, M, H), torch.bfloat16),
        "row_update": (lambda: ek.row_update(RowTable.from_tensor(rows.detach()), ids, randn(T, C, D).detach(), lr=0.1,
                                             second=torch.zeros(50, device=device),
                                             steps=torch.zeros(50, dtype=torch.int32, device=device)), (T * C,), torch.float32),
    }
    assert set(calls) == set(OPS)
    return calls, leaves


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_fake_tensors(op, device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        call, shape, dtype = call_inputs(device)[0][op]
        out = call()
        assert (tuple(out.shape), out.dtype, out.device) == (shape, dtype, torch.device(device))


@pytest.mark.parametrize("op", ["gate", "gather_gate", "gather_rows", "short_conv", "engram_forward"])
@pytest.mark.parametrize("device", ["cuda:0", "meta"])
def test_autograd_on_fake_tensors(op, device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        calls, leaves = call_inputs(device, grad=True)
        out = calls[op][0]()
        # the node itself: torch's engine asks a driver about any cuda tensor, a fake one too
        grads = [g for g in out.grad_fn.apply(torch.empty_like(out)) if g is not None]
        assert {(g.shape, g.dtype, g.device) for g in grads} == {(x.shape, x.dtype, x.device) for x in leaves[op]}
        assert len(grads) == len(leaves[op])


@pytest.mark.parametrize("op", OPS)
def test_the_cpu_kernels_run_under_this_torch(op):
    call, shape, dtype = call_inputs("cpu")[0][op]
    out = call()
    assert (tuple(out.shape), out.dtype) == (shape, dtype)


@pytest.mark.skipif(WITH_DEVICE, reason="this machine has a device")
@pytest.mark.parametrize("op", OPS)
def test_without_a_device_the_error_says_so(op):
    assert backends.explain(op, "cuda") == f"{op}/cuda: the kernels are loaded, but torch finds no CUDA device"
    assert "cuda" not in backends.available(op)
    with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' is not available: .*torch finds no CUDA device"):
        backends.select(op, torch.device("cpu"), "cuda")


def test_no_call_no_error():
    ek.check_errors()
