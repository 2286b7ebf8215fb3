"""The discrete-event model against closed forms, and the traces that it writes."""
import itertools
import json

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from plan_cases import GB, cpu_machine, in_layers, machine, workload

from engram_kernels.plan import Provenance
from engram_kernels.plan.model import evaluate
from engram_kernels.plan.placements import CHUNKS, PLACEMENTS, lookup
from engram_kernels.plan.schedule import Schedule, early_enough, simulate, write_trace
from engram_kernels.plan.simulate import Task, run_tasks


def ends(tasks):
    return [span.end for span in run_tasks(tasks)]


def test_one_stream_serves_in_the_order_of_readiness():
    assert ends([Task("a", "x", 3.0), Task("b", "x", 1.0), Task("c", "x", 2.0)]) == [3, 4, 6]
    # the third is ready at 1, before the second, which waits for a delay of 2
    assert ends([Task("a", "x", 4.0), Task("b", "x", 1.0, (3,)), Task("c", "x", 1.0, (4,)), Task("d", None, 2.0),
                 Task("e", None, 1.0)]) == [4, 6, 5, 2, 1]


def test_what_gets_ready_in_one_instant_starts_in_the_order_of_the_list():
    """Tasks 0 and 1 end together; 3 waits for the first to be looked at, 2 for the other, on one stream."""
    assert ends([Task("a", "x", 1.0), Task("b", "y", 1.0), Task("c", "z", 2.0, (1,)), Task("d", "z", 4.0, (0,))]) == [1, 1, 3, 7]


def test_two_streams_run_side_by_side_and_delays_occupy_nothing():
    assert ends([Task("a", "x", 3.0), Task("b", "y", 2.0), Task("c", "x", 1.0, (1,)), *[Task("d", None, 5.0)] * 3]) == \
        [3, 2, 4, 5, 5, 5]


def test_pipeline_of_equal_pieces_takes_the_closed_form():
    """k pieces through stages s_i take sum(s_i) / k + max(s_i) (k - 1) / k."""
    for stages in ((4.0,), (4.0, 8.0), (8.0, 4.0, 2.0), (1.0, 1.0, 1.0)):
        tasks = []
        for piece in range(CHUNKS):
            for index, seconds in enumerate(stages):
                after = (len(tasks) - 1,) if index else ()
                tasks.append(Task(f"{piece} {index}", index, seconds / CHUNKS, after))
        assert max(ends(tasks)) == pytest.approx(sum(stages) / CHUNKS + max(stages) * (CHUNKS - 1) / CHUNKS)


def test_barrier_waits_for_the_slowest():
    tasks = [Task("a", 0, 1.0), Task("b", 1, 5.0), Task("c", 2, 2.0), Task("all", "net", 1.0, (0, 1, 2))]
    assert run_tasks(tasks)[3].start == 5


def test_no_tasks_and_tasks_of_no_length():
    assert run_tasks([]) == []
    assert ends([Task("a", "x", 0.0), Task("b", "x", 0.0, (0,)), Task("c", "x", 1.0, (1,))]) == [0, 0, 1]


@pytest.mark.parametrize("tasks, message", [
    ([Task("a", "x", -1.0)], r"task 0 \(a\) takes -1.0 s"), ([Task("a", "x", float("nan"))], "expected a finite time"),
    ([Task("a", "x", 1.0, (1,))], "waits for task 1, expected 0 to 0"),
    ([Task("a", "x", 1.0, (1,)), Task("b", "y", 1.0, (0,))], r"task 0 \(a\) never starts: tasks wait for each other")])
def test_rejects_nonsense(tasks, message):
    with pytest.raises(ValueError, match=message):
        run_tasks(tasks)


