"""One loaded model, ready to answer: weights, draft, template and decoding loop put together.

Everything here runs in the thread that owns the models, except `Request.cancel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

from edgespec.acceptance import Acceptance
from edgespec.app import profile
from edgespec.app.corpus import index_for
from edgespec.control import Planner, best_case
from edgespec.core import Cancelled, EdgespecError, Round, TokenLogprob
from edgespec.costs import CostCurve
from edgespec.decode import generate
from edgespec.drafting import ModelDrafter
from edgespec.models.chat import ChatTemplate, Message
from edgespec.models.exact import exact_options
from edgespec.models.gguf_check import check_gguf
from edgespec.models.llama import LlamaModel, LlamaOptions
from edgespec.models.trimmed import open_draft
from edgespec.models.vocab import first_difference
from edgespec.oracle import model_runs, shortest, suffix_runs
from edgespec.retrieval import SuffixDrafter
from edgespec.sampling import Sampler, Sampling
from edgespec.text import TextStream

WORTH_LOADING = 1.1  # best case of a draft model, in plain decoding speeds: its memory must buy something

StopReason = Literal["end", "stop", "length", "context", "cancelled"]


@dataclass(slots=True)
class Request:
    """One answer to write after `prompt` (token ids). `max_tokens` 0 writes until the context is full."""

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    stops: Sequence[str] = ()
    speculate: bool = True
    cancelled: bool = False
    _interrupt: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Stop within one round. Any thread or signal handler may call this, even before the start."""
        self.cancelled = True
        if self._interrupt is not None:
            self._interrupt()


@dataclass(slots=True)
class Result:
    """What an answer was and cost. Times in seconds of wall time; complete when its iterator has ended."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason = "length"
    prompt_tokens: int = 0
    rounds: int = 0
    written: int = 0  # tokens of all rounds, the one that ended the answer included
    drafted: int = 0
    accepted: int = 0
    seconds_to_first_token: float = 0.0
    seconds: float = 0.0
    bookkeeping: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first round, which also reads the prompt. 0 for an answer of one round."""
        rest = self.seconds - self.seconds_to_first_token
        return (len(self.tokens) - 1) / rest if rest > 0 and len(self.tokens) > 1 else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.written / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that stood."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def bookkeeping_share(self) -> float:
        """The share of the time after the first token that was spent neither drafting nor in the target."""
        rest = self.seconds - self.seconds_to_first_token
        return self.bookkeeping / rest if rest > 0 else 0.0

    def count(self, round_: Round) -> None:
        if self.rounds:
            self.bookkeeping += round_.seconds - round_.drafting - round_.waiting
        self.rounds += 1
        self.written += len(round_.tokens)
        self.drafted += len(round_.draft.tokens)
        self.accepted += round_.accepted
        self.logprobs.extend(round_.logprobs)

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
            "tokens_per_round": round(self.tokens_per_round, 3),
            **({"logprobs": [_logprob_json(one) for one in self.logprobs]} if self.logprobs else {}),
        }


