"""The state of a RowOptimizer in a safetensors file: moments in the order of the table's rows, settings, step, which table."""
from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram_kernels._checks import expect_int
from engram_kernels._files import naming_path, parse_json, shorten
from engram_kernels.ops.row_update import check_rates
from engram_kernels.table.row_table import RowTable
from engram_kernels.table.safetensors_file import Header, atomic_writer, open_regular, read_bytes, read_header
from engram_kernels.table.shared_table import fingerprint

if TYPE_CHECKING:
    from engram_kernels.training.row_optimizer import RowOptimizer

KIND = "engram_kernels.RowOptimizer 1"
MOMENTS = ("second", "first", "steps")
PROGRESS, PROGRESS_BYTES = "progress", 4096  # a tensor of JSON: what changes from step to step
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}
_PIECE_ROWS = 1 << 16
_PIECE_BYTES = 64 << 20


class NumSteps:
    """`RowOptimizer.num_steps`, beside the moments, where torch.distributed.checkpoint looks for the names of a flat state."""

    def __get__(self, optimizer: RowOptimizer, owner: type) -> int:
        return optimizer.state[optimizer.param_groups[0]["params"][0]]["num_steps"]

    def __set__(self, optimizer: RowOptimizer, number: int) -> None:
        optimizer.state[optimizer.param_groups[0]["params"][0]]["num_steps"] = number


def save_state(optimizer: RowOptimizer, path: str | os.PathLike[str]) -> None:
    """`RowOptimizer.save`."""
    op, path = "RowOptimizer.save", Path(path)
    table = {"fingerprint": fingerprint(optimizer.table), "checksum": checksum(optimizer.table)}
    progress = encode_progress(op, optimizer.num_steps, optimizer.param_groups[0], table)
    tensors, metadata = described(optimizer.settings, optimizer.moment_shapes())
    metadata["id"] = secrets.token_hex(16)  # a journal names it
    with atomic_writer(path, tensors, metadata, op=op) as writer, naming_path(op, path, "cannot be written"):
        for name in optimizer.moment_shapes():
            at = 0
            for piece in optimizer.moment_pieces(name):
                writer.write(name, at, bytes_of(piece))
                at += piece.nbytes
        writer.write(PROGRESS, 0, progress)


