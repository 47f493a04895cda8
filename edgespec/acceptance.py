"""How often a guess stands: counted by drafter and by the confidence it had."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Self

from edgespec.draft_account import DraftAccount

_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
_BINS = len(_EDGES) + 1
_PRIOR = 20.0  # how many observations the drafter's own word is worth
_MEMORY = 400.0  # older observations fade beyond this many
LEVEL = 0.85  # of a source never asked


class Acceptance:
    """Maps (source, confidence) to the probability that the target agrees, given that it did so far.

    Each source has a bin for each range of confidence; an empty one believes the drafter. The position in the
    draft needs none of its own: a guess whose predecessors stood is as good as a first guess of the same
    confidence. `level` is what a source's next guess is worth on average, before it was asked. `account`
    has what a drafter that takes time has gained.
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
        """A guess was checked, all before it having been accepted."""
        bins = self._bins.setdefault(source, [[0.0, 0.0] for _ in range(_BINS)])
        cell = bins[bisect_right(_EDGES, confidence)]
        fade = 1.0 if cell[1] < _MEMORY else _MEMORY / (_MEMORY + 1.0)
        cell[0] = cell[0] * fade + accepted
        cell[1] = cell[1] * fade + 1.0

    def level(self, source: str) -> float:
        return self._levels.get(source, LEVEL)

    def note(self, source: str, probability: float) -> None:
        """A guess was made that stands with `probability`: moves the level, whether it is checked or not."""
        known = self.level(source)
        self._levels[source] = known + 0.005 * (probability - known)

    def account(self, source: str) -> DraftAccount:
        """What a drafter that takes time has gained so far."""
        return self._accounts.setdefault(source, DraftAccount())

    def earn(self, tokens: float) -> None:
        """The time of `tokens` plain ones has passed."""
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
        """Raises ValueError, KeyError, TypeError, AttributeError or OverflowError for anything else."""
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
