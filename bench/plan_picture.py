"""The picture of a plan in docs/: runs `engram-kernels plan` on a recorded terminal. Needs rich, pillow and Chromium.

    python bench/plan_picture.py docs/plan.png --profile profile.json --gpu h100 --host-gib 512
"""
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console

from engram_kernels.cli import main as cli
from engram_kernels.plan import report

WIDTH = 190  # columns


def main():
    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("needs Chromium on the PATH")
    console = Console(record=True, width=WIDTH, force_terminal=True, highlight=False, file=io.StringIO())
    console.print(f"$ engram-kernels plan {' '.join(arguments)}", markup=False, style="bold")
    plain = report.Printer
    report.Printer = lambda out=None: plain(out, console)
    with contextlib.redirect_stderr(sys.stdout):
        code = cli.main(["plan", *arguments])
    if code:
        raise SystemExit(code)
    svg = console.export_svg(title="engram-kernels plan")
    width, height = (float(x) for x in svg.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "plan.html"
        page.write_text(f"<body style='margin:0'>{svg}</body>")
        subprocess.run([chromium, "--headless", "--no-sandbox", "--hide-scrollbars", f"--screenshot={out.resolve()}",
                        f"--window-size={width:.0f},{height:.0f}", page.as_uri()], check=True, capture_output=True)
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main()
