"""How many threads to compute with while other programs want the processor: tried out, round by round.

Compute threads wait for each other after every matrix; where one of them has to share its core, all wait. How
much that costs depends on the scheduler and on the others, so it is measured and not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

_TRIAL = 0.3  # seconds of passes that a count is tried for
_AGAIN = 15.0  # seconds of passes after which all are tried anew


class ThreadSearch:
    """The thread count that is quickest just now, by trying each of `counts` in turn.

    What is compared is the seconds of a pass over those it would take in calm, which `observe` is told: so
    rounds of different sizes count alike.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """`counts` are tried in this order. Raises ValueError without any."""
        if not counts:
            raise ValueError("no thread counts to try")
        self._counts = list(dict.fromkeys(counts))
        self._expected = self._seconds = 0.0
        self._begin()

    @property
    def threads(self) -> int:
        """For the next round."""
        return self._left[0] if self._left else self._best

    @property
    def settled(self) -> bool:
        """Whether all counts were tried."""
        return not self._left

    def observe(self, expected: float, seconds: float) -> float | None:
        """A pass with `threads` took `seconds` and would take `expected` in calm.

        When a trial ends: how many times as long as in calm its passes took, else None.
        """
        self._expected += expected
        self._seconds += seconds
        if not self._left:
            if self._seconds > _AGAIN:
                self._begin()
            return None
        if self._seconds < _TRIAL:
            return None
        slowness = self._seconds / self._expected
        self._found[self._left.pop(0)] = slowness
        self._expected = self._seconds = 0.0
        if not self._left:
            self._best = min(self._found, key=self._found.__getitem__)
        return slowness

    def _begin(self) -> None:
        self._left = list(self._counts)
        self._found: dict[int, float] = {}
        self._best = self._counts[0]
        self._expected, self._seconds = 0.0, 0.0
