"""What the demo prints."""
from __future__ import annotations

import functools
from typing import Any

from engram_kernels.demo.pipeline import TOLERANCE
from engram_kernels.info import file_reads_text
from engram_kernels.spec import EngramSpec

# hiding is shown only where a fetch takes at least this share of the compute that it runs behind: the stand-in computes as fast
# as this CPU does, and behind compute that is much longer anything is hidden
_COMPARABLE_SHARE = 0.2
_HIDDEN_SHARE = 0.9  # a prefetch that is waited for less than the rest of its own time counts as hidden


def stage_rows(result: dict[str, Any], spec: EngramSpec) -> list[tuple[str, float, float]]:
    """(stage, tokens per second, bytes per token or 0) of every stage, all layers together.

    Bytes are the least that the stage must move: inputs once, outputs once, bf16 activations.
    """
    layers, columns, hidden, branches = len(spec.layer_ids), spec.num_columns, result["hidden_size"], spec.branches
    activations = 2 * branches * hidden
    tokens, seconds = result["tokens"], result["seconds"]
    stages = [
        ("tokenize", result["tokenize_s"], 0),
        ("hash", result["hash_s"], 4 + layers * columns * 4),
        ("gather (prefetch thread)", sum(p["fetch_s"] for p in result["prefetch"]),
         layers * columns * (4 + result["row_bytes"] + 2 * spec.row_dim)),
        ("project (torch)", seconds["project"], 0),
        ("gate", seconds["gate"], layers * (3 * activations + 2 * hidden)),
        ("short_conv", seconds.get("short_conv", 0.0), layers * 2 * activations),
        ("backbone (stand-in, torch)", seconds["backbone"], 0),
    ]
    return [(name, tokens / s, num_bytes) for name, s, num_bytes in stages if s > 0]


def prefetch_line(result: dict[str, Any]) -> str:
    """What the prefetch cost, and whether the run shows that it can be hidden."""
    fetch_s, exposed_s = (sum(p[name] for p in result["prefetch"]) for name in ("fetch_s", "exposed_wait_s"))
    compute_s = max(result["elapsed_s"] - exposed_s, 1e-9)
    line = (f"prefetch: {fetch_s * 1e3:.0f} ms of fetching ran behind {compute_s * 1e3:.0f} ms of compute; "
            f"{exposed_s * 1e3:.1f} ms were waited for ({exposed_s / result['elapsed_s']:.2%} of the run)")
    if fetch_s < _COMPARABLE_SHARE * compute_s:
        return (f"{line}. That shows no hiding: the stand-in computes {compute_s / max(fetch_s, 1e-9):.0f} times as long as the "
                "fetch takes, as no real model's step does")
    hidden = 1 - exposed_s / fetch_s
    return f"{line}: {hidden:.1%} of it {'hidden' if hidden >= _HIDDEN_SHARE else 'only, so it is NOT HIDDEN'}"


def verdict(result: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether everything agreed with the reference, and one sentence per finding."""
    checks = result["checks"]
    def agrees(equal: bool) -> str:
        return "bit-exact with" if equal else "DIFFER FROM"

    lines = [
        f"row ids: {agrees(checks['ids_equal'])} the reference over all {result['tokens']:,} tokens",
        f"rows: {agrees(checks['rows_equal'])} the reference over {checks['checked_tokens']:,} tokens",
        f"gate: largest error {checks['gate_error']:.2e} of its row's largest value, "
        f"{'within' if checks['gate_ok'] else 'BEYOND'} {TOLERANCE:.2e} (one unit in the last place of bf16)",
        *([] if checks["conv_error"] is None else [
            f"short_conv: largest error {checks['conv_error']:.2e}, "
            f"{'within' if checks['conv_ok'] else 'BEYOND'} {TOLERANCE:.2e}"]),
        f"timed run: {'repeats bit for bit' if checks['run_repeats'] else 'DOES NOT REPEAT'}",
        prefetch_line(result),
    ]
    return all(checks[name] for name in ("ids_equal", "rows_equal", "gate_ok", "conv_ok", "run_repeats")), lines


def print_report(result: dict[str, Any], spec: EngramSpec, console: Any) -> bool:
    """Prints the report on a rich console; returns whether everything agreed."""
    from rich.table import Table
    say = functools.partial(console.print, soft_wrap=True)  # a sentence stays a line, whatever the width of a log
    requested = result["requested_rows"]
    say(f"[bold]{result['text']}[/]: {result['tokens']:,} tokens, {result['distinct_tokens']:,} distinct"
        + (f"; token map of {result['classes']:,} classes" if result["classes"] else ""))
    say(f"spec {spec.name}: layers {list(spec.layer_ids)}, orders 2..{spec.max_order}, {spec.heads} heads, rows of "
        f"{result['row_bytes']} bytes ({spec.row_format})")
    true_rows = ", ".join(f"{n:,}" for n in result["true_rows"])
    say(f"tables: hashed with the true moduli ({true_rows} rows), scaled down to {result['table_rows']:,} rows per layer "
        f"in a file: stored row = row id mod {result['table_rows']:,}")
    say(f"width: hidden {result['hidden_size']} (the model's: {spec.hidden_size}), {spec.branches} branches, "
        f"{result['tokens_per_step']} tokens per step")
    if spec.variant in ("none", "longcat"):
        say("this spec has no gate of the kind: projection and gate are the stand-in's")
    for layer, distinct in zip(spec.layer_ids, result["distinct_rows"], strict=True):
        say(f"layer {layer}: {requested:,} rows asked for, {distinct:,} distinct: "
            f"repeat rate {1 - distinct / requested:.1%}")
    say(file_reads_text(result["file_reads"]))
    rates = ", ".join(f"{name} {flops / 1e9:.1f} GFLOP/s" for name, flops in result["trial_flops"].items())
    say(f"Projection and backbone compute in {result['compute_dtype']}, the faster of a trial: {rates} per core.")
    table = Table(title="stages, all layers together")
    for column in ("stage", "tokens/s", "bytes/token", "GB/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, rate, num_bytes in stage_rows(result, spec):
        table.add_row(name, f"{rate:,.0f}", f"{num_bytes:,}" if num_bytes else "-",
                      f"{num_bytes * rate / 1e9:.2f}" if num_bytes else "-")
    table.add_row("whole run", f"{result['tokens'] / result['elapsed_s']:,.0f}", "-", "-")
    console.print(table)
    say("Bytes are the least that a stage must move. A step's activations stay in the caches, so a rate may exceed the memory's.")
    ok, lines = verdict(result)
    for line in lines:
        say(f"  {line}")
    say(f"[bold]verdict: {'OK' if ok else 'FAILED'}[/]; all numbers measured in this run")
    return ok
