"""Every option and bound of every op through every backend: they accept the same, and refuse it with the same kind of error."""
import inspect
import math

import pytest
import torch

import engram_kernels as ek
from engram_kernels import backends

pytestmark = pytest.mark.usefixtures("compiled")
T, M, C, D, R = 4, 2, 3, 32, 50
H = C * D
FLOAT_MIN, FLOAT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
NUMBERS = {"zero": 0.0, "minus_zero": -0.0, "integer": 1, "subnormal": 1e-40, "smallest": FLOAT_MIN,
           "rounds_to_smallest": FLOAT_MIN * (1 - 2**-30), "below_smallest": FLOAT_MIN * 0.99, "largest": FLOAT_MAX,
           "rounds_to_largest": FLOAT_MAX * (1 + 2**-30), "above_largest": 3.5e38, "double": 1e300, "inf": math.inf,
           "nan": math.nan, "negative": -1e-6, "text": "1e-6", "none": None, "bool": True}
GATE_OPTIONS = {**{f"eps_{k}": dict(eps=v) for k, v in NUMBERS.items()},
                **{f"clamp_{k}": dict(clamp=v) for k, v in NUMBERS.items()},
                **{f"zero_sign_{v}": dict(zero_sign=v) for v in ("copysign", "sign", "Sign", "", None)},
                **{f"add_residual_{v}": dict(add_residual=v) for v in (True, False, 1, "yes", None)}}


def make(seed=0):
    """Valid arguments of every op, by name."""
    rand = torch.Generator().manual_seed(seed)
    hidden, key = torch.randn(T, M, H, generator=rand), torch.randn(T, M, H, generator=rand)
    table = ek.RowTable.from_tensor(torch.randn(R, D, generator=rand), row_format="f32")
    ids = torch.randint(0, R, (T, C), generator=rand)
    weights = dict(w_hidden=torch.ones(M, H), w_key=torch.ones(M, H))
    w_kv = torch.randn((M + 1) * H, H, generator=rand)
    return {
        "gate": dict(hidden=hidden, key=key, value=key[:, 0], **weights),
        "gather_rows": dict(table=table, row_ids=ids, out_dtype=torch.float32),
        "gather_gate": dict(hidden=hidden, table=table, row_ids=ids, **weights),
        "engram_forward": dict(hidden=hidden, table=table, row_ids=ids, w_kv=w_kv, **weights),
        "short_conv": dict(x=hidden, weight=torch.randn(M, H, 3, generator=rand), norm_weight=torch.ones(M, H),
                           cu_seqlens=torch.tensor([0, 1, T], dtype=torch.int32), dilation=2),
        "row_update": dict(table=table, row_ids=ids, grad_rows=torch.randn(T, C, D, generator=rand), lr=0.1,
                           second=torch.ones(R), first=torch.zeros(R, D), steps=torch.zeros(R, dtype=torch.int32)),
    }


def tensors(**changes):
    """A case that changes tensors: name -> function of the valid one."""
    return lambda args: {name: change(args[name]) for name, change in changes.items()}


def at(row_id, where=(1, 2)):
    """Row ids of which one is `row_id`."""
    def change(ids):
        ids = ids.clone()
        ids[where] = row_id
        return ids
    return change


def a_slice(x):
    """Equal to `x`, not contiguous."""
    return torch.stack([x, x], dim=-1)[..., 0]


def with_state(**changes):
    """short_conv with a ring for each of its two sequences, and changes to that."""
    return lambda args: dict(state=torch.zeros(2, 4, M, H), positions=torch.zeros(2, dtype=torch.int64)) | changes


IDS = {**{f"id_{i}": tensors(row_ids=at(i)) for i in (-2**40, -2, -1, 0, R - 1, R, 2**40)},
       "ids_int32": tensors(row_ids=lambda x: x.int()), "ids_int16": tensors(row_ids=lambda x: x.short()),
       "ids_float": tensors(row_ids=lambda x: x.float()), "ids_strided": tensors(row_ids=a_slice),
       "ids_list": tensors(row_ids=lambda x: x.tolist()), "ids_no_columns": tensors(row_ids=lambda x: x[:, :0]),
       "ids_short": tensors(row_ids=lambda x: x[:2]), "no_table": dict(table=None),
       "tensor_for_table": dict(table=torch.ones(R, D))}
