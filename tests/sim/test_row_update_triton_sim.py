"""row_update in Triton: the compiled PTX on the simulator, against the CPU kernel bit for bit: nothing may be contracted."""
import pytest
import torch
from test_row_update_cuda_sim import DEFAULTS, FORMATS, bits, make_ids, make_state, on_the_cpu, rand
from triton_sim import MISSING_TRITON, simulate

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)


def run(rows, ids, grads, rule, state, **options):
    from engram_kernels.triton_kernels import row_update as module
    o, errors = DEFAULTS | options, torch.zeros(1, dtype=torch.int32)
    original, module.error_counter = module.error_counter, lambda op, device: errors
    try:
        squares, launches = simulate(lambda: module.row_update(
            rows, None, ids, grads, state["second"], state["first"], state["steps"], FORMATS[rows.dtype], rows.shape[1], False,
            rule, *(o[name] for name in DEFAULTS)))
    finally:
        module.error_counter = original
    return squares, errors.item(), launches


@pytest.mark.slow_cases("adam_f16", "adagrad", "sgd")
@pytest.mark.parametrize(("rule", "second", "first", "dtype"), [
    ("adam", "row", torch.bfloat16, torch.bfloat16), ("adam", "element", torch.float32, torch.float16),
    ("adagrad", "element", None, torch.float32), ("sgd", None, torch.float32, torch.float32)],
    ids=["adam_bf16", "adam_f16", "adagrad", "sgd"])
def test_row_update_has_the_bits_of_the_cpu_kernel(rule, second, first, dtype):
    rows, state = rand(9, 37).mul(1e-4 if dtype == torch.float16 else 1).to(dtype), make_state(second, first, 9, 37)
    ids, grads = make_ids(20, 9), rand(20, 37, seed=3)
    kept_rows, kept = rows.clone(), {name: None if x is None else x.clone() for name, x in state.items()}
    squares, errors, _ = run(rows, ids, grads, rule, state)
    want = on_the_cpu(kept_rows, ids, grads, rule, kept)
    assert errors == 0 and torch.equal(squares, want) and torch.equal(bits(rows), bits(kept_rows))
    for name, x in state.items():
        assert x is None or torch.equal(bits(x), bits(kept[name])), name


@pytest.mark.parametrize("wrong", ["id", "nan", "spent"])
def test_row_update_refuses_before_it_writes(wrong):
    rows, state = rand(9, 16), make_state("row", torch.float32, 9, 16)
    ids, grads = torch.tensor([0, 3, 4, 4, -1]), rand(5, 16, seed=8)
    if wrong == "id":
        ids[1] = 9
    elif wrong == "nan":
        grads[2, 5] = float("nan")
    else:
        state["steps"][4] = 2**31 - 1
    kept = [rows.clone(), *(x.clone() for x in state.values())]
    squares, errors, _ = run(rows, ids, grads, "adam", state)
    assert errors == 1 and squares.isnan().all()
    assert all(torch.equal(a, b) for a, b in zip((rows, *state.values()), kept, strict=True))
