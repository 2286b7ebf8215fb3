"""The machine that a plan is for: rates, latencies and capacities, each a number with its source."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

from engram_kernels._names import GPUS
from engram_kernels.plan.quantity import Quantity, Surface, assumed, given, measured

_FIELD = "measured by others, collected 2026-11: "
_SHEET = "data sheet: "
LEFT_SHARE = 0.1  # of device memory, beside weights and KV cache: what vLLM leaves by default


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One node and what connects it. A field that is None is hardware that is not there.

    Attributes:
        name: "h100", or "none" where the model computes on the CPU.
        device_bytes, host_bytes, disk_bytes: room for tables.
        device_stream: bytes/s of long reads.
        device_gather, uva: bytes/s of rows that a kernel reads at random from device memory, from pinned host memory.
        device_counts_traffic: `device_gather` is what the memory moves, sectors read and results written, not the rows alone.
        uva_counts_sectors: `uva` is what crosses the link, not what of it are rows.
        link: bytes/s of the copy engine, host to device.
        host_copy, host_decode: bytes/s of rows gathered by the CPU, as stored, and dequantized to bf16.
        disk_reads: reads of a page per second at the queue depth of the file tier.
        nvlink, network: bytes/s that one GPU receives from the others of the node, from other nodes.
        gpu_latency, copy_latency, host_latency, disk_latency, network_latency: seconds from a request until its first rows,
            fixed costs included.
        gather_share: of the compute lost while a kernel reads rows over the link beside it.
        host_share: of the compute lost while the CPU gathers.
        flops: of dense bf16 products, per second.
        engine_rows, engine_latency: of what brings rows from other machines: rows/s of at most 264 bytes, the other side's gather
            included (larger rows take as many times longer), and seconds of a request for a few; None: RDMA, at `network`.
    """
    name: str
    device_bytes: Quantity | None
    host_bytes: Quantity
    disk_bytes: Quantity
    device_stream: Quantity | None
    device_gather: Quantity | Surface | None
    device_counts_traffic: bool
    uva: Quantity | Surface | None
    uva_counts_sectors: bool
    link: Quantity | None
    host_copy: Quantity | Surface
    host_decode: Quantity | Surface
    disk_reads: Quantity
    nvlink: Quantity | None
    network: Quantity
    gpu_latency: Quantity | None
    copy_latency: Quantity | None
    host_latency: Quantity
    disk_latency: Quantity
    network_latency: Quantity
    gather_share: Quantity | None
    host_share: Quantity
    flops: Quantity | None = None
    engine_rows: Quantity | None = None
    engine_latency: Quantity | None = None

    @property
    def has_gpu(self) -> bool:
        """Whether the model computes on a GPU."""
        return self.device_bytes is not None


def rate_at(rate: Quantity | Surface, row_bytes: float, table_bytes: float) -> Quantity:
    """The rate for such rows in such a table."""
    return rate.at(row_bytes, table_bytes) if isinstance(rate, Surface) else rate


# name -> (bytes of HBM, bytes/s of HBM, bytes/s that a GPU receives over NVLink, dense bf16 flop/s, from the data sheet)
_SHEETS = {"h100": ("H100 SXM", 80e9, 3.35e12, 450e9, 989e12), "h800": ("H800 SXM", 80e9, 3.35e12, 200e9, 989e12),
           "h200": ("H200 SXM", 141e9, 4.8e12, 450e9, 989e12), "a100": ("A100 SXM 80 GB", 80e9, 2.039e12, 300e9, 312e12)}


