"""The GPU half of `profile`, on a fake device and a fake NVML."""
import itertools
import sys

import fake_gpu
import jsonschema
import pytest
import torch
from profile_machine import SCHEMA, profile, quiet_machine

from engram_kernels.profile import probes_gpu, probes_gpu_gather, probes_host
from engram_kernels.profile import session as session_module
from engram_kernels.profile.cells import Skip
from engram_kernels.profile.gpu_device import TorchGpu
from engram_kernels.profile.headline import headline
from engram_kernels.profile.nvml import FIELDS, Nvml, link_payload_bytes_per_s, throttle_reasons
from engram_kernels.profile.session import Options, Session

# which fields each call serves
SERVES = {"nvmlDeviceGetClockInfo": {"sm_clock_mhz", "memory_clock_mhz"},
          "nvmlDeviceGetMaxClockInfo": {"sm_clock_max_mhz", "memory_clock_max_mhz"}}
FIELD_CALLS = [name for name in fake_gpu.CALLS if name not in (
    "nvmlInit", "nvmlDeviceGetPcieThroughput", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId",
    "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetCount")]


@pytest.fixture(scope="module", autouse=True)
def small():
    """Sizes and times that a CPU does in a moment."""
    patch = pytest.MonkeyPatch()
    patch.setattr(probes_gpu, "_LINK_BYTES", {"quick": (1 << 16, 1 << 20)})
    patch.setattr(probes_gpu, "_LOAD_BYTES", 1 << 20)
    patch.setattr(probes_gpu, "_LOAD_SECONDS", 0.05)
    patch.setattr(session_module, "_CELL_SECONDS", {"quick": 0.0})
    patch.setattr(session_module, "BUDGET_SECONDS", {"quick": 3000.0})  # a busy machine measures every cell too
    patch.setattr(probes_gpu, "gpu_share", lambda quick: 50.0)
    patch.setattr(probes_gpu_gather, "_MAX_CALL_BYTES", 1 << 20)
    patch.setattr(probes_gpu_gather, "_SAMPLE_BYTES", 1 << 18)
    patch.setattr(probes_gpu_gather, "_BESIDE_BYTES", 1 << 16)
    patch.setattr(probes_gpu, "_STREAM_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    patch.undo()


def run(nvml=None, open_gpu=fake_gpu.FakeGpu, **machine):
    """A session in which the GPU probes ran, with 256 MiB of host memory."""
    session = Session(Options("quick", max_memory_bytes=64 << 20), quiet_machine(**machine))
    probes_gpu.run_gpu_probes(session, open_gpu, nvml or fake_gpu.FakeNvml())
    jsonschema.Draft202012Validator(SCHEMA).validate(session.report())
    return session


def of(session, probe, **wanted):
    return [c for c in session.cells if c["probe"] == probe and all(c.get(k) == v for k, v in wanted.items())]


@pytest.fixture(scope="module")
def session(small):
    return run()


def test_profile_gpu_measures_every_axis(session, compiled):
    assert [c for c in session.cells if c["status"] == "failed"] == []
    link = of(session, "gpu_link", status="ok")
    assert {(c["op"], c["engine"], c["pinned"]) for c in link} == {
        ("h2d", "copy", True), ("d2h", "copy", True), ("both", "copy", True), ("h2d", "copy", False), ("d2h", "copy", False),
        ("h2d", "sm", True), ("d2h", "sm", True), ("read", "sm", True), ("read_rows", "sm", True)}
    assert {c["op"] for c in of(session, "gpu_stream", status="ok")} == {"read", "copy", "triad"}
    rows = of(session, "gpu_gather", status="ok")
    assert {c["placement"] for c in rows} == {"device", "uva", "staged"}
    assert {c["row_bytes"] for c in rows if c["placement"] == "uva"} == {128, 264, 512, 4096}
    assert {c["rows"] for c in rows if c["placement"] == "uva" and c["row_bytes"] == 264} == {24, 384, (1 << 20) // 264}
    assert {(c["pinned"], c["row_format"]) for c in rows if c["row_bytes"] == 264} == {
        (True, "fp8_e4m3_block32_packed"), (None, "fp8_e4m3_block32_packed"), (False, "bf16")}  # staged: as stored
    assert all(c["facts"]["share_of_device" if c["placement"] == "device" else "share_of_link_h2d_copy"] > 0 for c in rows)
    timed = [c for c in session.cells if c["probe"].startswith("gpu_") and c.get("median")]
    assert timed and all(c["control"] > 0 for c in timed)
    assert {c["cold"] for c in rows if c["placement"] == "device"} == {True, False}
    beside = of(session, "gpu_interference", status="ok")
    assert {(c["placement"], c["beside"]) for c in beside} == {(p, b) for p in ("uva", "device") for b in ("gemm", "copies")}
    assert all(c["slowdown_of_other"] > 0 and c["facts"]["slowdown_of_gather"] > 0 for c in beside)


def test_profile_gpu_ids_are_fresh_in_each_call(compiled):
    from engram_kernels.profile.probes_gpu_gather import Gather, Shape
    gpu = fake_gpu.FakeGpu(0)
    for cold in (True, False):
        work = Gather(gpu, gpu.empty(1 << 20), Shape("device", 512, 1 << 20, 96, cold))
        asked = [tuple(call.args[1].tolist()) for _ in range(3) for call in work.calls()]
        first = [tuple(x) for x in asked]
        assert len(set(first)) == (1 if not cold else len({*first}))
        if cold:  # within a sample all differ, and the next sample draws anew
            assert len(set(tuple(call.args[1].tolist()) for call in work.calls())) == work.calls_a_sample > 1
            before = work.ids.clone()
            work.calls()
            assert not torch.equal(before, work.ids)


def test_profile_gpu_link_ceiling_is_that_of_the_link_under_load(session):
    assert session.peaks["link_h2d"]["bytes_per_s"] == pytest.approx(63.0e9 * 512 / 536, rel=1e-3)
    assert session.peaks["device"]["bytes_per_s"] == pytest.approx(4.917e12, rel=1e-3)
    assert session.peaks["device"]["provenance"] == "assumed"
    assert link_payload_bytes_per_s(3, 8) == pytest.approx(7.88e9 * 512 / 536, rel=1e-3)
    state = of(session, "gpu_link_state", op="h2d")[0]
    assert state["facts"]["wire_bytes_per_payload_byte"] == pytest.approx(5e10 / state["facts"]["payload_bytes_per_s"])
    assert {c["op"] for c in of(session, "gpu_link_state", status="ok")} == {"h2d", "d2h", "uva_gather"}


@pytest.mark.parametrize("call", FIELD_CALLS)
def test_profile_nvml_call_that_is_refused_costs_its_own_fields_only(call):
    values, unread = Nvml(fake_gpu.FakeGpu(0), fake_gpu.FakeNvml()).read()
    assert set(values) == set(FIELDS) and unread == {}
    less, why = Nvml(fake_gpu.FakeGpu(0), fake_gpu.FakeNvml(refused={call})).read()
    assert set(why) and set(less) | set(why) == set(FIELDS)
    assert all(less[name] == values[name] for name in less)
    assert len(why) == len(SERVES.get(call, {"one"})) and all(call in text for text in why.values())


@pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetHandleByPciBusId", "nvmlDeviceGetPcieThroughput",
                                  "nvmlDeviceGetCurrPcieLinkGeneration", "nvmlDeviceGetCurrentClocksEventReasons"])
