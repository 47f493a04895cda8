"""Assistants of Gemma 4: drafters without keys and values of their own, which read the target's cache.

An assistant's layers attend over the last two layers' keys and values in the target's cache. It evaluates one
token at a time, all at the position after the cache: the first with the target's row for the token before,
from before its output head, the others with rows of its own (llama.cpp, common/speculative.cpp). So it never
reads a prompt, and drafts only after exactly what the target's cache holds and one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgespec.core import Draft, Logits, common_prefix
from edgespec.models.gguf.hidden import HeadDrafter, HeadModel, HeadSequence
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import Handle


class AssistantDrafter(HeadDrafter):
    """Drafts with an AssistantSequence."""

    source = "assistant"

    def draft(
        self, context: Sequence[int], limit: int, more: Callable[[list[float]], bool], own: int = 0
    ) -> Draft:
        held = self._sequence.position
        if not 0 < held < len(context) or common_prefix(self._sequence.tokens, context) < held:
            return Draft()
        return super().draft(context, limit, more, own)

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        return 0, min(common_prefix(self._sequence.tokens, context), len(context) - 1)


class AssistantModel(HeadModel):
    """An assistant with the interface of a draft model. A pass of several rows is as many passes of one."""

    drafter = AssistantDrafter

    def __init__(
        self, path: Path, target: LlamaModel, progress: Callable[[float], bool] | None = None
    ) -> None:
        """Open the assistant in `path`. Raises EdgespecError if it is damaged or not for `target`.

        The sequences of `target` must be empty: llama.cpp empties a cache that another context shares.
        """
        self._rows: list[Logits] = []  # of the last passes
        options = replace(target.options, mtp=True)
        super().__init__(path, target, options, progress)

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        answers: list[Logits] = []
        for request in requests:
            answers += super().forward([request])
        return answers

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        ((sequence, new, last),) = parts
        self._rows = []
        for i, token in enumerate(new):
            super()._decode([(sequence, [token], 1)])
            if i >= len(new) - last:
                self._rows.append(super()._logits(self._contexts[0], 1)[0].copy())

    def _logits(self, context: Handle, rows: int) -> Logits:
        return np.stack(self._rows)

    def _sequence_of(self, target: LlamaSequence) -> HeadSequence:
        self._free_ids.remove(target.id)  # the cache is the target's, and so are the ids in it
        return AssistantSequence(self, target.id, target)

    @property
    def shares_passes(self) -> bool:
        return True  # one context, as the target

    def _new_context(self) -> Handle:
        context = self.library.new_context(
            self._model, self.path, self.options, self.options.sequences, 0, 0, self.summary.types.keys(),
            self._abort, head=True, other=self._target._contexts[0],
        )  # fmt: skip
        self.library.keep_rows(context)
        return context


class AssistantSequence(HeadSequence):
    """What a target's cache holds, and the tokens of a draft after that, which leave no trace in it."""

    @property
    def tokens(self) -> Sequence[int]:
        return [*self._target.tokens, *self._tokens]

    @property
    def position(self) -> int:
        return len(self._target.tokens)

    def rollback(self, length: int) -> None:
        del self._tokens[max(0, length - self.position) :]

    def forget_guesses(self) -> None:
        self._tokens.clear()