def described(settings: Mapping[str, Any],
              moments: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a state file, as `atomic_writer` takes them."""
    tensors: dict[str, Any] = {name: (_DTYPES[dtype], shape) for name, (dtype, shape) in moments.items()}
    tensors[PROGRESS] = ("U8", (PROGRESS_BYTES,))
    return tensors, {"format": "pt", "kind": KIND, "settings": json.dumps(dict(settings), sort_keys=True)}


def encode_progress(op: str, num_steps: int, group: Mapping[str, Any], table: Mapping[str, str]) -> bytes:
    """What changes from step to step, in PROGRESS_BYTES bytes."""
    content = {"num_steps": num_steps, "table": dict(table),
               "group": {name: _plain(op, name, value) for name, value in group.items() if name not in ("params", "settings")}}
    text = json.dumps(content).encode()
    if len(text) > PROGRESS_BYTES:
        raise ValueError(f"{op}: the parameter group takes {len(text)} bytes of JSON, expected at most {PROGRESS_BYTES}")
    return text.ljust(PROGRESS_BYTES)


def _plain(op: str, name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(op, name, x) for x in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{op}: {name} of the parameter group is a {type(value).__name__}, expected a number, text or "
                    "a list of these")


def load_state(optimizer: RowOptimizer, path: str | os.PathLike[str], num_steps: int | None) -> None:
    """`RowOptimizer.load`."""
    op, path = "RowOptimizer.load", Path(path)
    fd = open_regular(path, op)
    try:
        header, progress = read_state(op, fd, path, optimizer)
        if num_steps is not None and progress["num_steps"] != num_steps:
            raise ValueError(f"{op}: {path} is the state of step {progress['num_steps']}, expected that of step {num_steps}")
        expect_same_table(op, path, progress, optimizer.table, thorough=True)
        loaded = {}
        with naming_path(op, path, "cannot be read"):
            for name in MOMENTS:
                if (mine := getattr(optimizer, name)) is not None:
                    loaded[name] = _read_moment(fd, header, name, mine)
        if "steps" in loaded and bool((loaded["steps"] < 0).any()):
            raise ValueError(f"{op}: {path} has a number below 0 in steps")
    finally:
        os.close(fd)
    for name, x in loaded.items():
        getattr(optimizer, name).copy_(x)
    take_over(optimizer, progress)


def take_over(optimizer: RowOptimizer, progress: Mapping[str, Any]) -> None:
    """Step and parameter group of a file."""
    optimizer.num_steps = progress["num_steps"]
    group = {name: tuple(value) if isinstance(value, list) else value for name, value in progress["group"].items()}
    optimizer.param_groups[0].update(group)


def read_state(op: str, fd: int, path: Path, optimizer: RowOptimizer) -> tuple[Header, dict[str, Any]]:
    """Header and progress of a state file, checked: it is of an optimizer with these settings and of a table of this shape."""
    header = read_header(fd, path, op)
    if header.metadata.get("kind") != KIND:
        raise ValueError(f"{op}: {path} is no state of a RowOptimizer: its kind is "
                         f"{shorten(repr(header.metadata.get('kind')))}, expected {KIND!r}")
    settings = _parsed(op, path, header.metadata.get("settings", ""), "settings")
    wrong = [f"{name} is {shorten(repr(settings.get(name)))}, expected {value!r}" for name, value in optimizer.settings.items()
             if settings.get(name) != value]
    if wrong:
        raise ValueError(f"{op}: {path} is the state of another optimizer or table: {'; '.join(wrong)}")
    tensors, _ = described(optimizer.settings, optimizer.moment_shapes())
    for name, (dtype, shape) in tensors.items():
        extent = header.extents.get(name)
        if extent is None or (extent.dtype, extent.shape) != (dtype, shape):
            found = "missing" if extent is None else f"{extent.dtype} {list(extent.shape)}"
            raise ValueError(f"{op}: {path}: {name} is {found}, expected {dtype} {list(shape)}")
    extent = header.extents[PROGRESS]
    with naming_path(op, path, "cannot be read"):
        text = read_bytes(fd, extent.offset, extent.num_bytes)
    return header, checked_progress(op, path, text)


def checked_progress(op: str, path: Path, text: bytes) -> dict[str, Any]:
    """Progress out of its bytes. ValueError says what is wrong with it."""
    progress = _parsed(op, path, text, PROGRESS)
    group, table = progress.get("group"), progress.get("table")
    if not isinstance(group, dict) or not {"lr", "betas", "eps"} <= set(group) or not isinstance(table, dict):
        raise ValueError(f"{op}: {path}: progress has no parameter group with lr, betas and eps, or does not name a table")
    expect_int(f"{op}: {path}", "num_steps", progress.get("num_steps"), 0)
    check_rates(f"{op}: {path}", group["lr"], group["betas"], group["eps"])
    return progress


def _parsed(op: str, path: Path, text: str | bytes, name: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as err:
        raise ValueError(f"{op}: {path}: {name} is not valid: {shorten(str(err))}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{op}: {path}: {name} is no JSON object")
    return found


def expect_same_table(op: str, path: Path, progress: Mapping[str, Any], table: RowTable, thorough: bool) -> None:
    """ValueError unless the state is of these rows. `thorough`: all of them are read."""
    facts = [("fingerprint", fingerprint)] + ([("checksum", checksum)] if thorough else [])
    for name, of in facts:
        wanted = progress["table"].get(name)
        if wanted is not None and (found := of(table)) != wanted:
            raise ValueError(f"{op}: {path} is the state after step {progress['num_steps']} of a table with {name} {wanted}, the "
                             f"table has {found}: it is another table, or has the rows of another step")


def _read_moment(fd: int, header: Header, name: str, like: Tensor) -> Tensor:
    """A tensor like `like` out of the file."""
    x, at = torch.empty_like(like), header.extents[name].offset
    for piece in x.split(max(_PIECE_BYTES // max(x[:1].nbytes, 1), 1)):
        data = read_bytes(fd, at, piece.nbytes)
        piece.view(torch.uint8).view(-1).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        at += piece.nbytes
    return x


def bytes_of(x: Tensor) -> Any:
    """A dense tensor as a vector of bytes."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def checksum(table: RowTable) -> str:
    """A hash of sums over all stored rows and scales: it tells the rows of one step from those of another. Reads all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces_of(table):
        stored = piece.detach().contiguous().view(-1).view(torch.uint8)
        whole = stored.numel() // 8 * 8
        total = int(stored[:whole].view(torch.int64).sum()) if whole else 0
        digest.update(total.to_bytes(8, "little", signed=True) + bytes_of(stored[whole:]).tobytes())
    return digest.hexdigest()


def pieces_of(table: RowTable) -> Iterator[Tensor]:
    """All rows as stored, piece by piece, each with its scales behind it where there are any."""
    for begin in range(0, table.num_rows, _PIECE_ROWS):
        count = min(_PIECE_ROWS, table.num_rows - begin)
        arrays = (table.rows,) if table.scales is None else (table.rows, table.scales)
        if table._file is None:
            yield from (array.detach()[begin:begin + count] for array in arrays)
            continue
        pieces = [torch.empty(count, array.shape[1], dtype=array.dtype, device="cpu") for array in arrays]
        table._file.read_span(begin, pieces[0], None if table.scales is None else pieces[1])
        yield from pieces


def load_state_dict(optimizer: RowOptimizer, state_dict: Mapping[str, Any]) -> None:
    """`RowOptimizer.load_state_dict` of one whose moments are in memory."""
    op = "RowOptimizer.load_state_dict"
    for name, kind_of in (("state", Mapping), ("param_groups", list)):
        value = state_dict.get(name) if isinstance(state_dict, Mapping) else None
        if not isinstance(value, kind_of):
            raise ValueError(f"{op}: {name} is {'missing' if value is None else shorten(repr(value))}, expected what "
                             "RowOptimizer.state_dict gives")
    group = _checked_group(op, state_dict["param_groups"], optimizer.settings)
    given = state_dict["state"].get(group["params"][0])  # a number, or the name that torch.distributed.checkpoint gave it
    if not isinstance(given, Mapping):
        raise ValueError(f"{op}: state has no entry of parameter {group['params'][0]!r}, expected what RowOptimizer.state_dict "
                         "gives")
    ours = optimizer.moments()
    for name in MOMENTS:
        facts = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in (ours.get(name), given.get(name))]
        if facts[0] != facts[1]:
            raise ValueError(f"{op}: {name} is {facts[1]}, expected {facts[0]}")
    if "steps" in ours and bool((given["steps"] < 0).any()):
        raise ValueError(f"{op}: steps has a number below 0")
    num_steps = given.get("num_steps")
    num_steps = num_steps.item() if isinstance(num_steps, Tensor) and num_steps.numel() == 1 else num_steps
    if not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"{op}: num_steps is {num_steps!r}, expected an integer of at least 0")
    with torch.no_grad():
        for name, mine in ours.items():
            mine.copy_(given[name])
    optimizer.num_steps = num_steps
    optimizer.param_groups[0].update({name: value for name, value in group.items() if name not in ("params", "settings")})


def _checked_group(op: str, groups: list[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter group of a state. ValueError unless it is of an optimizer with these settings."""
    wanted = {"lr", "betas", "eps", "settings", "params"}
    missing = [sorted(wanted - set(group)) if isinstance(group, Mapping) else group for group in groups]
    if missing != [[]]:
        raise ValueError(f"{op}: param_groups has {len(groups)} groups, without {shorten(repr(missing))}, expected one with lr, "
                         "betas, eps, settings and params")
    group = dict(groups[0])
    given = group["settings"] if isinstance(group["settings"], Mapping) else {}
    wrong = [f"{name} is {given.get(name)!r}, expected {value!r}" for name, value in settings.items() if given.get(name) != value]
    if wrong:
        raise ValueError(f"{op}: the state is of another optimizer or table: {'; '.join(wrong)}")
    if not isinstance(group["params"], list) or len(group["params"]) != 1:
        raise ValueError(f"{op}: params of the group is {group['params']!r}, expected that of one parameter")
    lr = float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"]
    check_rates(op, lr, group["betas"], group["eps"])
    return group
