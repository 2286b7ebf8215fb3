"""PTX instructions -> Python closures over numpy arrays.

A closure has the signature f(ma, mx): `ma` is the mask for register writes and
`mx` the exact set of active threads; None means "all threads".  `ma` may be None
while `mx` is not (the missing threads have exited, so writing them is harmless).
"""
from __future__ import annotations

import numpy as np

from . import numerics as nu
from .memory import LOCAL_WINDOW, SHARED_WINDOW, UINT
from .numerics import F16, F32, F64, I32, I64, U8, U16, U32, U64
from .parser import WIDTH
from .state import SimError

DT = {'b8': U8, 'u8': U8, 's8': np.int8, 'b16': U16, 'u16': U16, 's16': np.int16, 'f16': F16, 'bf16': U16,
      'b32': U32, 'u32': U32, 's32': I32, 'f32': F32, 'f16x2': U32, 'bf16x2': U32, 'tf32': F32,
      'b64': U64, 'u64': U64, 's64': I64, 'f64': F64, 'f32x2': U64, 'u16x2': U32, 's16x2': U32, 'pred': np.bool_}
SINT = {1: np.int8, 2: np.int16, 4: I32, 8: I64}
SPACES = {'global': 'global', 'shared': 'shared', 'shared::cta': 'shared', 'shared::cluster': 'shared',
          'local': 'local', 'const': 'const', 'param': 'param', 'param::entry': 'param', 'param::func': 'param'}
FLOATS = ('f16', 'bf16', 'f32', 'f64', 'f16x2', 'bf16x2', 'tf32', 'f32x2')

WARP_SYNC = {'shfl', 'match', 'redux', 'ldmatrix', 'stmatrix', 'mma', 'elect', 'movmatrix'}


class Unsupported(Exception):
    pass


def is_warp_sync(ins):
    m = ins.mods
    return m[0] in WARP_SYNC or (m[0] == 'vote' and 'sync' in m) or m[:3] == ('bar', 'warp', 'sync')


def is_barrier(ins):
    m = ins.mods
    return m[0] in ('bar', 'barrier') and 'warp' not in m and 'cluster' not in m


def dest_count(ins):
    """How many leading arguments are written rather than read."""
    if ins.mods[0] in ('st', 'red', 'bar', 'barrier', 'membar', 'fence', 'prefetch', 'prefetchu', 'bra', 'brx', 'ret',
                       'exit', 'trap', 'nanosleep', 'stmatrix', 'discard', 'applypriority', 'call', 'cp', 'pragma'):
        return 0
    if ins.mods[0] == 'mbarrier':
        return 1 if {'arrive', 'arrive_drop', 'test_wait', 'try_wait'} & set(ins.mods) else 0
    return 1


def typ(ins):
    for m in reversed(ins.mods[1:]):
        if m in DT:
            return m
    raise Unsupported(f'no type in {ins.op}')


def same(*arrs):
    """Give the arrays one length (needed before packed views)."""
    n = max(a.shape[0] for a in arrs)
    return [a if a.shape[0] == n else np.repeat(a, n) for a in arrs]


class Compiler:
    def __init__(self, S, regs, symbol, labels, reads):
        self.S, self.R, self.regs, self.symbol, self.labels, self.reads = S, S.R, regs, symbol, labels, reads

    # ---- operands ---------------------------------------------------------
    def src(self, a, t):
        R, k = self.R, a[0]
        if k == 'reg':
            i, rt = a[1], self.regs[a[1]]
            if rt == 'pred':
                return lambda: R[i]
            dt, ws, wt = DT[t], WIDTH[rt], WIDTH[t]
            if t == 'pred':
                return lambda: R[i] != 0
            if ws == wt:
                if dt is UINT[ws]:
                    return lambda: R[i]
                return lambda: R[i].view(dt)
            ut = UINT[wt]
            return lambda: R[i].astype(ut).view(dt)
        if k == 'imm':
            v = self.const(a[1], t)
            return lambda: v
        if k == 'not':
            i = a[1][1]
            return lambda: ~R[i]
        if k == 'spec':
            name, S, dt = a[1], self.S, DT[t]
            if t == 'pred':
                return lambda: S.special(name)
            ut = UINT[WIDTH[t]]
            return lambda: S.special(name).astype(ut).view(dt)
        if k == 'sym':
            v = np.array([self.symbol(a) & ((1 << (8 * WIDTH[t])) - 1)], UINT[WIDTH[t]]).view(DT[t])
            return lambda: v
        if k == 'vec' and len(a[1]) == 1:
            return self.src(a[1][0], t)
        if k == 'vec':
            return self.pack(a[1], t)
        raise Unsupported(f'operand {a!r}')

    def const(self, v, t):
        if t == 'pred':
            return np.array([bool(v)])
        dt, w = DT[t], WIDTH[t]
        if isinstance(v, tuple):
            kind, bits = v
            if t in ('f32', 'f64', 'tf32'):
                x = np.array([bits], U32).view(F32) if kind == 'f32' else np.array([bits], U64).view(F64)
                return x.astype(dt)
            return np.array([bits & ((1 << (8 * w)) - 1)], UINT[w]).view(dt)
        if t in ('f32', 'f64'):
            return np.array([float(v)], dt)
        return np.array([v & ((1 << (8 * w)) - 1)], UINT[w]).view(dt)

    def pack(self, parts, t):
        """mov.b32 {a,b} style source."""
        w = WIDTH[t] // len(parts)
        et, ut, dt = f'b{8 * w}', UINT[WIDTH[t]], DT[t]
        gets = [self.src(p, et) for p in parts]

        def f():
            r = gets[0]().astype(ut)
            for k, g in enumerate(gets[1:], 1):
                r = r | (g().astype(ut) << ut(8 * w * k))
            return r.view(dt)
        return f

    def dst(self, a, t):
        """Writer w(value of type t, mask)."""
        R = self.R
        if a[0] == 'sink':
            return lambda v, m: None
        if a[0] == 'vec' and len(a[1]) == 1:
            a = a[1][0]
        if a[0] != 'reg':
            raise Unsupported(f'destination {a!r}')
        i, rt = a[1], self.regs[a[1]]
        if rt == 'pred':
            def wp(v, m):
                R[i] = v if m is None else np.where(m, v, R[i])
            return wp
        ws, wt = WIDTH[rt], WIDTH[t]
        st = UINT[ws]
        if ws == wt:
            def w(v, m):
                if v.dtype is not st:
                    v = v.view(st)
                R[i] = v if m is None else np.where(m, v, R[i])
        elif ws > wt:
            it = SINT[wt] if t[0] == 's' else UINT[wt]
            big = SINT[ws] if t[0] == 's' else st

            def w(v, m):
                v = v.view(it).astype(big).view(st)
                R[i] = v if m is None else np.where(m, v, R[i])
        else:
            def w(v, m):
                v = v.view(UINT[wt]).astype(st)
                R[i] = v if m is None else np.where(m, v, R[i])
        return w

    def dst_at(self, a, t):
        """Writer w(values, lane indices or None, mask) for values of the active lanes only."""
        whole = self.dst(a, t)
        if a[0] == 'sink':
            return lambda v, ix, m: None
        if a[0] == 'vec':
            a = a[1][0]
        R, i, S = self.R, a[1], self.S

        def w(v, ix, m):
            if ix is None:
                whole(v, None)
            elif v.shape == (1,):
                whole(v, m)
            else:
                old = R[i]
                whole(v, None)
                new = R[i]
                full = old.copy() if old.shape != (1,) else np.repeat(old, S.N)
                full[ix] = new
                R[i] = full
        return w

    def addr(self, a):
        """Getter of int64 addresses for a memory operand."""
        base, off = a[1], a[2]
        if base[0] == 'reg':
            R, i = self.R, base[1]
            if WIDTH[self.regs[i]] == 8:
                if off:
                    o = I64(off)
                    return lambda: R[i].view(I64) + o
                return lambda: R[i].view(I64)
            o = I64(off)
            return lambda: R[i].astype(I64) + o
        if base[0] == 'imm':
            v = np.array([base[1] + off], I64)
            return lambda: v
        if base[0] == 'sym':
            v = np.array([self.symbol(base) + off], I64)
            return lambda: v
        raise Unsupported(f'address {a!r}')

    def space(self, ins, mem):
        for m in ins.mods[1:]:
            if m in SPACES:
                s = SPACES[m]
                break
        else:
            s = 'generic'
        if s == 'param' and mem[1][0] == 'sym' and mem[1][1] != 'param':
            s = 'local'                       # parameter of an inlined call
        return 'global' if s == 'const' else s

    # ---- entry point --------------------------------------------------------
    def compile(self, ins):
        h = HANDLERS.get(ins.mods[0])
        if h is None:
            raise Unsupported(ins.op)
        f = h(self, ins)
        if ins.pred is None:
            return f
        R, S, (pi, neg) = self.R, self.S, ins.pred

        def g(ma, mx):
            p = R[pi]
            if p.shape == (1,):
                if bool(p[0]) != neg:
                    f(ma, mx)
                return
            if neg:
                p = ~p
            if mx is not None:
                p = p & mx
            c = np.count_nonzero(p)
            if c == S.N:
                f(None, None)
            elif c:
                f(p, p)
        return g

    def simple(self, ins, fn, t=None, out=None, n=None):
        """Closure for a pure function of the sources."""
        t = t or typ(ins)
        w = self.dst(ins.args[0], out or t)
        g = [self.src(a, t) for a in ins.args[1:]]
        if len(g) == 1:
            a, = g
            return lambda ma, mx: w(fn(a()), ma)
        if len(g) == 2:
            a, b = g
            return lambda ma, mx: w(fn(a(), b()), ma)
        if len(g) == 3:
            a, b, c = g
            return lambda ma, mx: w(fn(a(), b(), c()), ma)
        return lambda ma, mx: w(fn(*[x() for x in g]), ma)


