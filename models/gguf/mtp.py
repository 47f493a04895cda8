"""Layers for multi-token prediction (MTP) as drafters: in the target's file or in one of their own.

Cell q of such a layer's cache is the pair of token q and of the target's row for token q - 1, from before its
output head; it predicts token q + 1 (DeepSeek-V3, arXiv 2412.19437, section 2.2; llama.cpp,
docs/speculative.md). The layer drafts further tokens from rows of its own, in cells that are evaluated again
with the target's rows once there are some: joined to the first token of the next draft.

A head file has only the layer and the most useful ids of the vocabulary, named by their numbers in the
target's, "0" to "248319"; `quant.head` writes it. Its logits of other ids are -inf, and these are evaluated
as the ids in `STAND_INS`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError, Ids, Logits
from edgespec.drafting import ModelDrafter
from edgespec.models.gguf.check import GgufSummary, read_arrays
from edgespec.models.gguf.heads import STAND_INS, drafts_for, head_prefixes
from edgespec.models.gguf.kept_ids import SpreadLogits, kept_ids
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import BackendName, Handle, LlamaOptions, RowBatch
from edgespec.sampling import Sampling

WINDOW = 512  # tokens of the prompt that the layer evaluates: twice the time of one pass of the target

Rows = npt.NDArray[np.float32]


class HiddenRows:
    """The target's rows from before its output head, for at least the last WINDOW tokens of a sequence."""

    def __init__(self, width: int) -> None:
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

    def known_to(self, position: int) -> int:
        """Return how many tokens that end before `position` have a known row on their left, one at least."""
        first = self._start + 1 if self._start else 0
        return max(1, position - first) if position <= self._start + self._count + 1 else 1

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


def _layer_of(summary: GgufSummary) -> GgufSummary:
    """Return `summary` with only the tensors that the layer reads."""
    output = "output.weight" if "output.weight" in summary.tensors else "token_embd.weight"
    read = output, *head_prefixes(summary)
    return summary.only({name: one for name, one in summary.tensors.items() if name.startswith(read)})


