"""Reports of `profile` for tests of `plan`: cells, and the report that holds them, valid by the schema."""
import json
from pathlib import Path

import jsonschema

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "python/engram_kernels/profile/profile.schema.json").read_text())
GIB = 2**30


def cell(probe, median, **fields):
    fields = {"rows": 1000, "row_bytes": 256, **fields}
    num_bytes = fields["rows"] * fields["row_bytes"]
    times = dict.fromkeys(("median", "low", "high", "least", "q1", "q3"), median)
    return {"probe": probe, "status": "ok", "verdict": "OK", "provenance": "measured", "reason": None, "unit": "s",
            "samples": [median], "bytes": num_bytes, "rows_per_s": fields["rows"] / median, "bytes_per_s": num_bytes / median,
            **times, **fields}


def gather(bytes_per_s, probe="host_gather", **fields):
    fields = {"rows": 65_536, "row_bytes": 256, "table_bytes": GIB, "row_format": "bf16", "order": "uniform", "op": "gather_rows",
              **fields}
    return cell(probe, fields["rows"] * fields["row_bytes"] / bytes_per_s, **fields)


def profile_of(cells, gpu=(), cpu="a CPU"):
    report = {"schema_version": 2, "mode": "quick", "complete": True, "started": "2026-01-01T00:00:00Z", "seconds": 1.0,
              "peaks": {}, "probes": {}, "cells": cells, "machine": {
                  "versions": {}, "limits": {}, "numa": [], "caches": {"last_level_bytes": None},
                  "disk": {"free_bytes": 500 * GIB},
                  "machine": {"cpu": cpu, "cores": 2, "memory_free_bytes": 100 * GIB}, "gpu": list(gpu)}}
    jsonschema.Draft202012Validator(SCHEMA).validate(report)  # what is read here is what `profile` promises to write
    return report


HOST = [gather(4e9), gather(6e9, row_bytes=512), gather(2e9, table_bytes=16 * GIB), gather(99e9, order="sorted"),
        gather(99e9, op="plain"),
        gather(99e9, cold=False), gather(1e9, rows=24), gather(3e9, row_bytes=264, row_format="fp8_e4m3_block32_packed"),
        {**gather(99e9), "status": "invalid", "verdict": "ABOVE_PEAK"}]
DISK = [cell("disk_read", 0.01, rows=1000, row_bytes=4096, table_bytes=GIB, queue_depth=depth, op="io_uring") | {
    "rows_per_s": rate} for depth, rate in ((1, 10_000.0), (64, 80_000.0), (256, 95_000.0))]
GPU = [gather(2e12, "gpu_gather", placement="device"), gather(30e9, "gpu_gather", placement="uva"),
       gather(1e9, "gpu_gather", placement="uva", rows=24), gather(99e9, "gpu_gather", placement="uva", beside="gemm"),
       gather(99e9, "gpu_gather", placement="uva", cold=False),
       cell("gpu_link", 0.01, op="h2d", engine="copy", pinned=True, rows=1, row_bytes=540_000_000),
       cell("gpu_link", 9e-6, op="h2d", engine="copy", pinned=True, rows=1, row_bytes=4096),
       cell("gpu_link", 0.01, op="h2d", engine="copy", pinned=False, rows=1, row_bytes=900_000_000),
       cell("gpu_stream", 0.001, op="read", rows=1, row_bytes=3_000_000_000),
       cell("gpu_interference", 0.001, placement="uva", beside="gemm", slowdown_of_other=1.25)]


def write(path, report):
    path.write_text(json.dumps(report))
    return path