HANDLERS = {}


def op(*names):
    def deco(f):
        for n in names:
            HANDLERS[n] = f
        return f
    return deco


# ---- arithmetic -----------------------------------------------------------------

def float_op(ins, fn32, narrow=None, arity=2):
    """Wrap a float function for the type and modifiers of `ins`.
    fn32 works on float32/float64; narrow on lists of float64 for 16-bit types."""
    t, mods = typ(ins), ins.mods
    fz = 'ftz' in mods

    def post(r):
        if 'relu' in mods:
            r = np.where(r > 0, r, r.dtype.type(0))
        if 'sat' in mods:
            r = np.where(r > 0, np.minimum(r, r.dtype.type(1)), r.dtype.type(0))
        return r
    if t in ('f32', 'tf32'):
        if fz:
            return lambda *a: nu.ftz(np.ascontiguousarray(post(fn32(*[nu.ftz(x) for x in a])), F32))
        if 'sat' in mods or 'relu' in mods:
            return lambda *a: post(fn32(*a))
        return fn32
    if t == 'f64':
        return fn32
    if t == 'f16':
        return lambda *a: post((narrow or fn32)(*[x.astype(F32) for x in a])).astype(F16)
    if t == 'bf16':
        return lambda *a: nu.f32_to_bf16(post((narrow or fn32)(*[nu.bf16_to_f32(x) for x in a])))
    if t == 'f16x2':
        def f(*a):
            a = [x.view(F16).astype(F32) for x in same(*a)]
            return post((narrow or fn32)(*a)).astype(F16).view(U32)
        return f
    if t == 'f32x2':
        def f(*a):
            a = [np.ascontiguousarray(x).view(F32) for x in same(*a)]
            if fz:
                return nu.ftz(np.ascontiguousarray(post(fn32(*[nu.ftz(x) for x in a])), F32)).view(U64)
            return post(fn32(*a)).view(U64)
        return f
    if t == 'bf16x2':
        def f(*a):
            a = [nu.bf16_to_f32(x.view(U16)) for x in same(*a)]
            return nu.f32_to_bf16(post((narrow or fn32)(*a)).astype(F32)).view(U32)
        return f
    raise Unsupported(ins.op)


def rounding(ins):
    for m in ins.mods:
        if m in ('rz', 'rm', 'rp'):
            return m
    return 'rn'


def _int_sat(fn):
    def f(a, b):
        return np.clip(fn(a.astype(I64), b.astype(I64)), -2 ** 31, 2 ** 31 - 1).astype(I32)
    return f


def _halves(fn, dt):
    """fn on the two 16-bit halves of 32-bit words."""
    return lambda *a: np.ascontiguousarray(fn(*[np.ascontiguousarray(x).view(dt) for x in same(*a)])).view(U32)


def _fadd(ins, fn):
    t, rd = typ(ins), rounding(ins)
    if t == 'f32' and rd != 'rn':
        return float_op(ins, lambda a, b: nu.f64_to_f32_dir(fn(a.astype(F64), b.astype(F64)), rd))
    if t in ('f32', 'f64'):
        return float_op(ins, fn)
    # 16-bit sums: float32 holds the exact sum of two f16; bf16 needs one rounding from float64
    if t in ('bf16', 'bf16x2') and fn in (np.add, np.subtract):
        one = U16(0x3f80)
        neg = U16(0x8000 if fn is np.subtract else 0)
        if t == 'bf16':
            return lambda a, b: nu.fma_narrow(a, np.array([one]), b ^ neg, 'bf16')

        def f(a, b):
            a, b = same(a, b)
            return nu.fma_narrow(a.view(U16), np.array([one]), b.view(U16) ^ neg, 'bf16').view(U32)
        return f
    return float_op(ins, fn)


@op('add', 'sub')
def _(C, ins):
    t = typ(ins)
    fn = np.add if ins.mods[0] == 'add' else np.subtract
    if 'cc' in ins.mods:
        return _carry(C, ins, False)
    if t in FLOATS:
        return C.simple(ins, _fadd(ins, fn))
    if t in ('u16x2', 's16x2'):
        return C.simple(ins, _halves(fn, U16))
    if 'sat' in ins.mods:
        return C.simple(ins, _int_sat(fn))
    ut = 'u' + t[1:]
    return C.simple(ins, fn, ut)


def _carry(C, ins, use_in):
    """add.cc, addc, sub.cc, subc: the carry lives in S.cc."""
    S, t = C.S, 'u' + typ(ins)[1:]
    sub = ins.mods[0].startswith('sub')
    w, a, b = C.dst(ins.args[0], t), C.src(ins.args[1], t), C.src(ins.args[2], t)
    set_cc, dt = 'cc' in ins.mods, DT[t]

    def f(ma, mx):
        x, y = a(), b()
        c = S.cc.astype(dt) if use_in else dt(0)
        if sub:
            r = x - y - c
            cc = (x < y) | ((x == y) & (c != 0))
        else:
            r = x + y + c
            cc = (r < x) | ((r == x) & (c != 0))
        if set_cc:
            cc = np.atleast_1d(cc)
            S.cc = cc if ma is None else np.where(ma, cc, S.cc)
        w(r, ma)
    return f


@op('addc', 'subc')
def _(C, ins):
    return _carry(C, ins, True)


def _mul(ins, t):
    m = ins.mods
    if 'lo' in m:
        return np.multiply, 'u' + t[1:], None
    if 'wide' in m:
        big = {'u16': 'u32', 's16': 's32', 'u32': 'u64', 's32': 's64'}[t]
        bd = DT[big]
        return (lambda a, b: a.astype(bd) * b.astype(bd)), t, big
    if t == 'u64':
        return nu.mulhi_u64, t, None
    if t == 's64':
        return nu.mulhi_s64, t, None
    wide = {'u32': U64, 's32': I64, 'u16': U32, 's16': I32}[t]
    sh = wide(8 * WIDTH[t])
    return (lambda a, b: ((a.astype(wide) * b.astype(wide)) >> sh).astype(DT[t])), t, None


@op('mul', 'mul24')
def _(C, ins):
    t = typ(ins)
    if t in FLOATS:
        rd = rounding(ins)
        if t == 'f32' and rd != 'rn':
            return C.simple(ins, float_op(ins, lambda a, b: nu.f64_to_f32_dir(a.astype(F64) * b.astype(F64), rd)))
        return C.simple(ins, float_op(ins, np.multiply))
    if ins.mods[0] == 'mul24':
        dt = DT[t]
        return C.simple(ins, lambda a, b: ((a << dt(8)) >> dt(8)) * ((b << dt(8)) >> dt(8)))
    fn, st, out = _mul(ins, t)
    return C.simple(ins, fn, st, out)


@op('mad', 'fma')
def _(C, ins):
    t = typ(ins)
    if t in FLOATS:
        rd = rounding(ins)
        if t == 'f32':
            if rd != 'rn':
                return C.simple(ins, float_op(ins, lambda a, b, c: nu.f64_to_f32_dir(
                    a.astype(F64) * b.astype(F64) + c.astype(F64), rd)))
            return C.simple(ins, float_op(ins, nu.fma_f32))
        if t == 'f64':
            return C.simple(ins, nu.fma_f64)
        if t == 'f32x2':
            return C.simple(ins, float_op(ins, nu.fma_f32))
        kind = 'bf16' if t.startswith('bf16') else 'f16'
        et = U16 if kind == 'bf16' else F16
        relu = 'relu' in ins.mods

        def fix(r):
            if relu:
                r = np.where(r.view(U16) & U16(0x8000), r.view(U16) * U16(0), r.view(U16))
            return r
        if t in ('f16', 'bf16'):
            return C.simple(ins, lambda a, b, c: fix(nu.fma_narrow(a, b, c, kind)))
        return C.simple(ins, lambda a, b, c: fix(nu.fma_narrow(*[x.view(et) for x in same(a, b, c)], kind)).view(U32))
    if 'cc' in ins.mods:
        return _madc(C, ins, False)
    fn, st, out = _mul(ins, t)
    if 'sat' in ins.mods:
        raise Unsupported(ins.op)
    w = C.dst(ins.args[0], out or st)
    a, b, c = C.src(ins.args[1], st), C.src(ins.args[2], st), C.src(ins.args[3], out or st)
    return lambda ma, mx: w(fn(a(), b()) + c(), ma)


@op('madc')
def _(C, ins):
    return _madc(C, ins, True)


def _madc(C, ins, use_in):
    S, t = C.S, typ(ins)
    fn, st, _out = _mul(ins, t)
    ut = 'u' + t[1:]
    dt = DT[ut]
    w = C.dst(ins.args[0], ut)
    a, b, c = C.src(ins.args[1], st), C.src(ins.args[2], st), C.src(ins.args[3], ut)
    set_cc = 'cc' in ins.mods

    def f(ma, mx):
        x, y = fn(a(), b()).view(dt), c()
        k = S.cc.astype(dt) if use_in else dt(0)
        r = x + y + k
        if set_cc:
            cc = np.atleast_1d((r < x) | ((r == x) & (k != 0)))
            S.cc = cc if ma is None else np.where(ma, cc, S.cc)
        w(r, ma)
    return f


