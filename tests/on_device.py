"""gather_gate where its backend runs, for tests whose tensors lie on the CPU."""
import pytest
import torch

import engram_kernels as ek
from engram_kernels.ops.gather_gate import gather_gate as op


def gather_gate(hidden, table, row_ids, w_hidden, w_key, mask=None, *, backend="auto", out=None, device="cuda", **options):
    """`engram_kernels.gather_gate`; with backend "cuda" on `device`, and what it returns and writes comes back to the CPU."""
    if backend != "cuda":
        return op(hidden, table, row_ids, w_hidden, w_key, mask, backend=backend, out=out, **options)
    if table.tier == "file":
        pytest.skip("rows of a file come to the host; a GPU gets them from a prefetcher")

    def moved(x):
        return None if x is None else x.to(device)
    there = moved(hidden)
    target = None if out is None else there if out is hidden else moved(out)
    table = ek.RowTable.from_tensor(moved(table.rows), moved(table.scales), table.row_format, row_dim=table.row_dim,
                                    zero_scale_is_zero=table.zero_scale_is_zero)
    backend = "cuda" if torch.device(device).type == "cuda" else "cpu"
    got = op(there, table, *map(moved, (row_ids, w_hidden, w_key, mask)), backend=backend, out=target, **options).cpu()
    ek.check_errors()
    return got if out is None else out.copy_(got)
