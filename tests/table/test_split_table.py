"""Tables with rows in pinned host memory and scales on a GPU: what is refused, and that everything knows where the scales are."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels.prefetch.policy import choose_policy
from engram_kernels.table import reopen, split_table, staging
from engram_kernels.testing import random_rows

CUDA = torch.device("cuda", 0)
APART = ("fp8_e4m3_block32", "int8_group32", "fp8_e4m3_row", "nvfp4", "mxfp4")


def make_table(row_format="fp8_e4m3_block32", num_rows=40, row_dim=64):
    rows, scales = random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(0))
    packed = row_dim if row_format.endswith("packed") else None
    return RowTable.from_tensor(rows, scales, row_format, row_dim=packed, table_scale=0.5 if row_format == "nvfp4" else None)


@pytest.fixture
def pinned(monkeypatch):
    """Every tensor counts as pinned, and the GPU has room."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self, *args: True)
    monkeypatch.setattr(split_table, "check_device_memory", lambda *args: None)


@pytest.fixture
def split(pinned):
    """A table on fake tensors: rows on the CPU, scales on cuda:0, as a machine with a GPU has them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows, scales = torch.zeros(40, 64, dtype=torch.uint8), torch.zeros(40, 2, dtype=torch.uint8)
        yield RowTable.from_tensor(rows, scales, "fp8_e4m3_block32").with_scales_on("cuda:0")


def test_split_table_is_where_its_scales_are(split):
    assert split.rows.device.type == "cpu" and split.scales.device == split.device == CUDA
    assert split.tier == "host" and split.in_memory and repr(split).endswith("tier='host', scales on cuda:0)")
    ids_on_the_host, ids = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32, device=CUDA)
    assert split.device_for(ids) == split.device_for(ids_on_the_host) == CUDA
    with pytest.raises(ValueError, match="gather_rows: row_ids must be on cuda:0, got cpu"):
        gather_rows(split, ids_on_the_host)
    out = torch.ops.engram_kernels.gather_rows.default(split.rows, split.scales, ids, split.row_format, split.row_dim, False,
                                                       torch.bfloat16)
    assert out.device == CUDA and out.shape == (3, 64) and out.dtype == torch.bfloat16


def test_split_table_is_read_by_uva_alone(split):
    assert choose_policy("auto", split, CUDA, None).name == "uva"
    assert "the table's scales are on cuda:0; distinct rows alone" in choose_policy("auto", split, CUDA, None).reason
    assert choose_policy("uva", split, CUDA, None).name == "uva"
    for policy in ("staged", "device"):
        with pytest.raises(ValueError, match=f"policy '{policy}' cannot read a table of tier 'host' with scales on cuda:0 for "
                                             "cuda:0; expected uva or uva_distinct"):
            choose_policy(policy, split, CUDA, None)
    with pytest.raises(ValueError, match="the table's scales are on cuda:0, expected device to be that, got cpu"):
        RowPrefetcher(split)


def test_split_table_gives_its_rows_back_on_the_host(pinned, monkeypatch):
    """What leaves the process has its scales beside the rows."""
    monkeypatch.setattr(staging, "check_row_ids", lambda *args, **options: None)  # which looks at data
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = RowTable.from_tensor(torch.zeros(40, 64, dtype=torch.uint8), torch.zeros(40, 2, dtype=torch.uint8),
                                    "fp8_e4m3_block32").with_scales_on("cuda:0")
        rows, scales = fake.read_rows(torch.tensor([3, 4]))
        assert rows.device.type == scales.device.type == "cpu" and scales.shape == (2, 2)
        assert reopen._contents(fake)[1].device.type == "cpu"  # what pickle and copy take of a table with memory of its own


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor"])
def test_split_table_wants_scales_that_lie_apart(row_format, pinned):
    with pytest.raises(ValueError, match=f"rows of format '{row_format}' have no scales that lie apart, expected one of "
                                         + ", ".join(APART)):
        make_table(row_format).with_scales_on("cuda:0")


def test_split_table_wants_pinned_rows_in_host_memory_and_a_gpu(tmp_path):
    table = make_table()
    with pytest.raises(ValueError, match=r"the rows are not pinned, so no GPU can read them: call table.pin\(\) first"):
        table.with_scales_on("cuda:0")
    with pytest.raises(ValueError, match="device is cpu, expected a GPU"):
        table.with_scales_on("cpu")
    file = RowTable.create(tmp_path / "t", table.rows, table.scales, table.row_format)
    with pytest.raises(ValueError, match="the rows are of tier 'file', expected rows in host memory"):
        file.with_scales_on("cuda:0")
    with pytest.raises(ValueError, match="scales must be on cpu, got meta"):
        RowTable.from_tensor(table.rows, table.scales.to("meta"), table.row_format)
