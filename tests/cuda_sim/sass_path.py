"""How many machine instructions a thread executes, when every loop within the walk is gone through once."""
import re

from ptxsim import sassflow


def token_loop(code):
    """The instructions of the outermost loop: from the target of the longest backward branch to that branch."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    spans = [(i - at[sassflow.target(args)], at[sassflow.target(args)], i) for i, (address, _, op, args) in enumerate(code)
             if op.startswith("BRA") and sassflow.target(args) < address]
    _, begin, end = max(spans)
    return code[begin:end + 1]


def longest_path(code, choose=max):
    """Instructions on the longest way (choose=min: the shortest) through `code` to any end, backward branches not taken."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    count = [0] * (len(code) + 1)
    for i in range(len(code) - 1, -1, -1):
        address, predicate, op, args = code[i]
        ways = [count[i + 1]]
        if op.startswith("BRA"):
            to = sassflow.target(args)
            conditional = predicate or re.match(r"!?U?P", args)
            taken = [count[at[to]] if to in at else 0] if to > address else []
            ways = ways + taken if conditional else taken or [0]
        elif op.startswith(("EXIT", "RET")) and not predicate:
            ways = [0]
        count[i] = choose(ways) + (op != "NOP")
    return count[0]