def _sdiv(a, b):
    """C division: toward zero. x/0 gives all ones, as GPUs do."""
    z = b == 0
    bb = np.where(z, b.dtype.type(1), b)
    if a.dtype.kind == 'u':
        q = a // bb
        return np.where(z, ~a.dtype.type(0), q)
    q = a // bb
    r = a - q * bb
    q = q + ((r != 0) & ((a < 0) != (bb < 0)))
    return np.where(z, a.dtype.type(-1), q).astype(a.dtype)


def _srem(a, b):
    z = b == 0
    bb = np.where(z, b.dtype.type(1), b)
    r = np.fmod(a, bb)
    return np.where(z, a, r).astype(a.dtype)


@op('div')
def _(C, ins):
    t = typ(ins)
    if t in FLOATS:
        rd = rounding(ins)
        if t == 'f32' and rd != 'rn':
            return C.simple(ins, float_op(ins, lambda a, b: nu.f64_to_f32_dir(a.astype(F64) / b.astype(F64), rd)))
        return C.simple(ins, float_op(ins, np.divide))
    return C.simple(ins, _sdiv)


@op('rem')
def _(C, ins):
    return C.simple(ins, _srem)


@op('abs')
def _(C, ins):
    t = typ(ins)
    if t in FLOATS:
        if t in ('f16', 'bf16', 'f16x2', 'bf16x2'):
            mask = U16(0x7fff) if WIDTH[t] == 2 else U32(0x7fff7fff)
            return C.simple(ins, lambda a: a & mask, 'b16' if WIDTH[t] == 2 else 'b32')
        return C.simple(ins, float_op(ins, np.abs))
    return C.simple(ins, np.abs)


@op('neg')
def _(C, ins):
    t = typ(ins)
    if t in ('f16', 'bf16', 'f16x2', 'bf16x2'):
        mask = U16(0x8000) if WIDTH[t] == 2 else U32(0x80008000)
        return C.simple(ins, lambda a: a ^ mask, 'b16' if WIDTH[t] == 2 else 'b32')
    if t in FLOATS:
        return C.simple(ins, float_op(ins, np.negative))
    return C.simple(ins, np.negative)


@op('min', 'max')
def _(C, ins):
    t, mn = typ(ins), ins.mods[0] == 'min'
    if t in FLOATS:
        raw = (np.minimum if mn else np.maximum) if 'NaN' in ins.mods else (np.fmin if mn else np.fmax)

        def fn(a, b):                       # -0 orders below +0
            r, z = raw(a, b), (a == 0) & (b == 0)
            if z.any():
                neg = np.signbit(a) | np.signbit(b) if mn else np.signbit(a) & np.signbit(b)
                r = np.where(z, np.where(neg, r.dtype.type(-0.0), r.dtype.type(0.0)), r)
            return r
        if 'xorsign' in ins.mods:
            raise Unsupported(ins.op)
        if len(ins.args) == 4:
            return C.simple(ins, float_op(ins, lambda a, b, c: fn(fn(a, b), c)))
        return C.simple(ins, float_op(ins, fn))
    fn = np.minimum if mn else np.maximum
    full = (lambda a, b: np.maximum(fn(a, b), a.dtype.type(0))) if 'relu' in ins.mods else fn
    if t in ('u16x2', 's16x2'):
        return C.simple(ins, _halves(full, U16 if t[0] == 'u' else np.int16))
    return C.simple(ins, full)


def _via64(fn):
    return lambda *a: fn(*[x.astype(F64) for x in a]).astype(a[0].dtype)


def _unary(name, fn):
    @op(name)
    def _(C, ins):
        return C.simple(ins, float_op(ins, _via64(fn)))


_unary('ex2', np.exp2)
_unary('lg2', np.log2)
_unary('sin', np.sin)
_unary('cos', np.cos)
_unary('tanh', np.tanh)
_unary('rsqrt', lambda a: 1.0 / np.sqrt(a))
_unary('rcp', lambda a: 1.0 / a)
_unary('sqrt', np.sqrt)


@op('copysign')
def _(C, ins):
    return C.simple(ins, lambda a, b: np.copysign(b, a))


@op('testp')
def _(C, ins):
    t = typ(ins)
    a, w = C.src(ins.args[1], t), C.dst(ins.args[0], 'pred')
    fn = {'finite': np.isfinite, 'infinite': np.isinf, 'notanumber': np.isnan, 'number': lambda x: ~np.isnan(x),
          'normal': lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
          'subnormal': lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny)}[ins.mods[1]]
    return lambda ma, mx: w(fn(a()), ma)


@op('dp4a', 'dp2a')
def _(C, ins):
    m = ins.mods
    if m[0] == 'dp2a':
        raise Unsupported(ins.op)
    ta, tb = m[1], m[2]
    w, a, b = C.dst(ins.args[0], 'u32'), C.src(ins.args[1], 'b32'), C.src(ins.args[2], 'b32')
    c = C.src(ins.args[3], 'u32')

    def f(ma, mx):
        x, y = same(a(), b())
        ea = x.view(np.int8 if ta[0] == 's' else U8).astype(I32).reshape(-1, 4)
        eb = y.view(np.int8 if tb[0] == 's' else U8).astype(I32).reshape(-1, 4)
        w((ea * eb).sum(1, dtype=I32).view(U32) + c(), ma)
    return f


@op('sad')
def _(C, ins):
    return C.simple(ins, lambda a, b, c: (np.maximum(a, b) - np.minimum(a, b)) + c)


# ---- bits ----------------------------------------------------------------------------

def _logic(name, fn):
    @op(name)
    def _(C, ins):
        return C.simple(ins, fn)


_logic('and', np.bitwise_and)
_logic('or', np.bitwise_or)
_logic('xor', np.bitwise_xor)
_logic('not', np.invert)
_logic('cnot', lambda a: (a == 0).astype(a.dtype))


@op('shl')
def _(C, ins):
    t = 'u' + typ(ins)[1:]
    w, a, b = C.dst(ins.args[0], t), C.src(ins.args[1], t), C.src(ins.args[2], 'u32')
    n, dt = 8 * WIDTH[t], DT[t]
    if ins.args[2][0] == 'imm':
        s = ins.args[2][1]
        if s >= n:
            return lambda ma, mx: w(a() * dt(0), ma)
        k = dt(s)
        return lambda ma, mx: w(a() << k, ma)

    def f(ma, mx):
        s = b()
        w(np.where(s < n, a() << np.minimum(s, U32(n - 1)).astype(dt), dt(0)), ma)
    return f


@op('shr')
def _(C, ins):
    t = typ(ins)
    if t[0] == 'b':
        t = 'u' + t[1:]
    w, a, b = C.dst(ins.args[0], t), C.src(ins.args[1], t), C.src(ins.args[2], 'u32')
    n, dt = 8 * WIDTH[t], DT[t]
    if ins.args[2][0] == 'imm' and ins.args[2][1] < n:
        k = dt(ins.args[2][1])
        return lambda ma, mx: w(a() >> k, ma)

    def f(ma, mx):
        s, x = b(), a()
        r = x >> np.minimum(s, U32(n - 1)).astype(dt)
        w(r if t[0] == 's' else np.where(s < n, r, dt(0)), ma)
    return f


@op('shf')
def _(C, ins):
    left, wrap = ins.mods[1] == 'l', ins.mods[2] == 'wrap'

    def fn(lo, hi, c):
        s = (c & U32(31) if wrap else np.minimum(c, U32(32))).astype(U64)
        v = (hi.astype(U64) << U64(32)) | lo.astype(U64)
        return (((v << s) >> U64(32)) if left else (v >> s)).astype(U32)
    return C.simple(ins, fn, 'b32')


@op('bfe')
def _(C, ins):
    t = typ(ins)
    w, a = C.dst(ins.args[0], t), C.src(ins.args[1], t)
    b, c = C.src(ins.args[2], 'u32'), C.src(ins.args[3], 'u32')
    n, dt = 8 * WIDTH[t], DT[t]

    def f(ma, mx):
        x, pos, ln = a(), b() & U32(255), c() & U32(255)
        if t[0] == 'u':
            y = np.where(pos < n, x >> np.minimum(pos, U32(n - 1)).astype(dt), dt(0))
            keep = np.where(ln >= n, ~dt(0), (dt(1) << np.minimum(ln, U32(n - 1)).astype(dt)) - dt(1))
            w(y & keep, ma)
        else:
            top = np.minimum(pos.astype(I64) + ln.astype(I64), n)
            up = n - top
            y = x << np.minimum(up, n - 1).astype(dt)
            r = y >> np.minimum(up + pos, n - 1).astype(dt)
            past = pos >= n
            sign = x >> dt(n - 1)
            w(np.where(ln == 0, dt(0), np.where(past, sign, r)), ma)
    return f


