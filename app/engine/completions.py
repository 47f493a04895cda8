"""What every way of asking comes down to: an `Ask` is made ready beside the engine, answered, told as events.

Used by the server and by `edgespec mcp`. Knows no HTTP.
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

from edgespec.app.engine.constraints import FREE, ConstraintCompiler, Format, OutputConstraint, OutputParser
from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import QueuedRequest, Scheduler, StoppingError
from edgespec.app.engine.worker import SerialWorker
from edgespec.core import EdgespecError, TokenLogprob
from edgespec.models.prompting.chat_template import Message
from edgespec.models.prompting.tool_calls import (
    OutputEvent,
    ToolChoice,
    read_tools,
)
from edgespec.sampling import Sampling

T = TypeVar("T")
_NO_TOOLS = ToolChoice("none")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A conversation to answer, or a `prompt` (text, or token ids) to continue, `count` times.

    `tools` are in OpenAI's form. `format` is what the answer must keep to. `max_draft` bounds what is guessed
    in a round, 0 guesses nothing. `user` takes turns with others.
    """

    messages: Sequence[Message] | None = None
    prompt: str | Sequence[int] = ""
    tools: Sequence[Mapping[str, Any]] = ()
    choice: ToolChoice = _NO_TOOLS
    format: Format | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 0
    stops: Sequence[str] = ()
    max_draft: int | None = None
    count: int = 1
    user: str = ""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """An Ask made ready: its prompt as tokens, its grammar compiled."""

    ask: GenerationRequest
    prompt: list[int]
    shape: OutputConstraint = FREE


@dataclass(frozen=True, slots=True)
class Delta:
    """More of answer number `index`. `tokens` are those final since the last part, with `logprobs`."""

    index: int
    events: Sequence[OutputEvent]
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Finished:
    """Answer number `index` is complete."""

    index: int
    result: GenerationStats
    error: Exception | None = None


class Watcher(Protocol):
    """Hears how answers went, for the metrics."""

    def answered(self, result: GenerationStats, error: Exception | None, waited: float) -> None: ...


