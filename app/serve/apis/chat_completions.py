"""OpenAI's chat completions and its older text completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import (
    Encoder,
    Pieces,
    ServerEvent,
    finish_reason,
    finite,
    new_id,
    token_logprobs,
    usage,
)
from edgespec.app.serve.apis.errors import ApiError, error_body
from edgespec.app.serve.apis.schemas import ChatRequest, CompletionRequest
from edgespec.app.serve.apis.streaming import STREAMS, Routes, ServedModel
from edgespec.app.serve.apis.tools import custom_input
from edgespec.core import TokenLogprob

_DONE = "[DONE]"


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post("/v1/chat/completions", responses=STREAMS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await served.respond(body, request, lambda _: ChatEncoder(served.service, body))

    @app.post("/v1/completions", responses=STREAMS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await served.respond(
            body, request, lambda prepared: CompletionEncoder(served.service, body, len(prepared))
        )


@dataclass(slots=True)
class _Choice:
    """One choice of a response, as far as it is generated."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    length: int = 0  # of the text
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    stats: GenerationStats | None = None

    def add(self, text: str, logprobs: Sequence[TokenLogprob] | None) -> None:
        self.text.append(text)
        self.length += len(text)
        self.logprobs += logprobs or ()

    @property
    def finish(self) -> str | None:
        return finish_reason(self.stats, bool(self.calls)) if self.stats is not None else None


class ChatEncoder(Encoder):
    """A chat completion. With `include_usage` each chunk has a `usage`, which is null except in the last."""

    def __init__(self, vocab: Pieces, body: ChatRequest) -> None:
        self._vocab, self._model, self._logprobs = vocab, body.model, bool(body.logprobs)
        self._include_usage, self._custom = body.includes_usage, body.custom_tools
        self._choices = [_Choice() for _ in range(body.n or 1)]
        self._id, self._created = new_id("chatcmpl-"), int(time())

    def begin(self) -> Iterator[ServerEvent]:
        for index in range(len(self._choices)):
            yield self._delta(index, {"role": "assistant", "content": "", "refusal": None})

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        self._choices[index].add(text, logprobs)
        yield self._delta(index, {"content": text}, logprobs)

    def reasoning(self, index: int, text: str) -> Iterator[ServerEvent]:
        self._choices[index].reasoning.append(text)
        yield self._delta(index, {"reasoning_content": text})

    def call(self, index: int, call: int, name: str) -> Iterator[ServerEvent]:
        yield from self._close(index)
        kind, content = ("custom", "input") if name in self._custom else ("function", "arguments")
        begun = {"id": new_id("call_"), "type": kind, kind: {"name": name, content: ""}}
        self._choices[index].calls.append({**begun, kind: {"name": name, content: ""}})
        yield self._delta(index, {"tool_calls": [{"index": call, **begun}]})

    def arguments(self, index: int, call: int, text: str) -> Iterator[ServerEvent]:
        found = self._choices[index].calls[call]
        if "custom" in found:  # JSON, until it is complete
            found["custom"]["input"] += text
            return
        found["function"]["arguments"] += text
        yield self._delta(index, {"tool_calls": [{"index": call, "function": {"arguments": text}}]})

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        yield from self._close(index)
        self._choices[index].stats = stats
        yield self._delta(index, {}, finish=self._choices[index].finish)
        if (results := _results(self._choices)) is not None:
            if self._include_usage:
                yield {**self._chunk([]), "usage": usage(results)}
            yield _DONE

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        yield error_body(error, "")

    @property
    def body(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": int(time()),
            "model": self._model,
            "choices": [self._whole(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage(_results(self._choices) or ()),
        }

    def _close(self, index: int) -> Iterator[ServerEvent]:
        """Complete the last call of a choice, if it is one of a custom tool."""
        calls = self._choices[index].calls
        if calls and (custom := calls[-1].get("custom")) is not None:
            custom["input"] = text = custom_input(custom["input"])
            yield self._delta(index, {"tool_calls": [{"index": len(calls) - 1, "custom": {"input": text}}]})

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if choice.calls:
            message |= {"content": text or None, "tool_calls": choice.calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._shown(choice.logprobs),
            "finish_reason": choice.finish,
        }

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        shown = self._shown(logprobs)
        return self._chunk([{"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish}])

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **({"usage": None} if self._include_usage else {}),
        }

    def _shown(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not self._logprobs or logprobs is None:
            return None
        return {"content": token_logprobs(self._vocab, logprobs), "refusal": None}


class CompletionEncoder(Encoder):
    """A text completion, whose chunks have the same form as the whole."""

    def __init__(self, vocab: Pieces, body: CompletionRequest, prompts: int) -> None:
        self._vocab, self._model, self._logprobs = vocab, body.model, body.logprobs is not None
        self._include_usage = body.includes_usage
        self._each = body.n or 1
        self._choices = [_Choice() for _ in range(prompts * self._each)]
        self._echoed = list(body.prompts) if body.echo else []
        self._id = new_id("cmpl-")

    def begin(self) -> Iterator[ServerEvent]:
        for index, choice in enumerate(self._choices if self._echoed else ()):
            choice.add(text := self._echoed[index // self._each], None)
            yield self._chunk([self._choice(index, text, None, None)])

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        shown = self._shown(logprobs or (), self._choices[index].length)
        self._choices[index].add(text, logprobs)
        yield self._chunk([self._choice(index, text, None, shown)])

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        self._choices[index].stats = stats
        yield self._chunk([self._choice(index, "", self._choices[index].finish, None)])
        if _results(self._choices) is not None:
            if self._include_usage:
                yield {**self._chunk([]), "usage": self._usage()}
            yield _DONE

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        yield error_body(error, "")

    @property
    def body(self) -> dict[str, Any]:
        choices = [
            self._choice(index, "".join(choice.text), choice.finish, self._shown(choice.logprobs))
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head(choices), "usage": self._usage()}

    def _head(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": int(time()),
            "model": self._model,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head(choices)
        return {**head, "usage": None} if self._include_usage else head

    def _choice(self, index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _usage(self) -> dict[str, Any]:
        """Return the usage of all prompts; each is counted once, however many choices it has."""
        results = _results(self._choices) or []
        total = usage(results)
        total["prompt_tokens"] = sum(one.prompt_tokens for one in results[:: self._each])
        total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
        return total

    def _shown(self, logprobs: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any] | None:
        """Return log probabilities in OpenAI's older form. `offset` is the text offset of the first."""
        if not self._logprobs:
            return None

        def text(token: int) -> str:
            return self._vocab.piece(token).decode("utf-8", "replace")

        texts = [text(one.token) for one in logprobs]
        ends = list(accumulate(map(len, texts), initial=offset))
        return {
            "tokens": texts,
            "token_logprobs": [finite(one.logprob) for one in logprobs],
            "top_logprobs": [{text(token): finite(value) for token, value in one.top} for one in logprobs],
            "text_offset": ends[:-1],
        }


def _results(choices: Sequence[_Choice]) -> list[GenerationStats] | None:
    """Return the statistics of each choice, None until all of them are complete."""
    results = [one.stats for one in choices if one.stats is not None]
    return results if len(results) == len(choices) else None
