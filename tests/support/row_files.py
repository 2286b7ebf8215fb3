"""Files of random rows, for the tests of the file tier."""
import os

import numpy as np
from io_faults import inject_faults

from engram_kernels._library import COMPILE_ERROR

if not COMPILE_ERROR:
    from engram_kernels import _C

PAGE = 4096
IO = ("io_uring", "preadv", "io_uring_buffered", "preadv_buffered")


def open_reader(path, queue_depth=64, io="auto"):
    fd = os.open(path, os.O_RDONLY)
    try:
        return _C.FileReader(fd, str(path), queue_depth, io)
    finally:
        os.close(fd)


class File:
    """A file of random rows at any offset and stride, and the same rows in memory."""

    def __init__(self, path, num_rows=3000, row_bytes=264, stride=None, offset=77, scale_bytes=0, seed=0):
        stride = stride or row_bytes
        rng = np.random.default_rng(seed)
        data = rng.integers(0, 256, offset + num_rows * (stride + scale_bytes), dtype=np.uint8)
        path.write_bytes(data.tobytes())
        self.path, self.num_rows, self.size = path, num_rows, data.size
        self.extent = (offset, stride, row_bytes, num_rows)
        self.rows = np.ascontiguousarray(data[offset:offset + num_rows * stride].reshape(num_rows, stride)[:, :row_bytes])
        scales = data[offset + num_rows * stride:]
        self.scale_extent = (offset + num_rows * stride, scale_bytes, scale_bytes, num_rows if scale_bytes else 0)
        self.scales = scales.reshape(num_rows, scale_bytes)

    def tier(self, io, queue_depth=64, cache_bytes=0, **faults):
        reader = open_reader(self.path, queue_depth, io)
        if faults:
            inject_faults(reader, **faults)
        return reader.tier(self.extent, self.scale_extent, cache_bytes)

    def fetch(self, tier, ids, cancelled=None):
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        rows = np.full((ids.size, self.rows.shape[1]), 0xA5, np.uint8)
        scales = np.full((ids.size, self.scales.shape[1]), 0xA5, np.uint8)
        tier.fetch(ids, rows, scales if scales.shape[1] else None, cancelled)
        return rows, scales

    def check(self, tier, ids):
        rows, scales = self.fetch(tier, ids)
        assert np.array_equal(rows, self.rows[ids]) and np.array_equal(scales, self.scales[ids])


SHAPES = {  # odd offsets and strides; rows over several pages and over several reads
    "packed": dict(),
    "scales_apart": dict(row_bytes=256, scale_bytes=8),
    "padded": dict(row_bytes=264, stride=288, offset=4096),
    "one_byte": dict(row_bytes=1, offset=0, num_rows=10_000),
    "pages": dict(row_bytes=4096, offset=4096, num_rows=200),
    "beyond_a_read": dict(row_bytes=100_001, offset=13, num_rows=40, scale_bytes=5000),
}
