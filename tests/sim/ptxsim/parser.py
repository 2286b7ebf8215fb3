"""PTX text -> modules, variables and flat instruction lists.

Only syntax is handled here: register names become register numbers, labels
become instruction positions, calls to functions with a body are inlined.
"""
from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field


class PtxError(Exception):
    """Any problem with the PTX text itself."""


WIDTH = {'pred': 0, 'b8': 1, 'u8': 1, 's8': 1, 'b16': 2, 'u16': 2, 's16': 2, 'f16': 2, 'bf16': 2,
         'b32': 4, 'u32': 4, 's32': 4, 'f32': 4, 'f16x2': 4, 'bf16x2': 4, 'tf32': 4,
         'b64': 8, 'u64': 8, 's64': 8, 'f64': 8, 'f32x2': 8, 'u16x2': 4, 's16x2': 4, 'b128': 16}

_TOKEN = re.compile(r'''
    (?P<ws>[ \t\r]+) | (?P<nl>\n)
  | (?P<str>"(?:\\.|[^"\\])*")
  | (?P<flt>0[fF][0-9a-fA-F]{8}\b | 0[dD][0-9a-fA-F]{16}\b)
  | (?P<num>0[xX][0-9a-fA-F]+U? | 0[bB][01]+U? | \d+\.\d*(?:[eE][+-]?\d+)? | \d+[eE][+-]?\d+ | \d+U?)
  | (?P<id>[.%$_A-Za-z](?:[\w$.]|::)*)
  | (?P<p>[{}()\[\];,:@!|<>=+\-*/~&^?])
''', re.X)


_COMMENT = re.compile(r'''("(?:\\.|[^"\\])*")|//.*''')


@dataclass
class Var:
    """A module, shared, local or parameter variable."""
    name: str
    space: str
    align: int
    size: int            # bytes; 0 = extern array of unknown size
    type: str
    init: list | None = None
    extern: bool = False
    offset: int = -1     # filled in by layout


@dataclass
class Ins:
    op: str              # 'ld.global.v4.u32'
    mods: tuple          # ('ld', 'global', 'v4', 'u32')
    args: list
    pred: tuple | None   # (register, negated)
    line: int
    text: str = ''
    loc: str = ''


@dataclass
class Function:
    name: str
    kind: str            # 'entry' or 'func'
    params: list
    rets: list
    body: tuple | None   # token range
    directives: dict = field(default_factory=dict)


@dataclass
class Code:
    """A function flattened into instructions."""
    ins: list
    labels: dict         # label -> index into ins
    regs: list           # register number -> type
    reg_names: list
    shared: list
    local: list


def _strip(text):
    """Blank out comments, debug sections and .loc/.file lines; keep line numbers."""
    text = re.sub(r'/\*.*?\*/', lambda m: re.sub(r'[^\n]', ' ', m.group()), text, flags=re.S)
    files, locs, out = {}, {}, []
    in_section = False
    for n, line in enumerate(text.split('\n'), 1):
        s = _COMMENT.sub(lambda m: m.group(1) or '', line)
        t = s.strip()
        if in_section:
            in_section = '}' not in t
            out.append('')
            continue
        if t.startswith('.section'):
            in_section = '}' not in t
            out.append('')
            continue
        if t.startswith('.file'):
            m = re.match(r'\.file\s+(\d+)\s+"([^"]*)"', t)
            if m:
                files[int(m.group(1))] = m.group(2)
            out.append('')
            continue
        if re.match(r'\.loc\s', t):
            m = re.match(r'\.loc\s+(\d+)\s+(\d+)\s+(\d+)', t)
            if m:
                locs[n] = tuple(map(int, m.groups()))
            out.append('')
            continue
        out.append(s)
    return '\n'.join(out), files, locs


