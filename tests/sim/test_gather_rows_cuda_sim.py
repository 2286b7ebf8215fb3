"""gather_rows on the PTX simulator: the launcher and its kernels against the reference, and what they cost."""
import re
from collections import Counter

import numpy as np
import pytest
import torch
from cuda_sim import MISSING_NVCC, MISSING_SASS, Device, LaunchError, build, poisoned
from cuda_sim.params import DTYPES, ROW_FORMATS, GatherRowsParams, RowIds, RowSource
from cuda_sim.sass_path import executed, token_loop
from format_cases import every_byte, table_scale_of

from engram_kernels.reference.gather_rows import gather_rows as reference
from engram_kernels.testing.inputs import random_rows

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP, DIRECT = "gather_rows_cuda", "gather_rows_direct_cuda"  # tiles and by element; what stages nothing
BYTE_FORMATS = tuple(f for f in ROW_FORMATS if f not in ("f32", "bf16", "f16"))


MANY = 65  # ids: more than a multiprocessor holds warps
WAYS = {"warp_per_row": 132, "tiles": 1}  # multiprocessors: a batch of MANY ids is small, or not


@pytest.fixture(params=WAYS)
def device(request):
    """One on which MANY ids or more go the way that is the fixture's parameter, where rows are aligned for it."""
    device = Device(multiprocessors=WAYS[request.param])
    yield device
    for launch in device.launches:
        long_rows = launch.shared_bytes == 0 and request.node.callspec.params.get("row_dim", 0) >= 4096
        assert "warp_per_row" not in launch.kernel or request.param == "warp_per_row" or long_rows, launch.kernel


def of_both(of_op):
    return of_op(OP) | of_op(DIRECT)


def bytes_of(x):
    """[R, bytes] uint8 of a contiguous table."""
    return x.contiguous().view(torch.uint8).reshape(len(x), x.shape[1] * x.element_size())


def random_ids(count, num_rows, seed=0, none=0.1, dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(num_rows, 1), (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < none, -1, ids).to(dtype)


def simulate(rows, scales, ids, row_format, row_dim, out_dtype=torch.bfloat16, zero_scale=False, pitch=None, lead=0,
             as_stored=False, max_blocks=0, device=None, shift_rows=0, out_lead=0):
    """(output rows, errors counted, launches). pitch: bytes between rows; lead: bytes before the first."""
    device = device or Device()
    raw = bytes_of(rows)
    pitch = pitch or raw.shape[1]
    table = np.full(lead + max(len(raw), 1) * pitch, 0xFF, np.uint8)
    table[lead:lead + len(raw) * pitch].reshape(len(raw), pitch)[:, :raw.shape[1]] = raw.numpy()
    table = table[:lead + (len(raw) - 1) * pitch + raw.shape[1]] if len(raw) else table[:0]  # nothing behind the last row
    out = poisoned((len(ids) * (raw.shape[1] if as_stored else row_dim * out_dtype.itemsize) + out_lead,), np.uint8)
    errors, at = np.zeros(1, np.uint32), device.address
    per_row = scales is not None and row_format != "fp8_e4m3_tensor"
    source = RowSource(
        rows=at(table, "rows", readonly=True) + lead - shift_rows * pitch, scales=at(scales, "scales", readonly=True),
        num_rows=len(raw) + shift_rows, row_stride_bytes=pitch,
        scale_stride_bytes=bytes_of(scales).shape[1] if per_row else 0, row_dim=row_dim, format=ROW_FORMATS.index(row_format),
        zero_scale_is_zero=zero_scale, table_scale=table_scale_of(row_format))
    params = GatherRowsParams(
        source=source, row_ids=RowIds(at(ids, "ids", readonly=True), len(ids), ids.dtype == torch.int64),
        out=at(out, "out") + out_lead, out_dtype=DTYPES[out_dtype], as_stored=as_stored, max_blocks=max_blocks,
        error_count=at(errors, "errors"))
    launches = device.run(OP, params)
    got = torch.from_numpy(out[out_lead:].copy())
    if not len(ids):
        return torch.empty(0, row_dim, dtype=out_dtype), int(errors[0]), launches
    got = got.reshape(len(ids), -1) if as_stored else got.view(out_dtype).reshape(len(ids), row_dim)
    return got, int(errors[0]), launches


def check(rows, scales, ids, row_format, row_dim, out_dtype=torch.bfloat16, zero_scale=False, **how):
    got, errors, launches = simulate(rows, scales, ids, row_format, row_dim, out_dtype, zero_scale, **how)
    want = reference(rows, scales, ids, row_format, row_dim, zero_scale, out_dtype, table_scale_of(row_format))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(got) & ~got.isnan(), torch.signbit(want) & ~want.isnan())  # -0 is not 0
    assert errors == 0
    return launches


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gather_rows_matches_reference(row_format, out_dtype, device):
    for row_dim, count, options in ((256, 133, {"cta_order": "random"}), (64, MANY, {}), (32, 130, {})):
        rows, scales = random_rows(row_format, 50, row_dim, torch.Generator().manual_seed(1))
        device.options = options
        for dtype in (torch.int32, torch.int64):
            launches = check(rows, scales, random_ids(count, 50, dtype=dtype), row_format, row_dim, out_dtype, device=device)
            if row_format.endswith("packed") and row_dim < 128:
                continue  # rows of 33 or 66 bytes are not aligned
            assert ("warp_per_row" in launches[0].kernel) == (device.multiprocessors == WAYS["warp_per_row"])
            assert "by_element" not in launches[0].kernel


