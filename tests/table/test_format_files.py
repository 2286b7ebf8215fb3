"""Four-bit rows and scales per row in files, as published editions name and shape them."""
import dataclasses
import pickle

import pytest
import torch
from safetensors.torch import save_file

from engram_kernels import RowTable, gather_rows
from engram_kernels.testing import random_rows

R, D = 40, 160
IDS = torch.tensor([[5, 0, -1], [R - 1, 5, 6]])


def stored(row_format):
    return random_rows(row_format, R, D, torch.Generator().manual_seed(0))


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("global_scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3).bfloat16()],
                         ids=["0d", "1d", "bf16"])
def test_nvfp4_edition_opens_by_its_three_names(global_scale, tmp_path):
    rows, scales = stored("nvfp4")
    save_file({"w.weight": rows, "w.weight_scale": scales.view(torch.float8_e4m3fn), "w.weight_scale_2": global_scale},
              tmp_path / "model.safetensors")
    want = RowTable.from_tensor(rows, scales.view(torch.float8_e4m3fn), "nvfp4", table_scale=global_scale)
    number = global_scale.float().item()
    for named in ("w.weight_scale_2", number, global_scale):
        table = RowTable.open(tmp_path / "model.safetensors", "w.weight", "w.weight_scale", table_scale=named)
        assert (table.row_format, table.row_dim, table.row_bytes, table.table_scale) == ("nvfp4", D, 90, number)
        again = pickle.loads(pickle.dumps(table))
        assert again.table_scale == number
        for one in (table, again):
            assert same(gather_rows(one, IDS), gather_rows(want, IDS))


def test_mxfp4_and_row_scales_are_found_by_shape(tmp_path):
    rows, scales = stored("mxfp4")
    fp8, of_rows = stored("fp8_e4m3_row")
    save_file({"w": rows, "w_scale": scales, "w8": fp8.view(torch.float8_e4m3fn), "flat": of_rows.flatten(),
               "tall": of_rows.clone()}, tmp_path / "t")
    table = RowTable.open(tmp_path / "t", "w", "w_scale")
    assert (table.row_format, table.row_dim) == ("mxfp4", D)
    assert same(gather_rows(table, IDS), gather_rows(RowTable.from_tensor(rows, scales, "mxfp4"), IDS))
    for name in ("flat", "tall"):
        table = RowTable.open(tmp_path / "t", "w8", name)
        assert table.row_format == "fp8_e4m3_row" and table.scales.shape == (R, 1)
        assert same(gather_rows(table, IDS), gather_rows(RowTable.from_tensor(fp8, of_rows, "fp8_e4m3_row"), IDS))


def test_table_scale_is_asked_for(tmp_path):
    rows, scales = stored("nvfp4")
    save_file({"w": rows, "s": scales.view(torch.float8_e4m3fn), "two": torch.ones(2),
               "number": torch.ones(1, dtype=torch.int32)}, tmp_path / "t")
    for named, message in ((None, "table_scale is None, expected a number"), ("two", "expected one value of F32, BF16"),
                           ("number", "expected one value of F32, BF16"), (float("inf"), "expected a finite float32"),
                           ("none", "it has no tensor 'none'")):
        with pytest.raises(ValueError, match=message):
            RowTable.open(tmp_path / "t", "w", "s", "nvfp4", table_scale=named)
    with pytest.raises(ValueError, match="table_scale is None, expected a number"):
        RowTable.from_tensor(rows, scales, "nvfp4")
    with pytest.raises(ValueError, match="row_format 'mxfp4' has no table_scale, got 2.0"):
        RowTable.from_tensor(rows, stored("mxfp4")[1], "mxfp4", table_scale=2.0)
    with pytest.raises(ValueError, match="row_dim is 24, expected a multiple of 16 for row_format 'nvfp4'"):
        RowTable.from_tensor(rows[:, :12], scales, "nvfp4", table_scale=1.0)


