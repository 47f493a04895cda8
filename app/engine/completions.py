"""Requests to streams of deltas: rendering, compiling, queueing, parsing.

Used by the HTTP server and by `edgespec mcp`. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol, Self, TypeVar

from edgespec.app.engine.constraints import FREE, ConstraintCompiler, Format, OutputConstraint
from edgespec.app.engine.early_end import EarlyEnd
from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import QueuedRequest, Scheduler, StoppingError
from edgespec.app.engine.tool_names import ToolNames
from edgespec.app.engine.worker import SerialWorker
from edgespec.core import EdgespecError, TokenLogprob
from edgespec.models.prompting.chat_template import Message
from edgespec.models.prompting.fim import FimPrompt, fim_ids, fim_tokens, written_tokens
from edgespec.models.prompting.output_events import Called, OutputEvent
from edgespec.models.prompting.tool_calls import ToolChoice, read_tools
from edgespec.models.runtime import Model
from edgespec.models.sampling_defaults import sampling_defaults
from edgespec.sampling import Sampling

T = TypeVar("T")
_NO_TOOLS = ToolChoice("none")
_ANSWER = 256  # tokens of the context that are kept for what fills a gap
_NO_NAMES = ToolNames(())


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A conversation to continue, or a `prompt` (text, token ids, or around a gap), `count` times.

    If it `continues`, the last message is the beginning of the answer. `variables` are for the chat template.
    `tools` are in OpenAI's form. `format` is the grammar of the output; if `lenient`, the parts of its schema
    that no grammar can keep are left to the client. `unset` names the settings of `sampling` that the client
    left open: there, what the model's own files recommend takes precedence. After `line_seconds` the output
    ends with its next complete line. `max_draft` bounds the draft tokens of a round; 0 turns drafting off.
    Requests of different `user`s take turns.
    """

    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] | FimPrompt = ""
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = _NO_TOOLS
    format: Format | None = None
    lenient: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    unset: frozenset[str] = frozenset()
    max_tokens: int = 0
    stops: Sequence[str] = ()
    line_seconds: float | None = None
    max_draft: int | None = None
    count: int = 1
    user: str = ""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A GenerationRequest with its prompt as token ids and its grammar compiled."""

    request: GenerationRequest
    prompt: list[int]
    constraint: OutputConstraint = FREE
    names: ToolNames = _NO_NAMES


@dataclass(frozen=True, slots=True)
class Delta:
    """An addition to output `index`. `tokens` are those that became final, with their `logprobs`."""

    index: int
    events: Sequence[OutputEvent]
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Finished:
    """Output `index` is complete, or has failed with `error`."""

    index: int
    stats: GenerationStats
    error: Exception | None = None


class CompletionObserver(Protocol):
    """Is notified of every finished generation, for the metrics."""

    def finished(self, stats: GenerationStats, error: Exception | None, seconds: float) -> None: ...


class CompletionService:
    """Prepares and submits requests. All methods but `stop` are called in one event loop."""

    def __init__(self, scheduler: Scheduler, observer: CompletionObserver | None = None) -> None:
        self.scheduler = scheduler
        self._engine = scheduler.engine
        self._vocab = scheduler.engine.model.vocab
        self._observer = observer
        self._queued: set[QueuedRequest] = set()
        # One thread each, so that neither a slow template nor a slow grammar delays other requests for long.
        self._rendering, self._compiling = SerialWorker(), SerialWorker()
        self._compiler = ConstraintCompiler(self._vocab, scheduler.engine.model.chat_template)
        self._stopped = False
        self._fim = fim_tokens(self._vocab, scheduler.engine.model.metadata)
        self._defaults = sampling_defaults(scheduler.engine.model.metadata)

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    @property
    def model(self) -> Model:
        return self._engine.model

    @property
    def fills_in(self) -> bool:
        """Whether the model has tokens to fill in the middle."""
        return self._fim is not None

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Render, tokenize and compile `request` outside the event loop.

        Raises ContextFullError if the prompt does not fit, EdgespecError for other invalid requests.
        """
        self.check_tokens(list(request.sampling.logit_bias))
        defaults = {name: value for name, value in self._defaults.items() if name in request.unset}
        request = replace(request, sampling=replace(request.sampling, **defaults))
        names = ToolNames(request.tools)
        request = _renamed(request, names)
        described = read_tools(request.tools)
        tools = request.tools if request.choice.mode != "none" else ()
        prompt = await _in_thread(self._rendering, lambda: self._prompt(request, tools))
        if len(prompt) >= self.context_length:
            raise ContextFullError(
                f"This model's maximum context length is {self.context_length} tokens and the prompt has "
                f"{len(prompt)}: shorten it, or start the server with a larger --context."
            )
        if request.messages is None and request.format is None:
            return PreparedRequest(request, prompt)
        allowed = described if tools else []
        constraint = await _in_thread(
            self._compiling,
            lambda: self._compiler.shape(
                allowed, request.choice, request.format, prompt, lenient=request.lenient
            ),
        )
        return PreparedRequest(request, prompt, constraint, names)

    def submit(self, prepared: PreparedRequest, client: str = "") -> ResponseStream:
        """Queue `prepared` for `client`. The caller closes the result.

        Raises BusyError if the queue is full, StoppingError after `stop`.
        """
        if self._stopped:
            raise StoppingError("The server is stopping.")
        response = ResponseStream(self, prepared)
        try:
            for index in range(response.count):
                queued = self.scheduler.submit(
                    self._request(prepared, index),
                    _StreamListener(response, index),
                    f"{client}/{prepared.request.user}",
                )
                response.queued.append(queued)
                self._queued.add(queued)
        except BaseException:
            response.close()
            raise
        return response

    def forget(self, queued: Sequence[QueuedRequest]) -> None:
        self._queued.difference_update(queued)

    def observe(self, finished: Finished, seconds: float) -> None:
        if self._observer is not None:
            self._observer.finished(finished.stats, finished.error, seconds)

    def stop(self) -> None:
        """Cancel every request and accept no more."""
        self._stopped = True
        for queued in list(self._queued):
            queued.cancel()

    def close(self) -> None:
        """Stop, and wait for the threads that use the model's vocabulary, which may be freed after that."""
        self.stop()
        for thread in (self._rendering, self._compiling):
            thread.close()

    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        return self._vocab.tokenize(text, special=special, begin=begin)

    def text_of(self, tokens: Sequence[int]) -> str:
        return self._vocab.detokenize(tokens)

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token, none for a control token."""
        return self._vocab.piece(token)

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise EdgespecError for ids outside the vocabulary."""
        size = self._vocab.size
        for token in tokens:
            if not 0 <= token < size:
                raise EdgespecError(f"{token} is not a token of this model, which has 0 to {size - 1}.")

    def _request(self, prepared: PreparedRequest, index: int) -> Request:
        request = prepared.request
        sampling = request.sampling
        if index and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        return Request(
            prepared.prompt,
            sampling,
            request.max_tokens,
            request.stops,
            speculate=request.max_draft != 0,
            max_draft=request.max_draft,
            constraint=prepared.constraint.start,
            form=prepared.constraint.form,
        )

    def _prompt(self, request: GenerationRequest, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        if request.messages is not None:
            return self._engine.chat_prompt(
                request.messages, [*tools] or None, request.variables, continues=request.continues
            )
        if isinstance(request.prompt, FimPrompt):
            if self._fim is None:
                raise EdgespecError("This model has no tokens to fill in the middle: leave out the suffix.")
            room = self.context_length - 1 - min(request.max_tokens or _ANSWER, self.context_length // 2)
            return fim_ids(self._vocab, self._fim, request.prompt, room)
        if isinstance(request.prompt, str):
            return written_tokens(self._vocab, self._fim, request.prompt)
        self.check_tokens(request.prompt)
        return list(request.prompt)


class ResponseStream:
    """An async iterator over what is generated for one prepared request, which has `count` outputs.

    The last item of each output is a Finished. The caller closes the stream, which cancels the rest.
    """

    def __init__(self, service: CompletionService, prepared: PreparedRequest) -> None:
        self.count = prepared.request.count
        self.queued: list[QueuedRequest] = []
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[_Stepped | Finished] = asyncio.Queue()
        self._ready: deque[Delta | Finished] = deque()
        self._names = prepared.names
        self._ends = [EarlyEnd(prepared.request.line_seconds) for _ in range(self.count)]
        self._open = self.count
        self._started = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta | Finished:
        while not self._ready:
            if not self._open:
                raise StopAsyncIteration
            self._add(await self._items.get())
        return self._ready.popleft()

    def close(self) -> None:
        for queued in self.queued:
            queued.cancel()
        self._service.forget(self.queued)

    def send(self, item: _Stepped | Finished) -> None:
        """Called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._receive, item)

    def _receive(self, item: _Stepped | Finished) -> None:
        self._items.put_nowait(item)
        if isinstance(item, Finished):
            self._correct(item)
            self._service.observe(item, monotonic() - self._started)

    def _add(self, item: _Stepped | Finished) -> None:
        end = self._ends[item.index]
        if isinstance(item, Finished):
            self._open -= 1
            self._correct(item)
            self._ready.append(item)
            return
        late, step = end.over, item.step
        events = end.feed(self._renamed(step.events))
        if not late and (events or step.logprobs):
            self._ready.append(Delta(item.index, events, step.tokens, step.logprobs))
        if end.over and not late:
            self.queued[item.index].cancel()

    def _renamed(self, events: Sequence[OutputEvent]) -> list[OutputEvent]:
        """Return `events` with the client's names of tools."""
        of_client = self._names.of_client
        return [
            replace(event, name=of_client(event.name)) if isinstance(event, Called) else event
            for event in events
        ]

    def _correct(self, item: Finished) -> None:
        """Put the reason to end early into the statistics of a request that was canceled for it."""
        if self._ends[item.index].over:
            item.stats.stop_reason = "length"


@dataclass(frozen=True, slots=True)
class _Stepped:
    index: int
    step: Step


class _StreamListener:
    """A scheduler's Listener: sends what is generated for output number `index` to a ResponseStream."""

    def __init__(self, response: ResponseStream, index: int) -> None:
        self._response, self._index = response, index

    def stepped(self, step: Step) -> None:
        self._response.send(_Stepped(self._index, step))

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        self._response.send(Finished(self._index, stats, error))


def _renamed(request: GenerationRequest, names: ToolNames) -> GenerationRequest:
    """Return `request` with names of tools that the model can write."""
    choice = request.choice
    if choice.named is not None:
        choice = replace(choice, named=names.of_model(choice.named))
    messages = names.messages(request.messages) if request.messages is not None else None
    return replace(request, messages=messages, tools=names.tools, choice=choice)


async def _in_thread(thread: SerialWorker, call: Callable[[], T]) -> T:
    """Await `call` in `thread`. A call whose caller is canceled before it has begun is skipped."""
    future: Future[T] = Future()

    def job() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                future.set_exception(error)

    thread.submit(job)
    return await asyncio.wrap_future(future)
