"""What a draft model has gained on this machine so far, in tokens of plain decoding.

Costs measured one by one do not add up: a draft model has prefills of its own, and it takes cache and memory
bandwidth from the target. So the gain is computed from the time that rounds really took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

_START, _MOST = 8.0, 12.0  # tokens
_EARNED = 0.01  # tokens per token of plain decoding in the time that passed
_PATIENCE, _PATIENCE_SHARE = 1.5, 8.0  # tokens; of the balance
_READING_RATE, _LEAST_READING, _MOST_READING = 0.3, 0.2, 5.0


class DraftAccount:
    """Balances in tokens: for contexts evaluated whole, and for those of which the draft model sees the end.

    The two are separate because a draft model that sees only the end of a long prompt is often wrong. A
    prefill is paid from the balance, which grows by 1% of the time: a draft model that loses is asked again
    now and then. `reading` is the time of its prefills, relative to its cost curve.
    """

    def __init__(self) -> None:
        self._balances = {True: _START, False: _START}
        self.reading = 1.0

    def affords(self, whole: bool, tokens: float) -> bool:
        """Whether the balance covers a prefill that costs `tokens`, of a `whole` context or its end."""
        return tokens <= self._balances[whole]

    def earn(self, tokens: float) -> None:
        """Credit the time that `tokens` take in plain decoding."""
        for whole, balance in self._balances.items():
            self._balances[whole] = min(_MOST, balance + _EARNED * tokens)

    def record(self, whole: bool, gain: float) -> None:
        """Record that rounds with the draft model gained `gain` tokens over plain decoding."""
        self._balances[whole] = min(_MOST, max(-_MOST, self._balances[whole] + gain))

    def read(self, expected: float, seconds: float) -> None:
        """Record a prefill of `seconds`, for which the draft model's cost curve has `expected`."""
        share = min(_MOST_READING, max(_LEAST_READING, seconds / expected))
        self.reading += _READING_RATE * (share - self.reading)

    @property
    def patience(self) -> float:
        """Tokens that one generation may lose before the drafter rests: more after gains in others."""
        return _PATIENCE + max(0.0, *self._balances.values()) / _PATIENCE_SHARE

    def as_json(self) -> dict[str, float]:
        whole, end = self._balances[True], self._balances[False]
        return {"whole": round(whole, 3), "end": round(end, 3), "reading": round(self.reading, 4)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Load what `as_json` returned.

        Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else.
        """
        account = cls()
        whole, end, reading = (float(data[key]) for key in ("whole", "end", "reading"))
        if not (abs(whole) <= _MOST and abs(end) <= _MOST and _LEAST_READING <= reading <= _MOST_READING):
            raise ValueError("figures out of bounds")
        account._balances, account.reading = {True: whole, False: end}, reading
        return account


class DraftTrial:
    """Decides whether one generation still asks a draft model: not for a while after it lost there."""

    _CREDIT, _PAUSE = 3.0, 32

    def __init__(self, patience: float = _PATIENCE) -> None:
        self._patience, self._gain = patience, 0.0
        self._pause = self._PAUSE
        self._resting = 0

    @property
    def is_resting(self) -> bool:
        return self._resting > 0

    def observe(self, tokens: int, gain: float | None) -> None:
        """Record a round of `tokens`; with the draft model, it yielded `gain`, its prefill not counted."""
        self._resting = max(0, self._resting - tokens)
        if gain is None:
            return
        self._gain = min(self._CREDIT, self._gain + gain)
        if self._gain < -self._patience:
            self._gain, self._resting, self._pause = 0.0, self._pause, 2 * self._pause
