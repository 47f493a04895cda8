"""The part of a native context that belongs to one sequence."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgespec.models.gguf.native import Backend, Handle
from edgespec.models.gguf.running_state import Blob

_SLACK = 1 << 16  # bytes
_PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: the state of recurrent layers alone


class RowStore(Protocol):
    """Keeps rows of a model for drafters that need them.

    They are the inputs of `layers` next to each other, or else the rows from before the output head.
    """

    @property
    def layers(self) -> Sequence[int]: ...
    def append(self, position: int, rows: npt.NDArray[np.float32]) -> None:
        """Add the rows [tokens, width] of tokens from `position` on: a view, valid until the next pass."""

    def cut(self, length: int) -> None:
        """Remove all but those of the first `length` tokens."""

    @property
    def first(self) -> int | None:
        """The first token whose row on its left is known, None if none is."""

    def before(self, position: int, count: int) -> tuple[npt.NDArray[np.float32], bool]:
        """Return the rows left of each of `count` tokens from `position` on; whether the last is known."""


class NativeCache:
    """The cache of one sequence: a StateCache. `slot` returns its context, and its id there."""

    def __init__(self, library: Backend, slot: Callable[[], tuple[Handle, int]]) -> None:
        self._library, self._slot = library, slot

    def cut(self, length: int) -> bool:
        return self._library.cut(*self._slot(), length)

    def save(self, *, partial: bool, into: Blob | None = None) -> Blob:
        C, flags = self._library.C, _PARTIAL if partial else 0  # noqa: N806
        context, native_id = self._slot()
        size = C.llama_state_seq_get_size_ext(context, native_id, flags)
        # The state of ik_llama.cpp grows by some bytes per token, and new memory takes longer than the copy.
        data = into.base if into is not None and into.base is not None else np.empty(0, np.uint8)
        if len(data) < size:
            data = np.empty(size + _SLACK, np.uint8)
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = C.llama_state_seq_get_data_ext(context, pointer, size, native_id, flags)
        return data[:written]

    def load(self, data: Blob, *, partial: bool) -> bool:
        C, flags = self._library.C, _PARTIAL if partial else 0  # noqa: N806
        context, native_id = self._slot()
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read: int = C.llama_state_seq_set_data_ext(context, pointer, len(data), native_id, flags)
        return read == len(data)
