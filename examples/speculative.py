"""Drafts, rejection and rollback: a model with memory decodes several tokens per step, and says what it would have said alone.

    python examples/speculative.py [drafts per step]

A cheap guess (the token that followed last time) drafts; the model checks all drafts in one step and keeps those that it would
have chosen itself. `MemoryState.commit` takes the others back, out of the hash's history and the convolution's ring.
"""
import sys

import torch
from torch import Tensor, nn

import engram_kernels as ek

VOCAB, SIZE, LENGTH = 50, 64, 60


class Model(nn.Module):
    """An embedding, two memory layers with their convolution, and a head: all that it knows of the past is the memory's."""

    def __init__(self, spec: ek.EngramSpec):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, SIZE), nn.Linear(SIZE, VOCAB)
        self.memories = nn.ModuleList()
        for layer_id, num_rows in zip(spec.layer_ids, spec.layout().num_rows, strict=True):
            table = ek.RowTable.from_tensor(torch.randn(num_rows, spec.row_dim), row_format="f32")
            self.memories.append(ek.Engram(spec, layer_id, table=table, dtype=torch.float32))

    def forward(self, ids: Tensor, state: ek.MemoryState) -> Tensor:
        """The most likely next token after each of `ids`, which `state` has taken."""
        hidden = self.embedding(ids.flatten())[:, None]
        for memory in self.memories:
            hidden = hidden + memory(hidden, **state.arguments(memory))
        return self.head(hidden[:, 0]).argmax(1)


def decode(model: Model, spec: ek.EngramSpec, drafts: int) -> tuple[list[int], int]:
    """LENGTH tokens after a prompt, and in how many steps."""
    state, slot = ek.MemoryState(model, 1, max_drafts=drafts), torch.tensor([0])
    text, steps = [3, 1, 4, 1, 5], 0
    prompt = torch.tensor(text)
    state.prefill(prompt, torch.tensor([0, len(text)]).int(), slot)
    text.append(int(model(prompt, state)[-1]))
    while len(text) < LENGTH:
        guess = [text[-1]]
        for _ in range(drafts):
            before = [i for i in range(len(text) - 1) if text[i] == guess[-1]]
            guess.append(text[before[-1] + 1] if before else 0)
        ids = torch.tensor([guess])
        state.step(ids, slot)
        chosen = model(ids, state).tolist()  # what the model says after the last token, and after each draft
        accepted = 0
        while accepted < drafts and guess[1 + accepted] == chosen[accepted]:
            accepted += 1
        state.commit(torch.tensor([accepted]))
        text += chosen[:accepted + 1]
        steps += 1
    return text[:LENGTH], steps


def main(drafts: int = 3) -> None:
    torch.manual_seed(0)
    spec = ek.EngramSpec.demo_v1(vocab_size=VOCAB, num_classes=VOCAB, table_sizes=(300, 300), head_dim=32, hidden_size=SIZE,
                                 branches=1, pad_class=2)
    model = Model(spec)
    with torch.no_grad():
        plain, plain_steps = decode(model, spec, 0)
        speculative, steps = decode(model, spec, drafts)
    print(f"plain: {plain_steps} steps; with {drafts} drafts: {steps} steps")
    print("same tokens" if plain == speculative else f"other tokens: {plain} and {speculative}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
