"""The repository's own rules, checked: a rule that no test holds is a rule that rots."""
import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import engram_kernels
from engram_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(p.stem for p in (ROOT / "python/engram_kernels/ops").glob("[!_]*.py"))
SOURCES = sorted(p for folder in ("csrc", "python", "triton_kernels", "bench", "tests") for p in (ROOT / folder).rglob("*")
                 if p.suffix in {".py", ".h", ".cpp", ".cu"} and "__pycache__" not in p.parts)
ISA_OBJECTS = sorted(p for isa in ("avx2", "avx512") for p in (ROOT / f"build/CMakeFiles/ek_kernels_{isa}.dir").rglob("*.o"))
CPP = [p for p in SOURCES if p.suffix in {".h", ".cpp", ".cu"} and ROOT / "tests/sim/ptxsim" not in p.parents]
MAX_FILE_LINES, MAX_CSRC_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES, MAX_COLUMNS = 400, 700, 80, 120, 130
# the PTX interpreter: one entry per instruction of the ISA manual, in one table; splitting it would only scatter the table
UNLIMITED = ROOT / "tests/sim/ptxsim"


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(node):
    """Lines of a function without its docstring, which may be as long as the contract needs."""
    doc = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def cpp_blocks(text):
    """(first line, last line) of every block of C++ that ends as clang-format ends a function, counted from 1: with a lone brace.

    Its first line is the last one before it that is indented as the brace is and is no comment, preprocessor line or label.
    """
    lines = text.splitlines()
    for end, line in enumerate(lines):
        brace = re.fullmatch(r"( *)}(  //.*)?", line)
        if brace is None or "// namespace" in line:
            continue
        opens = re.compile(rf"{brace[1]}(?! |//|#|}}|public:|private:|template <).")
        begin = next((i for i in range(end - 1, -1, -1) if opens.match(lines[i])), end)
        yield begin + 1, end + 1


def too_long(text):
    """The first lines of the C++ functions that have too many."""
    lines = text.splitlines()
    return [lines[begin - 1].strip() for begin, end in cpp_blocks(text)
            if end - begin + 1 > (MAX_KERNEL_LINES if "__global__" in lines[begin - 1] else MAX_FUNCTION_LINES)]


@pytest.mark.parametrize("op", OPS)
def test_op_has_its_files(op):
    wanted = [f"csrc/kernels/{op}/{op}.h", f"csrc/kernels/{op}/{op}_check.cpp", f"csrc/kernels/{op}/{op}_cpu.cpp",
              f"csrc/bindings/{op}_binding.cpp", f"python/engram_kernels/reference/{op}.py", f"tests/ops/test_{op}.py",
              f"bench/bench_{op}.py"]
    assert [w for w in wanted if not (ROOT / w).exists()] == []


def test_no_kernel_folder_without_an_op():
    assert sorted(p.name for p in (ROOT / "csrc/kernels").iterdir()) == OPS


@pytest.mark.parametrize("op", OPS)
def test_op_is_documented_and_registered(op):
    doc = inspect.getdoc(getattr(engram_kernels, op)) or ""
    assert [s for s in ("Args:", "Returns:", "Raises:", "Source:") if s not in doc] == []
    assert "reference" in backends.available(op)
    for backend in backends.BACKENDS:
        assert backends.explain(op, backend).startswith(f"{op}/{backend}: ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_file(path):
    text = path.read_text()
    limit = MAX_CSRC_LINES if ROOT / "csrc" in path.parents else MAX_FILE_LINES
    assert text.count("\n") <= limit or UNLIMITED in path.parents, "split the file"
    assert [n for n, line in enumerate(text.splitlines(), 1) if len(line) > MAX_COLUMNS] == []
    if "csrc" in path.parts and "bindings" not in path.parts:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10|pybind11)/', text), "torch belongs in csrc/bindings"
    if path.suffix == ".py" and UNLIMITED not in path.parents:
        assert [f.name for f in functions(path) if code_lines(f) > MAX_FUNCTION_LINES] == []
    if path in CPP:
        assert too_long(text) == []
    if path.parent.name == "reference":
        assert not re.search(r"^(from|import) engram_kernels", text, re.M), "a reference imports torch and nothing of ours"


