"""Compares a converted model with its source: size, speed, agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from edgespec.core import EdgespecError, Logits, NamedProgress
from edgespec.machine.sensors import memory_available
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.runtime import Model, check_model, load_model
from edgespec.quant.agreement import (
    CHUNK,
    TOKENS,
    WINDOW,
    Agreement,
    LogitsReader,
    compare,
    reader,
    speeds,
    windows,
)
from edgespec.quant.export import run_exporter
from edgespec.quant.exporter import SCORE, SCORES_FILE, TOKENS_FILE
from edgespec.quant.requant import require_space, work_folder

_ROOM = 512 << 20  # bytes that two loaded models take in addition to their weights


@dataclass(frozen=True, slots=True)
class Assessment:
    """`milliseconds` of forward passes by rows, of "source" (where it can be run) and "made".

    `same_tokens`: both read the text as the same tokens.
    """

    source_bytes: int
    made_bytes: int
    agreement: Agreement
    same_tokens: bool
    milliseconds: Mapping[str, Mapping[int, float]]


def assess(source: Path, made: Path, text: str, progress: NamedProgress | None = None) -> Assessment:
    """Compare `made` with `source`, a model or a checkpoint's folder, on `text`.

    Raises EdgespecError, one line, and Cancelled when `progress` stopped it.
    """
    report = progress or (lambda *_: True)
    sizes = [bytes_of(path) for path in (source, made)]
    needed, free = sum(sizes) + _ROOM, memory_available()
    if needed > free:
        raise EdgespecError(
            f"comparing with {source.name} takes about {needed >> 20} MiB of memory and {free >> 20} are "
            "free: close other programs first."
        )
    with ExitStack() as stack:
        ours = _open(made, stack)
        theirs = _open(source, stack) if source.is_file() else ours
        tokens = theirs.vocab.tokenize(text)
        texts = windows(tokens[:TOKENS])
        if not texts:
            raise EdgespecError("the text to compare on is empty: choose another")
        same_tokens = theirs is ours or ours.vocab.tokenize(text) == tokens
        if theirs is ours:
            reference = stack.enter_context(_scores(source, made, tokens[:TOKENS], report))
            sequences = {"made": ours.sequence()}
        else:
            sequences = {"source": theirs.sequence(), "made": ours.sequence()}
            reference = reader(sequences["source"])
        agreement = compare(reference, reader(sequences["made"]), texts, partial(report, "comparing"))
        times = speeds(sequences, partial(report, "timing"))
    return Assessment(sizes[0], sizes[1], agreement, same_tokens, times)


@contextmanager
def _scores(source: Path, made: Path, tokens: Sequence[int], report: NamedProgress) -> Iterator[LogitsReader]:
    """Return a Reader of a checkpoint: transformers computes its logits before, in its own process."""
    with work_folder(made, "scores") as work:
        require_space(work, 4 * len(tokens) * check_model(made).vocab_size)
        np.save(work / TOKENS_FILE, tokens)
        run_exporter([SCORE, str(source), str(work)], source, work, report)
        scores = [np.load(work / SCORES_FILE, mmap_mode="r")]
        place = 0

        def read(new: Sequence[int], _: bool) -> Logits:
            nonlocal place
            place += len(new)
            rows: Logits = scores[0][place - len(new) : place]
            return rows

        yield read
        scores.clear()  # Windows deletes no file that is mapped


def bytes_of(path: Path) -> int:
    """Return the bytes of a model's file, or of all files in its folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(one.stat().st_size for one in path.iterdir() if one.is_file())


def _open(path: Path, stack: ExitStack) -> Model:
    return stack.enter_context(load_model(path, LlamaOptions(context=2 * WINDOW, max_rows=CHUNK)))
