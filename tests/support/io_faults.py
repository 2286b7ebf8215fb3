"""Faults in the reads of a file: `io_faults.cpp`, compiled once per process that runs tests, between a reader and its queues."""
import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def compiled(name):
    """The library of a source file beside this one."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = Path(__file__).with_name(name)
    path = Path(folder) / source.with_suffix(".so").name
    # sanitizers of the module that is tested have their own allocator; this library must find it, and no second one
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", str(source),
                    "-o", str(path)], check=True, env=environment)
    return ctypes.CDLL(str(path))


@functools.cache
def library():
    loaded = compiled("io_faults.cpp")
    loaded.ek_io_faults.restype = loaded.ek_io_faults_wrapper.restype = ctypes.c_void_p
    loaded.ek_io_faults.argtypes = [ctypes.c_uint64, ctypes.c_double, ctypes.c_double, ctypes.c_bool, ctypes.c_int,
                                    ctypes.c_int64, ctypes.c_int64, ctypes.c_bool]
    return loaded


def inject_faults(reader, seed=0, eio=0.0, shorter=0.0, reorder=False, max_delay_us=0, bad_begin=0, bad_end=0,
                  refuse_direct=False):
    """What goes wrong with the reads of a `_C.FileReader` from the next call on; see io_faults.h."""
    faults = library().ek_io_faults(seed, eio, shorter, reorder, max_delay_us, bad_begin, bad_end, refuse_direct)
    reader.wrap_queues(library().ek_io_faults_wrapper(), faults)  # a few bytes that live as long as the process
