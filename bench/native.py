"""Compiles native_peers.cpp and gives its functions."""
import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_INT64S = np.ctypeslib.ndpointer(np.int64, flags="C_CONTIGUOUS")


@functools.cache
def peers() -> Any:
    """The library; skips where it cannot be built."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler was found")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peers.so"
        run = subprocess.run([compiler, "-O3", "-std=c++20", "-shared", "-fPIC", "-o", built,
                              Path(__file__).with_name("native_peers.cpp"), "-luring"], capture_output=True, text=True)
        if run.returncode != 0:
            pytest.skip(f"native_peers.cpp does not compile here: {run.stderr.splitlines()[0]}")
        library = ctypes.CDLL(str(built))
    library.raw_io_uring.argtypes = [ctypes.c_int, _INT64S, ctypes.c_int64, ctypes.c_int]
    library.raw_synchronous.argtypes = [ctypes.c_int, _INT64S, ctypes.c_int64]
    library.raw_io_uring.restype = library.raw_synchronous.restype = ctypes.c_double
    for name in ("lru_hits", "ideal_hits"):
        getattr(library, name).argtypes = [_INT64S, ctypes.c_int64, ctypes.c_int64]
        getattr(library, name).restype = ctypes.c_int64
    return library
