"""RowTable.quantize: nearest values, scales, pieces, the report, bad input; and the command."""
import numpy as np
import pytest
import torch
from format_cases import E2M1, e4m3_values

from engram_kernels import RowTable, gather_rows
from engram_kernels.cli.main import main
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.table import quantize as module
from engram_kernels.table.quantize import FORMATS, encode

E4M3 = e4m3_values(np.arange(256))
LEVELS = {4: E2M1, 8: E4M3[np.isfinite(E4M3)]}


def trained(num_rows=60, row_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, row_dim, generator=generator) * torch.rand(num_rows, 1, generator=generator) * 3
    return rows.to(dtype)


def table_of(rows):
    return RowTable.from_tensor(rows, row_format={torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[rows.dtype])


def decoded(table):
    return gather_rows(table, torch.arange(table.num_rows), torch.float32, backend="reference")


def unit_scales(table):
    """float64 [R, D]: what one unit of a stored value is worth."""
    ones = table.rows.clone()
    one = {4: 0x22, 8: 0x38}[4 if ROW_FORMATS[table.row_format].per_stored == 2 else 8]
    ones[:, :table.row_dim // ROW_FORMATS[table.row_format].per_stored] = 1 if table.row_format == "int8_group32" else one
    scale = {"table_scale": table.table_scale} if table.row_format == "nvfp4" else {}
    return decoded(RowTable.from_tensor(ones, table.scales, table.row_format, row_dim=table.row_dim, **scale)).double()


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_takes_the_nearest_value(row_format, dtype):
    rows = trained(dtype=dtype)
    rows[3], rows[4, :32] = 0, 0
    table, report = table_of(rows).quantize(row_format)
    levels = np.arange(-127, 128) if row_format == "int8_group32" else LEVELS[4 if ROW_FORMATS[row_format].per_stored == 2 else 8]
    unit = unit_scales(table)
    got = (decoded(table).double() - rows.double()).abs()
    best = (rows.double()[..., None] - torch.from_numpy(levels.astype(np.float64)) * unit[..., None]).abs().amin(-1)
    assert (got <= best + 2**-23 * rows.double().abs()).all()  # the decoded value itself is rounded to float32
    assert not decoded(table)[3].any() and table.num_rows == 60 and table.row_format == row_format
    assert report.row_bytes == table.row_bytes and report.num_rows == 60


@pytest.mark.parametrize("row_format", FORMATS)
def test_quantize_reports_the_errors_of_rows(row_format):
    rows = trained()
    rows[7] = 0
    table, report = table_of(rows).quantize(row_format)
    off, exact = decoded(table).double() - rows.double(), rows.double()
    keep = torch.arange(60) != 7
    rms, most = torch.zeros(60, dtype=torch.float64), torch.zeros(60, dtype=torch.float64)
    rms[keep] = (off.norm(dim=1) / exact.norm(dim=1))[keep]
    most[keep] = (off.abs().amax(1) / exact.abs().amax(1))[keep]
    for errors, median, worst, row in ((rms, report.rms_median, report.rms_worst, report.rms_worst_row),
                                       (most, report.max_median, report.max_worst, report.max_worst_row)):
        assert (median, worst, row) == (errors.median().item(), errors.max().item(), int(errors.argmax()))
    assert f"row {report.rms_worst_row}" in str(report) and 0 < report.rms_median < 0.2


def test_quantize_fp8_is_the_cast_of_torch():
    every = torch.arange(-448, 448, 1 / 64)
    rows = torch.cat([every, torch.full((-len(every) % 31,), 1.0)]).view(-1, 31)
    rows = torch.cat([rows, torch.full((len(rows), 1), 448.0)], 1)  # so that every scale is 1
    want = rows.to(torch.float8_e4m3fn).view(torch.uint8)
    for row_format in ("fp8_e4m3_block32", "fp8_e4m3_row", "fp8_e4m3_tensor"):
        assert torch.equal(encode(rows, row_format, 1.0)[0], want), row_format
    small = torch.arange(-600, 600) * 2.0**-15  # subnormals of e4m3 and their ties
    rows = torch.cat([small.view(-1, 30), torch.full((40, 2), 448.0)], 1)
    assert torch.equal(encode(rows, "fp8_e4m3_block32")[0], rows.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("row_format", ["mxfp4", "nvfp4"])
def test_quantize_e2m1_ties_go_to_even(row_format):
    fine = torch.arange(-6 * 256, 6 * 256 + 1) / 256
    block = ROW_FORMATS[row_format].block
    rows = torch.cat([fine, torch.zeros(-len(fine) % (block - 1))]).view(-1, block - 1)
    rows = torch.cat([rows, torch.full((len(rows), 1), 6.0)], 1)
    got, _ = encode(rows, row_format, 1.0)
    codes = torch.stack([got & 15, got >> 4], -1).flatten(1)
    for value, code in zip(rows.flatten().tolist(), codes.flatten().tolist(), strict=True):
        distances = np.abs(abs(value) - E2M1[:8])
        nearest = np.flatnonzero(distances == distances.min())
        assert code & 7 == (nearest[0] if len(nearest) == 1 else next(k for k in nearest if k % 2 == 0)), value
        assert code >> 3 == (value < 0 or np.signbit(value))


@pytest.mark.parametrize("row_format", FORMATS)
def test_quantize_in_pieces_from_a_file(row_format, tmp_path, monkeypatch):
    rows = trained(dtype=torch.bfloat16)
    whole, report = table_of(rows).quantize(row_format)
    monkeypatch.setattr(module, "_PIECE_VALUES", 7 * 64)
    source = RowTable.create(tmp_path / "source", rows)
    table, same = source.quantize(row_format, tmp_path / "target")
    got = table.read_rows(torch.arange(60))
    assert table.tier == "file" and table.table_scale == whole.table_scale and same == report
    assert torch.equal(got[0], whole.rows) and (whole.scales is None or torch.equal(got[1], whole.scales))
    assert torch.equal(gather_rows(table, torch.tensor([5, -1])), gather_rows(whole, torch.tensor([5, -1])))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("size", [1e-37, 3e38, torch.finfo(torch.float32).max, 2.0**-149], ids=str)
def test_quantize_extreme_rows_stay_finite(row_format, size):
    rows = trained(6).clamp(-1, 1) * size
    table, report = table_of(rows).quantize(row_format)
    assert decoded(table).isfinite().all() and report.max_worst <= 1


def test_quantize_no_rows(tmp_path):
    for row_format in FORMATS:
        table, report = table_of(torch.empty(0, 64)).quantize(row_format)
        assert table.num_rows == 0 and report.rms_worst_row == -1
        assert table_of(torch.empty(0, 64)).quantize(row_format, tmp_path / "t")[0].num_rows == 0


BAD = {
    "nan": (lambda rows: rows[41].__setitem__(5, float("nan")), "nvfp4", "element 5 of row 41 is nan"),
    "inf": (lambda rows: rows[59].__setitem__(0, float("-inf")), "int8_group32", "element 0 of row 59 is -inf"),
    "float": (lambda rows: None, "bf16", "row_format is 'bf16', expected one of fp8_e4m3_block32, "),
    "unknown": (lambda rows: None, "fp9", "row_format is 'fp9'"),
}


@pytest.mark.parametrize("damage, row_format, message", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("to_file", [False, True])
def test_quantize_rejects(damage, row_format, message, to_file, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_VALUES", 7 * 64)
    rows = trained()
    damage(rows)
    with pytest.raises(ValueError, match=f"RowTable.quantize: {message}"):
        table_of(rows).quantize(row_format, tmp_path / "t" if to_file else None)
    assert not list(tmp_path.iterdir())


def test_quantize_rejects_rows_that_do_not_fit():
    with pytest.raises(ValueError, match="row_dim is 40, expected a multiple of 16 for row_format 'nvfp4'"):
        table_of(trained(row_dim=40)).quantize("nvfp4")
    table, _ = table_of(trained()).quantize("fp8_e4m3_row")
    with pytest.raises(ValueError, match="the table is 'fp8_e4m3_row'; only f32, bf16 and f16"):
        table.quantize("nvfp4")


def test_quantize_command(tmp_path, capsys):
    RowTable.create(tmp_path / "source", trained(), row_format="f32")
    arguments = ["quantize", str(tmp_path / "source"), str(tmp_path / "target"), "--row-format", "nvfp4"]
    assert main(arguments) == 0
    assert "60 rows of 36 bytes as nvfp4; relative error of a row: rms" in capsys.readouterr().out
    assert RowTable.open(tmp_path / "target").row_format == "nvfp4"
    assert main(arguments) != 0 and "the target exists already" in capsys.readouterr().err