def test_profile_gpu_without_part_of_nvml_still_measures(call, compiled):
    refused = {call, "nvmlDeviceGetHandleByUUID"}  # the PCI address is what is left
    session = run(fake_gpu.FakeNvml(refused=refused))
    assert of(session, "gpu_gather", status="ok") and of(session, "gpu_link", status="ok")
    state = of(session, "gpu_link_state")
    if call in ("nvmlInit", "nvmlDeviceGetHandleByPciBusId"):
        assert [c["reason"]["kind"] for c in state] == ["NO_NVML"] and session.probes["gpu_link_state"]["verdict"] == "SKIPPED"
    else:
        assert {c["status"] for c in state} == {"ok"}
        counted = call != "nvmlDeviceGetPcieThroughput"
        assert ("wire_bytes_per_payload_byte" in state[0]["facts"]) == counted
        assert counted or any(f.startswith("link_counters: NvmlError") for f in state[0]["flags"])
    assert session.machine["gpu"][0]["unread"] or call == "nvmlDeviceGetPcieThroughput"


class Named(fake_gpu.FakeNvml):
    """Tells which of the ways found a GPU."""

    def __init__(self, *refused, count=8):
        super().__init__(refused=refused, nvmlDeviceGetCount=count)
        self.nvmlDeviceGetName = lambda handle: handle
        for way in ("UUID", "PciBusId", "Index"):
            name = f"nvmlDeviceGetHandleBy{way}"
            if name not in refused:
                setattr(self, name, lambda which, way=way: f"{way} {which}")


