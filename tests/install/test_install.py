"""The wheel, the sdist and fresh environments, as someone meets them who does not build from a checkout. `make test-wheel`.

EK_WHEEL names the repaired wheel, EK_WHEEL_PYTHONS the interpreters with different versions of torch.
"""
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEEL = Path(os.environ["EK_WHEEL"])
PYTHONS = os.environ["EK_WHEEL_PYTHONS"].split()
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "ENGRAM", "EK_", "LD_"))}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(WHEEL).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The sdist, unpacked below a path with spaces."""
    folder = tmp_path_factory.mktemp("s dist")
    code = f"import os, engram_kernels_build as b; os.chdir({str(ROOT)!r}); b.build_sdist({str(folder)!r})"
    env = CLEAN | {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(p for p in folder.iterdir() if p.is_dir())


def test_install_wheel_is_for_every_linux_of_four_years():
    tag = re.search(r"manylinux_2_(\d+)_", WHEEL.name)
    assert tag and int(tag[1]) <= 35, WHEEL.name


def test_install_wheel_holds_the_package(unpacked):
    for name in ("triton_kernels/gate.py", "profile/profile.schema.json", "data/sample.txt", "py.typed"):
        assert (unpacked / "engram_kernels" / name).is_file(), name


def test_install_wheel_is_without_the_cuda_kernels_of_an_earlier_build(unpacked):
    assert list(unpacked.glob("engram_kernels/_C.*.so")) and not list(unpacked.glob("engram_kernels/_C_cuda*"))


def test_install_wheel_names_no_path_of_its_build_machine(unpacked):
    paths = [str(p).encode() for p in (ROOT, Path(sys.prefix), Path(sys.base_prefix))]
    files = [p for p in unpacked.rglob("*") if p.is_file()]
    assert files and [(p.name, path) for p in files for path in paths if path + b"/" in p.read_bytes()] == []


def test_install_wheel_links_to_libtorch_and_the_system_alone(unpacked):
    module = next((unpacked / "engram_kernels").glob("_C.*.so"))
    dynamic = subprocess.run(["readelf", "-d", module], check=True, capture_output=True, text=True).stdout
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    needed = set(re.findall(r"\(NEEDED\).*\[(.*?)\.so", dynamic))
    assert needed <= {"libtorch_cpu", "libtorch", "libc10", "libstdc++", "libm", "libgcc_s", "libc",
                      "ld-linux-x86-64", "ld-linux-aarch64"}


RUN = """
import sys, torch, engram_kernels as ek
from engram_kernels import _library
assert _library.COMPILE_ERROR is None and _library.IO_NOTE is None, (_library.COMPILE_ERROR, _library.IO_NOTE)
for op in ek.backends.ops():
    assert "cpu" in ek.backends.available(op), op
layout = ek.EngramSpec.deepseek_v41().layout()
ids, ends = torch.tensor([5, 6, 7]), torch.tensor([0, 3], dtype=torch.int32)
assert torch.equal(ek.ngram_hash(ids, ends, layout, backend="cpu"), ek.ngram_hash(ids, ends, layout, backend="reference"))
table = ek.RowTable.create(sys.argv[1], torch.randn(64, 32), row_format="f32")
table = ek.RowTable.open(sys.argv[1], io="io_uring_buffered")
with ek.RowPrefetcher(table, out_dtype=torch.float32) as prefetcher:
    rows = prefetcher.wait(prefetcher.submit(torch.tensor([3, 1])))
    assert torch.equal(rows, ek.gather_rows(table, torch.tensor([3, 1]), torch.float32)), rows
