"""Finds the best number of compute threads while other programs use the processor, by trial in real rounds.

Compute threads wait for each other after every matrix; if one of them has to share its core, all wait. The
cost of that depends on the scheduler and on the other programs, so it is measured and not predicted.
"""

from __future__ import annotations

from collections.abc import Sequence

_TRIAL = 0.3  # seconds of passes that a count is tried for
_AGAIN = 15.0  # seconds of passes after which all are tried again


class ThreadSearch:
    """The fastest thread count at the moment, by trying each of `counts` in turn.

    Counts are compared by the seconds of their passes relative to the seconds expected without other
    programs, so that rounds of different sizes count alike.
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
        """The count for the next round."""
        return self._left[0] if self._left else self._best

    @property
    def settled(self) -> bool:
        """Whether all counts were tried."""
        return not self._left

    def observe(self, expected: float, seconds: float) -> float | None:
        """Record a pass with `threads` that took `seconds`, and without other programs would take `expected`.

        Returns, when a trial ends, how many times as long its passes took as without other programs, else
        None.
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
