"""Measures how far a quantized model agrees with its source, and what its forward passes cost.

Teacher forcing: both evaluate the same text, and their next tokens are compared at every position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from edgespec.core import Cancelled, LanguageModel, Logits, Progress

TOKENS, WINDOW = 2000, 250
CHUNK = 25
"""Rows compared at a time: at 152,000 tokens a few dozen megabytes in double precision."""
ROWS = (1, 4, 8)

LogitsReader = Callable[[Sequence[int], bool], Logits]
"""Evaluates tokens after those before, or as a new text, and returns the logits after every one."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over `tokens`: the share whose likeliest next token is the source's, and the mean Kullback-Leibler
    divergence of the distributions from the source's, in nats."""

    tokens: int
    top1: float
    divergence: float


def windows(tokens: Sequence[int]) -> list[Sequence[int]]:
    """Split `tokens` into pieces that are evaluated as separate texts."""
    return [tokens[start : start + WINDOW] for start in range(0, len(tokens), WINDOW)]


def reader(sequence: LanguageModel) -> LogitsReader:
    """Return a Reader of a model that has logits of CHUNK rows per pass."""

    def read(new: Sequence[int], fresh: bool) -> Logits:
        if fresh:
            sequence.rollback(0)
        return sequence.forward(new, len(new))

    return read


def compare(
    source: LogitsReader, made: LogitsReader, texts: Sequence[Sequence[int]], progress: Progress | None = None
) -> Agreement:
    """Evaluate `texts` with both. Raises Cancelled when `progress` stopped it."""
    same, divergence, done = 0, 0.0, 0
    total = sum(map(len, texts))
    for text in texts:
        for start in range(0, len(text), CHUNK):
            new = text[start : start + CHUNK]
            ours, theirs = source(new, start == 0), made(new, start == 0)
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            p, q = _log_softmax(ours), _log_softmax(theirs)
            divergence += float((np.exp(p) * (p - q)).sum())
            done += len(new)
            if progress is not None and not progress(done / total):
                raise Cancelled
    return Agreement(done, same / done, divergence / done)


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    scores = logits.astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    return scores


def speeds(
    models: Mapping[str, LanguageModel], progress: Progress | None = None, seconds: float = 8.0
) -> dict[str, dict[int, float]]:
    """Return median milliseconds of a pass of 1, 4 and 8 rows by model, interleaved for about `seconds`.

    All rows' logits are wanted, after 64 tokens. Raises Cancelled when `progress` stopped it.
    """
    samples: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in models}
    for model in models.values():
        model.rollback(0)
        model.forward([token % model.vocab_size for token in range(64)])
    start, number = perf_counter(), 0
    while number < 3 or (number < 50 and perf_counter() - start < seconds):
        number += 1
        for name, model in models.items():
            for rows in ROWS:
                # Other tokens each time, which select other experts of a mixture.
                new = [token % model.vocab_size for token in range(8 * number, 8 * number + rows)]
                before = perf_counter()
                model.forward(new, rows)
                samples[name][rows].append(1000 * (perf_counter() - before))
                model.rollback(64)
        if progress is not None and not progress(min(1.0, (perf_counter() - start) / seconds)):
            raise Cancelled
    return {name: {rows: median(one) for rows, one in by_rows.items()} for name, by_rows in samples.items()}
