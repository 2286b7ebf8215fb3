"""The package installs where it can and says in one sentence where it cannot."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_packaging_missing_compiler_is_one_sentence(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tools)}
    run = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "t", "--build-lib",
                          tmp_path / "l"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("engram-kernels: no C++ compiler was found; install one")
    assert "Traceback" not in run.stderr


def test_packaging_missing_cmake_is_one_sentence(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "c++").symlink_to(shutil.which("true"))
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tools)}
    run = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "t", "--build-lib",
                          tmp_path / "l"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1] == "engram-kernels: cmake was not found; pip install cmake"


WITHOUT_EXTENSION = """
import torch, engram_kernels as ek
from engram_kernels import backends
assert all(backends.available(op) == ("reference",) for op in backends.ops()), backends.ops()
assert "compiled module is missing" in backends.explain("gate", "cpu")
layout = ek.EngramSpec.deepseek_v41().layout()
rows = ek.ngram_hash(torch.tensor([5, 6, 7]), torch.tensor([0, 3], dtype=torch.int32), layout)
assert rows.shape == (2, 3, 24)
table = ek.RowTable.from_tensor(torch.randn(10, 8), row_format="f32")
assert torch.equal(ek.gather_rows(table, torch.tensor([3]), torch.float32)[0], table.rows[3])
header = b'{"rows":{"dtype":"F32","shape":[1,4],"data_offsets":[0,16]},"__metadata__":{"row_format":"f32","row_dim":"4"}}'
open("t.safetensors", "wb").write(len(header).to_bytes(8, "little") + header + bytes(16))
for what, call in {
        "a RowPrefetcher": lambda: ek.RowPrefetcher(table),
        "a table in a file": lambda: ek.RowTable.open("t.safetensors"),
        "memory for a copied or shared table": lambda: ek.RowTable.from_tensor(table.rows, row_format="f32", copy=True),
}.items():
    try:
        call()
    except RuntimeError as err:
        sentence = what + " needs the compiled module: install a C++ compiler, CMake and ninja, and install engram-kernels again"
        assert str(err).startswith(sentence) and chr(10) not in str(err), err
    else:
        raise AssertionError(what + " was made without the compiled module")
try:
    table.share("packaging-test")
except RuntimeError as err:
    assert "memory for a copied or shared table needs the compiled module" in str(err), err
else:
    raise AssertionError("a table was shared without the compiled module")
try:
    ek.ngram_hash(torch.tensor([5]), torch.tensor([0, 1], dtype=torch.int32), layout, backend="cpu")
except RuntimeError as err:
    assert "not available" in str(err)
else:
    raise AssertionError("a named backend fell back")
print("fine")
"""


def test_packaging_pure_python_install_runs_the_references(tmp_path):
    shutil.copytree(ROOT / "python/engram_kernels", tmp_path / "engram_kernels",
                    ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip() == "fine", run.stderr
