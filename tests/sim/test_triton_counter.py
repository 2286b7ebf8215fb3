"""The counter of bad values that Triton's kernels have on a GPU, where it is first wanted inside a graph capture."""
import contextlib

import pytest
import torch
from triton_sim import MISSING_TRITON

pytestmark = pytest.mark.skipif(bool(MISSING_TRITON), reason=MISSING_TRITON)


def test_triton_counter_made_inside_a_capture_lifts_the_mode_of_the_thread(monkeypatch):
    """On a stream that is not captured torch allocates by a plain cudaMalloc, which a capture in global mode forbids."""
    from engram_kernels.triton_runtime import launch
    told, modes = [], [0]  # 0: global, as torch.cuda.graph begins a capture

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        @staticmethod
        def cuThreadExchangeStreamCaptureMode(pointer):
            mode = pointer._obj
            modes[0], mode.value = mode.value, modes[0]
            return 0

    class Stream:
        def __init__(self, device):
            pass

        def synchronize(self):
            told.append(("synchronize", modes[0]))

    @contextlib.contextmanager
    def on_stream(stream):
        told.append("enter")
        yield
        told.append("leave")

    def zeros(*size, device, dtype):
        told.append(("zeros", modes[0]))
        return torch.tensor([0], dtype=dtype)

    for owner, name, value in ((launch.ctypes, "CDLL", Driver), (torch.cuda, "Stream", Stream), (torch.cuda, "stream", on_stream),
                               (torch.cuda, "is_available", lambda: True), (torch, "zeros", zeros), (launch, "_errors", {}),
                               (torch.cuda, "is_current_stream_capturing", lambda: True)):
        monkeypatch.setattr(owner, name, value)
    counter = launch.error_counter("gather_rows", torch.device("cuda", 0))
    assert told == ["enter", ("zeros", 2), ("synchronize", 2), "leave"] and modes == [0]
    assert launch.error_counter("gather_rows", torch.device("cuda", 0)) is counter and len(told) == 4
