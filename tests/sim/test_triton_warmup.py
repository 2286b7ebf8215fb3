"""What warmup compiles for the steps of a RowOptimizer; for those of a model: test_triton_launch.py."""
import functools
import itertools

import pytest
import torch
from triton_sim import MISSING_TRITON

import engram_kernels as ek
from engram_kernels.ops import row_update as op
from engram_kernels.spec import EngramSpec
from engram_kernels.triton_runtime import dispatch


@pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)
@pytest.mark.parametrize("options", [{"rule": "adam"}, {"rule": "adam", "second_moment": "element", "bias_correction": "step"},
                                     {"rule": "adagrad"}, {"rule": "sgd", "rounding": "nearest"}])
@pytest.mark.parametrize("row_format", ["bf16", "f32"])
def test_triton_warmup_compiles_what_a_row_optimizer_launches(row_format, options, monkeypatch):
    if not dispatch.INTERPRETED:
        pytest.skip("needs the interpreter's tensors on the CPU")
    from engram_kernels.triton_runtime import launch
    from engram_kernels.triton_runtime.warmup import spec_variants
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # as on a GPU, which looks at no data
    rows = torch.zeros(100, 32, dtype={"bf16": torch.bfloat16, "f32": torch.float32}[row_format])
    table = ek.RowTable.from_tensor(rows, row_format=row_format)
    optimizer = ek.RowOptimizer(table, **options)
    spec = EngramSpec.deepseek_v41()
    warm = set(spec_variants(spec, "sm_90", torch.bfloat16, row_optimizers=[optimizer]))
    found = {}
    in_triton = functools.partial(op.row_update, backend="triton")
    monkeypatch.setattr("engram_kernels.training.row_optimizer.row_update", in_triton)
    for count, ids, dtype in itertools.product((1, 3, 200, 5000), (torch.int32, torch.int64), (torch.bfloat16, torch.float32)):
        row_ids, grads = torch.zeros(count, dtype=ids), torch.zeros(count, 32, dtype=dtype)
        for call in (optimizer.step, optimizer.norm):
            found.update(dict.fromkeys(launch.variants_of(functools.partial(call, row_ids, grads), "sm_90")))
    assert len(found) > 4 and set(found) <= warm
    assert not set(found) <= set(spec_variants(spec, "sm_90", torch.bfloat16, torch.bfloat16, True))