def assumed_hardware(name: str) -> Hardware:
    """A machine of published constants alone.

    Args:
        name: one of `GPUS`, or "none": the model computes on the CPU.

    Raises:
        ValueError: no such machine.
    """
    if name != "none" and name not in _SHEETS:
        raise ValueError(f"plan: gpu is {name!r}, expected none, {', '.join(GPUS)}")
    node = Hardware(
        name=name, device_bytes=None, device_stream=None, device_gather=None, device_counts_traffic=True, uva=None,
        uva_counts_sectors=True, link=None, nvlink=None, gpu_latency=None, copy_latency=None, gather_share=None,
        host_bytes=assumed(0.8 * 2**40, "B", "default: 80 % of 1 TiB of RAM"),
        disk_bytes=assumed(3.84e12, "B", "default: one 3.84 TB drive"),
        host_copy=assumed(512 / (53.34e-9 * 2) * 8, "B/s", "docs/performance.md: gather_rows 53.34 ns per row of 512 bytes "
                          "with 2 threads of an EPYC; here 8 threads, taken to scale"),
        host_decode=assumed(264 / (53.34e-9 * 1.01 * 2) * 8, "B/s", "docs/performance.md: gather_rows of packed fp8 in 1.01x "
                            "the 53.34 ns of a bf16 row with 2 threads of an EPYC; here 8 threads, taken to scale"),
        disk_reads=assumed(75_000, "1/s", "this project's bench of the file tier: where its virtual disk ends, from depth 64 on"),
        network=assumed(50e9, "B/s", _SHEET + "one 400 Gb/s NDR adapter per GPU"),
        host_latency=assumed(10e-6, "s", "docs/performance.md: dispatch 6 to 9 us per call"),
        disk_latency=assumed(1 / 14_163, "s", "this project's bench of the file tier: one pread after the other"),
        network_latency=assumed(5e-6, "s", "default: an RDMA read and its completion"),
        host_share=given(0, "1", "the CPU gathers, the GPU computes"))
    if name == "none":
        return dataclasses.replace(node, host_share=assumed(1, "1", "default: the gather takes the cores that would compute"))
    title, device_bytes, device_rate, nvlink, flops = _SHEETS[name]
    pcie4 = name == "a100"
    uva: Quantity | Surface = assumed(35e9, "B/s", _FIELD + "UVA reads by SMs, PCIe 5 x16, H100")
    if pcie4:
        source = _FIELD + "UVA reads by SMs, PCIe 4 x16, A100, {} GiB"
        uva = Surface(tuple((256.0, gib * 2.0**30, assumed(rate, "B/s", source.format(gib)))
                            for gib, rate in ((1, 25e9), (20, 16.5e9))))
    machine = dataclasses.replace(
        node, device_bytes=assumed(LEFT_SHARE * device_bytes, "B", f"{_SHEET}{title}, {device_bytes / 1e9:.0f} GB; default: a "
                                "tenth is left beside weights and KV cache"),
        disk_reads=assumed(900_000, "1/s", _SHEET + "Samsung PM9A3, random reads of 4 KiB"),
        device_stream=assumed(device_rate, "B/s", _SHEET + title), flops=assumed(flops, "flop/s", f"{_SHEET}{title}, dense bf16"),
        device_gather=assumed(0.8 * device_rate, "B/s", _FIELD + "row gather with 16-byte vectors, about 80 % of HBM peak, "
                           "reads and writes counted"),
        uva=uva, nvlink=assumed(nvlink, "B/s", f"{_SHEET}{title}, one direction"),
        link=assumed(28e9 if pcie4 else 56e9, "B/s", _FIELD + "copy engine on PCIe 5 x16, 55 to 57 GB/s"
                     + ("; PCIe 4 has half of it" if pcie4 else "")),
        gpu_latency=assumed(3.7e-6, "s", _FIELD + "lookup kernel for one token, GB300, host table"),
        copy_latency=assumed(10e-6, "s", "default: submit, event and wait of an asynchronous copy"),
        gather_share=assumed(8 / 132, "1", "default: a background gather holds 8 of 132 multiprocessors"))
    return _measured_elsewhere(machine) if name == "h200" else machine


def _measured_elsewhere(h200: Hardware) -> Hardware:
    """The H200 with what this project measured on one: 16,384 tokens of 24 rows of packed fp8, 264 bytes, read as 288."""
    source = "this project's bench/results/2026-11-26_h200.md, an H200 elsewhere: "
    rows, sectors, written = 16_384 * 24, 288, 512
    return dataclasses.replace(
        h200, device_gather=assumed(rows * (sectors + written) / 101.9e-6, "B/s",
                                 f"{source}gather_rows of packed fp8, {rows:,} rows in 101.9 us, reads and writes counted"),
        uva=assumed(rows * sectors / 3780.8e-6, "B/s", f"{source}gather_rows from pinned host memory over PCIe 5 x16, "
                    f"{rows:,} rows in 3780.8 us (27 GB/s of rows; 32 where a call has 3,072)"),
        link=assumed(55.1e9, "B/s", f"{source}copy from pinned host memory"))


def with_room(hardware: Hardware, device_bytes: float | None, host_bytes: float | None, disk_bytes: float | None) -> Hardware:
    """A machine like `hardware` with the room for tables that the command line gives.

    Raises:
        ValueError: a size is not positive, or device memory is given where there is no GPU.
    """
    changes: dict[str, Any] = {}
    for field, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes), ("disk_bytes", disk_bytes)):
        if value is None:
            continue
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"plan: {field} is {value}, expected at least 0")
        if field == "device_bytes" and not hardware.has_gpu:
            raise ValueError(f"plan: {value:.3g} bytes of device memory are given, but there is no GPU: name one with --gpu")
        changes[field] = given(value, "B", "command line")
    return dataclasses.replace(hardware, **changes)


def with_engine(hardware: Hardware, name: str) -> Hardware:
    """A machine like `hardware` whose remote rows come through this engine, one of `REMOTE_ENGINES`: docs/remote.md."""
    source = "this project's docs/remote.md, measured elsewhere on 2 cores over loopback, rows of 264 bytes: "
    engines = {"ray": (2.6e6, 3.0e-3, "one Ray 2.60 actor"), "mooncake-tcp": (0.018e6, 0.7e-3, "Mooncake 0.3.13 over TCP")}
    if name == "rdma":
        return hardware
    rows, latency, what = engines[name]
    return dataclasses.replace(hardware, engine_rows=assumed(rows, "1/s", source + what),
                               engine_latency=assumed(latency, "s", source + what))


def this_node(hardware: Hardware, host_bytes: int | None, disk_bytes: int | None) -> Hardware:
    """A machine like `hardware` with the memory and disk that are free here, as far as they are known."""
    changes: dict[str, Any] = {}
    if host_bytes is not None:
        changes["host_bytes"] = measured(0.8 * host_bytes, "B", "80 % of the memory that is free here, and that limits leave")
    if disk_bytes is not None:
        changes["disk_bytes"] = measured(disk_bytes, "B", "free disk space here")
    return dataclasses.replace(hardware, **changes)