@pytest.mark.parametrize("row_format", BYTE_FORMATS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row_dim", [256, 32])
def test_gather_rows_every_byte(row_format, out_dtype, row_dim, device):
    rows, scales = every_byte(row_format, row_dim)
    ids = torch.arange(len(rows)).repeat(-(-MANY // len(rows)))
    for zero_scale in (False, True):
        check(rows, scales, ids, row_format, row_dim, out_dtype, zero_scale, device=device)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_gather_rows_one_row(row_format):
    rows, scales = random_rows(row_format, 1, 32, torch.Generator().manual_seed(1))
    launches = check(rows, scales, torch.tensor([0]), row_format, 32)
    assert launches[0].grid == (1, 1, 1)


@pytest.mark.parametrize("row_format", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gather_rows_special_floats(row_format, out_dtype, device):
    values = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504, 65520, 1e-7, -6e-8, 3e38, 1e-45,
                           1.00390625])
    rows = values.repeat(8).reshape(2, 48).to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[row_format])
    check(rows, None, torch.tensor([0, 1, -1]).repeat(MANY), row_format, 48, out_dtype, device=device)


def test_gather_rows_every_bf16_is_copied_bit_for_bit(device):
    rows = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    got = simulate(rows, None, torch.arange(256), "bf16", 256, device=device)[0]
    assert torch.equal(got.view(torch.int16), rows.view(torch.int16))


STRIDES = {"dense": (264, 0), "padded_288": (288, 0), "padded_320": (320, 0), "odd_start": (264, 8), "by_words": (268, 4),
           "by_bytes": (265, 1)}


@pytest.mark.parametrize("pitch, lead", STRIDES.values(), ids=STRIDES.keys())
def test_gather_rows_packed_strides(pitch, lead, device):
    rows, _ = random_rows("fp8_e4m3_block32_packed", 40, 256, torch.Generator().manual_seed(2))
    ids = random_ids(77, 40, seed=3)
    check(rows, None, ids, "fp8_e4m3_block32_packed", 256, pitch=pitch, lead=lead, device=device)
    got, errors, _ = simulate(rows, None, ids, "fp8_e4m3_block32_packed", 256, pitch=pitch, lead=lead, as_stored=True,
                              device=device)
    assert torch.equal(got, torch.where(ids[:, None] < 0, 0, rows[ids.long()])) and errors == 0


SHAPES = {  # name: (row_format, row_dim)
    "odd_bf16": ("bf16", 33), "one_element": ("f32", 1), "odd_fp8": ("fp8_e4m3_tensor", 65), "long_f32": ("f32", 5120),
    "long_packed": ("fp8_e4m3_block32_packed", 4096), "ple_bf16": ("bf16", 160), "ple_int8": ("int8_group32", 160),
    "one_word": ("fp8_e4m3_tensor", 4), "longest_staged": ("bf16", 1024),
    "ple_nvfp4": ("nvfp4", 160), "one_block_nvfp4": ("nvfp4", 16), "long_nvfp4": ("nvfp4", 8192), "ple_mxfp4": ("mxfp4", 160),
    "ple_row": ("fp8_e4m3_row", 160), "odd_row": ("fp8_e4m3_row", 65)}


@pytest.mark.parametrize("row_format, row_dim", SHAPES.values(), ids=SHAPES.keys())
def test_gather_rows_any_shape(row_format, row_dim, device):
    rows, scales = random_rows(row_format, 20, row_dim, torch.Generator().manual_seed(4))
    ids = random_ids(MANY, 20, seed=5)
    for out_dtype in DTYPES:
        launch, = check(rows, scales, ids, row_format, row_dim, out_dtype, device=device)
        if row_dim >= 4096:  # too long for a tile, but aligned
            assert "warp_per_row" in launch.kernel
    check(rows, scales, ids, row_format, row_dim, out_lead=2, device=device)


def test_gather_rows_no_ids_and_no_rows():
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    got, _, launches = simulate(rows, None, torch.zeros(0, dtype=torch.int32), "bf16", 64)
    assert got.shape == (0, 64) and launches == []
    got, errors, _ = simulate(rows[:0], None, torch.tensor([-1, 0, -1]), "bf16", 64)
    assert (got == 0).all() and errors == 1


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("row_dim", [256, 4096], ids=["short", "long"])
def test_gather_rows_bad_ids_give_zeros_and_are_counted(row_format, row_dim, device):
    """-1 reads nothing, and neither does what is out of range: the table has no byte before its first row or behind its last."""
    rows, scales = random_rows(row_format, 3, row_dim, torch.Generator().manual_seed(6))
    if row_format == "fp8_e4m3_tensor":
        scales = torch.tensor([float("nan")])  # must not reach the zeros
    ids = torch.tensor([-1, 3, -2, 2, 2**31 - 1, -2**31, 0], dtype=torch.int64)
    for wide in ([], [2**62, -2**63, 2**40]):
        bad = torch.cat([ids, torch.tensor(wide, dtype=torch.int64)]).repeat(10)
        got, errors, _ = simulate(rows, scales, bad, row_format, row_dim, device=device)
        good = torch.where((bad >= 0) & (bad < 3), bad, -1)
        want = reference(rows, scales, good, row_format, row_dim, False, torch.bfloat16, table_scale_of(row_format))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert errors == 10 * (4 + len(wide))


def test_gather_rows_of_no_ids_at_all_reads_no_row(device):
    rows, _ = random_rows("fp8_e4m3_block32_packed", 3, 256, torch.Generator().manual_seed(6))
    result = simulate(rows, None, torch.full((99,), -1), "fp8_e4m3_block32_packed", 256, device=device)[2][0].result
    assert "rows" not in result.buffers


@pytest.mark.parametrize("row_format", ["bf16", "fp8_e4m3_block32_packed"])
def test_gather_rows_far_behind_four_gib(row_format, device):
    rows, _ = random_rows(row_format, 50, 256, torch.Generator().manual_seed(7))
    shift = 9 * 2**30 // bytes_of(rows).shape[1]
    ids = random_ids(MANY, 50, seed=8, none=0)
    got, errors, _ = simulate(rows, None, ids + shift, row_format, 256, shift_rows=shift, device=device)
    assert torch.equal(got, reference(rows, None, ids, row_format, 256, False, torch.bfloat16)) and errors == 0


def test_gather_rows_in_the_background_uses_few_blocks(device):
    for as_stored in (False, True):
        row_format = "fp8_e4m3_block32_packed" if as_stored else "bf16"
        rows, _ = random_rows(row_format, 50, 256, torch.Generator().manual_seed(9))
        ids = random_ids(500, 50, seed=10)
        got, _, launches = simulate(rows, None, ids, row_format, 256, max_blocks=3, as_stored=as_stored, device=device)
        assert launches[0].grid == (3, 1, 1)
        assert "warp_per_row" not in launches[0].kernel  # a row per warp would keep few rows in flight
        want = torch.where(ids[:, None] < 0, 0, rows[ids.long()])
        assert torch.equal(got, want)


def test_gather_rows_rejects():
    rows = torch.zeros(3, 64, dtype=torch.bfloat16)
    with pytest.raises(LaunchError, match="only packed rows"):
        simulate(rows, None, torch.tensor([0]), "bf16", 64, as_stored=True)
    with pytest.raises(LaunchError, match="max_blocks is -1"):
        simulate(rows, None, torch.tensor([0]), "bf16", 64, max_blocks=-1)


# ---- what it costs ---------------------------------------------------------------------------------------------------

COSTS = {  # name: (row_format, row_dim, stored in the output as they are)
    "256_bytes": ("fp8_e4m3_tensor", 256, False),
    "512_bytes": ("bf16", 256, False),
    "264_bytes": ("fp8_e4m3_block32_packed", 256, False),
    "264_bytes_as_stored": ("fp8_e4m3_block32_packed", 256, True),
}
NUM_ROWS = 960


def cost_of(row_format, row_dim, as_stored, multiprocessors):
    """(launch, bytes of a row, bytes of an output row) for distinct rows in random order."""
    rows, scales = random_rows(row_format, NUM_ROWS, row_dim, torch.Generator().manual_seed(11))
    ids = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(12)).to(torch.int32)
    launch = simulate(rows, scales, ids, row_format, row_dim, as_stored=as_stored, device=Device(multiprocessors))[2][0]
    row_bytes = bytes_of(rows).shape[1]
    return launch, row_bytes, row_bytes if as_stored else 2 * row_dim


