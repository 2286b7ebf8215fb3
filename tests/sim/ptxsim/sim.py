"""Modules, launches and the scheduler."""
from __future__ import annotations

import itertools
import struct
import time
from dataclasses import dataclass, field

import numpy as np

from .memory import UINT, Memory
from .numerics import I64, U32
from .ops import Compiler, Unsupported, dest_count, is_barrier, is_warp_sync
from .parser import WIDTH, Ins, Parser, PtxError
from .state import SimError, State
from .trace import Trace


def _align(x, a):
    return (x + a - 1) // a * a


@dataclass
class Result:
    """What a launch did. Instruction counts are per warp and include predicated-off issues."""
    kernel: str
    threads: int
    seconds: float
    warp_instructions: int
    thread_instructions: int
    by_op: dict                      # opcode -> warp-level issues
    smem_bytes: int
    warnings: dict = field(default_factory=dict)
    memory: dict = field(default_factory=dict)       # trace=True: 'global.load' -> totals
    buffers: dict = field(default_factory=dict)      # trace=True: argument name -> figures
    lines: list = field(default_factory=list)        # trace=True: per memory instruction
    races: list = field(default_factory=list)        # race=True: shared-memory hazards
    conflicts: list = field(default_factory=list)    # race=True: blocks that touch what another block writes


class _Seg:
    __slots__ = ('bar', 'code', 'ins', 'kind', 'start', 'sync', 'term', 'threads', 'warps')