@op('bfi')
def _(C, ins):
    t = 'u' + typ(ins)[1:]
    w, a, b = C.dst(ins.args[0], t), C.src(ins.args[1], t), C.src(ins.args[2], t)
    c, d = C.src(ins.args[3], 'u32'), C.src(ins.args[4], 'u32')
    n, dt = 8 * WIDTH[t], DT[t]

    def f(ma, mx):
        pos, ln = c() & U32(255), d() & U32(255)
        keep = np.where(ln >= n, ~dt(0), (dt(1) << np.minimum(ln, U32(n - 1)).astype(dt)) - dt(1))
        sh = np.minimum(pos, U32(n - 1)).astype(dt)
        m = np.where(pos < n, keep << sh, dt(0))
        w((b() & ~m) | ((a() << sh) & m), ma)
    return f


@op('bmsk')
def _(C, ins):
    def fn(a, b):
        s = np.minimum(a, U32(32)).astype(U64)
        n = np.minimum(b, U32(32)).astype(U64)
        return ((((U64(1) << n) - U64(1)) << s) & U64(0xffffffff)).astype(U32)
    return C.simple(ins, fn, 'b32')


@op('popc')
def _(C, ins):
    return C.simple(ins, lambda a: np.bitwise_count(a).astype(U32), typ(ins), 'u32')


def _clz(a):
    n = a.dtype.itemsize * 8
    r = np.zeros(a.shape, U32)
    x = a.copy()
    s = n // 2
    while s:
        top = x >> a.dtype.type(n - s) == 0
        r += np.where(top, U32(s), U32(0))
        x = np.where(top, x << a.dtype.type(s), x)
        s //= 2
    return np.where(a == 0, U32(n), r)


def _brev(a):
    n = a.dtype.itemsize
    b = np.ascontiguousarray(a).view(U8).reshape(-1, n)[:, ::-1]
    return np.packbits(np.unpackbits(b, axis=1, bitorder='little').reshape(-1, n, 8)[:, :, ::-1].reshape(-1, n * 8),
                       axis=1, bitorder='little').reshape(-1).view(a.dtype)


_logic('brev', _brev)


@op('clz')
def _(C, ins):
    return C.simple(ins, _clz, typ(ins), 'u32')


@op('bfind')
def _(C, ins):
    t = typ(ins)
    ut, n = 'u' + t[1:], 8 * WIDTH[t]
    sh = 'shiftamt' in ins.mods

    def fn(a):
        if t[0] == 's':
            s = a.view(DT[t])
            a = np.where(s < 0, ~a, a)
        z = _clz(a)
        return np.where(a == 0, U32(0xffffffff), z if sh else U32(n - 1) - z)
    return C.simple(ins, fn, ut, 'u32')


@op('fns')
def _(C, ins):
    raise Unsupported(ins.op)


@op('lop3')
def _(C, ins):
    if ins.args[0][0] == 'pair' or len(ins.args) != 5:
        raise Unsupported(ins.op)
    lut = ins.args[4][1]
    w = C.dst(ins.args[0], 'b32')
    a, b, c = (C.src(x, 'b32') for x in ins.args[1:4])

    def f(ma, mx):
        x, y, z = a(), b(), c()
        r = np.zeros(1, U32)
        for k in range(8):
            if lut >> k & 1:
                r = r | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
        w(r, ma)
    return f


@op('prmt')
def _(C, ins):
    mode = ins.mods[2] if len(ins.mods) > 2 else None

    def fn(a, b, c):
        if mode:
            raise SimError(f'prmt.{mode} is not supported')
        v = (b.astype(U64) << U64(32)) | a.astype(U64)
        r = np.zeros(1, U32)
        for k in range(4):
            s = (c >> U32(4 * k)) & U32(15)
            byte = ((v >> ((s & U32(7)).astype(U64) * U64(8))) & U64(255)).astype(U32)
            if (s & U32(8)).any():
                byte = np.where(s & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte)
            r = r | (byte << U32(8 * k))
        return r
    return C.simple(ins, fn, 'b32')


@op('szext')
def _(C, ins):
    raise Unsupported(ins.op)


# ---- comparison, selection, moves ---------------------------------------------------

def _cmp(name, t):
    if t in FLOATS:
        def to(x):
            return nu.bf16_to_f32(x) if t == 'bf16' else x
        base = name[:-1] if name.endswith('u') and name not in ('u',) else name
        fn = {'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal,
              'gt': np.greater, 'ge': np.greater_equal}.get(base)
        if name == 'num':
            return lambda a, b: ~(np.isnan(to(a)) | np.isnan(to(b)))
        if name == 'nan':
            return lambda a, b: np.isnan(to(a)) | np.isnan(to(b))
        if name.endswith('u'):
            if base == 'ne':
                return lambda a, b: to(a) != to(b)
            return lambda a, b: fn(to(a), to(b)) | np.isnan(to(a)) | np.isnan(to(b))
        if base == 'ne':
            return lambda a, b: (to(a) != to(b)) & ~np.isnan(to(a)) & ~np.isnan(to(b))
        return lambda a, b: fn(to(a), to(b))
    return {'eq': np.equal, 'ne': np.not_equal, 'lt': np.less, 'le': np.less_equal, 'gt': np.greater,
            'ge': np.greater_equal, 'lo': np.less, 'ls': np.less_equal, 'hi': np.greater,
            'hs': np.greater_equal}[name]


@op('setp')
def _(C, ins):
    t = typ(ins)
    mods = [m for m in ins.mods[1:] if m not in ('ftz', t)]
    if t in ('f16x2', 'bf16x2'):
        if len(mods) > 1 or ins.args[0][0] != 'pair':
            raise Unsupported(ins.op)
        cmp, dt = _cmp(mods[0], t[:-2]), F16 if t == 'f16x2' else U16
        ws = [C.dst(d, 'pred') for d in ins.args[0][1:]]
        a, b = C.src(ins.args[1], 'b32'), C.src(ins.args[2], 'b32')

        def h(ma, mx):
            x, y = (np.ascontiguousarray(v).view(dt) for v in same(a(), b()))
            r = cmp(x, y).reshape(-1, 2)
            ws[0](r[:, 0], ma)
            ws[1](r[:, 1], ma)
        return h
    cmp = _cmp(mods[0], t)
    if 'ftz' in ins.mods and t == 'f32':
        raw = cmp
        cmp = lambda a, b: raw(nu.ftz(a), nu.ftz(b))
    boolop = {'and': np.logical_and, 'or': np.logical_or, 'xor': np.logical_xor}[mods[1]] if len(mods) > 1 else None
    d = ins.args[0]
    d1, d2 = (d[1], d[2]) if d[0] == 'pair' else (d, None)
    w1 = C.dst(d1, 'pred')
    w2 = C.dst(d2, 'pred') if d2 else None
    a, b = C.src(ins.args[1], t), C.src(ins.args[2], t)
    if boolop is None:
        if w2 is None:
            return lambda ma, mx: w1(cmp(a(), b()), ma)

        def f(ma, mx):
            r = cmp(a(), b())
            w1(r, ma)
            w2(~r, ma)
        return f
    c = C.src(ins.args[3], 'pred')

    def g(ma, mx):
        r, p = cmp(a(), b()), c()
        if w2:
            w2(boolop(~r, p), ma)
        w1(boolop(r, p), ma)
    return g


@op('set')
def _(C, ins):
    ts = [m for m in ins.mods[1:] if m in DT]
    if len(ts) != 2 or len(ins.args) != 3:
        raise Unsupported(ins.op)
    if ts[1] in ('f16x2', 'bf16x2'):
        hcmp, dt = _cmp(ins.mods[1], ts[1][:-2]), F16 if ts[1] == 'f16x2' else U16
        yes = {'f16x2': U16(0x3c00), 'bf16x2': U16(0x3f80)}.get(ts[0], U16(0xffff))
        w, a, b = C.dst(ins.args[0], 'b32'), C.src(ins.args[1], 'b32'), C.src(ins.args[2], 'b32')

        def h(ma, mx):
            x, y = (np.ascontiguousarray(v).view(dt) for v in same(a(), b()))
            w(np.where(hcmp(x, y), yes, U16(0)).view(U32), ma)
        return h
    cmp = _cmp(ins.mods[1], ts[1])
    w, a, b = C.dst(ins.args[0], ts[0]), C.src(ins.args[1], ts[1]), C.src(ins.args[2], ts[1])
    true = {'f32': F32(1), 'f16': F16(1), 'bf16': U16(0x3f80)}.get(ts[0])
    if true is None:
        dt = UINT[WIDTH[ts[0]]]
        true = ~dt(0)
    zero = type(true)(0)
    return lambda ma, mx: w(np.where(cmp(a(), b()), true, zero), ma)


@op('selp')
def _(C, ins):
    t = typ(ins)
    w, a, b = C.dst(ins.args[0], t), C.src(ins.args[1], t), C.src(ins.args[2], t)
    p = C.src(ins.args[3], 'pred')
    return lambda ma, mx: w(np.where(p(), a(), b()), ma)


@op('slct')
def _(C, ins):
    ts = [m for m in ins.mods[1:] if m in DT]
    w, a, b = C.dst(ins.args[0], ts[0]), C.src(ins.args[1], ts[0]), C.src(ins.args[2], ts[0])
    c = C.src(ins.args[3], ts[1])
    return lambda ma, mx: w(np.where(c() >= 0, a(), b()), ma)


