"""The build backend: setuptools', after one sentence where what a build without isolation needs is missing or too old.

pip does not look at `[build-system] requires` when it is called with --no-build-isolation, and a fresh environment has
setuptools 65 (Python 3.11) or none (Python 3.12), whose own errors name neither.
"""
NEEDED = "pip install 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.31' ninja 'torch>=2.10'"

try:
    import setuptools
except ImportError:
    raise SystemExit(f"engram-kernels: building needs setuptools, which this environment lacks: {NEEDED}") from None
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(f"engram-kernels: building needs setuptools 77 or later, found {setuptools.__version__}: {NEEDED}")

from setuptools.build_meta import *  # noqa: E402, F403  the hooks of PEP 517 and PEP 660