class Parser:
    def __init__(self, text):
        self.lines = text.split('\n')
        clean, self.files, self.locs = _strip(text)
        self.tok, self.tln, self.tkind = [], [], []
        line, pos = 1, 0
        while pos < len(clean):
            m = _TOKEN.match(clean, pos)
            if not m:
                raise PtxError(f'line {line}: cannot read {clean[pos:pos + 30]!r}')
            pos = m.end()
            k = m.lastgroup
            if k == 'nl':
                line += 1
            elif k != 'ws':
                self.tok.append(m.group())
                self.tln.append(line)
                self.tkind.append(k)
        self.tok.append('')
        self.tln.append(line)
        self.tkind.append('eof')
        self.i = 0
        self.version = self.target = ''
        self.vars, self.funcs = {}, {}
        self._module()

    # ---- token helpers -------------------------------------------------
    def peek(self):
        return self.tok[self.i]

    def next(self):
        t = self.tok[self.i]
        self.i += 1
        return t

    def expect(self, s):
        t = self.next()
        if t != s:
            raise PtxError(f'line {self.tln[self.i - 1]}: expected {s!r}, found {t!r}')

    def accept(self, s):
        if self.tok[self.i] == s:
            self.i += 1
            return True
        return False

    def _int(self):
        neg = self.accept('-')
        v = int(self.next().rstrip('U'), 0)
        return -v if neg else v

    # ---- module level ---------------------------------------------------
    def _module(self):
        link = set()
        while self.tkind[self.i] != 'eof':
            t = self.next()
            if t == '.version':
                self.version = self.next()
            elif t == '.target':
                ln = self.tln[self.i]
                self.target = self.next()
                while self.tln[self.i] == ln and self.tkind[self.i] != 'eof':
                    self.next()
            elif t == '.address_size':
                if self._int() != 64:
                    raise PtxError('only 64-bit addresses are supported')
            elif t in ('.extern', '.visible', '.weak', '.common'):
                link.add(t)
                continue
            elif t in ('.entry', '.func'):
                self._function(t[1:])
            elif t in ('.global', '.const', '.shared'):
                v = self._variable(t[1:], '.extern' in link)
                self.vars[v.name] = v
            elif t in ('.pragma', '.alias'):
                while self.next() != ';':
                    pass
            elif t == ';':
                pass
            else:
                raise PtxError(f'line {self.tln[self.i - 1]}: unexpected {t!r}')
            link = set()

    def _variable(self, space, extern=False):
        align, typ, vec = 0, None, 1
        while True:
            t = self.next()
            if t == '.align':
                align = self._int()
            elif t == '.attribute':
                while self.next() != ')':
                    pass
            elif t in ('.v2', '.v4', '.v8'):
                vec = int(t[2:])
            elif t == '.ptr':
                while self.peek() in ('.global', '.shared', '.const', '.local', '.align'):
                    if self.next() == '.align':
                        self._int()
            elif t.startswith('.') and t[1:] in WIDTH:
                typ = t[1:]
            elif not t.startswith('.'):
                name = t
                break
            elif t in ('.managed', '.unified'):
                pass
            else:
                raise PtxError(f'line {self.tln[self.i - 1]}: unexpected {t!r} in a declaration')
        n = vec
        while self.accept('['):
            if self.accept(']'):
                n = 0
            else:
                n *= self._int()
                self.expect(']')
        init = None
        if self.accept('='):
            init = self._initialiser()
            if n == 0:
                n = len(init)
        if self.peek() == ';':
            self.next()
        return Var(name, space, align or max(WIDTH[typ], 1), n * WIDTH[typ], typ, init, extern or n == 0)

    def _initialiser(self):
        if self.accept('{'):
            out = []
            while not self.accept('}'):
                out += self._initialiser()
                self.accept(',')
            return out
        if self.tkind[self.i] == 'id':
            name, off = self.next(), 0
            if name == 'generic':
                self.expect('(')
                name = self.next()
                self.expect(')')
            if self.accept('+'):
                off = self._int()
            return [(name, off)]
        return [self._number()]

    def _number(self):
        neg = self.accept('-')
        k, t = self.tkind[self.i], self.next()
        if k == 'flt':
            v = int(t[2:], 16)
            v = ('f32', v) if t[1] in 'fF' else ('f64', v)
            if neg:
                v = (v[0], v[1] ^ (1 << (31 if v[0] == 'f32' else 63)))
            return v
        if k == 'num':
            if re.fullmatch(r'\d+(\.\d*)?([eE][+-]?\d+)?', t) and ('.' in t or 'e' in t.lower()):
                v = struct.unpack('<Q', struct.pack('<d', -float(t) if neg else float(t)))[0]
                return ('f64', v)
            v = int(t.rstrip('U'), 0)
            return -v if neg else v
        raise PtxError(f'line {self.tln[self.i - 1]}: number expected, found {t!r}')

    def _params(self):
        out = []
        if self.accept('('):
            while not self.accept(')'):
                kind = self.next()      # .param or .reg
                v = self._variable(kind[1:])
                out.append(v)
                self.accept(',')
        return out

    def _function(self, kind):
        rets = self._params() if kind == 'func' and self.peek() == '(' else []
        name = self.next()
        params = self._params()
        f = Function(name, kind, params, rets, None)
        while self.peek() not in ('{', ';'):
            d = self.next()
            vals = []
            while self.peek() not in ('{', ';') and not self.peek().startswith('.'):
                vals.append(self.next())
            f.directives[d] = [int(v) for v in vals if v.isdigit()]
        if self.peek() == '{':
            start, depth = self.i, 0
            while True:
                t = self.next()
                depth += (t == '{') - (t == '}')
                if depth == 0:
                    break
            f.body = (start, self.i)
        else:
            self.next()
        if f.body or name not in self.funcs:
            self.funcs[name] = f

    # ---- function bodies ------------------------------------------------
    def flatten(self, name):
        """Instructions of kernel `name`, with calls inlined."""
        b = _Body(self)
        f = self.funcs[name]
        env = {p.name: ('param', p.name) for p in f.params}
        b.block(f.body, [env], None, 0)
        b.resolve()
        return Code(b.ins, b.label_at, b.regs, b.reg_names, b.shared, b.local)

    def loc_of(self, line):
        while line > 0:
            if line in self.locs:
                f, l, c = self.locs[line]
                return f'{self.files.get(f, f)}:{l}:{c}' if l else ''
            line -= 1
        return ''


