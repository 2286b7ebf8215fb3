"""The torch op library `engram_kernels`, and the compiled module when it was built.

Schemas, fakes and autograd live in ops/<op>.py; the implementations are registered by importing the compiled module.
"""
import torch

LIB = torch.library.Library("engram_kernels", "DEF")

COMPILE_ERROR: str | None
try:
    import engram_kernels._C  # noqa: F401  registers the CPU kernels
except ImportError as err:
    COMPILE_ERROR = f"the compiled module is missing: {err}"  # shown by backends.explain(), never swallowed
else:
    COMPILE_ERROR = None
