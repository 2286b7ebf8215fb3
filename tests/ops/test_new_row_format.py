"""What a new row format takes: a made-up one, in a copy of the tree, in at most six files; then gather_rows reads it."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_sim import MISSING_NVCC

ROOT = Path(__file__).resolve().parents[2]
MAX_FILES = 6
FOLDERS = ("csrc", "triton_kernels", "python", "tests/sim", "tests/support")
# fp8 e4m3 with one float32 per 32 elements: (a text of the file, what stands in its place)
PATCH = {
    "csrc/common/row_format.h": [
        ("kInt8Group32,\n  kFp8Row,", "kInt8Group32,\n  kFp8Group32,\n  kFp8Row,"),
        ("kNumRowFormats = 10;", "kNumRowFormats = 11;"),
        ("RowElement::kInt8, RowScale::kGroupF32, 32};",
         "RowElement::kInt8, RowScale::kGroupF32, 32};\n    case RowFormat::kFp8Group32:\n"
         "      return {\"fp8_e4m3_group32\", RowElement::kFp8E4m3, RowScale::kGroupF32, 32};"),
        ("      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});",
         "      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});\n    case RowFormat::kFp8Group32:\n"
         "      return f(std::integral_constant<RowFormat, RowFormat::kFp8Group32>{});"),  # both switches
        ("static_assert(kNumRowFormats == 10", "static_assert(kNumRowFormats == 11"),
    ],
    "python/engram_kernels/row_format.py": [
        ('    "int8_group32": RowFormat(torch.int8, ("I8",), torch.float32, ("F32",), block=32),\n',
         '    "int8_group32": RowFormat(torch.int8, ("I8",), torch.float32, ("F32",), block=32),\n    "fp8_e4m3_group32": '
         'RowFormat(torch.uint8, ("F8_E4M3", "U8"), torch.float32, ("F32",), block=32),\n'),
    ],
    "python/engram_kernels/reference/gather_rows.py": [
        ('    if row_format in ("fp8_e4m3_tensor", "fp8_e4m3_row"):\n        return values * scales\n',
         '    if row_format in ("fp8_e4m3_tensor", "fp8_e4m3_row"):\n        return values * scales\n'
         '    if row_format == "fp8_e4m3_group32":\n'
         '        return _by_group(values, scales)\n'),
    ],
    "triton_kernels/decode.py": [
        ("FP8_ROW, NVFP4, MXFP4 = (tl.constexpr(i) for i in range(7))",
         "FP8_ROW, FP8_GROUP, NVFP4, MXFP4 = (tl.constexpr(i) for i in range(8))"),
        ('"mxfp4": MXFP4}', '"mxfp4": MXFP4, "fp8_e4m3_group32": FP8_GROUP}'),
        ("        else:\n            values, factor = stored.to(tl.float32), scale\n",
         "        elif CODE == FP8_GROUP:\n            values, factor = fp8_e4m3_to_float(stored), scale\n"
         "        else:\n            values, factor = stored.to(tl.float32), scale\n"),
    ],
}
# the CPU op alone, for the plainest instruction set: the whole module takes minutes
SOURCES = ("csrc/common/*.cpp", "csrc/kernels/gather_rows/*_check.cpp", "csrc/kernels/gather_rows/*_cpu.cpp",
           "csrc/bindings/gather_rows_binding.cpp")
# by a formula of its own, in float64, against a backend: bit for bit, since a product of 4 and 24 bits is rounded once
CHECK = """
import sys, torch, engram_kernels as ek
rows, scales = torch.arange(256, dtype=torch.uint8).repeat(2).view(8, 64), torch.linspace(-3, 5, 16).view(8, 2)
rows[(rows & 127) == 127] = 1  # no NaN
name, ids = "fp8_e4m3_group32", torch.arange(-1, 8).repeat(8).view(8, 9)
table = ek.RowTable.from_tensor(rows, scales, name)
wanted = (rows.view(torch.float8_e4m3fn).double().view(8, 2, 32) * scales.double()[..., None]).view(8, 64)
wanted = torch.where(ids[..., None] >= 0, wanted[ids], 0.0)

