"""Launches on the simulator."""
import struct
from dataclasses import dataclass

import ptxsim
import torch
from torch import Tensor

from engram_kernels.triton_runtime.launch import ABSENT, Variant, executing_on

from .compiler import Compiled, compile_variants

_modules: dict[str, ptxsim.Module] = {}


@dataclass
class Launch:
    """One kernel launch and what the simulator says of it."""
    variant: Variant
    compiled: Compiled
    grid: tuple[int, int, int]
    result: ptxsim.Result


def simulate(call, arch=90, **options):
    """(what `call` returned, its launches). Races are looked for unless race=False."""
    launches = []

    def execute(variant, grid, args):
        compiled = compile_variants([variant], f"sm_{arch}")[0]
        module = _modules.setdefault(compiled.code, None) or ptxsim.Module(compiled.code)
        _modules[compiled.code] = module
        module.mem.release_from(0)
        raw = _pack(module.mem, variant, args)
        result = module.kernel(compiled.name).launch(grid, (compiled.threads, 1, 1), raw, compiled.shared, trace=True,
                                                     **{"race": True, **options})
        # where a tile has fewer elements than threads, threads that hold the same element write the same value
        races = [race for race in result.races if "write after write" not in race]
        assert not races, races
        assert not result.conflicts, result.conflicts
        launches.append(Launch(variant, compiled, grid, result))
    with executing_on(execute, f"sm_{arch}"):
        return call(), launches


def _pack(memory, variant, args):
    """The kernel's parameters: tensors of one storage are one buffer, named after the first of them."""
    spans = {}
    for name, x in zip(variant.kernel.arg_names, args, strict=False):
        if isinstance(x, Tensor):
            begin = x.storage_offset() * x.element_size()
            extent = (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) if x.numel() else 0
            span = spans.setdefault(x.untyped_storage().data_ptr(), [name, x.untyped_storage(), begin, begin])
            span[2], span[3] = min(span[2], begin), max(span[3], begin + extent * x.element_size())
    base = {}
    for key, (name, storage, begin, end) in spans.items():
        data = torch.empty(0, dtype=torch.uint8).set_(storage)[begin:end]
        base[key] = memory.register(data, name) - begin
    raw = []
    for kind, x in zip(variant.types, args, strict=True):
        if isinstance(x, Tensor):
            raw.append(struct.pack("<q", base[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()))
        elif kind != ABSENT:
            raw.append(struct.pack("<q" if kind == "i64" else "<f", x))
    return raw


def total(launches, figure, names=None):
    """Sum of a figure such as "load_bytes" over launches and the buffers called `names` (None: all)."""
    return sum(buffer.get(figure, 0) for launch in launches for name, buffer in launch.result.buffers.items()
               if names is None or name in names)
