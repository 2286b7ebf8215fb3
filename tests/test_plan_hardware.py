"""The machines that the planner knows by published constants, and what their rates count."""
import dataclasses
import re
from pathlib import Path

import pytest
from plan_cases import machine, workload

from engram_kernels import EngramSpec
from engram_kernels.plan import Provenance, Surface, assumed_hardware
from engram_kernels.plan.hardware import GPUS
from engram_kernels.plan.placements import lookup
from engram_kernels.plan.quantity import Quantity


def test_gather_from_device_memory_writes_what_it_reads():
    """Packed rows of 264 bytes are 9 sectors, and 256 bf16 values come out; a measured rate of rows has that in it."""
    spec = dataclasses.replace(EngramSpec.deepseek_v41(), row_format="fp8_e4m3_block32_packed", layer_ids=(1,))
    work = workload(spec, tokens=1000, cache=1e9, hits=0.5)
    for counts, num_bytes in ((True, 288 + 512), (False, 264)):
        node = machine(hbm_gather=1e9, hbm_counts_traffic=counts)
        assert lookup("hbm", work, node).stages[0].seconds.value == pytest.approx(24_000 * num_bytes / 1e9)
        assert lookup("hbm_cache", work, node).stages[-1].seconds.value == pytest.approx(12_000 * num_bytes / 1e9)
        assert lookup("staged", work, node).stages[-1].seconds.value == pytest.approx(24_000 * num_bytes / 1e9)


def test_published_h200_is_what_was_measured_on_one():
    page = (Path(__file__).parents[1] / "bench/results/2026-11-26_h200.md").read_text()
    spec = dataclasses.replace(EngramSpec.deepseek_v41(), row_format="fp8_e4m3_block32_packed", layer_ids=(1,))
    work, node = workload(spec, tokens=16_384), assumed_hardware("h200")
    for placement, suffix in (("hbm", ""), ("uva", ", pinned host table")):
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
