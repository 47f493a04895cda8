"""A completion service without a model: responses are scripted, and written in a thread as an engine does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp
from toy import ToyVocab

from edgespec.app.engine.completions import CompletionService
from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.output import StopCriteria, StopReason
from edgespec.app.engine.request import GenerationStats, Request, Step
from edgespec.app.engine.scheduler import BusyError, Listener, QueueStats
from edgespec.app.engine.worker import SerialWorker
from edgespec.app.serve.application import APIS, AddRoutes, make_app
from edgespec.app.serve.metrics import Metrics
from edgespec.core import Reading, TokenLogprob
from edgespec.models.prompting.output_events import OutputEvent, TextPiece
from edgespec.models.simple import SimpleSummary

MODEL, TOKEN = "fake", "t" * 32
Script = Sequence[str | list[int] | tuple[str, list[int], int] | Exception | StopReason]


class FakeVocab(ToyVocab):
    """A toy vocabulary with what the server calls of a `Vocabulary`."""

    def tokenize(self, text: str, *, special: bool = False, begin: bool = False) -> list[int]:
        return super().tokenize(text)

    def piece(self, token: int) -> bytes:
        return self._pieces[token]


class FakeEngine:
    """Prompts are the messages' contents, one on each line. `asked`: the arguments of `chat_prompt`."""

    def __init__(self, context_length: int) -> None:
        self.asked: list[tuple[list[Any], Any, Any, bool]] = []
        self.context_length = context_length
        vocab = FakeVocab()
        summary = SimpleSummary("fake", vocab.size, "fake", 0)
        self.model = SimpleNamespace(
            vocab=vocab, chat_template=None, metadata={}, summary=summary, path=Path("fake.gguf")
        )
        self.decision = SimpleNamespace(mode="balanced")
        self.resources = SimpleNamespace(watch=SimpleNamespace(latest=lambda: Reading(0.0)))

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: object = None,
        variables: object = None,
        *,
        continues: bool = False,
    ) -> list[int]:
        self.asked.append((list(messages), tools, variables, continues))
        text = "\n".join(str(message["content"]) for message in messages)
        tokens = self.model.vocab.tokenize(text)
        if len(tokens) > 10 * self.context_length:
            raise ContextFullError("far too long")
        return tokens


class FakeTicket:
    """What `submit` returns."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def cancel(self) -> None:
        self.request.cancel()


class FakeScheduler:
    """Writes `script` for every request, one request after the other.

    A str is a step of that text, a list a step of those tokens, whose text is held back until it is whole; a
    tuple is text, tokens, and how many log probabilities come with those of the tokens. An Exception ends
    the response with that error. The last part may be a reason to stop. With `endless` the script is repeated
    until the request is cancelled.
    """

    def __init__(
        self,
        script: Script = ("hello", " world"),
        *,
        endless: bool = False,
        room: int = 64,
        context: int = 256,
    ) -> None:
        """At most `room` requests are taken."""
        self.engine = FakeEngine(context)
        self.script, self.endless, self.room = script, endless, room
        self.requests: list[Request] = []
        self.clients: list[str] = []
        self.ended: list[StopReason | Exception] = []
        self.idle = threading.Event()
        self._running = 0
        self._thread = SerialWorker()

    @property
    def load(self) -> QueueStats:
        return QueueStats(self._running, 0, 1)

    def submit(self, request: Request, listener: Listener, client: str = "") -> FakeTicket:
        if len(self.requests) >= self.room:
            raise BusyError(len(self.requests), 2.0)
        self.requests.append(request)
        self.clients.append(client)
        self._running += 1
        self.idle.clear()
        self._thread.submit(lambda: self._run(request, listener))
        return FakeTicket(request)

    def close(self) -> None:
        self._thread.close()

    def _run(self, request: Request, listener: Listener) -> None:
        stats = GenerationStats(
            stop_reason="end", prompt_tokens=len(request.prompt), cached_tokens=2, drafted=5, accepted=3
        )
        error = self._write(request, stats, listener)
        if request.cancelled:
            stats.stop_reason = "cancelled"
        self._running -= 1
        self.ended.append(error or stats.stop_reason)
        listener.ended(stats, error)
        if not self._running:
            self.idle.set()

    def _write(self, request: Request, stats: GenerationStats, listener: Listener) -> Exception | None:
        vocab, pause = self.engine.model.vocab, threading.Event()
        criteria = StopCriteria(vocab.is_end, vocab.piece, request.stops, request.form)
        while not request.cancelled:
            for part in self.script:
                if isinstance(part, Exception):
                    return part
                if part in ("end", "stop", "length", "context", "cancelled"):
                    stats.stop_reason = part
                    stats.stopped_by = "<stop>" if part == "stop" else None
                    continue
                if isinstance(part, tuple):
                    text, tokens, more = part
                    self._tell(request, stats, listener, [TextPiece(text)] if text else [], tokens, more)
                    continue
                tokens = vocab.tokenize(part) if isinstance(part, str) else list(part)
                over = any(criteria(token) for token in tokens)
                self._tell(request, stats, listener, criteria.take()[0], tokens)
                if over:
                    stats.stop_reason, stats.stopped_by = criteria.reason or "end", criteria.stopped_by
                    return None
            if not self.endless:
                break
            pause.wait(0.001)
        rest = criteria.finish(cut=stats.stop_reason not in ("end", "stop"))[0]
        if rest:
            self._tell(request, stats, listener, rest, [])
        return None

    def _tell(
        self, request: Request, stats: GenerationStats, listener: Listener, events: Sequence[OutputEvent],
        tokens: list[int], more: int = 0,
    ) -> None:  # fmt: skip
        """One step: the only place that knows what a listener is sent."""
        wanted = request.sampling.logprobs is not None
        sent = [*tokens, *[self.engine.model.vocab.eos] * more] if wanted else []
        logprobs = [TokenLogprob(token, -0.5, ((token, -0.5), (97, float("-inf")))) for token in sent]
        text = "".join(event.text for event in events if isinstance(event, TextPiece))
        stats.rounds += 1
        stats.text += text
        stats.tokens += tokens
        stats.logprobs += logprobs
        listener.stepped(Step(text, tokens, logprobs, events=events))


@contextmanager
def fake_app(
    scheduler: FakeScheduler, more_apis: Sequence[AddRoutes] = (), *, strict: bool = False
) -> Iterator[ASGIApp]:
    """The HTTP application on `scheduler`, which is closed with it."""
    metrics = Metrics(scheduler)
    with closing(CompletionService(scheduler, metrics)) as service:
        apis = [*APIS, *more_apis]
        yield make_app(service, metrics, [MODEL, "other"], token=TOKEN, strict=strict, apis=apis)
    scheduler.close()