@pytest.mark.parametrize(("before", "head", "limit"), [
    ("", "void f() {", MAX_FUNCTION_LINES), ("template <class T>\n", "T f(int a,\n    int b) {", MAX_FUNCTION_LINES),
    ("", "__global__ void __launch_bounds__(64)\n    f(int a) {", MAX_KERNEL_LINES),
    ("struct S {\n", "  int f() const {", MAX_FUNCTION_LINES)], ids=["function", "template", "kernel", "member"])
def test_layout_sees_long_cpp_functions(before, head, limit):
    indent = "  " if before.startswith("struct") else ""
    for lines in (limit, limit + 1):
        body = [f"{indent}  g();", "#pragma unroll"] * lines
        text = "\n".join([head, *body[:lines - 2 - head.count("\n")], indent + "}"])
        assert bool(too_long(before + text + "\n")) == (lines > limit)


def test_every_header_has_two_includers():
    """What one file includes belongs into that file: a reader has one place less to look."""
    included = [name for path in CPP for name in set(re.findall(r'#include "([^"]+)"', path.read_text()))]
    by_the_build = (ROOT / "CMakeLists.txt").read_text()  # names what it has compilers include
    headers = [p for p in CPP if p.suffix == ".h" and str(p.relative_to(ROOT)) not in by_the_build]
    assert [str(h.relative_to(ROOT)) for h in headers if sum(str(h).endswith(f"/{name}") for name in included) < 2] == []


@pytest.mark.skipif(not ISA_OBJECTS, reason="no build folder beside the sources")
@pytest.mark.parametrize("path", ISA_OBJECTS, ids=lambda p: f"{p.parts[-5]}/{p.name}")
def test_isa_object_exports_nothing_shared(path):
    """A weak symbol in an object built for AVX-512 could be the copy that the portable code is linked to."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if re.search(r" [WuV] ", line) and "DW.ref" not in line]
    assert shared == []


def test_tracked_files_name_no_machine():
    homes = r"(^|[^a-z_.])/(root|home)/[a-z]"
    tracked = subprocess.run(["git", "grep", "-nIE", f"{homes}|{re.escape(str(ROOT))}"], cwd=ROOT, capture_output=True, text=True)
    hits = [line for line in tracked.stdout.splitlines() if not line.startswith("tests/test_layout.py")]
    assert hits == []


def test_layout_compiled_code_uses_no_iostreams():
    """iostreams crash with two C++ libraries in a process (csrc/common/text.h). STABLE_ macros are newer than torch 2.10."""
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        assert not re.search(r"#include <(sstream|fstream|iostream|iomanip)>|STABLE_TORCH_ERROR", path.read_text()), path


# the floors of the package: a module imports from its own floor and from those below. What is in no list is the ground floor
FLOORS = (("table",), ("ops",), ("prefetch", "sharding", "training"), ("modules",), ("integrations",),
          ("profile", "plan", "allocation", "demo", "info"), ("cli",))
COMPILED = {"engram_kernels._C", "engram_kernels._C_cuda"}


def floor_of(module):
    _, _, part = module.partition(".")
    return next((i for i, names in enumerate(FLOORS, 1) if part.split(".")[0] in names), len(FLOORS) if not part else 0)


def imports_of(path, modules):
    """Modules of ours that a file imports, at its head or in a function; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    typing = {id(node) for branch in ast.walk(tree) if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
              for node in ast.walk(branch)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules or name in COMPILED else node.module for name in names}
    return found & set(modules)


def package_imports():
    package = ROOT / "python/engram_kernels"
    paths = {*package.rglob("*.py"), *(package / "triton_kernels" / p.name for p in (ROOT / "triton_kernels").glob("*.py"))}
    modules = {".".join(p.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: imports_of(path, modules) - {name} for name, path in modules.items()}


def test_layout_imports_go_down_the_floors():
    upward = [f"{name} imports {other}" for name, others in package_imports().items() for other in others
              if floor_of(other) > floor_of(name)]
    assert upward == []


def test_layout_imports_make_no_circle():
    graph, done, circles = package_imports(), set(), []

    def visit(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name):], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    assert circles == []
