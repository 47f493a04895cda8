"""Acceptance probabilities of draft tokens, counted by drafter and by the drafter's confidence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Self

from edgespec.draft_account import DraftAccount

_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
_BINS = len(_EDGES) + 1
_PRIOR = 20.0  # observations that the drafter's own confidence counts for
_MEMORY = 400.0  # observations, beyond which older ones fade
LEVEL = 0.85  # of a source that was never asked


class Acceptance:
    """Maps (source, confidence) to the probability that the target accepts a token, all before it accepted.

    Each source has a bin for each range of confidence; an empty bin returns the drafter's confidence.
    Positions in the draft have no bins of their own: a token after accepted ones is accepted as often as a
    first token of the same confidence. `level` is the mean probability of a source's next token, before the
    source is asked. `account` has what a costly drafter has gained.
    """

    def __init__(self) -> None:
        self._bins: dict[str, list[list[float]]] = {}
        self._levels: dict[str, float] = {}
        self._accounts: dict[str, DraftAccount] = {}

    def probability(self, source: str, confidence: float) -> float:
        hits, seen = 0.0, 0.0
        if source in self._bins:
            hits, seen = self._bins[source][bisect_right(_EDGES, confidence)]
        return (hits + _PRIOR * confidence) / (seen + _PRIOR)

    def observe(self, source: str, confidence: float, accepted: bool) -> None:
        """Count a draft token that was verified after all before it had been accepted."""
        bins = self._bins.setdefault(source, [[0.0, 0.0] for _ in range(_BINS)])
        cell = bins[bisect_right(_EDGES, confidence)]
        fade = 1.0 if cell[1] < _MEMORY else _MEMORY / (_MEMORY + 1.0)
        cell[0] = cell[0] * fade + accepted
        cell[1] = cell[1] * fade + 1.0

    def level(self, source: str) -> float:
        return self._levels.get(source, LEVEL)

    def note(self, source: str, probability: float) -> None:
        """Move the level of `source`, which drafted a token that is accepted with `probability`."""
        known = self.level(source)
        self._levels[source] = known + 0.005 * (probability - known)

    def account(self, source: str) -> DraftAccount:
        """Return the account of a drafter that takes time."""
        return self._accounts.setdefault(source, DraftAccount())

    def earn(self, tokens: float) -> None:
        """Credit all accounts with the time that `tokens` take in plain decoding."""
        for account in self._accounts.values():
            account.earn(tokens)

    def as_json(self) -> dict[str, Any]:
        bins = {
            source: [[round(x, 2) for x in cell] for cell in cells] for source, cells in self._bins.items()
        }
        accounts = {source: account.as_json() for source, account in self._accounts.items()}
        return {"bins": bins, "levels": self._levels, "accounts": accounts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Load what `as_json` returned.

        Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else.
        """
        acceptance = cls()
        for source, level in data["levels"].items():
            if not 0.0 <= float(level) <= 1.0:
                raise ValueError("not a probability")
            acceptance._levels[str(source)] = float(level)
        for source, cells in data["bins"].items():
            read = [[float(hits), float(seen)] for hits, seen in cells]
            if len(read) != _BINS or not all(0.0 <= hits <= seen <= _MEMORY + 1.0 for hits, seen in read):
                raise ValueError("not counts of acceptance")
            acceptance._bins[str(source)] = read
        accounts = {"model": data["account"]} if "account" in data else data.get("accounts", {})  # 0.1.0
        for source, account in accounts.items():
            acceptance._accounts[str(source)] = DraftAccount.from_json(account)
        return acceptance
