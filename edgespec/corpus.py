"""A corpus as one suffix array: the tokens that followed a phrase in known documents, and how often.

The suffixes of all tokens are sorted, so the occurrences of a phrase are adjacent and counting them takes two
binary searches (Manber and Myers 1990). Two int32 per token, on disk and in memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError
from edgespec.files import replacing

MAX_TOKENS = 2_000_000
MAX_MATCH = 64
SEPARATOR = -1
"""Ends every document: no match contains it, no continuation passes it."""

_DEPTH = 2 * MAX_MATCH  # tokens by which suffixes are sorted: a match and a continuation of the same length
_SAMPLE = 64
_MIN_SHARE = 0.1
_MAGIC = b"EDGECORP"
_VERSION = 1
_HEADER = struct.Struct("=8sII32s32s")  # magic, version, tokens, key, SHA-256 of the rest

Tokens = npt.NDArray[np.int32]


class Match(NamedTuple):
    """`length` tokens at the end of a context occur stop - start times: suffixes[start:stop] begin with them.

    All three are 0 if no phrase of the minimum length occurs.
    """

    length: int
    start: int
    stop: int


class Continuation(NamedTuple):
    """The most frequent continuation of a match of `match_length` tokens.

    probabilities[i]: the share of tokens[i] among the occurrences of all before it.
    """

    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]
    match_length: int


class Corpus:
    """An immutable collection of documents in one vocabulary. Several threads may read it at once.

    `key` (32 bytes) identifies what it was built from. Matches are `min_match` to MAX_MATCH tokens long.
    """

    def __init__(self, text: Tokens, suffixes: Tokens, *, key: bytes = bytes(32), min_match: int = 4) -> None:
        """`text` and `suffixes` as `build` returns them: int32 [n] both."""
        if len(key) != 32 or not 1 <= min_match <= MAX_MATCH:
            raise ValueError(f"key of {len(key)} bytes, or min_match of {min_match} tokens, out of bounds")
        # Padded, since a malicious suffix array may place a match at the very end.
        self._bytes = text.tobytes() + _pack(SEPARATOR) * _DEPTH
        self._tokens = memoryview(self._bytes).cast("i")
        self._order = suffixes.data
        self._min_match = min_match
        self.text: Tokens = np.frombuffer(self._bytes, np.int32)[: len(text)]
        self.suffixes = suffixes
        self.key = key

    @classmethod
    def open(cls, path: Path, *, vocab_size: int = 2**31, min_match: int = 4) -> Corpus:
        """Load what `save` wrote. Raises EdgespecError for anything else, and for tokens >= vocab_size.

        The file is read, not mapped: its verification touches every page anyway, and a file that shrinks
        while it is mapped kills the process.
        """
        try:
            text, suffixes, key = _read(path)
            if len(text) and int(text.max()) >= vocab_size:
                raise ValueError("it has tokens outside the model's vocabulary")
        except OSError as error:
            raise _unusable(path, error.strerror or "it cannot be read") from None
        except ValueError as error:
            raise _unusable(path, str(error)) from None
        return cls(text, suffixes, key=key, min_match=min_match)

    def save(self, path: Path) -> None:
        """Write to `path`, readable by its owner only, whole or not at all. Raises EdgespecError."""
        digest = _digest(self.key, self.text, self.suffixes)
        header = _HEADER.pack(_MAGIC, _VERSION, len(self.text), self.key, digest)
        try:
            with replacing(path) as file:
                file.writelines((header, self.text.data, self.suffixes.data))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise EdgespecError(f"cannot write the corpus index {path}: {error.strerror}") from None

    def extended(self, documents: Iterable[Sequence[int]], *, key: bytes) -> Corpus:
        """Return this corpus with more documents: faster than `build` while those are few.

        Raises ValueError as `build` does.
        """
        text, suffixes = build(documents)
        if len(self.text) + len(text) > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} tokens")
        joined = np.concatenate((self.text, text))
        if len(text) > len(self.text) // 8:  # inserting takes five times as long per token as sorting
            return Corpus(joined, _suffix_order(joined), key=key, min_match=self._min_match)
        data, prefix = text.tobytes(), self._prefix(_DEPTH)
        places = [
            bisect_left(self._order, data[4 * p : 4 * (p + _DEPTH)], key=prefix) for p in suffixes.tolist()
        ]
        merged = np.insert(self.suffixes, places, suffixes + np.int32(len(self.text)))
        return Corpus(joined, merged, key=key, min_match=self._min_match)

    def match(self, context: Sequence[int]) -> Match:
        """Return the longest end of `context`, min_match to MAX_MATCH tokens, that occurs in a document."""
        tail = array("i", context[-MAX_MATCH:])
        if tail and min(tail) < 0:
            tail = tail[max(i for i, token in enumerate(tail) if token < 0) + 1 :]
        pattern = tail.tobytes()
        length, too_long = self._min_match, len(tail) + 1
        if length >= too_long or (start := self._first(pattern[-4 * length :])) is None:
            return Match(0, 0, 0)
        # Every end of a phrase that occurs occurs too: binary search finds the longest.
        while too_long - length > 1:
            middle = (length + too_long) // 2
            if (found := self._first(pattern[-4 * middle :])) is None:
                too_long = middle
            else:
                length, start = middle, found
        stop = bisect_right(self._order, pattern[-4 * length :], lo=start + 1, key=self._prefix(length))
        return Match(length, start, stop)

    def continuation(self, context: Sequence[int], limit: int) -> Continuation:
        """Return at most `limit` (and MAX_MATCH) tokens, each the most frequent after those before it.

        Counts are exact. Ends with the document, and before a token with a share below 0.1.
        """
        length, start, stop = self.match(context)
        if not length:
            return Continuation((), (), 0)
        phrase = array("i", context[-length:]).tobytes()
        tokens: list[int] = []
        probabilities: list[float] = []
        for depth in range(length, length + min(limit, MAX_MATCH)):
            token, low, high = self._likeliest(phrase, depth, start, stop)
            share = (high - low) / (stop - start)
            if token == SEPARATOR or share < _MIN_SHARE:
                break
            tokens.append(token)
            probabilities.append(share)
            phrase += _pack(token)
            start, stop = low, high
        return Continuation(tuple(tokens), tuple(probabilities), length)

    def _prefix(self, length: int) -> Callable[[int], bytes]:
        """Return a function of a position: the first tokens of its suffix, as bytes, which compare fast."""
        data, size = self._bytes, 4 * length
        return lambda position: data[4 * position : 4 * position + size]

    def _first(self, phrase: bytes) -> int | None:
        """Return the index in `suffixes` of the first one that begins with `phrase`."""
        prefix = self._prefix(len(phrase) // 4)
        i = bisect_left(self._order, phrase, key=prefix)
        return i if i < len(self._order) and prefix(self._order[i]) == phrase else None

    def _likeliest(self, phrase: bytes, depth: int, start: int, stop: int) -> tuple[int, int, int]:
        """Return the most frequent token at `depth` of suffixes[start:stop], and its interval.

        They begin with `phrase`. The interval is empty if no token has a share of _MIN_SHARE.
        """
        text, step = self._tokens, -(-(stop - start) // _SAMPLE)
        sample = [text[position + depth] for position in self._order[start:stop:step]]
        counts = Counter(sample).most_common()
        token, most = counts[0]
        if step == 1:
            low = start + sample.index(token)
            return token, low, low + most
        # Equal tokens are adjacent: one sampled c times in steps of s occurs more than (c - 1) s and less
        # than (c + 1) s times. So the most frequent is among those sampled most often or once less.
        best = (token, start, start)
        if (most + 1) * step < _MIN_SHARE * (stop - start):
            return best
        prefix = self._prefix(depth + 1)
        for token, count in counts:
            if count < most - 1:
                break
            longer = phrase + _pack(token)
            low = bisect_left(self._order, longer, start, stop, key=prefix)
            high = bisect_right(self._order, longer, low, stop, key=prefix)
            if high - low > best[2] - best[1]:
                best = (token, low, high)
        return best


def build(documents: Iterable[Sequence[int]]) -> tuple[Tokens, Tokens]:
    """Return the documents joined, each with SEPARATOR, and the starts of all suffixes in sorted order.

    Both int32 [n]. The order is that of the tokens' bytes in memory and compares 128 tokens of each suffix.
    Raises ValueError for a negative token, and if n is more than MAX_TOKENS.
    """
    parts: list[Tokens] = []
    total = 0
    for document in documents:
        part = np.append(np.asarray(document, np.int32), np.int32(SEPARATOR))
        if len(part) > 1 and part[:-1].min() < 0:
            raise ValueError("negative token")
        total += len(part)
        if total > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} tokens")
        parts.append(part)
    text = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return text, _suffix_order(text)


def _suffix_order(text: Tokens) -> Tokens:
    """Sort suffixes by prefix doubling: ranks by 2k tokens are ranks of pairs of ranks by k tokens."""
    n, k = len(text), 1
    # Read as big-endian numbers, tokens sort in the order of their bytes.
    keys = text.view(">u4").astype(np.int64)
    while True:
        order = keys.argsort()
        ordered = keys[order]
        ranks = np.empty(n, np.int64)
        ranks[order] = np.concatenate((np.zeros(min(n, 1), bool), ordered[1:] != ordered[:-1])).cumsum()
        if k >= _DEPTH or n == 0 or ranks[order[-1]] == n - 1:
            return order.astype(np.int32)
        keys = ranks * (n + 1)
        keys[:-k] += ranks[k:] + 1
        k *= 2


def _pack(token: int) -> bytes:
    return token.to_bytes(4, sys.byteorder, signed=True)


def _digest(key: bytes, text: Tokens, suffixes: Tokens) -> bytes:
    digest = hashlib.sha256(key)
    digest.update(text.data)
    digest.update(suffixes.data)
    return digest.digest()


def _read(path: Path) -> tuple[Tokens, Tokens, bytes]:
    """Return text, suffixes and key. Raises OSError, and ValueError with what is wrong with the file."""
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its other end
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError("it is damaged")
        magic, version, n, key, digest = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError("it was written by another version of Edgespec")
        if n > MAX_TOKENS or os.fstat(file.fileno()).st_size != _HEADER.size + 8 * n:
            raise ValueError("it is damaged")
        text, suffixes = np.fromfile(file, np.int32, n), np.fromfile(file, np.int32, n)
    if len(suffixes) != n or _digest(key, text, suffixes) != digest:
        raise ValueError("it is damaged")
    if n and not (text.min() >= SEPARATOR and suffixes.min() >= 0 and suffixes.max() < n):
        raise ValueError("it is damaged")
    return text, suffixes, key


def _unusable(path: Path, reason: str) -> EdgespecError:
    return EdgespecError(f"cannot use the corpus index {path} ({reason}): run `edgespec corpus clear`")