class _Body:
    def __init__(self, p):
        self.p, self.ins, self.regs, self.reg_names = p, [], [], []
        self.shared, self.local, self.label_at = [], [], {}
        self.uid = 0
        self._loc_lines = sorted(p.locs)

    def _loc(self, line):
        import bisect
        k = bisect.bisect_right(self._loc_lines, line) - 1
        if k < 0:
            return ''
        f, l, c = self.p.locs[self._loc_lines[k]]
        return f'{self.p.files.get(f, f)}:{l}:{c}' if l else ''

    def fresh(self, s):
        self.uid += 1
        return f'{s}@{self.uid}'

    def new_reg(self, typ, name):
        self.regs.append(typ)
        self.reg_names.append(name)
        return len(self.regs) - 1

    def lookup(self, scopes, name):
        for s in reversed(scopes):
            if name in s:
                return s[name]
        return None

    def emit(self, op, args, pred, line, text=None):
        if text is None:
            text = self.p.lines[line - 1].strip()
        self.ins.append(Ins(op, tuple(op.split('.')), args, pred, line, text, self._loc(line)))

    def block(self, rng, scopes, ret_label, depth):
        """Read the body in token range `rng`; `scopes` maps names, innermost last."""
        if depth > 32:
            raise PtxError('recursive device functions are not supported')
        p = self.p
        saved, p.i = p.i, rng[0]
        p.expect('{')
        scopes = scopes + [{}]
        base = len(scopes)
        while True:
            line = p.tln[p.i]
            if p.accept('{'):
                scopes = scopes + [{}]
                continue
            if p.accept('}'):
                if len(scopes) == base:
                    break
                scopes = scopes[:-1]
                continue
            if p.accept(';'):
                continue
            t = p.peek()
            if t == '.reg':
                p.next()
                self._reg_decl(scopes[-1])
                continue
            if t in ('.shared', '.local', '.param', '.global', '.const'):
                p.next()
                while True:
                    v = p._variable(t[1:])
                    src = v.name
                    v.name = self.fresh(src)
                    if t in ('.local', '.param'):
                        v.space = 'local'
                        self.local.append(v)
                        scopes[-1][src] = ('localparam' if t == '.param' else 'local', v.name)
                    elif t == '.shared':
                        self.shared.append(v)
                        scopes[-1][src] = ('shared', v.name)
                    else:
                        p.vars[v.name] = v
                        scopes[-1][src] = ('global', v.name)
                    if not p.accept(','):
                        break
                continue
            if t in ('.pragma', '.branchtargets', '.calltargets', '.callprototype'):
                p.next()
                while p.next() != ';':
                    pass
                continue
            if p.tkind[p.i] == 'id' and p.tok[p.i + 1] == ':':
                self._label(scopes)
                continue
            self._instruction(scopes, ret_label, depth, line)
        p.i = saved

    def _label(self, scopes):
        p = self.p
        name = p.next()
        p.next()
        if p.peek() == '.branchtargets':
            p.next()
            names = []
            while not p.accept(';'):
                t = p.next()
                if t != ',':
                    names.append(t)
            scopes[-1][name] = ('targets', [self._label_ref(scopes, n) for n in names])
            return
        if p.peek() == '.callprototype':
            while p.next() != ';':
                pass
            return
        key = scopes[-1].get(name)
        if not (key and key[0] == 'label'):
            key = ('label', self.fresh(name))
            scopes[-1][name] = key
        self.label_at[key[1]] = len(self.ins)

    def _label_ref(self, scopes, name):
        return ('labelref', name, list(scopes))

    def _reg_decl(self, scope):
        p = self.p
        t = p.next()
        while t in ('.v2', '.v4'):
            t = p.next()
        typ = t[1:]
        while True:
            name = p.next()
            if p.accept('<'):
                n = p._int()
                p.expect('>')
                for k in range(n):
                    scope[f'{name}{k}'] = ('reg', self.new_reg(typ, f'{name}{k}'))
            else:
                scope[name] = ('reg', self.new_reg(typ, name))
            if not p.accept(','):
                break
        p.accept(';')

    # operands: ('reg', n) ('imm', v) ('sym', kind, name, off) ('vec', [..])
    #           ('mem', base, off) ('spec', name) ('pair', a, b) ('not', reg) ('sink',)
    def _name(self, scopes, name, line):
        got = self.lookup(scopes, name)
        if got:
            if got[0] == 'alias':
                return got[1]
            if got[0] == 'reg':
                return got
            if got[0] in ('param', 'local', 'shared', 'localparam', 'global'):
                return ('sym', got[0], got[1], 0)
            return got
        if name.startswith('%') or name == 'WARP_SZ':
            return ('imm', 32) if name == 'WARP_SZ' else ('spec', name)
        if name in self.p.vars:
            return ('sym', self.p.vars[name].space, name, 0)
        if name == '_':
            return ('sink',)
        if name in self.p.funcs:
            return ('func', name)
        return self._label_ref(scopes, name)

    def _operand(self, scopes, line):
        p = self.p
        if p.accept('{'):
            v = []
            while not p.accept('}'):
                v.append(self._operand(scopes, line))
                p.accept(',')
            return ('vec', v)
        if p.accept('['):
            if p.tkind[p.i] == 'id':
                base = self._name(scopes, p.next(), line)
            else:
                base = ('imm', p._number())
            off = 0
            while p.peek() in ('+', '-', ','):
                s = p.next()
                if s == ',':
                    raise PtxError(f'line {line}: tensor/texture addresses are not supported')
                if p.tkind[p.i] == 'id':
                    raise PtxError(f'line {line}: register offsets in addresses are not supported')
                off += p._int() if s == '+' else -p._int()
            p.expect(']')
            return ('mem', base, off)
        if p.accept('!'):
            return ('not', self._name(scopes, p.next(), line))
        if p.accept('('):
            v = []
            while not p.accept(')'):
                v.append(self._operand(scopes, line))
                p.accept(',')
            return ('list', v)
        if p.tkind[p.i] == 'id':
            a = self._name(scopes, p.next(), line)
            if p.accept('|'):
                return ('pair', a, self._name(scopes, p.next(), line))
            if a[0] == 'sym' and p.peek() in ('+', '-'):
                s = p.next()
                off = p._int()
                return a[:3] + (off if s == '+' else -off,)
            return a
        return ('imm', p._number())

    def _instruction(self, scopes, ret_label, depth, line):
        p = self.p
        pred = None
        if p.accept('@'):
            neg = p.accept('!')
            r = self._name(scopes, p.next(), line)
            if r[0] != 'reg':
                raise PtxError(f'line {line}: bad predicate')
            pred = (r[1], neg)
        op = p.next()
        args = []
        while not p.accept(';'):
            args.append(self._operand(scopes, line))
            p.accept(',')
        base = op.split('.')[0]
        if base == 'ret' and ret_label is not None:
            self.emit('bra', [('labelref', ret_label, [{ret_label: ('label', ret_label)}])], pred, line)
        elif base == 'call':
            self._call(args, pred, line, scopes, depth)
        else:
            self.emit(op, args, pred, line)

    def _call(self, args, pred, line, scopes, depth):
        p = self.p
        rets = args.pop(0)[1] if args and args[0][0] == 'list' else []
        callee = args.pop(0)
        actual = args.pop(0)[1] if args and args[0][0] == 'list' else []
        f = p.funcs.get(callee[1]) if callee[0] == 'func' else None
        if f is None:
            self.emit('call.indirect', [], pred, line)
            return
        if f.body is None:
            self.emit('call.extern', [('extern', f.name), ('list', rets), ('list', actual)], pred, line)
            return
        skip = None
        if pred:
            skip = self.fresh('skipcall')
            self.emit('bra', [('labelref', skip, [{skip: ('label', skip)}])], (pred[0], not pred[1]), line)
        env = {}
        for formal, act in list(zip(f.params, actual, strict=False)) + list(zip(f.rets, rets, strict=False)):
            env[formal.name] = ('alias', act)
        done = self.fresh('ret_' + f.name)
        self.block(f.body, [env], done, depth + 1)
        self.label_at[done] = len(self.ins)
        if skip:
            self.label_at[skip] = len(self.ins)

    def resolve(self):
        """Turn label references into label keys."""
        def fix(a):
            if isinstance(a, tuple) and a and a[0] == 'labelref':
                for s in reversed(a[2]):
                    got = s.get(a[1])
                    if got:
                        return ('targets', [fix(x) for x in got[1]]) if got[0] == 'targets' else got
                if a[1] in self.label_at:
                    return ('label', a[1])
                raise PtxError(f'undefined name {a[1]!r}')
            if isinstance(a, tuple) and a and a[0] in ('vec', 'list'):
                return (a[0], [fix(x) for x in a[1]])
            if isinstance(a, tuple) and a and a[0] == 'mem':
                return ('mem', fix(a[1]), a[2])
            return a
        for n in self.ins:
            n.args = [fix(a) for a in n.args]
