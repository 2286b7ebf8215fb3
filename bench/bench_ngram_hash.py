"""ngram_hash against the demo's numpy formulation and plain C++-like loops in torch; bound: a memset of the same output."""
import numpy as np
import pytest
import torch

from engram_kernels import _C
from engram_kernels.ops.ngram_hash import ngram_hash, ngram_hash_and_commit
from harness import measure
from workloads import DEEPSEEK_V41_DECODE, DEEPSEEK_V41_PREFILL

PREFILL = "ngram_hash, deepseek_v41_prefill"
DECODE = "ngram_hash, deepseek_v41_decode, one token, call included"


def inputs(workload):
    generator = torch.Generator().manual_seed(0)
    layout = workload.spec.layout()
    ids = torch.randint(0, layout.num_ids, (workload.num_tokens,), generator=generator, dtype=torch.int32)
    return ids, torch.tensor([0, workload.num_tokens], dtype=torch.int32), layout


def numpy_demo(ids, layout):
    """The published demo's way, on canonical ids: whole-array shifts, products, XOR and one remainder per head."""
    ids = ids.astype(np.int64)
    shifted = [ids] + [np.concatenate([np.full(s, layout.boundary_id), ids[:-s]]) for s in range(1, layout.max_order)]
    layers = []
    for layer in range(len(layout.num_rows)):
        multipliers, moduli = layout.multipliers[layer].numpy(), layout.moduli[layer].numpy()
        columns = []
        for order in range(2, layout.max_order + 1):
            mix = shifted[0] * multipliers[0]
            for s in range(1, order):
                mix = np.bitwise_xor(mix, shifted[s] * multipliers[s])
            columns += [mix % moduli[(order - 2) * layout.heads + head] for head in range(layout.heads)]
        layers.append(np.stack(columns, axis=1) + layout.offsets[layer].numpy())
    return np.stack(layers)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_ours_prefill(benchmark, isa):
    ids, cu, layout = inputs(DEEPSEEK_V41_PREFILL)
    out = torch.empty(2, ids.numel(), 24, dtype=torch.int32)
    try:
        _C.set_cpu_isa(isa)
    except ValueError as err:
        pytest.skip(str(err))
    measure(benchmark, lambda: ngram_hash(ids, cu, layout, out=out, backend="cpu"), group=PREFILL,
            contender=f"engram_kernels ({isa})", role="ours" if isa == _C.best_cpu_isa() else "peer",
            units=out.numel(), unit="id", num_bytes=out.nbytes + ids.nbytes)
    _C.set_cpu_isa(_C.best_cpu_isa())
    np.testing.assert_array_equal(out.numpy(), numpy_demo(ids.numpy(), layout))


def test_numpy_prefill(benchmark):
    ids, _, layout = inputs(DEEPSEEK_V41_PREFILL)
    array = ids.numpy()
    measure(benchmark, lambda: numpy_demo(array, layout), group=PREFILL, contender="numpy (the demo's)",
            units=2 * 24 * ids.numel(), unit="id", num_bytes=2 * 24 * 4 * ids.numel() + ids.nbytes, rounds=5)


def test_memset_prefill(benchmark):
    out = torch.empty(2, DEEPSEEK_V41_PREFILL.num_tokens, 24, dtype=torch.int32)
    measure(benchmark, out.zero_, group=PREFILL, contender="memset of the output", role="bound",
            units=out.numel(), unit="id", num_bytes=out.nbytes)


def test_ours_decode(benchmark):
    ids, cu, layout = inputs(DEEPSEEK_V41_DECODE)
    history = torch.zeros(1, layout.max_order - 1, dtype=torch.int32)
    measure(benchmark, lambda: ngram_hash(ids, cu, layout, history=history, backend="cpu"),
            group=DECODE, contender="engram_kernels", role="ours",
            units=48, unit="id", rounds=2000)


def test_numpy_decode(benchmark):
    ids, _, layout = inputs(DEEPSEEK_V41_DECODE)
    window = np.concatenate([np.zeros(layout.max_order - 1, np.int32), ids.numpy()])
    measure(benchmark, lambda: numpy_demo(window, layout)[:, -1:], group=DECODE,
            contender="numpy (the demo's)", units=48, unit="id", rounds=500)


def committing(batch):
    """(ids, cu_seqlens, layout, history) of a decode step of so many sequences."""
    layout = DEEPSEEK_V41_DECODE.spec.layout()
    ids = torch.randint(0, layout.num_ids, (batch,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return ids, torch.arange(batch + 1, dtype=torch.int32), layout, torch.zeros(batch, layout.max_order - 1, dtype=torch.int32)


def torch_hash_and_commit(ids, layout, history):
    """A decode step of one token per sequence in torch ops: products, XOR, remainders, and the history moved on."""
    window = torch.cat([ids[:, None], history], dim=1)
    products = window.long()[None] * layout.multipliers[:, None]  # [L, B, N]
    mixes = [products[..., 0]]
    for s in range(1, layout.max_order):
        mixes.append(mixes[-1] ^ products[..., s])
    mix = torch.stack(mixes[1:], dim=-1).repeat_interleave(layout.heads, dim=-1)
    rows = (mix % layout.moduli[:, None] + layout.offsets[:, None]).int()
    history.copy_(window[:, :-1])
    return rows


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("how", ["hash_and_commit", "hash alone", "torch ops"])
def test_commit(benchmark, batch, how):
    """The updated history against the hash alone and against torch ops."""
    ids, cu, layout, history = committing(batch)
    run = {"hash_and_commit": lambda: ngram_hash_and_commit(ids, cu, layout, history, backend="cpu"),
           "hash alone": lambda: ngram_hash(ids, cu, layout, history=history, backend="cpu"),
           "torch ops": lambda: torch_hash_and_commit(ids, layout, history)}[how]
    twin = history.clone()
    assert torch.equal(ngram_hash_and_commit(ids, cu, layout, history), torch_hash_and_commit(ids, layout, twin))
    assert torch.equal(history, twin)
    with torch.inference_mode():
        measure(benchmark, run, group=f"ngram_hash_and_commit, one token each of {batch} sequences, call included",
                contender=how, role="ours" if how == "hash_and_commit" else "peer", units=48 * batch, unit="id", rounds=2000)
