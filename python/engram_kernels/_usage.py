"""What the commands say of arguments that make no sense, and of files that cannot be written, before any work is done."""
from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path


class UsageError(Exception):
    """An argument makes no sense; the message says which. The command ends with exit code 2."""


def finite(text: str) -> float:
    """A number of the command line, for argparse: "nan" and "inf" are none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number")
    return value


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or a socket, which is written to and not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def expect_writable(option: str, path: Path | None) -> None:
    """Makes sure that a file can be written at `path`, its folder made where it is missing; None: nothing is asked.

    Raises:
        UsageError: it cannot; names the option and the reason.
    """
    if path is None:
        return
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path} is a folder, expected a file")
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(0, "it may not be written to")
        else:
            _expect_room(path.resolve().parent)
    except OSError as err:
        raise UsageError(f"{option} {path} cannot be written: {err.strerror}") from None


def expect_writable_folder(option: str, path: Path | None) -> None:
    """The same for a folder that files are put into."""
    if path is None:
        return
    if path.exists() and not path.is_dir():
        raise UsageError(f"{option} {path} is no folder")
    try:
        _expect_room(path)
    except OSError as err:
        raise UsageError(f"{option} {path} cannot be written: {err.strerror}") from None


def _expect_room(folder: Path) -> None:
    """Makes a file there and takes it away; permissions alone do not tell of read-only file systems, nor of root."""
    folder.mkdir(parents=True, exist_ok=True)
    number, path = tempfile.mkstemp(dir=folder, prefix=".engram-kernels-")
    os.close(number)
    os.unlink(path)
