"""The machines that the planner knows by published constants, and what their rates count."""
import dataclasses
import re
from pathlib import Path

import pytest
from plan_cases import machine, workload

from engram_kernels import EngramSpec
from engram_kernels.plan import Provenance, Surface, assumed_hardware
from engram_kernels.plan.hardware import GPUS
from engram_kernels.plan.module_compute import module_seconds
from engram_kernels.plan.placements import lookup
from engram_kernels.plan.presets import PAPER, compare_with_paper, paper_workload
from engram_kernels.plan.quantity import Quantity, given


def test_gather_from_device_memory_writes_what_it_reads():
    """Packed rows of 264 bytes are 9 sectors, and 256 bf16 values come out; a measured rate of rows has that in it."""
    spec = dataclasses.replace(EngramSpec.deepseek_v41(), row_format="fp8_e4m3_block32_packed", layer_ids=(1,))
    work = workload(spec, tokens=1000, cache=1e9, hits=0.5)
    for counts, num_bytes in ((True, 288 + 512), (False, 264)):
        node = machine(device_gather=1e9, device_counts_traffic=counts)
        assert lookup("device", work, node).stages[0].seconds.value == pytest.approx(24_000 * num_bytes / 1e9)
        assert lookup("device_cache", work, node).stages[-1].seconds.value == pytest.approx(12_000 * num_bytes / 1e9)
        assert lookup("staged", work, node).stages[-1].seconds.value == pytest.approx(24_000 * num_bytes / 1e9)


def test_published_h200_is_what_was_measured_on_one():
    page = (Path(__file__).parents[2] / "bench/results/2026-11-26_h200.md").read_text()
    spec = dataclasses.replace(EngramSpec.deepseek_v41(), row_format="fp8_e4m3_block32_packed", layer_ids=(1,))
    work, node = workload(spec, tokens=16_384), assumed_hardware("h200")
    for placement, suffix in (("device", ""), ("uva", ", pinned host table")):
        row = re.search(rf"^\| gather_rows, fp8_e4m3_block32_packed to bf16{suffix} \| 16384 \| ([\d.]+) \|", page, re.M)
        seconds = lookup(placement, work, node).stages[0].seconds
        assert seconds.value == pytest.approx(float(row[1]) * 1e-6, rel=1e-6)
        assert seconds.provenance is Provenance.ASSUMED and "2026-11-26_h200.md" in seconds.source


@pytest.mark.parametrize("name", ("none", *GPUS))
def test_published_constants_say_that_they_are_assumed(name):
    node = assumed_hardware(name)
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        quantities = [q for *_, q in value.points] if isinstance(value, Surface) else [value]
        for q in quantities:
            if isinstance(q, Quantity):
                assert q.provenance is Provenance.ASSUMED or (field.name, q.value) == ("host_share", 0), field.name
                assert len(q.source) > 10, field.name
    assert node.has_gpu == (name != "none")


def test_module_compute_by_hand():
    spec = EngramSpec.deepseek_v41()
    node, tokens = assumed_hardware("h100"), given(4096, "tokens", "test")
    weights = 6144 * 5 * 5120
    flops = 2 * weights + 10 * 4 * 5120  # the gate's ten per branch and element
    by_hand = 2 * (4096 * flops / 989e12 + 4096 * (5 + 13) * 5120 * 2 / 3.35e12)
    assert module_seconds(spec, tokens, node).value == pytest.approx(by_hand)
    few = module_seconds(spec, given(1, "tokens", "test"), node)  # reads the weights
    assert few.value == pytest.approx(2 * (2 * (weights + 2 * 4 * 5120) + 18 * 5120 * 2) / 3.35e12)
    assert few.provenance is Provenance.ASSUMED
    assert module_seconds(spec, tokens, assumed_hardware("none")) is None
    longcat = 3072 * 3072  # C * D to H; the projection is written, read with the word embedding, and the average is written
    assert module_seconds(EngramSpec.longcat(), tokens, node).value == pytest.approx(
        4096 * (2 * longcat + 2 * 3072) / 989e12 + 4096 * 4 * 3072 * 2 / 3.35e12)
    assert module_seconds(EngramSpec.longcat(variant="none"), tokens, node) is None
    demo = EngramSpec.demo_v1()
    assert module_seconds(demo, tokens, node).value > module_seconds(dataclasses.replace(
        demo, variant="deepseek_v41", conv_width=None, conv_dilation=None), tokens, node).value


@pytest.mark.parametrize("name", PAPER)
def test_paper_table_and_how_far_the_model_is_off(name):
    c, work = compare_with_paper(name), paper_workload(name)
    assert round(100 * c.published.value, 1) == {"paper_4b": 1.9, "paper_8b": 2.8}[name]
    assert work.table_bytes.value / 2 == pytest.approx(100e9, rel=1e-4)  # parameters of two bytes
    assert c.error_points.value == pytest.approx(100 * (c.predicted.value - c.published.value))
    # of 512 lengths drawn evenly from 100 to 1024 the longest is 1022 on average, the mean 562
    assert work.tokens.value == pytest.approx(512 * 562 / (100 + 924 * 512 / 513)) and 281 < work.tokens.value < 282
    hidden = PAPER[name].hidden_size
    through = 2 * work.tokens.value  # key and value with biases, two norms, a convolution of 4 taps with its norm; their flops
    weights, flops = (1280 * 2 + 2 + 2 + 5) * hidden, ((2 * 1280 + 1) * 2 + 9 + 14) * hidden
    assert c.compute_s.value == pytest.approx(max(2 * weights / 3.35e12, flops * through / 989e12)
                                              + 28 * 2 * hidden * through / 3.35e12)
    assert c.launches_s.value == pytest.approx(143e-6 * 61 / 39) and "22 more" in c.launches_s.source
    added = c.slower_s.value + c.launches_s.value + c.compute_s.value
    assert c.predicted.value == pytest.approx(added / (work.step.value + added))
    closed = added + c.missing_s.value
    assert closed / (work.step.value + closed) == pytest.approx(c.published.value)
    assert c.exposed_s.value == 0  # what the paper says too: the first block hides the transfer
    assert {getattr(c, f.name).provenance for f in dataclasses.fields(c)[2:]} == {Provenance.ASSUMED}
    page = (Path(__file__).parents[2] / "docs/plan.md").read_text()
    assert (f"| {PAPER[name].title} | 0 | {1e6 * c.launches_s.value:.0f} us per step | {1e6 * c.compute_s.value:.0f} us | "
            f"{100 * c.predicted.value:.2f} % | {100 * c.published.value:.2f} % | {c.error_points.value:.2f} points |") in page
