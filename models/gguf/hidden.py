"""What drafters have in common that evaluate rows of their target, each with the token that follows.

Cell q of such a drafter's cache is the pair of token q and of the target's row for token q - 1; it predicts
token q + 1. The drafter continues from rows of its own, in cells that are evaluated again with the target's
rows once there are some: joined to the first token of the next draft.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError, Logits
from edgespec.drafting import ModelDrafter
from edgespec.models.gguf.heads import difference
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import LlamaOptions, RowBatch
from edgespec.sampling import Sampling

WINDOW = 512  # tokens of the prompt that a drafter evaluates: an MTP layer takes twice the time of one pass

Rows = npt.NDArray[np.float32]


class HiddenRows:
    """Rows of the target for at least the last WINDOW tokens of a sequence: a RowStore."""

    def __init__(self, width: int, layers: Sequence[int] = ()) -> None:
        """`width`: of a row; `layers`: see RowStore."""
        self.layers = layers
        self._buffer: Rows = np.zeros((4 * WINDOW, width), np.float32)
        self._start = self._count = 0

    def append(self, position: int, rows: Rows) -> None:
        """Add the rows [tokens, width] of the tokens from `position` on, at most WINDOW."""
        self.cut(position)
        if position != self._start + self._count:  # those in between, or all before, are unknown
            self._start, self._count = position, 0
        if self._count + len(rows) > len(self._buffer):
            kept = 2 * WINDOW
            self._buffer[:kept] = self._buffer[self._count - kept : self._count]
            self._start, self._count = self._start + self._count - kept, kept
        self._buffer[self._count : self._count + len(rows)] = rows
        self._count += len(rows)

    def cut(self, length: int) -> None:
        """Remove all but those of the first `length` tokens."""
        self._count = min(self._count, max(0, length - self._start))

    @property
    def first(self) -> int | None:
        """The first token whose row on its left is known, None if none is."""
        return self._start + bool(self._start) if self._count else None

    def before(self, position: int, count: int) -> tuple[Rows, bool]:
        """Return the rows left of each of `count` tokens from `position` on, and whether the last is known.

        Unknown ones, and the one left of the first token, are zero: float32 [count, width].
        """
        rows = np.zeros((count, self._buffer.shape[1]), np.float32)
        first, end = max(self._start, position - 1), min(self._start + self._count, position + count - 1)
        if first < end:
            known = self._buffer[first - self._start : end - self._start]
            rows[first - position + 1 : end - position + 1] = known
        return rows, first < end == position + count - 1 or position + count == 1


class HeadModel(LlamaModel):
    """A drafter that evaluates rows of its target, with the interface of a draft model."""

    drafter: ClassVar[type[HeadDrafter]]
    layers: Sequence[int] = ()
    """Layers of the target whose inputs are the rows; none: the rows from before its output head."""

    block_size = 1
    """How many tokens one pass drafts."""

    def __init__(
        self,
        path: Path,
        target: LlamaModel,
        options: LlamaOptions,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Open the drafter in `path` for `target`. Raises EdgespecError."""
        if path != target.path and (reason := difference(path, target.summary)):
            raise mismatch(path, target, reason)
        self._target = target
        self._served: list[LlamaSequence] = []  # whose rows are kept
        # What changes the target is not the drafter's.
        options = replace(options, context=target.context_length, rows=False, adapters=(), least_context=0)
        super().__init__(path, options, progress)
        width = self.summary.number("embedding_length_out") or self.summary.number("embedding_length")
        self._batch = PairBatch(self._batch.capacity, type(self._batch.struct), width)

    def sequence_for(self, target: LlamaSequence) -> HeadSequence:
        """Return a sequence that drafts for `target`, whose rows are kept from now on."""
        sequence = self._sequence_of(target)
        width = self._target.summary.number("embedding_length")
        target.hidden = HiddenRows(width * max(1, len(self.layers)), self.layers)
        self._target.library.keep_rows(self._target._slot(target.id)[0], self.layers)
        self._served.append(target)
        return sequence

    def _sequence_of(self, target: LlamaSequence) -> HeadSequence:
        return HeadSequence(self, self._take_id(), target)

    def encoded(self, rows: Rows) -> Rows:
        """Return what the drafter evaluates for rows of the target: [tokens, its own width]."""
        return rows

    def _ids(self, new: Sequence[int]) -> Sequence[int]:
        """Return the ids that are evaluated for the target's ids `new`."""
        return new

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        ((sequence, new, _),) = parts
        assert isinstance(sequence, HeadSequence)
        assert isinstance(self._batch, PairBatch)
        rows, known = sequence.rows(len(sequence.tokens), len(new))
        self._batch.rows, self._batch.ids = rows, self._ids(new)
        super()._decode(parts)
        sequence.decoded(known, self.library.row(self._slot(sequence.id)[0], len(new) - 1, rows.shape[1]))

    def close(self) -> None:
        for sequence in self._served:  # a target that goes on without the drafter copies no rows for it
            sequence.hidden = None
        super().close()

    def _settle(self, options: LlamaOptions, *_: Any) -> LlamaOptions:
        return options  # it cannot be tried without its target

    def _refusal(self) -> str | None:
        return None  # an encoder, which some have, is what evaluates the target's rows

    def _is_hybrid(self) -> bool:
        return False  # drafters have attention

    @property
    def shares_passes(self) -> bool:
        return False


