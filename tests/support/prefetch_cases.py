"""Tables and ways that rows take, for the tests of the prefetcher."""
import contextlib
import functools
import os
import threading
import time
from pathlib import Path

import torch
from format_cases import table_options

from engram_kernels import RowPrefetcher, RowTable, gather_rows
from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table import open_table
from engram_kernels.testing import random_rows

if not COMPILE_ERROR:
    from engine_faults import faulty_engine

    from engram_kernels import _C

TIMEOUT_S = 60
NUM_ROWS, ROW_DIM = 3000, 64
# tier of the table, policy, whether the engine has device memory of its own (CPU threads that act as a GPU does)
WAYS = {
    "host_staged": ("host", "staged", False),
    "host_staged_to_a_device": ("host", "staged", True),
    "host_uva_from_a_device": ("host", "uva", True),
    "host_device": ("host", "device", False),
    "file": ("file", "file", False),
    "file_to_a_device": ("file", "file", True),
    "host_cached_on_a_device": ("host", "staged", True),
    "file_cached_on_a_device": ("file", "file", True),
}
DISTINCT = {"host_uva_distinct_from_a_device": ("host", "uva_distinct", True)}  # counts and errors are those of distinct ids
CACHE_BYTES = 1 << 16  # of the ways that cache: a third of the table


def make_rows(row_format, num_rows=NUM_ROWS, row_dim=ROW_DIM):
    return random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(0))


def make_ids(*shape, seed=0, num_rows=NUM_ROWS):
    """Ids with duplicates and gaps."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, num_rows, shape, generator=generator, dtype=torch.int32)
    ids = torch.where(torch.rand(shape, generator=generator) < 0.3, ids % 7, ids)
    ids.view(-1)[::9] = -1
    return ids


class Tables:
    """Makes tables of both tiers with the same rows; `reader` is that of the last file, for faults."""

    def __init__(self, folder, monkeypatch):
        self.path, self.reader = folder / "table.safetensors", None
        make_reader = open_table.make_files_reader

        def keep(*args):
            self.reader = make_reader(*args)
            return self.reader
        monkeypatch.setattr(open_table, "make_files_reader", keep)

    def make(self, tier, row_format="fp8_e4m3_block32", **open_options):
        rows, scales = make_rows(row_format)
        row_dim = ROW_DIM if row_format.endswith("packed") else None
        scale = table_options(row_format)
        table = RowTable.from_tensor(rows, scales, row_format=row_format, row_dim=row_dim, **scale)
        if tier == "host":
            return table
        RowTable.create(self.path, rows, scales, row_format, row_dim=row_dim, **scale)
        return RowTable.open(self.path, **open_options)


def prefetcher(table, way, engine_options=None, **options):
    """A prefetcher by name of its way; small rings, so that large requests take several blocks."""
    _, policy, has_device_memory = (WAYS | DISTINCT)[way]
    options = {"ring_bytes": 1 << 20, "staging_bytes": 1 << 15, **options}
    if "cached" in way:
        options.setdefault("cache_bytes", CACHE_BYTES)
    if has_device_memory or engine_options:
        make = functools.partial(faulty_engine, **engine_options) if engine_options else _C.host_engine
        options["_engine"] = make(2, has_device_memory=has_device_memory)
    return RowPrefetcher(table, policy=policy, **options)


def check(pf, ids, truth):
    torch.testing.assert_close(pf.wait(pf.submit(ids), timeout_s=TIMEOUT_S), gather_rows(truth, ids), rtol=0, atol=0)


def in_thread(run):
    """(thread, results): what `run` returned or raised."""
    results = []

    def target():
        try:
            results.append(run())
        except BaseException as err:
            results.append(err)
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, results


def num_threads():
    """Threads of this process, without those that the kernel makes for io_uring."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text())
    return sum(not name.startswith("iou-") for name in names)


def exit_status(run):
    """Exit status of a child that runs `run` and ends; negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # torch's OpenMP threads are not in a child: a parallel copy would wait for them
            run()
            code = 0
        finally:
            os._exit(code)
    until = time.monotonic() + TIMEOUT_S
    while (waited := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if waited == (0, 0):
        os.kill(child, 9)
        waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited[1])
