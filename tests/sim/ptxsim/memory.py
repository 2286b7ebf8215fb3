"""Global memory: numpy buffers at made-up addresses, with checked access."""
from __future__ import annotations

from bisect import bisect_right

import numpy as np

GLOBAL_BASE = 0x7f0000000000
SHARED_WINDOW = 0x010000000000      # generic addresses of shared memory
LOCAL_WINDOW = 0x020000000000       # generic addresses of local memory
WINDOW_SIZE = 1 << 32
GUARD = 1 << 20                     # unmapped bytes between buffers

UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class AccessError(Exception):
    """A bad memory access; `lane` indexes the active lanes that were passed in."""

    def __init__(self, msg, lane):
        super().__init__(msg)
        self.lane = lane


def _as_bytes(a):
    """(flat uint8 array over the same memory, byte offset within its allocation, writable)"""
    if hasattr(a, 'data_ptr') and hasattr(a, 'untyped_storage'):
        import torch
        if a.device.type != 'cpu':
            raise TypeError('only CPU tensors can be kernel arguments')
        off = a.storage_offset() * a.element_size()
        raw = torch.empty(0, dtype=torch.uint8).set_(a.untyped_storage()).numpy()
        if a.is_contiguous():
            return raw[off:off + a.numel() * a.element_size()], off, True
        return raw[off:], off, True
    if not a.flags.c_contiguous:
        raise TypeError('numpy arguments must be C-contiguous')
    root = a
    while isinstance(root.base, np.ndarray):
        root = root.base
    off = a.ctypes.data - root.ctypes.data if a.size else 0
    flat = a.reshape(-1).view(np.uint8) if a.size else np.empty(0, np.uint8)
    return flat, off, a.flags.writeable


class Buffer:
    def __init__(self, base, data, name, writable):
        self.base, self.data, self.name, self.writable = base, data, name, writable
        self.end = base + data.nbytes
        self._views = {}
        self.touch_ld = self.touch_st = None
        self.stats = {}

    def view(self, dtype):
        """(array of dtype over the buffer, first address it covers)"""
        got = self._views.get(dtype)
        if got is None:
            w = np.dtype(dtype).itemsize
            phase = -self.base % w
            n = max(self.data.nbytes - phase, 0) // w
            got = self._views[dtype] = (self.data[phase:phase + n * w].view(dtype), self.base + phase)
        return got

    def touch(self, addr, width, store):
        """Mark bytes as read or written; for footprint figures."""
        t = self.touch_st if store else self.touch_ld
        if t is None:
            t = Buffer(self.base, np.zeros(self.data.nbytes, np.uint8), self.name, True)
            if store:
                self.touch_st = t
            else:
                self.touch_ld = t
        w = min(width, 8)
        ones = UINT[w](0x0101010101010101 & ((1 << (8 * w)) - 1))
        v, b0 = t.view(UINT[w])
        for k in range(0, width, w):
            v[(addr - b0 + k) // w] = ones


class Memory:
    """The global address space of one device."""

    def __init__(self):
        self.bufs, self.bases = [], []
        self.next = GLOBAL_BASE

    def register(self, array, name='', readonly=False):
        """Map `array` and return its address. Alignment relative to its allocation is kept."""
        data, off, writable = _as_bytes(array)
        base = self.next + off % 256
        b = Buffer(base, data, name or f'buf{len(self.bufs)}', writable and not readonly)
        b.keep = array
        self.bufs.append(b)
        self.bases.append(base)
        self.next = (b.end + GUARD + 255) // 256 * 256
        return base

    def release_from(self, n):
        """Forget every buffer after the first n."""
        del self.bufs[n:], self.bases[n:]

    def _fault(self, addr, size, why, lane):
        a = int(addr[lane])
        i = bisect_right(self.bases, a) - 1
        near = ''
        if i >= 0:
            b = self.bufs[i]
            near = f'; offset {a - b.base} of {b.name!r} ({b.data.nbytes} bytes)'
            if a - b.end > GUARD // 2 and i + 1 < len(self.bufs):
                c = self.bufs[i + 1]
                near = f'; offset {a - c.base} of {c.name!r} ({c.data.nbytes} bytes)'
        raise AccessError(f'{why} at address {a:#x}, {size} bytes{near}', lane)

    def locate(self, addr, size, store):
        """[(buffer, index of lanes or None)] for int64 addresses; checks bounds and alignment."""
        if size > 1:
            mis = addr & (size - 1)
            if mis.any():
                self._fault(addr, size, 'misaligned access', int(np.flatnonzero(mis)[0]))
        lo, hi = int(addr.min()), int(addr.max())
        i = bisect_right(self.bases, lo) - 1
        if i >= 0:
            b = self.bufs[i]
            if hi + size <= b.end:
                if store and not b.writable:
                    self._fault(addr, size, 'store to read-only buffer', 0)
                return [(b, None)]
        k = np.searchsorted(np.array(self.bases, np.int64), addr, 'right') - 1
        ends = np.array([b.end for b in self.bufs] + [0], np.int64)
        bad = (k < 0) | (addr + size > ends[k])
        if bad.any():
            self._fault(addr, size, 'out-of-bounds ' + ('store' if store else 'load'), int(np.flatnonzero(bad)[0]))
        out = []
        for u in np.unique(k):
            b, ix = self.bufs[u], np.flatnonzero(k == u)
            if store and not b.writable:
                self._fault(addr, size, 'store to read-only buffer', int(ix[0]))
            out.append((b, ix))
        return out

    def load(self, addr, w, n, hits=None):
        """n consecutive w-byte words per address, as n unsigned arrays."""
        hits = hits or self.locate(addr, w * n, False)
        dt = UINT[w]
        if hits[0][1] is None:
            v, b0 = hits[0][0].view(dt)
            ix = (addr - b0) // w if w > 1 else addr - b0
            return [v[ix + k] if k else v[ix] for k in range(n)]
        out = [np.empty(addr.shape, dt) for _ in range(n)]
        for b, lanes in hits:
            v, b0 = b.view(dt)
            ix = (addr[lanes] - b0) // w
            for k in range(n):
                out[k][lanes] = v[ix + k]
        return out

    def store(self, addr, w, vals, hits=None):
        hits = hits or self.locate(addr, w * len(vals), True)
        dt = UINT[w]
        for b, lanes in hits:
            v, b0 = b.view(dt)
            ix = ((addr if lanes is None else addr[lanes]) - b0) // w
            for k, x in enumerate(vals):
                v[ix + k] = x if lanes is None or x.shape == (1,) else x[lanes]