class MtpModel(LlamaModel):
    """A layer for multi-token prediction with the interface of a draft model."""

    def __init__(
        self,
        path: Path,
        target: LlamaModel,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Open the layer in `path`, which is the target's own file or a head file. Raises EdgespecError."""
        self._target = target
        self._served: list[LlamaSequence] = []  # whose rows are kept
        # A head file runs on llama.cpp, also for a target on another engine: only the rows are exchanged.
        engine: BackendName = "llama.cpp"
        options = replace(target.options, engine=engine, mtp=True, rows=False, context=target.context_length)
        super().__init__(path, options, progress)
        try:
            width = self.summary.number("embedding_length")
            self._spread: SpreadLogits | None = None
            self._stand_ins: Ids | None = None
            if self._shared:
                self.summary = _layer_of(self.summary)  # its passes cost what the layer costs
            else:
                ids, self._stand_ins = self._vocabulary()
                self._spread = SpreadLogits(ids, self.options.max_rows, target.vocab.size)
            self.vocab, self._input_size = target.vocab, target.vocab.size
            self._batch = _PairBatch(self._batch.capacity, type(self._batch.struct), width)
        except BaseException:
            self.close()
            raise

    @property
    def _shared(self) -> bool:
        """Whether the layer is part of the target's file."""
        return self.path == self._target.path

    def _vocabulary(self) -> tuple[Ids, Ids]:
        """Return the ids of the file's rows, and the row for each id of the target."""
        path, size = self.path, self._target.vocab.size
        ids = kept_ids(self.vocab, size)
        if ids is None or not drafts_for(self.summary, self._target.summary):
            raise EdgespecError(
                f"{path.name} was not made for {self._target.path.name}: choose another --draft"
            )
        stand_ins: Ids = read_arrays(path, STAND_INS).get(STAND_INS, np.zeros(0)).astype(np.int64)
        if len(stand_ins) != size or not 0 <= stand_ins.min() <= stand_ins.max() < len(ids):
            raise EdgespecError(f"{path.name} is damaged ({STAND_INS}): create it again")
        return ids, stand_ins

    def sequence_for(self, target: LlamaSequence) -> MtpSequence:
        """Return a sequence that drafts for `target`, whose rows are kept from now on."""
        sequence = MtpSequence(self, self._take_id(), target)
        target.hidden = HiddenRows(self.summary.number("embedding_length"))
        self._target.library.keep_rows(self._target._slot(target.id)[0])
        self._served.append(target)
        return sequence

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        answers = super().forward(requests)
        return answers if self._spread is None else self._spread(answers)

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        ((sequence, new, _),) = parts
        assert isinstance(sequence, MtpSequence)
        assert isinstance(self._batch, _PairBatch)
        held = len(sequence.tokens)
        rows, known = sequence.rows(held, len(new))
        self._batch.rows = rows
        self._batch.ids = new if self._stand_ins is None else self._stand_ins[np.array(new)].tolist()
        super()._decode(parts)
        sequence.decoded(known, self.library.row(self._slot(sequence.id)[0], len(new) - 1, rows.shape[1]))

    def close(self) -> None:
        for sequence in self._served:  # a target that goes on without the layer copies no rows for it
            sequence.hidden = None
        if self._shared:
            self._model = None  # the target's
        super().close()

    def _settle(self, options: LlamaOptions, *_: Any) -> LlamaOptions:
        return options  # the weights are those that were tried in the target

    def _load(self, progress: Callable[[float], bool] | None) -> Handle:
        return self._target._model if self._shared else super()._load(progress)

    def _require_memory(self) -> None:
        if not self._shared:
            super()._require_memory()

    def _is_hybrid(self) -> bool:
        return False  # the layer has attention

    @property
    def shares_passes(self) -> bool:
        return False

    def _new_context(self) -> Handle:
        context = self.library.new_context(
            self._model, self.path, self.options, 1, 0, 0, self.summary.types.keys(), self._abort, head=True
        )
        self.library.keep_rows(context)
        return context


class MtpSequence(LlamaSequence):
    """A sequence of an MtpModel. `start` is the position in the target's sequence of its first token."""

    def __init__(self, model: MtpModel, sequence_id: int, target: LlamaSequence) -> None:
        super().__init__(model, sequence_id, None)
        self.vocab_size = target.vocab_size
        self.start = 0
        self._target = target
        self._known = 0  # cells that were evaluated with the target's rows
        self._next: Rows | None = None  # the layer's own row of the last token

    def rows(self, held: int, count: int) -> tuple[Rows, bool]:
        """Return the rows for `count` tokens after `held`, and whether they are the target's."""
        assert self._target.hidden is not None
        rows, known = self._target.hidden.before(self.start + held, count)
        if not known and count == 1 and self._next is not None:
            return self._next[np.newaxis], False
        return rows, known

    def decoded(self, known: bool, row: Rows) -> None:
        """Record a pass, with the target's rows if `known`, after which the layer's own row is `row`."""
        self._next = row
        if known:
            self._known = len(self._tokens)

    def rollback(self, length: int) -> None:
        super().rollback(length)
        self._known = min(self._known, len(self._tokens))

    def known_to(self, position: int) -> int:
        """Return how many tokens that end before `position` have the target's rows."""
        assert self._target.hidden is not None
        return self._target.hidden.known_to(position)

    def forget_guesses(self) -> None:
        """Keep only the cells that were evaluated with the target's rows."""
        self.rollback(self._known)


class MtpDrafter(ModelDrafter):
    """Drafts with an MtpSequence."""

    source = "mtp"

    def __init__(
        self, sequence: MtpSequence, capacity: int, settings: Sampling | None = None, **options: Any
    ) -> None:
        self._sequence = sequence
        super().__init__(sequence, capacity, settings, WINDOW, **options)

    def stop_ahead(self) -> None:
        """Begin a round: cells of the last draft are evaluated again."""
        super().stop_ahead()
        self._sequence.forget_guesses()

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        # An engine may give no rows of the prompt. Tokens without them would only mislead.
        self._window = min(WINDOW, self._capacity // 2, self._sequence.known_to(len(context)))
        return super()._view(context)

    def _read(self, text: list[int], same: int, own: int = 0) -> Logits:
        self._sequence.start = self._start
        return super()._read(text, same, own)


class _PairBatch(RowBatch):
    """A batch of tokens, each with a row of the target."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], width: int) -> None:
        super().__init__(capacity, kind, width)
        self.rows: Rows = np.zeros((0, width), np.float32)
        self.ids: Sequence[int] = ()

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        start = self.struct.n_tokens
        super().add(sequence_id, position, self.ids, last)
        self._embd[start : start + len(new)] = self.rows
