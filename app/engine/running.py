"""An answer on its way: one slot of a model, the text that grows in it, and what is heard of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter

from edgespec.app.engine.request import GenerationStats, Request, StopCriteria, StopReason
from edgespec.core import Round, common_prefix
from edgespec.costs import CostCurve
from edgespec.decode import Generation
from edgespec.grammar_drafting import GrammarDrafter, until_finished
from edgespec.models.runtime import ModelSequence
from edgespec.models.vocab import Vocabulary
from edgespec.planner import FixedLength, Planner
from edgespec.sampling import Sampler

_WORTH_SHARING = 16  # tokens


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one text: a sequence of the target and one of the draft model, with what they hold."""

    sequence: ModelSequence
    drafting: ModelSequence | None = None
    used: float = 0.0

    def forget(self) -> None:
        self.sequence.rollback(0)
        if self.drafting is not None:
            self.drafting.rollback(0)


def choose_slot(slots: Sequence[Slot], prompt: Sequence[int]) -> Slot:
    """The one that `prompt` goes on from, else an empty one, else the one not used for longest.

    A slot whose text has little more than its beginning in common with `prompt` belongs to another
    conversation with the same system prompt.
    """

    def rank(slot: Slot) -> tuple[int, bool, float]:
        held = slot.sequence.tokens
        common = common_prefix(held, prompt)
        return common if 2 * common > len(held) else 0, not held, -slot.used

    return max(slots, key=rank)


def borrow(slot: Slot, slots: Sequence[Slot], prompt: Sequence[int]) -> None:
    """Let `slot` share what another one, in use or not, has read of `prompt`, if that is more."""
    held = common_prefix(slot.sequence.tokens, prompt)
    for other in slots:
        common = common_prefix(other.sequence.tokens, prompt)
        if (
            other is not slot
            and common >= held + _WORTH_SHARING
            and slot.sequence.share(other.sequence, common)
        ):
            held = common


def first_readers(writings: Sequence[RunningRequest], slots: Sequence[Slot]) -> list[RunningRequest]:
    """Those of `writings` that go on now: who lacks what an earlier one is about to read waits for it.

    Programs that start at once often begin with the same system prompt and tools.
    """
    going: list[RunningRequest] = []
    for i, one in enumerate(writings):
        if one.text.lacking >= _WORTH_SHARING:
            if any(one.waits_for(other) for other in writings[:i]):
                continue
            one.borrow(slots)
        going.append(one)
    return going


class RunningRequest:
    """One answer. `text` is what `decode.advance` drives; `took` and `end` follow what comes of it."""

    def __init__(
        self,
        request: Request,
        result: GenerationStats,
        slot: Slot,
        planner: Planner | FixedLength,
        vocab: Vocabulary,
        room: int,
        costs: Callable[[], CostCurve],
    ) -> None:
        """`room` tokens fit into the context after the prompt."""
        self.request, self.result, self.slot, self.planner = request, result, slot, planner
        self.first: Round | None = None
        most = min(request.max_tokens or room, room)
        result.prompt_tokens = len(request.prompt)
        result.cached_tokens = min(
            common_prefix(slot.sequence.tokens, request.prompt), len(request.prompt) - 1
        )
        result.stop_reason = "length" if request.max_tokens and most == request.max_tokens else "context"
        self._ending = StopCriteria(vocab.is_end, vocab.piece, request.stops, result)
        constraint = request.constraint() if request.constraint is not None else None
        self._constraint = constraint
        self.text = Generation(
            slot.sequence,
            list(request.prompt),
            GrammarDrafter(planner, constraint, costs)
            if constraint is not None and request.speculate
            else planner,
            Sampler(request.sampling, request.prompt, constraint),
            self._ending if constraint is None else until_finished(constraint, self._ending),
            most,
        )
        self._start = perf_counter()

    @property
    def over(self) -> bool:
        return self.text.over or self.request.cancelled

    def waits_for(self, other: RunningRequest) -> bool:
        """`other` is reading what this prompt begins with too."""
        read, wanted = other.text.target.tokens, common_prefix(other.text.context, self.request.prompt)
        return len(read) < wanted and wanted >= len(self.text.target.tokens) + _WORTH_SHARING

    def borrow(self, slots: Sequence[Slot]) -> None:
        """Go on from what another slot has read of the prompt by now, if that is more."""
        held = len(self.text.target.tokens)
        borrow(self.slot, slots, self.request.prompt[:-1])
        if len(self.text.target.tokens) > held:
            self.result.cached_tokens = len(self.text.target.tokens)

    def took(self, round_: Round) -> str:
        """Count a round; returns text that can no longer change."""
        result = self.result
        result.seconds = perf_counter() - self._start
        if self.first is None:
            self.first, result.seconds_to_first_token = round_, result.seconds
        result.count(round_)
        return self._ending.new_text()

    def end(self) -> str:
        """The answer is over, whatever ended it; returns the rest of the text. Raises what made it fail."""
        self.slot.used = monotonic()
        self.planner.settle()
        self.request.disarm()
        if self._constraint is not None and self._constraint.finished:
            self.result.stop_reason = "end"
        self._ending.finish()
        if self.request.cancelled:
            cancelled: StopReason = "cancelled"
            self.result.stop_reason = cancelled
        if self.text.error is not None:
            raise self.text.error
        return self._ending.new_text()
