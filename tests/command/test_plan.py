"""The planner's arithmetic on machines with known answers."""
import dataclasses
import math

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from plan_cases import GB, SPEC, cpu_machine, in_layers, machine, workload

from engram_kernels import EngramSpec
from engram_kernels.plan import Provenance, Surface, assumed_hardware, make_plan, published_repeats
from engram_kernels.plan.hardware import with_engine, with_room
from engram_kernels.plan.model import (
    MAX_TOKENS,
    evaluate,
    exposed_seconds,
    find_flip,
    input_names,
    input_value,
    moved,
    rank,
    winner_of,
)
from engram_kernels.plan.placements import PLACEMENTS, lookup
from engram_kernels.plan.presets import paper_workload
from engram_kernels.plan.quantity import Quantity, assumed, derived, given, interpolate, measured, total
from engram_kernels.plan.workload import table_bytes, touched

TABLE = table_bytes(SPEC).value
RING = 1.01 * 2 * 16_000 * 128  # device memory for the buffers and no more
# what makes each placement the fastest: a machine and a workload in which all rows are waited for (layer 0)
WINS = {
    "device": (machine(), workload()),
    "device_cache": (machine(device_bytes=TABLE / 2, uva=0.9 * GB, host_copy=0.2 * GB), workload(cache=TABLE / 4, hits=0.9)),
    "uva": (machine(device_bytes=RING, uva=20 * GB), workload()),
    "staged": (machine(device_bytes=RING), workload()),
    "file": (machine(device_bytes=RING, host_bytes=1), workload()),
    "remote": (machine(device_bytes=RING, host_bytes=1.2 * TABLE, disk_bytes=1), workload(copies=3, nodes=2)),
}


