"""Fixtures of the table tests."""
import pytest

from engram_kernels._library import COMPILE_ERROR
from engram_kernels.table import host_memory


@pytest.fixture(params=["compiled", "python"])
def memory(request, monkeypatch):
    """Both kinds of memory."""
    if request.param == "compiled" and COMPILE_ERROR:
        pytest.skip(COMPILE_ERROR)
    if request.param == "python":
        monkeypatch.setattr(host_memory, "COMPILE_ERROR", "the compiled module is missing")
    return request.param
