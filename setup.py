"""Builds engram-kernels: Python and, unless ENGRAM_KERNELS_NO_EXT=1, the compiled module through CMake and ninja.
ENGRAM_KERNELS_CUDA=1 adds the CUDA kernels (nvcc 13, any torch).
ENGRAM_KERNELS_REQUIRE_IO_URING=1 refuses to build without liburing.

torch is taken as found, so build without isolation: pip install --no-build-isolation .
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_EXT = os.environ.get("ENGRAM_KERNELS_NO_EXT") == "1"
CUDA = os.environ.get("ENGRAM_KERNELS_CUDA") == "1"
# setuptools must know each by name, or an editable install leaves it in the build folder
EXTENSIONS = ["engram_kernels._C", *(["engram_kernels._C_cuda"] if CUDA else [])]


def cuda_options() -> list[str]:
    """CMake options of the CUDA kernels. nvcc may be a wrapper; CMake wants the one that lies in its toolkit."""
    if not CUDA:
        return ["-DEK_CUDA=OFF"]
    if shutil.which("nvcc") is None:
        raise SystemExit("engram-kernels: ENGRAM_KERNELS_CUDA=1, but nvcc was not found; put the CUDA 13 toolkit on PATH")
    said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    where = re.search(r"^#\$ _HERE_=(.*)$", said, re.M)
    return ["-DEK_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={Path(where[1]) / 'nvcc' if where else shutil.which('nvcc')}"]


class CMakeBuild(build_ext):
    """Runs CMake and ninja; a missing tool is one sentence, not a traceback of its own."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != EXTENSIONS[0]:
            return  # one CMake run builds them all
        if not sys.platform.startswith("linux"):
            raise SystemExit(f"engram-kernels: the compiled module needs Linux, this is {sys.platform}; set "
                             "ENGRAM_KERNELS_NO_EXT=1 for the pure-Python install, whose reference backend runs every op")
        try:
            import pybind11
            import torch
        except ImportError as err:
            raise SystemExit(f"engram-kernels: building needs {err.name}: pip install 'torch>=2.10' pybind11, and build "
                             "with pip install --no-build-isolation") from None
        if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise SystemExit("engram-kernels: no C++ compiler was found; install one (Debian: apt-get install g++) "
                             "or set ENGRAM_KERNELS_NO_EXT=1 for the pure-Python install")
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(f"engram-kernels: {tool} was not found; pip install {tool}")
        out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("EK_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call([
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
            f"-DEK_TORCH_ROOT={Path(torch.__file__).parent}", f"-DCMAKE_PREFIX_PATH={pybind11.get_cmake_dir()}",
            *cuda_options(), f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}", "-DCMAKE_BUILD_TYPE=Release",
            f"-DEK_REQUIRE_IO_URING={'ON' if os.environ.get('ENGRAM_KERNELS_REQUIRE_IO_URING') == '1' else 'OFF'}",
            f"-DEK_SANITIZE={'ON' if os.environ.get('EK_SANITIZE') == '1' else 'OFF'}"])
        subprocess.check_call(["cmake", "--build", str(build)])
        if not CUDA and not self.inplace:  # setuptools packs whatever an earlier build left there
            for left in out.glob("_C_cuda.*"):
                left.unlink()


setup(
    ext_modules=[] if NO_EXT else [Extension(name, []) for name in EXTENSIONS],
    cmdclass={"build_ext": CMakeBuild},
)
