"""Tables whose rows lie in other processes, on this machine or on others: what `RowTable` knows of them.

An engine (ray_rows.py, mooncake_rows.py) has a client with `describe`, which says what the table is, and `fetch`, which brings
rows. Everything else, from the cache in front to the tickets of a prefetcher, is that of a table in a file.
"""
from __future__ import annotations

import atexit
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from engram_kernels import _modes
from engram_kernels._checks import expect_int, expect_seconds
from engram_kernels._library import COMPILE_ERROR, need_compiled
from engram_kernels.row_format import ROW_FORMATS, check_shape, row_format_of
from engram_kernels.table import staging

if TYPE_CHECKING:
    from engram_kernels.table.row_table import RowTable

ENGINES: dict[str, Any] = {}  # by the scheme of an address: what makes a client; the engines put theirs here
_EXIT_S = 5.0
Piece = tuple[Any, Any] | None  # dense arrays of rows and of scales; None: the request was cancelled


@atexit.register
def _end_reads() -> None:
    """A thread that came back from a read into the interpreter after its end would abort the process."""
    if not COMPILE_ERROR:
        from engram_kernels import _C
        _C.end_reads(_EXIT_S)


class RowClient(Protocol):
    """What an engine brings."""

    def describe(self) -> Description:
        """What the table is. OSError where its servers cannot be reached, or do not agree."""
        ...

    def fetch(self, ids: bytes, watch: Any) -> Iterator[Piece]:
        """The rows of distinct ids (int64), in their order, in pieces; None and no more once `watch.cancelled()`."""
        ...


@dataclasses.dataclass(frozen=True)
class Description:
    """All of a table but its rows.

    Attributes:
        row_format, row_dim, zero_scale_is_zero, table_scale: as of `RowTable`.
        num_rows: R.
        width: elements of a stored row.
        scale: the scale of all rows (fp8_e4m3_tensor); None: there is none, or there are some per row.
        fingerprint: `RowTable.fingerprint`; "": the servers know none.
    """

    row_format: str
    row_dim: int
    num_rows: int
    width: int
    zero_scale_is_zero: bool
    table_scale: float
    scale: float | None
    fingerprint: str

    @classmethod
    def of(cls, table: RowTable) -> Description:
        """Describes a table."""
        one = table.scales is not None and table.scales.dim() == 1
        return cls(table.row_format, table.row_dim, table.num_rows, table.rows.shape[1], bool(table.zero_scale_is_zero),
                   float(table.table_scale), float(table.scales.item()) if one and table.scales is not None else None,
                   table.fingerprint())

    @classmethod
    def read(cls, where: str, fields: object) -> Description:
        """Out of what a server says. OSError names `where` and what is wrong with it."""
        try:
            described = cls(**fields)  # type: ignore[arg-type]
            row_format_of("rows", described.row_format)
            check_shape("rows", described.row_format, described.row_dim, described.width)
            return described
        except (TypeError, ValueError) as err:
            raise OSError(f"{where}: what it says of its table is of another version, or is damaged: {err}") from None

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row, padding included, without scales that lie apart."""
        return self.width * ROW_FORMATS[self.row_format].dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row that lie apart from it; 0: there are none per row."""
        fmt = ROW_FORMATS[self.row_format]
        if not fmt.has_row_scales or fmt.scale_dtype is None:
            return 0
        shape = fmt.scale_shape(self.num_rows, self.row_dim)
        return 0 if shape is None else shape[1] * fmt.scale_dtype.itemsize

    def stand_ins(self) -> tuple[Tensor, Tensor | None]:
        """Rows and scales on the meta device, for their shape and dtype; a scale of the whole table as it is."""
        fmt = ROW_FORMATS[self.row_format]
        with _modes.plain_tensors():
            rows = torch.empty((self.num_rows, self.width), dtype=fmt.dtype, device="meta")
            shape = fmt.scale_shape(self.num_rows, self.row_dim)
            if shape is None or fmt.scale_dtype is None:
                return rows, None
            if self.scale is not None:
                return rows, torch.tensor([self.scale], dtype=fmt.scale_dtype, device="cpu")
            return rows, torch.empty(shape, dtype=fmt.scale_dtype, device="meta")