def milliseconds(quantity):
    return pytest.approx(quantity * 1e-3, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_plan_each_placement_wins_somewhere(placement):
    node, work = WINS[placement]
    plan = make_plan(work, node)
    assert plan.winner == placement
    assert plan.runner_up != placement and plan.outcomes[placement].why_not is None


def test_lookup_times_by_hand():
    """2.048 MB: 2.048 ms by UVA at 1 GB/s; staged 1.024 ms of gathering and 0.512 of copying in four pieces."""
    node, work = machine(), workload()
    assert evaluate("uva", work, node).lookup_s.value == milliseconds(2.048)
    assert evaluate("staged", work, node).lookup_s.value == milliseconds(1.024 + 0.512 / 4)
    # a page per row (128 divides 4096), 16,000 reads at 1,000 per second; then a quarter of the gathering and the copying
    assert evaluate("file", work, node).lookup_s.value == milliseconds(16_000 + (1.024 + 0.512) / 4)
    two = dataclasses.replace(work, nodes=given(2, "1", "test"))  # half of the rows come from the other node: 2.048 ms
    assert evaluate("staged", two, node).lookup_s.value == milliseconds(2.048 + (1.024 + 0.512) / 4)
    assert evaluate("remote", two, node).lookup_s.value == milliseconds(4.096 + (1.024 + 0.512) / 4)
    four = workload(gpus=4)  # share the host's gathering and the drive, each with its own link
    assert evaluate("staged", four, node).lookup_s.value == milliseconds(4 * 1.024 + 0.512 / 4)
    assert evaluate("file", four, node).lookup_s.value == milliseconds(4 * 16_000 + (4 * 1.024 + 0.512) / 4)
    cached = workload(cache=1e6, hits=0.75, unique=0.5)
    assert evaluate("device_cache", cached, node).lookup_s.value == milliseconds(2.048 * 0.5 * 0.25)
    eight = machine(device_gather=2.048 * GB)  # 1 ms of gathering; 7/8 of the rows from the other seven GPUs
    assert evaluate("device", workload(gpus=8), eight).lookup_s.value == milliseconds(1 + 2.048 * 7 / 8 / 100 / 4)


def test_lookup_latency_is_paid_once_a_lookup():
    slow = machine(gpu_latency=3e-3, host_latency=1e-3, copy_latency=2e-3, disk_latency=5e-3, network_latency=4e-3)
    for placement, more in (("device", 3), ("uva", 3), ("staged", 3), ("file", 7), ("remote", 3)):
        for nodes, hop in ((1, 0), (2, 0 if placement == "uva" else 4)):  # shards are exchanged, or rows come from elsewhere
            work = workload(nodes=nodes)
            latency = evaluate(placement, work, slow).lookup_s.value - evaluate(placement, work, machine()).lookup_s.value
            assert latency == milliseconds(more + hop)


def test_a_remote_engine_has_a_rate_of_rows_and_a_latency_of_its_own():
    node = machine(link=4 * GB, network=1e-3 * GB)  # which is in the engine's rate
    for name, rows, latency in (("ray", 2.6e6, 3.0), ("mooncake-tcp", 0.018e6, 0.7)):
        ms = latency + 16_000 / rows * 1e3 + 0.512 / 4  # rows of 128 bytes; a quarter of the copying
        found = evaluate("remote", workload(nodes=2), with_engine(node, name))
        assert found.lookup_s.value == milliseconds(ms) and "measured elsewhere" in found.lookup_s.source
    assert with_engine(node, "rdma") == node


def test_cpu_reads_every_id_and_a_gpu_each_row_once():
    work = workload(unique=0.5)
    assert lookup("staged", work, cpu_machine()).stages[0].seconds.value == milliseconds(1.024)
    assert lookup("staged", work, machine()).stages[0].seconds.value == milliseconds(0.512)
    fp8 = EngramSpec.demo_v1(row_format="fp8_e4m3_block32_packed", layer_ids=(0,))
    node = cpu_machine(host_decode=1 * GB)
    assert lookup("staged", workload(fp8), node).stages[0].seconds.value == milliseconds(16_000 * 66 / 1e6)


def test_flip_point_by_hand():
    """Staged takes 1.152 ms and UVA 2.048: the nearest change is a UVA rate of 2.048 / 1.152 of what it is."""
    node, work = machine(device_bytes=RING, disk_bytes=1), workload()
    plan = make_plan(work, node)
    assert (plan.winner, plan.runner_up) == ("staged", "uva")
    assert plan.flip.name == "UVA rate" and plan.flip.winner == "uva"
    assert plan.flip.factor == pytest.approx(2.048 / 1.152, rel=2e-6)
    assert plan.flip.then.value == pytest.approx(GB * 2.048 / 1.152, rel=2e-6)
    assert plan.flip.now.value == GB and plan.flip.then.provenance is Provenance.MEASURED


def test_flip_by_room_is_the_size_of_the_table():
    """Everything is hidden, and host memory is only just enough: less of it leaves the file."""
    node = machine(device_bytes=RING, host_bytes=1.01 * TABLE, disk_reads=1e12)
    flip = make_plan(workload(in_layers(5), step=10.0), node).flip
    assert flip.name in ("room in host memory", "copies of the table", "table size")
    assert flip.winner == "file" and max(flip.factor, 1 / flip.factor) == pytest.approx(1.01, rel=1e-5)


def test_flip_by_the_hit_rate():
    """Of 2.048 ms by UVA the cache saves what it holds; staging takes 1.152 ms, and frees more, so 0.1 % of the step in favour of
    the cache are a tie: it wins from a hit rate of 1 - 1.142 / 2.048 = 0.4424 on."""
    node, work = machine(device_bytes=1e9, disk_bytes=1), workload(cache=1e6, hits=0.4)
    assert make_plan(work, node).winner == "staged"
    name = "hit rate of the hot-row cache"
    assert winner_of(*moved(name, 1.105, work, node)) == "staged"
    assert winner_of(*moved(name, 1.107, work, node)) == "device_cache"
    assert moved(name, 2.6, work, node) is None and input_value(name, workload(), node) is None
    assert input_value(name, moved(name, 2.0, work, node)[0], node).value == pytest.approx(0.8)


def test_flip_is_none_where_only_one_fits():
    assert make_plan(workload(), cpu_machine(disk_bytes=1)).flip is None


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_flip_point_separates_the_winners(placement):
    node, work = WINS[placement]
    flip = find_flip(work, node, placement)
    if flip is not None:
        step = 1.00001 if flip.factor > 1 else 1 / 1.00001
        assert winner_of(*moved(flip.name, flip.factor / step, work, node)) == placement
        assert winner_of(*moved(flip.name, flip.factor * step, work, node)) == flip.winner != placement


@pytest.mark.parametrize("placement, lacks, where", [
    ("device", "device_bytes", "device memory"), ("uva", "host_bytes", "host memory"), ("staged", "host_bytes", "host memory"),
    ("file", "disk_bytes", "disk"), ("device_cache", "host_bytes", "host memory"),
    ("device_cache", "device_bytes", "device memory")])
def test_infeasible_where_memory_is_short(placement, lacks, where):
    work = workload(cache=1e6)
    enough = TABLE if lacks != "device_bytes" or placement == "device" else 1e9
    assert lookup(placement, work, machine(**{lacks: enough})).why_not is None
    why_not = lookup(placement, work, machine(**{lacks: 1000.0})).why_not
    assert where in why_not and "GiB are there" in why_not


def test_infeasible_where_the_buffers_do_not_fit():
    ring = 2 * 16_000 * 128
    for placement in ("uva", "staged", "file", "remote"):
        work = workload(nodes=2)
        assert lookup(placement, work, machine(device_bytes=ring)).why_not is None
        assert "of device memory for the buffers" in lookup(placement, work, machine(device_bytes=ring - 1)).why_not
    for placement in ("staged", "file"):
        assert lookup(placement, workload(), cpu_machine()).why_not is None
    huge = workload(tokens=int(TABLE) // 2048 + 1)  # a ring of two tables
    assert evaluate("uva", huge, machine()).freed_bytes.value == 0


def test_infeasible_without_what_it_needs():
    for placement in ("device", "device_cache", "uva"):
        assert "no GPU" in lookup(placement, workload(), cpu_machine()).why_not
    assert "no other node" in lookup("remote", workload(), machine()).why_not
    assert "no device memory" in lookup("device_cache", workload(), machine()).why_not


def test_copies_shards_and_gpus_change_what_must_fit():
    exact = machine(host_bytes=TABLE, device_bytes=TABLE / 8, disk_bytes=TABLE)
    assert lookup("uva", workload(), exact).why_not is None
    assert lookup("uva", workload(copies=2), exact).why_not is not None
    assert lookup("staged", workload(copies=2, nodes=2), exact).why_not is None  # half of the table, twice
    assert lookup("file", workload(copies=2), exact).why_not is None  # processes share a file
    assert lookup("device", workload(), exact).why_not is not None
    assert lookup("device", workload(gpus=4, nodes=2), exact).why_not is None


def test_nothing_fits_gives_no_winner():
    plan = make_plan(workload(), cpu_machine(host_bytes=1, disk_bytes=1))
    assert (plan.winner, plan.runner_up, plan.flip) == (None, None, None)
    assert plan.outcomes["staged"].exposed_s is not None  # its time is known all the same


def test_exposure_is_zero_when_hidden():
    """The lookup takes 2.048 ms; a memory in layer 3 of 10 leaves 3 ms of a step of 10."""
    outcome = evaluate("uva", workload(in_layers(3)), machine())
    assert outcome.exposed_s.value == 0 and outcome.hidden_s.value == milliseconds(2.048) and outcome.slower_s.value == 0
    assert evaluate("uva", workload(in_layers(2)), machine()).exposed_s.value == milliseconds(0.048)
    assert evaluate("uva", workload(in_layers(2), ahead=48e-6), machine()).exposed_s.value == pytest.approx(0, abs=1e-12)


def test_exposure_of_two_memories_shares_one_stream():
    """Both lookups take 2.048 ms on one stream: the second is there after 4.096 ms."""
    assert evaluate("uva", workload(in_layers(3, 4)), machine()).exposed_s.value == milliseconds(0.096)
    assert evaluate("uva", workload(in_layers(0, 4)), machine()).exposed_s.value == milliseconds(2.048)  # waited once for both


def test_compute_lost_beside_a_gather_counts():
    """Hidden, but an eighth of the GPU gathers for 2.048 ms."""
    assert evaluate("uva", workload(in_layers(3)), machine(gather_share=0.125)).slower_s.value == milliseconds(2.048 / 8)
    half = evaluate("uva", workload(in_layers(1)), machine(gather_share=0.125))  # 1.048 ms exposed, 1 ms beside compute
    assert half.slower_s.value == milliseconds(1.048 + 1 / 8)


def test_largest_hidden_step_by_hand():
    """3 ms at 1 GB/s are 3 MB: 1464 tokens of 2048 bytes."""
    assert evaluate("uva", workload(in_layers(3)), machine()).largest_tokens.value == math.floor(3e6 / 2048)
    assert evaluate("uva", workload(), machine()).largest_tokens.value == 0
    assert evaluate("device", workload(in_layers(3)), machine(device_gather=1e18)).largest_tokens.value == MAX_TOKENS


def test_hbm_freed_is_the_table_less_ring_and_cache():
    ring = 2 * 16_000 * 128
    assert evaluate("uva", workload(), machine()).freed_bytes.value == TABLE - ring
    assert evaluate("device_cache", workload(cache=1e6, hits=0.5), machine()).freed_bytes.value == TABLE - ring - 1e6
    assert evaluate("device", workload(), machine()).freed_bytes.value == 0
    assert evaluate("device", workload(gpus=8), machine()).freed_bytes.value == 0
    assert evaluate("staged", workload(), cpu_machine()).freed_bytes.value == 0


def test_rank_ties_go_to_what_frees_memory():
    """All hidden: HBM is no faster in any way that could be measured, and frees nothing."""
    plan = make_plan(workload(in_layers(5)), machine(disk_reads=1e9))
    assert plan.winner != "device" and plan.outcomes[plan.winner].freed_bytes.value > 0
    order = rank(list(plan.outcomes.values()), 0.01)
    assert order[-1] == "device" and sorted(order) == sorted(p for p, o in plan.outcomes.items() if o.why_not is None)


RATES = st.floats(1e8, 1e12)


@settings(max_examples=60, deadline=None)
@drawn(st.sampled_from(PLACEMENTS), st.integers(1, 4000), st.floats(1.01, 8), st.integers(0, 9), st.floats(0.05, 1), RATES, RATES)
def test_slower_inputs_never_expose_less(placement, tokens, factor, layer, unique, rate, other):
    work = workload(in_layers(layer), tokens=tokens, unique=unique, nodes=2, cache=1e6, hits=0.3)
    node = machine(uva=rate, link=other, host_copy=rate, network=other, disk_reads=rate / 4096)
    now = evaluate(placement, work, node, with_largest=False)
    assert now.exposed_s.value >= 0 and now.hidden_s.value >= 0
    assert now.exposed_s.value + now.hidden_s.value == pytest.approx(now.lookup_s.value)
    assert now.slower_s.value >= now.exposed_s.value
    for name in input_names():
        if input_value(name, work, node) is None or name.startswith(("room", "copies", "table", "size")):
            continue
        changed = moved(name, factor, work, node)
        if changed is None:
            continue
        worse = name in ("tokens per step", "unique ratio") or "latency" in name or name.startswith("compute lost")
        then = evaluate(placement, *changed, with_largest=False).exposed_s.value
        slack = 1e-9 * (1 + now.exposed_s.value)
        assert then >= now.exposed_s.value - slack if worse else then <= now.exposed_s.value + slack, name


@settings(max_examples=30, deadline=None)
@drawn(st.sampled_from(PLACEMENTS), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), RATES)
def test_largest_hidden_step_is_the_largest(placement, layers, rate):
    work = workload(in_layers(*layers), nodes=2, cache=1e6, hits=0.3)
    node = machine(uva=rate, host_copy=rate, disk_reads=rate / 1e3)
    largest = evaluate(placement, work, node).largest_tokens.value

    def exposed(tokens):
        changed = dataclasses.replace(work, tokens=given(tokens, "tokens", "test"))
        return evaluate(placement, changed, node, with_largest=False).exposed_s.value

    def fits(tokens):
        changed = dataclasses.replace(work, tokens=given(tokens, "tokens", "test"))
        return lookup(placement, changed, node).device_bytes.value <= node.device_bytes.value

    assert largest == 0 or (exposed(largest) == 0 and fits(largest))
    assert largest == MAX_TOKENS or exposed(largest + 1) > 0 or not fits(largest + 1)


def test_largest_hidden_step_stops_where_its_buffers_do():
    """Buffers of two requests take 4096 bytes per token; the rows alone would be hidden up to 1464 tokens."""
    work = workload(in_layers(3))
    assert evaluate("uva", work, machine(device_bytes=4096 * 700.5)).largest_tokens.value == 700
    assert evaluate("uva", work, machine(device_bytes=4096 * 1e6)).largest_tokens.value == math.floor(3e6 / 2048)
    cached = workload(in_layers(3), cache=1e6, hits=0.5)
    assert evaluate("device_cache", cached, machine(device_bytes=1e6 + 4096 * 700.5)).largest_tokens.value == 700
    # a table that does not fit is no reason: the times are given as if it did
    assert evaluate("device", work, machine(device_bytes=1e3, device_gather=GB)).largest_tokens.value > 1000
    assert evaluate("staged", work, cpu_machine()).largest_tokens.value > 1000


@settings(max_examples=60, deadline=None)
@drawn(st.floats(1, 1e12), st.sampled_from(PLACEMENTS))
def test_feasible_exactly_when_it_fits(room, placement):
    work = workload(cache=1e6, nodes=2)
    fits = TABLE if placement in ("uva", "device_cache", "remote") else TABLE / 2
    field = {"device": "device_bytes", "file": "disk_bytes"}.get(placement, "host_bytes")
    assert (lookup(placement, work, machine(**{field: room})).why_not is None) == (room >= fits)


def test_exposed_seconds_by_hand():
    assert exposed_seconds([0.0], 1.0, [4.0, 8.0], chunks=4) == 1 + 1 + 8  # the first piece of stage one, then stage two
    assert exposed_seconds([5.0, 6.0], 0.0, [4.0], chunks=4) == 2.0
    assert exposed_seconds([10.0], 0.0, [4.0]) == 0.0


def test_sectors_and_pages_a_row_touches():
    assert touched(256, 32) == 8 and touched(264, 32) == 9  # 264 bytes start at any multiple of 8
    assert touched(128, 4096) == 1 and touched(264, 4096) == 1 + 256 / 4096
    for size, unit in ((264, 32), (66, 32), (320, 4096), (4097, 4096)):
        step = math.gcd(size, unit)
        starts = range(0, unit, step)
        by_hand = sum((start + size - 1) // unit - start // unit + 1 for start in starts) / len(starts)
        assert touched(size, unit) == pytest.approx(by_hand)
    apart = workload(dataclasses.replace(EngramSpec.deepseek_v41(), layer_ids=(1,)))
    assert apart.link_bytes == 288  # what others measured for 264 bytes with the scales apart


def test_provenance_is_the_weakest_of_the_inputs():
    strong, weak = measured(2, "s", "a run"), assumed(3, "s", "a guess")
    product = derived("s", lambda a, b: a * b, strong, weak)
    assert (product.value, product.provenance, product.source) == (6, Provenance.ASSUMED, "a guess")
    assert derived("s", lambda a, b: a + b, given(1, "s", "x"), strong).provenance is Provenance.MEASURED
    assert total("s", []).provenance is Provenance.GIVEN and total("s", [strong, weak]).value == 5
    for value, source in ((math.nan, "x"), (math.inf, "x"), (1.0, "")):
        with pytest.raises(ValueError, match="Quantity: "):
            Quantity(value, "s", Provenance.MEASURED, source)


def test_one_assumed_input_shows_in_what_depends_on_it_alone():
    node = dataclasses.replace(machine(), uva=assumed(GB, "B/s", "a guess"))
    outcomes = make_plan(workload(), node).outcomes
    assert outcomes["uva"].lookup_s.provenance is Provenance.ASSUMED and outcomes["uva"].lookup_s.source == "a guess"
    # the ring of `staged` is given, and its gathers and copies are measured; that a gather takes the memory's time is assumed
    assert outcomes["staged"].lookup_s.provenance is Provenance.MEASURED
    assert outcomes["staged"].exposed_s.provenance is Provenance.MEASURED


def test_surface_between_and_outside_its_points():
    surface = Surface(tuple((row, table, measured(rate, "B/s", "a run")) for row, table, rate in
                            ((64, 1e6, 1e9), (256, 1e6, 4e9), (64, 1e8, 0.5e9), (256, 1e8, 2e9))))
    assert surface.at(256, 1e6) == measured(4e9, "B/s", "a run")
    middle = surface.at(128, 1e7)
    assert middle.value == pytest.approx(2e9 / math.sqrt(2)) and middle.provenance is Provenance.MEASURED
    ends = Surface(tuple((row, 1e6, measured(row, "B/s", f"a run of {row}")) for row in (64, 256)))
    assert ends.at(128, 1e6).source == "between a run of 64 and a run of 256"
    assert ends.at(64, 1e6).source == "a run of 64"
    for row, table in ((32, 1e6), (64, 1e9), (512, 1e7)):
        outside = surface.at(row, table)
        assert outside.provenance is Provenance.ASSUMED and "not " in outside.source
    assert surface.at(512, 1e6).value == 4e9 and surface.scaled(2).at(64, 1e6).value == 2e9
    for bad in ((), ((0, 1, measured(1, "B/s", "x")),), ((1, 1, measured(0, "B/s", "x")),)):
        with pytest.raises(ValueError, match="Surface: "):
            Surface(bad)
    assert interpolate([(2.0, measured(5, "1", "x"))], 2.0, "{}").value == 5


@pytest.mark.parametrize("change, message", [
    ({"tokens": 0}, "tokens is 0, expected at least 1"), ({"step": 0.0}, "step is 0 s, expected a positive time"),
    ({"copies": 0}, "copies is 0, expected at least 1"),
    ({"layers": 3, "spec": in_layers(3)}, "the model has 3 layers, but spec"),
    ({"ahead": -1.0}, "ahead is -1, expected at least 0"), ({"cache": -1.0}, "cache_bytes is -1, expected at least 0")])
def test_workload_rejects_nonsense(change, message):
    with pytest.raises(ValueError, match=message):
        workload(change.pop("spec", SPEC), **change)


def test_bad_names_are_named():
    for call, message in ((lambda: lookup("tape", workload(), machine()), "placement is 'tape', expected device"),
                          (lambda: assumed_hardware("h9000"), "gpu is 'h9000', expected none, h100"),
                          (lambda: paper_workload("paper_1b"), "preset is 'paper_1b', expected paper_4b"),
                          (lambda: published_repeats(SPEC, "poems", "decode"), "kind of text is 'poems', expected prose"),
                          (lambda: published_repeats(SPEC, "prose", "train"), "phase is 'train', expected prefill"),
                          (lambda: with_room(cpu_machine(), 1e9, None, None), "there is no GPU"),
                          (lambda: with_room(machine(), -1.0, None, None), "device_bytes is -1.0, expected at least 0")):
        with pytest.raises(ValueError, match=message):
            call()


def test_plan_of_four_bit_rows_reads_values_and_scales():
    spec = dataclasses.replace(SPEC, head_dim=160, row_format="nvfp4")
    work = dataclasses.replace(workload(), spec=spec)
    assert spec.bytes_per_row == work.row_bytes == 90 and work.row_parts == [80, 10]
    assert dataclasses.replace(work, spec=dataclasses.replace(spec, row_format="bf16")).row_parts == [320]
