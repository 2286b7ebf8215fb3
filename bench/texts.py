"""The three kinds of real text that dedup_and_cache.py measures, as token ids."""
import collections
import html.parser
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engram_kernels.demo.main import find_tokenizer

KINDS = {
    "prose": "The Debian Administrator's Handbook, English (Debian package debian-handbook)",
    "code": "the modules of Python's standard library",
    "non-English": "the same handbook in Japanese and French, chapter by chapter in turn",
}


class _Text(html.parser.HTMLParser):
    """The text of a page, a line for each block."""

    BLOCKS = ("p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "pre", "td")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")
        if tag in self.BLOCKS:
            self.parts.append("\0")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _lines(path: Path) -> list[str]:
    parser = _Text()
    parser.feed(path.read_text(encoding="utf-8"))
    return [" ".join(line.split()) for line in "".join(parser.parts).split("\0") if line.strip()]


def _pages(folder: Path) -> list[str]:
    """The pages of a book without what is on many of them: navigation, and the title of the book."""
    pages = [_lines(path) for path in sorted(folder.glob("*.html")) if path.name not in ("index.html", "ix01.html")]
    if not pages:
        raise SystemExit(f"{folder} holds no pages: unpack the Debian package debian-handbook and name its html folder")
    on_pages = collections.Counter(line for page in pages for line in set(page))
    return ["\n".join(line for line in page if on_pages[line] <= 3) + "\n" for page in pages]


def documents(kind: str, handbook: Path) -> Iterator[str]:
    """The documents of one kind, in a fixed order."""
    if kind == "prose":
        yield from _pages(handbook / "en-US")
    elif kind == "non-English":
        for pair in zip(_pages(handbook / "ja-JP"), _pages(handbook / "fr-FR"), strict=False):
            yield from pair
    else:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield path.read_text(encoding="utf-8")


def token_ids(kind: str, handbook: Path, num_tokens: int) -> Tensor:
    """[at most num_tokens] int32, the documents one after the other, without special tokens."""
    tokenizer, ids = Tokenizer.from_file(str(find_tokenizer())), []
    for text in documents(kind, handbook):
        ids += tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) >= num_tokens:
            break
    return torch.tensor(ids[:num_tokens], dtype=torch.int32)
