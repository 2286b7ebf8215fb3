"""README, docs and what the code says about files: blocks run, links resolve, named files exist, the README keeps its budget."""
import ast
import atexit
import contextlib
import functools
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tokenize
from pathlib import Path

import miniatures
import pytest
import torch

import engram_kernels as ek
from engram_kernels.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
OPS = sorted(p.stem for p in (ROOT / "python/engram_kernels/ops").glob("[!_]*.py"))
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(t for t in TRACKED if re.fullmatch(r"docs/\w+\.md", t))]
ENDS = {"/".join(Path(t).parts[n:]) for t in TRACKED if (ROOT / t).exists() for n in range(len(Path(t).parts))}
CODE = sorted(t for t in TRACKED if t.endswith((".py", ".h", ".cpp", ".cu")) and not t.startswith("tests/golden/"))
MAX_LINES, MAX_WORDS, MAX_PARAGRAPH_WORDS, MAX_CELL = 139, 1300, 50, 120
# files of other projects and of the user that a comment may name
FOREIGN = re.compile(r"(engram_demo_v1|modular_\w+|modeling_\w+|longcat_flash_ngram|convert)\.py|"
                     r"(liburing|mempolicy|nvml|malloc)\.h")
FILE = re.compile(r"(?<![\w/.*{-])((?:[\w.<>-]+/)*[\w<>-]+\.(?:py|h|cpp|cu|md|png))\b(?!\()")


