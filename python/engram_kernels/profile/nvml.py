"""What NVML tells of a GPU: each field read by itself, so that one call that is refused costs one field."""
from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_kernels.profile.cells import Skip

_PCI_DEVICES = Path("/sys/bus/pci/devices")
# bits of the clock event reasons (nvml.h) that mean "slower than asked for", and their names here
THROTTLE_REASONS = {0x4: "power cap", 0x8: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal",
                    0x80: "power brake"}
_GIGATRANSFERS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
_PAYLOAD_BYTES, _AROUND_BYTES = 512, 24  # of a PCIe packet: the largest payload that GPUs use, and what frames it

Field = Callable[[Any, Any], Any]
FIELDS: dict[str, Field] = {
    "name": lambda n, h: _text(n.nvmlDeviceGetName(h)),
    "driver": lambda n, h: _text(n.nvmlSystemGetDriverVersion()),
    "pci_bus_id": lambda n, h: _text(n.nvmlDeviceGetPciInfo(h).busId),
    "link_generation": lambda n, h: n.nvmlDeviceGetCurrPcieLinkGeneration(h),
    "link_width": lambda n, h: n.nvmlDeviceGetCurrPcieLinkWidth(h),
    "link_generation_max": lambda n, h: n.nvmlDeviceGetMaxPcieLinkGeneration(h),
    "link_width_max": lambda n, h: n.nvmlDeviceGetMaxPcieLinkWidth(h),
    "link_replays": lambda n, h: n.nvmlDeviceGetPcieReplayCounter(h),
    "sm_clock_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
    "sm_clock_max_mhz": lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),
    "memory_clock_max_mhz": lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM),
    "memory_bus_bits": lambda n, h: n.nvmlDeviceGetMemoryBusWidth(h),
    "memory_used_bytes": lambda n, h: n.nvmlDeviceGetMemoryInfo(h).used,
    "bar1_bytes": lambda n, h: n.nvmlDeviceGetBAR1MemoryInfo(h).bar1Total,
    "clock_event_reasons": lambda n, h: _clock_event_reasons(n, h),
    "power_w": lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1e3,
    "power_limit_w": lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3,
    "temperature_c": lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
    "ecc_enabled": lambda n, h: bool(n.nvmlDeviceGetEccMode(h)[0]),
    "ecc_uncorrected": lambda n, h: n.nvmlDeviceGetTotalEccErrors(h, n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, n.NVML_VOLATILE_ECC),
    "mig_enabled": lambda n, h: bool(n.nvmlDeviceGetMigMode(h)[0]),
    "utilization_percent": lambda n, h: n.nvmlDeviceGetUtilizationRates(h).gpu,
}
# read while the link is busy
LOAD_FIELDS = ("link_generation", "link_width", "sm_clock_mhz", "memory_clock_mhz", "clock_event_reasons", "power_w",
               "temperature_c")


class Nvml:
    """One GPU as NVML sees it.

    Args:
        gpu: the device: its uuid, or else its PCI address, finds it, since NVML's order need not be CUDA's.
        library: pynvml; injected by tests.

    Raises:
        Skip: there is no NVML, or it does not know the GPU.
    """

    def __init__(self, gpu: Any, library: Any = None):
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError as err:
                raise Skip("NO_NVML", f"{err}: pip install nvidia-ml-py") from None
        self._library = library
        try:
            library.nvmlInit()
            self._handle = self._find(gpu)
        except Skip:
            raise
        except Exception as err:
            raise Skip("NO_NVML", f"{type(err).__name__}: {err}") from None

    def _find(self, gpu: Any) -> Any:
        n = self._library
        ways: list[tuple[Callable[..., Any], str]] = []
        if gpu.uuid is not None:
            ways.append((n.nvmlDeviceGetHandleByUUID, f"GPU-{gpu.uuid.removeprefix('GPU-')}"))
        if gpu.bus_id is not None:  # the whole GPU of a MIG slice, whose uuid is its own
            ways.append((n.nvmlDeviceGetHandleByPciBusId, gpu.bus_id))
        why = "torch tells neither uuid nor PCI address of the GPU"
        for find, name in ways:
            try:
                return find(name)
            except Exception as err:
                why = f"{name}: {type(err).__name__}: {err}"
        # the index alone would do where there is one GPU; of several it may be another one's
        if n.nvmlDeviceGetCount() == 1:
            return n.nvmlDeviceGetHandleByIndex(0)
        raise Skip("NO_NVML", f"NVML does not know this GPU: {why}")

    def read(self, names: tuple[str, ...] = tuple(FIELDS)) -> tuple[dict[str, Any], dict[str, str]]:
        """(values, reason of each field that cannot be read)."""
        values: dict[str, Any] = {}
        unread: dict[str, str] = {}
        for name in names:
            try:
                values[name] = FIELDS[name](self._library, self._handle)
            except Exception as err:
                unread[name] = f"{type(err).__name__}: {err}"
        return values, unread

    def throughput(self, received: bool) -> float:
        """Bytes per second over the link in the next 20 ms, as the GPU counts them; it takes as long. Raises what NVML does."""
        n = self._library
        counter = n.NVML_PCIE_UTIL_RX_BYTES if received else n.NVML_PCIE_UTIL_TX_BYTES
        return float(n.nvmlDeviceGetPcieThroughput(self._handle, counter)) * 1e3  # KB


