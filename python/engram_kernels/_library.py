"""The torch op library `engram_kernels`, and the compiled module when it was built.

Schemas, fakes and autograd live in ops/<op>.py; the implementations are registered by importing the compiled module.
"""
import torch

LIB = torch.library.Library("engram_kernels", "DEF")

COMPILE_ERROR: str | None
try:
    import engram_kernels._C
except ImportError as err:
    COMPILE_ERROR = f"the compiled module is missing: {err}"  # shown by backends.explain(), never swallowed
else:
    COMPILE_ERROR = None

# what a build without liburing loses; shown once by `demo`, `info` and the stats of a table in a file
IO_NOTE: str | None = None
if COMPILE_ERROR is None and not engram_kernels._C.io_uring:
    IO_NOTE = ("this build has no io_uring (liburing was not found): threads call pread instead, with which hiding a step's "
               "fetch behind compute cost 40 % of the step on 2 cores, where io_uring cost 1 %; install liburing-dev and build "
               "again")

CUDA_ERROR: str | None  # why the CUDA kernels cannot be called, whether or not there is a device
if torch.version.cuda is None:
    CUDA_ERROR = "this torch was built without CUDA"
else:
    try:
        import engram_kernels._C_cuda
    except ImportError as err:
        CUDA_ERROR = f"the CUDA library is missing (build with ENGRAM_KERNELS_CUDA=1): {err}"
    else:
        CUDA_ERROR = None


def need_compiled(what: str) -> None:
    """Raises a RuntimeError that says what needs the compiled module, and how to get it, where there is none."""
    if COMPILE_ERROR:
        raise RuntimeError(f"{what} needs the compiled module: install a C++ compiler, CMake and ninja, and install "
                           f"engram-kernels again without ENGRAM_KERNELS_NO_EXT ({COMPILE_ERROR})")
