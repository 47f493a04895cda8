"""Makes the fastest draft of a model on this machine, and keeps it only if it measured faster.

Requantizing only costs the draft some of its agreement with the target: the target verifies every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

from edgespec.core import Cancelled, EdgespecError, Ids, NamedProgress
from edgespec.machine.sensors import memory_available
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel, LlamaOptions, LlamaSequence
from edgespec.models.gguf.trimmed import open_draft
from edgespec.models.runtime import refusal_as_draft
from edgespec.quant.requant import (
    SOURCE_KEY,
    DraftType,
    draft_path,
    made_drafts,
    requantize,
    require_space,
    size_as,
    work_folder,
)
from edgespec.quant.trim import trim
from edgespec.quant.vocabulary import choose, count_use, shipped_use

GAIN = 1.05
"""The least speedup of a draft that is kept: less is within the noise of a measurement."""

UNDISTURBED = 0.75
"""The least share of its threads' time that a measurement must have; other programs used the rest."""

_READ = 8  # tokens evaluated at once in the second figure, about as many as a draft evaluates after a round


@dataclass(frozen=True, slots=True)
class Timing:
    """A file of `bytes` with the weight type `kind` ("as it is" for the source), and medians in milliseconds.

    `token` is for one token and its logits: a step of drafting. `reading` is for eight tokens and the logits
    of the last: evaluating what the target added.
    """

    kind: str
    bytes: int
    token: float
    reading: float


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What was tried for `source`, itself first. `kept` is the draft made, None if none was faster by GAIN.

    `best` has the figures of `kept`, or of the source.
    """

    source: Path
    timings: tuple[Timing, ...]
    kept: Path | None
    best: Timing

    @property
    def line(self) -> str:
        """The outcome in one line."""
        before = self.timings[0].token
        if self.kept is None:
            after = ", ".join(f"{one.token:.1f} as {one.kind}" for one in self.timings[1:])
            return f"no faster draft: {before:.1f} ms per token as it is, {after}"
        return f"made a faster draft: {before:.1f} -> {self.best.token:.1f} ms per token"


def make_draft(
    source: Path,
    kinds: Sequence[DraftType] = ("q4_0",),
    progress: NamedProgress | None = None,
    vocabulary: int = 0,
    corpus: Sequence[Path] = (),
) -> DraftReport:
    """Requantize `source` as each of `kinds`, measure, and keep the fastest in its folder.

    With a `vocabulary` size, try each also with only the most useful so many ids: those that the texts in
    `corpus` use most, or the shipped ones. It drafts fewer tokens, so it, too, must be faster by GAIN.
    `requant.made_draft` finds what was kept; earlier drafts of `source` are replaced. Takes seconds, with
    IQ4_NL minutes. An error leaves nothing behind. Raises EdgespecError, one line, and Cancelled when
    `progress` stopped it.
    """
    report = progress or (lambda *_: True)
    summary = check_gguf(source)
    sizes = [size_as(source, summary, kind) for kind in kinds]
    require_space(source.parent, sum(sizes))
    _require_memory(source, source.stat().st_size + sum(sizes))
    with work_folder(source, "draft") as folder:
        made: dict[str, Path] = {}
        for kind in kinds:
            made[kind] = requantize(
                source, folder / f"{kind}.gguf", kind, partial(report, f"requantizing to {kind}")
            )
        if vocabulary:
            ids = useful_ids(made[kinds[0]], vocabulary, corpus)
            for kind in kinds:
                name = f"{kind}-v{len(ids)}"
                made[name] = trim(made[kind], source, ids, folder / f"{name}.gguf")
        timings = measure(source, made, partial(report, "measuring"))
        best = timings[0]
        for one in timings[1:]:
            if one.token * GAIN < best.token:
                best = one
        if best is timings[0]:
            return DraftReport(source, timings, None, best)
        kept = draft_path(source, best.kind)
        made[best.kind].replace(kept)
    for old in made_drafts(source):
        if old != kept and _is_ours(old):
            old.unlink(missing_ok=True)
    return DraftReport(source, timings, kept, best)


def useful_ids(path: Path, size: int, corpus: Sequence[Path] = ()) -> Ids:
    """Return the `size` most useful ids of `path`'s vocabulary, ascending."""
    with LlamaModel(path, LlamaOptions(context=64, max_rows=1)) as model:
        if size >= model.vocab.size:
            raise EdgespecError(f"the vocabulary has only {model.vocab.size} tokens: choose a smaller number")
        use = (
            count_use(model.vocab, map(read_text, corpus))
            if corpus
            else shipped_use(model.summary.tokenizer_digest)
        )
        return choose(model.vocab, use, size)


def read_text(path: Path) -> str:
    """Return the text of a file that the user named. Raises EdgespecError."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError as error:
        raise EdgespecError(f"cannot read {path}: {error.strerror or error}") from None


def measure(
    source: Path,
    made: Mapping[str, Path],
    progress: Callable[[float], bool] | None = None,
    seconds: float = 6.0,
) -> tuple[Timing, ...]:
    """Time `source` and the files `made` from it for `seconds`, interleaved since the machine's speed drifts.

    Raises EdgespecError if other programs had the processor meanwhile: threads that wait for each other are
    then slower by any factor.
    """
    files = {"as it is": source, **made}
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in files}
    with ExitStack() as stack:
        options = LlamaOptions(context=256, max_rows=1)
        models = {
            name: stack.enter_context(open_draft(path, options, source=source))
            for name, path in files.items()
        }
        if reason := refusal_as_draft(models["as it is"]):
            raise EdgespecError(f"{source.name} cannot draft ({reason}): choose another model")
        sequences = {name: model.sequence() for name, model in models.items()}
        for sequence in sequences.values():  # the context to draft after; it also touches all weights
            sequence.forward([token % sequence.vocab_size for token in range(64)])
        threads = models["as it is"].threads[0]
        start, used, elapsed, number = perf_counter(), process_time(), 0.0, 0
        while number < 4 or (number < 24 and elapsed < seconds):
            number += 1
            for name, sequence in sequences.items():
                one, many = samples[name]
                for i in range(4):
                    one.append(_milliseconds(sequence, [i]))
                sequence.rollback(64)
                many.append(_milliseconds(sequence, range(_READ)))
                sequence.rollback(64)
            elapsed = perf_counter() - start
            share = (process_time() - used) / elapsed / threads
            if elapsed > seconds and share < UNDISTURBED:
                break
            if progress is not None and not progress(min(1.0, elapsed / seconds)):
                raise Cancelled
    if share < UNDISTURBED:
        raise EdgespecError(
            f"other programs used {1 - share:.0%} of the processor while {source.name} was measured: "
            "nothing was kept, try again when they are done."
        )
    return tuple(
        Timing(name, files[name].stat().st_size, median(one), median(many))
        for name, (one, many) in samples.items()
    )


def _milliseconds(sequence: LlamaSequence, new: Sequence[int]) -> float:
    start = perf_counter()
    sequence.forward(new)
    return 1000 * (perf_counter() - start)


def _require_memory(source: Path, needed: int) -> None:
    if needed > (free := memory_available()):
        raise EdgespecError(
            f"measuring {source.name} takes {needed >> 20} MiB of memory and {free >> 20} are free: "
            "close other programs first."
        )


def _is_ours(path: Path) -> bool:
    with suppress(EdgespecError):
        return SOURCE_KEY in check_gguf(path).metadata
    return False
