"""The few operations on a GPU that the probes need, through torch: the seam where tests put a fake."""
from __future__ import annotations

import time
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engram_kernels import backends
from engram_kernels.profile.cells import Skip
from engram_kernels.profile.probes_host import ROW_FILL

Call = Callable[[], object]
_BLOCK_CYCLES = 2_000_000  # about a millisecond
_MAX_BLOCK_CYCLES = 1 << 28


class TorchGpu:
    """A CUDA device.

    Timing: a stream is blocked by a spinning kernel until all calls are queued behind it, so that launches do not count; two
    events around the calls give the time.

    Args:
        index: of the device.
    """

    def __init__(self, index: int):
        self.index = index
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.empty(1, device=self.device)  # the context exists from here on
        self.side = torch.cuda.Stream(self.device)
        self._block_cycles = _BLOCK_CYCLES

    @property
    def uuid(self) -> str | None:
        """UUID of the device; None where this torch does not tell."""
        uuid = getattr(torch.cuda.get_device_properties(self.device), "uuid", None)
        return None if uuid is None else str(uuid)

    @property
    def bus_id(self) -> str | None:
        """PCI address of the device, as NVML spells it; None where this torch does not tell."""
        properties = torch.cuda.get_device_properties(self.device)
        domain, bus, device = (getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device"))
        return None if domain is None or bus is None or device is None else f"{domain:08X}:{bus:02X}:{device:02X}.0"

    @property
    def name(self) -> str:
        """Name of the device."""
        return torch.cuda.get_device_name(self.device)

    def free_bytes(self) -> int:
        """Memory of the device that can be had."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release(self) -> None:
        """Gives memory that nothing uses back to the system."""
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch._C, "_host_emptyCache", None)  # of pinned memory; torch >= 2.7
        if empty_host_cache is not None:
            empty_host_cache()

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 memory of the device."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def host(self, num_bytes: int, pinned: bool) -> Tensor:
        """uint8 memory of the host, touched. Pinned memory is rounded up to a power of two by torch: ask for one."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).fill_(ROW_FILL)

    def alias(self, pinned: Tensor) -> Tensor:
        """A tensor of the device that lies in pinned host memory: what multiprocessors read and write over the link.

        Raises:
            RuntimeError: torch makes a copy of it, such as where the memory is registered with another device.
        """
        pointer = types.SimpleNamespace(memory=pinned, __cuda_array_interface__={
            "shape": (pinned.numel() // 8,), "typestr": "<i8", "data": (pinned.data_ptr(), False), "version": 3})
        tensor = torch.as_tensor(pointer, device=self.device)
        if tensor.data_ptr() != pinned.data_ptr():
            raise RuntimeError("torch copied the memory to the device")
        return tensor

    def gather_backend(self) -> str:
        """The backend that gathers rows here.

        Raises:
            Skip: there is none that runs on the device without waiting for it.
        """
        for name in backends.AUTO_ORDER["cuda"]:
            if name != "reference" and name in backends.available("gather_rows"):
                return name
        raise Skip("NO_CUDA_KERNEL", "; ".join(backends.explain("gather_rows", n) for n in ("cuda", "triton")))

    def sync(self) -> None:
        """Waits for everything."""
        torch.cuda.synchronize(self.device)

    def seconds(self, calls: Sequence[Call]) -> float:
        """Seconds of one of `calls`, which run one after the other on the current stream and wait for nothing."""
        return self.seconds_beside(calls, ())

    def seconds_beside(self, calls: Sequence[Call], others: Sequence[Call]) -> float:
        """Seconds that `calls` take while `others` run on another stream; both start together.

        Raises:
            Skip: a call waits for the device, so that the others cannot be queued behind a blocked stream.
        """
        block = self._block_cycles
        while True:
            start, end, gate = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            self.sync()
            torch.cuda._sleep(block)
            gate.record()
            if others:
                self.side.wait_event(gate)
                with torch.cuda.stream(self.side):
                    for call in others:
                        call()
            start.record()
            for call in calls:
                call()
            end.record()
            blocked = not start.query()
            self.sync()
            if blocked:
                # half, so that one slow launch does not make every later measurement wait
                self._block_cycles = max(_BLOCK_CYCLES, block // 2)
                return start.elapsed_time(end) / 1e3 / len(calls)
            if block >= _MAX_BLOCK_CYCLES:
                raise Skip("NOT_SUPPORTED", f"{len(calls)} calls cannot be queued at once: one of them waits for the device")
            block *= 4  # the launches took longer than the block: again

    def wall_seconds(self, call: Call) -> float:
        """Seconds of a call that waits by itself, and of what it left running."""
        self.sync()
        begin = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - begin

    def both(self, here: Call, there: Call) -> Call:
        """One call that runs `here` and, on the other stream, `there`, and is done when both are."""
        def run() -> None:
            current = torch.cuda.current_stream(self.device)
            self.side.wait_stream(current)
            with torch.cuda.stream(self.side):
                there()
            here()
            current.wait_stream(self.side)
        return run
