"""What a Triton call costs on the host after warm-up: public function, wrapper and look-up, with a launcher that does nothing.

Measured on the CPU: tensors there, the compiled kernel a stub. The launch itself (Triton's launcher and the driver) is not in it.
Bound: allocating an output. The requirement is 30 us per call.
"""
import pytest
import torch

import engram_kernels as ek
from harness import measure

pytest.importorskip("triton")
from engram_kernels.triton_runtime import dispatch, launch

LAYOUT = ek.EngramSpec.deepseek_v41().layout()
TOKENS, CU = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
BYTES = torch.zeros(10, 256, dtype=torch.uint8)
TABLE = ek.RowTable.from_tensor(BYTES, BYTES[:, :8].contiguous(), "fp8_e4m3_block32")
IDS = torch.zeros(3, 24, dtype=torch.int32)
HIDDEN, VALUE, WEIGHT = torch.zeros(3, 4, 640), torch.zeros(3, 640), torch.zeros(4, 640)
WIDE, WIDE_WEIGHT, TAPS, W_KV = torch.zeros(3, 4, 6144), torch.zeros(4, 6144), torch.zeros(4, 640, 4), torch.zeros(3200, 6144)
CALLS = {
    "ngram_hash": lambda **how: ek.ngram_hash(TOKENS, CU, LAYOUT, **how),
    "gather_rows": lambda **how: ek.gather_rows(TABLE, IDS, **how),
    "gate": lambda **how: ek.gate(HIDDEN, HIDDEN, VALUE, WEIGHT, WEIGHT, **how),
    "gather_gate": lambda **how: ek.gather_gate(WIDE, TABLE, IDS, WIDE_WEIGHT, WIDE_WEIGHT, **how),
    "short_conv": lambda **how: ek.short_conv(HIDDEN, TAPS, WEIGHT, CU, 3, **how),
    "engram_forward": lambda **how: ek.engram_forward(HIDDEN, TABLE, IDS, W_KV, WEIGHT, WEIGHT, **how),
}


class Stub:
    """A compiled kernel whose launch does nothing."""

    def __getitem__(self, grid):
        return lambda *args: None


@pytest.fixture
def on_stub(monkeypatch):
    """Triton as on a GPU, up to the launch."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setitem(ek.backends._DEVICES, "triton", "cpu")
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_errors", {(op, torch.device("cpu")): torch.zeros(1, dtype=torch.int32) for op in CALLS})
    monkeypatch.setattr(launch.Variant, "compile", lambda self, target: Stub())
    monkeypatch.setattr(launch, "current_target", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)


@pytest.mark.parametrize("op", CALLS)
def test_triton_overhead(benchmark, op, on_stub):
    with torch.no_grad():
        CALLS[op](backend="triton")
        measure(benchmark, lambda: CALLS[op](backend="triton"), group=f"host cost of {op} in Triton, launch stubbed",
                contender="triton", role="ours", units=1, unit="call", rounds=3000)


@pytest.mark.parametrize("op", CALLS)
def test_allocation(benchmark, op):
    measure(benchmark, lambda: torch.empty(3, 4, 640), group=f"host cost of {op} in Triton, launch stubbed",
            contender="torch.empty", role="bound", units=1, unit="call", rounds=3000)
