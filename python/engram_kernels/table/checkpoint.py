"""The tensors of a checkpoint by name, in whatever files they lie: a folder, its index, or one safetensors file."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engram_kernels.table.checkpoint_files import INDEX_NAME, files_of, indexed_file, rank_files
from engram_kernels.table.safetensors_file import Extent, Header, open_regular, read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


class Checkpoint(Mapping[str, Tensor]):
    """Name -> tensor, read from its file when it is asked for. Headers are read once, and only of the files that are asked.

    Args:
        source: a folder with a `model.safetensors.index.json` or with safetensors files, the path of an index, or of one file.
        ranks: the files of ranks in the folder, whose tensors have the same names in each: their name with one {} for the number,
            or a list of names; None: model{}-mpN.safetensors, where the folder has such and no index.

    Attributes:
        folder: where the files lie.
        index: the path of the index; None: there is none.
        files: the file of each tensor; of one that every rank has, that of the first.
        ranks: the files of ranks, in their order; empty: there are none.

    Raises:
        OSError: it cannot be read.
        ValueError: there is no safetensors file, the index is not valid, a rank is missing, or two other files without an index
            hold the same tensor.
    """

    def __init__(self, source: str | os.PathLike[str], ranks: str | Sequence[str] | None = None):
        path = Path(source)
        self.folder = path if path.is_dir() else path.parent
        self._headers: dict[Path, Header] = {}
        self.files: dict[str, Path] = {}
        self._of_ranks: dict[str, list[Path]] = {}
        self.ranks = rank_files(self.folder, ranks) if ranks is not None or path.is_dir() else []
        for file in self.ranks:
            for name in self.header_of(file).extents:
                self._of_ranks.setdefault(name, []).append(file)
                self.files.setdefault(name, file)
        self.index = None
        if self.ranks:
            return
        found = files_of(source)
        self.index = None if found.index is None else found.index_path
        for name, file in (found.index or {}).items():
            self.files[name] = indexed_file(found.index_path, name, file)
        for file in found.paths:
            for name in self.header_of(file).extents:
                if name in self.files:
                    raise ValueError(f"{name} is in {self.files[name].name} and in {file.name}, and there is no {INDEX_NAME} "
                                     "that says which one counts")
                self.files[name] = file

    def header_of(self, file: Path) -> Header:
        """What a file says it holds."""
        if file not in self._headers:
            fd = open_regular(file)
            try:
                self._headers[file] = read_header(fd, file)
            finally:
                os.close(fd)
        return self._headers[file]

    def extent(self, name: str) -> Extent:
        """Where a tensor lies in its file, its dtype and shape.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the index names a file that is not there, or one that lacks the tensor, or that file is damaged.
        """
        if name not in self.files:
            raise KeyError(name)
        file, index = self.files[name], INDEX_NAME if self.index is None else self.index.name
        if not file.exists():
            raise ValueError(f"{index} says that {name} is in {file.name}, but there is no such file")
        extents = self.header_of(file).extents
        if name not in extents:
            raise ValueError(f"{index} says that {name} is in {file.name}, but that file does not hold it")
        return extents[name]

    def paths(self, name: str) -> list[Path]:
        """The files that have a tensor: one, or that of each rank. KeyError where there is no such tensor."""
        return self._of_ranks.get(name) or [self.files[name]]

    def parts(self, name: str) -> list[tuple[Path, Extent]]:
        """Where a tensor lies in each rank that has it, in order; one place where there are no ranks. Errors: as `extent`."""
        self.extent(name)
        return [(file, self.header_of(file).extents[name]) for file in self.paths(name)]

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU. Errors: as `extent`; OSError where a file cannot be read; ValueError where ranks differ in it."""
        extent = self.extent(name)
        if extent.dtype not in _DTYPES:
            raise ValueError(f"{name} is {extent.dtype}, expected one of {', '.join(_DTYPES)}")
        data = bytearray()
        for rank, (path, part) in enumerate(self.parts(name)):
            read = _read(path, name, part)
            if rank and ((part.dtype, part.shape) != (extent.dtype, extent.shape) or read != data):
                raise ValueError(f"{name} in {path.name} is not what it is in {self.files[name].name}: only the rows of a table "
                                 "may be split over ranks")
            data = data if rank else read
        dtype = _DTYPES[extent.dtype]
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")).view(extent.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)



def _read(path: Path, name: str, extent: Extent) -> bytearray:
    with open(path, "rb") as file:
        file.seek(extent.offset)
        data = bytearray(extent.num_bytes)
        if file.readinto(data) != extent.num_bytes:
            raise OSError(f"{path}: {name} should have {extent.num_bytes} bytes, the file ends before")
    return data
