"""Faults in the stream of a prefetcher's engine: `engine_faults.cpp`, compiled once per process that runs tests."""
import ctypes
import functools

from io_faults import compiled

from engram_kernels import _C


@functools.cache
def library():
    loaded = compiled("engine_faults.cpp")
    loaded.ek_engine_faults.restype = ctypes.c_void_p
    loaded.ek_engine_faults.argtypes = [ctypes.c_uint64, ctypes.c_double, ctypes.c_int, ctypes.c_bool]
    return loaded


def faulty_engine(num_threads, has_device_memory=False, seed=0, error=0.0, max_delay_us=0, reorder=False):
    """An engine of CPU threads with these faults; see engine_faults.h."""
    faults = library().ek_engine_faults(seed, error, max_delay_us, reorder)  # a few bytes that live as long as the process
    wrapper = ctypes.cast(library().ek_add_engine_faults, ctypes.c_void_p).value
    return _C.wrap_engine(_C.host_engine(num_threads, has_device_memory), wrapper, faults)
