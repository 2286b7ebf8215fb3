"""Tables, inputs and the launcher of gather_gate for the simulator, shared by the tests of both passes and the report."""
import numpy as np
import torch
from cuda_sim import Device
from cuda_sim.params import DTYPES, ROW_FORMATS, BranchRows, GateOptions, GateWeights, GatherGateParams, RowSource
from format_cases import table_scale_of
from test_gate_cuda_sim import branch_rows
from test_gather_rows_cuda_sim import bytes_of

from engram_kernels.testing.inputs import random_rows

OP = "gather_gate_cuda"
NUM_ROWS = 50
WORDS = (("eps", 1e-6), ("clamp", 1e-6), ("zero_sign", "copysign"), ("add_residual", True))


class Table:
    """Rows as they lie in memory: `lead` bytes before the first, `pitch` from one to the next, nothing behind the last."""

    def __init__(self, row_format, row_dim, rows=None, scales=None, pitch=None, lead=0, zero_scale=False, seed=0):
        if rows is None:
            rows, scales = random_rows(row_format, NUM_ROWS, row_dim, torch.Generator().manual_seed(seed))
        self.row_format, self.row_dim, self.rows, self.scales, self.zero_scale = row_format, row_dim, rows, scales, zero_scale
        raw = bytes_of(rows)
        self.pitch, self.lead = pitch or raw.shape[1], lead
        memory = np.full(lead + len(raw) * self.pitch, 0xFF, np.uint8)
        memory[lead:].reshape(len(raw), self.pitch)[:, :raw.shape[1]] = raw.numpy()
        self.memory = memory[:len(memory) - self.pitch + raw.shape[1]]

    def source(self, device, shift_rows=0):
        """The RowSource, of a table that begins `shift_rows` before these rows."""
        per_row = self.scales is not None and self.row_format != "fp8_e4m3_tensor"
        scale_stride = bytes_of(self.scales).shape[1] if per_row else 0
        scales = device.address(self.scales, "scales", readonly=True)
        return RowSource(
            rows=device.address(self.memory, "rows", readonly=True) + self.lead - shift_rows * self.pitch,
            scales=scales - shift_rows * scale_stride, num_rows=len(self.rows) + shift_rows, row_stride_bytes=self.pitch,
            scale_stride_bytes=scale_stride, row_dim=self.row_dim, format=ROW_FORMATS.index(self.row_format),
            zero_scale_is_zero=self.zero_scale, table_scale=table_scale_of(self.row_format))


def make_inputs(tokens, branches, columns, row_dim, dtype=torch.bfloat16, weight_dtype=torch.float32, seed=1, none=True):
    """hidden, row ids, the two weights."""
    generator = torch.Generator().manual_seed(seed)
    size = columns * row_dim
    hidden = torch.randn(tokens, branches, size, generator=generator).to(dtype)
    ids = torch.randint(-1 if none else 0, NUM_ROWS, (tokens, columns), generator=generator).int()
    return [hidden, ids, *(torch.randn(branches, size, generator=generator).to(weight_dtype) for _ in range(2))]


def gather_gate_params(device, table, inputs, mask=None, out=None, errors=None, shift_rows=0, eps=1e-6, clamp=1e-6,
                       zero_sign="copysign", add_residual=True):
    """GatherGateParams over tensors; `out` may be `hidden`."""
    hidden, ids, w_hidden, w_key = inputs
    tokens, branches, size = hidden.shape
    at = device.address
    rows = branch_rows(device, hidden, "hidden", readonly=out is not hidden)
    target = BranchRows() if out is None else rows if out is hidden else branch_rows(device, out, "out", readonly=False)
    return GatherGateParams(
        hidden=rows, table=table.source(device, shift_rows), row_ids=at(ids, "ids", readonly=True),
        weights=GateWeights(at(w_hidden, "w_hidden", readonly=True), at(w_key, "w_key", readonly=True), DTYPES[w_hidden.dtype]),
        mask=at(None if mask is None else mask.view(torch.uint8), "mask", readonly=True), out=target, num_tokens=tokens,
        branches=branches, hidden_size=size, columns=ids.shape[1], id_token_stride=ids.stride(0),
        id_column_stride=ids.stride(1), dtype=DTYPES[hidden.dtype], ids_are_int64=ids.dtype == torch.int64,
        options=GateOptions(eps, clamp, zero_sign == "sign", add_residual), error_count=at(errors, "errors"))


def simulate(table, inputs, mask=None, device=None, in_place=False, **options):
    """(output, errors counted, launches)."""
    device = device or Device()
    hidden, errors = inputs[0], np.zeros(1, np.uint32)
    out = hidden if in_place else torch.full(hidden.shape, float("nan"), dtype=hidden.dtype)
    launches = device.run(OP, gather_gate_params(device, table, inputs, mask, out, errors, **options))
    return out, int(errors[0]), launches
