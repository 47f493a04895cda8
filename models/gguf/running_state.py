"""The running state of recurrent layers: how far it can be taken back, and checkpoints of it.

llama.cpp keeps `snapshots` earlier states of a sequence, for the architectures that support that. After a
decode of n rows the last min(snapshots, n - 1) rows can be taken back, once; a second time only after the
next decode. `llama_memory_seq_rm` also returns True for more rows and after an aborted decode, where the
state is then wrong, so that the number is kept here (measured on llama.cpp 0.3.36,
tests/models/gguf/test_rollback.py). Everything else takes a checkpoint: a copy of the recurrent layers' state
alone, since the keys and values below it stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

Blob = npt.NDArray[np.uint8]
_ROOM = 192 << 20  # bytes of checkpoints per sequence ...
_FEWEST, _MOST = 4, 32  # ... but at least and at most so many


class StateCache(Protocol):
    """The native cache of one sequence."""

    def cut(self, length: int) -> bool:
        """Remove all but the first `length` positions; False if that is not supported."""

    def save(self, *, partial: bool, into: Blob | None = None) -> Blob:
        """Return a copy of the state, of recurrent layers alone if `partial`.

        `into`: what an earlier `save` returned and nobody needs any more; its memory is used again.
        """

    def load(self, data: Blob, *, partial: bool) -> bool:
        """Restore what `save` returned. False if the engine refuses."""


class AnyLength:
    """Rollback where the cache can be cut at any length. `held` is the number of tokens in it."""

    def __init__(self, cache: StateCache) -> None:
        self._cache = cache

    def mark_at(self, held: int, lengths: Iterable[int]) -> None:
        """Do nothing: any number of tokens can be taken back."""

    def stops(self, held: int, end: int) -> list[int]:
        return []

    def prepare(self, held: int, undone: int) -> None:
        """Do nothing."""

    def decoded(self, held: int, rows: int = 0) -> None:
        """Do nothing."""

    def reachable(self, held: int, length: int) -> int:
        return min(held, length)

    def rollback(self, held: int, length: int) -> int:
        if self._cache.cut(length):
            return length
        self._cache.cut(0)
        return 0

    def recover(self, length: int) -> int:
        return self.rollback(length, length)

    def pack(self, held: int, whole: Blob) -> Blob:
        return whole

    def unpack(self, held: int, data: Blob) -> Blob | None:
        return data


class RunningState:
    """Rollback of a hybrid or recurrent model's sequence: the methods of AnyLength.

    `held` below is the number of tokens in the sequence's cache.
    """

    def __init__(self, cache: StateCache, snapshots: int) -> None:
        self._cache, self._snapshots = cache, snapshots
        self._undo = 0
        self._wanted: set[int] = set()
        self.marks: dict[int, Blob] = {}  # checkpoints for later prompts, by tokens, ascending
        self._draft_at = 0  # tokens at the checkpoint before a draft, 0: none
        self._draft_state: Blob | None = None  # that checkpoint; its memory is used again

    def mark_at(self, held: int, lengths: Iterable[int]) -> None:
        """Keep a checkpoint as soon as the cache holds one of these numbers of tokens."""
        self._wanted = {length for length in lengths if length >= held}
        self.decoded(held)

    def stops(self, held: int, end: int) -> list[int]:
        """Return where batches of the tokens from `held` to `end` must end, for a checkpoint there."""
        return sorted(length for length in self._wanted if held < length <= end)

    def prepare(self, held: int, undone: int) -> None:
        """Before a batch of which up to `undone` rows may be taken back: a checkpoint if it takes one."""
        if undone > self._snapshots and held not in (0, self._draft_at, *self.marks):
            self._draft_state = self._cache.save(partial=True, into=self._draft_state)
            self._draft_at = held

    def decoded(self, held: int, rows: int = 0) -> None:
        """Record a batch of `rows`, after which the cache holds `held` tokens."""
        if rows:
            self._undo = min(self._snapshots, rows - 1)
        if held in self._wanted:
            self._wanted.discard(held)
            if held and held not in self.marks:
                self.marks[held] = self._cache.save(partial=True)
                self._drop_surplus()

    def reachable(self, held: int, length: int) -> int:
        """Return how many tokens `rollback` to `length` would leave."""
        if length >= held or held - length <= self._undo:
            return min(held, length)
        return max(mark for mark in (0, self._draft_at, *self.marks) if mark <= length)

    def rollback(self, held: int, length: int) -> int:
        """Take back rows, or restore a checkpoint of at most `length` tokens; return how many are left."""
        if length >= held:
            return held
        if 0 < held - length <= self._undo:
            self._undo = 0
            if self._cache.cut(length):
                self._forget_above(length)
                return length
        return self.recover(length)

    def recover(self, length: int) -> int:
        """Restore the newest checkpoint of at most `length` tokens; return how many tokens are left.

        After an aborted decode this is the only way back.
        """
        self._undo = 0
        self._forget_above(length)
        newest = max(self._draft_at, *self.marks, 0)
        data = self._draft_state if newest == self._draft_at else self.marks[newest]
        # Keys above the checkpoint would be accepted as if they were those of the next tokens.
        if newest and data is not None and self._cache.load(data, partial=True) and self._cache.cut(newest):
            return newest
        self._forget_above(0)
        self._cache.cut(0)
        return 0

    def pack(self, held: int, whole: Blob) -> Blob:
        """Return the state `whole` of `held` tokens with the checkpoints below."""
        return pack({**self.marks, held: whole})

    def unpack(self, held: int, data: Blob) -> Blob | None:
        """Take over the checkpoints in what `pack` returned, and return the state; None if it is damaged."""
        parts = unpack(data)
        whole = parts.pop(held, None)
        self.marks = {length: part for length, part in parts.items() if length < held}
        return whole

    def _forget_above(self, length: int) -> None:
        self.marks = {mark: data for mark, data in self.marks.items() if mark <= length}
        if self._draft_at > length:
            self._draft_at = 0

    def _drop_surplus(self) -> None:
        """Drop the checkpoints that save least: those with the smallest gap around them."""
        most = _most_marks(len(next(iter(self.marks.values()))))
        while len(self.marks) > most:
            lengths = sorted(self.marks)
            inner = range(1, len(lengths) - 1)  # the first and the newest stay
            del self.marks[lengths[min(inner, key=lambda i: lengths[i + 1] - lengths[i - 1])]]


def wanted_snapshots(architecture: str) -> int:
    """Return how many earlier states to ask llama.cpp for; it keeps none for most architectures.

    Each costs a copy of the convolution's state in every pass. For Qwen3.5 0.8B four cost 4% of a pass of
    four rows and 77 MiB; for LFM2 nothing that can be measured, but 22 end the process.
    """
    return 12 if architecture.startswith("lfm2") else 4


def most_bytes(state: int) -> int:
    """Return the most bytes of the checkpoints of one sequence, each of `state` bytes."""
    return state * (1 + _most_marks(state)) if state else 0


def _most_marks(size: int) -> int:
    return min(_MOST, max(_FEWEST, _ROOM // max(1, size)))


def pack(parts: Mapping[int, Blob]) -> Blob:
    """Join states by their numbers of tokens: the count, then tokens and bytes of each, then the states."""
    header = np.array(
        [len(parts), *(n for length, data in parts.items() for n in (length, len(data)))], "<u8"
    )
    return np.concatenate([header.view(np.uint8), *parts.values()])


def unpack(data: Blob) -> dict[int, Blob]:
    """Return what was packed, views of `data`; nothing if it is damaged."""
    count = int(data[:8].view("<u8")[0]) if len(data) >= 8 else 0
    start = 8 + 16 * count
    if not 0 < count <= _MOST + 1 or start > len(data):
        return {}
    parts: dict[int, Blob] = {}
    for length, size in data[8:start].view("<u8").reshape(count, 2).tolist():
        parts[length] = data[start : start + size]
        start += size
    return parts if start == len(data) else {}
