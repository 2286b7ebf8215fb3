"""Every Triton variant compiles ahead of time for NVIDIA and AMD, without spills. No GPU is needed."""
import dataclasses

import pytest
import torch
from triton_sim import MISSING_TRITON, compile_variants

from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec import EngramSpec

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes per block
OTHER_PRESETS = {"qwen4_ple": EngramSpec.qwen4_ple, "longcat": EngramSpec.longcat, "demo_v1": EngramSpec.demo_v1}


def assert_compiles_without_spills(variants, target):
    for variant, made in zip(variants, compile_variants(variants, target), strict=True):
        assert made.shared <= SHARED_LIMITS[target], (variant.kernel.__name__, variant[1:], made.shared)
        assert (made.spills, made.stack) == (0, 0), (variant.kernel.__name__, variant[1:], made.registers)


def without_options(variants):
    """The variants without optional arguments. Those with them are compiled for V4.1 on sm_90 with int32 ids only."""
    from engram_kernels.triton_runtime.launch import ABSENT
    return [v for v in variants if v.types.count(ABSENT) == max(w.types.count(ABSENT) for w in variants if w.kernel is v.kernel)]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_triton_v41_compiles(target):
    from engram_kernels.triton_runtime.warmup import spec_variants
    variants = spec_variants(EngramSpec.deepseek_v41(), target, backward=True)
    fewest = without_options(variants)
    variants = [v for v in variants if v in fewest or (target == "sm_90" and v.dtypes[0] != torch.int64)]
    assert {v.kernel.__name__ for v in variants} >= {"ngram_hash_kernel", "gather_rows_kernel", "gate_kernel", "gate_bwd_kernel"}
    assert_compiles_without_spills(variants, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("preset", OTHER_PRESETS.values(), ids=OTHER_PRESETS.keys())
def test_triton_other_presets_compile(preset, target):
    from engram_kernels.triton_runtime.warmup import spec_variants
    assert_compiles_without_spills(without_options(spec_variants(preset(), target, backward=True)), target)


@pytest.mark.parametrize("target", TARGETS)
def test_triton_every_row_format_and_dtype_compiles(target):
    from engram_kernels.triton_kernels.gather_rows import gather_rows
    from engram_kernels.triton_runtime import launch
    variants = []
    for name, stored in ROW_FORMATS.items():
        rows = torch.empty(9, stored.width(256), dtype=stored.dtype, device="meta")
        shape = stored.scale_shape(9, 256)
        scales = None if shape is None else torch.empty(shape, dtype=stored.scale_dtype, device="meta")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ids = torch.empty(100, dtype=torch.int64, device="meta")
            variants += launch.variants_of(lambda: gather_rows(rows, scales, ids, name, 256, True, dtype), target)  # noqa: B023
    assert len(variants) == 3 * len(ROW_FORMATS)
    assert_compiles_without_spills([*variants, *(v._replace(aligned=False) for v in variants[::5])], target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_triton_gate_dtypes_and_options_compile(target):
    from engram_kernels.triton_runtime.warmup import spec_variants
    spec = dataclasses.replace(EngramSpec.deepseek_v41(), zero_sign="sign", add_residual=False)
    dtypes = (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32)
    for dtype, weights in {"sm_80": dtypes[:2], "sm_100": dtypes[2:]}.get(target, dtypes):
        variants = [v for v in spec_variants(spec, target, dtype, weights, True) if v.kernel.__name__.startswith("gate")]
        assert_compiles_without_spills(without_options(variants), target)
    assert_compiles_without_spills([variants[0]._replace(aligned=False)], target)


# A case each, so that two processes share the compiler's time. sm_80 and sm_100 take every other format: they differ from sm_90
# in the assembler, and a format in how an element is decoded, which test_triton_every_row_format_and_dtype_compiles has for all.
@pytest.mark.slow
@pytest.mark.parametrize(("target", "name"), [(target, name) for target in TARGETS for i, name in enumerate(ROW_FORMATS)
                                              if target not in ("sm_80", "sm_100") or i % 2 == (target == "sm_100")])
def test_triton_gather_gate_compiles(target, name):
    from engram_kernels.triton_kernels.gather_gate import gather_gate, gather_gate_bwd
    from engram_kernels.triton_runtime import launch
    i, stored = list(ROW_FORMATS).index(name), ROW_FORMATS[name]
    rows = torch.empty(9, stored.width(256), dtype=stored.dtype, device="meta")
    shape = stored.scale_shape(9, 256)
    scales = None if shape is None else torch.empty(shape, dtype=stored.scale_dtype, device="meta")
    branches, dtype = ((1, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16), (4, torch.float32))[i % 4]
    hidden = torch.empty(100, branches, 5120, dtype=dtype, device="meta")
    ids, weight = torch.empty(100, 20, dtype=torch.int32, device="meta"), hidden[0]
    mask = torch.empty(100, dtype=torch.bool, device="meta") if i % 3 == 0 else None
    args = (hidden, rows, scales, ids, weight, weight, mask, name, 256, False, 1e-6, 1e-6, "copysign", True)
    variants = launch.variants_of(lambda: gather_gate(*args), target)
    if i >= 4:  # a backward of four branches compiles for up to 46 s: four formats have each shape, the others one branch
        hidden = torch.empty(100, 1, 5120, dtype=torch.bfloat16, device="meta")
        args = (hidden, *args[1:4], hidden[0], hidden[0], *args[6:])
    if target == "sm_90" or i < 4:
        variants += launch.variants_of(lambda: gather_gate_bwd(hidden, *args), target)
    assert_compiles_without_spills(variants, target)


def test_triton_engram_forward_launches_what_is_warm():
    from engram_kernels.triton_kernels.engram_forward import engram_forward
    from engram_kernels.triton_runtime import launch
    from engram_kernels.triton_runtime.warmup import spec_variants
    warm = set(spec_variants(EngramSpec.deepseek_v41(row_format="bf16"), "sm_90"))
    for tokens in (1, 65, 2000):
        shapes = ((tokens, 4, 5120), (25600, 6144), (9, 256))
        hidden, w_kv, rows = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        ids, mask = (torch.empty(tokens, *s, dtype=d, device="meta") for s, d in (((24,), torch.int32), ((), torch.bool)))
        args = (hidden, rows, None, ids, w_kv, hidden[0], hidden[0], mask, "bf16", 256, False, 1e-6, 1e-6, "copysign", True)
        found = launch.variants_of(lambda: engram_forward(*args), "sm_90")  # noqa: B023
        assert {v.kernel.__name__ for v in found} == {"gather_rows_kernel", "gate_kernel"} and warm.issuperset(found), tokens
