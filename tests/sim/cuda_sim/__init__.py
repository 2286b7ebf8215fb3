"""Runs the project's CUDA launchers and kernels without a GPU: a fake CUDA runtime under the launchers, `ptxsim` under it.

Kernels are compiled once per content into build/cuda_sim. `Device.run(op, params)` calls the launcher as the binding does;
what it launches is executed by the simulator, always checked for races, and listed in `Device.launches`.
"""
from .build import MISSING_NVCC, MISSING_SASS, Build, build
from .device import Device, Launch, LaunchError, bytes_asked, poisoned

__all__ = ["MISSING_NVCC", "MISSING_SASS", "Build", "Device", "Launch", "LaunchError", "build", "bytes_asked", "poisoned"]
