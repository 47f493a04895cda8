"""A request in progress: one slot of a model, the generation in it, and its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import monotonic, perf_counter

from edgespec.app.engine.output import StopCriteria
from edgespec.app.engine.request import Ending, GenerationStats, Request, Step
from edgespec.app.engine.slots import WORTH_SHARING, Slot, SlotPool
from edgespec.core import Constraint, Controller, Round, common_prefix
from edgespec.decode import Generation
from edgespec.grammar_drafting import until_finished
from edgespec.models.prompting.output_events import OutputEvent, TextPiece
from edgespec.models.vocab import Vocabulary
from edgespec.sampling import Sampler


class RunningRequest:
    """One answer. `generation` is driven by `decode.advance`; `stats` are updated only here."""

    def __init__(
        self,
        request: Request,
        slot: Slot,
        cached: int,
        controller: Controller,
        constraint: Constraint | None,
        vocab: Vocabulary,
        room: int,
    ) -> None:
        """`slot` holds `cached` tokens of the prompt, and `room` tokens fit into the context after it."""
        self.request, self.slot, self.controller = request, slot, controller
        self.first: Round | None = None
        most = min(request.max_tokens or room, room)
        self.stats = GenerationStats(
            prompt_tokens=len(request.prompt),
            cached_tokens=min(cached, len(request.prompt) - 1),
            stop_reason="length" if request.max_tokens and most == request.max_tokens else "context",
        )
        self._criteria = StopCriteria(vocab.is_end, vocab.piece, request.stops, request.form)
        self._constraint = constraint
        self.generation = Generation(
            slot.sequence,
            list(request.prompt),
            controller,
            Sampler(request.sampling, request.prompt, constraint),
            self._criteria if constraint is None else until_finished(constraint, self._criteria),
            most,
        )
        self._start = perf_counter()

    @property
    def over(self) -> bool:
        return self.generation.over or self.request.cancelled

    def waits_for(self, other: RunningRequest) -> bool:
        """Whether `other` is evaluating a prefix of this prompt, too."""
        held = other.generation.target.tokens
        wanted = common_prefix(other.generation.context, self.request.prompt)
        return len(held) < wanted and wanted >= len(self.generation.target.tokens) + WORTH_SHARING

    def share(self, pool: SlotPool) -> None:
        """Continue from what another slot now holds of the prompt, if that is more."""
        held = len(self.generation.target.tokens)
        shared = pool.share(self.slot, self.request.prompt[:-1], held)
        if shared > held:
            self.stats.cached_tokens = shared

    def step(self, round_: Round) -> Step:
        """Return what `round_` added."""
        self.first = self.first or round_
        events, tokens, reasoning = self._criteria.take()
        return self._add(
            Step(
                _text(events),
                tokens,
                round_.logprobs,
                round_,
                perf_counter() - self._start,
                events=events,
                reasoning_tokens=reasoning,
            )
        )

    def finish(self, ending: Ending) -> Step:
        """Return the last step, for any reason. `ending` has what was used; its reason is replaced."""
        self.slot.used = monotonic()
        self.controller.stop_ahead()
        self.request.disarm()
        reason = self._criteria.reason or self.stats.stop_reason
        if self._constraint is not None and self._constraint.finished and self._criteria.reason is None:
            reason = "end"
        if self.request.cancelled:
            reason = "cancelled"
        events, tokens, reasoning = self._criteria.finish(cut=reason not in ("end", "stop"))
        if self._criteria.stopped_by is not None and reason != "cancelled":
            reason = "stop"
        ending = replace(ending, reason=reason, stopped_by=self._criteria.stopped_by)
        return self._add(
            Step(
                _text(events),
                tokens,
                seconds=perf_counter() - self._start,
                finished=ending,
                events=events,
                reasoning_tokens=reasoning,
            )
        )

    def _add(self, step: Step) -> Step:
        self.stats.add(step)
        return step


def _text(events: Sequence[OutputEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece))


def may_go_on(running: Sequence[RunningRequest], pool: SlotPool) -> list[RunningRequest]:
    """Return those of `running` that continue now; others wait for a prefill that they share.

    Programs that start at the same time often begin with the same system prompt and tools.
    """
    going: list[RunningRequest] = []
    for i, one in enumerate(running):
        if one.generation.lacking >= WORTH_SHARING:
            if any(one.waits_for(other) for other in running[:i]):
                continue
            one.share(pool)
        going.append(one)
    return going
