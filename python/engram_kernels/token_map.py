"""TokenMap: which token ids count as the same n-gram element (" The", "the", "THE"), built once from a tokenizer."""
from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_kernels import _modes
from engram_kernels._files import shorten, write_atomic

_FORMAT = 1  # of the saved file
_MAX_UNPACKED_BYTES = 2**27  # of a saved map: 33 million token ids
_SPACE_MARK = "\ue000"  # private use: holds the place of a lone space while the rest is stripped


@dataclasses.dataclass(frozen=True, eq=False)
class TokenMap:
    """Token id -> class id, many to one, with the fingerprint of the tokenizer it belongs to.

    A map of the right size from another tokenizer revision is wrong in silence: give `load` what to compare with.

    Attributes:
        map: [vocab] int32, contiguous; classes in [0, num_classes), each used.
        num_classes: how many classes.
        fingerprint: sha256 (hex) of the whole tokenizer file, or of `to_str()` of a tokenizer that came in memory.
    """
    map: Tensor
    num_classes: int
    fingerprint: str

    def __post_init__(self) -> None:
        m = self.map
        if not isinstance(m, Tensor):
            raise TypeError(f"TokenMap: map is a {type(m).__name__}, expected a tensor")
        if m.dtype != torch.int32 or m.dim() != 1 or not m.is_contiguous() or m.numel() == 0:
            raise ValueError(f"TokenMap: map is {m.dtype} {list(m.shape)}, strides {list(m.stride())}, "
                             "expected contiguous torch.int32 [vocab], vocab > 0")
        if m.is_meta or _modes.fake_mode_of(m) is not None:
            return  # it has no data
        with _modes.plain_tensors():  # a map of real data is made under torch.device("meta") or FakeTensorMode too
            used = np.unique(m.cpu().numpy())  # sorted
        low, high = int(used[0]), int(used[-1])
        if low != 0 or high != self.num_classes - 1 or used.size != self.num_classes:
            raise ValueError(f"TokenMap: map uses {used.size} classes from {low} to {high}, "
                             f"expected all of 0..{self.num_classes - 1} (num_classes is {self.num_classes})")

    @property
    def vocab_size(self) -> int:
        """Number of raw token ids."""
        return self.map.shape[0]

    def class_of(self, token_id: int) -> int | None:
        """The class of a token id; None where the map has no data (on the meta device, or fake)."""
        if self.map.is_meta or _modes.fake_mode_of(self.map) is not None:
            return None
        with _modes.plain_tensors():
            return int(self.map[token_id])

    def to(self, device: torch.device | str) -> TokenMap:
        """The same map on `device`; itself when it is there already."""
        if _modes.is_on(self.map, device):
            return self
        return self.with_map(self.map.to(device))

    def with_map(self, token_classes: Tensor) -> TokenMap:
        """The same map with its tensor somewhere else. Not checked: that would read it on a device."""
        moved = copy.copy(self)
        object.__setattr__(moved, "map", token_classes)
        return moved

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenMap:
        """Builds the map: about a second for 129,280 ids.

        For each id in order, the decoded text (special tokens kept, no clean-up of spaces) is normalized: NFKC, NFD,
        accents stripped, lower case, runs of space, tab, CR and LF to one space, stripped unless a lone space; when
        nothing is left, the text itself. Text with U+FFFD (part of a character) is replaced by the raw token string.
        Ids of equal text share a class; classes are numbered as first seen.

        Args:
            tokenizer: path of a `tokenizer.json` or of its directory, a `tokenizers.Tokenizer`, or an object with one
                as `backend_tokenizer` (transformers' fast tokenizers).

        Returns:
            The map, on the CPU.

        Raises:
            FileNotFoundError: no tokenizer file at the path.
            ValueError: the file is no tokenizer, or the tokenizer is empty.
            TypeError: `tokenizer` is none of the above.
            ImportError: the package `tokenizers` is missing.

        Source: arXiv 2601.07372 section 2.2; deepseek-ai/Engram `engram_demo_v1.py` (`CompressedTokenizer`).
        """
        backend, fingerprint = _open_tokenizer(tokenizer)
        classes = _classes(backend)
        if not classes:
            raise ValueError("TokenMap: the tokenizer has no tokens")
        with _modes.plain_tensors():
            return cls(torch.tensor(classes, dtype=torch.int32, device="cpu"), max(classes) + 1, fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the map to `path` (npz), atomically: a temporary file beside it, fsync, rename.

        Raises:
            OSError: the file cannot be written; nothing is left behind.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, format=np.int64(_FORMAT), map=self.map.cpu().numpy(),
                            num_classes=np.int64(self.num_classes), fingerprint=np.array(self.fingerprint))
        write_atomic("TokenMap.save", path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str], tokenizer: Any = None,
             expected_fingerprint: str | None = None) -> TokenMap:
        """Reads a saved map and makes sure that it belongs to the tokenizer at hand.

        Args:
            path: file written by `save`.
            tokenizer: what `from_tokenizer` takes, in the same form as then: file or in memory. Its fingerprint must
                equal the map's.
            expected_fingerprint: the fingerprint itself. With neither, nothing is compared.

        Returns:
            The map, on the CPU.

        Raises:
            OSError: the file cannot be read (FileNotFoundError: is not there).
            ValueError: the file is truncated, corrupt or of another kind, or the fingerprints differ; names the path.
        """
        data = Path(path).read_bytes()
        try:
            token_map = cls._parse(data)
        except Exception as error:  # zip, zlib and npy parsers each raise their own kinds on damaged bytes
            raise ValueError(f"TokenMap: {os.fspath(path)} is no token map, or a damaged one ({len(data)} bytes): "
                             f"{shorten(str(error))}") from error
        wanted = [] if expected_fingerprint is None else [("expected_fingerprint", expected_fingerprint)]
        if tokenizer is not None:
            wanted.append(("the tokenizer", tokenizer_fingerprint(tokenizer)))
        for what, fingerprint in wanted:
            if fingerprint != token_map.fingerprint:
                raise ValueError(f"TokenMap: {os.fspath(path)} was built from a tokenizer with fingerprint "
                                 f"{token_map.fingerprint}, but {what} has {fingerprint}: build the map again")
        return token_map

    @classmethod
    def _parse(cls, data: bytes) -> TokenMap:
        if not data.startswith(b"PK"):
            raise ValueError("expected an npz archive")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # a few bytes can unpack to gigabytes
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MAX_UNPACKED_BYTES:
            raise ValueError(f"it unpacks to {unpacked} bytes, expected at most {_MAX_UNPACKED_BYTES}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            missing = {"format", "map", "num_classes", "fingerprint"} - set(arrays.files)
            if missing:
                raise ValueError(f"missing {', '.join(sorted(missing))}")
            if int(arrays["format"]) != _FORMAT:
                raise ValueError(f"format is {int(arrays['format'])}, expected {_FORMAT}")
            classes, fingerprint = arrays["map"], arrays["fingerprint"]
            if classes.dtype != np.int32 or classes.ndim != 1:
                raise ValueError(f"map is {classes.dtype} {list(classes.shape)}, expected int32 [vocab]")
            if fingerprint.dtype.kind != "U" or fingerprint.shape != ():
                raise ValueError(f"fingerprint is {fingerprint.dtype} {list(fingerprint.shape)}, expected one string")
            with _modes.plain_tensors():
                return cls(torch.from_numpy(classes.copy()), int(arrays["num_classes"]), str(fingerprint))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 (hex) of a tokenizer file, or of `to_str()` of one in memory; takes what `from_tokenizer` takes."""
    if isinstance(tokenizer, str | os.PathLike):
        return hashlib.sha256(_tokenizer_file(tokenizer).read_bytes()).hexdigest()
    return hashlib.sha256(_text_of(_backend(tokenizer)).encode()).hexdigest()


def _text_of(backend: Any) -> str:
    """`backend` as JSON, without padding and truncation: they are set by who uses a tokenizer, and name no token."""
    text: str = backend.to_str()
    if getattr(backend, "padding", None) is None and getattr(backend, "truncation", None) is None:
        return text
    plain = _import_tokenizers().Tokenizer.from_str(text)
    plain.no_padding()
    plain.no_truncation()
    plain_text: str = plain.to_str()
    return plain_text


def _tokenizer_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"TokenMap: no tokenizer at {file}, expected the path of a tokenizer.json or of its "
                                "directory")
    return file


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("TokenMap: building a token map needs the package tokenizers: "
                          "pip install 'engram-kernels[demo]'") from error
    return tokenizers


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not all(hasattr(backend, name) for name in ("decode_batch", "id_to_token", "get_vocab_size", "to_str")):
        raise TypeError(f"TokenMap: tokenizer is a {type(tokenizer).__name__}, expected a path, a tokenizers.Tokenizer "
                        "or an object with one as backend_tokenizer (a fast transformers tokenizer)")
    return backend


def _open_tokenizer(tokenizer: Any) -> tuple[Any, str]:
    """The `tokenizers.Tokenizer` and its fingerprint."""
    tokenizers = _import_tokenizers()
    if not isinstance(tokenizer, str | os.PathLike):
        return _backend(tokenizer), tokenizer_fingerprint(tokenizer)
    file = _tokenizer_file(tokenizer)
    data = file.read_bytes()  # once: what is parsed is what is fingerprinted
    try:
        return tokenizers.Tokenizer.from_buffer(data), hashlib.sha256(data).hexdigest()
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"TokenMap: {file} is no tokenizer file: {error}") from error


def _classes(backend: Any) -> list[int]:
    """Class of each token id, numbered as first seen."""
    tokenizers = _import_tokenizers()
    n = tokenizers.normalizers
    # the library's own normalizers, so that rare characters fold as they did in training
    normalizer = n.Sequence([
        n.NFKC(), n.NFD(), n.StripAccents(), n.Lowercase(),
        n.Replace(tokenizers.Regex(r"[ \t\r\n]+"), " "), n.Replace(tokenizers.Regex(r"^ $"), _SPACE_MARK),
        n.Strip(), n.Replace(_SPACE_MARK, " ")])
    texts = backend.decode_batch([[i] for i in range(backend.get_vocab_size(True))], skip_special_tokens=False)
    class_of_key: dict[str, int] = {}
    classes = []
    for token_id, text in enumerate(texts):
        key = backend.id_to_token(token_id) if "\ufffd" in text else normalizer.normalize_str(text) or text
        classes.append(class_of_key.setdefault(key, len(class_of_key)))
    return classes
