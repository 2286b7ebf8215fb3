"""Counts of what a kernel asks of memory: sectors, footprints, bank conflicts, races."""
from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict

import numpy as np

from .numerics import I64

SECTOR = 32


class Access:
    """Totals for one instruction or one kind of access."""
    __slots__ = ('bytes', 'ideal', 'ideal_waves', 'requests', 'sectors', 'threads', 'waves')

    def __init__(self):
        for k in self.__slots__:
            setattr(self, k, 0)

    def as_dict(self):
        return {k: int(getattr(self, k)) for k in self.__slots__}


class Trace:
    def __init__(self, mem, race=False):
        self.mem, self.race = mem, race
        self.by_line = defaultdict(Access)     # (line, space, kind) -> Access
        self.by_buffer = defaultdict(Access)   # (buffer name, kind) -> Access
        self.races, self.conflicts, self.gtags = {}, {}, {}

    def start_gang(self, S):
        self.S = S
        if self.race:
            n = S.smem.nbytes
            self.epoch = np.ones(S.B, I64)
            self.wtag = np.zeros(n, I64)
            self.rtag = np.zeros(n, I64)
            self.warp_of = (S.lane % S.tpad) // 32 + 1

    def barrier(self, ctas):
        if self.race:
            self.epoch[ctas] += 1

    def access(self, ins, space, addr, mask, size, store, vals=None, atomic=False):
        S = self.S
        kind = 'atomic' if atomic else 'store' if store else 'load'
        m = S.live if mask is None else mask
        a = np.broadcast_to(addr, (S.N,))
        rows = m.reshape(-1, 32)
        per_warp = rows.sum(1)
        nreq = int((per_warp > 0).sum())
        if not nreq:
            return
        acc = self.by_line[ins.line, space, kind]
        n = int(per_warp.sum())
        acc.requests += nreq
        acc.threads += n
        acc.bytes += n * size
        if space == 'global':
            sec = unique_per_row((a >> 5).reshape(-1, 32), rows)
            if size > SECTOR:
                sec = sec * (size // SECTOR)
            ideal = -(-per_warp * size // SECTOR)
            acc.sectors += int(sec.sum())
            acc.ideal += int(ideal.sum())
            self._buffers(ins, a[m], np.flatnonzero(m), size, store, kind, sec)
        elif space == 'shared':
            w, iw = bank_waves(a, rows, size)
            acc.waves += w
            acc.ideal_waves += iw
            if self.race:
                ix = np.flatnonzero(m)
                self._race(ins, a[ix], ix, size, store, atomic)

    def _buffers(self, ins, act, ix, size, store, kind, sec):
        lo, hi = int(act.min()), int(act.max())
        i = bisect_right(self.mem.bases, lo) - 1
        if i >= 0 and hi + size <= self.mem.bufs[i].end:
            b = self.mem.bufs[i]
            acc = self.by_buffer[b.name, kind]
            acc.requests += int((sec > 0).sum())
            acc.threads += len(act)
            acc.bytes += len(act) * size
            acc.sectors += int(sec.sum())
            b.touch(act, size, store)
            if self.race:
                self._conflict(ins, b, act, ix, size, store, kind == 'atomic')
            return
        k = np.searchsorted(np.array(self.mem.bases, I64), act, 'right') - 1
        for u in np.unique(k):
            if u < 0:
                continue
            b = self.mem.bufs[u]
            part = act[k == u]
            if int(part.max()) + size > b.end:
                continue                      # the access itself will report this
            acc = self.by_buffer[b.name, kind]
            acc.threads += len(part)
            acc.bytes += len(part) * size
            b.touch(part, size, store)
            if self.race:
                self._conflict(ins, b, part, ix[k == u], size, store, kind == 'atomic')

    def _note(self, what, ins, where):
        self.races.setdefault((ins.line, what), f'{what} at PTX line {ins.line}: {ins.text}'
                              + (f'  [{ins.loc}]' if ins.loc else '') + f'; {where}')

    def _race(self, ins, off, ix, size, store, atomic):
        """Shared memory: conflicting accesses by different warps between two CTA barriers."""
        S = self.S
        if (off < 0).any() or (off + size > S.smem_size).any():
            return                            # the access itself will report this
        cta = S.cta_of[ix]
        p = ((off + cta * S.sstride)[:, None] + np.arange(size)).reshape(-1)
        if atomic:
            self.wtag[p] = np.maximum(self.wtag[p], 1)
            return
        tag = np.repeat(self.epoch[cta] << 12, size)
        mine = tag | np.repeat(self.warp_of[ix], size)
        ep = tag >> 12
        wt = self.wtag[p]
        where = lambda k: f'shared offset {int(off[k // size]) + k % size}, {S.who(ix[k // size])}'
        clash = (wt >> 12 == ep) & (wt != mine)
        if clash.any():
            self._note('shared-memory race, ' + ('write after write' if store else 'read after write'), ins,
                       where(int(np.flatnonzero(clash)[0])))
        if store:
            rt = self.rtag[p]
            clash = (rt >> 12 == ep) & (rt != mine)
            if clash.any():
                self._note('shared-memory race, write after read', ins, where(int(np.flatnonzero(clash)[0])))
            self.wtag[p] = mine
            clash = self.wtag[p] != mine
            if clash.any():
                self._note('shared-memory race, write after write', ins, where(int(np.flatnonzero(clash)[0])))
            return
        fresh = wt == 0
        if fresh.any():
            self._note('read of shared memory that was never written', ins, where(int(np.flatnonzero(fresh)[0])))
        rt = self.rtag[p]
        many = (rt >> 12 == ep) & (rt != mine)
        self.rtag[p] = np.where(many, tag | 0xfff, mine)
        again = self.rtag[p] != mine
        if again.any():                       # several warps read the same bytes in this instruction
            self.rtag[p[again]] = tag[again] | 0xfff

    def _conflict(self, ins, b, addr, ix, size, store, atomic):
        """Global memory: plain accesses of one block to bytes another block writes."""
        if atomic:
            return
        S = self.S
        sh = self.gtags.get(b)
        if sh is None:
            sh = self.gtags[b] = (np.zeros(b.data.nbytes, np.int32), np.zeros(b.data.nbytes, np.int32))
        wt, rt = sh
        p = ((addr - b.base)[:, None] + np.arange(size)).reshape(-1)
        me = np.repeat((np.asarray(S.ctas)[S.cta_of[ix]] + 1).astype(np.int32), size)
        where = lambda k: f'offset {int(p[k])} of {b.name!r}, {S.who(ix[k // size])}'
        old = wt[p]
        clash = (old != 0) & (old != me)
        if clash.any():
            self._conf('two blocks write the same byte' if store else 'read of a byte that another block wrote', ins,
                       where(int(np.flatnonzero(clash)[0])))
        if store:
            r = rt[p]
            clash = (r != 0) & (r != me)
            if clash.any():
                self._conf('write of a byte that another block read', ins, where(int(np.flatnonzero(clash)[0])))
            wt[p] = me
            clash = wt[p] != me
            if clash.any():
                self._conf('two blocks write the same byte', ins, where(int(np.flatnonzero(clash)[0])))
        else:
            r = rt[p]
            rt[p] = np.where((r != 0) & (r != me), -1, me)
            again = rt[p] != me
            rt[p[again]] = -1

    def _conf(self, what, ins, where):
        self.conflicts.setdefault((ins.line, what), f'{what}, PTX line {ins.line}: {ins.text}'
                                  + (f'  [{ins.loc}]' if ins.loc else '') + f'; {where}')

    def bulk(self, ins, space, a, n, cta, lane, store):
        """A bulk copy of n bytes by one thread."""
        acc = self.by_line[ins.line, space, 'store' if store else 'load']
        acc.requests += 1
        acc.threads += 1
        acc.bytes += n
        if space == 'global':
            acc.sectors += (a + n - 1) // SECTOR - a // SECTOR + 1
            acc.ideal += -(-n // SECTOR)
            i = bisect_right(self.mem.bases, a) - 1
            if i >= 0 and a + n <= self.mem.bufs[i].end:
                b = self.mem.bufs[i]
                t = self.by_buffer[b.name, 'store' if store else 'load']
                t.bytes += n
                t.sectors += (a + n - 1) // SECTOR - a // SECTOR + 1
                b.touch(a + 8 * np.arange(n // 8), 8, store)
        elif self.race and a >= 0 and a + n <= self.S.smem_size:
            p = cta * self.S.sstride + a
            self.wtag[p:p + n] = np.maximum(self.wtag[p:p + n], 1)

    def summary(self):
        tot = defaultdict(Access)
        for (_line, space, kind), a in self.by_line.items():
            t = tot[space, kind]
            for k in Access.__slots__:
                setattr(t, k, getattr(t, k) + getattr(a, k))
        out = {f'{s}.{k}': v.as_dict() for (s, k), v in sorted(tot.items())}
        bufs = {}
        for b in self.mem.bufs:
            d = {}
            for kind in ('load', 'store', 'atomic'):
                a = self.by_buffer.get((b.name, kind))
                if a:
                    d[kind + '_bytes'] = int(a.bytes)
                    d[kind + '_sectors'] = int(a.sectors)
            for kind, t in (('read', b.touch_ld), ('written', b.touch_st)):
                if t is not None:
                    d['unique_bytes_' + kind] = int(np.count_nonzero(t.data))
                    pad = np.concatenate([np.zeros(b.base % SECTOR, np.uint8), t.data,
                                          np.zeros(-(b.end) % SECTOR, np.uint8)])
                    d['unique_sectors_' + kind] = int(pad.reshape(-1, SECTOR).any(1).sum())
            if d:
                bufs[b.name] = d
        return out, bufs


def unique_per_row(x, rows):
    """Number of distinct values among the active entries of each row."""
    full = rows.all()
    if not full:
        first = x[np.arange(len(x)), rows.argmax(1)]
        x = np.where(rows, x, first[:, None])
    d = np.diff(x, axis=1)
    if (d < 0).any():
        x = np.sort(x, axis=1)
        d = np.diff(x, axis=1)
    n = (d != 0).sum(1) + 1
    return n if full else np.where(rows.any(1), n, 0)


def bank_waves(a, rows, size):
    """(wavefronts, conflict-free wavefronts) of a shared access; 32 banks of 4 bytes."""
    per = 32 if size <= 4 else 16 if size == 8 else 8        # threads served together
    words = max(size // 4, 1)
    w = (a >> 2).reshape(-1, per)
    act = rows.reshape(-1, per)
    on = act.any(1)
    w, act = w[on], act[on]
    w = np.where(act, w, w[np.arange(len(w)), act.argmax(1)][:, None])
    if words > 1:
        w = (w[:, :, None] + np.arange(words)).reshape(len(w), -1)
    w = np.sort(w, axis=1)
    new = np.ones(w.shape, bool)
    new[:, 1:] = w[:, 1:] != w[:, :-1]
    bank = (w & 31) + 32 * np.arange(len(w))[:, None]
    counts = np.bincount(bank[new], minlength=32 * len(w)).reshape(-1, 32)
    return int(counts.max(1).sum()), len(w)