class RemoteRows:
    """Rows that a client brings; stands where a table in a file has its `TableFile`."""

    def __init__(self, client: RowClient, described: Description, connected: dict[str, Any], cache_bytes: int):
        need_compiled("a remote table")
        from engram_kernels import _C
        self.client, self.described = client, described
        self.opened = connected  # the arguments of `RowTable.connect` that connect again
        self.name = json.dumps(connected, sort_keys=True)
        self.source = (connected["address"], described.fingerprint, 0)
        self.tier = _C.client_tier(described.num_rows, described.row_bytes, described.scale_bytes, client.fetch, cache_bytes)

    def stats(self) -> dict[str, Any]:
        """`RowTable.io_stats`."""
        return {**self.tier.stats(), "address": self.opened["address"]}

    def read(self, ids: Tensor, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows at `ids` (int64, distinct, in range) and their scales."""
        scales = None if out_scales is None else out_scales.view(torch.uint8).numpy()
        self.tier.fetch(ids.numpy(), out_rows.view(torch.uint8).numpy(), scales)

    def read_span(self, begin: int, out_rows: Tensor, out_scales: Tensor | None) -> None:
        """Fills the outputs with the rows from `begin` on and their scales."""
        if out_rows.shape[0]:
            self.read(torch.arange(begin, begin + out_rows.shape[0], device="cpu"), out_rows, out_scales)


def connect(cls: type[RowTable], address: str, fingerprint: str | None, cache_bytes: int, timeout_s: float,
            options: dict[str, Any]) -> RowTable:
    """`RowTable.connect`."""
    op = "RowTable.connect"
    scheme, _, rest = address.partition("://") if isinstance(address, str) else ("", "", "")
    if scheme not in ENGINES or not rest:
        raise ValueError(f"{op}: address is {address!r}, expected 'ray://NAME' or 'mooncake://HOST:PORT/NAME'")
    cache_bytes, timeout_s = expect_int(op, "cache_bytes", cache_bytes, 0, 2**63 - 1), expect_seconds(op, "timeout_s", timeout_s)
    known = list(inspect.signature(ENGINES[scheme]).parameters)[2:]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{op}: {scheme}:// has no option {unknown[0]!r}, expected {' or '.join(map(repr, known)) or 'none'}")
    options = {name: _plain(value) for name, value in options.items()}
    client = ENGINES[scheme](rest, timeout_s, **options)
    described = client.describe()
    if fingerprint is not None and described.fingerprint not in ("", fingerprint):  # before anything is read
        raise ValueError(f"{op}: {address} serves a table with fingerprint {described.fingerprint}, expected "
                         f"{fingerprint}: it is another one")
    connected = {"address": address, "fingerprint": fingerprint, "cache_bytes": cache_bytes, "timeout_s": timeout_s, **options}
    stand_in, scales = described.stand_ins()

    def table_with(fingerprint: str) -> RowTable:
        rows = RemoteRows(client, dataclasses.replace(described, fingerprint=fingerprint),
                          {**connected, "fingerprint": fingerprint}, cache_bytes)
        return cls(stand_in, scales, described.row_format, described.row_dim, described.zero_scale_is_zero, None, "remote", rows,
                   table_scale=described.table_scale)
    read = table_with("").fingerprint()
    wanted = described.fingerprint or fingerprint or read
    if read != wanted:
        raise ValueError(f"{op}: {address} should have a table with fingerprint {wanted}, but its rows have {read}: they are of "
                         "another table or generation")
    table = table_with(read)
    assert isinstance(table._file, RemoteRows)
    staging.remember(table._file.name, table)
    return table


def _plain(value: Any) -> Any:
    """Numbers and lists of Python's own, such as JSON can hold, of those of numpy and torch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def fetched(where: str, process: int, ids: bytes, pieces_of: Callable[[Any], Iterator[Piece]]) -> Iterator[Piece]:
    """What a client's `fetch` yields: the pieces that `pieces_of` gives for ascending ids, in the order of the given ones.

    Raises:
        RuntimeError: this is not the process that connected; names `where`.
    """
    import numpy as np
    if os.getpid() != process:
        raise RuntimeError(f"{where}: the table was connected before a fork; connect again here")
    wanted, back = _ascending(np.frombuffer(ids, np.int64))
    pieces = pieces_of(wanted)
    yield from pieces if back is None else _in_given_order(pieces, back)


def _ascending(ids: Any) -> tuple[Any, Any]:
    """Distinct ids in ascending order, and where each of the given ones is then; None: they were so."""
    import numpy as np
    if ids.size < 2 or bool((np.diff(ids) > 0).all()):
        return ids, None
    order = np.argsort(ids)
    back = np.empty_like(order)
    back[order] = np.arange(ids.size)
    return ids[order], back


def _in_given_order(pieces: Iterator[Piece], back: Any) -> Iterator[Piece]:
    """Pieces of ascending ids as one piece, in the order in which the ids were given."""
    import numpy as np
    rows, scales = [], []
    for piece in pieces:
        if piece is None:
            yield None
            return
        rows.append(piece[0])
        scales.append(piece[1])
    yield (np.concatenate(rows)[back], None if scales[0] is None else np.concatenate(scales)[back])