def compare(backend, gather):
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(gather(dtype).view(torch.uint8), wanted.float().to(dtype).view(torch.uint8)), (backend, dtype)

compare("reference", lambda dtype: ek.gather_rows(table, ids, dtype, backend="reference"))
backend = sys.argv[1]
if backend == "triton":
    compare(backend, lambda dtype: ek.gather_rows(table, ids, dtype, backend=backend))
elif backend == "cpu":
    torch.ops.load_library(sys.argv[2])
    compare(backend, lambda dtype: torch.ops.engram_kernels.gather_rows(table.rows, table.scales, ids, name, 64, False, dtype))
elif backend == "cuda":
    from cuda_sim import Device
    from test_gather_rows_cuda_sim import WAYS, simulate
    for way, multiprocessors in WAYS.items():
        device = Device(multiprocessors, ops=("gather_rows_cuda", "gather_rows_direct_cuda"))
        compare(way, lambda dtype: simulate(rows, scales, ids.flatten(), name, 64, dtype, device=device)[0].view(8, 9, 64))
        assert all(("warp_per_row" in launch.kernel) == (way == "warp_per_row") for launch in device.launches)
        assert len(device.launches) == 2
print("equal on", backend)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, without compiled modules, that has the format."""
    tree = tmp_path_factory.mktemp("new_format")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, changes in PATCH.items():
        text = (tree / name).read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r}: the patch of this test is to follow it"
            text = text.replace(old, new)
        (tree / name).write_text(text)
    return tree


def run_check(tree, *args):
    nvcc = [str(Path(shutil.which("nvcc")).parent)] if shutil.which("nvcc") else []
    here = ":".join(str(tree / folder) for folder in ("python", "tests/sim", "tests/support"))
    env = {"PATH": ":".join([*nvcc, "/usr/bin", "/bin"]), "PYTHONPATH": here,
           "TRITON_INTERPRET": "1", "HOME": str(tree)}
    done = subprocess.run([sys.executable, "-c", CHECK, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_new_row_format_touches_few_files(tree):
    assert len(PATCH) <= MAX_FILES
    changed = [str(path.relative_to(tree)) for folder in FOLDERS for path in (tree / folder).rglob("*")
               if path.is_file() and not path.is_symlink()
               and "__pycache__" not in path.parts and "python/engram_kernels/triton_kernels" not in str(path)
               and path.read_bytes() != (ROOT / path.relative_to(tree)).read_bytes()]
    assert sorted(changed) == sorted(PATCH)


def test_new_row_format_in_the_reference_and_triton(tree):
    pytest.importorskip("triton")
    assert run_check(tree, "triton") == "equal on triton\n"


@pytest.mark.slow
def test_new_row_format_in_the_compiled_op(tree):
    compiler = shutil.which("g++") or pytest.skip("there is no C++ compiler")
    torch_root = Path(torch.__file__).parent
    sources = [path for pattern in SOURCES for path in sorted(tree.glob(pattern))]
    library = tree / "gather_rows.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-DEK_ONE_ISA",
             "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{tree / 'csrc'}", "-isystem", torch_root / "include"]
    subprocess.run([compiler, *flags, *sources, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", library], check=True)
    assert run_check(tree, "cpu", library) == "equal on cpu\n"


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING_NVCC), reason=MISSING_NVCC)
def test_new_row_format_in_the_cuda_kernel_on_the_simulator(tree):
    assert run_check(tree, "cuda") == "equal on cuda\n"


def test_new_row_format_is_named_nowhere_else():
    """Code that lists formats by hand would have to list this one too; in C++ the others ask the traits."""
    by_hand = [f"{path.relative_to(ROOT)}:{number}" for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()
               and path.name != "row_format.h" for number, line in enumerate(path.read_text().splitlines(), 1)
               if re.search(r"\bRowFormat::k", line)]
    assert by_hand == []
