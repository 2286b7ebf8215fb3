"""Where the tensors of a table lie: in a file, a folder, an index of a checkpoint, or the files of ranks."""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engram_kernels._files import parse_json, shorten
from engram_kernels.table.safetensors_file import MAX_HEADER_BYTES, open_regular, other_kind, read_bytes, read_header

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Names = str | Sequence[str]
Located = list[tuple[str, Path]]  # parts one behind the other: name of a tensor, and the file that it lies in

INDEX_NAME = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_INDEX_BYTES = 2 * MAX_HEADER_BYTES
_MOST_NAMES = 8  # in a message
_MOST_DIGITS = 9  # of the number of a part: one that is longer leaves a gap in any case
_OF_RANK = re.compile(r"model[0-9]+-mp([0-9]{1,6})\.safetensors")
_NUMBER = re.compile(r"[0-9]+")
_TABLE_NAME = re.compile(r"n_?gram|\bple\b|memory|multi_head_embedding")
_OP = "RowTable.open"


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a source, and which tensors lie in which of them as far as that is known without opening them."""

    label: str  # what a message calls the source
    paths: list[Path]  # empty: those that the index names
    index: dict[str, Any] | None = None  # file by tensor name, as the index has it: nobody vouches for the values
    index_path: Path = Path()
    ranks: bool = False  # each file may hold a part under the same name
    is_one_file: bool = False  # and no folder


def files_of(source: Source) -> Files:
    """Says what files a source stands for. Arguments and errors: `RowTable.open`."""
    if isinstance(source, str) and re.match(r"\w+://", source):
        raise ValueError(f"{_OP}: source is {shorten(source)}, expected a path; an address is for RowTable.connect")
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return _folder(path)
        if path.name.endswith(".json") and path.exists():
            return Files(str(path), [], _read_index(path), path)
        if "{}" in str(path) and not path.exists():
            return Files(str(path), _numbered_files(path), ranks=True)
        return Files(str(path), [path], is_one_file=True)
    if not isinstance(source, list | tuple) or not source or not all(isinstance(x, str | os.PathLike) for x in source):
        raise TypeError(f"{_OP}: source is {shorten(source)}, expected a path, or a list of paths")
    paths = [Path(x) for x in source]
    label = str(paths[0]) + (f" and {len(paths) - 1} more" if paths[1:] else "")
    for n, path in enumerate(paths):
        if path in paths[:n]:
            raise ValueError(f"{_OP}: {path} is named twice")
    return Files(label, paths, ranks=True)


def _folder(folder: Path) -> Files:
    try:
        names = sorted(x.name for x in os.scandir(folder) if not x.name.startswith("."))
    except OSError as err:
        raise OSError(err.errno, f"{_OP}: {err.strerror}", str(folder)) from None
    indexes = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    if INDEX_NAME in indexes:
        indexes = [INDEX_NAME]
    if len(indexes) > 1:
        raise ValueError(f"{_OP}: {folder} has several indexes, name one of them: {_listed(indexes)}")
    if indexes:
        path = folder / indexes[0]
        return Files(str(folder), [], _read_index(path), path)
    paths = [folder / name for name in names if name.endswith(".safetensors")]
    if not paths:
        revisions = sorted(x.name for x in os.scandir(folder / "snapshots")) if (folder / "snapshots").is_dir() else []
        hint = f"; name a revision in it: {_listed([f'snapshots/{x}' for x in revisions])}" if revisions else ""
        raise ValueError(f"{_OP}: {folder} is a directory without safetensors files; it has {_listed(names)}{hint}")
    return Files(str(folder), paths)


def _read_index(path: Path) -> dict[str, Any]:
    """The weight_map of an index."""
    fd = open_regular(path)
    try:
        num_bytes = os.fstat(fd).st_size
        if num_bytes > _MAX_INDEX_BYTES:
            raise ValueError(f"it has {num_bytes} bytes, at most {_MAX_INDEX_BYTES} are allowed")
        text = read_bytes(fd, 0, num_bytes)
        if (kind := other_kind(text[:64])) is not None and not text.lstrip().startswith(b"{"):
            raise ValueError(kind)
        index = parse_json(text.decode("utf-8"))
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict):
            raise ValueError("it has no weight_map, which says in which file each tensor lies")
    except ValueError as err:
        raise ValueError(f"{_OP}: {path} is no index of a checkpoint: {shorten(str(err))}") from None
    except OSError as err:
        raise OSError(err.errno, f"{_OP}: {err.strerror}", str(path)) from None
    finally:
        os.close(fd)
    return found


def indexed_file(index: Path, name: str, file: Any) -> Path:
    """The path of a file that an index names. ValueError where that is no file beside the index."""
    if not isinstance(file, str) or not file or "\0" in file or os.path.isabs(file) or ".." in Path(file).parts:
        raise ValueError(f"{_OP}: {index} says that tensor {shorten(name)!r} lies in {shorten(repr(file))}, expected the name of "
                         "a file beside the index")
    return index.parent / file


def _numbered_files(pattern: Path) -> list[Path]:
    """The files of a pattern such as model{}-mp4.safetensors, in the order of their numbers."""
    if str(pattern).count("{}") != 1 or "{}" not in pattern.name:
        raise ValueError(f"{_OP}: {pattern} should have one {{}}, in the name of the file, which stands for a number")
    try:
        names = os.listdir(pattern.parent)
    except OSError as err:
        raise OSError(err.errno, f"{_OP}: {err.strerror}", str(pattern.parent)) from None
    paths = [pattern.parent / name for name in _numbered(pattern.name, names, f"file of {pattern.parent}")]
    # convert.py names its files model0-mp4.safetensors ..: how many there are is in the name
    count = re.search(r"\{\}-mp([0-9]{1,6})\b", pattern.name)
    if count is not None and int(count[1]) != len(paths):
        raise ValueError(f"{_OP}: there are {len(paths)} files {pattern}, expected {int(count[1])} as their name says: the last "
                         "are missing")
    return paths


def rank_files(folder: Path, ranks: str | Sequence[str] | None) -> list[Path]:
    """The files of ranks in a folder, in the order of the ranks; none where there are none.

    Args:
        folder: where they lie.
        ranks: their name with one {} for the number, or a list of names; None: model{}-mpN.safetensors, as convert.py names them,
            where the folder has such and no index.

    Raises:
        ValueError: one is missing, or there are several sets of them.
    """
    if ranks is not None:
        if isinstance(ranks, str):
            return _numbered_files(folder / ranks)
        if not isinstance(ranks, list | tuple) or not ranks or not all(isinstance(x, str) for x in ranks):
            raise TypeError(f"{_OP}: ranks is {shorten(repr(ranks))}, expected a name of files with one {{}}, or a list of names")
        return files_of([folder / name for name in ranks]).paths
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    patterns = sorted({f"model{{}}-mp{m[1]}.safetensors" for name in names if (m := _OF_RANK.fullmatch(name))})
    if not patterns or any(name.endswith(_INDEX_SUFFIX) for name in names):
        return []
    if len(patterns) > 1:
        raise ValueError(f"{_OP}: {folder} has the files of several splits over ranks; ranks should name one of them: "
                         f"{_listed(patterns)}")
    return _numbered_files(folder / patterns[0])


def matching(pattern: str, names: Iterable[str]) -> list[tuple[int, str]]:
    """The names that a pattern with one {} stands for, each with its number, in the order of `names`."""
    before, after = pattern.split("{}")
    found = []
    for name in names:
        digits = name[len(before):len(name) - len(after)]
        # names that overlap before and after are too short to hold a number
        if name.startswith(before) and name.endswith(after) and _NUMBER.fullmatch(digits):
            found.append((int(digits[:_MOST_DIGITS]), name))
    return found


def _numbered(pattern: str, names: Iterable[str], kind: str) -> list[str]:
    """The names that a pattern with one {} stands for, by number: 0, 1, .. without gaps. ValueError says which is missing."""
    by_number: dict[int, str] = {}
    for number, name in matching(pattern, names):
        if number in by_number:
            raise ValueError(f"{_OP}: {shorten(name)!r} and {shorten(by_number[number])!r} are both part {number} of "
                             f"{shorten(pattern)!r}")
        by_number[number] = name
    missing = next((n for n in range(max(len(by_number), 1)) if n not in by_number), None)
    if missing is not None:
        what = f"there are {len(by_number)}, the last is {max(by_number)}" if by_number else "there is none"
        raise ValueError(f"{_OP}: no {kind} is called {shorten(pattern)!r} with {missing} for {{}}: {what}")
    return [by_number[n] for n in range(len(by_number))]


class Finder:
    """Finds the tensors of a table in the files of a source; their headers are read once, and only if the names need it."""

    def __init__(self, files: Files):
        self._files = files
        self._held: dict[str, list[Path]] | None = None

    def locate(self, names: Names, argument: str) -> Located:
        """The parts that `names` stand for, in the order of their rows.

        Args:
            names: a name, a name with one {} for the number of a part, or a sequence of names.
            argument: what a message calls them.

        Returns:
            Names and files, at least one; nothing is opened yet where the names and the source say it all.

        Raises:
            ValueError: a part is missing, or lies in several files, or is named twice.
            OSError: a file cannot be read.
        """
        if isinstance(names, str):
            if names.count("{}") > 1:
                raise ValueError(f"{_OP}: {argument} is {shorten(names)!r}, expected at most one {{}}")
            if "{}" not in names:
                return self._parts_of(names)
            found = self._numbered_parts(names)
        elif isinstance(names, list | tuple) and names and all(isinstance(x, str) for x in names):
            found = list(names)
        else:
            raise TypeError(f"{_OP}: {argument} is {shorten(names)}, expected a name or a list of names")
        parts: Located = []
        for name in found:
            of_name = self._parts_of(name)
            if len(of_name) > 1:
                raise ValueError(f"{_OP}: tensor {shorten(name)!r} lies in {len(of_name)} files of {self._files.label}: parts by "
                                 "name and parts by rank cannot be put in order")
            if of_name[0] in parts:
                raise ValueError(f"{_OP}: {argument} names {shorten(name)!r} twice")
            parts += of_name
        return parts

    def candidates(self) -> str:
        """Names that may be those of a table, for a message; parts that differ by a number as one."""
        groups: dict[str, tuple[str, int]] = {}  # by pattern: a name, and how many there are
        for name in self._names():
            numbers = list(_NUMBER.finditer(name))
            pattern = f"{name[:numbers[-1].start()]}{{}}{name[numbers[-1].end():]}" if numbers else name
            groups[pattern] = (name, groups.get(pattern, ("", 0))[1] + 1)
        embeddings = [x for x in groups if "embed" in x]
        likely = [x for x in embeddings if _TABLE_NAME.search(x)] or embeddings or list(groups)
        return _listed([f"{x} ({count} parts)" if count > 1 else name for x, (name, count) in ((x, groups[x]) for x in likely)])

    def _names(self) -> Iterable[str]:
        return self._files.index if self._files.index is not None else self._headers()

    def _headers(self) -> dict[str, list[Path]]:
        """The files that each tensor lies in. Reads the header of every file."""
        if self._held is None:
            held: dict[str, list[Path]] = {}
            for path in self._files.paths:
                fd = open_regular(path)
                try:
                    names = read_header(fd, path).extents
                finally:
                    os.close(fd)
                for name in names:
                    held.setdefault(name, []).append(path)
            self._held = held
        return self._held

    def _numbered_parts(self, pattern: str) -> list[str]:
        try:
            return _numbered(pattern, self._names(), f"tensor of {self._files.label}")
        except ValueError as err:
            raise ValueError(f"{err}" + ("" if "there is none" not in str(err) else f"; it has {self.candidates()}")) from None

    def _parts_of(self, name: str) -> Located:
        files = self._files
        if files.index is not None:
            if name not in files.index:
                raise ValueError(f"{_OP}: {files.label}: the index has no tensor {shorten(name)!r}; it has {self.candidates()}")
            return [(name, indexed_file(files.index_path, name, files.index[name]))]
        if files.is_one_file:
            return [(name, files.paths[0])]
        paths = self._headers().get(name, [])
        if not paths:
            raise ValueError(f"{_OP}: no file of {files.label} has a tensor {shorten(name)!r}; there are {self.candidates()}")
        if len(paths) > 1 and not files.ranks:
            raise ValueError(f"{_OP}: {len(paths)} files of {files.label} have a tensor {shorten(name)!r}: "
                             f"{_listed([x.name for x in paths])}. If they are the parts of ranks, name the files in the order "
                             "of the rows: a list of them, or one path with {} for the rank, such as model{}-mp4.safetensors")
        if 1 < len(paths) < len(files.paths):
            lacking = [x.name for x in files.paths if x not in paths]
            raise ValueError(f"{_OP}: tensor {shorten(name)!r} is missing in {_listed(lacking)}, but {len(paths)} other files "
                             "have it")
        return [(name, path) for path in paths]


def _listed(names: list[str]) -> str:
    return (", ".join(shorten(x) for x in names[:_MOST_NAMES]) or "none") + (", .." if names[_MOST_NAMES:] else "")
