"""Files that keep only some ids of a vocabulary: their tokens are named after their ids in the whole one."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from edgespec.core import Ids, Logits
from edgespec.models.gguf.vocab import LlamaVocab


def kept_ids(vocab: LlamaVocab, size: int) -> Ids | None:
    """Return the ids, of `size`, of a file's tokens; None if they are not named after ids."""
    names = [vocab.text(token) for token in range(vocab.size)]
    if not all(re.fullmatch("[0-9]{1,7}", name) and int(name) < size for name in names):
        return None
    return np.array(list(map(int, names)), np.int64)


class SpreadLogits:
    """Logits over a whole vocabulary of `size` from those of the ids kept; -inf elsewhere."""

    def __init__(self, ids: Ids, rows: int, size: int) -> None:
        """`rows`: the most in one pass."""
        self._ids = ids
        self._logits: Logits = np.full((rows, size), -np.inf, np.float32)

    def __call__(self, answers: Iterable[Logits]) -> list[Logits]:
        """Return for each of `answers` [rows, ids] its rows [rows, size]: views until the next call."""
        start, spread = 0, []
        for logits in answers:
            rows = self._logits[start : start + len(logits)]
            rows[:, self._ids] = logits
            spread.append(rows)
            start += len(logits)
        return spread