class HeadSequence(LlamaSequence):
    """A sequence of a HeadModel. `start` is the position in the target's sequence of its first token."""

    def __init__(self, model: HeadModel, sequence_id: int, target: LlamaSequence) -> None:
        super().__init__(model, sequence_id, None)
        self.vocab_size = target.vocab_size
        self.block_size = model.block_size
        self.start = 0
        self._target = target
        self._encoded = model.encoded
        self._known = 0  # cells that were evaluated with the target's rows
        self._next: Rows | None = None  # the drafter's own row of the last token

    def first(self, context: Sequence[int]) -> int:
        """Return the first token of `context` whose row on its left is known, else its last one.

        Rows of a text that was restored are unknown.
        """
        assert self._target.hidden is not None
        first, last = self._target.hidden.first, len(context) - 1
        return last if first is None else min(first, last)

    def rows(self, held: int, count: int) -> tuple[Rows, bool]:
        """Return the rows for `count` tokens after `held`, and whether they are the target's."""
        assert self._target.hidden is not None
        rows, known = self._target.hidden.before(self.start + held, count)
        if not known and count == 1 and self._next is not None:
            return self._next[np.newaxis], False
        return self._encoded(rows), known

    def decoded(self, known: bool, row: Rows) -> None:
        """Record a pass, with the target's rows if `known`, after which the drafter's own row is `row`."""
        self._next = row
        if known:
            self._known = len(self._tokens)

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self._known = min(self._known, len(self._tokens))

    def forget_guesses(self) -> None:
        """Keep only the cells that were evaluated with the target's rows."""
        self.rollback(self._known)


class HeadDrafter(ModelDrafter):
    """Drafts with a HeadSequence."""

    def __init__(
        self, sequence: HeadSequence, capacity: int, settings: Sampling | None = None, **options: Any
    ) -> None:
        self._sequence = sequence
        self.block_size = sequence.block_size
        super().__init__(sequence, capacity, settings, WINDOW, **options)

    def stop_ahead(self) -> None:
        """Begin a round: cells of the last draft are evaluated again."""
        super().stop_ahead()
        self._sequence.forget_guesses()

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        start, held = super()._view(context)
        first = self._sequence.first(context)
        return (start, held) if start + held >= first else (first, 0)

    def _read(self, text: list[int], same: int, own: int = 0) -> Logits:
        self._sequence.start = self._start
        return super()._read(text, same, own)


class PairBatch(RowBatch):
    """A batch of tokens, each with a row."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], width: int) -> None:
        super().__init__(capacity, kind, width)
        self.rows: Rows = np.zeros((0, width), np.float32)
        self.ids: Sequence[int] = ()

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        start = self.struct.n_tokens
        super().add(sequence_id, position, self.ids, last)
        self._embd[start : start + len(new)] = self.rows


def mismatch(path: Path, target: LlamaModel, reason: str) -> EdgespecError:
    """Return the error that `path` does not draft for `target`."""
    return EdgespecError(
        f"{path.name} was not made for {target.path.name} ({reason}): choose another --draft"
    )
