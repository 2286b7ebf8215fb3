"""place_rows, which puts staged rows into a device's row cache, on the PTX simulator: against numpy, and what it costs."""
import numpy as np
import pytest
import torch
from cuda_sim import MISSING_NVCC, Device, LaunchError, build
from cuda_sim.params import PlaceRowsParams

pytestmark = pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
OP = "place_rows_cuda"


def random_bytes(num_rows, row_bytes, lead=0):
    data = torch.randint(0, 256, (lead + num_rows * row_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return data.numpy()


def random_places(count, num_staged, num_rows, seed=0):
    """[count, 2] int32: distinct staged rows to distinct rows behind them."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(num_staged)[:count], num_staged + rng.permutation(num_rows - num_staged)[:count]],
                    1).astype(np.int32)


def simulate(rows, scales, row_bytes, scale_bytes, places, num_rows, lead=0, max_blocks=0, device=None):
    """Launches; `rows` and `scales` are changed."""
    device = device or Device()
    at = device.address
    params = PlaceRowsParams(
        rows=at(rows, "rows") + lead, scales=at(scales, "scales"), row_bytes=row_bytes, scale_bytes=scale_bytes,
        num_rows=num_rows, places=at(places, "places", readonly=True), count=len(places), max_blocks=max_blocks)
    return device.run(OP, params)


def expected(rows, row_bytes, places, lead=0):
    want = rows.copy()
    view = want[lead:].reshape(-1, row_bytes)
    view[places[:, 1]] = view[places[:, 0]]
    return want


CASES = {  # name: (row_bytes, scale_bytes, places, lead, multiprocessors)
    "packed": (264, 0, 70, 0, 132),
    "packed_many_places": (264, 0, 70, 0, 1),
    "block32": (256, 8, 67, 0, 132),
    "block32_many_places": (256, 8, 131, 0, 1),
    "int8_group32": (160, 20, 65, 0, 1),
    "one_place": (512, 0, 1, 0, 132),
    "odd_bytes": (33, 1, 75, 0, 1),
    "by_words": (264, 0, 66, 4, 1),
    "by_two": (66, 2, 70, 2, 1),
    "one_byte": (1, 0, 300, 0, 1),
    "one_vector": (16, 0, 90, 0, 1),
    "long_rows": (20480, 0, 3, 0, 1),
    "too_long_for_several_a_warp": (4100 * 4, 0, 70, 4, 1),
}


@pytest.mark.parametrize("row_bytes, scale_bytes, count, lead, multiprocessors", CASES.values(), ids=CASES.keys())
def test_place_rows_moves_rows_and_scales(row_bytes, scale_bytes, count, lead, multiprocessors):
    num_staged, num_rows = count + 5, 2 * count + 20
    places = random_places(count, num_staged, num_rows)
    rows, scales = random_bytes(num_rows, row_bytes, lead), random_bytes(num_rows, scale_bytes) if scale_bytes else None
    want = expected(rows, row_bytes, places, lead), expected(scales, scale_bytes, places) if scale_bytes else None
    launch, = simulate(rows, scales, row_bytes, scale_bytes, places, num_rows, lead,
                       device=Device(multiprocessors, options={"cta_order": "random"}))
    np.testing.assert_array_equal(rows, want[0])
    if scale_bytes:
        np.testing.assert_array_equal(scales, want[1])
    widths = {line["bytes"] // line["threads"] for line in launch.result.lines if line["kind"] == "store"}
    assert widths == {min(n & -n, 16) for n in ((row_bytes | lead), scale_bytes) if n}


def test_place_rows_leaves_out_places_outside():
    """No byte lies before the first row or behind the last."""
    rows = random_bytes(10, 264)
    places = np.array([[0, 10], [1, 5], [-1, 6], [2, -1], [10, 7], [3, 2**31 - 1], [-2**31, 8], [4, 9]], np.int32)
    want = expected(rows, 264, places[[1, 7]])
    simulate(rows, None, 264, 0, places, 10)
    np.testing.assert_array_equal(rows, want)


def test_place_rows_far_behind_four_gib():
    shift = 9 * 2**30 // 264
    rows = random_bytes(20, 264)
    places = random_places(6, 8, 20)
    want = expected(rows, 264, places)
    simulate(rows, None, 264, 0, places + np.int32(shift), 20 + shift, lead=-shift * 264)
    np.testing.assert_array_equal(rows, want)


def test_place_rows_in_the_background_and_of_nothing():
    rows, places = random_bytes(500, 264), random_places(200, 220, 500)
    want = expected(rows, 264, places)
    launch, = simulate(rows, None, 264, 0, places, 500, max_blocks=3)
    assert launch.grid == (3, 1, 1)
    np.testing.assert_array_equal(rows, want)
    assert simulate(rows, None, 264, 0, places[:0], 500) == []


def test_place_rows_rejects():
    rows, places = random_bytes(4, 8), random_places(1, 2, 4)
    with pytest.raises(LaunchError, match="rows have 0 bytes"):
        simulate(rows, None, 0, 0, places, 4)
    with pytest.raises(LaunchError, match="an array is missing"):
        simulate(rows, None, 8, 4, places, 4)
    with pytest.raises(LaunchError, match="max_blocks is -1"):
        simulate(rows, None, 8, 0, places, 4, max_blocks=-1)


COSTS = {"256_bytes": (256, 8), "512_bytes": (512, 0), "264_bytes": (264, 0)}


@pytest.mark.parametrize("row_bytes, scale_bytes", COSTS.values(), ids=COSTS.keys())
@pytest.mark.parametrize("multiprocessors", [132, 1], ids=["small", "large"])
def test_place_rows_reads_and_writes_each_sector_once(row_bytes, scale_bytes, multiprocessors):
    count, num_rows = 480, 1000
    places = random_places(count, 490, num_rows)
    rows, scales = random_bytes(num_rows, row_bytes), random_bytes(num_rows, scale_bytes) if scale_bytes else None
    launch, = simulate(rows, scales, row_bytes, scale_bytes, places, num_rows, device=Device(multiprocessors))
    moved = launch.result.buffers["rows"]
    assert moved["load_bytes"] == moved["store_bytes"] == moved["unique_bytes_written"] == count * row_bytes
    # 264-byte rows share their first and last sectors with their neighbours: 9 sectors per row are the least; 33 vectors of 8
    # bytes are a warp and one more, which touches the last sector, or the first of the next row, again
    sectors = count * (row_bytes // 32 if row_bytes % 32 == 0 else 9)
    again = count if row_bytes == 264 else 0
    assert moved["load_sectors"] <= 1.02 * sectors + again and moved["store_sectors"] <= 1.02 * sectors + again
    if scale_bytes:
        assert launch.result.buffers["scales"]["load_bytes"] == count * scale_bytes
    wide = 16 if row_bytes % 16 == 0 else 8
    of_rows = [line for line in launch.result.lines if line["kind"] == "store" and line["bytes"] == wide * line["threads"]]
    assert sum(line["bytes"] for line in of_rows) >= count * row_bytes


def test_place_rows_uses_no_local_memory():
    for usage in build().usage(OP).values():
        assert (usage.stack_bytes, usage.spill_bytes) == (0, 0) and usage.registers <= 64
