"""Continuous batching: ragged requests come and go, and the memory's rows come from a file behind the layers.

    python examples/serve.py [number of requests]

Each step mixes prompts of new requests with one token of each request that runs. `MemoryState` hashes for both layers at once
and keeps what the sequences carry; `MemoryPrefetcher` fetches the rows of both from files while the layers between compute.
"""
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import engram_kernels as ek

VOCAB, SIZE, SLOTS = 1000, 128, 4


class Model(nn.Module):
    """A recurrent mix of tokens stands for attention, so that the example has no cache but the memory's."""

    def __init__(self, spec: ek.EngramSpec, folder: Path):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, 4 * SIZE), nn.GELU(),
                                                  nn.Linear(4 * SIZE, SIZE)) for _ in spec.layer_ids)
        self.memories = nn.ModuleList()
        for layer_id, num_rows in zip(spec.layer_ids, spec.layout().num_rows, strict=True):
            table = ek.RowTable.create(folder / f"layer_{layer_id}.safetensors", torch.randn(num_rows, spec.row_dim).bfloat16())
            self.memories.append(ek.Engram(spec, layer_id, table=table, dtype=torch.float32))

    def forward(self, ids: Tensor, state: ek.MemoryState, prefetcher: ek.MemoryPrefetcher,
                row_ids: Tensor) -> tuple[Tensor, float]:
        """Logits [T, VOCAB], and how long the layers waited for rows, in seconds."""
        ticket, waited = prefetcher.submit(row_ids=row_ids), 0.0
        hidden = self.embedding(ids)[:, None]
        for block, memory in zip(self.blocks, self.memories, strict=True):
            hidden = hidden + block(hidden)  # the rows are on their way
            begin = time.perf_counter()
            rows = prefetcher.wait(memory, ticket)
            waited += time.perf_counter() - begin
            hidden = memory(hidden, **state.arguments(memory, rows=rows))
        return self.head(hidden[:, 0]), waited


def main(num_requests: int = 8) -> None:
    torch.manual_seed(0)
    draw = random.Random(0)
    spec = ek.EngramSpec.deepseek_v41(vocab_size=VOCAB, num_classes=VOCAB, table_sizes=(2000,) * 3, head_dim=32,
                                      hidden_size=SIZE, branches=1)
    waiting = [[draw.randrange(VOCAB) for _ in range(draw.randint(3, 30))] for _ in range(num_requests)]
    running: dict[int, list[int]] = {}  # slot: tokens that it still wants, and the last one
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Model(spec, Path(folder))
        state = ek.MemoryState(model, SLOTS)
        with ek.MemoryPrefetcher(model, out_dtype=torch.float32) as prefetcher:
            tokens = steps = 0
            exposed, begin = 0.0, time.perf_counter()
            while waiting or running:
                chunks = {slot: [last] for slot, (_, last) in running.items()}
                for slot in range(SLOTS):
                    if slot not in running and waiting:  # a free slot takes the next prompt
                        chunks[slot], running[slot] = waiting.pop(0), [draw.randint(4, 12), 0]
                ends = torch.tensor([0, *(len(chunk) for chunk in chunks.values())]).cumsum(0)
                ids = torch.tensor([token for chunk in chunks.values() for token in chunk])
                row_ids = state.prefill(ids, ends.int(), torch.tensor(list(chunks)))
                logits, waited = model(ids, state, prefetcher, row_ids)
                for slot, token in zip(chunks, logits[ends[1:] - 1].argmax(1).tolist(), strict=True):
                    running[slot] = [running[slot][0] - 1, token]
                    if running[slot][0] == 0:
                        del running[slot]
                        state.remove(torch.tensor([slot]))
                tokens, steps, exposed = tokens + len(ids), steps + 1, exposed + waited
            seconds = time.perf_counter() - begin
    print(f"{num_requests} requests, {tokens} tokens in {steps} steps: {tokens / seconds:.0f} tokens per second")
    print(f"exposed wait for rows: {exposed / steps * 1e6:.0f} us per step, {exposed / seconds:.1%} of the time")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
