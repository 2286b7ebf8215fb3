"""Single instructions against plain Python readings of the PTX ISA manual; needs no compiler."""
from fractions import Fraction

import numpy as np
import pytest

import ptxsim
from ptxsim import numerics as nu

M32, M64 = 2 ** 32 - 1, 2 ** 64 - 1
N = 512

PTX = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd, .param .u64 po)
{
  .reg .pred %%p<4>; .reg .b16 %%h<8>; .reg .b32 %%r<12>; .reg .b64 %%rd<24>; .reg .f32 %%f<8>;
  mov.u32 %%r0, %%tid.x; mov.u32 %%r1, %%ctaid.x; mad.lo.u32 %%r0, %%r1, 128, %%r0; mul.wide.u32 %%rd0, %%r0, 8;
  ld.param.u64 %%rd1, [pa]; add.u64 %%rd1, %%rd1, %%rd0; ld.global.u64 %%rd11, [%%rd1];
  ld.param.u64 %%rd2, [pb]; add.u64 %%rd2, %%rd2, %%rd0; ld.global.u64 %%rd12, [%%rd2];
  ld.param.u64 %%rd3, [pc]; add.u64 %%rd3, %%rd3, %%rd0; ld.global.u64 %%rd13, [%%rd3];
  ld.param.u64 %%rd4, [pd]; add.u64 %%rd4, %%rd4, %%rd0; ld.global.u64 %%rd14, [%%rd4];
  ld.param.u64 %%rd5, [po]; add.u64 %%rd5, %%rd5, %%rd0;
  cvt.u32.u64 %%r2, %%rd11; cvt.u32.u64 %%r3, %%rd12; cvt.u32.u64 %%r4, %%rd13; cvt.u32.u64 %%r5, %%rd14;
  mov.u64 %%rd10, 0; mov.u32 %%r9, 0;
  %s
  st.global.u64 [%%rd5], %%rd10;
  ret;
}
"""


def run(body, a, b, c, d):
    o = np.zeros(N, np.uint64)
    wide = 'cvt.u64.u32 %rd10, %r9;' if '%rd10' not in body else ''
    ptxsim.run(PTX % (body + wide), 'k', N // 128, 128, [a, b, c, d, o])
    return [int(x) for x in o]


def s(x, n):
    return x - (1 << n) if x >> (n - 1) else x


def bfe(a, pos, ln, n, signed):
    pos &= 255
    ln &= 255
    msb = n - 1
    sbit = (a >> min(pos + ln - 1, msb)) & 1 if signed and ln else 0
    r = 0
    for i in range(n):
        bit = (a >> (pos + i)) & 1 if i < ln and pos + i <= msb else sbit
        r |= bit << i
    return r


def bfi(a, b, pos, ln, n):
    pos &= 255
    ln &= 255
    f = b
    for i in range(ln):
        if pos + i < n:
            f = (f & ~(1 << (pos + i))) | (((a >> i) & 1) << (pos + i))
    return f


def prmt(a, b, c):
    by = [((b << 32 | a) >> (8 * i)) & 255 for i in range(8)]
    r = 0
    for i in range(4):
        sel = (c >> (4 * i)) & 15
        v = by[sel & 7]
        r |= ((255 if v & 128 else 0) if sel & 8 else v) << (8 * i)
    return r


def shf(a, b, c, left, wrap):
    n = c & 31 if wrap else min(c, 32)
    v = b << 32 | a
    return (v << n >> 32) & M32 if left else (v >> n) & M32


def lop3(a, b, c, lut):
    r = 0
    for i in range(32):
        k = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        r |= (lut >> k & 1) << i
    return r


def bfind(a, n, signed, sh):
    if signed and a >> (n - 1):
        a = ~a & ((1 << n) - 1)
    if a == 0:
        return M32
    k = a.bit_length() - 1
    return n - 1 - k if sh else k


CASES = {
    'bfe.u32 %r9,%r2,%r3,%r4;': lambda a, b, c, d: bfe(a & M32, b & M32, c & M32, 32, False),
    'bfe.s32 %r9,%r2,%r3,%r4;': lambda a, b, c, d: bfe(a & M32, b & M32, c & M32, 32, True),
    'bfe.u64 %rd10,%rd11,%r3,%r4;': lambda a, b, c, d: bfe(a, b & M32, c & M32, 64, False),
    'bfe.s64 %rd10,%rd11,%r3,%r4;': lambda a, b, c, d: bfe(a, b & M32, c & M32, 64, True),
    'bfi.b32 %r9,%r2,%r5,%r3,%r4;': lambda a, b, c, d: bfi(a & M32, d & M32, b & M32, c & M32, 32),
    'bfi.b64 %rd10,%rd11,%rd14,%r3,%r4;': lambda a, b, c, d: bfi(a, d, b & M32, c & M32, 64),
    'prmt.b32 %r9,%r2,%r5,%r3;': lambda a, b, c, d: prmt(a & M32, d & M32, b & M32),
    'shf.l.wrap.b32 %r9,%r2,%r5,%r3;': lambda a, b, c, d: shf(a & M32, d & M32, b & M32, True, True),
    'shf.r.clamp.b32 %r9,%r2,%r5,%r3;': lambda a, b, c, d: shf(a & M32, d & M32, b & M32, False, False),
    'lop3.b32 %r9,%r2,%r5,%r4,0x96;': lambda a, b, c, d: lop3(a & M32, d & M32, c & M32, 0x96),
    'lop3.b32 %r9,%r2,%r5,%r4,0xca;': lambda a, b, c, d: lop3(a & M32, d & M32, c & M32, 0xca),
    'popc.b64 %r9,%rd11;': lambda a, b, c, d: bin(a).count('1'),
    'clz.b32 %r9,%r2;': lambda a, b, c, d: 32 - (a & M32).bit_length(),
    'clz.b64 %r9,%rd11;': lambda a, b, c, d: 64 - a.bit_length(),
    'brev.b32 %r9,%r2;': lambda a, b, c, d: int(f'{a & M32:032b}'[::-1], 2),
    'brev.b64 %rd10,%rd11;': lambda a, b, c, d: int(f'{a:064b}'[::-1], 2),
    'bfind.u32 %r9,%r2;': lambda a, b, c, d: bfind(a & M32, 32, False, False),
    'bfind.s32 %r9,%r2;': lambda a, b, c, d: bfind(a & M32, 32, True, False),
    'bfind.shiftamt.u64 %r9,%rd11;': lambda a, b, c, d: bfind(a, 64, False, True),
    'shl.b32 %r9,%r2,%r3;': lambda a, b, c, d: (a & M32) << (b & M32) & M32 if b & M32 < 32 else 0,
    'shr.s64 %rd10,%rd11,%r3;': lambda a, b, c, d: s(a, 64) >> min(b & M32, 63) & M64,
    'shr.u64 %rd10,%rd11,%r3;': lambda a, b, c, d: a >> (b & M32) if b & M32 < 64 else 0,
    'mul.hi.s64 %rd10,%rd11,%rd14;': lambda a, b, c, d: s(a, 64) * s(d, 64) >> 64 & M64,
    'mul.hi.u32 %r9,%r2,%r5;': lambda a, b, c, d: (a & M32) * (d & M32) >> 32,
    'mad.hi.s32 %r9,%r2,%r5,%r4;': lambda a, b, c, d: (s(a & M32, 32) * s(d & M32, 32) >> 32) + c & M32,
    'mad.wide.s32 %rd10,%r2,%r5,%rd13;': lambda a, b, c, d: s(a & M32, 32) * s(d & M32, 32) + c & M64,
    'sad.s32 %r9,%r2,%r5,%r4;': lambda a, b, c, d: abs(s(a & M32, 32) - s(d & M32, 32)) + c & M32,
    'add.sat.s32 %r9,%r2,%r5;': lambda a, b, c, d: max(min(s(a & M32, 32) + s(d & M32, 32), 2 ** 31 - 1), -2 ** 31) & M32,
    'add.cc.u32 %r6,%r2,%r5; addc.u32 %r9,%r3,%r4;':
        lambda a, b, c, d: (b & M32) + (c & M32) + ((a & M32) + (d & M32) >> 32) & M32,
    'sub.cc.u64 %rd15,%rd11,%rd14; subc.u64 %rd10,%rd12,%rd13;': lambda a, b, c, d: b - c - (a < d) & M64,
    'div.s64 %rd10,%rd11,%rd14;': lambda a, b, c, d: M64 if not d else
        (abs(s(a, 64)) // abs(s(d, 64)) * (1 if (s(a, 64) < 0) == (s(d, 64) < 0) else -1)) & M64,
    'rem.u32 %r9,%r2,%r5;': lambda a, b, c, d: (a & M32) % (d & M32) if d & M32 else a & M32,
    'dp4a.s32.s32 %r9,%r2,%r5,%r4;': lambda a, b, c, d:
        sum(s(a >> 8 * i & 255, 8) * s(d >> 8 * i & 255, 8) for i in range(4)) + c & M32,
    'bmsk.clamp.b32 %r9,%r3,%r4;': lambda a, b, c, d: (((1 << min(c & M32, 32)) - 1) << min(b & M32, 32)) & M32,
    'setp.lt.and.s32 %p0|%p1,%r2,%r5,1; selp.u32 %r9,1,0,%p0; @%p1 add.u32 %r9,%r9,2;':
        lambda a, b, c, d: 1 if s(a & M32, 32) < s(d & M32, 32) else 2,
    'mov.b32 {%h1,%h2},%r2; mov.b32 %r9,{%h2,%h1};': lambda a, b, c, d: (a >> 16 & 0xffff) | (a & 0xffff) << 16,
    'cvt.sat.s8.s32 %r9,%r2;': lambda a, b, c, d: max(min(s(a & M32, 32), 127), -128) & M32,
    'cvt.u16.u32 %h1,%r2; cvt.s64.s16 %rd10,%h1;': lambda a, b, c, d: s(a & 0xffff, 16) & M64,
    'add.u16x2 %r9,%r2,%r5;': lambda a, b, c, d: (a + d & 0xffff) | ((a >> 16) + (d >> 16) & 0xffff) << 16,
}


@pytest.mark.parametrize('body', CASES)
def test_integer(body):
    r = np.random.default_rng(abs(hash(body)) % 1000)
    a, d = (np.where(r.random(N) < .7, r.integers(0, 2 ** 64, N, dtype=np.uint64),
                     r.integers(-3, 4, N).view(np.uint64)) for _ in range(2))
    b, c = (np.where(r.random(N) < .8, r.integers(0, 70, N).astype(np.uint64),
                     r.integers(0, 2 ** 64, N, dtype=np.uint64)) for _ in range(2))
    if 'prmt' in body:
        b = r.integers(0, 2 ** 64, N, dtype=np.uint64)
    got = run(body, a, b, c, d)
    for i, g in enumerate(got):
        want = CASES[body](int(a[i]), int(b[i]), int(c[i]), int(d[i]))
        assert g == want, (body, hex(a[i]), hex(b[i]), hex(c[i]), hex(d[i]), hex(g), hex(want))


def nearest(x, mant, emin, emax):
    """Round a Fraction to a float with `mant` fraction bits; ties to even."""
    if x == 0:
        return Fraction(0)
    e = 0
    ax = abs(x)
    while ax >= 2 ** (e + 1):
        e += 1
    while ax < Fraction(2) ** e:
        e -= 1
    q = Fraction(2) ** (max(e, emin) - mant)
    k = x / q
    f = k.numerator // k.denominator
    rem = k - f
    f += rem > Fraction(1, 2) or (rem == Fraction(1, 2) and f % 2)
    r = f * q
    return r if abs(r) < Fraction(2) ** (emax + 1) else None


@pytest.mark.parametrize('kind,mant,emin,emax', [('bf16', 7, -126, 127), ('f16', 10, -14, 15), ('f32', 23, -126, 127)])
def test_fma(kind, mant, emin, emax):
    r = np.random.default_rng(5)
    n = 3000
    if kind == 'f32':
        a, b, c = ((r.normal(size=n) * 2.0 ** r.integers(-30, 30, n)).astype('f4') for _ in range(3))
        c[::3] = (-a.astype('f8') * b).astype('f4')[::3]
        c[1::3] = (2.0 ** r.integers(-60, 20, n)).astype('f4')[1::3]
        a[::7] = np.float32(1 + 2.0 ** -12)
        b[::7] = np.float32(1 + 2.0 ** -12)
        got = nu.fma_f32(a, b, c).astype('f8')
        v = [x.astype('f8') for x in (a, b, c)]
    else:
        raw = [r.integers(0, 65536, n).astype('u2') for _ in range(3)]
        dec = (lambda x: nu.bf16_to_f32(x)) if kind == 'bf16' else (lambda x: x.view('f2'))
        if kind == 'bf16':                                   # moderate exponents, so sums interact
            raw = [(x & np.uint16(0x807f)) | np.uint16(0x80) * (r.integers(110, 145, n)).astype('u2') for x in raw]
        v = [dec(x).astype('f8') for x in raw]
        with np.errstate(all='ignore'):
            got = nu.fma_narrow(*(raw if kind == 'bf16' else [x.view('f2') for x in raw]), kind)
        got = (nu.bf16_to_f32(got) if kind == 'bf16' else got).astype('f8')
    checked = 0
    for x, y, z, g in zip(*v, got, strict=False):
        if not np.isfinite([x, y, z]).all():
            continue
        want = nearest(Fraction(x) * Fraction(y) + Fraction(z), mant, emin, emax)
        assert (want is None and np.isinf(g)) or (want is not None and Fraction(g) == want), (x, y, z, g, want)
        checked += 1
    assert checked > n // 2


def test_shfl_modes():
    body = ('shfl.sync.up.b32 %r6|%p0,%r2,3,0,-1; shfl.sync.down.b32 %r7|%p1,%r2,5,0x181f,-1;'
            'shfl.sync.idx.b32 %r8|%p2,%r2,%r3,31,-1; selp.u32 %r9,1,0,%p0; @%p1 or.b32 %r9,%r9,2; @%p2 or.b32 %r9,%r9,4;'
            'xor.b32 %r6,%r6,%r7; add.u32 %r6,%r6,%r8; shl.b32 %r6,%r6,3; or.b32 %r9,%r9,%r6;')
    r = np.random.default_rng(0)
    a, b = r.integers(0, 2 ** 20, N).astype('u8'), r.integers(0, 64, N).astype('u8')
    got = run(body, a, b, b, b)
    for i, g in enumerate(got):
        w, l = i // 32 * 32, i % 32
        up = l - 3 if l >= 3 else l
        lim = (l & 24) | 7
        dn = l + 5 if l + 5 <= lim else l
        ix = int(b[i]) & 31
        v = (int(a[w + up]) ^ int(a[w + dn])) + int(a[w + ix])
        assert g == (v << 3 & M32 | (l >= 3) | (l + 5 <= lim) << 1 | 4)


def test_errors_name_line_and_thread():
    with pytest.raises(ptxsim.SimError, match=r'out-of-bounds load.*thread \(5,0,0\)'):
        a = np.zeros(N, 'u8')
        run('@%p3 bra X; X: setp.eq.u32 %p2,%r0,5; @%p2 ld.global.u32 %r9,[%rd1+1048576];', a, a, a, a)
    with pytest.raises(ptxsim.SimError, match='wgmma'):
        run('wgmma.fence.sync.aligned;', *(np.zeros(N, 'u8'),) * 4)
