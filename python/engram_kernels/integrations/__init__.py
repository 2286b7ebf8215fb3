"""Models of other libraries with a memory of this one."""
from engram_kernels.integrations import transformers

__all__ = ["transformers"]
