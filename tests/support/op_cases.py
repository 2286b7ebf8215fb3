"""Inputs of the ops, for their tests on every backend and on the simulators. Each is drawn from its seed, on the CPU."""
import itertools

import torch
import torch.nn.functional as F
from format_cases import table_options

from engram_kernels.spec import EngramSpec
from engram_kernels.table.row_table import RowTable
from engram_kernels.testing import assert_as_accurate_as_torch, random_rows


def packed(lengths):
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make_table(row_format, num_rows, row_dim, seed=0, **options):
    rows, scales = random_rows(row_format, num_rows, row_dim, torch.Generator().manual_seed(seed))
    return RowTable.from_tensor(rows, scales, row_format, row_dim=row_dim, **{**table_options(row_format), **options})


def gate_inputs(tokens, branches, size, dtype, device="cpu", weight_dtype=None, seed=0):
    """[hidden, key, value, w_hidden, w_key]"""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, branches, size), (tokens, branches, size), (tokens, size), (branches, size), (branches, size))
    dtypes = (dtype,) * 3 + (weight_dtype or dtype,) * 2
    return [torch.randn(shape, generator=generator).to(device, d) for shape, d in zip(shapes, dtypes, strict=True)]


def short_conv_inputs(lengths, branches=2, size=40, width=4, dtype=torch.bfloat16, weight_dtype=None, seed=0):
    """(x, weight, norm_weight, cu_seqlens)"""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator)

    weight_dtype = weight_dtype or dtype
    return (rand(sum(lengths), branches, size).to(dtype), (0.5 * rand(branches, size, width)).to(weight_dtype),
            (1 + 0.2 * rand(branches, size)).to(weight_dtype), packed(lengths))


def plain_short_conv(x, weight, norm_weight, cu_seqlens, dilation, eps=1e-5):
    """The published formulation, every step in the dtype of x."""
    _, branches, size = x.shape
    width = weight.shape[2]
    normed = torch.stack([F.rms_norm(x[:, m], (size,), norm_weight[m].to(x.dtype), eps) for m in range(branches)], dim=1)
    kernel, pieces = weight.to(x.dtype).reshape(branches * size, 1, width), [x[:0].flatten(1)]
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        if end > begin:
            line = F.pad(normed[begin:end].flatten(1).T[None], ((width - 1) * dilation, 0))
            pieces.append(F.conv1d(line, kernel, dilation=dilation, groups=branches * size)[0].T)
    return x + F.silu(torch.cat(pieces)).view_as(x)


def ngram_hash_spec(family="xor_prime", boundary="pad", max_order=4, heads=8, table_size=20_011, vocab_size=1000, layers=(1, 14)):
    return EngramSpec(name="test", hash_family=family, boundary=boundary, vocab_size=vocab_size, max_order=max_order, heads=heads,
                      head_dim=32, layer_ids=layers, table_sizes=(table_size,) * (max_order - 1), pad_token_id=2,
                      eos_token_id=None if boundary == "pad" else 7, hidden_size=64)


def assert_all_as_accurate(names, got, plain, want):
    """`assert_as_accurate_as_torch` of each named result."""
    for name, *results in zip(names, got, plain, want, strict=True):
        try:
            assert_as_accurate_as_torch(*results)
        except AssertionError as err:
            raise AssertionError(f"{name}: {err}") from None