def test_profile_nvml_finds_the_gpu_that_torch_has():
    """CUDA_VISIBLE_DEVICES and CUDA's own order make torch's index another than NVML's."""
    uuid, bus = "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetHandleByPciBusId"
    for refused, found in (((), "UUID GPU-0000-1111"), ((uuid,), "PciBusId 00000000:3B:00.0")):
        assert Nvml(fake_gpu.FakeGpu(0), Named(*refused)).read(("name",))[0]["name"] == found
    with pytest.raises(Skip, match="NVML does not know this GPU: 00000000:3B:00.0: NvmlError"):  # of 8, index 0 may be another
        Nvml(fake_gpu.FakeGpu(0), Named(uuid, bus))
    assert Nvml(fake_gpu.FakeGpu(0), Named(uuid, bus, count=1)).read(("name",))[0]["name"] == "Index 0"

    class Silent(fake_gpu.FakeGpu):
        uuid = bus_id = None
    with pytest.raises(Skip, match="torch tells neither uuid nor PCI address"):
        Nvml(Silent(0), Named())


def test_profile_nvml_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Skip, match="pip install nvidia-ml-py") as skip:
        Nvml(fake_gpu.FakeGpu(0))
    assert skip.value.kind == "NO_NVML"


def test_profile_gpu_slice_is_not_judged_by_the_whole(compiled):
    session = run(fake_gpu.FakeNvml(nvmlDeviceGetMigMode=[1, 1]))
    assert "device" not in session.peaks and "BELOW_REFERENCE" not in {c["verdict"] for c in of(session, "gpu_stream")}
    assert {c["verdict"] for c in of(run(), "gpu_stream", op="triad")} == {"BELOW_REFERENCE"}  # 1 ms is slow for the whole


def test_profile_gpu_link_of_a_generation_not_known_has_no_ceiling(compiled):
    session = run(fake_gpu.FakeNvml(nvmlDeviceGetCurrPcieLinkGeneration=9, nvmlDeviceGetMaxPcieLinkGeneration=9))
    assert of(session, "gpu_link_state", status="ok") and "link_h2d" not in session.peaks
    assert of(session, "gpu_link", status="ok")


@pytest.mark.parametrize("answers, verdict, flag", [
    ({"nvmlDeviceGetCurrPcieLinkGeneration": 3}, "LINK_DEGRADED", "link_generation 3 under load, 5 is possible"),
    ({"nvmlDeviceGetCurrPcieLinkWidth": 8}, "LINK_DEGRADED", "link_width 8 under load, 16 is possible"),
    ({"nvmlDeviceGetCurrentClocksEventReasons": 0x44}, "THROTTLED", "power cap"),
])
def test_profile_gpu_verdict_of_the_link(answers, verdict, flag, compiled):
    session = run(fake_gpu.FakeNvml(**answers))
    assert session.probes["gpu_link_state"]["verdict"] == verdict and session.probes["gpu_link_state"]["advice"]
    assert flag in of(session, "gpu_link_state")[0]["flags"]
    if verdict == "THROTTLED":
        assert {c["verdict"] for c in of(session, "gpu_stream", status="ok")} == {"THROTTLED"}


def test_profile_gpu_on_another_numa_node(monkeypatch, compiled):
    monkeypatch.setattr(probes_gpu, "numa_node", lambda bus: 1)
    nodes = [{"node": 0, "cpus": [0, 1], "memory_bytes": 1}, {"node": 1, "cpus": [4096], "memory_bytes": 1}]
    session = run(numa=nodes)
    assert {c["verdict"] for c in of(session, "gpu_link", status="ok")} <= {"NUMA_REMOTE"}
    assert session.probes["gpu_link"]["verdict"] in ("NUMA_REMOTE", "ABOVE_PEAK")


def test_profile_gpu_faster_than_its_link_is_invalid(compiled):
    class Impossible(fake_gpu.FakeGpu):
        call_seconds = 1e-6
    session = run(open_gpu=Impossible)
    bad = of(session, "gpu_link", op="h2d", engine="copy", pinned=True, table_bytes=1 << 20)
    assert {(c["status"], c["verdict"]) for c in bad} == {("invalid", "ABOVE_PEAK")}