class Kernel:
    """One entry point, compiled to closures."""

    def __init__(self, mod, name):
        self.mod, self.name = mod, name
        p = mod.parser
        self.fn = p.funcs[name]
        code = p.flatten(name)
        self.S = S = State(mod.mem)
        self.template = [np.zeros(1, np.bool_ if t == 'pred' else UINT[WIDTH[t]] if WIDTH[t] <= 8 else UINT[8])
                         for t in code.regs]
        self._layout(code)
        ins, labels = _branch_around(code.ins, code.labels)
        reads = set()
        for n in ins:
            for a in n.args[dest_count(n):]:
                _regs_in(a, reads)
            for a in n.args[:dest_count(n)]:
                if a[0] == 'mem':
                    _regs_in(a, reads)
            if n.pred:
                reads.add(n.pred[0])
        self.C = Compiler(S, code.regs, self.symbol, labels, reads)
        self.unsupported = []
        self._segments(ins, labels)

    # ---- layout ------------------------------------------------------------
    def _layout(self, code):
        p = self.mod.parser
        off = 0
        self.param_at = {}
        self.params = self.fn.params
        for v in self.params:
            off = _align(off, v.align if v.type != 'b8' else max(v.align, 1))
            self.param_at[v.name] = off
            off += v.size
        self.param_size = _align(off, 8)
        used = set()
        for n in code.ins:
            for a in n.args:
                _syms_in(a, used)
        self.shared_at, at = {}, 0
        dyn_align, dyn = 16, []
        for v in [v for v in p.vars.values() if v.space == 'shared' and v.name in used] + code.shared:
            if v.size == 0:
                dyn.append(v)
                dyn_align = max(dyn_align, v.align)
                continue
            at = _align(at, v.align)
            self.shared_at[v.name] = at
            at += v.size
        self.static_smem = at
        self.dyn_base = _align(at, dyn_align)
        for v in dyn:
            self.shared_at[v.name] = self.dyn_base
        self.local_at, at = {}, 0
        for v in code.local:
            at = _align(at, v.align)
            self.local_at[v.name] = at
            at += v.size
        self.local_size = at

    def symbol(self, a):
        """Address of ('sym', kind, name, offset)."""
        _, kind, name, off = a
        if kind == 'param':
            return self.param_at[name] + off
        if kind in ('local', 'localparam'):
            return self.local_at[name] + off
        if kind == 'shared':
            return self.shared_at[name] + off
        return self.mod.symbol(name) + off

    # ---- segments ------------------------------------------------------------
    def _segments(self, ins, labels):
        """Split into straight-line pieces; each ends where control or a wait can intervene."""
        cut = set(labels.values()) | {0, len(ins)}
        for i, n in enumerate(ins):
            b = n.mods[0]
            if b in ('bra', 'brx', 'ret', 'exit'):
                cut.add(i + 1)
            if is_warp_sync(n):
                cut.add(i)
            if is_barrier(n):
                cut |= {i, i + 1}
        cuts = sorted(c for c in cut if c <= len(ins))
        at = {}
        self.segs = segs = []
        for k, (i, j) in enumerate(itertools.pairwise(cuts)):
            s = _Seg()
            s.start, s.ins, s.threads, s.warps = i, ins[i:j], 0, 0
            s.kind, s.sync, s.bar = 'n', None, None
            at[i] = k
            segs.append(s)
        at[len(ins)] = len(segs)
        self.end = len(segs)
        for k, s in enumerate(segs):
            last = s.ins[-1]
            b = last.mods[0]
            body = s.ins
            nxt = k + 1
            s.term = ('fall', nxt)
            if b == 'bra':
                body = body[:-1]
                s.term = ('bra', last.pred, at[labels[last.args[0][1]]], nxt)
            elif b in ('ret', 'exit'):
                body = body[:-1]
                s.term = ('exit', last.pred, nxt)
            elif b == 'brx':
                body = body[:-1]
                s.term = ('brx', self.C.src(last.args[0], 'u32'), [at[labels[t[1]]] for t in last.args[1][1]], nxt)
            first = s.ins[0]
            if is_warp_sync(first):
                s.kind = 'w'
                s.sync = self._member_mask(first)
            elif is_barrier(first):
                s.kind = 'b'
                s.bar = self._barrier(first)
                body = []
            s.code = [self._compile(n) for n in body]

    def _compile(self, n):
        try:
            return self.C.compile(n)
        except (Unsupported, KeyError, IndexError, StopIteration, TypeError) as e:
            why = f'{n.op} is not supported' + ('' if isinstance(e, Unsupported) else f' ({type(e).__name__}: {e})')
            self.unsupported.append((n.line, n.op, n.text))

            def f(ma, mx):
                raise SimError(why)
            return f

    def _member_mask(self, n):
        m = n.mods
        if m[0] in ('ldmatrix', 'stmatrix', 'mma', 'movmatrix'):
            return None
        a = n.args[0] if m[0] == 'bar' else n.args[-1]
        return self.C.src(a, 'b32')

    def _barrier(self, n):
        """(kind, id getter, count getter, reduction) of a CTA barrier."""
        m, args = n.mods, list(n.args)
        kind = 'red' if 'red' in m else 'arrive' if 'arrive' in m else 'sync'
        red = None
        if kind == 'red':
            op = next(x for x in m if x in ('popc', 'and', 'or'))
            d = args.pop(0)
            p = args.pop()
            red = (op, self.C.dst(d, 'u32' if op == 'popc' else 'pred'), self.C.src(p, 'pred'))
        g = [self.C.src(a, 'u32') for a in args]
        return kind, g[0] if g else (lambda: np.zeros(1, U32)), g[1] if len(g) > 1 else None, red

    # ---- launch --------------------------------------------------------------
    def pack_args(self, args):
        mem, buf = self.mod.mem, bytearray(self.param_size)
        if isinstance(args, dict):
            raise TypeError('args must be a sequence, in parameter order')
        if len(args) < len(self.params):
            hidden = self.params[len(args):]
            if all(v.size == 8 for v in hidden):       # Triton's scratch pointers
                args = list(args) + [0] * len(hidden)
        if len(args) != len(self.params):
            raise TypeError(f'{self.name} takes {len(self.params)} arguments, got {len(args)}')
        for i, (v, x) in enumerate(zip(self.params, args, strict=False)):
            at, n = self.param_at[v.name], v.size
            if x is None:
                raw = bytes(n)
            elif isinstance(x, (bytes, bytearray)):
                raw = bytes(x)
            elif (isinstance(x, np.ndarray) and x.ndim) or hasattr(x, 'data_ptr'):
                raw = mem.register(x, f'arg{i}').to_bytes(8, 'little')
            elif isinstance(x, (np.generic, np.ndarray)):
                raw = x.tobytes()
            elif isinstance(x, float):
                raw = struct.pack('<d' if n == 8 else '<f', x) if n >= 4 else np.float16(x).tobytes()
            else:
                raw = (int(x) % (1 << (8 * n))).to_bytes(n, 'little')
            if len(raw) != n:
                raise TypeError(f'argument {i} of {self.name}: {len(raw)} bytes given, {n} wanted')
            buf[at:at + n] = raw
        return np.frombuffer(bytes(buf), np.uint8)

    def launch(self, grid, block, args, dynamic_smem=0, trace=False, race=False, strict=True, poison=True,
               gang_threads=32768, cta_order='linear', seed=0, max_steps=20_000_000, timeout=None, overlaps=False):
        grid, block = _dim3(grid), _dim3(block)
        threads = block[0] * block[1] * block[2]
        if not 0 < threads <= 1024 or block[2] > 64:
            raise SimError(f'block of {block} threads is not allowed')
        if grid[0] > 2 ** 31 - 1 or max(grid[1:]) > 65535 or min(grid) < 1:
            raise SimError(f'grid of {grid} is not allowed')
        for d in ('.maxntid', '.reqntid'):
            lim = self.fn.directives.get(d)
            if lim:
                n = int(np.prod(lim))
                if threads > n or (d == '.reqntid' and threads != n):
                    raise SimError(f'{threads} threads per block, but the kernel declares {d} {lim}')
        for d in ('.reqnctapercluster', '.explicitcluster'):
            if int(np.prod(self.fn.directives.get(d) or [1])) > 1:
                raise SimError('clusters of several blocks are not supported')
        smem = (self.dyn_base if dynamic_smem else self.static_smem) + dynamic_smem
        if self.static_smem > 49152:
            raise SimError(f'{self.static_smem} bytes of static shared memory; 49152 is the limit')
        if smem > 232448:
            raise SimError(f'{smem} bytes of shared memory; 232448 is the largest on any GPU')
        S = self.S
        mark = len(self.mod.mem.bufs)
        t0 = time.time()
        try:
            S.params = self.pack_args(args)
            S.dyn_smem, S.strict, S.warnings, S.overlaps = dynamic_smem, strict, {}, overlaps
            S.trace = Trace(self.mod.mem, race) if trace or race else None
            for s in self.segs:
                s.threads = s.warps = 0
            total = grid[0] * grid[1] * grid[2]
            order = np.arange(total, dtype=I64)
            if cta_order == 'reverse':
                order = order[::-1]
            elif cta_order == 'random':
                order = np.random.default_rng(seed).permutation(order)
            tpad = _align(threads, 32)
            per = max(1, gang_threads // tpad)
            per = max(1, min(per, (256 << 20) // max(_align(smem, 128), _align(self.local_size, 16) * tpad, 1)))
            self.deadline = time.time() + timeout if timeout else None
            self.steps_left = max_steps
            with np.errstate(all='ignore'):
                for i in range(0, total, per):
                    S.cc = np.zeros(1, bool)
                    S.start_gang(order[i:i + per], grid, block, self.template, smem, self.local_size, poison)
                    began = S.live.copy()
                    self._run_gang()
                    if overlaps and (began & ~S.waited).any():   # then the grid ends, and the next begins, before the last one
                        raise SimError(f'{S.who(np.flatnonzero(began & ~S.waited)[0])} ends without griddepcontrol.wait')
            return self._result(total * threads, time.time() - t0, smem, trace)
        finally:
            self.mod.mem.release_from(mark)

    def _result(self, threads, secs, smem, trace):
        by_op, wi, ti = {}, 0, 0
        for s in self.segs:
            wi += s.warps * len(s.ins)
            ti += s.threads * len(s.ins)
            if s.warps:
                for n in s.ins:
                    by_op[n.op] = by_op.get(n.op, 0) + s.warps
        r = Result(self.name, threads, secs, wi, ti, dict(sorted(by_op.items(), key=lambda kv: -kv[1])), smem,
                   dict(self.S.warnings))
        tr = self.S.trace
        if tr:
            r.memory, r.buffers = tr.summary()
            text = {n.line: n for s in self.segs for n in s.ins}
            for (line, space, kind), a in sorted(tr.by_line.items()):
                r.lines.append({'line': line, 'space': space, 'kind': kind, 'text': text[line].text,
                                'loc': text[line].loc, **a.as_dict()})
            r.races, r.conflicts = list(tr.races.values()), list(tr.conflicts.values())
        return r

    # ---- execution ------------------------------------------------------------
    def _fail(self, e, n):
        where = f'PTX line {n.line}: {n.text}' + (f'  [{n.loc}]' if n.loc else '')
        if isinstance(e, SimError):
            raise SimError(f'{e}\n  at {where}') from None
        raise SimError(f'simulator error {type(e).__name__}: {e}\n  at {where}') from e

    def _exec(self, s, ma, mx):
        S = self.S
        if mx is None:
            s.threads += S.N
            s.warps += S.N // 32
        else:
            c = S.nlive if ma is None else int(np.count_nonzero(mx))
            s.threads += c
            s.warps += int(mx.reshape(-1, 32).any(1).sum())
        i = 0
        try:
            if s.sync is not None:
                self._check_members(s, S.live if mx is None else mx)
            for f in s.code:
                f(ma, mx)
                i += 1
        except Exception as e:
            self._fail(e, s.ins[i])

    def _check_members(self, s, m):
        v = s.sync()
        if v.shape == (1,) and v[0] == 0xffffffff:
            return
        bad = m & ((v >> self.S.laneid.astype(U32)) & U32(1) == 0)
        if bad.any():
            raise SimError(f'the member mask leaves out the executing thread: {self.S.who(np.flatnonzero(bad)[0])}')

    def _tick(self, s):
        self.steps_left -= 1
        if self.steps_left < 0:
            raise SimError(f'no end in sight: step limit reached near PTX line {s.ins[0].line}: {s.ins[0].text}')
        if self.deadline and not self.steps_left & 255 and time.time() > self.deadline:
            raise SimError(f'timeout near PTX line {s.ins[0].line}: {s.ins[0].text}')

    def _run_gang(self):
        S, segs, R = self.S, self.segs, self.S.R
        N = S.N
        whole = S.nlive == N           # every thread of every warp is live
        upc, pc = 0, None              # common position, or one per thread
        end = self.end
        turn = 0
        while True:
            if upc is not None:        # all live threads are at the same place
                if upc >= end:
                    break
                s = segs[upc]
                self._tick(s)
                mx = None if whole else S.live
                if s.kind == 'b':
                    self._count(s, None, mx)
                    self._barrier_uniform(s, mx)
                    upc += 1
                    continue
                self._exec(s, None, mx)
                t = s.term
                if t[0] == 'fall':
                    upc = t[1]
                elif t[0] == 'bra':
                    if t[1] is None:
                        upc = t[2]
                        continue
                    p = R[t[1][0]]
                    if t[1][1]:
                        p = ~p
                    if p.shape == (1,):
                        upc = t[2] if p[0] else t[3]
                        continue
                    k = int(np.count_nonzero(p if whole else p & S.live))
                    if k == S.nlive:
                        upc = t[2]
                    elif k == 0:
                        upc = t[3]
                    else:
                        pc = np.where(p, np.int32(t[2]), np.int32(t[3]))
                        pc[~S.live] = end
                        upc = None
                elif t[0] == 'exit':
                    if t[1] is None:
                        break
                    p = R[t[1][0]]
                    if t[1][1]:
                        p = ~p
                    stay = S.live & ~p
                    k = int(np.count_nonzero(stay))
                    if k == 0:
                        break
                    if k != S.nlive:
                        S.live, S.nlive, whole = stay, k, False
                    upc = t[2]
                else:
                    d = np.broadcast_to(t[1](), (N,))
                    pc = np.array(t[2], np.int32)[np.minimum(d, len(t[2]) - 1)]
                    pc[~S.live] = end
                    upc = None
                continue

            counts = np.bincount(pc, minlength=end + 1)
            cand = np.flatnonzero(counts[:end])
            if not len(cand):
                break
            if len(cand) == 1:
                upc, pc = int(cand[0]), None
                continue
            turn += 1
            order = cand if turn % 512 else cand[::-1]      # now and then favour the others: spin loops
            for c in order:
                s = segs[c]
                if s.kind == 'b':
                    if s.bar[0] == 'arrive':
                        at = pc == c
                        self._count(s, at, at)
                        self._arrive(s, at)
                        pc[at] = c + 1
                        break
                    if self._barrier_release(pc, c):
                        break
                    continue
                at = pc == c
                if s.kind == 'w':
                    at = self._ready(s, at)
                    if at is None:
                        continue
                self._tick(s)
                self._exec(s, at, at)
                self._advance(s, at, pc)
                whole = False
                break
            else:
                self._deadlock(pc, cand)

    def _count(self, s, ma, mx):
        if mx is None:
            s.threads += self.S.N
            s.warps += self.S.N // 32
        else:
            s.threads += int(np.count_nonzero(mx))
            s.warps += int(mx.reshape(-1, 32).any(1).sum())

    def _advance(self, s, at, pc):
        S, t = self.S, s.term
        if t[0] == 'fall':
            pc[at] = t[1]
        elif t[0] == 'bra':
            if t[1] is None:
                pc[at] = t[2]
                return
            p = S.R[t[1][0]]
            if t[1][1]:
                p = ~p
            pc[at] = np.where(p, np.int32(t[2]), np.int32(t[3])) if p.shape == (1,) else \
                np.where(p[at], np.int32(t[2]), np.int32(t[3]))
        elif t[0] == 'exit':
            go = at
            if t[1] is not None:
                p = S.R[t[1][0]]
                if t[1][1]:
                    p = ~p
                go = at & p
                pc[at] = t[2]
            pc[go] = self.end
            S.live = S.live & ~go
            S.nlive = int(np.count_nonzero(S.live))
        else:
            d = np.broadcast_to(t[1](), (S.N,))[at]
            pc[at] = np.array(t[2], np.int32)[np.minimum(d, len(t[2]) - 1)]

    def _ready(self, s, at):
        """Threads at a warp-wide instruction whose partners have all arrived, or None."""
        S = self.S
        here, live = S.bits(at), S.bits(S.live)
        if s.sync is None:
            need = np.full(S.N, 0xffffffff, U32)
        else:
            need = np.broadcast_to(s.sync(), (S.N,))
        missing = need & np.repeat(live & ~here, 32)
        ok = at & (missing == 0)
        if not ok.any():
            return None
        return ok

    # ---- CTA barriers -----------------------------------------------------------
    def _bar_id(self, s, mask):
        v = s.bar[1]()
        if v.shape == (1,):
            return int(v[0])
        v = v if mask is None else v[mask]
        if (v != v[0]).any():
            raise SimError('barrier numbers that differ between threads are not supported')
        return int(v[0])

    def _bar_count(self, s, mask):
        if s.bar[2] is None:
            return None
        v = s.bar[2]()
        return int(v[0] if v.shape == (1,) or mask is None else v[mask][0])

    def _arrive(self, s, at):
        S = self.S
        k = self._bar_id(s, at)
        arr = S.bars.setdefault(k, np.zeros(S.B, I64))
        arr += at.reshape(S.B, -1).sum(1)

    def _reduce(self, s, mask):
        S = self.S
        kind, wr, getp = s.bar[3]
        p = np.broadcast_to(getp(), (S.N,)).reshape(S.B, -1)
        m = mask.reshape(S.B, -1)
        if kind == 'popc':
            r = (p & m).sum(1).astype(U32)
        elif kind == 'and':
            r = (p | ~m).all(1)
        else:
            r = (p & m).any(1)
        wr(np.repeat(r, S.tpad), mask)

    def _barrier_uniform(self, s, mx):
        S = self.S
        at = S.live if mx is None else mx
        try:
            k = self._bar_id(s, at)
            if s.bar[0] == 'arrive':
                self._arrive(s, at)
                return
            want = self._bar_count(s, at)
            if want is not None:
                arr = S.bars.setdefault(k, np.zeros(S.B, I64))
                have = at.reshape(S.B, -1).sum(1) + arr
                short = (have < want) & (have > 0)
                if short.any():
                    raise SimError(f'deadlock: barrier {k} waits for {want} threads, {int(have[short][0])} can arrive')
                arr[:] = 0
        except SimError as e:
            self._fail(e, s.ins[0])
        if s.bar[3]:
            self._reduce(s, at)
        if S.trace:
            S.trace.barrier(slice(None))

    def _barrier_release(self, pc, c):
        """Let the CTAs go whose threads have all reached the barrier that segment c waits on."""
        S, segs = self.S, self.segs
        s = segs[c]
        k = self._bar_id(s, pc == c)
        group = [g for g in np.unique(pc) if g < self.end and segs[g].kind == 'b' and segs[g].bar[0] != 'arrive'
                 and self._bar_id(segs[g], pc == g) == k]
        wait = np.isin(pc, group)
        arr = S.bars.setdefault(k, np.zeros(S.B, I64))
        have = wait.reshape(S.B, -1).sum(1)
        want = self._bar_count(s, pc == c)
        need = S.live.reshape(S.B, -1).sum(1) if want is None else want
        ready = (have > 0) & (have + arr >= need)
        if not ready.any():
            return False
        arr[ready] = 0
        go = wait & np.repeat(ready, S.tpad)
        for g in group:
            m = go & (pc == g)
            if m.any():
                self._count(segs[g], m, m)
        if s.bar[3]:
            self._reduce(s, go)
        if S.trace:
            S.trace.barrier(ready)
        pc[go] += 1
        return True

    def _deadlock(self, pc, cand):
        lines = []
        for c in cand:
            n, at = self.segs[c].ins[0], np.flatnonzero(pc == c)
            lines.append(f'  {len(at)} threads wait at PTX line {n.line}: {n.text}'
                         + (f' [{n.loc}]' if n.loc else '') + f', first: {self.S.who(at[0])}')
        raise SimError('deadlock: threads wait for others that never arrive\n' + '\n'.join(lines[:8]))


def _dim3(x):
    x = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return x + (1,) * (3 - len(x))


def _regs_in(a, out):
    if not isinstance(a, tuple) or not a:
        return
    if a[0] == 'reg':
        out.add(a[1])
    elif a[0] in ('vec', 'list'):
        for x in a[1]:
            _regs_in(x, out)
    elif a[0] in ('mem', 'not', 'pair'):
        for x in a[1:]:
            _regs_in(x, out)


def _syms_in(a, out):
    if not isinstance(a, tuple) or not a:
        return
    if a[0] == 'sym':
        out.add(a[2])
    elif a[0] in ('vec', 'list'):
        for x in a[1]:
            _syms_in(x, out)
    elif a[0] == 'mem':
        _syms_in(a[1], out)


def _branch_around(ins, labels):
    """Turn predicated warp-wide and barrier instructions into a branch around a plain one."""
    out, new_at = [], []
    extra = {}
    for i, n in enumerate(ins):
        new_at.append(len(out))
        if n.pred and (is_warp_sync(n) or is_barrier(n)):
            lab = f'around@{i}'
            out.append(Ins('bra', ('bra',), [('label', lab)], (n.pred[0], not n.pred[1]), n.line, n.text, n.loc))
            out.append(Ins(n.op, n.mods, n.args, None, n.line, n.text, n.loc))
            extra[lab] = len(out)
        else:
            out.append(n)
    new_at.append(len(out))
    labels = {k: new_at[v] for k, v in labels.items()}
    labels.update(extra)
    if not out or out[-1].mods[0] not in ('ret', 'exit', 'bra'):
        out.append(Ins('ret', ('ret',), [], None, out[-1].line if out else 0, 'ret', ''))
    return out, labels


class Module:
    """A PTX file, its device variables and its global memory."""

    def __init__(self, ptx):
        if isinstance(ptx, bytes):
            ptx = ptx.decode()
        self.parser = Parser(ptx)
        self.mem = Memory()
        self._sym, self._kernels, self.globals = {}, {}, {}
        fix = []
        for v in self.parser.vars.values():
            if v.space in ('global', 'const') and not (v.extern and not v.size):
                data = np.zeros(max(v.size, 1), np.uint8)
                self._initialise(v, data, fix)
                self.globals[v.name] = data
                self._sym[v.name] = self.mem.register(data, v.name, readonly=v.space == 'const')
        for data, at, name, off in fix:
            data[at:at + 8] = np.frombuffer((self._sym[name] + off).to_bytes(8, 'little'), np.uint8)

    @staticmethod
    def _initialise(v, data, fix):
        w = WIDTH[v.type]
        for i, x in enumerate(v.init or []):
            if isinstance(x, tuple) and x[0] in ('f32', 'f64'):
                kind, bits = x
                if kind == 'f64' and v.type == 'f32':
                    bits = int(np.array([bits], np.uint64).view(np.float64).astype(np.float32).view(np.uint32)[0])
                x = bits
            elif isinstance(x, tuple):
                fix.append((data, i * w, *x))
                continue
            data[i * w:(i + 1) * w] = np.frombuffer((x % (1 << (8 * w))).to_bytes(w, 'little'), np.uint8)

    def symbol(self, name):
        if name not in self._sym:
            raise PtxError(f'{name} has no address (extern?)')
        return self._sym[name]

    def kernels(self):
        return [n for n, f in self.parser.funcs.items() if f.kind == 'entry']

    def kernel(self, name=None):
        names = self.kernels()
        if name is None:
            if len(names) != 1:
                raise PtxError(f'name one of the kernels {names}')
            name = names[0]
        if name not in names:
            hits = [n for n in names if name in n]
            if len(hits) != 1:
                raise PtxError(f'no kernel {name!r}; there are {names}')
            name = hits[0]
        if name not in self._kernels:
            self._kernels[name] = Kernel(self, name)
        return self._kernels[name]

    def run(self, kernel, grid, block, args, dynamic_smem=0, **options):
        return self.kernel(kernel).launch(grid, block, args, dynamic_smem, **options)


def run(ptx_text, kernel_name, grid, block, args, dynamic_smem=0, **options):
    """Run one kernel of a PTX text. Arrays in `args` are updated in place; see README.md."""
    return Module(ptx_text).run(kernel_name, grid, block, args, dynamic_smem, **options)