@op('mov')
def _(C, ins):
    t = typ(ins)
    d, s = ins.args
    if t == 'b128':
        raise Unsupported(ins.op)
    if d[0] == 'vec' and len(d[1]) > 1:
        n = len(d[1])
        w = WIDTH[t] // n
        et, ut, dt = f'b{8 * w}', UINT[WIDTH[t]], UINT[w]
        g = C.src(s, t.replace('f', 'b').replace('s', 'b').replace('u', 'b') if t != 'pred' else t)
        ws = [C.dst(x, et) for x in d[1]]

        def f(ma, mx):
            v = g()
            for k, wr in enumerate(ws):
                wr((v >> ut(8 * w * k)).astype(dt), ma)
        return f
    w, g = C.dst(d, t), C.src(s, t)
    return lambda ma, mx: w(g(), ma)


@op('cvta')
def _(C, ins):
    sp = next((SPACES[m] for m in ins.mods if m in SPACES), None)
    delta = {'shared': SHARED_WINDOW, 'local': LOCAL_WINDOW}.get(sp, 0)
    t = typ(ins)
    if 'to' in ins.mods:
        delta = -delta
    k = DT['u64'](delta % (1 << 64))
    w, a = C.dst(ins.args[0], t), C.src(ins.args[1], t)
    return lambda ma, mx: w(a() + k if delta else a(), ma)


@op('isspacep')
def _(C, ins):
    sp = SPACES[ins.mods[1]]
    w, a = C.dst(ins.args[0], 'pred'), C.src(ins.args[1], 'b64')
    lo = {'shared': SHARED_WINDOW, 'local': LOCAL_WINDOW}.get(sp)
    if lo:
        return lambda ma, mx: w((a() >= U64(lo)) & (a() < U64(lo + (1 << 32))), ma)
    return lambda ma, mx: w(a() >= U64(LOCAL_WINDOW + (1 << 32)), ma)


# ---- conversion -----------------------------------------------------------------------

def _float_to_int(x, dt, how):
    x = x.astype(F64) if x.dtype != F64 else x
    x = {'rni': np.rint, 'rzi': np.trunc, 'rmi': np.floor, 'rpi': np.ceil}[how](x)
    info = np.iinfo(dt)
    x = np.where(np.isnan(x), 0.0, x)
    big = x >= float(info.max)
    small = x <= float(info.min)
    r = np.where(big | small, 0.0, x).astype(dt)
    return np.where(big, dt(info.max), np.where(small, dt(info.min), r))


@op('cvt')
def _(C, ins):
    mods = ins.mods[1:]
    ts = [m for m in mods if m in DT or m in ('e4m3x2', 'e5m2x2')]
    if 'pack' in mods or len(ts) != 2:
        raise Unsupported(ins.op)
    to, frm = ts
    rnd = next((m for m in mods if m in ('rn', 'rz', 'rm', 'rp', 'rna', 'rni', 'rzi', 'rmi', 'rpi')), None)
    sat, fz, relu = 'sat' in mods, 'ftz' in mods, 'relu' in mods

    if to in ('f16x2', 'bf16x2') and frm == 'f32':
        w, hi, lo = C.dst(ins.args[0], 'b32'), C.src(ins.args[1], 'f32'), C.src(ins.args[2], 'f32')
        if to == 'f16x2':
            one = lambda x: x.astype(F16).view(U16)
        else:
            one = lambda x: nu.f32_to_bf16(x, rnd)

        def f(ma, mx):
            h, l = hi(), lo()
            if relu:
                h, l = np.fmax(h, F32(0)), np.fmax(l, F32(0))
            w((one(h).astype(U32) << U32(16)) | one(l).astype(U32), ma)
        return f
    if to in ('e4m3x2', 'e5m2x2'):
        kind = to[:4]
        w = C.dst(ins.args[0], 'b16')
        if frm == 'f32':
            hi, lo = C.src(ins.args[1], 'f32'), C.src(ins.args[2], 'f32')

            def f(ma, mx):
                h, l = hi(), lo()
                if relu:
                    h, l = np.fmax(h, F32(0)), np.fmax(l, F32(0))
                w((nu.to_fp8(h, kind).astype(U16) << U16(8)) | nu.to_fp8(l, kind).astype(U16), ma)
            return f
        g = C.src(ins.args[1], 'b32')

        def f(ma, mx):
            v = g()
            p = [x.astype(U16) for x in (v & U32(0xffff), v >> U32(16))]
            p = [x.view(F16).astype(F32) if frm == 'f16x2' else nu.bf16_to_f32(x) for x in p]
            if relu:
                p = [np.fmax(x, F32(0)) for x in p]
            w((nu.to_fp8(p[1], kind).astype(U16) << U16(8)) | nu.to_fp8(p[0], kind).astype(U16), ma)
        return f
    if frm in ('e4m3x2', 'e5m2x2'):
        tab = nu.FP8_TABLE[frm[:4]].astype(F16).view(U16)
        if to != 'f16x2':
            raise Unsupported(ins.op)
        w, g = C.dst(ins.args[0], 'b32'), C.src(ins.args[1], 'b16')

        def f(ma, mx):
            v = g()
            w((tab[v >> U16(8)].astype(U32) << U32(16)) | tab[v & U16(255)].astype(U32), ma)
        return f

    w, g = C.dst(ins.args[0], to), C.src(ins.args[1], frm)
    dt = DT[to]
    ff, tf = frm in FLOATS, to in FLOATS

    def widen(x):
        if frm == 'bf16':
            x = nu.bf16_to_f32(x)
        elif frm == 'f16':
            x = x.astype(F32)
        if fz and x.dtype == F32 and frm == 'f32':
            x = nu.ftz(x)
        return x

    if not ff and not tf:
        if sat:
            lo, hi = np.iinfo(dt).min, np.iinfo(dt).max

            def fn(x):
                if x.dtype == U64:
                    return np.minimum(x, U64(hi)).astype(dt)
                if dt is U64:
                    return np.maximum(x, x.dtype.type(0)).astype(dt)
                return np.clip(x.astype(I64), lo, hi).astype(dt)
        else:
            fn = lambda x: x.astype(dt)
    elif ff and not tf:
        how = rnd or 'rzi'
        fn = lambda x: _float_to_int(widen(x), dt, how)
    elif not ff:
        def fn(x):
            if to == 'f32':
                if rnd in ('rz', 'rm', 'rp') and x.dtype.itemsize < 8:
                    return nu.f64_to_f32_dir(x.astype(F64), rnd)
                if rnd in ('rz', 'rm', 'rp'):
                    raise SimError(f'{ins.op} is not supported')
                return x.astype(F32)
            if to == 'bf16':
                return nu.f64_to_bf16(x.astype(F64))
            return x.astype(dt)
    else:
        def fn(x):
            x = widen(x)
            if rnd in ('rni', 'rzi', 'rmi', 'rpi'):
                x = {'rni': np.rint, 'rzi': np.trunc, 'rmi': np.floor, 'rpi': np.ceil}[rnd](x)
            if relu:
                x = np.fmax(x, x.dtype.type(0))
            if sat:
                x = np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))
            if to == 'bf16':
                return nu.f64_to_bf16(x) if x.dtype == F64 else nu.f32_to_bf16(x, rnd)
            if to == 'tf32':
                b = x.view(U32)
                if rnd == 'rna':
                    b = b + U32(0x1000)
                else:
                    b = b + U32(0xfff) + ((b >> U32(13)) & U32(1))
                return (b & U32(0xffffe000)).view(F32)
            if to == 'f32':
                y = nu.f64_to_f32_dir(x, rnd or 'rn') if x.dtype == F64 else x
                return nu.ftz(y) if fz else y
            if to == 'f16' and rnd == 'rz':
                y = x.astype(F16)
                over = np.abs(y.astype(F64)) > np.abs(x)
                return np.where(over, np.nextafter(y, F16(0)), y)
            return x.astype(dt)
    return lambda ma, mx: w(fn(g()), ma)


# ---- memory -------------------------------------------------------------------------------

