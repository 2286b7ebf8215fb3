"""A device of the simulator: arrays at device addresses, launchers called through ctypes."""
import ctypes
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import ptxsim

from .build import Build, build

Callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
                            ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_bool)


class LaunchError(Exception):
    """The launcher threw."""


@dataclass
class Launch:
    """One kernel launch and what the simulator says of it."""
    kernel: str  # mangled
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    result: ptxsim.Result
    overlaps: bool  # it may begin while the launch before still runs


@dataclass
class Device:
    """Holds arrays; runs launchers on them.

    options: of every simulated launch (cta_order, seed, ..); races are looked for unless race=False.
    capability: the major number of its compute capability.
    shared_limit: bytes of shared memory that a block may ask for: an H100's, unless told.
    ops: the only ones that are compiled and can run; all, unless told.
    """
    multiprocessors: int = 132
    options: dict = field(default_factory=dict)
    shared_limit: int = 232448
    capability: int = 9
    ops: tuple[str, ...] = ()
    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self):
        self.build: Build = build(self.ops)
        self.library = ctypes.CDLL(str(self.build.library))
        self.mem, self.failure = _Simulator.reset(self), None
        self.callback = Callback(self._launch)

    def address(self, array, name: str = "", readonly: bool = False) -> int:
        """Maps a numpy array or CPU tensor; None is a null pointer."""
        if array is None:
            return 0
        return self.mem.register(array, name, readonly)

    def run(self, launcher: str, params: ctypes.Structure) -> list[Launch]:
        """Calls `launcher`, executes what it launches, returns the launches."""
        call = getattr(self.library, launcher)
        call.restype = ctypes.c_char_p
        known = getattr(self.library, launcher + "_params_bytes")
        known.restype = ctypes.c_long
        assert _Simulator.device is self, "the arrays of this device went when a newer one was made"
        assert known() == ctypes.sizeof(params), f"{type(params).__name__} is not the C++ struct"
        self.set_runtime()
        before, self.failure = len(self.launches), None
        error = call(ctypes.byref(params))
        if self.failure is not None:
            raise self.failure
        if error is not None:
            raise LaunchError(error.decode())
        return self.launches[before:]

    def set_runtime(self) -> None:
        """Makes the fake runtime this device's; `run` does so, and whoever calls another function of the library must."""
        self.library.fake_cudart_set(self.callback, self.multiprocessors, self.shared_limit)
        self.library.fake_cudart_capability(self.capability)

    def kernel(self, name: str) -> ptxsim.Kernel:
        """The compiled kernel behind a mangled name."""
        if name not in _Simulator.kernels:
            _Simulator.load(next(op for op in self.build.ops if name in self.build.usage(op)), self.build)
        return _Simulator.kernels[name].kernel(name)

    def _launch(self, name, grid, block, args, shared_bytes, overlaps):
        try:
            name = name.decode()
            kernel = self.kernel(name)
            raw = [ctypes.string_at(args[i], p.size) for i, p in enumerate(kernel.params)]
            grid, block = tuple(grid[:3]), tuple(block[:3])
            result = kernel.launch(grid, block, raw, shared_bytes, trace=True, overlaps=overlaps,
                                   **{"race": True, **self.options})
            self.launches.append(Launch(name, grid, block, shared_bytes, result, overlaps))
            assert not result.races, result.races
            assert not result.conflicts, result.conflicts
            assert not result.warnings, result.warnings
        except BaseException as err:  # must not pass through C; `run` raises it
            self.failure = err


class _Simulator:
    """Parsed kernels are kept for the whole session, and so is their memory; its arrays are those of the newest device."""
    mem = ptxsim.Memory()
    kernels: ClassVar[dict[str, ptxsim.Module]] = {}
    device: Device | None = None

    @classmethod
    def reset(cls, device):
        cls.mem.release_from(0)
        cls.device = device
        return cls.mem

    @classmethod
    def load(cls, op, build):
        module = ptxsim.Module(build.ptx(op))
        assert not module.globals, "device variables are not supported here"
        module.mem = cls.mem
        cls.kernels.update({name: module for name in module.kernels()})


def bytes_asked(launches: list[Launch]) -> int:
    """What the kernels loaded from memory and stored to it, cached or not."""
    return sum(buffer.get(kind, 0) for launch in launches for buffer in launch.result.buffers.values()
               for kind in ("load_bytes", "store_bytes"))


def poisoned(shape, dtype=np.int32) -> np.ndarray:
    """An array whose every byte is 0xAB, for output that must be written whole."""
    out = np.empty(shape, dtype)
    out.view(np.uint8)[...] = 0xAB
    return out
