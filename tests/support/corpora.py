"""A vocabulary of bytes, and the documents of an index over it."""

from __future__ import annotations

from edgespec.corpus import Corpus

DIGEST = "0" * 64


class Letters:
    """A vocabulary of bytes that keeps the text it tokenized."""

    def __init__(self, size: int = 256) -> None:
        self.size = size
        self.read = ""

    def tokenize(self, text: str) -> list[int]:
        self.read += text
        return list(text.encode())


def words(index: Corpus | None) -> list[str]:
    """The documents of an index over `Letters`."""
    assert index is not None
    return ["".join(map(chr, part)) for part in split(index.text.tolist())]


def split(tokens: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == -1:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts[:-1]
