"""Whether drafting while the target checks pays: only where both have a processor of their own.

While the target checks a draft, the draft model can go on, on the guess that all of it stands. If it does,
the next draft is there already; if not, it is thrown away, and the one pass under way has to be waited for.
Two models on one processor only take each other's time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from threading import Event, Thread
from time import perf_counter

from edgespec.core import EdgespecError
from edgespec.costs import CostCurve

AHEAD = 8
"""Tokens that are drafted ahead at most."""

MARGIN = 1.05
"""How many times faster rounds must get for the trouble."""

_GUESSES = 4  # of a round
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Together:
    """How many times as long as alone a pass takes while the other model runs: `target`'s and `draft`'s."""

    target: float
    draft: float


def gain(target: CostCurve, draft: CostCurve, together: Together, acceptance: float = 0.8) -> float:
    """How many times faster rounds get when drafts are begun while the target checks.

    For rounds of a few guesses of which each, and the guess of the target's own token, stands with
    `acceptance`.
    """
    step, check = draft.seconds(1), target.seconds(1 + _GUESSES)
    alone = check + _GUESSES * step
    slow_check, slow_step = check * together.target, step * together.draft
    made = min(_GUESSES, int(slow_check / slow_step))
    stands = acceptance ** (_GUESSES + 1)
    # What was begun when the target is done is waited for; half a pass, on average.
    round_ = slow_check + slow_step / 2 + _GUESSES * step - stands * made * step
    return alone / round_


def pays(target: CostCurve, draft: CostCurve, together: Together) -> bool:
    return gain(target, draft, together) >= MARGIN


def measure_together(
    target: Callable[[], object],
    draft: Callable[[], object],
    clock: Callable[[], float] = perf_counter,
) -> Together:
    """Time a pass of each alone, and while the other one runs. Raises what they raise."""
    alone = _seconds(target, clock), _seconds(draft, clock)
    return Together(
        _beside(target, draft, clock) / alone[0],
        _beside(draft, target, clock) / alone[1],
    )


def _beside(one: Callable[[], object], other: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of `one` while `other` runs over and over in a thread."""
    stop, begun = Event(), Event()
    errors: list[EdgespecError] = []

    def run() -> None:
        try:
            while not stop.is_set():
                begun.set()
                other()
        except EdgespecError as error:
            errors.append(error)

    thread = Thread(target=run, name="edgespec-beside", daemon=True)
    thread.start()
    begun.wait()
    try:
        seconds = _seconds(one, clock)
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]
    return seconds


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """The median of a few."""
    times = []
    for _ in range(_REPEATS):
        start = clock()
        run()
        times.append(clock() - start)
    return max(median(times), 1e-9)