class LoadSampler:
    """Reads a GPU from a thread of its own while the body of the `with` keeps it busy.

    Attributes:
        values: the highest of each field of LOAD_FIELDS; of `clock_event_reasons` all bits that were seen.
        received, sent: bytes per second that the link's counters gave, where all of LOAD_FIELDS are read.

    Args:
        nvml: the GPU.
        names: of the fields.
        every_seconds: between two readings.
    """

    def __init__(self, nvml: Nvml, names: tuple[str, ...] = LOAD_FIELDS, every_seconds: float = 0.02):
        self._nvml, self._names, self._every, self._stop = nvml, names, every_seconds, threading.Event()
        self.values: dict[str, Any] = {}
        self.unread: dict[str, str] = {}
        self.received: list[float] = []
        self.sent: list[float] = []

    def __enter__(self) -> LoadSampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        self._read_once()
        while not self._stop.wait(self._every):
            self._read_once()

    def _read_once(self) -> None:
        values, self.unread = self._nvml.read(self._names)
        for name, value in values.items():
            known = self.values.get(name, value)
            self.values[name] = known | value if name == "clock_event_reasons" else max(known, value)
        if self._names is not LOAD_FIELDS:
            return
        for received, series in ((True, self.received), (False, self.sent)):
            try:
                rate = self._nvml.throughput(received)
            except Exception as err:
                self.unread["link_counters"] = f"{type(err).__name__}: {err}"
                continue
            if not self._stop.is_set():  # else the work ended within its 20 ms
                series.append(rate)


def keep_busy(work: Callable[[], None], seconds: float) -> float:
    """Calls `work`, once at least, until `seconds` are over; seconds that it took."""
    begin = time.perf_counter()
    work()
    while time.perf_counter() - begin < seconds:
        work()
    return time.perf_counter() - begin


def throttle_reasons(bits: int | None) -> list[str]:
    """Names of the bits that mean throttling."""
    return [name for bit, name in THROTTLE_REASONS.items() if (bits or 0) & bit]


def link_payload_bytes_per_s(generation: int, width: int) -> float | None:
    """The most payload per second that a PCIe link carries in one direction; None: a generation not known here."""
    if generation not in _GIGATRANSFERS:
        return None
    encoding = 0.8 if generation <= 2 else 128 / 130 if generation <= 5 else 242 / 256
    wire = _GIGATRANSFERS[generation] * 1e9 / 8 * width * encoding
    return wire * _PAYLOAD_BYTES / (_PAYLOAD_BYTES + _AROUND_BYTES)


def numa_node(pci_bus_id: str | None) -> int | None:
    """The NUMA node of the slot; None where the system does not tell."""
    if not pci_bus_id:
        return None
    try:
        node = int((_PCI_DEVICES / pci_bus_id.lower()[-12:] / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _clock_event_reasons(library: Any, handle: Any) -> int:
    # renamed in driver 535
    read = getattr(library, "nvmlDeviceGetCurrentClocksEventReasons", None) or library.nvmlDeviceGetCurrentClocksThrottleReasons
    return int(read(handle))
