"""Rows of the real Mooncake Store: a master, a server and this library's client over loopback, in a network namespace."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import mooncake.store  # noqa: F401
except ImportError as err:
    pytest.skip(f"Mooncake is not installed: {err}", allow_module_level=True)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled")]  # 15 s

WORLD = Path(__file__).parents[1] / "support/mooncake_world.py"


def in_namespace(*command, **options):
    """Runs a command where there is no network but loopback."""
    for how in (["unshare", "-n"], ["unshare", "-rn"]):
        try:
            probe = subprocess.run([*how, "true"], capture_output=True, text=True)
        except FileNotFoundError as err:
            pytest.skip(f"no network namespace can be made here: {err}")
        if probe.returncode == 0:
            return subprocess.run([*how, *command], capture_output=True, text=True, **options)
    pytest.skip(f"no network namespace can be made here: {probe.stderr.strip()}")


def test_mooncake_world(tmp_path):
    """Rows of three formats; EngramStore's own layer; every failure names host and key; the engine's errors are no hangs."""
    run = in_namespace(sys.executable, WORLD, cwd=tmp_path, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    for row_format in ("fp8_e4m3_block32_packed", "int8_group32", "fp8_e4m3_tensor"):
        assert said[row_format] == [True, True, True], row_format
    assert said["engram_store"] is True
    host, first, second = "mooncake://127.0.0.1:50151", *said["generations"]
    assert said["there"].startswith(f"FileExistsError: store_rows: {host}/rows: there is a table of that name")
    assert said["fingerprint"].startswith(f"ValueError: RowTable.connect: {host}/rows serves a table with fingerprint")
    assert said["unknown"] == f"FileNotFoundError: {host}: there is no key 'engram_kernels/nothing': no table of that name"
    assert "mooncake://127.0.0.1:50159: no master answers there" in said["nobody"]
    assert "expected 'mooncake://HOST:PORT/NAME'" in said["address"]
    assert said["generation"].startswith(f"ConnectionError: {host}: key 'engram_kernels/rows/{first}/0' cannot be read: -704")
    assert said["generation"].endswith(f"generation {first} is gone, there is one of generation {second} now: connect again")
    assert said["closed"] == f"RuntimeError: StoredRows.remove: {host}/rows is closed here"
    assert said["removed"] == f"FileNotFoundError: {host}: there is no key 'engram_kernels/rows': no table of that name"
    for lost in ("server", "master"):
        assert said[lost].startswith(f"ConnectionError: {host}: key 'engram_kernels/rows-int8_group32/"), said[lost]
        assert said[f"{lost}_s"] < 60