x, w = torch.randn(3, 2, 8), torch.ones(2, 8)
ek.gate(x.requires_grad_(), torch.randn(3, 2, 8), torch.randn(3, 8), w, w, backend="cpu").sum().backward()
print("fine", torch.__version__)
"""


def test_install_wheel_runs_under_each_torch(unpacked, tmp_path):
    versions = set()
    for python in PYTHONS:
        run = subprocess.run([python, "-c", RUN, tmp_path / f"{len(versions)}.safetensors"], cwd=tmp_path, capture_output=True,
                             text=True, env=CLEAN | {"PYTHONPATH": str(unpacked)})
        assert run.returncode == 0 and run.stdout.startswith("fine"), run.stderr
        versions.add(run.stdout.split()[1])
    assert len(versions) == len(PYTHONS), versions


def test_install_sdist_holds_every_source(sdist):
    wanted = ["csrc", "triton_kernels", "python", "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    tracked = subprocess.run(["git", "ls-files", *wanted], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert len(tracked) > 200 and [name for name in tracked if not (sdist / name).exists()] == []


def test_install_sdist_builds_below_a_path_with_spaces(sdist, tmp_path):
    assert " " in str(sdist)
    built = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."],
                           cwd=sdist, env=CLEAN, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    names = {Path(n).name.partition(".")[0] for n in zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()}
    assert {"_C", "gate", "engram_kernels_command"} <= names


def fresh(folder, *packages):
    """An interpreter without anything but pip and `packages`."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "setuptools"], check=True, capture_output=True)
    if packages:
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, capture_output=True)
    return python


@pytest.mark.parametrize("packages, said", [
    ((), "building needs setuptools, which this environment lacks: pip install"),
    (("setuptools==65.5.0",), "building needs setuptools 77 or later, found 65.5.0: pip install"),
    (("setuptools>=77",), "engram-kernels: building needs pybind11: pip install"),
], ids=["python_3_12_as_it_comes", "python_3_11_as_it_comes", "setuptools_alone"])
def test_install_says_what_a_fresh_environment_lacks(packages, said, tmp_path):
    python = fresh(tmp_path / "venv", *packages)
    run = subprocess.run([python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", str(ROOT)],
                         env=CLEAN | {"EK_BUILD_DIR": str(tmp_path / "build")}, capture_output=True, text=True)
    assert run.returncode != 0 and said in run.stdout + run.stderr, run.stderr


def test_install_without_a_compiler_in_a_fresh_environment(tmp_path):
    python = fresh(tmp_path / "venv", "setuptools>=77")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", str(ROOT)], check=True,
                   env=CLEAN | {"ENGRAM_KERNELS_NO_EXT": "1"}, capture_output=True)
    site = next((tmp_path / "venv/lib").glob("python*/site-packages/engram_kernels"))
    assert (site / "triton_kernels/gate.py").is_file() and not list(site.glob("_C*.so"))


ELSEWHERE = """
import runpy, sys, setuptools
setuptools.setup = lambda **options: None
build = runpy.run_path(sys.argv[1])["CMakeBuild"]
sys.platform = sys.argv[2]
build.build_extension(None, setuptools.Extension("engram_kernels._C", []))
"""


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_install_elsewhere_says_what_works(platform, tmp_path):
    run = subprocess.run([sys.executable, "-c", ELSEWHERE, ROOT / "setup.py", platform], cwd=tmp_path, env=CLEAN,
                         capture_output=True, text=True)
    said = f"the compiled module needs Linux, this is {platform}; set ENGRAM_KERNELS_NO_EXT=1"
    assert run.returncode != 0 and said in run.stderr.splitlines()[-1]


WITHOUT_POSIX = """
import torch, sys, os

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
sys.modules.pop("fcntl", None), sys.modules.pop("resource", None)
for name in ("posix_fallocate", "O_DIRECT", "O_CLOEXEC", "sched_getaffinity", "preadv", "geteuid", "register_at_fork"):
    delattr(os, name)
import engram_kernels as ek
from engram_kernels.cli.main import main
table = ek.RowTable.from_tensor(torch.randn(8, 4), row_format="f32")
assert torch.equal(ek.gather_rows(table, torch.tensor([1]), torch.float32, backend="reference")[0], table.rows[1])
assert main(["info"]) == 0
sys.platform = "win32"
try:
    table.share("x")
except OSError as err:
    print(err)
"""


def test_install_the_references_run_without_what_only_posix_has():
    env = CLEAN | {"PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.splitlines()[-1].endswith("RowTable.share: needs Linux, this is win32; the ops' "
                                                                        "reference backend runs here"), run.stderr