HIDDEN = {"hidden_bf16": tensors(hidden=lambda x: x.bfloat16()), "hidden_f64": tensors(hidden=lambda x: x.double()),
          "hidden_flat": tensors(hidden=lambda x: x[:, 0]), "hidden_strided": tensors(hidden=a_slice),
          "hidden_none": dict(hidden=None), "hidden_meta": tensors(hidden=lambda x: x.to("meta")),
          "no_branches": tensors(hidden=lambda x: x[:, :0]), "no_elements": tensors(hidden=lambda x: x[:, :, :0]),
          "weight_short": tensors(w_key=lambda x: x[:1]), "weight_bf16": tensors(w_hidden=lambda x: x.bfloat16()),
          "weight_strided": tensors(w_key=a_slice), "mask": dict(mask=torch.tensor([True, False, True, False])),
          "mask_bytes": dict(mask=torch.zeros(T, dtype=torch.uint8)), "mask_short": dict(mask=torch.zeros(1, dtype=torch.bool)),
          "out": dict(out=torch.empty(T, M, H)), "out_bf16": dict(out=torch.empty(T, M, H, dtype=torch.bfloat16)),
          "out_short": dict(out=torch.empty(1, M, H)), "out_text": dict(out="x"),
          "out_meta": dict(out=torch.empty(T, M, H).to("meta")), "out_strided": dict(out=torch.empty(T, M, H, 2)[..., 0]),
          "out_wants_grad": dict(out=torch.empty(T, M, H, requires_grad=True)),
          "out_is_hidden": lambda args: dict(out=args["hidden"]), "out_is_weight":
          lambda args: dict(hidden=args["hidden"][:1].clone(), out=args["w_key"][None], **{k: v[:1] for k, v in args.items()
                                                                                       if k in ("key", "value", "row_ids")}),
          "hidden_wants_grad_with_out":
          lambda args: dict(hidden=args["hidden"].clone().requires_grad_(), out=torch.empty(T, M, H)),
          "masked_id": lambda args: dict(mask=torch.tensor([False, True, False, False]),
                                         **({"row_ids": at(-9)(args["row_ids"])} if "row_ids" in args else {})),
          "no_tokens": lambda args: {k: args[k][:0] for k in ("hidden", "key", "value", "row_ids") if k in args}}
