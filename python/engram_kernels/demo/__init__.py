"""The `engram-kernels demo` command."""
from engram_kernels.demo.main import SAMPLE, DemoError, DemoOptions, run_demo

__all__ = ["SAMPLE", "DemoError", "DemoOptions", "run_demo"]
