"""Whether drafting while the target verifies pays: only where both have a processor of their own.

While the target verifies a draft, the draft model can continue as if all of it were accepted. If it is, part
of the next draft exists already; if not, that is discarded, and the pass in progress has to be waited for.
Two models on one processor only slow each other down.
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
"""The most tokens that are drafted ahead."""

MARGIN = 1.05
"""The speedup of rounds from which drafting ahead is used."""

_DRAFTED = 4  # tokens per round
_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Together:
    """How many times as long as alone a pass takes while the other model runs: `target`'s and `draft`'s."""

    target: float
    draft: float


def gain(target: CostCurve, draft: CostCurve, together: Together, acceptance: float = 0.8) -> float:
    """Return the speedup of rounds when drafts are begun while the target verifies.

    For rounds of a few draft tokens, each of which is accepted with `acceptance`, as is the draft of the
    target's own token.
    """
    step, verify_ = draft.seconds(1), target.seconds(1 + _DRAFTED)
    alone = verify_ + _DRAFTED * step
    slow_verify, slow_step = verify_ * together.target, step * together.draft
    made = min(_DRAFTED, int(slow_verify / slow_step))
    accepted = acceptance ** (_DRAFTED + 1)
    # The pass in progress when the target is done is waited for: half a pass, on average.
    round_ = slow_verify + slow_step / 2 + _DRAFTED * step - accepted * made * step
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
        _seconds_with(target, draft, clock) / alone[0],
        _seconds_with(draft, target, clock) / alone[1],
    )


def _seconds_with(
    one: Callable[[], object], other: Callable[[], object], clock: Callable[[], float]
) -> float:
    """Return the seconds of `one` while `other` runs repeatedly in a thread."""
    stop, begun = Event(), Event()
    errors: list[EdgespecError] = []

    def run() -> None:
        try:
            while not stop.is_set():
                begun.set()
                other()
        except EdgespecError as error:
            errors.append(error)

    thread = Thread(target=run, name="edgespec-together", daemon=True)
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
    """Return the median of a few runs."""
    times = []
    for _ in range(_REPEATS):
        start = clock()
        run()
        times.append(clock() - start)
    return max(median(times), 1e-9)