@pytest.fixture(scope="module", params=COSTS.values(), ids=COSTS.keys())
def cost(request):
    """Cost of a large batch."""
    return cost_of(*request.param, multiprocessors=1)


@pytest.fixture(scope="module", params=COSTS.values(), ids=COSTS.keys())
def small_batch_cost(request):
    return cost_of(*request.param, multiprocessors=132)


def lines(launch, space, kind):
    return [line for line in launch.result.lines if (line["space"], line["kind"]) == (space, kind)]


def row_loads(launch):
    return [line for line in lines(launch, "global", "load") if "cp.async" in line["text"] or "v2.b32" in line["text"]]


def is_direct(launch):
    """Rows go through registers; their scales are loads of their own, of sectors that the row has touched."""
    return "gather_rows_direct" in launch.kernel


def test_gather_rows_reads_each_sector_once(cost):
    launch, row_bytes, _ = cost
    read = launch.result.buffers["rows"]
    assert read["unique_bytes_read"] == NUM_ROWS * row_bytes
    assert read["load_bytes"] == NUM_ROWS * (row_bytes + (8 * 3 if is_direct(launch) else 0))  # a scale is read by four lanes
    # 264-byte rows share their first and last sectors with their neighbours: 9 sectors per row are the least
    least = NUM_ROWS * (9 if row_bytes == 264 else row_bytes // 32)
    assert read["load_sectors"] <= 1.02 * least + (NUM_ROWS * 1.25 if is_direct(launch) else 0)


def test_gather_rows_small_batch_reads_and_writes_each_sector_once(small_batch_cost):
    launch, row_bytes, out_bytes = small_batch_cost
    read, written = launch.result.buffers["rows"], launch.result.buffers["out"]
    assert "warp_per_row" in launch.kernel
    # the scale byte behind the values is a load of its own, of a sector that the row has touched
    scale_reads = 8 * 4 if row_bytes == 264 and out_bytes == 512 else 0
    assert read["unique_bytes_read"] == NUM_ROWS * row_bytes and read["load_bytes"] <= NUM_ROWS * (row_bytes + scale_reads)
    assert written["store_bytes"] == written["unique_bytes_written"] == NUM_ROWS * out_bytes
    # 33 slots of 8 bytes are 32 and one: 9 sectors, and one of them again
    assert written["store_sectors"] <= (NUM_ROWS * 10 if out_bytes == 264 else 1.02 * written["unique_sectors_written"])


def test_gather_rows_writes_once_and_coalesced(cost):
    launch, _, out_bytes = cost
    written = launch.result.buffers["out"]
    assert written["store_bytes"] == written["unique_bytes_written"] == NUM_ROWS * out_bytes
    assert written["store_sectors"] <= 1.02 * written["unique_sectors_written"]
    assert all(line["bytes"] == 16 * line["threads"] for line in lines(launch, "global", "store"))


def test_gather_rows_loads_are_wide_and_many(cost):
    launch, row_bytes, _ = cost
    loads = row_loads(launch)
    width = 8 if row_bytes == 264 else 16
    assert {line["bytes"] // line["threads"] for line in loads} == {width}
    # nothing waits before the last one of a tile, or of a warp's rows, is issued
    assert sum(line["threads"] for line in loads) / (launch.grid[0] * launch.block[0]) >= (7.5 if is_direct(launch) else 8)
    tile_bytes = NUM_ROWS * row_bytes / np.prod(launch.grid)
    usage = of_both(build().usage)[launch.kernel]
    threads = launch.block[0]
    resident = min(65536 // (usage.registers * threads), 2048 // threads, 32, 227 * 1024 // (launch.shared_bytes + 1024))
    assert resident * tile_bytes * 132 >= 2e6


def test_gather_rows_bank_conflicts(cost):
    for kind in ("load", "store"):
        shared = cost[0].result.memory.get(f"shared.{kind}")
        assert shared is None or shared["waves"] <= 1.1 * shared["ideal_waves"]


def test_gather_rows_uses_no_local_memory():
    for usage in of_both(build().usage).values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= 64


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
def test_gather_rows_machine_code():
    for code in of_both(build().sass).values():
        assert not [op for _, _, op, _ in code if re.match(r"CALL|LDL|STL", op)]


EXECUTED = {  # name: (row_format, stored in the output as they are, 128-byte lines of a row, 16-byte vectors of an output row,
    # instructions per row: of this kernel at most, of the best peer: SGLang CUDA for copies, vLLM to bf16)
    "packed_as_stored": ("fp8_e4m3_block32_packed", True, 3, 16.5, 395, 472),
    "fp8_tensor_to_bf16": ("fp8_e4m3_tensor", False, 2, 32, 1260, 1752),
    "bf16_to_bf16": ("bf16", False, 4, 32, 350, 472),
}
ROWS_AT_ONCE = 8  # kRowsAtOnce


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
@pytest.mark.parametrize("row_format, as_stored, lines, vectors, most, peer", EXECUTED.values(), ids=EXECUTED.keys())
def test_gather_rows_executes_fewer_machine_instructions_than_peers(row_format, as_stored, lines, vectors, most, peer):
    """Counted for a tile of a large batch of valid ids, set-up included, on the longest way that such a tile can take."""
    rows, scales = random_rows(row_format, 2, 256, torch.Generator().manual_seed(13))
    ids = torch.zeros(512, dtype=torch.int32)
    launch = simulate(rows, scales, ids, row_format, 256, as_stored=as_stored, device=Device(multiprocessors=1))[2][0]
    threads, tile_rows = launch.block[0], len(ids) // launch.grid[0]
    assert tile_rows * launch.grid[0] == len(ids) and tile_rows >= 64
    wide = "LDGSTS.E.64" if row_format.endswith("packed") else "LDGSTS.E.BYPASS.128"
    groups = threads / (16 if wide == "LDGSTS.E.64" else 8)

    def turns(ops):
        count = Counter(ops)
        if "BAR.SYNC.DEFER_BLOCKING" in count:
            return 1  # the loop over tiles
        if any(op.startswith("LDGSTS") for op in ops):  # rows; those of other alignments and lengths are not gone through
            return tile_rows / groups / ROWS_AT_ONCE if count[wide] == ROWS_AT_ONCE * lines else None
        if count["LDG.E.64"] or count["STS"] or (count["STG.E.128"] and not any(op.startswith("LDS") for op in ops)):
            return None  # 64-bit ids; zeros where there is no row
        if count["STS.128"]:
            return tile_rows / threads  # ids
        if count["STG.E.128"] > 1:
            return tile_rows * vectors // threads // count["STG.E.128"]
        return 1  # what is left over, from above

    took = executed(of_both(build().sass)[launch.kernel], turns, lambda op, args: op.startswith("RED")) * threads / tile_rows
    print(f"{took:.0f} machine instructions per row")
    assert peer / 5 < took <= most < peer


@pytest.mark.skipif(bool(MISSING_SASS), reason=MISSING_SASS)
@pytest.mark.parametrize("row_format", ["fp8_e4m3_block32_packed", "fp8_e4m3_block32"])
def test_gather_rows_direct_executes_fewer_machine_instructions_than_tiles(row_format):
    """Of a warp of eight rows, all there, on the longest way through the loop. In tiles 50 per row; the best peer (vLLM) 55."""
    rows, scales = random_rows(row_format, 2, 256, torch.Generator().manual_seed(13))
    ids = torch.zeros(512, dtype=torch.int32)
    launch, = simulate(rows, scales, ids, row_format, 256, device=Device(multiprocessors=1))[2]
    assert is_direct(launch)
    loop = token_loop(of_both(build().sass)[launch.kernel])

    took = executed(loop[:-1], lambda ops: None, lambda op, args: op.startswith("RED")) / 8  # the inner loop: rows not there
    print(f"{took:.1f} machine instructions of a warp per row")
    assert 30 < took <= 42
