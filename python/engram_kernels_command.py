"""Starts `engram-kernels`: outside the package, since importing that takes seconds, in which Ctrl-C must leave no traceback."""
from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs the command; returns its exit code. Ctrl-C while all is imported is heeded when the command can say what it keeps."""
    before, pressed = signal.getsignal(signal.SIGINT), []
    deferred = before is signal.default_int_handler  # a job in the background ignores it, and shall
    if deferred:
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))

    def heed() -> None:
        if deferred:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt

    from engram_kernels.cli import main as cli
    return cli.main(heed_interrupts=heed)


if __name__ == "__main__":
    sys.exit(main())
