"""The fastest draft this machine can make of a model, kept only where it measured faster.

Requantising costs the draft some of its agreement with the target and nothing else: whatever is drafted, the
target has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf_check import check_gguf
from edgespec.models.llama import LlamaModel, LlamaOptions, LlamaSequence
from edgespec.models.vocab import first_difference
from edgespec.quant.requant import (
    SOURCE_KEY,
    Kind,
    draft_path,
    made_drafts,
    requantise,
    require_space,
    size_as,
    unwritable,
)
from edgespec.sensors import memory_available

Progress = Callable[[str, float], bool]
"""Hears what is going on and fractions of it from 0 to 1, and stops it by returning False."""

GAIN = 1.05
"""How many times faster a made draft must be to be kept: less is within the noise of a measurement."""

_READ = 8  # tokens read at once in the second figure, about what a draft catches up with after a round


@dataclass(frozen=True, slots=True)
class Timing:
    """A file `bytes` long as `kind` ("as it is" for the source), and medians in milliseconds.

    `token` is for one token and its logits, what drafting repeats. `reading` is for eight tokens and the
    logits of the last, what catching up with the target takes.
    """

    kind: str
    bytes: int
    token: float
    reading: float


@dataclass(frozen=True, slots=True)
class Report:
    """What was tried on `source`, itself first. `kept` is the made draft, None if none was faster enough."""

    source: Path
    timings: tuple[Timing, ...]
    kept: Path | None

    @property
    def best(self) -> Timing:
        return min(self.timings[1:], key=lambda one: one.token)

    @property
    def line(self) -> str:
        """The outcome in a few words."""
        before, after = self.timings[0].token, self.best.token
        if self.kept is None:
            return f"no faster draft: {before:.1f} ms a token as it is, {after:.1f} as {self.best.kind}"
        return f"made a faster draft: {before:.1f} -> {after:.1f} ms a token"


def make_draft(source: Path, kinds: Sequence[Kind] = ("q4_0",), progress: Progress | None = None) -> Report:
    """Requantise `source` as each of `kinds`, measure, and keep the fastest beside it.

    `requant.made_draft` finds what was kept; drafts made of `source` before are replaced. Takes seconds, with
    IQ4_NL minutes. An error leaves nothing behind. Raises EdgespecError, one line, and Cancelled when
    `progress` stopped it.
    """
    report = progress or (lambda *_: True)
    summary = check_gguf(source)
    sizes = [size_as(source, summary, kind) for kind in kinds]
    require_space(source.parent, sum(sizes))
    _require_memory(source, source.stat().st_size + sum(sizes))
    with _temporary_folder(source) as folder:
        made: dict[str, Path] = {}
        for kind in kinds:
            made[kind] = requantise(
                source, folder / f"{kind}.gguf", kind, partial(report, f"requantising to {kind}")
            )
        timings = measure({"as it is": source, **made}, partial(report, "measuring"))
        best = min(timings[1:], key=lambda one: one.token)
        if best.token * GAIN > timings[0].token:
            return Report(source, timings, None)
        kept = draft_path(source, best.kind)
        made[best.kind].replace(kept)
    for old in made_drafts(source):
        if old != kept and _is_ours(old):
            old.unlink(missing_ok=True)
    return Report(source, timings, kept)


def measure(
    files: Mapping[str, Path], progress: Callable[[float], bool] | None = None, seconds: float = 6.0
) -> tuple[Timing, ...]:
    """Time several files against each other for about `seconds`, interleaved: a machine's speed drifts."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in files}
    with ExitStack() as stack:
        options = LlamaOptions(context=256, max_rows=1)
        models = {name: stack.enter_context(LlamaModel(path, options)) for name, path in files.items()}
        first, *others = models.values()
        if reason := first.rollback_refusal:
            raise EdgespecError(f"{first.path.name} cannot draft: {reason}.")
        for other in others:
            if difference := first_difference(first.vocab, other.vocab):
                raise EdgespecError(
                    f"{other.path.name} has another vocabulary than its source: {difference}."
                )
        sequences = {name: model.sequence() for name, model in models.items()}
        for sequence in sequences.values():  # the context to draft after; it also touches all weights
            sequence.forward([token % sequence.vocab_size for token in range(64)])
        start, number = perf_counter(), 0
        while number < 4 or (number < 24 and perf_counter() - start < seconds):
            number += 1
            for name, sequence in sequences.items():
                one, many = samples[name]
                for i in range(4):
                    one.append(_milliseconds(sequence, [i]))
                sequence.rollback(64)
                many.append(_milliseconds(sequence, range(_READ)))
                sequence.rollback(64)
            if progress is not None and not progress(min(1.0, (perf_counter() - start) / seconds)):
                raise Cancelled
    return tuple(
        Timing(name, files[name].stat().st_size, median(one), median(many))
        for name, (one, many) in samples.items()
    )


def _milliseconds(sequence: LlamaSequence, new: Sequence[int]) -> float:
    start = perf_counter()
    sequence.forward(new)
    return 1000 * (perf_counter() - start)


@contextmanager
def _temporary_folder(source: Path) -> Iterator[Path]:
    """A folder beside `source`, so that what is kept moves by a rename."""
    try:
        folder = TemporaryDirectory(prefix=f".{source.stem}.draft-", dir=source.parent)
    except OSError as error:
        raise unwritable(source.parent, error) from None
    with folder as name:
        yield Path(name)


def _require_memory(source: Path, needed: int) -> None:
    if needed > (free := memory_available()):
        raise EdgespecError(
            f"Measuring {source.name} takes {needed >> 20} MiB of memory and {free >> 20} are free: "
            "close other programs first."
        )


def _is_ours(path: Path) -> bool:
    with suppress(EdgespecError):
        return SOURCE_KEY in check_gguf(path).metadata
    return False
