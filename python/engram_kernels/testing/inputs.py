"""Random inputs for tests, benchmarks and the demo."""
import torch
from torch import Tensor

FLOAT_ROW_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def random_rows(row_format: str, num_rows: int, row_dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Rows of ordinary values (about unit size, no NaN) and their scales, as `RowTable` stores them.

    Args:
        row_format: a name of docs/ops.md, "Row formats"; packed rows come without padding.
        num_rows: R.
        row_dim: D.
        generator: of the random numbers.

    Returns:
        rows [R, D] (or [R, D + D/32] uint8 when packed), and scales: uint8 or float32 [R, D/32], float32 [1], or None.

    Raises:
        ValueError: no such row format.
    """
    if row_format in FLOAT_ROW_DTYPES:
        return torch.randn(num_rows, row_dim, generator=generator).to(FLOAT_ROW_DTYPES[row_format]), None
    if row_format == "int8_group32":
        rows = torch.randint(-127, 128, (num_rows, row_dim), generator=generator, dtype=torch.int8)
        return rows, torch.rand(num_rows, row_dim // 32, generator=generator) / 64
    if not row_format.startswith("fp8_e4m3"):
        raise ValueError(f"random_rows: row_format is {row_format!r}, which is no row format")
    magnitude = torch.randint(0, 0x60, (num_rows, row_dim), generator=generator, dtype=torch.uint8)  # up to 32, no NaN
    rows = magnitude | (torch.randint(0, 2, (num_rows, row_dim), generator=generator, dtype=torch.uint8) << 7)
    if row_format == "fp8_e4m3_tensor":
        return rows, torch.rand(1, generator=generator)
    scales = torch.randint(120, 126, (num_rows, row_dim // 32), generator=generator, dtype=torch.uint8)
    return (torch.cat([rows, scales], dim=1), None) if row_format.endswith("packed") else (rows, scales)
