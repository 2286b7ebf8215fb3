"""RowTable: the rows of one memory layer, in memory, in a file or on other machines."""
from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from engram_kernels._terminal import Progress
from engram_kernels.row_format import FLOAT_FORMATS, ROW_FORMATS, check_table_scale, check_tensors
from engram_kernels.table import remote_rows, reopen, shared_table, staging
from engram_kernels.table.checkpoint_files import Names, Source
from engram_kernels.table.host_memory import copied, pin_host_memory
from engram_kernels.table.open_table import open_table
from engram_kernels.table.quantize import QuantizeReport, quantize
from engram_kernels.table.row_ids import expect_row_ids
from engram_kernels.table.split_table import with_scales_on
from engram_kernels.table.table_file import TableFile
from engram_kernels.table.table_writer import Chunk, create_table

__all__ = ["FLOAT_FORMATS", "ROW_FORMATS", "RowTable", "expect_row_ids"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RowTable:
    """Rows of one memory layer and how they are stored. Made by `from_tensor`, `create`, `open` or `connect`.

    Scope: raw storage and its description; `gather_rows` dequantizes. It does not cache rows of a file (the kernel does).

    Attributes:
        rows: [R, D], [R, stride] uint8 for the packed format, or [R, D/2] uint8 for nvfp4 and mxfp4: float32, bfloat16, float16,
            uint8 (fp8) or int8. Of a table outside memory, a tensor on the meta device: shape and dtype, no data.
        scales: uint8 [R, D/32] (fp8_e4m3_block32, mxfp4) or [R, D/16] (nvfp4: e4m3), float32 [R, D/32] (int8_group32), [R, 1]
            (fp8_e4m3_row) or [1] (fp8_e4m3_tensor), or None; those per row of a table outside memory on the meta device.
        row_format: how a row is stored; a name of docs/ops.md, "Row formats".
        row_dim: D.
        zero_scale_is_zero: a scale byte of 0 means 0.0, not 2^-127.
        table_scale: what every value is multiplied by last, where the format has such a scale (nvfp4); else 1.
        path: the file of a file table, or the folder or index of the checkpoint that it was opened from.
        tier: "host" (in memory; "device" on another device), "file", or "remote" (in other processes).

    Ownership: tensors are held, not copied, unless asked for; a file stays open until the table goes. Threads: any, at once.
    Failure: a file that is cut short, resized or written to while open, or a lost server, is an OSError of the next read.
    """

    rows: Tensor
    scales: Tensor | None
    row_format: str
    row_dim: int
    zero_scale_is_zero: bool = False
    path: Path | None = None
    tier: str = "host"
    _file: TableFile | remote_rows.RemoteRows | None = None
    _memory: Any = None  # a HostMemory, or a SharedMemory with one
    table_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < abs(self.table_scale) < math.inf:
            raise ValueError(f"RowTable: table_scale is {self.table_scale!r}, expected a finite float32 that is not 0")

    @property
    def num_rows(self) -> int:
        """R."""
        return self.rows.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row with its scales, padding not counted."""
        return ROW_FORMATS[self.row_format].row_bytes(self.row_dim)

    @property
    def device(self) -> torch.device:
        """Where rows come out: the device of the rows, or of their scales (`with_scales_on`); the CPU outside memory."""
        return (self.rows if self.scales is None else self.scales).device if self.in_memory else torch.device("cpu")

    @property
    def in_memory(self) -> bool:
        """Whether the rows are in memory of this process or of a device: not in a file and not remote."""
        return self.tier not in ("file", "remote")

    @property
    def address(self) -> str | None:
        """The address that `connect` got; None of any other table."""
        return self._file.opened["address"] if isinstance(self._file, remote_rows.RemoteRows) else None

    def device_for(self, like: object) -> torch.device:
        """Where an op gathers rows for `like`: its GPU where that can read the table (pinned host memory), else `device`."""
        on_host = self.tier == "host" and self.device.type == "cpu"
        if isinstance(like, Tensor) and like.is_cuda and on_host and self.rows.is_pinned():
            return like.device
        return self.device

    def __repr__(self) -> str:
        where = f", path={str(self.path)!r}" if self.path else f", address={self.address!r}" if self.address else ""
        if isinstance(self._memory, shared_table.SharedMemory):
            where = f", shared as {self._memory.name!r}"
        where += f", scales on {self.device}" if self.in_memory and self.device != self.rows.device else ""
        return (f"RowTable({self.num_rows} rows of {self.row_dim}, {self.row_format}, {self.row_bytes} bytes per row, "
                f"tier={self.tier!r}{where})")

    @classmethod
    def from_tensor(cls, weight: Tensor, scales: Tensor | None = None, row_format: str = "bf16", copy: bool = False,
                    zero_scale_is_zero: bool = False, row_dim: int | None = None, numa: int | None = None,
                    table_scale: float | Tensor | None = None) -> RowTable:
        """A table over tensors.

        Args:
            weight: as `RowTable.rows` (float8_e4m3fn counts as uint8, for nvfp4 and mxfp4 float4_e2m1fn_x2). The rows may lie
                apart (a sliced view); the elements of a row may not.
            scales: as `RowTable.scales` (float8_e8m0fnu counts as uint8, for nvfp4 float8_e4m3fn). A scale for the table or for
                each row may also be bfloat16 or float16, which is widened, and of shape [] or [R].
            row_format: a name of docs/ops.md, "Row formats".
            copy: True: copy into memory of its own, exactly as large, in huge pages where the system has them: random rows
                then cost no TLB miss. Detached. `memory_stats` says what was got.
            zero_scale_is_zero: what a scale byte of 0 means.
            row_dim: D; needed for the packed format, else the width of `weight`.
            numa: of a copy: the NUMA node that it is placed on; None: page by page over all nodes, where there are several.
            table_scale: needed for nvfp4, and for it alone: a finite float32 that is not 0, or a float tensor of one element.

        Returns:
            The table; without `copy` it shares memory, and gradients, with `weight`.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: dtype, shape, device or stride does not fit the format, or there is no such node.
            OSError: there is no room for a copy (`CapacityError`): names the limit, what it leaves, and what to do.
        """
        op = "RowTable.from_tensor"
        rows, scales, row_dim = check_tensors(op, weight, scales, row_format, row_dim)
        table_scale = check_table_scale(op, row_format, table_scale)
        rows, scales, host = copied(op, rows, scales, (row_format, row_dim), numa) if copy else (rows, scales, None)
        return cls(rows, scales, row_format, row_dim, zero_scale_is_zero, _memory=host, table_scale=table_scale,
                   tier="host" if rows.device.type == "cpu" else "device")

    @classmethod
    def create(cls, path: str | os.PathLike[str], rows: Tensor | Iterable[Chunk], scales: Tensor | None = None,
               row_format: str = "bf16", *, num_rows: int | None = None, row_dim: int | None = None,
               zero_scale_is_zero: bool = False, table_scale: float | Tensor | None = None) -> RowTable:
        """Writes a table file and opens it. The file appears whole or not at all; an old one stays until the last moment.

        Args:
            path: the file; its directory must exist. A file that is there is replaced.
            rows: all rows as one tensor (as in `from_tensor`), or an iterable of pieces, for tables larger than memory: each a
                tensor, or a pair of rows and their scales.
            scales: of all rows, or the single scale of fp8_e4m3_tensor; not with pieces that bring their own.
            row_format: a name of docs/ops.md, "Row formats".
            num_rows, row_dim: R and D; needed with pieces, D for the packed format too.
            zero_scale_is_zero: what a scale byte of 0 means; kept in the file.
            table_scale: as in `from_tensor`; kept in the file.

        Returns:
            The table of the new file.

        Raises:
            TypeError: a piece is no tensor.
            ValueError: a dtype or shape is wrong, or the pieces are not `num_rows` rows. Nothing is left behind.
            OSError: the directory is missing or read-only, the disk is too full (`CapacityError`), or a write failed; names the
                path and the step. Nothing is left behind, an old file is whole.
        """
        create_table(Path(path), rows, scales, row_format, (num_rows, row_dim), zero_scale_is_zero, table_scale)
        return cls.open(path)

    @classmethod
    def open(cls, source: Source, tensor: Names | None = None, scales: Names | None = None, row_format: str | None = None, *,
             row_dim: int | None = None, zero_scale_is_zero: bool | None = None, queue_depth: int = 64, cache_bytes: int = 0,
             io: str = "auto", table_scale: float | Tensor | Names | None = None) -> RowTable:
        """A table of safetensors files, in place: one that `create` wrote, or the tensors of a checkpoint that are named.

        Only headers are read; rows are read when they are asked for, many at a time (csrc/table/file_reader.h). The files must
        stay as they are: after a write, or a `touch`, every read of that file raises, and the table has to be opened again.

        Args:
            source: a file; the folder of a checkpoint, or its index (model.safetensors.index.json). Or files whose tensors are
                parts under the same name, such as those of ranks: a list of paths in the order of the rows, or a path with one
                {} for the number of the rank, "model{}-mp4.safetensors".
            tensor: name of the tensor that holds the rows, such as "layers.1.engram.embed.weight"; or the names of its parts,
                whose rows lie one behind the other: a list, or a name with one {} for their number, in numeric order from 0
                without gaps. None: "rows", where the source is a file.
            scales: likewise of the scales, which may lie in other files and other parts. One for all rows, [1] or [], or one for
                each, [R, 1] or [R], may be float32, bfloat16 or float16. None: "scales" where `tensor` is None and the format
                has any.
            row_format: how rows are stored; None: as the file says, or as the dtypes say.
            row_dim: D; None: as the file says, or the width of the rows.
            zero_scale_is_zero: what a scale byte of 0 means; None: as the file says, or False.
            queue_depth: reads in flight, 1..4096, for all files together.
            cache_bytes: memory for rows that were read before, at most; 0: none. A cached row equals the file's.
            io: "io_uring" or "preadv" (threads), both past the page cache where the file system allows that;
                "io_uring_buffered" or "preadv_buffered" through it; "auto": io_uring where the system allows it, through the page
                cache where the files take less than a quarter of the free memory. EK_FILE_IO names another default.
            table_scale: of an nvfp4 table: a number, a float tensor of one element, or the name of the tensor that
                has it; None: as the file says.

        Returns:
            A table of tier "file".

        Raises:
            TypeError: an argument is neither a name nor a list of names.
            OSError: a file is missing or cannot be read.
            ValueError: one is no regular file, is empty, truncated or corrupt, lacks a tensor, or dtypes and shapes do not fit; a
                part is missing, there twice, or of another dtype or width; names what disagrees. Or there is no such io.
        """
        return open_table(cls, source, tensor, scales, row_format, (row_dim, zero_scale_is_zero, table_scale),
                          (queue_depth, cache_bytes, io))

    @classmethod
    def connect(cls, address: str, *, fingerprint: str | None = None, cache_bytes: int = 0, timeout_s: float = 30.0,
                **engine: Any) -> RowTable:
        """A table whose rows lie in other processes, on this machine or others, served by an engine that exists.

        Args:
            address: "ray://NAME": Ray actors (`serve_rows`); "mooncake://HOST:PORT/NAME": Mooncake Store (`store_rows`).
            fingerprint: that the table must have; None: any.
            cache_bytes, timeout_s: memory for rows that were brought before, at most; seconds that a request may take.
            engine: options of the engine; docs/remote.md lists them.

        Returns:
            A table of tier "remote"; rows of another fingerprint or generation than were found are an error.

        Raises:
            ValueError: the address cannot be one, or another table is served there.
            OSError: there is no server, or it is lost, now or at a later read; names it.
            RuntimeError: the engine's package is not installed, or it is not running.
        """
        return remote_rows.connect(cls, address, fingerprint, cache_bytes, timeout_s, engine)

    def read_rows(self, row_ids: Tensor, out_rows: Tensor | None = None,
                  out_scales: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The rows as stored, in the order of the ids. Each distinct row of a file is read once.

        Args:
            row_ids: int32 or int64, any shape, contiguous, in [0, R).
            out_rows: [n, width] of the dtype of `rows`, dense, written instead of a new tensor.
            out_scales: [n, D/32] likewise, where there are scales per row.

        Returns:
            rows [n, width] and scales (as `RowTable.scales`, for these rows), n the number of ids.

        Raises:
            ValueError: an output does not fit, or the table was converted (`layer.float()`) and no longer fits its row_format.
            IndexError: an id is outside [0, R).
            OSError: the file cannot be read, or it changed; names the path and the row.
        """
        return staging.read_stored(self, row_ids, out_rows, out_scales)

    def io_stats(self) -> dict[str, Any]:
        """Counters of what was read from the file, or from other processes, since it was opened.

        Returns:
            rows (distinct, asked for), cache_hits, file_rows, payload_bytes (of rows), moved_bytes (read), reads (submitted);
            cache_slots and cached_rows; io ("io_uring" or "preadv"), direct (past the page cache) and queue_depth; io_note
            where the build has no io_uring. Empty in memory; remote: remote_rows, address for file_rows, io.
        """
        return {} if self._file is None else self._file.stats()

    def share(self, name: str, *, timeout_s: float = 600.0, numa: int | None = None, directory: str = shared_table.DIRECTORY,
              progress: Progress | None = None) -> RowTable:
        """Puts the table into a segment that all processes of this machine can use: one copy for all.

        Every process may call it: the first fills the segment, the others wait and use it. Segments that crashed processes left
        are removed first.

        Args:
            name: 1 to 128 of letters, digits, "_", "-" and ".".
            timeout_s: seconds to wait for another process that is filling it.
            numa, directory: the NUMA node that it is placed on (None: page by page over all); a folder of a tmpfs.
            progress: shows how far filling it is; None: nothing does.

        Returns:
            A table of tier "host" with the same rows, read-only: writing to them is a fault. It is in use while its rows are;
            the last process that uses it removes it, and a process that dies in any way no longer counts.

        Raises:
            ValueError: the name cannot be one, or the table was converted (`layer.float()`) and no longer fits its row_format.
            FileExistsError: another table is in use by this name; says how it differs.
            TimeoutError: another process did not finish filling it in time.
            OSError: there is no room (`CapacityError`), the directory cannot be written to, or the source cannot be read.
                Nothing is left behind.
        """
        return shared_table.share(self, name, timeout_s, (numa, directory), progress)

    @classmethod
    def attach(cls, name: str, like: RowTable | None = None, *, fingerprint: str | None = None, timeout_s: float = 0.0,
               directory: str = shared_table.DIRECTORY) -> RowTable:
        """The table that another process shares by a name. It is verified, and may outlive its maker.

        Args:
            name: as in `share`.
            like: a table, such as one of the file, that it must equal in format, shape and fingerprint; None: any.
            fingerprint, timeout_s: that it must have (None: any); seconds to wait until it is there and full.
            directory: as in `share`.

        Returns:
            As `share`.

        Raises:
            FileNotFoundError: no process shares a table by this name.
            TimeoutError: it is still being filled.
            ValueError: it holds another table, or is half-written, truncated, corrupt, damaged or of another version.
            OSError: it cannot be opened or mapped, or belongs to another user.
        """
        return shared_table.attach(cls, name, like or fingerprint, timeout_s, directory)

    @staticmethod
    def unlink_stale(directory: str = shared_table.DIRECTORY) -> list[str]:
        """Removes shared tables that no process uses, such as crashed ones left; their names. `share` does so too."""
        return shared_table.unlink_stale(directory)

    def quantize(self, row_format: str, path: str | os.PathLike[str] | None = None) -> tuple[RowTable, QuantizeReport]:
        """A copy with its rows encoded as another format, each value as the nearest one, and what that loses per row.

        Rows pass in pieces: a table in a file may be larger than memory. A scale of the whole table takes a pass more.

        Args:
            row_format: any but the float formats. Scales are the least that hold the largest value of their block, group, row
                or table.
            path: the file of the new table, written as `create` does; None: a table in memory.

        Returns:
            The table and its errors.

        Raises:
            ValueError: the rows are no floats, one has NaN or Inf (names it), or the format does not take D.
            OSError: as of `create` and `read_rows`.
        """
        return quantize(self, row_format, path)

    def fingerprint(self) -> str:
        """A hash of shape, format and 1,024 rows spread evenly: what `attach` compares. It does not see a change elsewhere."""
        return shared_table.fingerprint(self)

    def pin(self, registrar: Any = None) -> None:
        """Registers the memory of a copied or shared table with a device, 1 GiB at a time: the device reads it where it is.

        Args:
            registrar: a `_C.HostRegistrar` of another device runtime; None: CUDA.

        Raises:
            ValueError: the table has no memory of its own.
            RuntimeError: there is no GPU, or no CUDA library.
            OSError: the device refuses, and says why; or RLIMIT_MEMLOCK is too low (`CapacityError`), where the runtime heeds it.
                Nothing stays pinned.
        """
        pin_host_memory("RowTable.pin", getattr(self._memory, "host", self._memory), registrar)

    def with_scales_on(self, device: torch.device | str) -> RowTable:
        """This table with a copy of its scales on a GPU, which reads the rows in pinned host memory: 2 requests per row, not 3.

        Args:
            device: of the scales, and of what is gathered (policy `uva`); `read_rows`, `share` and pickle bring them back.

        Raises:
            ValueError: the rows are not in pinned host memory, or have no scales that lie apart.
            OSError: the GPU has no room for them (`CapacityError`).
        """
        return with_scales_on(self, device)

    def memory_stats(self) -> dict[str, Any]:
        """What the memory of a copied or shared table is like now.

        Returns:
            bytes; mapped_bytes (whole pages); pages ("explicit" huge ones, "transparent" or "small"); resident_bytes and, of
            these, huge_bytes (None: unknown); pinned_bytes; numa_pages (of a sample, by node); of a shared one name and users
            (None: unknown). Empty where the table has no memory of its own.
        """
        return shared_table.stats_of(self._memory)

    def stage(self, row_ids: Tensor) -> tuple[RowTable, Tensor]:
        """A table in memory that holds the rows of `row_ids`, and the ids into it: what an op gathers from.

        Args:
            row_ids: int32 or int64, any shape, contiguous; -1 or in [0, R).

        Returns:
            This table and the ids unchanged, where it is in memory. Else a table of the distinct rows, read from the file, and
            ids of the same shape and dtype into it; -1 stays -1.

        Raises:
            IndexError: an id is neither -1 nor in [0, R); nothing is read.
            OSError: the file cannot be read, or it changed; names the path and the row.
        """
        return (self, row_ids) if self._file is None else staging.stage(self, row_ids)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """A file is opened, a shared table attached and a remote one connected again; all are verified by fingerprint."""
        return reopen.reduced(self) or super().__reduce_ex__(protocol)

    def __copy__(self) -> RowTable:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RowTable:
        return reopen.deep_copied(self, memo)


reopen.register(RowTable)
staging._OPENERS.update(open=RowTable.open, connect=RowTable.connect)
