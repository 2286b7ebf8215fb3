"""Starts `engram-kernels`: outside the package, since importing that takes seconds.

 1. The package is made known, but not run, so that its cli/ can be imported without torch.
 2. The arguments are read: --help, --version and a wrong argument end here.
 3. The package is run, which imports torch and registers the ops. Ctrl-C meanwhile leaves no traceback.
 4. The command runs.
"""
from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable


def main() -> int:
    """Runs the command; returns its exit code. Ctrl-C during the imports is heeded when the command can say what it keeps."""
    before, pressed = signal.getsignal(signal.SIGINT), []
    deferred = before is signal.default_int_handler  # a job in the background ignores it, and shall
    if deferred:
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))

    def heed() -> None:
        if deferred:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt

    run_package = _enter_package()
    from engram_kernels.cli import main as cli
    return cli.main(run_package=run_package, heed_interrupts=heed)


def _enter_package() -> Callable[[], None]:
    """Makes `engram_kernels` importable part by part without running its __init__.py; returns what runs that."""
    spec = None if "engram_kernels" in sys.modules else importlib.util.find_spec("engram_kernels")
    if spec is None or spec.loader is None:
        return lambda: None
    loader, package = spec.loader, importlib.util.module_from_spec(spec)
    sys.modules["engram_kernels"] = package
    return lambda: loader.exec_module(package)


if __name__ == "__main__":
    sys.exit(main())
