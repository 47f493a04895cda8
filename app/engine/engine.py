"""One loaded model that generates answers: target, drafters and slots of the KV cache.

Everything here runs in the thread that owns the models, except `Request.cancel` and `Engine.choose`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from edgespec.app.engine import calibration
from edgespec.app.engine.drafters import Drafters
from edgespec.app.engine.marks import marks
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.resources import ResourceController
from edgespec.app.engine.running import RunningRequest, may_go_on
from edgespec.app.engine.slots import Slot, SlotPool
from edgespec.batch_planner import BatchPlanner
from edgespec.core import Cancelled, EdgespecError, Round
from edgespec.decode import advance
from edgespec.machine.governor import Decision, Mode
from edgespec.models.prompting.call_syntax import syntax_of
from edgespec.models.prompting.chat_template import ChatTemplate, Message
from edgespec.models.prompting.conversation import TemplateFit
from edgespec.models.prompting.tool_calls import folded, read_tools, with_calls_as_text
from edgespec.models.runtime import Model

_CHUNK = 64  # tokens of a prompt that are evaluated in a batch which others wait for


class Engine:
    """Answers requests with a target model. `notes` are one-line messages for the user.

    `assembly.open_engine` builds one from files. The engine owns all that it is given, and closes it.
    """

    def __init__(
        self,
        model: Model,
        pool: SlotPool,
        drafters: Drafters,
        resources: ResourceController,
        template: ChatTemplate | None = None,
        *,
        exact: bool = False,
        notes: list[str] | None = None,
    ) -> None:
        """`exact`: batches have sizes that give the logits of single rows, so generations share none."""
        self.model, self.pool, self.drafters, self.resources = model, pool, drafters, resources
        self.template = template
        self._fit = TemplateFit(template) if template is not None else None
        self.notes: list[str] = [] if notes is None else notes  # grows later
        self.context_length = model.context_length
        self._shares_batches = model.shares_passes and not exact
        self._batch_planner = BatchPlanner(lambda: resources.costs)
        self._last: Round | None = None  # followed by the pause of the budget

    @property
    def draft(self) -> Model | None:
        """The draft model, if one is loaded."""
        return self.drafters.draft.model if self.drafters.draft is not None else None

    def close(self) -> None:
        self.pool.close()
        self.resources.close()
        self.model.close()
        if self.draft is not None:
            self.draft.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose(self, mode: Mode) -> Decision:
        """Change the mode of the governor. Any thread may call this; it applies within a second."""
        return self.resources.governor.choose(mode)

    @property
    def decision(self) -> Decision:
        """The governor's current decision and its reason."""
        return self.resources.governor.decision

    def forget(self) -> None:
        """Empty the KV cache: the next answer evaluates its whole prompt."""
        self.pool.forget()

    def chat_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        *,
        continues: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation, ready for the answer. Control tokens in messages are text.

        `tools` are in OpenAI's form. If the template does not describe tools, the system prompt does.
        `variables` are further ones of the template (`enable_thinking`). If it `continues`, the last message
        is the beginning of the answer.
        """
        vocab = self.model.vocab
        if continues:
            start = str(messages[-1].get("content") or "")
            return self.chat_prompt(messages[:-1], tools, variables) + (
                vocab.tokenize(start) if start else []
            )
        syntax = syntax_of(self.model.chat_template)
        if syntax.taught:
            messages, tools = folded(messages, read_tools(tools or ()), syntax), None
        messages = with_calls_as_text(messages, self.model.chat_template or "")
        if not self.template or self._fit is None:
            text = "\n\n".join(str(message["content"]) for message in messages if message.get("content"))
            return vocab.tokenize(text, begin=True)
        segments = self.template.render(self._fit.fitted(messages), tools=tools, extra=variables)
        tokens = [token for text in segments for token in vocab.tokenize(text, special=True)]
        # A template usually contains bos itself; some leave it to the tokenizer.
        if vocab.adds_bos and vocab.bos is not None and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens

    def generate(self, request: Request) -> Answering:
        """Answer in the first slot, step by step: an iterator.

        Raises EdgespecError if the prompt does not fit. A canceled answer ends early and keeps its text.
        """
        return Answering(self, request)

    def begin(self, request: Request, free: Sequence[Slot]) -> RunningRequest:
        """Place a request in the one of the `free` slots that holds most of its prompt.

        Raises EdgespecError if the prompt does not fit.
        """
        prompt = request.prompt
        room = self.context_length - len(prompt)
        if not prompt:
            raise EdgespecError("the prompt is empty: write something for the model to answer")
        if room < 1:
            raise ContextFullError(
                f"the prompt has {len(prompt)} tokens and the context {self.context_length}: "
                f"shorten it, or choose a larger context (--context {_next_size(len(prompt))})"
            )
        slot, cached = self.pool.place(prompt, free)
        if self.model.undo is not None:
            slot.sequence.mark_at(marks(prompt, self.model.vocab.is_control))
        constraint = request.constraint() if request.constraint is not None else None
        controller = self.drafters.controller(request, slot, constraint, self.resources.costs)
        running = RunningRequest(request, slot, cached, controller, constraint, self.model.vocab, room)
        self._arm(request)
        self.resources.begin(controller, self.draft)
        return running

    def step(self, running: Sequence[RunningRequest]) -> list[tuple[RunningRequest, Step]]:
        """Run a round of all of `running`, none of which is over; return the steps of those that advanced.

        In as few forward passes as the model allows. If one of them is canceled, its pass may be cut short
        and yield no step.
        """
        if self._last is not None:  # only here, after the steps of the last pass have been delivered
            self.resources.rest(self._last, lambda: any(one.request.cancelled for one in running))
        controllers = [one.controller for one in running]
        going = may_go_on(running, self.pool) if self._shares_batches else running
        done = self._advance(going)
        steps = [(one, one.step(round_)) for one, round_ in done]
        for one, round_ in done:
            if one.first is round_:
                self.resources.mark(one)
        # A pass with a prefill does not show the cost of rows.
        if done and all(one.first is not round_ for one, round_ in done):
            self.resources.after(done[0][1], controllers, self.draft)
        self.resources.steer(controllers, self.draft)
        self._last = done[0][1] if done else None
        return steps

    def finish(self, running: RunningRequest) -> Step:
        """End an answer that is over or canceled: save what it measured, and return its last step.

        Raises the EdgespecError that made it fail.
        """
        step = running.finish(self.resources.ending(running))
        self._keep()
        if running.generation.error is not None:
            raise running.generation.error
        return step

    def _advance(self, running: Sequence[RunningRequest]) -> list[tuple[RunningRequest, Round]]:
        """Run one round of each that is not canceled."""
        batches = self._batches(running)
        chunk = _CHUNK if len(running) > 1 else self.context_length
        forward, rows = self.model.forward, self.model.options.max_rows
        rounds: list[Round | None] = []
        try:
            for batch in batches:
                rounds += advance(
                    [one.generation for one in batch], forward, rows, chunk, self._batch_planner
                )
        except Cancelled:
            pass
        order = [one for batch in batches for one in batch]
        return [(one, round_) for one, round_ in zip(order, rounds, strict=False) if round_ is not None]

    def _batches(self, running: Sequence[RunningRequest]) -> list[list[RunningRequest]]:
        """Return which of `running` share a forward pass: those in adjacent slots, if the model allows it.

        llama.cpp would evaluate other slots one after the other, too.
        """
        placed = {one.slot: one for one in running}
        batches: list[list[RunningRequest]] = []
        adjacent = False  # the slot before is in use
        for slot in self.pool.slots:
            one = placed.get(slot)
            if one is not None and adjacent:
                batches[-1].append(one)
            elif one is not None:
                batches.append([one])
            adjacent = self._shares_batches and one is not None
        return batches

    def _keep(self) -> None:
        """Save what this answer measured of costs and acceptance."""
        drafters = self.drafters
        if drafters.most and self.resources.measured.largest > 1:
            self.resources.keep()
            calibration.keep_acceptance(self.model, drafters.acceptance)
            draft = drafters.draft
            if draft is not None and draft.model.threads == draft.threads:
                calibration.keep(draft.model, draft.costs, draft.threads)

    def _arm(self, request: Request) -> None:
        """Let `request.cancel` interrupt the models; an earlier call is seen by its flag."""
        models = [self.model, *([self.draft] if self.draft else [])]
        for model in models:
            model.uncancel()

        def interrupt() -> None:
            for model in models:
                model.cancel()

        request.arm(interrupt)


class Answering:
    """The steps of one answer. `stats` is complete when the iterator ends, also if it is closed early."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.stats = GenerationStats(prompt_tokens=len(request.prompt))
        self._steps = self._generate(engine, request)

    def __iter__(self) -> Iterator[Step]:
        return self._steps

    def _generate(self, engine: Engine, request: Request) -> Iterator[Step]:
        running = engine.begin(request, engine.pool.slots[:1])
        self.stats = running.stats
        try:
            while not running.over:
                yield from (step for _, step in engine.step([running]))
        except BaseException:
            engine.finish(running)
            raise
        yield engine.finish(running)


class ContextFullError(EdgespecError):
    """A prompt that does not fit into the context."""


def _next_size(tokens: int) -> int:
    """A round context size with room for an answer."""
    return ((tokens + 512) // 1024 + 1) * 1024
