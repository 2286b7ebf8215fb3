"""The paper's allocation law at toy scale: small language models whose sparse parameters are split between experts and memory.

Every split of a size has the same total parameters within 0.05 % and the same active ones within 0.2 %
(allocation_model.py). Each is trained on the same batches of real text with the product's own ops: `ngram_hash`, `gather_rows`,
the module `Engram`, and `RowOptimizer` on gradients of rows. Then, on documents that no training saw:

    loss        nats per token, with the memory and with it switched off
    local       the same over tokens whose last MAX_ORDER ids, the token itself among them, were seen in training, and the others
    rows        how often each row was looked up in training, and which share of the held-out lookups finds such a row

    python bench/allocation.py --json F [--plot F] [--table F] [--sizes small,medium] [--rho 1,0.9,..] [--seeds 3] [--steps N]
    python bench/allocation.py --json F --quick

A run that is interrupted goes on where the JSON file ends.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

import engram_kernels as ek
from allocation_model import HEAD_DIM, MAX_ORDER, VOCAB, Model, Plan, Shape, plan_of
from allocation_report import draw, paragraph, table
from texts import documents

SIZES = {"small": Shape(48, 2, 32, 32, 96), "medium": Shape(64, 2, 32, 40, 128)}
RHOS = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
BATCH, LENGTH = 16, 64
RATE, TABLE_RATE = 8e-3, 5.0  # the paper's: tables at five times the rate
HELD_OUT = 10  # every tenth document
EVALUATED = 64  # batches


def read_text(num_chars: int) -> tuple[Tensor, Tensor]:
    """Ids of the training and of the held-out documents, in a vocabulary of VOCAB made from the training documents."""
    kept: tuple[list[str], list[str]] = ([], [])
    chars = 0
    for i, text in enumerate(documents("code", Path())):
        if chars < num_chars:
            kept[i % HELD_OUT == HELD_OUT - 1].append(text)
            chars += len(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(kept[0], trainer)
    train, held_out = (torch.tensor([1 + i for text in part for i in tokenizer.encode(text).ids]) for part in kept)  # 0: padding
    return train, held_out


def batches(ids: Tensor, count: int, seed: int) -> Tensor:
    """[count, BATCH, LENGTH + 1] pieces at random places, the same ones for every split."""
    starts = torch.randint(len(ids) - LENGTH, (count, BATCH, 1), generator=torch.Generator().manual_seed(seed))
    return ids[starts + torch.arange(LENGTH + 1)]


class Memory:
    """Table, hash and row optimizer of a plan's memory."""

    def __init__(self, spec: ek.EngramSpec, seed: int):
        rows = torch.randn(spec.layout().num_rows[0], HEAD_DIM, generator=torch.Generator().manual_seed(seed)) * HEAD_DIM**-0.5
        self.table, self.layout = ek.RowTable.from_tensor(rows, row_format="f32"), spec.layout()
        self.optimizer = ek.RowOptimizer(self.table, "adam", lr=TABLE_RATE * RATE, seed=seed)
        self.lookups = torch.zeros(len(rows), dtype=torch.int64)  # in training

    def row_ids(self, ids: Tensor) -> Tensor:
        """[B * T, C] of ids [B, T]: each line begins without a past."""
        starts = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        return ek.ngram_hash(ids.flatten().int(), starts, self.layout)[0]