def broken(name):
    """A device whose method `name` raises."""
    class Broken(fake_gpu.FakeGpu):
        pass

    def raises(self, *args):
        raise RuntimeError(f"CUDA error in {name}")
    setattr(Broken, name, raises)
    return Broken


class Small(fake_gpu.FakeGpu):
    """A device without the memory that was said to be free, and a host that pins little."""
    most = 12 << 20

    def empty(self, num_bytes):
        if num_bytes > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return super().empty(num_bytes)

    def host(self, num_bytes, pinned):
        if pinned and num_bytes > self.most:
            raise RuntimeError("CUDA error: out of memory")
        return super().host(num_bytes, pinned)


def test_profile_gpu_smaller_tables_where_memory_is_short(monkeypatch, compiled):
    monkeypatch.setattr(probes_gpu_gather, "GIB", 4 << 20)  # tables of 8 and 32 MiB
    monkeypatch.setattr(probes_gpu_gather, "_ROW_BYTES", {"quick": (512,)})

    def run_gather():
        session = Session(Options(max_memory_bytes=64 << 20), quiet_machine())
        with session.probe("gpu_gather", 50), torch.inference_mode():
            probes_gpu_gather.gather(session, Small(0))
        jsonschema.Draft202012Validator(SCHEMA).validate(session.report())
        return session
    session = run_gather()
    assert [c for c in session.cells if c["status"] == "failed"] == []
    rows = of(session, "gpu_gather", status="ok")
    assert {c["table_bytes"] >> 20 for c in rows if c["placement"] == "device"} == {4}
    short = [c for c in of(session, "gpu_gather", placement="device") if c["status"] == "skipped"]
    assert [(c["table_bytes"] >> 20, c["reason"]["kind"]) for c in short] == [(32, "NO_MEMORY")]
    monkeypatch.setattr(Small, "most", 5 << 20)
    session = run_gather()
    assert {c["reason"]["kind"] for c in of(session, "gpu_gather", placement="uva")} == {"NO_MEMORY"}
    assert of(session, "gpu_gather", placement="staged", status="ok")


def test_profile_gpu_each_placement_has_a_part_of_the_time(compiled):
    now = itertools.count()
    session = Session(Options(max_memory_bytes=64 << 20), quiet_machine(), clock=lambda: 0.1 * next(now))
    with session.probe("gpu_gather", 15), torch.inference_mode():
        probes_gpu_gather.gather(session, fake_gpu.FakeGpu(0))
    for placement in ("uva", "device", "staged"):
        assert of(session, "gpu_gather", placement=placement, status="ok"), placement
    assert session.probes["gpu_gather"]["cut"] > 0


def test_profile_gpu_alias_is_no_copy(monkeypatch):
    """torch copies memory that is registered with another device, and that copy would be measured in place of the link."""
    gpu, pinned = object.__new__(TorchGpu), torch.zeros(64, dtype=torch.uint8)
    gpu.device = torch.device("cpu")
    seen = []

    def as_tensor(pointer, device):
        seen.append(pointer.__cuda_array_interface__)
        return pinned.view(torch.int64)
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    assert gpu.alias(pinned).data_ptr() == pinned.data_ptr()
    assert seen[0]["data"] == (pinned.data_ptr(), False) and seen[0]["shape"] == (8,)
    monkeypatch.setattr(torch, "as_tensor", lambda pointer, device: pinned.view(torch.int64).clone())
    with pytest.raises(RuntimeError, match="torch copied the memory"):
        gpu.alias(pinned)


def test_profile_gpu_pinned_tables_are_powers_of_two(compiled):
    """torch rounds pinned memory up to one."""
    for free, want in ((3 << 30, 1 << 29), (9 << 30, 2 << 30), (1 << 40, 2 << 30)):
        machine = quiet_machine()
        machine["machine"]["memory_free_bytes"] = free
        session = Session(Options(), machine)
        size, = probes_gpu_gather._pinned_sizes(session, (2 << 30,))
        assert size == want and size <= probes_host.table_limit(session) // 2