def test_packed_dtypes_are_their_bytes_or_refused_by_name(tmp_path):
    """float4_e2m1fn_x2 holds two e2m1 values per byte, the first in the lower bits, as nvfp4 and mxfp4 do."""
    rows, scales = stored("nvfp4")
    typed, fine = rows.view(torch.float4_e2m1fn_x2), scales.view(torch.float8_e4m3fn)
    want = RowTable.from_tensor(rows, scales, "nvfp4", table_scale=0.3)
    made = [RowTable.from_tensor(typed, fine, "nvfp4", table_scale=0.3),
            RowTable.create(tmp_path / "whole", typed, fine, "nvfp4", table_scale=0.3),
            RowTable.create(tmp_path / "pieces", [(typed[:7], fine[:7]), (typed[7:], fine[7:])], None, "nvfp4", num_rows=R,
                            row_dim=D, table_scale=0.3)]
    save_file({"w": typed, "s": fine}, tmp_path / "f4")  # in files its name is F4 [R, D]
    made.append(RowTable.open(tmp_path / "f4", "w", "s", table_scale=0.3))
    for table in made:
        assert table.row_dim == D and same(gather_rows(table, IDS), gather_rows(want, IDS))
    coarse = stored("mxfp4")
    assert same(gather_rows(RowTable.from_tensor(coarse[0].view(torch.float4_e2m1fn_x2), coarse[1].view(torch.float8_e8m0fnu),
                                                 "mxfp4"), IDS), gather_rows(RowTable.from_tensor(*coarse, "mxfp4"), IDS))
    with pytest.raises(ValueError, match="weight is torch.float4_e2m1fn_x2, expected torch.bfloat16 .*; pass row_format='nvfp4'"):
        RowTable.from_tensor(typed)
    with pytest.raises(ValueError, match="weight is torch.float8_e4m3fn, expected torch.float4_e2m1fn_x2 for row_format 'nvfp4'"):
        RowTable.from_tensor(rows.view(torch.float8_e4m3fn), fine, "nvfp4", table_scale=0.3)
    with pytest.raises(ValueError, match="a piece of rows is torch.float4_e2m1fn_x2, expected torch.float8_e4m3fn"):
        RowTable.create(tmp_path / "x", [typed], None, "fp8_e4m3_block32_packed", num_rows=R, row_dim=64)
    for dtype in ("uint4", "int4", "bits4x2", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        for row_format in ("bf16", "nvfp4", "fp8_e4m3_row", "int8_group32"):
            with pytest.raises(ValueError, match=rf"weight is torch\.{dtype}, expected .*; (no row format has|pass)"):
                RowTable.from_tensor(rows.view(getattr(torch, dtype)), None, row_format)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-50, -1e-50, float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_table_scale_that_can_only_be_a_fault_is_refused(value, tmp_path):
    """Wherever it comes from, so that no backend meets one; also 1e-50, which rounds to 0. Below 0 it is a scale like others."""
    rows, scales = stored("nvfp4")
    save_file({"w": rows, "s": scales.view(torch.float8_e4m3fn), "two": torch.tensor(value).float()}, tmp_path / "t")
    good = RowTable.from_tensor(rows, scales, "nvfp4", table_scale=2.0**-149)
    message = "table_scale is .*, expected a finite float32 that is not 0"
    for make in (lambda: RowTable.from_tensor(rows, scales, "nvfp4", table_scale=value),
                 lambda: RowTable.from_tensor(rows, scales, "nvfp4", table_scale=torch.tensor([value])),
                 lambda: RowTable.create(tmp_path / "c", rows, scales, "nvfp4", table_scale=value),
                 lambda: RowTable.open(tmp_path / "t", "w", "s", "nvfp4", table_scale=value),
                 lambda: RowTable.open(tmp_path / "t", "w", "s", "nvfp4", table_scale="two")):
        with pytest.raises(ValueError, match=message):
            make()
    if abs(value) not in (1e-50, 1e39):  # beside float32, which a table holds
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, table_scale=value)


def test_halves_as_scales_of_pieces(tmp_path):
    rows, scales = stored("fp8_e4m3_row")
    halves = (scales * 0.3).bfloat16()
    want = gather_rows(RowTable.from_tensor(rows, halves, "fp8_e4m3_row"), IDS)
    table = RowTable.create(tmp_path / "t", [(rows[:9], halves[:9]), (rows[9:], halves[9:].flatten())], None, "fp8_e4m3_row",
                            num_rows=R, row_dim=D)
    assert same(gather_rows(table, IDS), want)
