"""Modules, layouts and token maps made on the meta device, under a default device, fake tensors, inference mode; and on a GPU."""
import contextlib
import copy
import os
import pickle

import pytest
import torch
from module_cases import CU, VARIANTS, H, M, T, make_layer, make_spec, token_map_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import engram_kernels.modules.memory_module
from engram_kernels import Engram, Layout, RowPrefetcher, RowTable, TokenMap, ngram_hash

# modes under which a module is made; none of them may change what others get afterwards
MODES = {"meta": lambda: torch.device("meta"), "inference": torch.inference_mode, "fake": FakeTensorMode,
         "fake_with_real": lambda: FakeTensorMode(allow_non_fake_inputs=True)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", [*MODES, "default_device", "functionalize"])
def test_a_module_made_in_a_mode_changes_no_other(mode, variant):
    seed = 1000 + [*MODES, "default_device", "functionalize"].index(mode)  # a spec that nobody has seen yet
    spec = make_spec(variant, seed=seed)

    def make():
        rows = nn.Parameter(torch.empty(spec.layout().num_rows[0], spec.row_dim))
        return Engram(spec, spec.layer_ids[0], table=RowTable.from_tensor(rows, row_format="f32"), dtype=torch.float32)

    if mode in MODES:
        with MODES[mode]():
            made = make()
    elif mode == "default_device":
        torch.set_default_device("meta")
        try:
            made = make()
        finally:
            torch.set_default_device(None)
    else:
        def traced(x):
            spec.layout()
            return x + 1
        torch.func.functionalize(traced)(torch.zeros(1))
        made = make()
    layout = spec.layout()
    for x in (layout.moduli, layout.offsets, layout.multipliers, layout.reciprocals):
        assert type(x) is torch.Tensor and x.device.type == "cpu" and not x.is_inference() and x.sum().item() != 0
        assert not torch._is_functional_tensor(x)
    assert spec.layout() is layout
    layer, ids, hidden = make_layer(variant, spec=spec, trained_rows=True)
    if mode in ("meta", "default_device", "functionalize"):  # parameters of the others are theirs for good
        made.to_empty(device="cpu")
        made.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(made(hidden, ids, CU), layer(hidden, ids, CU))


@contextlib.contextmanager
def default_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [lambda: torch.device("meta"), default_of_float64])
def test_tables_do_not_heed_a_default_device_or_dtype(default, tmp_path):
    """Under a default device new tensors without `device=` were its own: a fingerprint failed, a quantized table had no data."""
    rows, ids = torch.randn(300, 64), torch.tensor([[5, 299, 0]])
    table = RowTable.create(tmp_path / "rows", rows, row_format="f32")
    formats = ("int8_group32", "fp8_e4m3_tensor", "fp8_e4m3_row", "nvfp4")
    plain = [table.quantize(row_format)[0] for row_format in formats]
    fingerprint = table.fingerprint()
    with default():
        assert table.fingerprint() == fingerprint
        for row_format, want in zip(formats, plain, strict=True):
            for got in (table.quantize(row_format)[0], table.quantize(row_format, tmp_path / row_format)[0]):
                for have, expected in zip(got.read_rows(ids), want.read_rows(ids), strict=True):
                    assert expected is None or torch.equal(have, expected)
                assert got.table_scale == want.table_scale
        shared = table.share(f"modes{os.getpid()}")
        assert torch.equal(shared.rows, rows) and torch.equal(pickle.loads(pickle.dumps(table)).read_rows(ids)[0], rows[ids[0]])


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), torch.inference_mode])
def test_a_prefetcher_made_in_a_mode_is_known_by_its_number(mode, compiled):
    """Its number was a tensor of the mode: on the meta device the ops gave memory that nobody had written, without an error."""
    table, ids, cpu = RowTable.from_tensor(torch.randn(300, 64), row_format="f32"), torch.tensor([5, 299, 0]), torch.device("cpu")
    with mode():
        prefetcher = RowPrefetcher(table, out_dtype=torch.float32, verify_rows=2)
    ops = torch.ops.engram_kernels
    with torch.device("meta"):
        ticket = ops.prefetch_submit(ids, prefetcher.handle)
        assert ticket.device == cpu
        got = ops.prefetch_wait(ticket, ids, prefetcher.handle, 64, torch.float32, cpu)
        assert torch.equal(got, table.rows[ids])
        assert torch.equal(prefetcher.wait(prefetcher.submit(ids)), table.rows[ids])
        assert prefetcher.wait(prefetcher.submit(ids[:0])).device == cpu
    prefetcher.close()