CASES = {
    "gate": {**GATE_OPTIONS, **HIDDEN, "key_f16": tensors(key=lambda x: x.half()), "value_flat": tensors(value=lambda x: x[0]),
             "key_meta": tensors(key=lambda x: x.to("meta"))},
    "gather_gate": {**GATE_OPTIONS, **HIDDEN, **IDS},
    "engram_forward": {**GATE_OPTIONS, **HIDDEN, **IDS, "w_kv_strided": tensors(w_kv=a_slice),
                       "w_kv_short": tensors(w_kv=lambda x: x[1:])},
    "gather_rows": {**IDS, **{f"out_dtype_{str(d)[6:]}": dict(out_dtype=d) for d in (torch.float16, torch.bfloat16, torch.float64,
                                                                                   torch.int32)},
                    "out_dtype_text": dict(out_dtype="float32"), "ids_scalar": dict(row_ids=torch.tensor(3)),
                    "out": dict(out=torch.empty(T, C, D)), "out_short": dict(out=torch.empty(T, C, D - 1)),
                    "out_bf16": dict(out=torch.empty(T, C, D, dtype=torch.bfloat16)), "out_text": dict(out="x"),
                    "out_is_rows": lambda args: dict(row_ids=torch.zeros(4, dtype=torch.int64), out=args["table"].rows[:4]),
                    "out_wants_grad": dict(out=torch.empty(T, C, D, requires_grad=True))},
    "short_conv": {**{f"eps_{k}": dict(eps=v) for k, v in NUMBERS.items()},
                   **{f"dilation_{v}": dict(dilation=v) for v in (-1, 0, 1, 2**28 - 1, 2**28, 2**40, 1.5, "2", None, True)},
                   "x_f64": tensors(x=lambda x: x.double()), "x_flat": tensors(x=lambda x: x[:, 0]), "x_none": dict(x=None),
                   "x_strided": tensors(x=a_slice), "weight_short": tensors(weight=lambda x: x[:1]),
                   "weight_none": dict(weight=None), "norm_bf16": tensors(norm_weight=lambda x: x.bfloat16()),
                   "no_taps": tensors(weight=lambda x: x[..., :0]), "nine_taps": dict(weight=torch.ones(M, H, 9)),
                   "bounds_int64": tensors(cu_seqlens=lambda x: x.long()), "bounds_short": tensors(cu_seqlens=lambda x: x[:1]),
                   "bounds_fall": dict(cu_seqlens=torch.tensor([0, 5, T], dtype=torch.int32)),
                   "out": dict(out=torch.empty(T, M, H)), "out_short": dict(out=torch.empty(1, M, H)),
                   "out_is_x": lambda args: dict(out=args["x"]),
                   "out_wants_grad": dict(out=torch.empty(T, M, H, requires_grad=True)),
                   "positions_alone": dict(positions=torch.zeros(2, dtype=torch.int64)),
                   "state": with_state(), "state_without_positions": with_state(positions=None),
                   "state_short": with_state(state=torch.zeros(2, 3, M, H)),
                   "state_of_one": with_state(state=torch.zeros(1, 4, M, H)),
                   "state_overlaps": with_state(state=torch.zeros(1, 4, M, H).expand(2, 4, M, H)),
                   "state_is_out": lambda args: with_state(out=(room := torch.zeros(8, M, H))[:T],
                                                           state=room.view(2, 4, M, H))(args),
                   "state_wants_grad": with_state(state=torch.zeros(2, 4, M, H, requires_grad=True)),
                   "x_wants_grad_with_state":
                   lambda args: with_state(x=args["x"].clone().requires_grad_())(args),
                   "position_below_0": with_state(positions=torch.tensor([0, -1])),
                   "indices": with_state(state_indices=torch.tensor([1, 0])),
                   "indices_twice": with_state(state_indices=torch.tensor([1, 1])),
                   "indices_high": with_state(state_indices=torch.tensor([0, 2])),
                   "indices_int32": with_state(state_indices=torch.tensor([0, 1], dtype=torch.int32)),
                   "ends": with_state(state_ends=torch.zeros(2, 2, dtype=torch.int64)),
                   "ends_skip": with_state(state_ends=torch.zeros(2, 2, dtype=torch.int64), positions=torch.tensor([0, 3])),
                   "ends_int32": with_state(state_ends=torch.zeros(2, 2, dtype=torch.int32))},
    "row_update": {**IDS, **{f"{name}_{k}": {name: v} for name in ("lr", "eps", "grad_scale") for k, v in NUMBERS.items()},
                   **{f"beta{i}_{k}": dict(betas=(v, 0.9) if i == 0 else (0.9, v)) for i in (0, 1)
                      for k, v in {**NUMBERS, "one": 1.0, "below_one": 1 - 2**-40}.items()},
                   **{f"betas_{k}": dict(betas=v) for k, v in (("none", None), ("one", (0.9,)), ("list", [0.9, 0.99]))},
                   **{f"{name}_{v}": {name: v} for name in ("step", "seed", "first_row")
                      for v in (-1, 0, 1, 2**31, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 1.5, "2", None, True)},
                   **{f"rule_{v}": dict(rule=v) for v in ("adam", "Adam", "adagrad", "sgd", "none", None)},
                   **{f"rounding_{v}": dict(rounding=v) for v in ("stochastic", "nearest", "up", None)},
                   **{f"{name}_{k}": tensors(**{name: change}) for name in ("grad_rows", "second", "first", "steps")
                      for k, change in (("f64", lambda x: x.double()), ("bf16", lambda x: x.bfloat16()), ("none", lambda x: None),
                                        ("short", lambda x: x[1:]), ("strided", a_slice), ("list", lambda x: x.tolist()),
                                        ("meta", lambda x: x.to("meta")), ("wants_grad", lambda x: x.float().requires_grad_()))},
                   "rows_bf16": tensors(table=lambda x: ek.RowTable.from_tensor(x.rows.bfloat16(), row_format="bf16")),
                   "rows_fp8": tensors(table=lambda x: ek.RowTable.from_tensor(x.rows.to(torch.float8_e4m3fn).view(torch.uint8),
                                                                               torch.ones(1), "fp8_e4m3_tensor")),
                   "rows_want_grad": tensors(table=lambda x: ek.RowTable.from_tensor(x.rows.requires_grad_(), row_format="f32")),
                   "rows_strided": dict(table=ek.RowTable.from_tensor(torch.ones(R, 2 * D)[:, :D], row_format="f32")),
                   "second_by_element": dict(second=torch.ones(R, D)), "second_of_no_row": dict(second=torch.ones(0)),
                   "first_is_rows": lambda args: dict(first=args["table"].rows), "second_is_first":
                   lambda args: dict(second=args["first"]), "grads_are_rows":
                   lambda args: dict(row_ids=torch.arange(R), grad_rows=args["table"].rows),
                   "grad_nan": tensors(grad_rows=lambda x: x * math.nan), "grad_huge": tensors(grad_rows=lambda x: x * 3e38),
                   "sum_overflows": dict(row_ids=torch.tensor([4, 4]), grad_rows=torch.full((2, D), 3e38)),
                   "scaled_overflows": dict(grad_rows=torch.full((T, C, D), 3e38), grad_scale=10.0),
                   "steps_spent": dict(steps=torch.full((R,), 2**31 - 1, dtype=torch.int32)),
                   "steps_negative": dict(steps=torch.full((R,), -1, dtype=torch.int32)),
                   "no_ids": dict(row_ids=torch.zeros(0).int(), grad_rows=torch.zeros(0, D)),
                   "scalar_id": dict(row_ids=torch.tensor(3), grad_rows=torch.ones(D)),
                   "out": dict(out=torch.empty(T * C)), "out_short": dict(out=torch.empty(T)), "out_text": dict(out="x"),
                   "out_bf16": dict(out=torch.empty(T * C).bfloat16()), "out_strided": dict(out=torch.empty(T * C, 2)[:, 0]),
                   "out_wants_grad": dict(out=torch.empty(T * C, requires_grad=True)),
                   "out_is_steps": lambda args: dict(out=(room := torch.zeros(R))[:T * C], steps=room.view(torch.int32))},
}


