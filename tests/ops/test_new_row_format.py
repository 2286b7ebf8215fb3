"""What a new row format takes: a made-up one, in a copy of the tree, in at most six files; then gather_rows reads it."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MAX_FILES = 6
# fp8 e4m3 with one float32 per 32 elements: (a text of the file, what stands in its place)
PATCH = {
    "csrc/common/row_format.h": [
        ("kInt8Group32 };\nenum class DType", "kInt8Group32, kFp8Group32 };\nenum class DType"),
        ("kNumRowFormats = 7;", "kNumRowFormats = 8;"),
        ("RowElement::kInt8, RowScale::kGroupF32, false};",
         "RowElement::kInt8, RowScale::kGroupF32, false};\n    case RowFormat::kFp8Group32:\n"
         "      return {\"fp8_e4m3_group32\", RowElement::kFp8E4m3, RowScale::kGroupF32, false};"),
        ("      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});",
         "      return f(std::integral_constant<RowFormat, RowFormat::kInt8Group32>{});\n    case RowFormat::kFp8Group32:\n"
         "      return f(std::integral_constant<RowFormat, RowFormat::kFp8Group32>{});"),  # both switches
        ("static_assert(kNumRowFormats == 7", "static_assert(kNumRowFormats == 8"),
    ],
    "python/engram_kernels/row_format.py": [
        ('    "int8_group32": RowFormat(', '    "fp8_e4m3_group32": RowFormat(torch.uint8, ("F8_E4M3", "U8"), torch.float32, '
         '("F32",), has_blocks=True),\n    "int8_group32": RowFormat('),
    ],
    "python/engram_kernels/reference/gather_rows.py": [
        ('    if row_format == "fp8_e4m3_tensor":\n        return values * scales\n',
         '    if row_format == "fp8_e4m3_tensor":\n        return values * scales\n    if row_format == "fp8_e4m3_group32":\n'
         '        return _by_group(values, scales)\n'),
    ],
    "triton_kernels/decode.py": [
        ("FLOAT, FP8_TENSOR, FP8_BLOCK, INT8_GROUP = (tl.constexpr(i) for i in range(4))",
         "FLOAT, FP8_TENSOR, FP8_BLOCK, INT8_GROUP, FP8_GROUP = (tl.constexpr(i) for i in range(5))"),
        ('"int8_group32": INT8_GROUP}', '"int8_group32": INT8_GROUP, "fp8_e4m3_group32": FP8_GROUP}'),
        ("        else:\n            values, factor = stored.to(tl.float32), scale\n",
         "        elif CODE == FP8_GROUP:\n            values, factor = fp8_e4m3_to_float(stored), scale\n"
         "        else:\n            values, factor = stored.to(tl.float32), scale\n"),
    ],
}
# the CPU op alone, for the plainest instruction set: the whole module takes minutes
SOURCES = ("csrc/common/*.cpp", "csrc/kernels/gather_rows/*_check.cpp", "csrc/kernels/gather_rows/*_cpu.cpp",
           "csrc/bindings/gather_rows_binding.cpp")
# by a formula of its own, in float64, against every backend: bit for bit, since a product of 4 and 24 bits is rounded once
CHECK = """
import sys, torch, engram_kernels as ek
from engram_kernels import backends
if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
rows, scales = torch.arange(256, dtype=torch.uint8).repeat(2).view(8, 64), torch.linspace(-3, 5, 16).view(8, 2)
rows[(rows & 127) == 127] = 1  # no NaN
table = ek.RowTable.from_tensor(rows, scales, "fp8_e4m3_group32")
ids = torch.tensor([[0, 7, -1], [3, 3, 5]])
wanted = (rows.view(torch.float8_e4m3fn).double().view(8, 2, 32) * scales.double()[..., None]).view(8, 64)
wanted = torch.where(ids[..., None] >= 0, wanted[ids], 0.0)
args = (table.rows, table.scales, ids, "fp8_e4m3_group32", 64, False)
for dtype in (torch.float32, torch.bfloat16):
    for backend in ("reference",) if len(sys.argv) > 1 else ("reference", "triton"):
        assert torch.equal(ek.gather_rows(table, ids, dtype, backend=backend), wanted.float().to(dtype)), backend
    if len(sys.argv) > 1:
        assert torch.equal(torch.ops.engram_kernels.gather_rows(*args, dtype), wanted.float().to(dtype)), "cpu"
print("equal on", "cpu" if len(sys.argv) > 1 else "triton")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, without compiled modules, that has the format."""
    tree = tmp_path_factory.mktemp("new_format")
    for folder in ("csrc", "triton_kernels", "python"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, changes in PATCH.items():
        text = (tree / name).read_text()
        for old, new in changes:
            assert old in text, f"{name} has no {old!r}: the patch of this test is to follow it"
            text = text.replace(old, new)
        (tree / name).write_text(text)
    return tree


def run_check(tree, *args, interpret="1"):
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tree / "python"), "TRITON_INTERPRET": interpret, "HOME": str(tree)}
    done = subprocess.run([sys.executable, "-c", CHECK, *map(str, args)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_new_row_format_touches_few_files(tree):
    assert len(PATCH) <= MAX_FILES
    changed = [str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() and not path.is_symlink()
               and "__pycache__" not in path.parts and "python/engram_kernels/triton_kernels" not in str(path)
               and path.read_bytes() != (ROOT / path.relative_to(tree)).read_bytes()]
    assert sorted(changed) == sorted(PATCH)


def test_new_row_format_in_the_reference_and_triton(tree):
    pytest.importorskip("triton")
    assert run_check(tree) == "equal on triton\n"


@pytest.mark.slow
def test_new_row_format_in_the_compiled_op(tree):
    compiler = shutil.which("g++") or pytest.skip("there is no C++ compiler")
    torch_root = Path(torch.__file__).parent
    sources = [path for pattern in SOURCES for path in sorted(tree.glob(pattern))]
    library = tree / "gather_rows.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-DEK_ONE_ISA",
             "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{tree / 'csrc'}", "-isystem", torch_root / "include"]
    subprocess.run([compiler, *flags, *sources, f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", library], check=True)
    assert run_check(tree, library) == "equal on cpu\n"


def test_new_row_format_is_named_nowhere_else():
    """Code that lists formats by hand would have to list this one too; in C++ the others ask the traits."""
    by_hand = [f"{path.relative_to(ROOT)}:{number}" for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()
               and path.name != "row_format.h" for number, line in enumerate(path.read_text().splitlines(), 1)
               if re.search(r"\bRowFormat::k", line)]
    assert by_hand == []
