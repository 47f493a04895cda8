"""The systems of a comparison: programs that answer prompts, Edgespec's own engine among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgespec.app.bench.measure import answer_tokens
from edgespec.app.engine.engine import Engine
from edgespec.sampling import Sampling

UNKNOWN = -1
"""The token id where a server reports none: llama-server streams whole characters, and of one that is spread
over several tokens only the last has an id."""


@dataclass(frozen=True, slots=True)
class SystemAnswer:
    """One greedy answer and its cost. Times are wall time in seconds since the request, at the client.

    `tokens` leaves out the token that ends the answer, `written` counts it. `rounds` are the forward passes
    of the target, the prefill included.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    written: int
    seconds_to_first_token: float
    seconds: float
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    text: str = ""  # where a server reports it

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token. 0 for an answer of one token, which has none."""
        rest = self.seconds - self.seconds_to_first_token
        return (self.written - 1) / rest if self.written > 1 and rest > 0 else 0.0


class BenchSystem(Protocol):
    """A system that answers prompts.

    `plain` is the name of the same system without speculation (its own, if it does not speculate). `memory`
    is what it takes while started, in bytes. A system that `remembers` learns from answers: it must be
    restarted before it gets the same prompts again.
    """

    @property
    def name(self) -> str: ...
    @property
    def plain(self) -> str: ...
    @property
    def memory(self) -> int: ...
    @property
    def remembers(self) -> bool: ...

    def start(self) -> None:
        """Make it ready to answer. Raises EdgespecError, with nothing left running."""

    def ask(self, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        """The greedy answer to token ids, none of them cached. Raises EdgespecError."""

    def stop(self) -> None:
        """Release what `start` took; does nothing if not started."""


class EdgespecSystem:
    """An engine in this process, plain or speculative: a system that is always started."""

    memory = 0
    remembers = False

    def __init__(self, engine: Engine, label: str, *, speculate: bool) -> None:
        self.plain = f"{label} plain"
        self.name = label if speculate else self.plain
        self.engine, self._speculate = engine, speculate

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def ask(self, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        result = answer_tokens(self.engine, prompt, max_tokens, Sampling(), speculate=self._speculate)
        return SystemAnswer(
            tuple(prompt),
            tuple(result.tokens),
            result.written,
            result.seconds_to_first_token,
            result.seconds,
            result.drafted,
            result.accepted,
            result.rounds,
        )
