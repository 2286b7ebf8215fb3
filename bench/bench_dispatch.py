"""What a call costs beyond its work: every op on zero tokens, through torch.ops (in inference mode and with autograd looking on)
and through the public function. Bound: allocating an empty tensor."""
import pytest
import torch

import engram_kernels as ek
from harness import measure

LAYOUT = ek.EngramSpec.deepseek_v41().layout()
CU = torch.zeros(1, dtype=torch.int32)
HIDDEN, VALUE, WEIGHT = torch.empty(0, 2, 64), torch.empty(0, 64), torch.ones(2, 64)
HISTORY, GRAD_ROWS, NO_ROWS = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 32), torch.empty(0, dtype=torch.int64)
STATE, POSITIONS = torch.empty(0, 9, 2, 64), torch.empty(0, dtype=torch.int64)
TABLE = ek.RowTable.from_tensor(torch.ones(10, 32), row_format="f32")
IDS = torch.empty(0, 2, dtype=torch.int32)
TOKENS = torch.empty(0, dtype=torch.int32)
CONV, W_KV = torch.ones(2, 64, 4), torch.ones(3 * 64, 2 * 32)
ROWS = (TABLE.rows, None, IDS)
GATE = (None, 1e-6, 1e-6, "copysign", True)
OPS = torch.ops.engram_kernels

CALLS = {
    "ngram_hash": (lambda: OPS.ngram_hash(TOKENS, CU, LAYOUT.moduli, LAYOUT.offsets, LAYOUT.multipliers, LAYOUT.reciprocals, None,
                                          None, None, LAYOUT.num_ids, LAYOUT.boundary_id, LAYOUT.eos_id),
                   lambda: ek.ngram_hash(TOKENS, CU, LAYOUT)),
    "ngram_hash_and_commit": (lambda: OPS.ngram_hash_update(TOKENS, CU, LAYOUT.moduli, LAYOUT.offsets, LAYOUT.multipliers,
                                                            LAYOUT.reciprocals, HISTORY, None, None, None, None, LAYOUT.num_ids,
                                                            LAYOUT.boundary_id, LAYOUT.eos_id),
                              lambda: ek.ngram_hash_and_commit(TOKENS, CU, LAYOUT, HISTORY)),
    "gather_rows": (lambda: OPS.gather_rows(*ROWS, "f32", 32, False, torch.bfloat16), lambda: ek.gather_rows(TABLE, IDS)),
    "gate": (lambda: OPS.gate(HIDDEN, HIDDEN, VALUE, WEIGHT, WEIGHT, *GATE),
             lambda: ek.gate(HIDDEN, HIDDEN, VALUE, WEIGHT, WEIGHT)),
    "gather_gate": (lambda: OPS.gather_gate(HIDDEN, *ROWS, WEIGHT, WEIGHT, None, "f32", 32, False, *GATE[1:]),
                    lambda: ek.gather_gate(HIDDEN, TABLE, IDS, WEIGHT, WEIGHT)),
    "engram_forward": (lambda: OPS.engram_forward(HIDDEN, *ROWS, W_KV, WEIGHT, WEIGHT, None, "f32", 32, False, *GATE[1:]),
                       lambda: ek.engram_forward(HIDDEN, TABLE, IDS, W_KV, WEIGHT, WEIGHT)),
    "short_conv": (lambda: OPS.short_conv(HIDDEN, CONV, WEIGHT, CU, 3, 1e-5),
                   lambda: ek.short_conv(HIDDEN, CONV, WEIGHT, CU, 3)),
    "short_conv with a state": (lambda: OPS.short_conv_update(HIDDEN, CONV, WEIGHT, CU, POSITIONS, 3, 1e-5, STATE, None, None),
                                lambda: ek.short_conv(HIDDEN, CONV, WEIGHT, CU, 3, state=STATE, positions=POSITIONS)),
    "row_update": (lambda: OPS.row_update(TABLE.rows, None, NO_ROWS, GRAD_ROWS, None, None, None, "f32", 32, False, "sgd", 0.1,
                                          0.0, 0.999, 1e-8, 1.0, 1, False, 0, 0),
                   lambda: ek.row_update(TABLE, NO_ROWS, GRAD_ROWS, "sgd", lr=0.1)),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("how", ["torch.ops, inference mode", "torch.ops, grad mode", "public function, inference mode",
                                 "public function, grad mode"])
def test_dispatch(benchmark, op, how):
    direct, public = CALLS[op]
    with torch.inference_mode("inference" in how):
        measure(benchmark, public if "public" in how else direct, group=f"dispatch of {op}, zero tokens", contender=how,
                role="ours" if how == "torch.ops, inference mode" else "peer", units=1, unit="call", rounds=2000)


@pytest.mark.parametrize("op", CALLS)
def test_empty(benchmark, op):
    measure(benchmark, lambda: HIDDEN.new_empty(0, 2, 64), group=f"dispatch of {op}, zero tokens", contender="new_empty",
            role="bound", units=1, unit="call", rounds=2000)


DECODE_TABLE, DECODE_IDS = torch.randn(10_000, 320), torch.randint(0, 10_000, (24,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("contender", ["gather_rows(out=)", "torch.index_select(out=)"])
def test_a_decode_step_of_24_rows(benchmark, contender):
    table, out = ek.RowTable.from_tensor(DECODE_TABLE, row_format="f32"), torch.empty(24, 320)
    run = {"gather_rows(out=)": lambda: ek.gather_rows(table, DECODE_IDS, torch.float32, out=out),
           "torch.index_select(out=)": lambda: torch.index_select(DECODE_TABLE, 0, DECODE_IDS, out=out)}[contender]
    measure(benchmark, run, group="gather of 24 rows of 1,280 bytes into a given tensor", contender=contender,
            role="ours" if "gather" in contender else "peer", units=1, unit="call", rounds=2000)
