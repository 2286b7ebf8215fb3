"""Trains a memory with rows that are fetched ahead, then generates with the state that the memory carries.

    python examples/train_and_generate.py [training steps]
"""
import sys

import torch
from torch import Tensor, nn

import engram_kernels as ek

TEXT = b"rows are hashed, fetched and gated into the hidden state."


class Model(nn.Module):
    """An embedding, a memory whose rows are trained, and a head."""

    def __init__(self, spec: ek.EngramSpec):
        super().__init__()
        rows = nn.Parameter(0.1 * torch.randn(spec.layout().num_rows[0], spec.row_dim))
        self.memory = ek.Engram(spec, spec.layer_ids[0], table=ek.RowTable.from_tensor(rows, row_format="f32"),
                                dtype=torch.float32)
        self.embedding, self.head = nn.Embedding(256, 64), nn.Linear(64, 256)

    def forward(self, ids: Tensor, **memory: Tensor) -> Tensor:
        """Logits [T, 256]; `memory` is what the memory layer takes."""
        hidden = self.embedding(ids)[:, None].repeat(1, 2, 1)
        return self.head(self.memory(hidden, **memory).mean(1))


def main(steps: int = 30) -> None:
    torch.manual_seed(0)
    spec = ek.EngramSpec.deepseek_v41(vocab_size=256, num_classes=256, table_sizes=(500,) * 3, head_dim=32, hidden_size=64,
                                      branches=2, row_format="f32", layer_ids=(1,))
    model = Model(spec)
    ids = torch.tensor(list(TEXT))
    bounds = torch.tensor([0, len(ids) - 1]).int()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with ek.MemoryPrefetcher(model) as prefetcher:
        for step in range(1, steps + 1):
            ticket = prefetcher.submit(ids[:-1], bounds)  # a larger model computes its first layers meanwhile
            logits = model(ids[:-1], rows=prefetcher.wait(model.memory, ticket))
            loss = nn.functional.cross_entropy(logits, ids[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                print(f"step {step}: loss {loss.item():.3f}")
    state, slot, token = ek.MemoryState(model, 1), torch.tensor([0]), ids[:1]
    with torch.no_grad():
        state.prefill(token, torch.tensor([0, 1]).int(), slot)
        for _ in range(len(TEXT) - 1):
            token = model(token, **state.arguments(model.memory)).argmax(1)
            print(chr(token.item()), end="")
            state.step(token, slot)
    print()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
