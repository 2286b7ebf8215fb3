"""A client of remote rows in this process, and tables behind it, without an engine."""
import time

import numpy as np
import torch

import engram_kernels as ek
from engram_kernels.table.remote_rows import Description, RemoteRows
from engram_kernels.testing import random_rows

NUM_ROWS, ROW_DIM, TIMEOUT_S = 500, 64, 60


def make_table(row_format):
    rows, scales = random_rows(row_format, NUM_ROWS, ROW_DIM, torch.Generator().manual_seed(0))
    table_scale = 0.5 if row_format == "nvfp4" else None
    return ek.RowTable.from_tensor(rows, scales, row_format, row_dim=ROW_DIM, table_scale=table_scale)


class Client:
    """Brings the rows of `table` in pieces of 100; `before` sees the ids; `endless`: no row ever comes."""

    def __init__(self, table, before=None, endless=False):
        self.table, self.before, self.endless = table, before, endless

    def describe(self):
        return Description.of(self.table)

    def fetch(self, ids, watch):
        ids = torch.from_numpy(np.frombuffer(ids, np.int64).copy())
        if self.before is not None:
            self.before(ids.tolist())
        while self.endless:
            if watch.cancelled():
                yield None
                return
            time.sleep(0.01)
        for part in ids.split(100):
            rows, scales = self.table.read_rows(part)
            per_row = scales is not None and scales.dim() == 2
            yield rows.view(torch.uint8).numpy(), scales.view(torch.uint8).numpy() if per_row else None


def connected(client, cache_bytes=0, verified=True):
    """The table of a client, as `RowTable.connect` makes it."""
    described = client.describe()
    remote = RemoteRows(client, described, {"address": "fake://rows"}, cache_bytes)
    rows, scales = described.stand_ins()
    table = ek.RowTable(rows, scales, described.row_format, described.row_dim, described.zero_scale_is_zero, None, "remote",
                        remote, table_scale=described.table_scale)
    assert not verified or table.fingerprint() == described.fingerprint
    return table
