"""python -m ptxsim FILE.ptx...: list the kernels and the instructions that would fail if reached."""
import sys
from pathlib import Path

from .sim import Module

for path in sys.argv[1:]:
    m = Module(Path(path).read_text())
    for name in m.kernels():
        k = m.kernel(name)
        params = ', '.join(f'{v.type}[{v.size}]' if v.type == 'b8' else v.type for v in k.params)
        print(f'{path}: {name}({params})  static shared {k.static_smem}, {sum(len(s.ins) for s in k.segs)} instructions')
        for line, op, text in k.unsupported:
            print(f'  line {line}: {op} is not supported: {text}')