@op('ld', 'ldu')
def _(C, ins):
    S, t = C.S, typ(ins)
    if t == 'b128':
        raise Unsupported(ins.op)
    d, mem = ins.args[0], ins.args[1]
    outs = d[1] if d[0] == 'vec' else [d]
    w, n = WIDTH[t], len(outs)
    sp, addr = C.space(ins, mem), C.addr(mem)
    writers = [C.dst_at(o, t) for o in outs]
    if sp == 'param':
        def f(ma, mx):
            a = addr()
            if a.shape == (1,):
                o = int(a[0])
                v = S.params[o:o + w * n].view(UINT[w])
                for k, wr in enumerate(writers):
                    wr(v[k:k + 1], None if ma is None else 0, ma)
            else:
                ix = None if mx is None else S.active(mx)
                a = a if ix is None else a[ix]
                v = np.append(S.params, np.zeros(-len(S.params) % 8, U8)).view(UINT[w])
                for k, wr in enumerate(writers):
                    wr(v[a // w + k], ix, mx)
        return f

    def g(ma, mx):
        vals, ix = S.load(sp, ins, addr(), mx, w, n)
        for wr, v in zip(writers, vals, strict=False):
            wr(v, ix, mx)
    return g


@op('st')
def _(C, ins):
    S, t = C.S, typ(ins)
    if t == 'b128':
        raise Unsupported(ins.op)
    mem, s = ins.args[0], ins.args[1]
    ins_ = s[1] if s[0] == 'vec' else [s]
    w = WIDTH[t]
    ut = f'b{8 * w}'
    sp, addr = C.space(ins, mem), C.addr(mem)
    gets = [C.src(x, t if x[0] == 'imm' else ut) for x in ins_]
    un = UINT[w]

    def f(ma, mx):
        S.store(sp, ins, addr(), mx, w, [g().view(un) for g in gets])
    return f


def _atom_fn(kind, t):
    """fn(old, b, c) on unsigned words, and an equivalent ufunc for .at (or None)."""
    dt, ut = DT[t], UINT[WIDTH[t]]
    if kind == 'exch':
        return (lambda o, b, c: b), None
    if kind == 'cas':
        return (lambda o, b, c: np.where(o == b, c, o)), None
    if kind == 'inc':
        return (lambda o, b, c: np.where(o >= b, ut(0), o + ut(1))), None
    if kind == 'dec':
        return (lambda o, b, c: np.where((o == 0) | (o > b), b, o - ut(1))), None
    if t in ('f16x2', 'bf16x2', 'bf16'):
        f2 = {'add': np.add, 'min': np.fmin, 'max': np.fmax}[kind]

        def fn(o, b, c):
            if t == 'f16x2':
                return f2(np.ascontiguousarray(o).view(F16), np.ascontiguousarray(b).view(F16)).view(ut)
            x, y = (nu.bf16_to_f32(np.ascontiguousarray(v).view(U16)) for v in (o, b))
            return nu.f32_to_bf16(f2(x, y)).view(ut)
        return fn, None
    uf = {'add': np.add, 'and': np.bitwise_and, 'or': np.bitwise_or, 'xor': np.bitwise_xor,
          'min': np.fmin if t in FLOATS else np.minimum, 'max': np.fmax if t in FLOATS else np.maximum}[kind]
    return (lambda o, b, c: uf(o.view(dt), b.view(dt)).view(ut)), (uf, dt)


@op('atom', 'red')
def _(C, ins):
    S, t = C.S, typ(ins)
    if t == 'b128' or 'async' in ins.mods:
        raise Unsupported(ins.op)
    red = ins.mods[0] == 'red'
    kind = next(m for m in ins.mods if m in ('add', 'min', 'max', 'inc', 'dec', 'and', 'or', 'xor', 'exch', 'cas'))
    args = list(ins.args)
    d = None if red else args.pop(0)
    mem = args.pop(0)
    sp, addr, w = C.space(ins, mem), C.addr(mem), WIDTH[t]
    outs = [] if d is None else (d[1] if d[0] == 'vec' else [d])
    bs = args[0][1] if args[0][0] == 'vec' else [args[0]]
    gb = [C.src(x, t) for x in bs]
    gc = C.src(args[1], t) if kind == 'cas' else None
    want = any(o[0] == 'reg' and o[1] in C.reads for o in outs)
    fn, uf = _atom_fn(kind, t)
    int_add = kind == 'add' and t not in FLOATS
    writers = [C.dst_at(o, t) for o in outs]
    un = UINT[w]

    def f(ma, mx):
        a = addr()
        c = gc().view(un) if gc else None
        for k, g in enumerate(gb):
            old, ix = S.atomic(sp, ins, a + k * w if k else a, mx, w, fn, g().view(un), c, uf, int_add, want)
            if want:
                writers[k](old, ix, mx)
    return f


@op('cp')
def _(C, ins):
    S, m = C.S, ins.mods
    if 'bulk' in m:
        return bulk_copy(C, ins)
    if m[:2] != ('cp', 'async'):
        raise Unsupported(ins.op)
    if 'mbarrier' in m:
        return cp_async_arrive(C, ins)
    if 'commit_group' in m:
        return lambda ma, mx: async_commit(S, mx)
    if 'wait_group' in m:
        n = ins.args[0][1]
        return lambda ma, mx: async_wait(S, mx, n)
    if 'wait_all' in m:
        return lambda ma, mx: (async_commit(S, mx), async_wait(S, mx, 0))
    dst, src, size = C.addr(ins.args[0]), C.addr(ins.args[1]), ins.args[2][1]
    extra = C.src(ins.args[3], 'u32') if (len(ins.args) > 3 and not _is_pred(C, ins.args[3]) \
        and not any('cache_hint' in x for x in m)) or len(ins.args) > 4 else None

    def f(ma, mx):
        mask = S.live if mx is None else mx
        ix = S.active(mask)
        take = lambda a: np.broadcast_to(a, ix.shape) if a.shape == (1,) else a[ix]
        d, s = take(dst()), take(src())
        n = take(extra()).astype(I64) if extra else np.full(ix.shape, size, I64)
        if (n > size).any():
            raise SimError('cp.async: src-size larger than cp-size')
        if S.trace:
            full = np.zeros(S.N, bool)
            full[ix[n > 0]] = True
            S.trace.access(ins, 'global', np.broadcast_to(src(), (S.N,)), full, size, False)
        S.expect_waited(mask)
        if S.async_group is None:
            S.async_group = np.zeros(S.N, I64)
        S.async_pending.append([ins, ix, S.async_group[ix].copy(), d, s, n, size])
    return f


def _is_pred(C, a):
    return a[0] == 'not' or (a[0] == 'reg' and C.regs[a[1]] == 'pred')


def async_commit(S, mx):
    if S.async_group is None:
        S.async_group = np.zeros(S.N, I64)
    S.async_group = S.async_group + (1 if mx is None else mx.astype(I64))


def async_wait(S, mx, keep):
    """Complete the copies of all but the last `keep` groups of the active threads."""
    if not S.async_pending:
        return
    left = []
    for ins, ix, grp, d, s, n, size in S.async_pending:
        go = grp < S.async_group[ix] - keep
        if mx is not None:
            go &= mx[ix]
        if go.any():
            _async_copy(S, ins, ix[go], d[go], s[go], n[go], size)
        if not go.all():
            k = ~go
            left.append([ins, ix[k], grp[k], d[k], s[k], n[k], size])
    S.async_pending = left


def _async_copy(S, ins, ix, d, s, n, size):
    from .memory import AccessError
    w = min(size, 8)
    try:
        vals = [np.zeros(len(ix), UINT[w]) for _ in range(size // w)]
        whole = n == size
        if whole.any():
            for v, x in zip(vals, S.mem.load(s[whole], w, size // w), strict=False):
                v[whole] = x
        for b in range(size):
            part = (n > b) & ~whole
            if part.any():
                x = S.mem.load(s[part] + b, 1, 1)[0].astype(UINT[w])
                vals[b // w][part] |= x << UINT[w](8 * (b % w))
        arr, k, _ = S.words('shared', d, ix, w, size // w, True)[0]
        for j, v in enumerate(vals):
            arr[k + j] = v
    except AccessError as e:
        S.fault(e, ix)
    if S.trace:
        full = np.zeros(S.N, I64)
        full[ix] = d
        m = np.zeros(S.N, bool)
        m[ix] = True
        S.trace.access(ins, 'shared', full, m, size, True)


# ---- mbarrier and bulk copies (clusters of one CTA) ---------------------------------------

class MBarrier:
    """Phase, arrivals still expected, and bytes still expected."""
    __slots__ = ('count', 'pending', 'phase', 'tx')

    def __init__(self, count):
        self.count = self.pending = count
        self.tx = self.phase = 0

    def settle(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count
            return True
        return False


def _smem_offsets(S, a, ix):
    """Shared offsets of the active threads; generic shared addresses are accepted."""
    a = np.broadcast_to(a, ix.shape) if a.shape == (1,) else a[ix]
    return np.where(a >= SHARED_WINDOW, a - SHARED_WINDOW, a)


def _mbar(S, cta, off, lane):
    b = S.mbar.get((cta, off))
    if b is None:
        raise SimError(f'mbarrier at shared offset {off} was never initialised, used by {S.who(lane)}')
    return b


def _settle(S, b, cta):
    if b.pending < 0:
        raise SimError('mbarrier: more arrivals than its count')
    if b.settle() and S.trace:
        S.trace.barrier(cta)


@op('mbarrier')
def _(C, ins):
    S, m = C.S, ins.mods
    args = list(ins.args)
    d = args.pop(0) if dest_count(ins) else None
    if d and d[0] == 'mem':
        args.insert(0, d)
        d = None
    addr = C.addr(args[0])
    rest = [C.src(a, 'b64' if 'test_wait' in m and 'parity' not in m else 'u32') for a in args[1:]]
    kind = m[1]
    out = C.dst_at(d, 'pred' if 'wait' in kind else 'b64') if d else None

    def f(ma, mx):
        ix = S.active(S.live if mx is None else mx)
        off, cta = _smem_offsets(S, addr(), ix), S.cta_of[ix]
        extra = [np.broadcast_to(g(), (S.N,))[ix] for g in rest]
        if kind == 'init':
            for c, o, n in zip(cta.tolist(), off.tolist(), extra[0].tolist(), strict=False):
                S.mbar[c, o] = MBarrier(n)
            return
        if kind == 'inval':
            for c, o in zip(cta.tolist(), off.tolist(), strict=False):
                S.mbar.pop((c, o), None)
            return
        res = np.zeros(len(ix), bool if 'wait' in kind else U64)
        key = (cta << 32) | off
        if 'wait' in kind:
            for k in np.unique(key):
                at = key == k
                b = _mbar(S, int(k) >> 32, int(k) & 0xffffffff, ix[at][0])
                if 'parity' in m:
                    res[at] = (b.phase & 1) != (extra[0][at] & 1)
                else:
                    res[at] = U64(b.phase) != extra[0][at]
        else:
            for j, k in enumerate(key.tolist()):
                b = _mbar(S, k >> 32, k & 0xffffffff, ix[j])
                res[j] = b.phase
                if 'expect_tx' in m:
                    b.tx += int(extra[0][j])
                    n = 1
                elif kind == 'complete_tx':
                    b.tx -= int(extra[0][j])
                    n = 0
                else:
                    n = int(extra[0][j]) if extra else 1
                if kind == 'arrive_drop':
                    b.count -= n
                if kind in ('arrive', 'arrive_drop'):
                    b.pending -= n
                _settle(S, b, k >> 32)
        if out:
            out(res, None if len(ix) == S.N else ix, mx)
    return f


def cp_async_arrive(C, ins):
    S, addr, noinc = C.S, C.addr(ins.args[0]), 'noinc' in ins.mods

    def f(ma, mx):
        async_commit(S, mx)
        async_wait(S, mx, 0)
        ix = S.active(S.live if mx is None else mx)
        for c, o, lane in zip(S.cta_of[ix].tolist(), _smem_offsets(S, addr(), ix).tolist(), ix, strict=False):
            b = _mbar(S, c, o, lane)
            if noinc:
                b.pending -= 1
                _settle(S, b, c)
    return f


def bulk_copy(C, ins):
    """cp.async.bulk and cp.reduce.async.bulk without tensor maps; the copy happens at once."""
    S, m = C.S, ins.mods
    if 'tensor' in m or 'multicast::cluster' in m:
        raise Unsupported(ins.op)
    if 'commit_group' in m or 'wait_group' in m or 'prefetch' in m:
        return lambda ma, mx: None
    spaces = [SPACES[x] for x in m if x in SPACES]
    to, frm = spaces[:2]
    dst, src, size = C.addr(ins.args[0]), C.addr(ins.args[1]), C.src(ins.args[2], 'u32')
    bar = C.addr(ins.args[3]) if any(x.startswith('mbarrier') for x in m) else None
    red = None
    if m[1] == 'reduce':
        t = typ(ins)
        kind = next(x for x in m if x in ('add', 'min', 'max', 'inc', 'dec', 'and', 'or', 'xor'))
        red = (_atom_fn(kind, t)[0], UINT[WIDTH[t]])

    def f(ma, mx):
        ix = S.active(S.live if mx is None else mx)
        take = lambda a: np.broadcast_to(a, (S.N,))[ix].tolist()
        d, s, n, cta = take(dst()), take(src()), take(size()), S.cta_of[ix].tolist()
        bars = _smem_offsets(S, bar(), ix).tolist() if bar else None
        for j, lane in enumerate(ix.tolist()):
            if n[j] % 16 or d[j] % 16 or s[j] % 16:
                raise SimError(f'bulk copy needs 16-byte alignment: sizes {n[j]}, to {d[j]:#x}, from {s[j]:#x}')
            if not n[j]:
                continue
            x = _window(S, ins, frm, s[j], n[j], cta[j], lane, False)
            y = _window(S, ins, to, d[j], n[j], cta[j], lane, True)
            if red:
                y.view(red[1])[:] = red[0](y.view(red[1]), x.view(red[1]), None)
            else:
                y[:] = x
            if bars:
                b = _mbar(S, cta[j], bars[j], lane)
                b.tx -= n[j]
                _settle(S, b, cta[j])
    return f


def _window(S, ins, space, a, n, cta, lane, store):
    """Bytes behind a bulk copy operand."""
    from .memory import AccessError
    a = a - SHARED_WINDOW if space == 'shared' and a >= SHARED_WINDOW else a
    if S.trace:
        S.trace.bulk(ins, space, a, n, cta, lane, store)
    try:
        if space == 'shared':
            S._inside(np.array([a]), n, S.smem_size, 'shared') if n & (n - 1) == 0 else \
                S._inside(np.array([a, a + n - 16]), 16, S.smem_size, 'shared')
            at = cta * S.sstride + a
            return S.smem[at:at + n]
        (b, _), = S.mem.locate(np.array([a, a + n - 16]), 16, store)
        return b.data[a - b.base:a - b.base + n]
    except AccessError as e:
        S.fault(e, np.array([lane, lane]))
    except ValueError:
        raise SimError('bulk copy spans two buffers') from None


@op('mapa')
def _(C, ins):
    w, a = C.dst(ins.args[0], typ(ins)), C.src(ins.args[1], typ(ins))
    return lambda ma, mx: w(a(), ma)


@op('getctarank')
def _(C, ins):
    w = C.dst(ins.args[0], 'u32')
    return lambda ma, mx: w(np.zeros(1, U32), ma)


def _nothing(C, ins):
    return lambda ma, mx: None


for _n in ('membar', 'fence', 'prefetch', 'prefetchu', 'nanosleep', 'discard', 'applypriority', 'setmaxnreg',
           'pmevent'):
    HANDLERS[_n] = _nothing


@op('griddepcontrol')
def _(C, ins):
    S = C.S
    if 'launch_dependents' in ins.mods:   # they wait for the whole grid, whenever they start
        return lambda ma, mx: None

    def f(ma, mx):
        S.waited |= S.live if mx is None else mx
    return f


@op('bar', 'barrier')
def _(C, ins):
    if 'warp' in ins.mods or 'cluster' in ins.mods:      # CTA barriers are the scheduler's; clusters have one CTA
        return lambda ma, mx: None
    raise Unsupported(ins.op)


@op('createpolicy')
def _(C, ins):
    w = C.dst(ins.args[0], 'b64')
    return lambda ma, mx: w(np.zeros(1, U64), ma)


@op('trap', 'brkpt')
def _(C, ins):
    S = C.S

    def f(ma, mx):
        raise SimError(f'{ins.op} executed by {S.who(S.active(S.live if mx is None else mx)[0])}')
    return f


@op('call')
def _(C, ins):
    S = C.S
    name = ins.args[0][1] if ins.args else '?'
    if name == 'vprintf':
        return lambda ma, mx: S.warn('printf in the kernel was ignored')

    def f(ma, mx):
        who = S.who(S.active(S.live if mx is None else mx)[0])
        if 'assert' in name:
            raise SimError(f'device assert failed in {who}')
        raise SimError(f'call of {name} is not supported ({who})')
    return f


# ---- warp-wide -------------------------------------------------------------------------------

@op('activemask')
def _(C, ins):
    S, w = C.S, C.dst(ins.args[0], 'b32')
    return lambda ma, mx: w(np.repeat(S.bits(S.live if mx is None else mx), 32), ma)


@op('shfl')
def _(C, ins):
    S, mode = C.S, ins.mods[2] if ins.mods[1] == 'sync' else None
    if mode is None:
        raise Unsupported(ins.op + ' (without .sync)')
    d = ins.args[0]
    d1, d2 = (d[1], d[2]) if d[0] == 'pair' else (d, None)
    w1 = C.dst(d1, 'b32')
    w2 = C.dst(d2, 'pred') if d2 and d2[0] != 'sink' else None
    a, b, c = C.src(ins.args[1], 'b32'), C.src(ins.args[2], 'b32'), C.src(ins.args[3], 'b32')

    def f(ma, mx):
        v = a()
        lane = S.laneid
        bv, cv = (b() & U32(31)).astype(I64), c().astype(I64)
        seg = (cv >> 8) & 31
        cl = cv & 31
        lo = lane & seg
        hi = lo | (cl & ~seg)
        if mode == 'up':
            j = lane - bv
            ok = j >= hi
        elif mode == 'down':
            j = lane + bv
            ok = j <= hi
        elif mode == 'bfly':
            j = lane ^ bv
            ok = j <= hi
        else:
            j = lo | (bv & ~seg)
            ok = j <= hi
        src = S.warp_base + np.where(ok, j, lane)
        m = S.live if mx is None else mx
        if not m.all():
            bad = m & ~m[src]
            if bad.any():
                msg = 'shfl reads from a thread that does not take part'
                if S.strict:
                    raise SimError(f'{msg}: {S.who(np.flatnonzero(bad)[0])}')
                S.warn(msg)
        w1(v[src] if v.shape != (1,) else v, ma)
        if w2:
            w2(ok, ma)
    return f


@op('vote')
def _(C, ins):
    S, mode = C.S, ins.mods[2] if ins.mods[1] == 'sync' else ins.mods[1]
    p = C.src(ins.args[1], 'pred')
    w = C.dst(ins.args[0], 'b32' if mode == 'ballot' else 'pred')

    def f(ma, mx):
        m = S.live if mx is None else mx
        act = S.bits(m)
        yes = S.bits(p()) & act
        if mode == 'ballot':
            r = yes
        elif mode == 'any':
            r = yes != 0
        elif mode == 'all':
            r = yes == act
        else:
            r = (yes == act) | (yes == 0)
        w(np.repeat(r, 32), ma)
    return f


@op('redux')
def _(C, ins):
    S, t = C.S, typ(ins)
    kind = ins.mods[2]
    if t == 'f32':
        raise Unsupported(ins.op)
    w, a = C.dst(ins.args[0], t), C.src(ins.args[1], t)
    uf = {'add': np.add, 'min': np.minimum, 'max': np.maximum, 'and': np.bitwise_and, 'or': np.bitwise_or,
          'xor': np.bitwise_xor}[kind]
    info = np.iinfo(DT[t])
    ident = {'add': 0, 'min': info.max, 'max': info.min, 'and': -1 if t[0] == 's' else info.max, 'or': 0, 'xor': 0}[kind]

    def f(ma, mx):
        m = S.live if mx is None else mx
        v = np.where(m, a(), DT[t](ident)).reshape(-1, 32)
        w(np.repeat(uf.reduce(v, axis=1, dtype=DT[t]), 32), ma)
    return f


@op('match')
def _(C, ins):
    S, t = C.S, typ(ins)
    mode = ins.mods[1]
    d = ins.args[0]
    d1, d2 = (d[1], d[2]) if d[0] == 'pair' else (d, None)
    w1 = C.dst(d1, 'b32')
    w2 = C.dst(d2, 'pred') if d2 else None
    a = C.src(ins.args[1], t)

    def f(ma, mx):
        m = (S.live if mx is None else mx).reshape(-1, 32)
        v = np.broadcast_to(a(), (S.N,)).reshape(-1, 32)
        eq = (v[:, :, None] == v[:, None, :]) & m[:, None, :]
        bits = np.packbits(eq.reshape(-1, 32), axis=1, bitorder='little').view(U32).reshape(-1)
        if mode == 'any':
            w1(bits, ma)
            return
        ok = np.repeat(S.bits(m.reshape(-1)), 32) == bits
        w1(np.where(ok, bits, U32(0)), ma)
        if w2:
            w2(ok, ma)
    return f


@op('elect')
def _(C, ins):
    S, d = C.S, ins.args[0]
    w1, w2 = C.dst(d[1], 'b32'), C.dst(d[2], 'pred')

    def f(ma, mx):
        m = S.live if mx is None else mx
        first = np.where(m.any() & m.reshape(-1, 32).any(1), m.reshape(-1, 32).argmax(1), 0)
        leader = np.repeat(first, 32)
        w1(leader.astype(U32), ma)
        w2(S.laneid == leader, ma)
    return f


def _full_warps(S, mx, what):
    m = S.live if mx is None else mx
    warps = m.reshape(-1, 32)
    on = warps.any(1)
    if not warps[on].all():
        raise SimError(f'{what} needs all 32 threads of the warp')
    return on


@op('ldmatrix')
def _(C, ins):
    S = C.S
    if 'b16' not in ins.mods or 'm8n8' not in ins.mods:
        raise Unsupported(ins.op)
    d = ins.args[0]
    outs = d[1] if d[0] == 'vec' else [d]
    n, trans = len(outs), 'trans' in ins.mods
    addr = C.addr(ins.args[1])
    ws = [C.dst_at(o, 'b32') for o in outs]

    def f(ma, mx):
        on = np.flatnonzero(_full_warps(S, mx, 'ldmatrix'))
        a = np.broadcast_to(addr(), (S.N,)).reshape(-1, 32)[on][:, :8 * n]
        lanes = (on[:, None] * 32 + np.arange(32)).reshape(-1)
        src = (on[:, None] * 32 + np.arange(8 * n)).reshape(-1)
        if S.trace:
            full, m = np.zeros(S.N, I64), np.zeros(S.N, bool)
            full[src], m[src] = a.reshape(-1), True
            S.trace.access(ins, 'shared', full, m, 16, False)
        arr, k, _ = S.words('shared', a.reshape(-1), src, 2, 8, False)[0]
        rows = arr[k[:, None] + np.arange(8)].reshape(len(on), n, 8, 8)
        l = np.arange(32)
        for j, w in enumerate(ws):
            mat = rows[:, j]
            if trans:
                mat = mat.transpose(0, 2, 1)
            lo, hi = mat[:, l // 4, 2 * (l % 4)], mat[:, l // 4, 2 * (l % 4) + 1]
            v = (lo.astype(U32) | (hi.astype(U32) << U32(16))).reshape(-1)
            w(v, None if mx is None and len(on) * 32 == S.N else lanes, mx)
    return f


@op('stmatrix')
def _(C, ins):
    S = C.S
    if 'b16' not in ins.mods or 'm8n8' not in ins.mods:
        raise Unsupported(ins.op)
    s = ins.args[1]
    parts = s[1] if s[0] == 'vec' else [s]
    n, trans = len(parts), 'trans' in ins.mods
    addr = C.addr(ins.args[0])
    gs = [C.src(o, 'b32') for o in parts]

    def f(ma, mx):
        on = np.flatnonzero(_full_warps(S, mx, 'stmatrix'))
        a = np.broadcast_to(addr(), (S.N,)).reshape(-1, 32)[on][:, :8 * n]
        src = (on[:, None] * 32 + np.arange(8 * n)).reshape(-1)
        if S.trace:
            full, m = np.zeros(S.N, I64), np.zeros(S.N, bool)
            full[src], m[src] = a.reshape(-1), True
            S.trace.access(ins, 'shared', full, m, 16, True)
        l = np.arange(32)
        rows = np.zeros((len(on), n, 8, 8), U16)
        for j, g in enumerate(gs):
            v = np.broadcast_to(g(), (S.N,)).reshape(-1, 32)[on]
            mat = np.zeros((len(on), 8, 8), U16)
            mat[:, l // 4, 2 * (l % 4)] = (v & U32(0xffff)).astype(U16)
            mat[:, l // 4, 2 * (l % 4) + 1] = (v >> U32(16)).astype(U16)
            rows[:, j] = mat.transpose(0, 2, 1) if trans else mat
        arr, k, _ = S.words('shared', a.reshape(-1), src, 2, 8, True)[0]
        arr[k[:, None] + np.arange(8)] = rows.reshape(-1, 8)
    return f


@op('mma')
def _(C, ins):
    """mma.sync m16n8kK row.col with f32 (or f16) accumulators, s32 for 8-bit integers."""
    S, m = C.S, ins.mods
    shape = next((x for x in m if x.startswith('m16n8k')), None)
    i = m.index('col') + 1 if 'col' in m else 0
    if shape is None or 'sp' in m or not i:
        raise Unsupported(ins.op)
    td, ta, tb, tc = [x for x in m[i:] if x not in ('satfinite',)][:4]
    per = {'f16': 2, 'bf16': 2, 'tf32': 1, 'e4m3': 4, 'e5m2': 4, 's8': 4, 'u8': 4}.get(ta)
    if per is None or td not in ('f32', 's32', 'f16'):
        raise Unsupported(ins.op)
    K = int(shape[6:])
    d, a, b, c = [x[1] if x[0] == 'vec' else [x] for x in ins.args]
    ga, gb = [C.src(x, 'b32') for x in a], [C.src(x, 'b32') for x in b]
    gc = [C.src(x, 'b32') for x in c]
    wd = [C.dst_at(x, 'b32') for x in d]

    def decode(words, t):
        """(warps, 32) words -> (warps, 32, per) float values"""
        words = np.ascontiguousarray(words)
        if t == 'tf32':
            return (words & U32(0xffffe000)).view(F32)[:, :, None]
        if t == 'f16':
            v = words.view(F16).astype(F32)
        elif t == 'bf16':
            v = nu.bf16_to_f32(words.view(U16))
        elif t in ('s8', 'u8'):
            v = words.view(np.int8 if t == 's8' else U8).astype(I32)
        else:
            v = nu.FP8_TABLE[t][words.view(U8)]
        return v.reshape(words.shape + (per,))

    def f(ma, mx):
        on = np.flatnonzero(_full_warps(S, mx, 'mma'))
        lanes = (on[:, None] * 32 + np.arange(32)).reshape(-1)
        get = lambda g: np.broadcast_to(g(), (S.N,)).reshape(-1, 32)[on]
        l = np.arange(32)
        g, tig = l // 4, l % 4
        acc = I32 if td == 's32' else F32
        A = np.zeros((len(on), 16, K), acc)
        B = np.zeros((len(on), K, 8), acc)
        for r, x in enumerate(ga):
            v = decode(get(x), ta)
            for e in range(per):
                A[:, g + 8 * (r & 1), tig * per + e + (r >> 1) * 4 * per] = v[:, :, e]
        for r, x in enumerate(gb):
            v = decode(get(x), tb)
            for e in range(per):
                B[:, tig * per + e + r * 4 * per, g] = v[:, :, e]
        D = np.matmul(A, B)
        if tc == 'f16':
            for r, x in enumerate(gc):
                v = np.ascontiguousarray(get(x)).view(F16).reshape(len(on), 32, 2).astype(F32)
                for e in range(2):
                    D[:, g + 8 * r, tig * 2 + e] += v[:, :, e]
        else:
            for r, x in enumerate(gc):
                D[:, g + 8 * (r >> 1), tig * 2 + (r & 1)] += np.ascontiguousarray(get(x)).view(acc)
        whole = None if mx is None and len(on) * 32 == S.N else lanes
        if td == 'f16':
            for r, w in enumerate(wd):
                v = np.stack([D[:, g + 8 * r, tig * 2 + e] for e in range(2)], -1).astype(F16)
                w(v.reshape(-1).view(U32), whole, mx)
        else:
            for r, w in enumerate(wd):
                w(np.ascontiguousarray(D[:, g + 8 * (r >> 1), tig * 2 + (r & 1)]).reshape(-1).view(U32), whole, mx)
    return f