def train(plan: Plan, text: Tensor, steps: int, seed: int) -> tuple[Model, Memory | None]:
    """A model after so many steps."""
    torch.manual_seed(seed)
    model = Model(plan)
    memory = None if plan.spec is None else Memory(plan.spec, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(batches(text, steps, seed)):
        factor = min((step + 1) / 50, 1) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = RATE * factor
        row_ids = rows = None
        if memory is not None:
            row_ids = memory.row_ids(batch[:, :-1])
            rows = ek.gather_rows(memory.table, row_ids, out_dtype=torch.float32).requires_grad_()
        logits, balance = model(batch[:, :-1], rows)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if memory is not None and row_ids is not None and rows is not None and rows.grad is not None:
            memory.optimizer.param_groups[0]["lr"] = TABLE_RATE * RATE * factor
            memory.optimizer.step(row_ids, rows.grad)
            memory.lookups += torch.bincount(row_ids.flatten().long(), minlength=len(memory.lookups))
    return model, memory


@torch.no_grad()
def losses(model: Model, memory: Memory | None, held_out: Tensor) -> Tensor:
    """Nats per predicted token of `held_out` [N, BATCH, LENGTH + 1], in its order. memory None: switched off."""
    found = []
    for batch in held_out:
        rows = None if memory is None else ek.gather_rows(memory.table, memory.row_ids(batch[:, :-1]), out_dtype=torch.float32)
        logits, _ = model(batch[:, :-1], rows)
        found.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return torch.cat(found)


def ngrams(lines: Tensor) -> Tensor:
    """A number for the MAX_ORDER ids that end at each predicted token of [.., LENGTH + 1]; -1 where fewer precede it."""
    number = sum(lines[..., MAX_ORDER - 1 - i:lines.shape[-1] - i].long() * VOCAB**i for i in range(MAX_ORDER))
    return torch.nn.functional.pad(number, (MAX_ORDER - 2, 0), value=-1)


def row_counts(memory: Memory, held_out: Tensor) -> dict[str, Any]:
    """Lookups per row in training by rank, and the share of held-out lookups by how often training had looked the row up."""
    ranked = memory.lookups.sort(descending=True).values
    ranks = torch.unique(torch.logspace(0, math.log10(len(ranked)), 40).long().clamp(1, len(ranked)))
    seen = torch.cat([memory.lookups[memory.row_ids(batch[:, :-1]).flatten().long()] for batch in held_out])
    shares = {str(n): (seen >= n).float().mean().item() for n in (1, 4, 16, 64, 256, 1024, 4096)}
    return {"rank": ranks.tolist(), "trained": ranked[ranks - 1].tolist(), "lookups": shares}


def run(plan: Plan, text: Tensor, held_out: Tensor, seen: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """What one training gives."""
    begun, cpu = time.perf_counter(), time.process_time()
    model, memory = train(plan, text, steps, seed)
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    with_memory = losses(model, memory, held_out)
    found = {"seed": seed, "steps": steps, "rho": plan.rho(), "experts": plan.experts, "shared_width": plan.shared_width, **{
        f"{name}_parameters": n for name, n in plan.counts().items()}, "seconds": seconds, "cpu_seconds": cpu,
        "loss": with_memory.mean().item()}
    local = torch.isin(ngrams(held_out).flatten(), seen)
    kinds = {"local": local, "other": ~local}
    found |= {f"loss_{kind}": with_memory[chosen].mean().item() for kind, chosen in kinds.items()}
    found["share_local"] = local.float().mean().item()
    if memory is not None:
        without = losses(model, None, held_out)
        found |= {"loss_off": without.mean().item(), "rows": row_counts(memory, held_out)}
        found |= {f"loss_off_{kind}": without[chosen].mean().item() for kind, chosen in kinds.items()}
    return found


def machine() -> dict[str, Any]:
    """What the runs ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "torch": torch.__version__}


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    """All runs that the file does not have yet; written after each."""
    report: dict[str, Any] = {"machine": machine(), "batch": [BATCH, LENGTH], "runs": []}
    if args.json.exists():
        report = json.loads(args.json.read_text())
    text, held_out = read_text(args.chars)
    held_out = batches(held_out, 2 if args.quick else EVALUATED, 1)
    seen = torch.unique(ngrams(text))
    report["text"] = {"kind": "modules of Python's standard library", "python": platform.python_version(), "tokens": len(text)}
    done = {(r["size"], r["asked"], r["seed"], r["steps"]) for r in report["runs"]}
    for size in args.sizes:
        for rho in args.rho:
            plan = plan_of(SIZES[size], rho)
            for seed in range(args.seeds):
                if (size, rho, seed, args.steps) not in done:
                    made = run(plan, text, held_out, seen, args.steps, seed)
                    report["runs"].append({"size": size, "asked": rho, **made})
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
                    print(f"{size}, rho {plan.rho():.2f}, seed {seed}: {made['loss']:.4f} ({made['seconds']:.0f} s)", flush=True)
    return report


def main() -> None:
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown table of the means")
    parser.add_argument("--sizes", type=lambda s: s.split(","), default=list(SIZES))
    parser.add_argument("--rho", type=lambda s: [float(x) for x in s.split(",")], default=list(RHOS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--chars", type=int, default=12_000_000)
    parser.add_argument("--quick", action="store_true", help="that it runs: few steps of the small size on little text")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.rho, args.seeds, args.steps, args.chars = ["small"], [1.0, 0.5, 0.0], 1, 12, 500_000
    report = sweep(args)
    print(paragraph(report))
    if args.table:
        args.table.write_text(table(report) + "\n")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
