"""Random inputs for tests, benchmarks and the demo."""
import torch
from torch import Tensor

from engram_kernels.row_format import row_format_of


def random_rows(row_format: str, num_rows: int, row_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Rows of ordinary values (about unit size, no NaN) and their scales, as `RowTable` stores them.

    Args:
        row_format: a name of docs/ops.md, "Row formats"; packed rows come without padding.
        num_rows: R.
        row_dim: D.
        generator: of the random numbers.

    Returns:
        rows [R, D] (or uint8 [R, D + D/32] when packed, [R, D/2] for nvfp4 and mxfp4), and scales as `RowTable.scales` has them.

    Raises:
        ValueError: no such row format.
    """
    stored = row_format_of("random_rows", row_format)
    scale_shape = stored.scale_shape(num_rows, row_dim)
    if stored.is_float:
        return torch.randn(num_rows, row_dim, generator=generator).to(stored.dtype), None
    if stored.dtype == torch.int8:
        rows = torch.randint(-127, 128, (num_rows, row_dim), generator=generator, dtype=torch.int8)
        return rows, None if scale_shape is None else torch.rand(scale_shape, generator=generator) / 64
    if stored.per_stored == 2:
        rows = torch.randint(0, 256, (num_rows, row_dim // 2), generator=generator, dtype=torch.uint8)
        low, high = (0x30, 0x40) if stored.has_table_scale else (124, 128)  # about 1
        return rows, torch.randint(low, high, (num_rows, row_dim // stored.block), generator=generator, dtype=torch.uint8)
    magnitude = torch.randint(0, 0x60, (num_rows, row_dim), generator=generator, dtype=torch.uint8)  # up to 32, no NaN
    rows = magnitude | (torch.randint(0, 2, (num_rows, row_dim), generator=generator, dtype=torch.uint8) << 7)
    if stored.scale_dtype == torch.float32 and scale_shape is not None:
        return rows, torch.rand(scale_shape, generator=generator)
    scales = torch.randint(120, 126, (num_rows, row_dim // stored.block), generator=generator, dtype=torch.uint8)
    return (torch.cat([rows, scales], dim=1), None) if stored.is_packed else (rows, scales)
