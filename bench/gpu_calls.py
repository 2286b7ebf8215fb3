"""What `bench/gpu.py` times: for each op the calls, their peers, and the bytes that must move. Shapes of DeepSeek-V4.1-Flash.

A function of a number of tokens gives a `Calls`. Every call of a backend has fresh ids, so that rows come from memory.
`DRY` makes everything small, on the CPU: it shows that the calls are right where there is no GPU, and measures nothing.
"""
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch._functorch.config

import engram_kernels as ek
from engram_kernels.reference.gate import gate as reference_gate

H, M, C, D = 5120, 4, 24, 256
PACKED = "fp8_e4m3_block32_packed"
DRY = False
Call = Callable[[], object]


@dataclasses.dataclass
class Calls:
    """num_bytes must move; `ours` gives the calls of a backend; `others` are called beside them, by name."""

    num_bytes: float
    ours: Callable[[str], list[Call]] | None
    others: dict[str, Callable[[], list[Call]]] = dataclasses.field(default_factory=dict)


def device() -> str:
    return "cpu" if DRY else "cuda"


def num_calls(tokens: int) -> int:
    return 2 if DRY else 20 if tokens <= 4096 else 6


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=device(), dtype=torch.bfloat16, requires_grad=grad)


def draw(low_rows: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, low_rows, shape, device=device())


def make_table(row_format: str, place: str, num_bytes: float) -> ek.RowTable:
    """Rows of V4.1's width on the device, or in memory that the device reads ("host")."""
    row_bytes = 512 if row_format == "bf16" else 264
    num_rows = 2_000 if DRY else int(num_bytes) // row_bytes
    on_device = place == "device" and not DRY
    rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device="cuda" if on_device else "cpu",
                       pin_memory=place == "host" and not DRY)
    if on_device:
        rows.random_(0, 120)
    else:  # one block, repeated: the values of rows do not change the time, and one CPU thread makes 32 GiB in a minute
        block = torch.randint(0, 120, (min(num_rows, 1 << 16), row_bytes), dtype=torch.uint8)
        for begin in range(0, num_rows, len(block)):
            rows[begin:begin + len(block)] = block[:num_rows - begin]
    return ek.RowTable.from_tensor(rows.view(torch.bfloat16) if row_format == "bf16" else rows, row_format=row_format, row_dim=D)


def hash_calls(tokens: int) -> Calls:
    layout = ek.EngramSpec.deepseek_v41().layout().to(device())
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device())
    ids = [draw(layout.num_ids, tokens) for _ in range(num_calls(tokens))]
    out = torch.empty(2, tokens, C, dtype=torch.int32, device=device())
    return Calls(tokens * 2 * C * 4 + tokens * 8,
                 lambda backend: [lambda i=i: ek.ngram_hash(i, cu_seqlens, layout, out=out, backend=backend) for i in ids])


def gather_calls(tokens: int, table: ek.RowTable, over_link: bool = False) -> Calls:
    ids = [draw(table.num_rows, tokens, C) for _ in range(num_calls(tokens))]
    out = torch.empty(tokens, C, D, dtype=torch.bfloat16, device=device())
    others: dict[str, Callable[[], list[Call]]] = {}
    if table.row_format == "bf16" and not over_link:
        flat = out.view(-1, D)
        others["index_select"] = lambda: [lambda i=i: torch.index_select(table.rows, 0, i.view(-1), out=flat) for i in ids]
    if over_link and table.row_format == PACKED:
        others |= _host_layouts(table, ids, out)
    num_bytes = tokens * C * table.row_bytes + (0 if over_link else tokens * C * (2 * D + 8))
    return Calls(num_bytes, lambda backend: [lambda i=i: ek.gather_rows(table, i, out=out, backend=backend) for i in ids], others)


