"""How many machine instructions a thread executes: on the longest (or shortest) way through, loops once or as often as told."""
import re

from ptxsim import sassflow


def token_loop(code):
    """The instructions of the outermost loop: from the target of the longest backward branch to that branch."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    spans = [(i - at[sassflow.target(args)], at[sassflow.target(args)], i) for i, (address, _, op, args) in enumerate(code)
             if op.startswith("BRA") and sassflow.target(args) < address]
    _, begin, end = max(spans)
    return code[begin:end + 1]


def loops(code):
    """(begin, end) of every loop that lies in `code`: the indices of a backward branch's target and of the branch itself."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    return [(at[sassflow.target(args)], i) for i, (address, _, op, args) in enumerate(code)
            if op.startswith("BRA") and sassflow.target(args) < address and sassflow.target(args) in at]


def executed(code, turns, never):
    """Instructions on the longest way through `code` that meets no instruction for which never(op, args).

    turns: gives, for the list of ops of a loop (those of the loops within it left out), how often it is gone through each time
        that it is reached; None: it never is.
    """
    weights = [float("-inf") if never(op, args) else 1.0 for _, _, op, args in code]
    spans = loops(code)
    for begin, end in spans:
        inner = {i for b, e in spans if begin <= b and e <= end and (b, e) != (begin, end) for i in range(b, e + 1)}
        times = turns([code[i][2] for i in range(begin, end + 1) if i not in inner])
        for i in range(begin, end + 1):
            weights[i] = float("-inf") if times is None else weights[i] * times
    return longest_path(code, weights=weights)


def longest_path(code, choose=max, weights=None):
    """Instructions on the longest way (choose=min: the shortest) through `code` to any end, backward branches not taken.

    weights: how often each instruction counts.
    """
    weights = weights or [1] * len(code)
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
        count[i] = choose(ways) + (weights[i] if op != "NOP" else 0)
    return count[0]


def parts_of(loop, count):
    """The `count` parts of a loop that its barriers divide it into; each begins with its barrier."""
    barriers = [i for i, (_, _, op, _) in enumerate(loop) if op.startswith("BAR")]
    assert len(barriers) == count - 1
    return [loop[a:b] for a, b in zip([0, *barriers], [*barriers, len(loop)], strict=True)]


def longest_without(code, *never):
    """Instructions on the longest way through `code` that meets no op of which the name begins so."""
    return executed(code, lambda ops: 1, lambda op, args: op.startswith(never)) if never else longest_path(code)