def test_engram_computes_in_fake_mode():
    """Shapes without data, as memory estimators want them; the module and its spec stay as they were."""
    layer, ids, hidden = make_layer("demo_v1", trained_rows=True)
    state = layer.state_dict()
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(x) for name, x in state.items()}
        args = [mode.from_tensor(x) for x in (hidden, ids, CU)]
        out = torch.func.functional_call(layer, fakes, tuple(args))
    assert out.fake_mode is mode and out.shape == hidden.shape
    assert layer(hidden, ids, CU).isfinite().all()


@pytest.mark.parametrize("how", ["assign", "device"])
def test_engram_takes_its_constants_to_a_gpu(how, monkeypatch):
    """Fake CUDA tensors: which layout and map the hash gets."""
    spec = make_spec("deepseek_v41")
    token_map = token_map_of()
    seen = {}

    def hash_(token_ids, cu_seqlens, layout, token_map, history, dead_mask, backend):
        seen.update(layout=layout, token_map=token_map)
        return (torch.empty(token_ids.shape[0], layout.num_columns, dtype=torch.int32, device=token_ids.device),)

    monkeypatch.setattr(engram_kernels.modules.memory_module, "ngram_hash", hash_)
    monkeypatch.setattr(engram_kernels.modules.memory_module, "gather_rows", lambda table, ids, dtype, **options: torch.empty(
        *ids.shape, table.row_dim, dtype=dtype, device=ids.device))
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # a torch for CPUs has no random numbers of a GPU
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1 // 0)  # nor a product: the forward ends here
    with FakeTensorMode():
        layer = Engram(spec, 1, dtype=torch.float32, device="cpu" if how == "assign" else "cuda:0", token_map=token_map)
        if how == "assign":  # as a framework does that never calls _apply
            assert layer.layout.moduli.device.type == layer.token_map.map.device.type == "cpu"
            layer.load_state_dict({name: torch.empty(x.shape, device="cuda:0") for name, x in layer.state_dict().items()},
                                  assign=True)
        layer.table = RowTable.from_tensor(torch.empty(spec.layout().num_rows[0], 32, device="cuda"), row_format="f32")
        with pytest.raises(ZeroDivisionError):
            layer(torch.empty(T, M, H, device="cuda"), torch.empty(T, dtype=torch.int32, device="cuda"),
                  torch.empty(4, dtype=torch.int32, device="cuda"))
    tensors = [seen["layout"].moduli, seen["layout"].offsets, seen["layout"].multipliers, seen["token_map"].map]
    tensors += [layer.layout.moduli, layer.token_map.map] if how == "device" else []
    assert {x.device for x in tensors} == {torch.device("cuda", 0)}
    assert spec.layout().moduli.device.type == token_map.map.device.type == "cpu"


def test_engram_through_the_meta_device_keeps_its_hash():
    spec = make_spec("deepseek_v41")
    token_map = token_map_of()
    layer = Engram(spec, 1, dtype=torch.float32, token_map=token_map).to("meta")
    assert layer.layout.moduli.is_meta and layer.token_map.map.is_meta
    for twin in (copy.deepcopy(layer).to_empty(device="cpu"), layer):  # the last one without to_empty: by assignment
        twin.load_state_dict({name: torch.ones(x.shape) for name, x in layer.state_dict().items()}, assign=True)
        twin.table = make_layer("deepseek_v41")[0].table
        ids, hidden = torch.arange(T, dtype=torch.int32), torch.randn(T, M, H)
        whole = ngram_hash(ids, CU, spec.layout().of_layer(1), token_map)
        assert torch.equal(twin(hidden, ids, CU), twin(hidden, row_ids=whole[0]))


def test_layout_and_token_map_know_where_they_are():
    layout = make_spec("demo_v1").layout()
    assert layout.to("cpu") is layout and layout.to(torch.device("cpu")) is layout
    one = layout.of_layer(layout.layer_ids[1])
    assert isinstance(one, Layout) and torch.equal(one.moduli, layout.moduli[1:2]) and one.num_rows == layout.num_rows[1:2]
    with pytest.raises(ValueError, match=r"layer_id is 99, expected one of \["):
        layout.of_layer(99)
    token_map = TokenMap(torch.arange(3, dtype=torch.int32), 3, "x")
    assert token_map.to("cpu") is token_map and token_map.class_of(2) == 2 and token_map.to("meta").class_of(2) is None


def test_token_map_is_read_in_any_mode(tmp_path):
    token_map = TokenMap(torch.arange(5, dtype=torch.int32) % 3, 3, "x")
    token_map.save(tmp_path / "map.npz")
    for mode in MODES.values():
        with mode():
            loaded = TokenMap.load(tmp_path / "map.npz")
        assert type(loaded.map) is torch.Tensor and not loaded.map.is_inference() and torch.equal(loaded.map, token_map.map)
