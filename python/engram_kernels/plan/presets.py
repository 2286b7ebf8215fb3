"""The paper's table of offloaded inference, predicted: what the model says and how far it is off."""
from __future__ import annotations

import dataclasses

from engram_kernels._names import PAPER_ROWS
from engram_kernels.plan.hardware import assumed_hardware
from engram_kernels.plan.model import evaluate
from engram_kernels.plan.module_compute import passes, products
from engram_kernels.plan.quantity import Quantity, assumed, derived, given, total
from engram_kernels.plan.repeats import published_repeats
from engram_kernels.plan.workload import Workload, table_bytes
from engram_kernels.spec import EngramSpec

_PAPER = "arXiv 2601.07372"
_TABLE = f"{_PAPER}, Table 4"
SEQUENCES, SHORTEST, LONGEST = 512, 100, 1024
MEAN_TOKENS = (SHORTEST + LONGEST) / 2
# all sequences start together and each gets a token per step, as in nano-vLLM's own benchmark: the longest of them ends the run
STEPS = SHORTEST + (LONGEST - SHORTEST) * SEQUENCES / (SEQUENCES + 1)
LIVE = SEQUENCES * MEAN_TOKENS / STEPS
_OVERLAP = (f"{_TABLE}: {SEQUENCES} sequences of {SHORTEST} to {LONGEST} tokens; default: they start together, each gets a token "
            "per step")
# the published demo's module with one branch, operation by operation (RMSNorm, and a product with its bias, as one): two
# products, three norms, the gate in 11, the convolution in 4, two sums; and how often a vector of the hidden size is moved
LAUNCHES, PASSES = 22, 28
HASH_LAUNCHES = 39


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One row of the paper's Table 4.

    Attributes:
        title: as the paper has it.
        hidden_size, layers, shape_source: of the dense backbone.
        baseline, with_memory: tokens per second without and with the memory of 100B parameters in host DRAM.
    """
    title: str
    hidden_size: int
    layers: int
    shape_source: str
    baseline: float
    with_memory: float


PAPER = dict(zip(PAPER_ROWS, (
    Backbone("4B-Dense", 2560, 30, f"{_PAPER}, Table 5", 9031.62, 8858.28),
    Backbone("8B-Dense", 4096, 36, "default: the paper does not give the shape of its 8B backbone", 6315.52, 6140.02)),
    strict=True))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The model beside what the paper measured.

    Attributes:
        name: of the preset.
        placement: where the model puts the table: host memory, staged.
        exposed_s, slower_s: of the lookup, per step.
        launches_s: per step, of the launches of hash and module.
        compute_s: per step, of the module's products and of what it moves through device memory.
        predicted, published: share of the throughput that is lost.
        error_points: predicted less published, in percentage points.
        missing_s: what a step would have to take longer for the model to be right.
    """
    name: str
    placement: str
    exposed_s: Quantity
    slower_s: Quantity
    launches_s: Quantity
    compute_s: Quantity
    predicted: Quantity
    published: Quantity
    error_points: Quantity
    missing_s: Quantity


def paper_workload(name: str) -> Workload:
    """The paper's experiment: an H800, 512 sequences, one memory of 100B parameters in the second block.

    A step is a token of each sequence that still runs, 281 on average, at the throughput of the baseline, so that prefill and the
    harness are in it. The paper does not give
    the rows of that memory: those of Engram-27B are taken (orders 2 and 3, 8 heads, 1280 values per token, bf16).

    Raises:
        ValueError: no such preset.
    """
    if name not in PAPER:
        raise ValueError(f"plan: preset is {name!r}, expected {', '.join(PAPER)}")
    backbone = PAPER[name]
    spec = EngramSpec.demo_v1(name=name, head_dim=80, table_sizes=(78_125_000,) * 2, layer_ids=(1,), row_format="bf16",
                              hidden_size=backbone.hidden_size, branches=1)
    return Workload(
        spec=spec, table_bytes=table_bytes(spec),
        tokens=assumed(LIVE, "tokens", _OVERLAP),
        step=assumed(LIVE / backbone.baseline, "s", f"{_OVERLAP}; {backbone.baseline} tokens/s"),
        layers=assumed(backbone.layers, "1", backbone.shape_source),
        ahead=given(0, "s", "decode: ids are known when a step starts"),
        copies=given(1, "1", "preset"), gpus=given(1, "1", "preset"), nodes=given(1, "1", "preset"),
        cache_bytes=given(0, "B", "the paper caches nothing in device memory"),
        repeats=published_repeats(spec, "prose", "decode"))


def compare_with_paper(name: str) -> Comparison:
    """Predicts a row of the paper's Table 4 with nothing fitted to it.

    Raises:
        ValueError: no such preset.
    """
    work, node, backbone = paper_workload(name), assumed_hardware("h800"), PAPER[name]
    outcome = evaluate("staged", work, node)
    assert outcome.exposed_s is not None and outcome.slower_s is not None and node.device_stream is not None
    launches = assumed(143e-6 / HASH_LAUNCHES * (HASH_LAUNCHES + LAUNCHES), "s",
                       f"measured by others, collected 2026-11: hash as {HASH_LAUNCHES} torch launches 143 us, RTX 4090; "
                       f"default: the published demo's module in {LAUNCHES} more, each as long")
    # a prompt as long as the answer comes with it: it passes the module too
    through = derived("tokens", lambda t: 2 * t, work.tokens)
    product = products(work.spec, through, node)
    assert product is not None, "an H800 computes"
    compute = total("s", [product, passes(backbone.hidden_size, PASSES, through, node)])
    module = total("s", [launches, compute])
    predicted = derived("1", lambda slower, m, step: 1 - step / (step + slower + m), outcome.slower_s, module, work.step)
    published = assumed(1 - backbone.with_memory / backbone.baseline, "1",
                        f"{_TABLE}: {backbone.with_memory} of {backbone.baseline} tokens/s")
    missing = derived("s", lambda slower, m, step, lost: step / (1 - lost) - step - slower - m, outcome.slower_s, module,
                      work.step, published)
    return Comparison(name, "staged", outcome.exposed_s, outcome.slower_s, launches, compute, predicted, published,
                      derived("percentage points", lambda p, q: 100 * (p - q), predicted, published), missing)