@settings(max_examples=100, deadline=None)
@drawn(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5), st.sets(st.integers(1, 8), max_size=3)), max_size=40))
def test_random_graphs_keep_every_promise(drawing):
    tasks = [Task(str(i), None if stream < 0 else stream, float(seconds), tuple(sorted(i - back for back in backs if back <= i)))
             for i, (stream, seconds, backs) in enumerate(drawing)]
    spans = run_tasks(tasks)
    for task, span in zip(tasks, spans, strict=True):
        assert span.ready == max((spans[other].end for other in task.after), default=0)
        assert span.start >= span.ready and span.end == span.start + task.seconds
    for stream in range(4):
        mine = sorted((spans[i].start, spans[i].end, spans[i].ready) for i, task in enumerate(tasks) if task.stream == stream)
        for (_, end, _), (start, _, ready) in itertools.pairwise(mine):
            assert start >= end  # one at a time
            assert start == max(end, ready)  # and never idle while one is ready
        # a task of no length makes others ready later in the same instant, when one listed after them may have started
        exact = all(task.seconds for task in tasks)
        by_ready = sorted((i for i, task in enumerate(tasks) if task.stream == stream),
                          key=lambda i: (spans[i].ready, i if exact else spans[i].start))
        assert [spans[i].start for i in by_ready] == sorted(spans[i].start for i in by_ready)


RATES = st.floats(2e8, 1e11)


@settings(max_examples=60, deadline=None)
@drawn(st.sampled_from(PLACEMENTS), st.integers(1, 4000), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), RATES,
       RATES, st.floats(0, 1e-3))
def test_one_gpu_waits_as_long_as_the_closed_form_says(placement, tokens, layers, rate, other, latency):
    work = workload(in_layers(*layers), tokens=tokens, unique=0.8, cache=1e6, hits=0.3)
    node = machine(uva=rate, link=other, host_copy=rate, network=other, disk_reads=rate / 4096, gpu_latency=latency,
                   disk_latency=latency, device_gather=3 * other)
    assert simulate(work, node, Schedule(placement, 1)).exposed_s.value == pytest.approx(
        evaluate(placement, work, node, with_largest=False).exposed_s.value, rel=1e-9, abs=1e-12)


def test_steps_repeat():
    work, node = workload(in_layers(2), step=0.01), machine()
    one, five = (simulate(work, node, Schedule("uva", steps)) for steps in (1, 5))
    assert one.exposed_s.value == pytest.approx(48e-6) and five.exposed_s.value == pytest.approx(48e-6)
    assert five.step_s.value == pytest.approx(0.010048) and len(five.tasks) == 5 * len(one.tasks)


@pytest.mark.parametrize("placement, wait_ms", [
    ("uva", 2.048), ("staged", 4 * 1.024),  # a link each, one host: four GPUs gather 1.024 ms one after the other
    ("file", 4 * 1.6 + 4 * 1.024 / 16)])  # the drive is busy for all four; then the last of the sixteen pieces is gathered
def test_gpus_of_a_node_share_host_and_disk_but_not_links(placement, wait_ms):
    work, node = workload(gpus=4), machine(link=1e15, disk_reads=1e7)
    waits = simulate(work, node, Schedule(placement, 1)).exposed_s.value
    assert waits == pytest.approx(wait_ms * 1e-3, rel=1e-5)
    planned = evaluate(placement, work, node, with_largest=False).exposed_s.value
    assert waits <= planned * (1 + 1e-9) and planned <= 1.2 * waits  # the plan passes a lookup on in 4 pieces, not in 4 per GPU


def test_shards_exchange_their_part_and_all_wait_for_all():
    """(n - 1) / n of 2.048 MB per GPU come from the other nodes, at 0.5 GB/s: once per GPU, in each of four pieces."""
    for nodes in (1, 2, 4):
        result = simulate(workload(nodes=nodes, gpus=2), machine(host_copy=1e15, link=1e15), Schedule("staged", 1))
        sent = [task for task in result.tasks if isinstance(task.stream, tuple) and task.stream[-1] == "network"]
        assert len(sent) == (0 if nodes == 1 else nodes * 2 * CHUNKS)
        assert sum(task.seconds for task in sent) * 0.5 * GB == pytest.approx(nodes * 2 * 2.048e6 * (nodes - 1) / nodes)
        assert all(len(task.after) == nodes * 2 for task in sent)
        assert result.exposed_s.value == pytest.approx(2.048e6 * (nodes - 1) / nodes / (0.5 * GB), rel=1e-3, abs=1e-8)


