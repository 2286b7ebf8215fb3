"""Rows of open files by index."""
from typing import Any

from engram_kernels._library import need_compiled

# stride_bytes and row_bytes of the rows of one array, and its parts: the number of a file, offset, num_rows
FileExtent = tuple[int, int, list[tuple[int, int, int]]]


def make_files_reader(files: list[tuple[int, str]], queue_depth: int = 64, io: str = "auto") -> Any:
    """A reader of several files at once; arguments and errors as of `make_reader`.

    Args:
        files: a descriptor, which is duplicated, and a path for messages, of each.
        queue_depth: reads in flight, 1..4096.
        io: as in `make_reader`.
    """
    need_compiled("a table in a file")
    from engram_kernels import _C
    return _C.FileReader(files, queue_depth, io)


def make_reader(fd: int, path: str, queue_depth: int = 64, io: str = "auto") -> Any:
    """A reader of the file behind `fd`, which may be closed afterwards: a `_C.FileReader` (csrc/table/file_reader.h).

    Args:
        fd: descriptor of the file; duplicated.
        path: for messages.
        queue_depth: reads in flight, 1..4096.
        io: "auto", "io_uring", "preadv", "io_uring_buffered" or "preadv_buffered".

    Raises:
        RuntimeError: the compiled module is missing.
        ValueError: an argument is out of range, or the io that is named cannot be had.
        OSError: the descriptor cannot be used; names the path.
    """
    need_compiled("a table in a file")
    from engram_kernels import _C
    return _C.FileReader(fd, path, queue_depth, io)
