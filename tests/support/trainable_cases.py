"""Tables, optimizers and ids that the tests of TrainableRows share."""
import torch

import engram_kernels as ek

R, D = 300, 16


def table_of(dtype=torch.float32, rows=R, dim=D, seed=3):
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return ek.RowTable.from_tensor(weight, row_format={torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype])


def optimizer_of(table, **options):
    return ek.RowOptimizer(table, "adam", **{"lr": 0.05, "first_moment": "bf16", "seed": 5, **options})


def ids_of(number, count=80, rows=R):
    ids = torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(number))
    ids[number % count] = -1
    return ids


def same_bits(a, b):
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    assert torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))
