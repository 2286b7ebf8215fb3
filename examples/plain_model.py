"""A plain PyTorch model with two memory layers, made of the ops alone: no module of this library.

    python examples/plain_model.py [reference | cpu | cuda | triton]

BACKEND is the one line that chooses what runs; "auto" takes the fastest that is there. All of them give the same result.
"""
import sys

import torch
from torch import Tensor, nn

import engram_kernels as ek

BACKEND = sys.argv[1] if len(sys.argv) > 1 else "auto"


class MemoryBlock(nn.Module):
    """A residual MLP in front of a memory: rows of a table, found by the last tokens, gated into the hidden state."""

    def __init__(self, spec: ek.EngramSpec, table: ek.RowTable, backend: str):
        super().__init__()
        self.table, self.backend, size = table, backend, spec.hidden_size
        self.mlp = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))
        self.wkv = nn.Linear(spec.num_columns * spec.head_dim, (spec.branches + 1) * size, bias=False)
        self.w_hidden = nn.Parameter(torch.ones(spec.branches, size))
        self.w_key = nn.Parameter(torch.ones(spec.branches, size))

    def forward(self, hidden: Tensor, row_ids: Tensor) -> Tensor:
        hidden = hidden + self.mlp(hidden)
        if not torch.is_grad_enabled():  # one op: keys and value of a chunk of tokens at a time
            return ek.engram_forward(hidden, self.table, row_ids, self.wkv.weight, self.w_hidden, self.w_key,
                                     backend=self.backend)
        rows = ek.gather_rows(self.table, row_ids, hidden.dtype, backend=self.backend)
        keys_and_value = self.wkv(rows.flatten(1)).unflatten(1, (-1, hidden.shape[2]))
        return ek.gate(hidden, keys_and_value[:, :-1], keys_and_value[:, -1], self.w_hidden, self.w_key, backend=self.backend)


class Model(nn.Module):
    """Two such blocks between an embedding and a head; the hash of all layers is one call."""

    def __init__(self, spec: ek.EngramSpec, tables: list[ek.RowTable], num_rows: int, backend: str):
        super().__init__()
        self.spec, self.layout, self.num_rows, self.backend = spec, spec.layout(), num_rows, backend
        self.embedding = nn.Embedding(spec.num_classes, spec.hidden_size)
        self.blocks = nn.ModuleList(MemoryBlock(spec, table, backend) for table in tables)
        self.head = nn.Linear(spec.hidden_size, spec.num_classes)

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        row_ids = ek.ngram_hash(token_ids, cu_seqlens, self.layout, backend=self.backend)
        hidden = self.embedding(token_ids)[:, None].repeat(1, self.spec.branches, 1)
        for block, ids in zip(self.blocks, row_ids, strict=True):
            hidden = block(hidden, ids % self.num_rows)  # a toy table; the published ones have a row for every id
        return self.head(hidden.mean(1))


def build(backend: str, device: str = "cpu", num_rows: int = 512) -> Model:
    """A small model with the published hash, the same for every backend."""
    torch.manual_seed(0)
    spec = ek.EngramSpec.deepseek_v41(hidden_size=64, branches=2, head_dim=32, num_classes=1000, vocab_size=1000)
    tables = [ek.RowTable.from_tensor(torch.randn(num_rows, 32).to(device), row_format="f32") for _ in spec.layer_ids]
    model = Model(spec, tables, num_rows, backend).to(device)
    model.layout = model.layout.to(device)  # no module and no buffer: `to` leaves it where it is
    return model


def main() -> None:
    device = "cuda" if torch.cuda.is_available() and BACKEND != "cpu" else "cpu"
    model = build(BACKEND, device)
    tokens = torch.randint(0, 1000, (40,), dtype=torch.int32, generator=torch.Generator().manual_seed(1)).to(device)
    bounds = torch.tensor([0, 25, 40], dtype=torch.int32, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(5):
        loss = nn.functional.cross_entropy(model(tokens, bounds)[:-1], tokens[1:].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        print(f"logits of the last token, {model(tokens, bounds)[-1, :4].tolist()}")


if __name__ == "__main__":
    main()
