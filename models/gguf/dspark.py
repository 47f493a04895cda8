"""DSpark and DFlash drafters: a file that drafts a block of tokens in one pass.

The drafter's cache has keys and values that it computes from rows of several layers of the target, cell q
from those of token q. A pass evaluates the token after these and as many masks as complete a block, which
attend to each other. DSpark's Markov head lets each token of the block depend on the one before, and its
confidence head predicts whether each is accepted; both are in llama.cpp's graph (docs/speculative.md there).
The tokens are the most likely ones whatever the sampling: a point mass.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgespec.core import Draft, Logits
from edgespec.models.gguf.heads import target_layers
from edgespec.models.gguf.hidden import HeadDrafter, HeadModel, HeadSequence, Rows
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import Batch, Handle, RowBatch
from edgespec.sampling import token_logprob

_BATCH = 32  # the graph computes logits for each of its tokens: a larger one would only take memory


class DsparkDrafter(HeadDrafter):
    """Drafts blocks, after exactly what the target's cache holds and one token."""

    source = "dspark"
    _sequence: DsparkSequence

    def draft(
        self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool], own: int = 0
    ) -> Draft:
        self.stop_ahead()
        self._start, held = self._view(context)
        size = len(context) - self._start
        if not self._sequence.is_known(context) or size + self._sequence.block_size > self._capacity:
            return Draft()
        tokens: list[int] = []
        confidence: list[float] = []
        if limit < 1 or not more(confidence):
            return Draft()
        self._sequence.start = self._start
        self._sequence.rollback(held)
        self._sequence.forward(context[self._start + held :])
        rows, accepted = self._sequence.block()
        for i in range(min(limit, len(rows))):
            if i and not more(confidence):
                break
            tokens.append(int(rows[i].argmax()))
            if accepted is not None:
                confidence.append(float(accepted[i]))
            else:
                confidence.append(math.exp(token_logprob(rows[i], tokens[i], 0).logprob))
            if self._is_end(tokens[i]):
                break
        return Draft(tuple(tokens), tuple(confidence), (self.source,) * len(tokens))


class DsparkModel(HeadModel):
    """A drafter of blocks. Of a pass it has the logits of the block after the last token, and no others."""

    drafter = DsparkDrafter

    def __init__(
        self, path: Path, target: LlamaModel, progress: Callable[[float], bool] | None = None
    ) -> None:
        """Open the drafter in `path`. Raises EdgespecError if it is damaged or not for `target`."""
        self.layers = target_layers(path)
        options = replace(target.options, batch=_BATCH)
        super().__init__(path, target, options, progress)
        metadata, tensors = self.summary.metadata, self.summary.tensors
        self._size = self.summary.number("block_size")
        anchored = "markov_w1.weight" in tensors and metadata.get("dflash.sample_from_anchor", True)
        self._first = 0 if anchored else 1  # without, nothing is drafted from the row of the token itself
        self.block_size = self._size - self._first
        self._has_confidence = "conf_proj.weight" in tensors
        kind, width = type(self._batch.struct), self.summary.number("embedding_length")
        self._given = _GivenBatch(_BATCH, kind, width * len(self.layers))
        self._block = _BlockBatch(_BATCH, kind, int(metadata["tokenizer.ggml.mask_token_id"]), self._size)

    def block(self, sequence: LlamaSequence) -> tuple[Logits, npt.NDArray[np.float32] | None]:
        """Return the logits [tokens, vocab] and the predicted acceptance of each token, if it has that.

        They are views that the next pass overwrites.
        """
        context = self._slot(sequence.id)[0]
        logits = super()._logits(context, self._size)[self._first :]
        if not self._has_confidence:
            return logits, None
        rows = self.library.rows(context, 0, self._size, self.summary.number("embedding_length"))
        return logits, rows[self._first :, 0]

    def _sequence_of(self, target: LlamaSequence) -> HeadSequence:
        return DsparkSequence(self, self._take_id(), target)

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        ((sequence, new, last),) = parts
        assert isinstance(sequence, DsparkSequence)
        given = new[:-1] if last else new
        if given:
            self._given.rows, known = sequence.given(len(given))
            self._batch = self._given
            LlamaModel._decode(self, [(sequence, given, 0)])
            sequence.decoded(known, self._given.rows[-1])
        if last:
            self._batch = self._block
            LlamaModel._decode(self, [(sequence, new[-1:], 1)])
            sequence.rollback(len(sequence.tokens) - 1)  # the block is no part of the text

    def _logits(self, context: Handle, rows: int) -> Logits:
        one = super()._logits(context, self._first + 1)[self._first]
        return np.broadcast_to(one, (rows, len(one)))

    def _new_context(self) -> Handle:
        context = self.library.new_context(
            self._model, self.path, self.options, 1, 0, 0, self.summary.types.keys(), self._abort,
            other=self._target._contexts[0],
        )  # fmt: skip
        self.library.keep_rows(context)
        self._C.llama_set_causal_attn(context, bool(self.summary.metadata.get("dflash.attention.causal")))
        return context


class DsparkSequence(HeadSequence):
    """A sequence of a DsparkModel: the tokens whose rows it was given."""

    def __init__(self, model: DsparkModel, sequence_id: int, target: LlamaSequence) -> None:
        super().__init__(model, sequence_id, target)
        self._blocks = model.block

    def block(self) -> tuple[Logits, npt.NDArray[np.float32] | None]:
        """See DsparkModel."""
        return self._blocks(self)

    def given(self, count: int) -> tuple[Rows, bool]:
        """Return the rows of the next `count` tokens, and whether the last is known."""
        assert self._target.hidden is not None
        return self._target.hidden.before(self.start + len(self._tokens) + 1, count)

    def is_known(self, context: Sequence[int]) -> bool:
        """Whether the target has evaluated all of `context` but its last token, and its rows are known."""
        assert self._target.hidden is not None
        held = len(self._target.tokens)
        return 0 < held == len(context) - 1 and self._target.hidden.before(held, 1)[1]


class _GivenBatch(RowBatch):
    """A batch of rows of the target."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], width: int) -> None:
        super().__init__(capacity, kind, width)
        self.rows: Rows = np.zeros((0, width), np.float32)
        self.struct.token = None

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        super().add(sequence_id, position, new, last)
        self._embd[: len(new)] = self.rows


class _BlockBatch(Batch):
    """A batch of one token and the masks that complete a block."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], mask: int, size: int) -> None:
        super().__init__(capacity, kind)
        self._masks = [mask] * (size - 1)

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        block = [*new, *self._masks]
        super().add(sequence_id, position, block, len(block))
