"""A GPU for tests of the probes on a machine without one: the CPU behind the seam, and an NVML that can refuse a call."""
from types import SimpleNamespace

import torch

from engram_kernels.profile.gpu_device import TorchGpu


class FakeGpu(TorchGpu):
    """What TorchGpu does, done by the CPU at once: the first of several calls, which are said to take `call_seconds`."""
    call_seconds = 1e-3

    def __init__(self, index):
        self.index, self.device = index, torch.device("cpu")

    @property
    def uuid(self):
        return "0000-1111"

    @property
    def bus_id(self):
        return "00000000:3B:00.0"

    @property
    def name(self):
        return "fake"

    def free_bytes(self):
        return 64 << 20

    def release(self):
        pass

    def empty(self, num_bytes):
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def host(self, num_bytes, pinned):
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def alias(self, pinned):
        return pinned.view(torch.int64)

    def gather_backend(self):
        return "cpu"

    def sync(self):
        pass

    def seconds_beside(self, calls, others):
        for call in (*others[:1], *calls[:1]):
            call()
        return self.call_seconds

    def wall_seconds(self, call):
        call()
        return self.call_seconds

    def both(self, here, there):
        return lambda: (here(), there())


class NvmlError(Exception):
    """The error that pynvml raises."""


CALLS = {
    "nvmlDeviceGetName": b"Fake H200", "nvmlSystemGetDriverVersion": "580.1",
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId="0000:00:00.0"),
    "nvmlDeviceGetCurrPcieLinkGeneration": 5, "nvmlDeviceGetCurrPcieLinkWidth": 16, "nvmlDeviceGetMaxPcieLinkGeneration": 5,
    "nvmlDeviceGetMaxPcieLinkWidth": 16, "nvmlDeviceGetPcieReplayCounter": 0, "nvmlDeviceGetClockInfo": 1980,
    "nvmlDeviceGetMaxClockInfo": 3201, "nvmlDeviceGetMemoryBusWidth": 6144,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=1 << 30),
    "nvmlDeviceGetBAR1MemoryInfo": SimpleNamespace(bar1Total=1 << 37), "nvmlDeviceGetCurrentClocksEventReasons": 1,
    "nvmlDeviceGetPowerUsage": 120_000, "nvmlDeviceGetEnforcedPowerLimit": 700_000, "nvmlDeviceGetTemperature": 40,
    "nvmlDeviceGetEccMode": [1, 1], "nvmlDeviceGetTotalEccErrors": 0, "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=3), "nvmlDeviceGetPcieThroughput": 50_000_000,
    "nvmlDeviceGetHandleByUUID": "handle", "nvmlDeviceGetHandleByPciBusId": "handle", "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlDeviceGetCount": 8, "nvmlInit": None}


class FakeNvml:
    """pynvml with fixed answers.

    Args:
        refused: the calls that raise.
        answers: replace those of CALLS.
    """
    NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    NVML_PCIE_UTIL_RX_BYTES, NVML_PCIE_UTIL_TX_BYTES = 1, 0

    def __init__(self, refused=(), **answers):
        for name, answer in {**CALLS, **answers}.items():
            setattr(self, name, self._call(name, name in refused, answer))

    @staticmethod
    def _call(name, refused, answer):
        def call(*args):
            if refused:
                raise NvmlError(f"{name}: not supported")
            return answer
        return call
