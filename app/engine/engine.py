"""One loaded model, ready to answer: weights, draft, template and decoding loop put together.

Everything here runs in the thread that owns the models, except `Request.cancel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from edgespec.acceptance import Acceptance
from edgespec.app.engine import calibration
from edgespec.app.engine.corpus_store import index_for
from edgespec.app.engine.prompt_cache import PromptCache
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.app.engine.resources import ResourceController
from edgespec.app.engine.running import RunningRequest, Slot, borrow, choose_slot, first_readers
from edgespec.batch_planner import BatchPlanner
from edgespec.core import Cancelled, EdgespecError, Round
from edgespec.costs import CostCurve
from edgespec.decode import advance
from edgespec.drafting import ModelDrafter
from edgespec.machine.governor import Decision, Mode
from edgespec.models.exact import exact_options
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.memory import unless_too_large
from edgespec.models.onnx.model import OnnxOptions
from edgespec.models.prompting.chat_template import ChatTemplate, Message
from edgespec.models.prompting.tool_calls import folded, read_tools, syntax_of
from edgespec.models.runtime import (
    Model,
    ModelSequence,
    Options,
    check_model,
    load_draft,
    load_model,
    options_for,
    settled,
)
from edgespec.models.vocab import first_difference
from edgespec.overlap import AHEAD, pays
from edgespec.planner import FixedLength, Planner, best_case
from edgespec.retrieval import SuffixDrafter
from edgespec.sampling import Sampling

_CHUNK = 64  # tokens of a prompt that are read in a pass which others wait for
WORTH_LOADING = 1.1  # best case of a draft model, in plain decoding speeds: its memory must buy something


class Engine:
    """A target model with its drafters. `notes` are things the user should know, a sentence each."""

    def __init__(
        self,
        target: Path,
        draft: Path | None = None,
        *,
        suffix: bool = True,
        max_draft: int = 31,
        mode: Mode = "auto",
        exact: bool = False,
        parallel: int = 1,
        options: Options | None = None,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Load `target`, and `draft` where it can pay. `exact` gives greedy text that no guess can change.

        `mode` is the governor's; `choose` changes it. `parallel` texts fit in at once, each with a context of
        `options.context` tokens.

        Raises EdgespecError for what the user can mend, Cancelled when `progress` returns False.
        """
        self.notes: list[str] = []
        self.prompt_cache: PromptCache | None = None  # for those who answer several conversations in turn
        options = replace(options_for(target, options or LlamaOptions()), sequences=parallel)
        chosen = exact_options(options) if exact else options
        self.model: Model = load_model(target, chosen, progress, self.notes.append)
        self.draft: Model | None = None
        self._resources: ResourceController | None = None
        self.draft_path: Path | None = None  # of the draft model asked for, loaded or not
        self._draft_options = options  # without the recipe of `exact`: a draft's rounding changes nothing
        self.retrieves = suffix
        self._ahead = 0  # tokens that the draft model may go on by while the target checks
        self._max_draft = min(max_draft, self.model.options.max_rows - 1)
        try:
            self._resting: Round | None = None
            # Exact answers need batches of certain sizes, which company would change.
            self._together = self.model.shares_passes and not exact
            self._sharing = BatchPlanner(lambda: self.resources.costs)
            self.context_length = self.model.context_length
            self.slots = [Slot(self.model.sequence()) for _ in range(parallel)]
            self._sequence = self.slots[0].sequence
            if reason := self.model.rollback_refusal:
                self.notes.append(f"Decoding without speculation: {reason}.")
                self.retrieves, draft = False, None
            self.costs = self.draft_costs = CostCurve({1: 1.0})
            self._acceptance = Acceptance()
            if max_draft and (self.retrieves or draft is not None):
                self.costs = calibration.curve(self._sequence, self.notes.append)
                self._acceptance = calibration.acceptance(self.model)
                if exact:
                    self.costs.only(calibration.exact_sizes(self._sequence, self.notes.append))
            self.resources = self._resources = ResourceController(
                self._sequence,
                self.costs,
                mode,
                most=self._max_draft,
                fixed_threads=exact or self.model.fixed_threads,  # exact: another would round differently
                note=self.notes.append,
            )
            self.corpus = None
            if max_draft and self.retrieves:
                self.corpus = index_for(self.model.vocab, self.model.summary.tokenizer_digest)
            if draft is not None and max_draft:
                with unless_too_large(self.notes.append):
                    self._load_draft(draft, progress)
            self.notes[:] = dict.fromkeys(self.notes)  # what both models gave up is said once
            source = self.model.chat_template
            if source is None:
                self.notes.append(f"{target.name} has no chat template: it continues the prompt as it is.")
            vocab = self.model.vocab
            names = [vocab.text(token) if token is not None else "" for token in (vocab.bos, vocab.eos)]
            self.template = source and ChatTemplate(
                source, bos=names[0], eos=names[1], control_tokens=vocab.control_texts()
            )
        except BaseException:
            self.close()
            raise

    def _load_draft(self, path: Path, progress: Callable[[float], bool] | None) -> None:
        """Load the draft model, unless it is known or found that it cannot pay on this machine."""
        self.draft_path = path
        # A trimmed draft has few logits, and many rows of it are only read: room for as many as are measured.
        summary = check_model(path)
        options = options_for(path, replace(self._draft_options, context=self.context_length))
        if isinstance(options, OnnxOptions):
            options = replace(options, providers=calibration.providers(summary))
        known = calibration.known_curve(summary, settled(path, options, progress, self.notes.append))
        digests = self.model.summary.tokenizer_digest, summary.tokenizer_digest
        fits = digests[0] == digests[1] or calibration.agree(*digests)
        if fits and known is not None and self._is_hopeless(path, known):
            return
        draft = load_draft(path, options, progress, self.notes.append)
        try:
            difference = self._difference(draft)
            if reason := difference or draft.rollback_refusal:
                raise EdgespecError(
                    f"{path.name} cannot draft for {self.model.path.name}: {reason}. "
                    "Choose another with --draft, or none with --draft none."
                )
            sequences = [draft.sequence() for _ in self.slots]
            speed = self.model.summary.tensor_bytes / self.costs.pace
            costs = calibration.curve(sequences[0], self.notes.append, bandwidth=speed)
        except BaseException:
            draft.close()
            raise
        if self._is_hopeless(path, costs):
            draft.close()
            return
        self.draft, self.draft_costs = draft, costs
        for slot, sequence in zip(self.slots, sequences, strict=True):
            slot.drafting = sequence
        self._draft_threads = draft.threads  # that the curve is of
        self._ahead = AHEAD if self._may_overlap(draft, sequences[0]) else 0

    def _may_overlap(self, draft: Model, drafting: ModelSequence) -> bool:
        """Whether the draft model may go on while the target checks: measured where they share no cores."""
        if self.model.on_cpu and draft.on_cpu:
            return False
        together = calibration.together(self._sequence, drafting, self.notes.append)
        return pays(self.costs, self.draft_costs, together)

    def _difference(self, draft: Model) -> str | None:
        """What keeps `draft` from guessing for the target. Vocabularies that agree are compared once."""
        digests = [model.summary.tokenizer_digest for model in (self.model, draft)]
        if digests[0] == digests[1] or calibration.agree(*digests):
            return None
        difference = first_difference(self.model.vocab, draft.vocab)
        if difference is None:
            calibration.keep_agreement(*digests)
        return difference

    def _is_hopeless(self, path: Path, costs: CostCurve) -> bool:
        best = best_case(self.costs, costs)
        if best < WORTH_LOADING:
            self.notes.append(
                f"{path.name} stays unloaded: even if nine of ten of its guesses stood, "
                f"this machine would decode at {best:.2f} times the plain speed."
            )
        return best < WORTH_LOADING

    def close(self) -> None:
        if self.prompt_cache is not None:
            self.prompt_cache.close()
        if self._resources is not None:
            self._resources.close()
        self.model.close()
        if self.draft is not None:
            self.draft.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def choose(self, mode: Mode) -> Decision:
        """Change what the machine may give. Any thread may call this; an answer follows within a second."""
        return self.resources.governor.choose(mode)

    @property
    def decision(self) -> Decision:
        """What the governor allows at this moment, and why."""
        return self.resources.governor.decision

    def forget(self) -> None:
        """Empty the caches: the next answer reads its whole prompt."""
        for slot in self.slots:
            slot.forget()

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer. Text in messages stays text.

        `tools` are in OpenAI's form. Where the template says nothing of tools, the system prompt does.
        """
        vocab = self.model.vocab
        if syntax_of(self.model.chat_template).taught:
            messages, tools = folded(messages, read_tools(tools or ())), None
        if not self.template:
            text = "\n\n".join(str(message["content"]) for message in messages if message.get("content"))
            return vocab.tokenize(text, begin=True)
        segments = self.template.render(messages, tools=tools)
        tokens = [token for text in segments for token in vocab.tokenize(text, special=True)]
        # A template usually writes bos itself; some leave it to the tokenizer.
        if vocab.adds_bos and vocab.bos is not None and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens

    def answer(self, request: Request, result: GenerationStats) -> Iterator[str]:
        """Write the answer, piece by piece of text that can no longer change; `result` fills up meanwhile.

        Raises EdgespecError when the prompt does not fit. A cancelled answer ends early and keeps its text.
        """
        writing = self.begin(request, result, [self.slots[0]])
        try:
            while not writing.over:
                for _, text in self.advance([writing]):
                    if text:
                        yield text
        finally:
            rest = self.finish(writing)
        if rest:
            yield rest

    def begin(self, request: Request, result: GenerationStats, free: Sequence[Slot]) -> RunningRequest:
        """An answer to be written in that one of the `free` slots which holds most of its prompt.

        Raises EdgespecError when the prompt does not fit.
        """
        prompt = request.prompt
        room = self.context_length - len(prompt)
        if not prompt:
            raise EdgespecError("The prompt is empty: write something for the model to answer.")
        if room < 1:
            raise ContextFullError(
                f"The prompt has {len(prompt)} tokens and the context holds {self.context_length}: "
                f"shorten it, or choose a larger context (--context {_next_size(len(prompt))})."
            )
        slot = (
            self.prompt_cache.arrange(free, prompt)
            if self.prompt_cache is not None
            else choose_slot(free, prompt)
        )
        borrow(slot, self.slots, prompt)
        planner = self._planner(request, slot)
        writing = RunningRequest(
            request, result, slot, planner, self.model.vocab, room, lambda: self.resources.costs
        )
        self._arm(request)
        self.resources.begin(planner, self.draft)
        return writing

    def advance(self, writings: Sequence[RunningRequest]) -> list[tuple[RunningRequest, str]]:
        """A round of all of `writings`, none of which is over: those it brought on, and their text.

        In as few forward passes as the engine allows. When one of them is cancelled, its pass
        may be cut short and bring on none.
        """
        if self._resting is not None:  # only now: what the last pass brought was heard of before
            self.resources.rest(self._resting, lambda: any(one.request.cancelled for one in writings))
        planners = [writing.planner for writing in writings]
        if self._together:
            writings = first_readers(writings, self.slots)
        passes = self._passes(writings)
        writings = [writing for together in passes for writing in together]
        chunk = _CHUNK if len(writings) > 1 else self.context_length
        rounds: list[Round | None] = []
        forward, rows = self.model.forward, self.model.options.max_rows
        try:
            for together in passes:
                texts = [writing.text for writing in together]
                rounds += advance(texts, forward, rows, chunk, self._sharing)
        except Cancelled:
            rounds += [None] * (len(writings) - len(rounds))
        done = [(w, round_) for w, round_ in zip(writings, rounds, strict=True) if round_ is not None]
        news = [(writing, writing.took(round_)) for writing, round_ in done]
        for writing, round_ in done:
            if writing.first is round_:
                self.resources.mark(writing.result)
        # A pass that read a prompt says nothing of what rows cost.
        if done and all(writing.first is not round_ for writing, round_ in done):
            self.resources.after(done[0][1], planners, self.draft)
        self.resources.steer(planners, self.draft)
        self._resting = done[0][1] if done else None
        return news

    def _passes(self, writings: Sequence[RunningRequest]) -> list[list[RunningRequest]]:
        """Which of `writings` share a pass: those in slots side by side, where passes are shared at all.

        Given others at once, llama.cpp would evaluate them one after the other, too.
        """
        placed = {writing.slot: writing for writing in writings}
        passes: list[list[RunningRequest]] = []
        beside = False  # the one in the slot before
        for slot in self.slots:
            writing = placed.get(slot)
            if writing is not None and beside:
                passes[-1].append(writing)
            elif writing is not None:
                passes.append([writing])
            beside = self._together and writing is not None
        return passes

    def finish(self, writing: RunningRequest) -> str:
        """An answer is over or given up: keep what it taught, and return the rest of its text."""
        self.resources.report(writing.result)
        rest = writing.end()
        self._keep()
        return rest

    def _keep(self) -> None:
        """Save what this answer taught of costs and acceptance."""
        if self._max_draft and self.costs.largest > 1:
            self.resources.keep()
            calibration.keep_acceptance(self.model, self._acceptance)
            if self.draft is not None and self.draft.threads == self._draft_threads:
                calibration.keep(self.draft, self.draft_costs, self._draft_threads)

    def _arm(self, request: Request) -> None:
        """Let `request.cancel` reach the models; one that came before this is seen by its flag."""
        models = [self.model, *([self.draft] if self.draft else [])]
        for model in models:
            model.uncancel()

        def interrupt() -> None:
            for model in models:
                model.cancel()

        request.arm(interrupt)

    def _planner(self, request: Request, slot: Slot) -> Planner | FixedLength:
        suffix = SuffixDrafter(self.corpus) if request.speculate and self.retrieves else None
        model = None
        if request.speculate and self.draft is not None and slot.drafting is not None:
            settings = request.sampling
            # With a seed the text must not depend on how far was guessed, which the ratio rule would make it.
            q = Sampling()
            if settings.seed is None and settings.temperature > 0:
                q = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
            model = ModelDrafter(slot.drafting, self.draft.context_length, q, is_end=self.model.vocab.is_end)
        if request.fixed_draft is not None:
            return FixedLength(request.fixed_draft, suffix, model)
        most = self._max_draft if request.max_draft is None else min(request.max_draft, self._max_draft)
        return Planner(self.costs, self._acceptance, suffix, model, self.draft_costs, most, self._ahead)


class ContextFullError(EdgespecError):
    """A prompt that does not fit into the context."""


def _next_size(tokens: int) -> int:
    """A round context size with room for an answer."""
    return ((tokens + 512) // 1024 + 1) * 1024
