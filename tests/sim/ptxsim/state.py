"""Execution state of a gang (a batch of CTAs run together) and its memory accesses."""
from __future__ import annotations

import numpy as np

from .memory import LOCAL_WINDOW, SHARED_WINDOW, UINT, WINDOW_SIZE, AccessError
from .numerics import I64, U32, U64


class SimError(Exception):
    """The kernel did something wrong, or something the simulator does not do."""


class State:
    """Registers and memories of the threads that run in lockstep batches.

    Per-thread values are arrays of N threads, or of length 1 when the same for all.
    CTAs are padded to whole warps; padding threads never become live.
    """

    def __init__(self, mem):
        self.mem = mem
        self.R = []
        self.trace = None
        self.strict = True
        self.warnings = {}

    def warn(self, msg):
        self.warnings[msg] = self.warnings.get(msg, 0) + 1

    # ---- set-up -----------------------------------------------------------
    def start_gang(self, ctas, grid, block, nregs_template, smem_size, local_size, poison):
        bx, by, bz = block
        gx, gy, gz = grid
        t = bx * by * bz
        tpad = (t + 31) // 32 * 32
        b = len(ctas)
        n = self.N = b * tpad
        self.B, self.T, self.tpad = b, t, tpad
        self.ctas, self.grid, self.block = ctas, grid, block
        self.R[:] = nregs_template
        lin = np.arange(tpad, dtype=U32)
        self.live = np.tile(lin < t, b)
        self.nlive = b * t
        self.lane = np.arange(n, dtype=I64)
        self.laneid = (self.lane & 31)
        self.warp_base = self.lane & ~31
        self.smem_size = smem_size
        self.sstride = (smem_size + 127) // 128 * 128
        self.smem = np.zeros(b * self.sstride, np.uint8)
        if poison and self.sstride:
            self.smem[:] = 0xcd
        self.cta_of = self.lane // tpad
        self.cta_off = self.cta_of * self.sstride if b > 1 else None
        self.lsize = local_size
        self.lstride = (local_size + 15) // 16 * 16
        self.lmem = np.zeros(n * self.lstride, np.uint8)
        if poison and self.lstride:
            self.lmem[:] = 0xcd
        self._sv, self._lv = {}, {}
        self._ix_mask = self._ix = None
        self.bars = {}
        self.async_group = None
        self.async_pending = []
        self.mbar = {}
        self.waited = np.zeros(n, bool)   # for the grid before this one: griddepcontrol.wait

        one = lambda v, dt=U32: np.array([v], dt)
        rep = lambda v: np.tile(v.astype(U32), b)
        c = np.asarray(ctas, I64)
        per_cta = lambda v: one(int(v[0])) if (v == v[0]).all() else np.repeat(v.astype(U32), tpad)
        sr = self.sr = {
            '%tid.x': rep(lin % bx) if bx > 1 else one(0),
            '%tid.y': rep(lin // bx % by) if by > 1 else one(0),
            '%tid.z': rep(lin // (bx * by)) if bz > 1 else one(0),
            '%ntid.x': one(bx), '%ntid.y': one(by), '%ntid.z': one(bz),
            '%ctaid.x': per_cta(c % gx), '%ctaid.y': per_cta(c // gx % gy), '%ctaid.z': per_cta(c // (gx * gy)),
            '%nctaid.x': one(gx), '%nctaid.y': one(gy), '%nctaid.z': one(gz),
            '%laneid': self.laneid.astype(U32), '%warpid': rep(lin // 32), '%nwarpid': one(tpad // 32),
            '%smid': one(0), '%nsmid': one(1), '%gridid': one(0, U64),
            '%dynamic_smem_size': one(self.dyn_smem), '%total_smem_size': one(smem_size),
            '%aggr_smem_size': one(smem_size),
            '%cluster_ctarank': one(0), '%cluster_nctarank': one(1), '%is_explicit_cluster': one(False, bool),
        }
        for d in 'xyz':
            sr['%cluster_ctaid.' + d] = one(0)
            sr['%cluster_nctaid.' + d] = one(1)
            sr['%clusterid.' + d] = sr['%ctaid.' + d]
            sr['%nclusterid.' + d] = sr['%nctaid.' + d]
        bit = (U32(1) << sr['%laneid'])
        sr['%lanemask_eq'] = bit
        sr['%lanemask_lt'] = bit - U32(1)
        sr['%lanemask_le'] = bit | (bit - U32(1))
        sr['%lanemask_gt'] = ~(bit | (bit - U32(1)))
        sr['%lanemask_ge'] = ~(bit - U32(1))
        self.clock = 0
        if self.trace:
            self.trace.start_gang(self)

    def special(self, name):
        v = self.sr.get(name)
        if v is not None:
            return v
        if 'clock' in name or 'globaltimer' in name:
            self.clock += 40
            if name.endswith('_hi'):
                return np.zeros(1, U32)
            return np.array([self.clock], U64 if name.endswith(('64', 'timer')) else U32)
        if name.startswith('%envreg'):
            return np.zeros(1, U32)
        raise SimError(f'special register {name} is not supported')

    # ---- threads ------------------------------------------------------------
    def active(self, mask):
        """Indices of the active threads; cached for the current mask."""
        if self._ix_mask is not mask:
            self._ix_mask, self._ix = mask, np.flatnonzero(mask)
        return self._ix

    def who(self, lane):
        lane = int(lane)
        cta, lin = int(self.ctas[lane // self.tpad]), lane % self.tpad
        bx, by, _ = self.block
        gx, gy, _ = self.grid
        return (f'block ({cta % gx},{cta // gx % gy},{cta // (gx * gy)}) '
                f'thread ({lin % bx},{lin // bx % by},{lin // (bx * by)})')

    def bits(self, mask):
        """Per-warp 32-bit ballots of a thread mask (None = all true)."""
        nw = self.N // 32
        if mask is None:
            return np.full(nw, 0xffffffff, U32)
        if mask.shape == (1,):
            return np.full(nw, 0xffffffff if mask[0] else 0, U32)
        return np.packbits(mask, bitorder='little').view(U32)

    # ---- memory ---------------------------------------------------------------
    def expect_waited(self, mask):
        """In an overlapping launch, the grid before may still write, or read, what those threads touch."""
        if not self.overlaps:
            return
        early = (self.live if mask is None else mask) & ~self.waited
        if early.any():
            raise SimError(f'global memory is touched before griddepcontrol.wait by {self.who(np.flatnonzero(early)[0])}')

    def sview(self, w):
        v = self._sv.get(w)
        if v is None:
            v = self._sv[w] = self.smem.view(UINT[w])
        return v

    def lview(self, w):
        v = self._lv.get(w)
        if v is None:
            v = self._lv[w] = self.lmem.view(UINT[w])
        return v

    def _inside(self, a, size, limit, what):
        bad = (a < 0) | (a + size > limit)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            raise AccessError(f'out-of-bounds {what} access at offset {int(a[k])}, {size} bytes ({limit} bytes exist)', k)
        if size > 1:
            mis = (a & (size - 1)) != 0
            if mis.any():
                k = int(np.flatnonzero(mis)[0])
                raise AccessError(f'misaligned {what} access at offset {int(a[k])}, {size} bytes', k)

    def split(self, a, mask):
        """Resolve generic addresses: [(space, address, mask)]."""
        def classify(x):
            s = (x >= SHARED_WINDOW) & (x < SHARED_WINDOW + WINDOW_SIZE)
            l = (x >= LOCAL_WINDOW) & (x < LOCAL_WINDOW + WINDOW_SIZE)
            return s, l
        act = a if mask is None or a.shape == (1,) else a[self.active(mask)]
        lo, hi = int(act.min()), int(act.max())
        if lo >= LOCAL_WINDOW + WINDOW_SIZE or hi < SHARED_WINDOW:
            return [('global', a, mask)]
        if lo >= SHARED_WINDOW and hi < SHARED_WINDOW + WINDOW_SIZE:
            return [('shared', a - SHARED_WINDOW, mask)]
        if lo >= LOCAL_WINDOW and hi < LOCAL_WINDOW + WINDOW_SIZE:
            return [('local', a - LOCAL_WINDOW, mask)]
        s, l = classify(a)
        base = self.live if mask is None else mask
        return [(sp, a - off, mm) for sp, off, mm in
                (('shared', SHARED_WINDOW, base & s), ('local', LOCAL_WINDOW, base & l),
                 ('global', 0, base & ~s & ~l)) if mm.any()]

    def words(self, space, a, ix, w, n, store):
        """[(typed array, index array, lanes or None)] behind addresses of active threads."""
        if space == 'shared':
            self._inside(a, w * n, self.smem_size, 'shared')
            if self.cta_off is not None:
                a = a + (self.cta_off if ix is None else self.cta_off[ix])
            return [(self.sview(w), a // w, None)]
        if space == 'local':
            self._inside(a, w * n, self.lsize, 'local')
            a = a + (self.lane if ix is None else ix) * self.lstride
            return [(self.lview(w), a // w, None)]
        out = []
        for b, lanes in self.mem.locate(a, w * n, store):
            v, b0 = b.view(UINT[w])
            out.append((v, ((a if lanes is None else a[lanes]) - b0) // w, lanes))
        return out

    def load(self, space, ins, a, mask, w, n):
        """(list of n arrays, lane indices or None). Arrays match the lane indices."""
        if space == 'generic':
            parts = self.split(a, mask)
            if len(parts) > 1:
                full = [np.zeros(self.N, UINT[w]) for _ in range(n)]
                for sp, ad, mm in parts:
                    vals, ix = self.load(sp, ins, ad, mm, w, n)
                    for f, v in zip(full, vals, strict=False):
                        f[ix] = v
                if mask is None:
                    return full, None
                ix = self.active(mask)
                return [f[ix] for f in full], ix
            space, a, _ = parts[0]
        if space == 'global':
            self.expect_waited(mask)
        if self.trace:
            self.trace.access(ins, space, a, mask, w * n, False)
        ix = None
        if mask is not None:
            ix = self.active(mask)
            if a.shape != (1,):
                a = a[ix]
        try:
            if space == 'global':
                return self.mem.load(a, w, n), ix
            v, k, _ = self.words(space, a, ix, w, n, False)[0]
            return [v[k + j] if j else v[k] for j in range(n)], ix
        except AccessError as e:
            self.fault(e, ix)

    def store(self, space, ins, a, mask, w, vals):
        if space == 'generic':
            parts = self.split(a, mask)
            if len(parts) > 1:
                for sp, ad, mm in parts:
                    self.store(sp, ins, ad, mm, w, vals)
                return
            space, a, _ = parts[0]
        if space == 'global':
            self.expect_waited(mask)
        if self.trace:
            self.trace.access(ins, space, a, mask, w * len(vals), True, vals)
        ix = None
        if mask is not None:
            ix = self.active(mask)
            if a.shape != (1,):
                a = a[ix]
            vals = [v if v.shape == (1,) else v[ix] for v in vals]
        try:
            if a.shape == (1,) and (space != 'global' or any(v.shape != (1,) for v in vals)):
                a = np.broadcast_to(a, (self.N if ix is None else len(ix),))
            if space == 'global':
                return self.mem.store(a, w, vals)
            arr, k, _ = self.words(space, a, ix, w, len(vals), True)[0]
            for j, v in enumerate(vals):
                arr[k + j] = v
        except AccessError as e:
            self.fault(e, ix)

    def fault(self, e, ix):
        if ix is not None:
            lane = ix[e.lane] if e.lane < len(ix) else ix[0]
        else:
            lane = e.lane
        raise SimError(f'{e} by {self.who(lane)}') from None

    # ---- atomics ----------------------------------------------------------------
    def atomic(self, space, ins, a, mask, w, fn, b, c, ufunc, int_add, want):
        """Read-modify-write. `fn(old, b, c)` works on unsigned words; `ufunc` is a numpy
        ufunc with .at plus a dtype, or None. Returns (old values, lane indices)."""
        if space == 'generic':
            parts = self.split(a, mask)
            if len(parts) > 1:
                full = np.zeros(self.N, UINT[w])
                for sp, ad, mm in parts:
                    old, ix = self.atomic(sp, ins, ad, mm, w, fn, b, c, ufunc, int_add, True)
                    full[ix] = old
                m = self.live if mask is None else mask
                ix = self.active(m)
                return full[ix], ix
            space, a, _ = parts[0]
        if space == 'global':
            self.expect_waited(mask)
        if self.trace:
            self.trace.access(ins, space, a, mask, w, True, None, atomic=True)
        m = self.live if mask is None else mask
        ix = self.active(m)
        pick = lambda x: None if x is None else (np.broadcast_to(x, ix.shape) if x.shape == (1,) else x[ix])
        a, b, c = pick(a), pick(b), pick(c)
        out = np.empty(ix.shape, UINT[w])
        try:
            for arr, k, lanes in self.words(space, a, ix, w, 1, True):
                bb = b if lanes is None or b is None else b[lanes]
                cc = c if lanes is None or c is None else c[lanes]
                old = _rmw(arr, k, fn, bb, cc, ufunc, int_add, want)
                if old is not None:
                    out[slice(None) if lanes is None else lanes] = old
        except AccessError as e:
            self.fault(e, ix)
        return out, ix


def _rmw(arr, k, fn, b, c, ufunc, int_add, want):
    order = np.argsort(k, kind='stable')
    ks = k[order]
    first = np.empty(len(ks), bool)
    first[:1] = True
    np.not_equal(ks[1:], ks[:-1], out=first[1:])
    if first.all():
        old = arr[k]
        arr[k] = fn(old, b, c)
        return old
    if not want and ufunc is not None:
        uf, dt = ufunc
        uf.at(arr.view(dt), k, b.view(dt))
        return None
    start = np.flatnonzero(first)
    seg = np.cumsum(first) - 1
    if int_add:
        bs = b[order]
        cum = np.cumsum(bs, dtype=bs.dtype)
        excl = cum - bs
        old_s = arr[ks] + (excl - excl[start][seg])
        np.add.at(arr, k, b)
        old = np.empty_like(old_s)
        old[order] = old_s
        return old
    rank = np.arange(len(ks)) - start[seg]
    by_rank = np.argsort(rank, kind='stable')
    cuts = np.flatnonzero(np.diff(rank[by_rank])) + 1
    old = np.empty(len(ks), arr.dtype)
    for g in np.split(by_rank, cuts):
        sel = order[g]
        o = arr[k[sel]]
        old[sel] = o
        arr[k[sel]] = fn(o, None if b is None else b[sel], None if c is None else c[sel])
    return old
