"""Expected issued SASS instructions per warp: a Markov walk over the disassembly.

p: {address of a conditional branch or predicated CALL/EXIT: probability that the warp takes it}. Unlisted conditional
forward branches and predicated exits: 0; unlisted backward branches: an error. A call costs the callee's own expected count."""
import re

import numpy as np

LINE = re.compile(r'^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);', re.M)


def parse(text):
    out = []
    for m in LINE.finditer(text):
        t = m[2].strip()
        g = re.match(r'(?:@(!?U?P[T0-9]+)\s+)?([A-Z0-9_.]+)\s*(.*)', t)
        out.append((int(m[1], 16), g[1] or '', g[2], g[3]))
    return out


def target(args):
    return int(re.findall(r'0x([0-9a-f]+)', args)[-1], 16)


def branches(ins):
    return [(hex(a), p, op, args) for a, p, op, args in ins
            if re.match(r'(BRA|BRX|CALL|RET|EXIT|JMP|BREAK)', op) and (p or op.startswith(('CALL', 'BRX')))]


def expected(ins, p=None, start=0):
    p = p or {}
    idx = {a: i for i, (a, *_r) in enumerate(ins)}
    n = len(ins)
    callee = {}
    reach, todo = set(), [idx.get(start, 0)]
    edges = {}
    while todo:
        i = todo.pop()
        if i in reach or i >= n:
            continue
        reach.add(i)
        a, pred, op, args = ins[i]
        e = []
        if op.startswith('BRA'):
            t = idx[target(args)]
            if '.DIV' in op:                                   # taken only by diverged warps
                q = p.get(a, 0.0)
            elif not pred:
                q = 1.0
            else:
                if a not in p and t <= i:
                    raise ValueError(f'backward branch at {a:#x} needs a probability')
                q = p.get(a, 0.0)
            if re.match(r'!?U?P[0-9T]', args) and a not in p:      # BRA P, target: second predicate
                q = 0.0
            e = [(t, q), (i + 1, 1 - q)]
        elif op.startswith('RET') or op.startswith('EXIT'):
            q = 1.0 if not pred else p.get(a, 0.0)
            e = [(i + 1, 1 - q)] if q < 1 else []
        elif op.startswith('CALL'):
            q = 1.0 if not pred else p.get(a, 0.0)
            t = target(args)
            callee.setdefault(t, []).append((i, q))
            e = [(i + 1, 1.0)]
        else:
            e = [(i + 1, 1.0)]
        edges[i] = [(t, q) for t, q in e if q > 0 and t < n]
        todo += [t for t, _q in edges[i]]
    order = sorted(reach)
    pos = {i: k for k, i in enumerate(order)}
    M = np.eye(len(order))
    for i in order:
        for t, q in edges[i]:
            M[pos[t], pos[i]] -= q
    b = np.zeros(len(order))
    b[pos[idx.get(start, 0)]] = 1
    v = np.linalg.solve(M, b)
    visits = {ins[i][0]: float(v[pos[i]]) for i in order}
    ops = {}
    for i in order:
        if ins[i][2] != 'NOP':
            ops[ins[i][2]] = ops.get(ins[i][2], 0) + float(v[pos[i]])
    for t, sites in callee.items():
        _sub_total, sub_ops, _ = expected(ins, p, t)
        k = sum(visits[ins[i][0]] * q for i, q in sites)
        for o, c in sub_ops.items():
            ops[o] = ops.get(o, 0) + k * c
    return sum(ops.values()), ops, visits