def fences(page):
    """(language, text) of each fenced block of a page."""
    return [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.S | re.M)]


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```$", "", (ROOT / page).read_text(), flags=re.S | re.M)


PYTHON_BLOCKS = [(page, i) for page in PAGES for i in range(sum(lang == "python" for lang, _ in fences(page)))]
# they start a Ray runtime, which takes 5 to 20 s: in make test-all alone, for which Ray is installed
RAY_PAGES = {page for page in PAGES if any(lang == "python" and "ray.init(" in text for lang, text in fences(page))}


def command_lines(page):
    """What a page says to type: lines of its shell blocks, and what stands between backquotes."""
    lines = [line for lang, text in fences(page) if lang in ("", "bash") for line in text.splitlines()]
    in_blocks = [line.partition("#")[0].strip() for line in lines if line.startswith("engram-kernels ")]
    return in_blocks + re.findall(r"`(engram-kernels [^`]+)`", prose(page).replace("\n", " "))


COMMANDS = sorted({(page, line) for page in PAGES for line in command_lines(page)})


@functools.cache
def run_block(page, index):
    """(names after it, what it printed) of a Python block; the blocks of a page run one after the other, as a reader's would."""
    names = {} if index == 0 else dict(run_block(page, index - 1)[0])
    block = [text for lang, text in fences(page) if lang == "python"][index]
    out, here = io.StringIO(), Path.cwd()
    os.chdir(published_models() if page == "docs/models.md" else here)
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(block, f"{page}, Python block {index}", "exec"), names)
    finally:
        os.chdir(here)
    return names, out.getvalue()


@functools.cache
def published_models():
    """A folder with miniatures under the names of the published models, which docs/models.md opens."""
    folder = Path(tempfile.mkdtemp(prefix="engram-kernels-docs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, make in (("DeepSeek-V4.1-Flash", miniatures.v41), ("DeepSeek-V4.1-Flash-int8", lambda: miniatures.v41("int8")),
                       ("Qwen3.8-Flash-Next", miniatures.qwen), ("Qwen3.8-Flash-Next-FP8", lambda: miniatures.qwen("fp8")),
                       ("LongCat-Flash-Lite", miniatures.longcat), ("Engram-demo", miniatures.demo)):
        make().write(folder / name)
    return folder


def shown_after(page, index):
    """The text block that stands directly below a Python block, or None."""
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n.*?^```\n(?:```text\n(.*?)^```$)?", text, re.S | re.M))
    return blocks[index][1]


@pytest.mark.parametrize(("page", "index"), [
    pytest.param(page, i, id=f"{page}-{i}", marks=[pytest.mark.slow, pytest.mark.alone] if page in RAY_PAGES else [])
    for page, i in PYTHON_BLOCKS])
def test_python_block_runs_and_prints_what_the_page_shows(page, index, monkeypatch):
    if page in RAY_PAGES:
        pytest.importorskip("ray", reason="ray is not installed: pip install 'engram-kernels[ray]'")
        monkeypatch.setenv("RAY_ADDRESS", "local")  # a cluster that is named there is somebody else's
        monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 without: a busy machine lets an actor wait for minutes
    printed, shown = run_block(page, index)[1].strip(), shown_after(page, index)
    assert (shown is None) == (printed == ""), "what a block prints stands below it"
    if shown is not None:  # numbers may differ in the last digit that is shown, from one CPU to another
        number = re.compile(r"-?\d+\.\d+")
        assert number.sub("#", printed) == number.sub("#", shown.strip())
        for got, want in zip(number.findall(printed), number.findall(shown), strict=True):
            assert abs(float(got) - float(want)) <= 0.02 * abs(float(want)) + 0.0051


def test_plain_gate_of_the_readme_is_the_gate():
    names = run_block("README.md", 1)[0]
    torch.manual_seed(0)
    args = [torch.randn(5, 2, 64), torch.randn(5, 2, 64), torch.randn(5, 64), torch.rand(2, 64), torch.rand(2, 64)]
    torch.testing.assert_close(ek.gate(*args), names["plain_gate"](*args))


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{p}-{c}" for p, c in COMMANDS])
def test_command_line_parses(page, line):
    arguments = shlex.split(line.replace("SOURCE TARGET", "a b"))[1:]
    if not arguments or arguments[0].startswith("-") or "|" in arguments:
        pytest.fail(f"{line}: expected a command")
    named_alone = {"check": ["folder"], "pack": ["source", "target"],
                   "quantize": ["source", "target", "--row-format", "nvfp4"]}
    if len(arguments) == 1:
        arguments += named_alone.get(arguments[0], [])
    try:
        _, unknown = cli.make_parser()[0].parse_known_args(arguments)
    except SystemExit:
        pytest.fail(f"{line}: not what the parser takes")
    assert unknown == []


def test_plan_prints_what_the_page_shows(capsys):
    command, shown = re.search(r"^```\n(engram-kernels plan [^\n]*--no-measure)\n```\n```text\n(.*?)^```$",
                               (ROOT / "docs/plan.md").read_text(), re.S | re.M).groups()
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out == shown


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    target = re.compile(r"\bmake ((?:test|bench|lint|demo|cuda|format|wheel)[\w-]*)")
    named = {(page, name) for page in PAGES for name in target.findall((ROOT / page).read_text())}
    assert named and [n for n in sorted(named) if not re.search(rf"^{n[1]}:", makefile, re.M)] == []


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", [t for t in TRACKED if t.endswith(".md")])
def test_links_resolve(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in {slug(h) for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)}):
            wrong.append(target)
    assert wrong == []


def comments(path):
    """Comments and docstrings of a source file, as one text."""
    text = (ROOT / path).read_text()
    if not path.endswith(".py"):
        return "\n".join(re.findall(r"//(.*)$", text, re.M))
    found = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n".join(found + [ast.get_docstring(n) or "" for n in ast.walk(ast.parse(text)) if isinstance(n, documented)])


def exists(name, beside):
    """Whether a named file is there: from the root, from the naming file's folder, or as the end of a tracked path."""
    paths = [name.replace("<op>", op) for op in OPS] if "<op>" in name else [name]
    return any(path in ENDS or (ROOT / path).exists() or ((ROOT / beside).parent / path).exists() for path in paths)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"https?://\S+", "", (ROOT / page).read_text())
    assert [n for n in FILE.findall(text) if not FOREIGN.fullmatch(n.rpartition("/")[2]) and not exists(n, page)] == []


@pytest.mark.parametrize("folder", ["csrc", "python", "triton_kernels", "tests", "bench", "examples"])
def test_files_that_the_code_names_exist(folder):
    wrong = []
    for path in (c for c in CODE if c.startswith(f"{folder}/")):
        for name in FILE.findall(re.sub(r"https?://\S+", "", comments(path))):
            if not FOREIGN.fullmatch(name.rpartition("/")[2]) and not exists(name, path):
                wrong.append((path, name))
    assert wrong == []


def test_nothing_cites_a_document_that_is_not_here():
    found = subprocess.run(["git", "grep", "-nIiE", r"semantics\.md|semantics,? [0-9]|\b(HOUSE|DESIGN|STYLE)\.md"], cwd=ROOT,
                           capture_output=True, text=True)
    assert [line for line in found.stdout.splitlines() if not line.startswith("tests/test_docs.py")] == []


RATE = re.compile(r"\b(rows|bytes|ids|ns|us|ms|tokens|values|positions|GPUs|calls|memory|lookup|exposed|seconds|entry|page)"
                  r" an? (second|minute|token|row|id|call|step|layer|op|branch|block|GPU|node|page|batch)\b(?!'| gathers)")
SAYS_PER = ("bench/bench", "bench/harness", "bench/gpu", "python/engram_kernels/profile/", "python/engram_kernels/plan/",
            "python/engram_kernels/demo/", "python/engram_kernels/testing/")


def test_per_is_per():
    """"Rows per second", never "rows a second": in pages, in prose about measuring and planning, and in what they print."""
    texts = {path: (ROOT / path).read_text() for path in [*PAGES, *CODE] if path in PAGES or path.startswith(SAYS_PER)}
    found = [(path, match[0]) for path, text in texts.items() for match in RATE.finditer(text)]
    assert found == []


def test_readme_keeps_its_budget():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    paragraphs = [p for p in re.split(r"\n\s*\n|\n(?=- )", prose("README.md")) if not p.lstrip().startswith("|")]
    assert [p for p in paragraphs if len(p.split()) > MAX_PARAGRAPH_WORDS] == []
    cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.strip("|").split(" | ")]
    assert [cell for cell in cells if len(cell) > MAX_CELL] == []


def test_readme_names_every_op():
    table = (ROOT / "README.md").read_text()
    for op in OPS:
        row = next((line for line in table.splitlines() if line.startswith(f"| [`{op}`](docs/ops.md#{op})")), None)
        assert row is not None, f"README has no row for {op}"
        assert f"tests/ops/test_{op}.py" in row


def test_readme_names_every_command():
    commands = cli.make_parser()[1]
    shown = re.findall(r"^\| `engram-kernels (\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(shown) == sorted(commands)


@pytest.mark.parametrize("word", ["M", "branch", "canonical id", "packed", "staged", "UVA", "exposed"])
def test_glossary_has_the_word(word):
    glossary = (ROOT / "docs/concepts.md").read_text().partition("## Glossary")[2]
    first = [line.split("|")[1] for line in glossary.splitlines() if line.startswith("| ")]
    assert any(word in re.split(r"[,\s]+|\(.*\)", cell) or word in cell for cell in first), word
