"""The contract of an API's response format, the one loop that fills it, and what OpenAI's formats share."""

from __future__ import annotations

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from edgespec.app.engine.completions import Delta, Finished, ResponseStream
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.errors import ApiError, as_api_error, dumps
from edgespec.core import TokenLogprob
from edgespec.models.prompting.output_events import Arguments, Called, ReasoningPiece, TextPiece

_LOG = logging.getLogger("edgespec")

ServerEvent = Mapping[str, Any] | str
"""A JSON object, whose `type` is also the name of the event, or literal text."""


class Encoder(ABC):
    """One API's form of a response. An encoder serves one HTTP request, streamed or not.

    Each method adds to the response and returns the events that a stream sends for the addition, in order.
    They are read one by one, each before the next addition. `index` numbers the choices of the response, and
    `call` the tool calls of a choice.
    """

    media_type = "text/event-stream"
    """The type of a stream. Server-sent events are kept alive by comments, which other types do not have."""

    def frame(self, event: ServerEvent) -> bytes:
        """Return the bytes of an event in a stream."""
        return server_sent(event)

    def begin(self) -> Iterable[ServerEvent]:
        """Return what a stream sends before anything is generated."""
        return ()

    @abstractmethod
    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterable[ServerEvent]:
        """Add `text`; it is empty where only `logprobs`, those of the tokens since the last text, are new."""

    def reasoning(self, index: int, text: str) -> Iterable[ServerEvent]:
        """Add `text` to the reasoning before an answer."""
        return ()

    def call(self, index: int, call: int, name: str) -> Iterable[ServerEvent]:
        """Begin a tool call."""
        return ()

    def arguments(self, index: int, call: int, text: str) -> Iterable[ServerEvent]:
        """Add `text`, a part of a JSON object, to the arguments of a tool call."""
        return ()

    @abstractmethod
    def end(self, index: int, stats: GenerationStats) -> Iterable[ServerEvent]:
        """Complete a choice. Called once for each, in any order; the last call completes `body`."""

    @abstractmethod
    def fail(self, error: ApiError) -> Iterable[ServerEvent]:
        """Return what a stream sends when a choice fails; nothing follows it."""

    @property
    @abstractmethod
    def body(self) -> Mapping[str, Any]:
        """The response as a whole, once every choice is complete."""


async def stream(responses: Sequence[ResponseStream], encoder: Encoder) -> AsyncIterator[bytes]:
    """Encode `responses`, one after the other, as a stream of events. An error is the last of the events."""
    try:
        async for event in _events(responses, encoder):
            yield encoder.frame(event)
    except ApiError as error:
        for event in encoder.fail(error):
            yield encoder.frame(event)


async def collect(responses: Sequence[ResponseStream], encoder: Encoder) -> Mapping[str, Any]:
    """Encode `responses` as one body. Raises ApiError if one of them fails."""
    async for _ in _events(responses, encoder):
        pass
    return encoder.body


async def _events(responses: Sequence[ResponseStream], encoder: Encoder) -> AsyncIterator[ServerEvent]:
    for event in encoder.begin():
        yield event
    first = 0
    for response in responses:
        async for item in response:
            for event in encode(item, encoder, first):
                yield event
        first += response.count


def encode(item: Delta | Finished, encoder: Encoder, first: int = 0) -> Iterator[ServerEvent]:
    """Add `item` to a response whose choices are numbered from `first`. Raises ApiError for a failure."""
    index = first + item.index
    if isinstance(item, Finished):
        if (error := _failure(item)) is not None:
            raise error
        yield from encoder.end(index, item.stats)
        return
    # The token that ends a response has a log probability too, but is not part of it.
    logprobs = item.logprobs[: len(item.tokens)] if item.logprobs else None
    for event in item.events:
        match event:
            case TextPiece(text):
                yield from encoder.text(index, text, logprobs)
                logprobs = None
            case ReasoningPiece(text):
                yield from encoder.reasoning(index, text)
            case Called(call, name):
                yield from encoder.call(index, call, name)
            case Arguments(call, text):
                yield from encoder.arguments(index, call, text)
    if logprobs is not None:
        yield from encoder.text(index, "", logprobs)


def server_sent(event: ServerEvent) -> bytes:
    """One server-sent event."""
    if isinstance(event, str):
        return f"data: {event}\n\n".encode()
    head = f"event: {event['type']}\n" if "type" in event else ""
    return f"{head}data: {dumps(event)}\n\n".encode()


def _failure(end: Finished) -> ApiError | None:
    """Return the error with which a generation ended, None if the model or a limit ended it."""
    if end.error is not None:
        error = as_api_error(end.error)
        if error.status == 500:
            _LOG.error("a generation failed", exc_info=end.error)
        return error
    if end.stats.stop_reason == "cancelled":
        return ApiError(503, "The server is stopping.", kind="server_error")
    return None


class Pieces(Protocol):
    """A vocabulary: `piece` returns the bytes of a token, none for a control token."""

    def piece(self, token: int) -> bytes: ...


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def usage(results: Sequence[GenerationStats]) -> dict[str, Any]:
    """Return the usage of all choices of one prompt. `speculation` is Edgespec's own."""
    prompt = max((one.prompt_tokens for one in results), default=0)
    generated = sum(len(one.tokens) for one in results)
    drafted, accepted = sum(one.drafted for one in results), sum(one.accepted for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": max((one.cached_tokens for one in results), default=0)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(one.reasoning_tokens for one in results),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "speculation": {
            "drafted": drafted,
            "accepted": accepted,
            "rounds": sum(one.rounds for one in results),
            "tokens_per_second": round(sum(one.tokens_per_second for one in results), 3),
            "seconds_to_first_token": round(
                max((one.seconds_to_first_token for one in results), default=0.0), 4
            ),
        },
    }


def finish_reason(stats: GenerationStats, calls: bool) -> str:
    if stats.stop_reason in ("length", "context"):
        return "length"
    return "tool_calls" if calls else "stop"


def token_logprobs(vocab: Pieces, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return log probabilities of tokens and their alternatives in the form of chat completions."""
    return [
        {
            **_token_logprob(vocab, one.token, one.logprob),
            "top_logprobs": [_token_logprob(vocab, token, value) for token, value in one.top],
        }
        for one in logprobs
    ]


def finite(logprob: float) -> float:
    """Return `logprob`, at least -9999, which is OpenAI's value for a probability of zero."""
    return max(logprob, -9999.0)


def _token_logprob(vocab: Pieces, token: int, logprob: float) -> dict[str, Any]:
    piece = vocab.piece(token)
    return {"token": piece.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(piece)}
