"""Four-bit rows and scales per row in files, as published editions name and shape them."""
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
