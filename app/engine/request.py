"""One answer of a model: the request, its steps and figures, and its end. Knows no models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgespec.app.engine.output import PLAIN, OutputForm, StopReason
from edgespec.core import Constraint, Controller, Reading, Round, TokenLogprob
from edgespec.machine.energy import Energy
from edgespec.machine.governor import Mode
from edgespec.machine.reading import reported_fields
from edgespec.models.prompting.output_events import OutputEvent
from edgespec.planner import Chain
from edgespec.sampling import Sampling


@dataclass(slots=True)
class Request:
    """One answer to generate after `prompt` (token ids). `max_tokens` 0: until the context is full.

    `max_draft` bounds the draft tokens of a round, `constraint` makes the grammar that the answer follows.
    `form` is what the answer may contain besides text. `controller` replaces the planner: for measurements of
    what planning gains.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    stops: Sequence[str] = ()
    speculate: bool = True
    max_draft: int | None = None
    constraint: Callable[[], Constraint] | None = None
    form: OutputForm = PLAIN
    controller: Callable[[Chain], Controller] | None = None
    cancelled: bool = False
    _interrupt: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Stop within one round. Any thread or signal handler may call this, even before the start."""
        self.cancelled = True
        if self._interrupt is not None:
            self._interrupt()

    def arm(self, interrupt: Callable[[], None]) -> None:
        """Let `cancel` call `interrupt` to stop a pass in progress."""
        self._interrupt = interrupt

    def disarm(self) -> None:
        self._interrupt = None


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ended, and what it used after its first round.

    `stopped_by`: the stop string that was generated. `modes`: the governor's, each with its reason;
    `reading`: its last one.
    """

    reason: StopReason
    stopped_by: str | None = None
    energy: Energy | None = None
    modes: Sequence[tuple[Mode, str]] = ()
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one round added to an answer: text that can no longer change, and its final tokens.

    `text` may lag behind `tokens`: it is held back while it may become a stop string or something other than
    text, or is half a character. `events` are all that was added, in order, of which `text` is a part.
    `reasoning_tokens`: how many of `tokens` are reasoning. `seconds`: since the request began. `round` is
    None only in the last step, the one that is `finished`.
    """

    text: str = ""
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    round: Round | None = None
    seconds: float = 0.0
    finished: Ending | None = None
    events: Sequence[OutputEvent] = ()
    reasoning_tokens: int = 0


@dataclass(slots=True)
class GenerationStats:
    """The text of an answer and its figures: a fold over its steps. Times in seconds of wall time."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason = "length"
    stopped_by: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, that were in the KV cache
    reasoning_tokens: int = 0  # of `tokens`
    rounds: int = 0
    written: int = 0  # tokens of all rounds, including the one that ended the answer
    drafted: int = 0
    accepted: int = 0
    drafters: dict[str, tuple[int, int]] = field(
        default_factory=dict
    )  # tokens drafted and accepted, by drafter
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    bookkeeping: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    energy: Energy | None = None
    modes: Sequence[tuple[Mode, str]] = ()
    reading: Reading | None = None
    _first: int = 0  # tokens of the first round

    def add(self, step: Step) -> None:
        self.text += step.text
        self.tokens += step.tokens
        self.logprobs += step.logprobs
        self.reasoning_tokens += step.reasoning_tokens
        if step.round is not None:
            self.seconds = step.seconds
            if not self.rounds:
                self.seconds_to_first_token = step.seconds
            self._count(step.round)
        if step.finished is not None:
            ending = step.finished
            self.stop_reason, self.stopped_by = ending.reason, ending.stopped_by
            self.energy, self.modes, self.reading = ending.energy, ending.modes, ending.reading

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first round, which includes the prefill. 0 for an answer of one round."""
        rest = self.seconds - self.seconds_to_first_token
        return (len(self.tokens) - 1) / rest if rest > 0 and len(self.tokens) > 1 else 0.0

    @property
    def cpu_seconds_per_token(self) -> float:
        """Processor time after the first round, which includes the prefill. 0 for an answer of one round."""
        rest = self.written - self._first
        return self.energy.cpu_seconds / rest if self.energy is not None and rest > 0 else 0.0

    @property
    def joules_per_token(self) -> float | None:
        """The same as measured energy, None where it is unavailable."""
        rest = self.written - self._first
        joules = self.energy.joules if self.energy is not None else None
        return joules / rest if joules is not None and rest > 0 else None

    @property
    def tokens_per_round(self) -> float:
        return self.written / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """The share of draft tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def bookkeeping_share(self) -> float:
        """The share of the time after the first token that was spent neither drafting nor in the target."""
        rest = self.seconds - self.seconds_to_first_token
        return self.bookkeeping / rest if rest > 0 else 0.0

    def _count(self, round_: Round) -> None:
        if self.rounds:
            self.bookkeeping += round_.seconds - round_.drafting - round_.waiting
        else:
            self._first = len(round_.tokens)
        self.rounds += 1
        self.written += len(round_.tokens)
        self.drafted += len(round_.draft.tokens)
        self.accepted += round_.accepted
        for i, source in enumerate(round_.draft.sources):
            drafted, accepted = self.drafters.get(source, (0, 0))
            self.drafters[source] = drafted + 1, accepted + (i < round_.accepted)

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 3),
            "seconds_to_first_token": round(self.seconds_to_first_token, 4),
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "stop_reason": self.stop_reason,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "tokens_per_round": round(self.tokens_per_round, 3),
            "mode": [{"mode": mode, "reason": reason} for mode, reason in self.modes],
            "reading": reported_fields(self.reading),
            "energy": self._energy_json(),
            **({"logprobs": [_logprob_json(one) for one in self.logprobs]} if self.logprobs else {}),
        }

    def _energy_json(self) -> dict[str, Any]:
        """Return figures per token: joules where they are measured, and processor time in any case."""
        source = self.energy.source if self.energy is not None else None
        metered = {"joules_per_token": self.joules_per_token, "meter": source} if source else {}
        return {"cpu_seconds_per_token": round(self.cpu_seconds_per_token, 5), **metered}


def _logprob_json(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "top": [list(pair) for pair in one.top]}
