"""What all tests share. Two markers say how a test runs, and `make test` and `make test-all` choose by them:

    slow    only in `make test-all`, which CI runs. Repetition, further shapes of a kernel that runs in `make test` too.
            `slow_cases("triton-long")` marks the cases with these ids of a test whose others are fast.
    alone   with no other test process beside it, after the others: it asks for what the whole machine has (free huge
            pages, memory, undisturbed cores). All other tests run in as many processes as there are cores, so they may
            share no file name, port or name in /dev/shm: `tmp_path` and `shm` give each test its own folder.

Fixtures that files share (those of one topic lie in tests/support, which its files name in `pytest_plugins`):

    backend   name of a backend of the op that the file is named after. The CPU kernels run once per instruction set.
    isa       name of an instruction set of the CPU kernels, which is in use during the test.
    device    where the tensors of the test's backend lie.
    compiled  needs the compiled module.
    io        a way to read a file.
    poison    of every test: uninitialised memory is NaN.

A backend or an instruction set that cannot run on this machine has no cases at all; the header of the report says which
and why. With EK_CI=1 a test that is skipped for a reason outside `ci.ALLOWED_SKIPS` fails.
"""
import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: a thread that spins takes the other process's core

import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its products are deterministic with that, as `poison` demands
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must precede the import of triton

import ci
import row_files
from on_device import device_of

import engram_kernels  # noqa: F401
from engram_kernels import backends
from engram_kernels._library import COMPILE_ERROR, CUDA_ERROR

if not COMPILE_ERROR:
    from engram_kernels import _C

INSTRUCTION_SETS = ("portable", "avx2", "avx512")
ISAS = () if COMPILE_ERROR else INSTRUCTION_SETS[:INSTRUCTION_SETS.index(_C.best_cpu_isa()) + 1]
# folders and files whose tests all need what is not here: a path, and why not
ABSENT = {
    "gpu": "" if torch.cuda.is_available() or os.environ.get("EK_COLLECT_GPU") == "1" else "torch sees no GPU",
    "cuda_build": CUDA_ERROR if CUDA_ERROR and os.environ.get("EK_EXPECT_CUDA_BUILD") != "1" else "",
    "sim/ptxsim/tests/test_triton.py": "it compiles with Triton; make test-all runs it in a process with TRITON_INTERPRET=0"
                                       if os.environ.get("TRITON_INTERPRET") == "1" else "",
}
collect_ignore = [path for path, reason in ABSENT.items() if reason]


def pytest_configure(config):
    config.pluginmanager.register(ci, "engram-kernels-ci")
    if os.environ.get("EK_EXPECT_SANITIZER") == "1" and not (COMPILE_ERROR is None and _C.sanitized):
        pytest.exit("the module under test was not built with the sanitizers", returncode=1)
    if os.environ.get("EK_EXPECT_SIMDE") == "1" and not (COMPILE_ERROR is None and _C.emulates_avx512):
        pytest.exit("the module under test was not built with EK_SIMDE", returncode=1)
    # a process that compiles with Triton (TRITON_INTERPRET=0) has no device to run the kernels on
    wanted = ("cpu", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu",)
    if ci.IS_CI and (missing := [backends.explain(op, name) for op in backends.ops() for name in wanted
                                 if name not in backends.available(op)]):
        pytest.exit(f"EK_CI=1, but these backends are missing: {'; '.join(missing)}", returncode=1)


def pytest_report_header():
    """Which backends the tests run on, and why not on the others."""
    ops = backends.ops()
    lines = [COMPILE_ERROR or f"cpu instruction sets: {', '.join(ISAS)}{' (emulated)' if _C.emulates_avx512 else ''}"
             f"{' of ' + ', '.join(INSTRUCTION_SETS) if ISAS != INSTRUCTION_SETS else ''}, sanitized: {_C.sanitized}"]
    for name in backends.BACKENDS:
        missing = sorted({backends.explain(op, name).partition(": ")[2] for op in ops if name not in backends.available(op)})
        lines.append(f"backend {name}: {'no cases: ' + '; '.join(missing) if missing else 'available for every op'}")
    return lines + [f"not collected: tests/{path}: {reason}" for path, reason in ABSENT.items() if reason]


def pytest_generate_tests(metafunc):
    """Cases of `backend` and `isa`, of which only those that can run here are made."""
    given = {name.strip() for mark in metafunc.definition.iter_markers("parametrize")
             for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])}
    for fixture in {"backend", "isa"} & set(metafunc.fixturenames) - given:
        names = ISAS
        if fixture == "backend":
            op = getattr(metafunc.module, "OP", metafunc.definition.path.stem.removeprefix("test_"))
            here = ["cpu"] if os.environ.get("EK_EXPECT_SANITIZER") == "1" else backends.available(op)  # it watches compiled code
            names = [one for name in here for one in ([f"cpu_{isa}" for isa in ISAS] if name == "cpu" else [name])]
        metafunc.parametrize(fixture, names, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    """Cases that `slow_cases` names are slow."""
    for item in items:
        mark = item.get_closest_marker("slow_cases")
        if mark and item.callspec.id in mark.args:
            item.add_marker("slow")


def pytest_collection_finish():
    """A collection of garbage, of which the tests of tables make many, need not look at what outlives all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """The same of what earlier files keep: kernels that a simulator has read are millions of objects."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poison():
    """Makes at::empty return NaN or the largest integer, in C++ too, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def device(request):
    """Where the tensors of a test go: with its backend."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else "cpu"
    return device_of(backend)


@pytest.fixture
def isa(request):
    """An instruction set of the CPU kernels, in use."""
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(_C.best_cpu_isa())


@pytest.fixture
def backend(request):
    """Name of a backend of the op that the test file names as OP, or is named after."""
    name, _, isa = request.param.partition("_")
    if isa:
        _C.set_cpu_isa(isa)
    yield name
    if isa:
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
