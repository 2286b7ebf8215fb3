"""Comparison rules and input generators, shipped so that users can check their own machine."""
from engram_kernels.testing.inputs import random_rows
from engram_kernels.testing.numeric import assert_as_accurate_as_torch, assert_rounded_once

__all__ = ["assert_as_accurate_as_torch", "assert_rounded_once", "random_rows"]