def outcome(op, case, backend):
    """What a call with a change comes to: "accepted", or the kind of error."""
    args = make()[op]
    args |= case(args) if callable(case) else case
    try:
        getattr(ek, op)(**args, backend=backend)
    except Exception as error:
        return type(error).__name__, str(error)
    return "accepted", ""


@pytest.mark.parametrize(("op", "case"), [(op, case) for op, cases in CASES.items() for case in cases])
def test_accepts_the_same_on_every_backend(op, case):
    found = {backend: outcome(op, CASES[op][case], backend) for backend in (*backends.available(op), "auto")}
    assert len({kind for kind, _ in found.values()}) == 1, found
    kind = found["reference"][0]
    assert kind in ("accepted", "TypeError", "ValueError", "IndexError"), found
    if kind != "accepted":
        assert all(words.startswith(f"{op}: ") for _, words in found.values()), found


@pytest.mark.parametrize("op", CASES)
def test_accepts_covers_every_option(op):
    options = set(inspect.signature(getattr(ek, op)).parameters) - {"backend", "sparse_grad"}
    changed = set()
    for case in CASES[op].values():
        changed |= set(case(make()[op]) if callable(case) else case)
    assert changed >= options - set(make()[op]) - {"backend"}


@pytest.mark.parametrize("op", ["gather_rows", "gather_gate", "engram_forward"])
def test_accepts_int32_ids_into_a_table_of_two_billion_rows(op, tmp_path):
    """2^31 is no int32: a check that compares ids with it in their own dtype refuses every row."""
    rows = torch.from_file(str(tmp_path / "rows"), shared=True, size=2**31, dtype=torch.uint8).view(2**31, 1)  # a sparse file
    rows[7] = 0x38  # 1.0
    table = ek.RowTable.from_tensor(rows, torch.ones(1), "fp8_e4m3_tensor")
    hidden, weights = torch.ones(1, 1, 2), dict(w_hidden=torch.ones(1, 2), w_key=torch.ones(1, 2))
    for dtype in (torch.int32, torch.int64):
        ids = torch.tensor([[7, 2**31 - 1]], dtype=dtype)
        for backend in backends.available(op):
            if op == "gather_rows":
                assert ek.gather_rows(table, ids, torch.float32, backend=backend).tolist() == [[[1], [0]]]
            elif op == "gather_gate":
                ek.gather_gate(hidden, table, ids, **weights, backend=backend)
            else:
                ek.engram_forward(hidden, table, ids, torch.ones(4, 2), **weights, backend=backend)
