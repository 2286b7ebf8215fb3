"""Synthetic machines and workloads with round numbers, shared by the tests of the planner."""
import dataclasses

from engram_kernels import EngramSpec
from engram_kernels.plan import Hardware, Repeats, Workload
from engram_kernels.plan.quantity import given, measured
from engram_kernels.plan.workload import table_bytes

GB = 1e9
# 16 rows of 128 bytes per token, one memory
SPEC = EngramSpec.demo_v1(row_format="bf16", layer_ids=(0,))
_UNITS = {"latency": "s", "bytes": "B", "share": "1", "reads": "1/s"}


def machine(**changes):
    """A machine on which every placement fits and gathers cost the compute nothing; all measured, None: no such thing."""
    values = dict(device_bytes=1e15, host_bytes=1e15, disk_bytes=1e15, device_stream=1e15, device_gather=1e21, uva=1 * GB,
                  link=4 * GB, host_copy=2 * GB, host_decode=2 * GB, disk_reads=1e3, nvlink=100 * GB, network=0.5 * GB,
                  gpu_latency=0.0, copy_latency=0.0, host_latency=0.0, disk_latency=0.0, network_latency=0.0, gather_share=0.0,
                  host_share=0.0)
    assert set(changes) <= set(values) | {"uva_counts_sectors", "device_counts_traffic"}, changes
    sectors, traffic = changes.pop("uva_counts_sectors", True), changes.pop("device_counts_traffic", False)

    def quantity(name, value):
        if value is None or not isinstance(value, int | float):
            return value
        return measured(value, _UNITS.get(name.rpartition("_")[2] or name, "B/s"), f"synthetic {name}")

    return Hardware(name="synthetic", uva_counts_sectors=sectors, device_counts_traffic=traffic,
                    **{name: quantity(name, value) for name, value in (values | changes).items()})


def cpu_machine(**changes):
    """A `machine` without a GPU, where the CPU computes."""
    gone = dict.fromkeys(("device_bytes", "device_stream", "device_gather", "uva", "link", "nvlink", "gpu_latency",
                          "copy_latency", "gather_share"))
    return machine(**(gone | changes))


def repeats(unique=1.0, hits=0.0):
    """Repeats with one unique ratio and one hit rate, whatever the size."""
    return Repeats(tuple((at, measured(unique, "1", "synthetic")) for at in (1.0, 1e12)),
                   tuple((at, measured(hits, "1", "synthetic")) for at in (1.0, 1e15)))


def workload(spec=SPEC, *, tokens=1000, step=0.01, layers=10, ahead=0.0, copies=1, gpus=1, nodes=1, cache=0.0, unique=1.0,
             hits=0.0):
    """1000 tokens of `SPEC` are 16,000 rows and 2.048 MB."""
    return Workload(spec=spec, table_bytes=table_bytes(spec), repeats=repeats(unique, hits),
                    **{name: given(value, unit, "test") for name, value, unit in (
                        ("tokens", tokens, "tokens"), ("step", step, "s"), ("layers", layers, "1"), ("ahead", ahead, "s"),
                        ("copies", copies, "1"), ("gpus", gpus, "1"), ("nodes", nodes, "1"), ("cache_bytes", cache, "B"))})


def in_layers(*layer_ids):
    """`SPEC` with memories in these layers."""
    return dataclasses.replace(SPEC, layer_ids=layer_ids)
