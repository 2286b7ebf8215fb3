"""Runs the project's Triton kernels without a GPU: a worker process compiles what is launched, `ptxsim` executes the PTX.

The test process has TRITON_INTERPRET=1, under which Triton compiles nothing; so variants are compiled by a process without it.
`simulate(call)` runs a launch function on CPU tensors and returns what it launched, with counters.
"""
from .compiler import MISSING_TRITON, Compiled, compile_variants
from .device import Launch, simulate, total

__all__ = ["MISSING_TRITON", "Compiled", "Launch", "compile_variants", "simulate", "total"]
