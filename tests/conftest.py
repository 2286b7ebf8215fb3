"""Fixtures: every op test runs on each backend of its op; uninitialised memory is poisoned."""
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the import of triton

import row_files
from on_device import device_of

import engram_kernels  # noqa: F401
from engram_kernels import backends
from engram_kernels._library import COMPILE_ERROR

if not COMPILE_ERROR:
    from engram_kernels import _C

# the CPU kernels once per instruction set; what the machine cannot run is skipped with that reason
BACKENDS = ("reference", "cpu_portable", "cpu_avx2", "cpu_avx512", "cuda", "triton")


def pytest_configure():
    if os.environ.get("EK_EXPECT_SANITIZER") == "1" and not (COMPILE_ERROR is None and _C.sanitized):
        pytest.exit("the module under test was not built with the sanitizers", returncode=1)


def pytest_report_header():
    """Which backends the tests run on, and why not on the others."""
    ops = backends.ops()
    lines = [COMPILE_ERROR if COMPILE_ERROR else f"cpu instruction set: {_C.best_cpu_isa()}, sanitized: {_C.sanitized}"]
    for name in backends.BACKENDS:
        missing = sorted({backends.explain(op, name).partition(": ")[2] for op in ops if name not in backends.available(op)})
        lines.append(f"backend {name}: {'; '.join(missing) or 'available for every op'}")
    return lines


@pytest.fixture(autouse=True)
def poison():
    """Makes at::empty return NaN or the largest integer, in C++ too, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def device(request):
    """Where the tensors of a test go: with its backend."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"
    return device_of(backend)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Name of a backend of the op that the test file is named after."""
    op = request.path.stem.removeprefix("test_")
    name, _, isa = request.param.partition("_")
    if name not in backends.available(op):
        pytest.skip(backends.explain(op, name))
    if not isa:
        yield name
        return
    try:
        _C.set_cpu_isa(isa)
    except ValueError as err:
        pytest.skip(str(err))
    yield name
    _C.set_cpu_isa(_C.best_cpu_isa())


@pytest.fixture
def compiled():
    """Skips where the compiled module is missing."""
    if COMPILE_ERROR:
        pytest.skip(COMPILE_ERROR)


@pytest.fixture(params=row_files.IO)
def io(request, tmp_path):
    """How a file is read; what the system refuses is skipped with its reason."""
    if COMPILE_ERROR:
        pytest.skip(COMPILE_ERROR)
    (tmp_path / "probe").write_bytes(bytes(row_files.PAGE))
    try:
        row_files.open_reader(tmp_path / "probe", io=request.param)
    except ValueError as err:
        pytest.skip(str(err))
    (tmp_path / "probe").unlink()
    return request.param
