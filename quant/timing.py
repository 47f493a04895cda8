"""Models timed side by side: loaded together, taking turns, round by round.

Machines drift by tens of percent within minutes, so that only the median of ratios between neighboring turns
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple, Self

from edgespec.core import Cancelled, EdgespecError, NamedProgress
from edgespec.machine.sensors import compute_cores, memory_available
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.gguf.selftest import failure
from edgespec.models.onnx.model import OnnxOptions
from edgespec.models.options import Options
from edgespec.models.runtime import Model, check_model, load_draft

PROMPT = 0
Figures = Mapping[int, float]
"""Seconds of a forward pass of n rows, all logits wanted, by n; under PROMPT those of a token of a prompt."""

_HOPELESS = 1.25  # times slower in everything: not worth another round
_ROOM = 256 << 20  # bytes that a loaded model takes in addition to its weights: buffers, logits, cache


@dataclass(frozen=True, slots=True)
class TimingBudget:
    """How much is measured: batch `sizes`; a prompt of at most so many tokens and seconds; rounds of a race.

    After the `least` rounds, a race goes on up to the `most` for as long as `seconds` are not over. Prompts
    are read in the first `prompts` rounds only.
    """

    sizes: tuple[int, ...]
    prompt: int
    prompt_seconds: float
    prompts: int
    least: int
    most: int
    seconds: float
    repeats: int


class Candidate(NamedTuple):
    """What is timed: a file, and how it is loaded and run."""

    path: Path
    options: Options

    def model(self) -> Candidate:
        """What is loaded for it: thread counts are changed without, where they can be."""
        if isinstance(self.options, OnnxOptions):
            return self
        return Candidate(self.path, self.options.with_threads(0, 0))


def scaled(
    figures: Figures, best: Sequence[Figures], other: Sequence[Figures], *, quickest: bool = False
) -> Figures:
    """`figures` of the best, each times the median ratio of `other`'s rounds to `best`'s.

    With `quickest`, times the ratio of their quickest rounds. Rounds count in pairs, as far as both have
    them; what was not measured stays.
    """
    result = {}
    for n, seconds in figures.items():
        pairs = [(a[n], b[n]) for a, b in zip(best, other, strict=False) if n in a and n in b]
        if not pairs:
            ratio = 1.0
        elif quickest:
            ratio = min(b for _, b in pairs) / min(a for a, _ in pairs)
        else:
            ratio = median(b / a for a, b in pairs)
        result[n] = seconds * ratio
    return result


def undisturbed(rounds: Sequence[Figures]) -> Figures:
    """The quickest of each figure: other programs only ever add to a time."""
    return {n: min(one[n] for one in rounds if n in one) for n in rounds[0]}


class TimingBench:
    """Models that are loaded, and rounds of passes through several of them."""

    def __init__(self, effort: TimingBudget, steps: int, progress: NamedProgress) -> None:
        self.all = (PROMPT, *effort.sizes)
        self._effort, self._progress = effort, progress
        self._steps, self._step, self._share, self._doing = steps, 0, 0.0, ""
        self._timers: dict[Candidate, _Timer] = {}
        self.notes: list[str] = []  # deviations from what was requested
        self._prompt = 0  # tokens; so many that the first model reads them in time

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, variant: Candidate, doing: str, source: Path | None = None) -> None:
        """Load what `variant` needs. Raises EdgespecError where that fails or finds no memory.

        Also where it failed on this processor before: the requested options are timed.
        """
        self._doing, key = doing, variant.model()
        if key in self._timers:
            return
        needed, free = check_model(variant.path).tensor_bytes + _ROOM, memory_available()
        if self._timers and needed > free:
            raise EdgespecError(
                f"{needed / 1e9:.1f} GB of memory are needed for another model, {free / 1e9:.1f} are free"
            )
        if isinstance(key.options, LlamaOptions) and (reason := failure(variant.path, key.options)):
            raise EdgespecError(reason)
        model = load_draft(variant.path, key.options, lambda _: self._goes_on(), self._say, source)
        try:
            timer = _Timer(model, self._effort, self._check)
            self._prompt = self._prompt or timer.prompt_length()
            timer.prompt = self._prompt
        except BaseException:
            model.close()
            raise
        self._timers[key] = timer

    def race(self, variants: Mapping[str, Candidate], quantities: Sequence[int]) -> list[list[Figures]]:
        """Rounds of all `variants`, opened before: each in turn, every other round backwards.

        What is hopeless against the first stays out of later rounds, and with nothing left it ends.
        """
        effort, running = self._effort, list(enumerate(variants.items()))
        rounds: list[list[Figures]] = [[] for _ in running]
        start = perf_counter()
        for number in range(effort.most):
            self._share = number / effort.most
            wanted = [n for n in quantities if n != PROMPT or number < effort.prompts]
            if not wanted or (number >= effort.least and perf_counter() - start > effort.seconds):
                break
            for i, (name, variant) in running if number % 2 == 0 else running[::-1]:
                self._doing = name
                rounds[i].append(self._timers[variant.model()].time(variant.options, wanted))
            if number:
                running = [(i, one) for i, one in running if not i or not _is_hopeless(rounds[0], rounds[i])]
            if len(variants) > 1 and len(running) == 1:
                break
        self._step, self._share = self._step + 1, 0.0
        return rounds

    def close(self, but: Candidate | None = None) -> None:
        """Free all models, or all but one."""
        kept = but and but.model()
        for key in [key for key in self._timers if key != kept]:
            self._timers.pop(key).model.close()

    def _say(self, line: str) -> None:
        self.notes.append(line)

    def _goes_on(self) -> bool:
        return self._progress(self._doing, min(1.0, (self._step + self._share) / self._steps))

    def _check(self) -> None:
        if not self._goes_on():
            raise Cancelled


def _is_hopeless(best: Sequence[Figures], other: Sequence[Figures]) -> bool:
    return min(scaled(dict.fromkeys(best[0], 1.0), best, other).values()) > _HOPELESS


class _Timer:
    """A loaded model, timed at any thread counts."""

    prompt: int

    def __init__(self, model: Model, effort: TimingBudget, check: Callable[[], None]) -> None:
        self.model = model
        self._effort, self._check = effort, check
        self._sequence = model.sequence()
        count = effort.prompt + max(effort.sizes)
        self._text = [997 * i % self._sequence.vocab_size for i in range(count)]
        self._at = 0  # where the next rows begin in it
        self._pass(16, last=1)  # what only the first pass pays for

    def prompt_length(self) -> int:
        """Tokens of a prompt that is read in time."""
        reading = min(self._pass(16, last=1), self._pass(16, last=1)) / 16
        return max(32, min(self._effort.prompt, int(self._effort.prompt_seconds / reading)))

    def time(self, options: Options, quantities: Sequence[int]) -> Figures:
        """One round: medians of a few passes for each of `quantities`, rows after a whole prompt."""
        self.model.set_threads(*options.thread_counts(compute_cores()))
        figures, self._at = {}, 0  # all candidates evaluate the same tokens
        if PROMPT in quantities or len(self._sequence.tokens) != self.prompt:
            self._sequence.rollback(0)
            self._pass(2, last=1)  # the turn before was another model's: threads sleep, caches are full of it
            self._sequence.rollback(0)
            self._sequence.mark_at([self.prompt])
            figures[PROMPT] = self._pass(self.prompt, last=1) / self.prompt
        sizes = [n for n in quantities if n != PROMPT]
        for n in sizes[:1] + sizes:  # the first twice, for the same reason
            repeats = self._effort.repeats + 2 * (n == 1)
            figures[n] = median(self._again(n) for _ in range(repeats))
        return {n: figures[n] for n in quantities if n in figures}

    def _again(self, rows: int) -> float:
        length = len(self._sequence.tokens)
        seconds = self._pass(rows, at=self._at)
        # Other tokens next time: each selects other experts of a mixture.
        self._at = (self._at + rows) % self._effort.prompt
        self._sequence.rollback(length)
        return seconds

    def _pass(self, rows: int, last: int = 0, at: int = 0) -> float:
        self._check()
        new = self._text[at : at + rows]
        start = perf_counter()
        self._sequence.forward(new, last or rows)
        return perf_counter() - start
