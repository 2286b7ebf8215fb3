"""The tensors of a checkpoint by name, in whatever files they lie: a folder, its index, or one safetensors file."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engram_kernels.table.checkpoint_files import INDEX_NAME, files_of, indexed_file
from engram_kernels.table.safetensors_file import Extent, Header, open_regular, read_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
           "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
           "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


class Checkpoint(Mapping[str, Tensor]):
    """Name -> tensor, read from its file when it is asked for. Headers are read once, and only of the files that are asked.

    Args:
        source: a folder with a `model.safetensors.index.json` or with safetensors files, the path of an index, or of one file.

    Raises:
        OSError: it cannot be read.
        ValueError: there is no safetensors file, the index is not valid, or two files without an index hold the same tensor.
    """

    def __init__(self, source: str | os.PathLike[str]):
        path, found = Path(source), files_of(source)
        self.folder = path if path.is_dir() else path.parent
        self.index = None if found.index is None else found.index_path
        self.files: dict[str, Path] = {}
        self._headers: dict[Path, Header] = {}
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

    def __getitem__(self, name: str) -> Tensor:
        """A tensor on the CPU. Errors: as `extent`, and OSError where the file cannot be read."""
        extent = self.extent(name)
        if extent.dtype not in _DTYPES:
            raise ValueError(f"{name} is {extent.dtype}, expected one of {', '.join(_DTYPES)}")
        with open(self.files[name], "rb") as file:
            file.seek(extent.offset)
            data = bytearray(extent.num_bytes)
            if file.readinto(data) != extent.num_bytes:
                raise OSError(f"{self.files[name]}: {name} should have {extent.num_bytes} bytes, the file ends before")
        dtype = _DTYPES[extent.dtype]
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(extent.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

