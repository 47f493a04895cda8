"""Whether asking a draft model has brought what it cost, in tokens of plain decoding, on this machine so far.

Costs measured one by one do not add up: a draft model reads prompts, and it takes cache and memory
bandwidth from the target. So what counts is what rounds brought in the time they really took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

_START, _MOST = 8.0, 12.0  # tokens
_EARNED = 0.01  # tokens per token of time that passed
_READING_RATE, _LEAST_READING, _MOST_READING = 0.3, 0.2, 5.0


class DraftAccount:
    """Balances in tokens: of texts that the draft model reads whole, and of those of which it reads the end.

    The second kind is apart because a draft model that knows only the end of a long prompt is often wrong.
    Reading is paid from the balance, which grows by 1% of the time: a draft model that loses is asked again
    now and then. `reading` is how long its reading takes, relative to what its cost curve says.
    """

    def __init__(self) -> None:
        self._balances = {True: _START, False: _START}
        self.reading = 1.0

    def affords(self, whole: bool, tokens: float) -> bool:
        """Whether a draft model may read, for `tokens`, a text that it reads `whole` or not."""
        return tokens <= self._balances[whole]

    def earn(self, tokens: float) -> None:
        """The time of `tokens` plain ones has passed."""
        for whole, balance in self._balances.items():
            self._balances[whole] = min(_MOST, balance + _EARNED * tokens)

    def record(self, whole: bool, gain: float) -> None:
        """Rounds with the draft model brought `gain` tokens more than plain decoding would have."""
        self._balances[whole] = min(_MOST, max(-_MOST, self._balances[whole] + gain))

    def read(self, expected: float, seconds: float) -> None:
        """Reading took `seconds` and should have taken `expected`, by the draft model's cost curve."""
        share = min(_MOST_READING, max(_LEAST_READING, seconds / expected))
        self.reading += _READING_RATE * (share - self.reading)

    def as_json(self) -> dict[str, float]:
        whole, end = self._balances[True], self._balances[False]
        return {"whole": round(whole, 3), "end": round(end, 3), "reading": round(self.reading, 4)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else."""
        account = cls()
        whole, end, reading = (float(data[key]) for key in ("whole", "end", "reading"))
        if not (abs(whole) <= _MOST and abs(end) <= _MOST and _LEAST_READING <= reading <= _MOST_READING):
            raise ValueError("figures out of bounds")
        account._balances, account.reading = {True: whole, False: end}, reading
        return account


class DraftTrial:
    """Whether a draft model is still to be asked in one text: not for a while after it lost there."""

    _PATIENCE, _CREDIT, _PAUSE = 1.5, 3.0, 32

    def __init__(self) -> None:
        self._gain = 0.0
        self._pause = self._PAUSE
        self._resting = 0

    @property
    def is_resting(self) -> bool:
        return self._resting > 0

    def observe(self, tokens: int, gain: float | None) -> None:
        """A round of `tokens`; with the draft model, it brought `gain`, reading aside."""
        self._resting = max(0, self._resting - tokens)
        if gain is None:
            return
        self._gain = min(self._CREDIT, self._gain + gain)
        if self._gain < -self._PATIENCE:
            self._gain, self._resting, self._pause = 0.0, self._pause, 2 * self._pause