class CompletionService:
    """Takes requests to the engine. All but `stop` is called in one event loop."""

    def __init__(self, scheduler: Scheduler, watcher: Watcher | None = None) -> None:
        self.scheduler = scheduler
        self._engine = scheduler.engine
        self._vocab = scheduler.engine.model.vocab
        self._watcher = watcher
        self._tickets: set[QueuedRequest] = set()
        # A thread each, so that neither a slow template nor a slow grammar keeps others waiting for long.
        self._rendering, self._compiling = SerialWorker(), SerialWorker()
        self._shaper = ConstraintCompiler(self._vocab, scheduler.engine.model.chat_template)
        self._stopped = False

    @property
    def context_length(self) -> int:
        return self._engine.context_length

    async def prepare(self, ask: GenerationRequest) -> PreparedRequest:
        """Render, tokenize and compile, away from the event loop. Raises EdgespecError."""
        self.check_tokens(list(ask.sampling.logit_bias))
        named = read_tools(ask.tools)
        tools = ask.tools if ask.choice.mode != "none" else ()
        prompt = await _aside(self._rendering, lambda: self._prompt(ask, tools))
        if len(prompt) >= self.context_length:
            raise ContextFullError(
                f"This model's maximum context length is {self.context_length} tokens and the prompt has "
                f"{len(prompt)}: shorten it, or start the server with a larger --context."
            )
        if ask.choice.mode == "none" and ask.format is None:
            return PreparedRequest(ask, prompt)
        wanted = named if tools else []
        shape = await _aside(self._compiling, lambda: self._shaper.shape(wanted, ask.choice, ask.format))
        return PreparedRequest(ask, prompt, shape)

    def submit(self, job: PreparedRequest, client: str = "") -> ResponseStream:
        """Queue `job`: iterate over what this returns, and close it. Raises BusyError when too many wait."""
        if self._stopped:
            raise StoppingError("The server is stopping.")
        answer = ResponseStream(self, job)
        try:
            for index in range(job.ask.count):
                request, ear = self._request(job, index), _StreamListener(answer, index)
                ticket = self.scheduler.submit(request, ear, f"{client}/{job.ask.user}")
                answer.tickets.append(ticket)
                self._tickets.add(ticket)
        except BaseException:
            answer.close()
            raise
        return answer

    def forget(self, tickets: Sequence[QueuedRequest]) -> None:
        self._tickets.difference_update(tickets)

    def heard(self, result: GenerationStats, error: Exception | None, waited: float) -> None:
        if self._watcher is not None:
            self._watcher.answered(result, error, waited)

    def stop(self) -> None:
        """Cancel every answer, and take no more."""
        self._stopped = True
        for ticket in list(self._tickets):
            ticket.cancel()

    def close(self) -> None:
        """Stop, and wait for the threads that read the model's vocabulary: it may be freed after that."""
        self.stop()
        for thread in (self._rendering, self._compiling):
            thread.close()

    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        return self._vocab.tokenize(text, special=special, begin=begin)

    def text_of(self, tokens: Sequence[int]) -> str:
        return self._vocab.detokenize(tokens)

    def piece(self, token: int) -> bytes:
        """The bytes of a token, none for a control token."""
        return self._vocab.piece(token)

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises EdgespecError for ids that are none of the model's."""
        size = self._vocab.size
        for token in tokens:
            if not 0 <= token < size:
                raise EdgespecError(f"{token} is no token of this model: it has 0 to {size - 1}.")

    def _request(self, job: PreparedRequest, index: int) -> Request:
        ask = job.ask
        sampling = ask.sampling
        if index and sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + index)
        return Request(
            job.prompt,
            sampling,
            ask.max_tokens,
            ask.stops,
            speculate=ask.max_draft != 0,
            max_draft=ask.max_draft,
            constraint=job.shape.start,
        )

    def _prompt(self, ask: GenerationRequest, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        if ask.messages is not None:
            return self._engine.chat_prompt(ask.messages, [*tools] or None)
        if isinstance(ask.prompt, str):
            return self._vocab.tokenize(ask.prompt, begin=True)
        self.check_tokens(ask.prompt)
        return list(ask.prompt)


class ResponseStream:
    """The answers to one job, as they come. To be closed; what is not complete then is cancelled."""

    def __init__(self, service: CompletionService, job: PreparedRequest) -> None:
        self._service, self.job = service, job
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[_Wrote | Finished] = asyncio.Queue()
        self._ready: deque[Delta | Finished] = deque()
        self._readers = [OutputParser(job.shape, service.text_of) for _ in range(job.ask.count)]
        self._open = job.ask.count
        self._started = monotonic()
        self.tickets: list[QueuedRequest] = []

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
            self._take(await self._news.get())
        return self._ready.popleft()

    def close(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()
        self._service.forget(self.tickets)

    def tell(self, news: _Wrote | Finished) -> None:
        """From the engine's thread, which has better things to do than to look at it."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._heard, news)

    def _heard(self, news: _Wrote | Finished) -> None:
        self._news.put_nowait(news)
        if isinstance(news, Finished):
            self._service.heard(news.result, news.error, monotonic() - self._started)

    def _take(self, news: _Wrote | Finished) -> None:
        reader = self._readers[news.index]
        if isinstance(news, Finished):
            self._open -= 1
            if rest := reader.finish():
                self._ready.append(Delta(news.index, rest, (), ()))
            self._ready.append(news)
            return
        events = reader.feed(news.text, news.tokens)
        if events or news.logprobs:
            self._ready.append(Delta(news.index, events, news.tokens, news.logprobs))


@dataclass(frozen=True, slots=True)
class _Wrote:
    index: int
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob]


class _StreamListener:
    """A Listener that forwards what the engine generates to a ResponseStream."""

    def __init__(self, answer: ResponseStream, index: int) -> None:
        self._answer, self._index = answer, index

    def stepped(self, step: Step) -> None:
        self._answer.tell(_Wrote(self._index, step.text, step.tokens, step.logprobs))

    def ended(self, stats: GenerationStats, error: Exception | None) -> None:
        self._answer.tell(Finished(self._index, stats, error))


async def _aside(thread: SerialWorker, call: Callable[[], T]) -> T:
    """What `call` returns, in `thread`; nobody has to wait for it, and if nobody does it is not begun."""
    future: Future[T] = Future()

    def job() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                future.set_exception(error)

    thread.submit(job)
    return await asyncio.wrap_future(future)