class Engine:
    """A target model with its drafters. `notes` are things the user should know, a sentence each."""

    def __init__(
        self,
        target: Path,
        draft: Path | None = None,
        *,
        suffix: bool = True,
        max_draft: int = 31,
        exact: bool = False,
        options: LlamaOptions | None = None,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Load `target`, and `draft` where it can pay. `exact` gives greedy text that no guess can change.

        Raises EdgespecError for what the user can mend, Cancelled when `progress` returns False.
        """
        self.notes: list[str] = []
        options = options or LlamaOptions()
        self.model = LlamaModel(target, exact_options(options) if exact else options, progress)
        self.draft: LlamaModel | None = None
        self.draft_path: Path | None = None  # of the draft model asked for, loaded or not
        self._draft_options = options  # without the recipe of `exact`: a draft's rounding changes nothing
        self._suffix = suffix
        self._max_draft = min(max_draft, self.model.options.max_rows - 1)
        try:
            self._sequence = self.model.sequence()
            if reason := self.model.rollback_refusal:
                self.notes.append(f"Decoding without speculation: {reason}.")
                self._suffix, draft = False, None
            self._costs = self._draft_costs = CostCurve({1: 1.0})
            self._acceptance = Acceptance()
            if max_draft and (self._suffix or draft is not None):
                self._costs = profile.curve(self._sequence, self.notes.append)
                self._acceptance = profile.acceptance(self.model)
                if exact:
                    self._costs.only(profile.exact_sizes(self._sequence, self.notes.append))
            self._corpus = None
            if max_draft and self._suffix:
                self._corpus = index_for(self.model.vocab, self.model.summary.tokenizer_digest)
            if draft is not None and max_draft:
                self._load_draft(draft, progress)
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
        options = replace(self._draft_options, context=self.model.context_length, sequences=1)
        summary = check_gguf(path)
        known = profile.known_curve(summary, options)
        fits = summary.tokenizer_digest == self.model.summary.tokenizer_digest
        if fits and known is not None and self._is_hopeless(path, known):
            return
        draft = open_draft(path, options, progress)
        try:
            same = draft.summary.tokenizer_digest == self.model.summary.tokenizer_digest
            difference = None if same else first_difference(self.model.vocab, draft.vocab)
            if reason := difference or draft.rollback_refusal:
                raise EdgespecError(
                    f"{path.name} cannot draft for {self.model.path.name}: {reason}. "
                    "Choose another with --draft, or none with --draft none."
                )
            sequence = draft.sequence()
            costs = profile.curve(sequence, self.notes.append)
        except BaseException:
            draft.close()
            raise
        if self._is_hopeless(path, costs):
            draft.close()
            return
        self.draft, self._draft_sequence, self._draft_costs = draft, sequence, costs

    def _is_hopeless(self, path: Path, costs: CostCurve) -> bool:
        best = best_case(self._costs, costs)
        if best < WORTH_LOADING:
            self.notes.append(
                f"{path.name} stays unloaded: even if nine of ten of its guesses stood, "
                f"this machine would decode at {best:.2f} times the plain speed."
            )
        return best < WORTH_LOADING

    def close(self) -> None:
        self.model.close()
        if self.draft is not None:
            self.draft.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def best_possible(self, prompt: Sequence[int], answer: Sequence[int]) -> float:
        """How many times faster than plain `answer` could have been written with perfect choice of length.

        With the drafters and the cost curves of this engine; `edgespec.oracle` says how. The caches are
        emptied. 1.0 for an answer too short to tell.
        """
        most = self._costs.largest - 1
        suffix = model = [0] * len(answer)
        if self._suffix:
            suffix = suffix_runs(prompt, answer, SuffixDrafter(self._corpus), most)
        if self.draft is not None:
            self.forget()
            sequence, rows = self._draft_sequence, self.draft.options.max_rows
            guesses = [int(sequence.forward(prompt)[0].argmax())]
            for start in range(0, len(answer) - 1, rows):
                new = answer[start : min(start + rows, len(answer) - 1)]
                guesses += [int(row.argmax()) for row in sequence.forward(new, len(new))]
            model = model_runs(guesses, answer, most)
        best = shortest(self._costs, suffix, model, self._draft_costs.seconds(1))
        return (len(answer) - 1) * self._costs.seconds(1) / best if best > 0.0 else 1.0

    def forget(self) -> None:
        """Empty the caches: the next answer reads its whole prompt."""
        self._sequence.rollback(0)
        if self.draft is not None:
            self._draft_sequence.rollback(0)

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Token ids of a conversation, ready for the model's answer. Text in messages stays text."""
        vocab = self.model.vocab
        if not self.template:
            text = "\n\n".join(str(message["content"]) for message in messages if message.get("content"))
            return vocab.tokenize(text, begin=True)
        segments = self.template.render(messages, tools=tools)
        tokens = [token for text in segments for token in vocab.tokenize(text, special=True)]
        # A template usually writes bos itself; some leave it to the tokenizer.
        if vocab.adds_bos and vocab.bos is not None and tokens[:1] != [vocab.bos]:
            tokens.insert(0, vocab.bos)
        return tokens

    def answer(self, request: Request, result: Result) -> Iterator[str]:
        """Write the answer, piece by piece of text that can no longer change; `result` fills up meanwhile.

        Raises EdgespecError when the prompt does not fit. A cancelled answer ends early and keeps its text.
        """
        prompt = request.prompt
        room = self.model.context_length - len(prompt)
        if not prompt:
            raise EdgespecError("The prompt is empty: write something for the model to answer.")
        if room < 1:
            raise EdgespecError(
                f"The prompt has {len(prompt)} tokens and the context holds {self.model.context_length}: "
                f"shorten it, or choose a larger context (--context {_next_size(len(prompt))})."
            )
        max_tokens = min(request.max_tokens or room, room)
        result.prompt_tokens = len(prompt)
        self._arm(request)
        ending = _Ending(self.model.vocab.is_end, self.model.vocab.piece, request.stops, result)
        start = perf_counter()
        rounds = generate(
            self._sequence,
            list(prompt),
            self._planner(request),
            Sampler(request.sampling, prompt),
            ending,
            max_tokens,
        )
        result.stop_reason = (
            "length" if request.max_tokens and max_tokens == request.max_tokens else "context"
        )
        try:
            while not request.cancelled and (round_ := next(rounds, None)) is not None:
                result.seconds = perf_counter() - start
                if not result.rounds:
                    result.seconds_to_first_token = result.seconds
                result.count(round_)
                yield from ending.new_text()
        except Cancelled:
            pass  # what the model holds is known, and the answer keeps what it has
        finally:
            request._interrupt = None
            rounds.close()
        if request.cancelled:
            result.stop_reason = "cancelled"
        ending.finish()
        self._keep()
        yield from ending.new_text()

    def _keep(self) -> None:
        """Save what this answer taught of costs and acceptance."""
        if self._max_draft and self._costs.largest > 1:
            profile.keep(self.model, self._costs)
            profile.keep_acceptance(self.model, self._acceptance)
            if self.draft is not None:
                profile.keep(self.draft, self._draft_costs)

    def _arm(self, request: Request) -> None:
        """Let `request.cancel` reach the models; one that came before this is seen by its flag."""
        models = [self.model, *([self.draft] if self.draft else [])]
        for model in models:
            model.uncancel()

        def interrupt() -> None:
            for model in models:
                model.cancel()

        request._interrupt = interrupt

    def _planner(self, request: Request) -> Planner:
        suffix = SuffixDrafter(self._corpus) if request.speculate and self._suffix else None
        model = None
        if request.speculate and self.draft is not None:
            settings = request.sampling
            # With a seed the text must not depend on how far was guessed, which the ratio rule would make it.
            q = Sampling()
            if settings.seed is None and settings.temperature > 0:
                q = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
            model = ModelDrafter(
                self._draft_sequence, self.draft.context_length, q, is_end=self.model.vocab.is_end
            )
        return Planner(self._costs, self._acceptance, suffix, model, self._draft_costs, self._max_draft)


class _Ending:
    """Watches the tokens of an answer as they become final: text, stop strings, end of generation."""

    def __init__(
        self,
        is_end: Callable[[int], bool],
        piece: Callable[[int], bytes],
        stops: Sequence[str],
        result: Result,
    ) -> None:
        self._is_end, self._piece = is_end, piece
        self._stream = TextStream(stops)
        self._result = result
        self._reason: StopReason | None = None

    def __call__(self, token: int) -> bool:
        if self._is_end(token):
            self._reason = "end"
            return True
        self._result.tokens.append(token)
        self._stream.push(self._piece(token))
        if self._stream.stopped is not None:
            self._reason = "stop"
        return self._reason is not None

    def new_text(self) -> Iterator[str]:
        if text := self._stream.take():
            self._result.text += text
            yield text

    def finish(self) -> None:
        self._stream.push(b"", final=True)
        if self._reason is not None:
            self._result.stop_reason = self._reason


def _logprob_json(one: TokenLogprob) -> dict[str, Any]:
    return {"token": one.token, "logprob": one.logprob, "top": [list(pair) for pair in one.top]}


def _next_size(tokens: int) -> int:
    """A round context size with room for an answer."""
    return ((tokens + 512) // 1024 + 1) * 1024