@pytest.mark.parametrize("name, kept", [("host", {"gpu_stream"}), ("alias", {"gpu_stream", "gpu_link", "gpu_gather"}),
                                        ("seconds_beside", {"gpu_link_state"}), ("wall_seconds", {"gpu_stream", "gpu_gather"}),
                                        ("empty", set()), ("gather_backend", {"gpu_stream", "gpu_link"}),
                                        ("free_bytes", {"gpu_link_state"}),
                                        ("both", {"gpu_stream", "gpu_gather"}), ("sync", {"gpu_stream"})])
def test_profile_gpu_operation_that_breaks_leaves_the_other_probes(name, kept, compiled):
    session = run(open_gpu=broken(name))
    assert set(session.probes) == {"gpu_link_state", "gpu_stream", "gpu_link", "gpu_gather", "gpu_interference"}
    for probe in kept:
        assert of(session, probe, status="ok"), probe
    assert any(c["reason"] and f"CUDA error in {name}" in c["reason"]["text"] for c in session.cells)


def test_profile_without_a_gpu_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    session = run(open_gpu=None)
    assert {c["reason"]["kind"] for c in session.cells} == {"NO_GPU"} and len(session.probes) == 5
    assert {p["verdict"] for p in session.probes.values()} == {"SKIPPED"}
    profile(tmp_path, "--only", "gpu", code=5)

    def refused(index):
        raise RuntimeError("all devices are busy")
    assert "all devices are busy" in run(open_gpu=refused).cells[0]["reason"]["text"]


class Cuda:
    """torch.cuda with a clock: a queued kernel costs the host a millisecond, a cycle of the block a nanosecond."""

    def __init__(self):
        self.host = self.device = 0.0
        self.blocks = []

    def install(self, monkeypatch):
        outer = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = outer.device

            def query(self):
                return outer.host >= self.at

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(self, "host", max(self.host, self.device)))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)

    def sleep(self, cycles):
        self.blocks.append(cycles)
        self.device = max(self.device, self.host) + cycles * 1e-9

    def kernel(self):
        self.host += 1e-3
        self.device = max(self.device, self.host) + 10e-6


def test_profile_gpu_timing_blocks_the_stream_until_all_is_queued(monkeypatch):
    cuda = Cuda()
    cuda.install(monkeypatch)
    gpu = object.__new__(TorchGpu)
    gpu.device, gpu._block_cycles = None, 2_000_000
    assert gpu.seconds([cuda.kernel] * 20) == pytest.approx(10e-6)  # and not the millisecond that a launch takes
    assert cuda.blocks == [2_000_000, 8_000_000, 32_000_000]
    cuda.blocks.clear()
    for _ in range(3):  # and one slow launch does not make all later measurements wait
        assert gpu.seconds([lambda: setattr(cuda, "device", max(cuda.device, cuda.host) + 1e-5)]) == pytest.approx(1e-5)
    assert cuda.blocks == [16_000_000, 8_000_000, 4_000_000]


def test_profile_gpu_call_that_waits_for_the_device_is_not_timed_with_its_launch(monkeypatch):
    cuda = Cuda()
    cuda.install(monkeypatch)
    gpu = object.__new__(TorchGpu)
    gpu.device, gpu._block_cycles = None, 2_000_000
    with pytest.raises(Skip, match="1 calls cannot be queued at once"):
        gpu.seconds([lambda: torch.cuda.synchronize(None)])
    assert len(cuda.blocks) < 8
    assert throttle_reasons(None) == [] and throttle_reasons(1) == []


def test_profile_gpu_gather_is_held_against_loads_and_copies_over_the_link(session, compiled):
    loads, copies = (session.peaks[f"link_h2d_{name}"]["bytes_per_s"] for name in ("sm", "copy"))
    sm = of(session, "gpu_link", engine="sm", status="ok")
    assert loads == max(c["bytes_per_s"] for c in sm if c["op"] in ("h2d", "read", "read_rows"))
    for cell in of(session, "gpu_gather", placement="uva", status="ok"):
        assert cell["facts"]["share_of_link_h2d_sm"] == pytest.approx(cell["bytes_per_s"] / loads)
        assert cell["facts"]["share_of_link_h2d_copy"] == pytest.approx(cell["bytes_per_s"] / copies)
    assert not any("share_of_link_h2d_sm" in c["facts"] for c in of(session, "gpu_gather", placement="staged", status="ok"))
    _, _, link = headline(session.report())
    assert link.startswith("Over the link the copy engine moves ") and "random rows of 264 bytes get " in link
    assert "% of the loads and " in link and link.endswith("% of the copies.")
