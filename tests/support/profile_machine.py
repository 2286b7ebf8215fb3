"""What tests of `profile` share: the schema, and the machine block of a machine that is only said to be."""
import json
from pathlib import Path

import jsonschema
import pytest

import engram_kernels.profile
from engram_kernels.cli import main as cli
from engram_kernels.profile import cells, machine, probes_disk, probes_host
from engram_kernels.profile import session as session_module

MIB = 1 << 20

SCHEMA = json.loads(Path(engram_kernels.profile.__file__).with_name("profile.schema.json").read_text())


def quiet_machine(**blocks):
    """A machine block: 2 GiB free, a cache of 1 MiB, one NUMA node, no GPU."""
    return {"versions": {"torch": "x"},
            "machine": {"memory_free_bytes": 2 << 30, "memory_bytes": 4 << 30, "huge_pages": "madvise"},
            "limits": {"cgroup_bytes": None, "memlock_bytes": None, "shm_free_bytes": 1 << 30, "open_files": 1024},
            "numa": [{"node": 0, "cpus": [0, 1], "memory_bytes": 4 << 30}], "caches": {"last_level_bytes": 1 << 20},
            "disk": {"folder": ".", "free_bytes": 1 << 33, "writable": True, "file_system": "ext4"}, "gpu": [], **blocks}


def check(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert set(report["probes"]) == {c["probe"] for c in report["cells"]}
    return report


def profile(tmp_path, *args, code=0):
    """The report of the command."""
    out = tmp_path / "report.json"
    got = cli.main(["profile", "--quick", "--json", str(out), "--max-memory-gib", "0.125", "--disk-dir", str(tmp_path), *args])
    assert got == code
    return check(json.loads(out.read_text()))


def kinds(report, probe):
    return {c["reason"]["kind"] for c in report["cells"] if c["probe"] == probe and c.get("reason")}


def ok(report, probe):
    return [c for c in report["cells"] if c["probe"] == probe and c["status"] == "ok"]


@pytest.fixture(name="fast")
def make_fast(monkeypatch):
    """Sizes and times that fit a test; what is probed stays the same."""
    monkeypatch.setattr(session_module, "_CELL_SECONDS", {"quick": 0.0, "full": 0.0})
    # a busy machine measures every cell too
    monkeypatch.setattr(session_module, "BUDGET_SECONDS", {"quick": 3000.0, "full": 3000.0})
    monkeypatch.setattr(probes_host, "host_share", lambda quick, has_gpu: 50.0)
    monkeypatch.setattr(probes_disk, "SECONDS", {"quick": 300})
    monkeypatch.setattr(probes_disk, "_FILE_BYTES", {"quick": 32 * MIB})
    monkeypatch.setattr(probes_host, "_MAX_CALL_BYTES", MIB)
    monkeypatch.setattr(probes_host, "_CHASE_STEPS", 256)
    monkeypatch.setattr(machine, "last_level_bytes", lambda: MIB)
    monkeypatch.setattr(cells, "MEASURED_PEAK_MARGIN", 1e9)  # these tables lie in the cache