def test_sharded_hbm_crosses_nvlink_inside_and_the_network_outside():
    result = simulate(workload(gpus=4, nodes=2), machine(), Schedule("device", 1))
    seconds = {name: sum(t.seconds for t in result.tasks if isinstance(t.stream, tuple) and t.stream[-1] == name)
               for name in ("nvlink", "network")}
    assert seconds["nvlink"] * 100 * GB == pytest.approx(8 * 2.048e6 * 3 / 8)
    assert seconds["network"] * 0.5 * GB == pytest.approx(8 * 2.048e6 * 1 / 2)


def test_submitting_earlier_never_waits_longer():
    """2.048 ms of lookup, 1 ms per layer: three layers early is enough, two are not."""
    work, node = workload(in_layers(8)), machine()
    waits = [simulate(work, node, Schedule("uva", 1, early)).exposed_s.value for early in range(9)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] == pytest.approx(2.048e-3) and waits[2] == pytest.approx(48e-6) and waits[3] == pytest.approx(0, abs=1e-12)
    assert early_enough(work, node, "uva") == 3
    assert early_enough(workload(), node, "uva") is None
    assert simulate(work, node, Schedule("uva", 1, 100)).exposed_s.value == pytest.approx(0, abs=1e-12)


def test_busy_shares_add_up():
    result = simulate(workload(in_layers(2)), machine(), Schedule("uva", 2))
    assert result.busy["link"].value == pytest.approx(2.048 / 10.048)
    assert result.busy["compute"].value == pytest.approx(10 / 10.048)


def test_simulated_numbers_are_no_stronger_than_simulated():
    result = simulate(workload(), machine(), Schedule("uva", 1))
    assert result.step_s.provenance is Provenance.SIMULATED and "simulated" in result.step_s.source
    cpu = simulate(workload(), cpu_machine(), Schedule("staged", 1))
    assert {q.provenance for q in (cpu.step_s, cpu.exposed_s, *cpu.busy.values())} == {Provenance.SIMULATED}


@pytest.mark.parametrize("schedule, message", [
    (Schedule("uva", 0), "0 steps, expected at least 1"), (Schedule("uva", 1, -1), "-1 layers early"),
    (Schedule("uva", 10**6), "tasks to simulate, expected at most 2,000,000")])
def test_schedule_rejects_nonsense(schedule, message):
    with pytest.raises(ValueError, match=message):
        simulate(workload(), machine(), schedule)
    with pytest.raises(ValueError, match="UVA cannot be simulated: there is no GPU"):
        simulate(workload(), cpu_machine(), Schedule("uva", 1))


def test_trace_is_a_chrome_trace(tmp_path):
    result = simulate(workload(in_layers(2), gpus=2, nodes=2), machine(), Schedule("staged", 2))
    write_trace(tmp_path / "new" / "trace.json", result, "a title")
    trace = json.loads((tmp_path / "new" / "trace.json").read_text())
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(complete) == len(result.tasks) and {event["pid"] for event in complete} == {0, 1}
    for event in complete:
        assert event["ts"] >= 0 and event["dur"] >= 0 and event["args"]["waited_us"] >= -1e-6 and event["cat"] == "simulated"
    assert max(event["ts"] + event["dur"] for event in complete) == pytest.approx(result.step_s.value * 2e6)
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert {"node 0", "node 1", "host", "gpu 0 compute", "gpu 1 link", "gpu 1 network"} <= names
    assert trace["otherData"]["provenance"] == "simulated" and trace["otherData"]["inputs"] == "simulated"
    for thread in {event["tid"] for event in complete}:  # nothing overlaps on a stream; delays may
        mine = sorted((e["ts"], e["dur"]) for e in complete if e["tid"] == thread and "latency" not in e["name"])
        assert all(start + dur <= then + 1e-6 for (start, dur), (then, _) in itertools.pairwise(mine))


def test_lookup_of_a_placement_is_what_is_simulated():
    result = simulate(workload(), machine(), Schedule("file", 1))
    for stage in lookup("file", workload(), machine()).stages:
        mine = [task.seconds for task in result.tasks if isinstance(task.stream, tuple) and task.stream[-1] == stage.resource]
        assert len(mine) == CHUNKS and sum(mine) == pytest.approx(stage.seconds.value)