def _host_layouts(table: ek.RowTable, ids: list[torch.Tensor], out: torch.Tensor) -> dict[str, Callable[[], list[Call]]]:
    """Other ways to the same rows of a host table: sorted ids, values of 256 bytes with scales on the GPU."""
    num_rows = table.num_rows

    def scales_on_device() -> list[Call]:
        scales = torch.full((num_rows, D // 32), 120, dtype=torch.uint8)
        apart = ek.RowTable.from_tensor(table.rows.flatten()[:num_rows * D].view(num_rows, D), scales, "fp8_e4m3_block32")
        split = apart if DRY else apart.with_scales_on("cuda")
        return [lambda i=i: ek.gather_rows(split, i, out=out) for i in ids]
    return {"sorted ids": lambda: [lambda i=i: ek.gather_rows(table, i, out=out)
                                   for i in (i.flatten().sort()[0].view(i.shape) for i in ids)],
            "values on the host, scales on the GPU": scales_on_device}


def gate_calls(tokens: int) -> Calls:
    inputs = (randn(tokens, M, H), randn(tokens, M, H), randn(tokens, H), randn(M, H), randn(M, H))
    out, count = torch.empty_like(inputs[0]), num_calls(tokens)

    def compiled() -> list[Call]:
        peer = torch.compile(lambda *x: reference_gate(*x, None, 1e-6, 1e-6, "copysign", True), disable=DRY)
        return [lambda: peer(*inputs)] * count
    return Calls((3 * M + 1) * tokens * H * 2, lambda backend: [lambda: ek.gate(*inputs, out=out, backend=backend)] * count,
                 {"torch.compile": compiled} if tokens in (1, 512, 16384) else {})  # each is compiled anew


def gate_backward_calls(tokens: int) -> Calls:
    inputs = [randn(*shape, grad=True) for shape in ((tokens, M, H), (tokens, M, H), (tokens, H), (M, H), (M, H))]
    grad, count = randn(tokens, M, H), num_calls(tokens)
    torch._functorch.config.donated_buffer = False  # the graph is gone through more than once

    def backward(out: torch.Tensor) -> list[Call]:
        return [lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)] * count

    def compiled() -> list[Call]:
        peer = torch.compile(lambda *x: reference_gate(*x, None, 1e-6, 1e-6, "copysign", True), disable=DRY)
        return backward(peer(*inputs))
    return Calls((5 * M + 2) * tokens * H * 2, lambda backend: backward(ek.gate(*inputs, backend=backend)),
                 {"torch.compile": compiled} if tokens in (1, 4096) else {})


def gather_gate_calls(tokens: int, table: ek.RowTable) -> Calls:
    """20 rows per token; beside it our gather_rows, then our gate."""
    columns = H // D
    ids = [draw(table.num_rows, tokens, columns) for _ in range(num_calls(tokens))]
    hidden, w_hidden, w_key = randn(tokens, M, H), randn(M, H), randn(M, H)
    out = torch.empty_like(hidden)
    memory = torch.empty(tokens, columns, D, dtype=torch.bfloat16, device=device())
    value = memory.view(tokens, H)

    def two_steps(i: torch.Tensor) -> None:
        ek.gather_rows(table, i, out=memory)
        ek.gate(hidden, value[:, None].expand(tokens, M, H), value, w_hidden, w_key, out=out)
    return Calls(tokens * (columns * (table.row_bytes + 8) + 2 * M * H * 2),
                 lambda backend: [lambda i=i: ek.gather_gate(hidden, table, i, w_hidden, w_key, out=out, backend=backend)
                                  for i in ids],
                 {"gather_rows, then gate": lambda: [lambda i=i: two_steps(i) for i in ids]})


def chain_calls(tokens: int, table: ek.RowTable) -> Calls:
    """What a decode step does around its product: hash, gather, gate, one after the other. Beside it, as a graph."""
    sizes = (table.num_rows // C // 4,) * 3  # so that every id of it is a row of the table
    layout = ek.EngramSpec.deepseek_v41(table_sizes=sizes).layout().to(device())
    cu_seqlens = torch.arange(tokens + 1, dtype=torch.int32, device=device())
    row_ids = torch.empty(2, tokens, C, dtype=torch.int32, device=device())
    memory = torch.empty(tokens, C, D, dtype=torch.bfloat16, device=device())
    inputs = (randn(tokens, M, H), randn(tokens, M, H), randn(tokens, H), randn(M, H), randn(M, H))
    out, ids = torch.empty_like(inputs[0]), [draw(layout.num_ids, tokens) for _ in range(num_calls(tokens))]

    def step(i: torch.Tensor) -> None:
        ek.ngram_hash(i, cu_seqlens, layout, out=row_ids)
        ek.gather_rows(table, row_ids[0], out=memory)
        ek.gate(*inputs, out=out)

    def graph() -> list[Call]:
        if DRY:
            return [lambda: step(ids[0])]
        step(ids[0])
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step(ids[0])
        return [captured.replay] * len(ids)
    return Calls(tokens * (2 * C * 4 + C * table.row_bytes + (3 * M + 1) * H * 2), None,
                 {"cuda": lambda: [lambda i=i: step(i) for i in ids], "as a graph": graph})


def short_conv_calls(tokens: int) -> Calls:
    x, weight, norm = randn(tokens, M, H), randn(M, H, 4), randn(M, H)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device())
    out, count = torch.empty_like(x), num_calls(tokens)
    return Calls(4 * tokens * M * H,
                 lambda backend: [lambda: ek.short_conv(x, weight, norm, cu_seqlens, 4, out=out, backend=backend)] * count)


def engram_forward_calls(tokens: int, table: ek.RowTable) -> Calls:
    """The op; its three steps; the product alone, which bounds it."""
    w_kv, w_hidden, w_key = randn((M + 1) * H, C * D) / 78, randn(M, H), randn(M, H)
    hidden = randn(tokens, M, H)
    ids, out = draw(table.num_rows, tokens, C), torch.empty_like(hidden)
    count = num_calls(tokens) if tokens <= 512 else 3
    memory = torch.empty(tokens, C, D, dtype=torch.bfloat16, device=device())
    product = torch.empty(tokens, (M + 1) * H, dtype=torch.bfloat16, device=device())

    def steps() -> None:
        ek.gather_rows(table, ids, out=memory)
        torch.mm(memory.flatten(1), w_kv.T, out=product)
        keys_and_value = product.view(tokens, M + 1, H)
        ek.gate(hidden, keys_and_value[:, :M], keys_and_value[:, M], w_hidden, w_key, out=out)
    num_bytes = w_kv.nbytes + tokens * (C * table.row_bytes + 2 * M * H * 2)
    return Calls(num_bytes, lambda backend: [lambda: ek.engram_forward(hidden, table, ids, w_kv, w_hidden, w_key, out=out,
                                                                       backend=backend)] * count,
                 {"three steps": lambda: [steps] * count,
                  "the product alone": lambda: [lambda: torch.mm(memory.flatten(1), w_kv.T, out=product)] * count})


def prefetch_calls(tokens: int, table: ek.RowTable) -> Calls:
    """A request and its wait, by policy: rows that the host gathers and the copy engine carries, that a kernel reads over the
    link, or that it reads once each. Of the ids, three quarters are distinct. Nothing is overlapped."""
    num_distinct = max(1, tokens * C * 3 // 4)
    ids = [torch.randint(0, table.num_rows, (num_distinct,))[torch.arange(tokens * C) % num_distinct].view(tokens, C)
           for _ in range(3)]

    def calls(policy: str) -> list[Call]:
        # a request's rows are a slot, and there are two
        prefetcher = ek.RowPrefetcher(table, device(), depth=1, policy=policy, ring_bytes=2 * (tokens * C * D * 2 + 4096))
        mine = ids if policy == "staged" else [i.to(device()) for i in ids]
        return [lambda i=i: prefetcher.wait(prefetcher.submit(i)) for i in mine]
    return Calls(tokens * C * table.row_bytes, None,
                 {policy: lambda policy=policy: calls(policy) for policy in ("staged", "uva", "uva_distinct")})


Section = tuple[str, str, str, tuple[int, ...], Callable[[int], Calls]]


def sections(only: Sequence[str], host_gib: Sequence[float]) -> Iterator[Section]:
    """(section, name, what its bytes move over, numbers of tokens, calls), in the order of what a run should settle first."""
    few, large = (1, 8, 16, 33, 34, 48, 66, 67, 128), (512, 4096, 16384)
    packed = make_table(PACKED, "device", 2.1e9)
    for section, tokens in (("few", few), ("large", large)):
        if section in only:
            yield section, "ngram_hash, both layers", "device", tokens, hash_calls
            yield section, f"gather_rows, {PACKED} to bf16", "device", tokens, lambda t: gather_calls(t, packed)
            yield section, "gate", "device", tokens, gate_calls
            yield section, f"gather_gate, {PACKED}", "device", tokens, lambda t: gather_gate_calls(t, packed)
    if "chain" in only:
        yield "chain", "ngram_hash, gather_rows, gate", "device", (1, 8, 33), lambda t: chain_calls(t, packed)
    if "large" in only:
        bf16 = make_table("bf16", "device", 4.1e9)
        yield "large", "gather_rows, bf16 to bf16", "device", (1, *large), lambda t: gather_calls(t, bf16)
        del bf16
    if "backward" in only:
        yield "backward", "gate backward", "device", (1, 16, 512, 4096), gate_backward_calls
    if "short_conv" in only:
        yield "short_conv", "short_conv", "device", (16, 512, 4096, 16384), short_conv_calls
    if "engram_forward" in only:
        yield "engram_forward", f"engram_forward, {PACKED}", "device", (1, 16, 64, 512, 4096, 16384), (
            lambda t: engram_forward_calls(t, packed))
    packed = None  # its memory goes before host tables are made
    for gib in host_gib if {"host", "staged"} & set(only) else ():
        yield from _host_sections(only, gib, gib == host_gib[0])


def _host_sections(only: Sequence[str], gib: float, is_first: bool) -> Iterator[Section]:
    table = make_table(PACKED, "host", gib * 2**30)
    if "host" in only:
        yield "host", f"gather_rows, {PACKED}, host table of {gib:g} GiB", "link", (1, 16, 128, 1024, 4096, 16384), (
            lambda t: gather_calls(t, table, over_link=True))
    if "staged" in only and is_first:
        yield "staged", f"RowPrefetcher, host table of {gib:g} GiB", "link", (128, 4096, 16384), (
            lambda t: prefetch_calls(t, table))
