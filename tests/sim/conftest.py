"""Fixtures of the simulator tests."""
import pytest
import torch


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws without a generator of its own does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def programs(request, monkeypatch):
    """Sets how many programs take a small batch of the op that the test file is named after."""
    from engram_kernels.triton_runtime import tuning
    op = request.path.stem.removeprefix("test_").removesuffix("_triton_sim")

    def set_to(count):
        for name in (op, f"{op}_bwd"):
            monkeypatch.setitem(tuning.DEFAULTS[name]["small"], "programs", count)
        tuning._parameters.cache_clear()
    yield set_to
    monkeypatch.undo()
    tuning._parameters.cache_clear()
