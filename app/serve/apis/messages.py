"""Anthropic's Messages API, and its endpoint that counts tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Encoder, ServerEvent, new_id
from edgespec.app.serve.apis.errors import ApiError, error_body
from edgespec.app.serve.apis.messages_body import CountRequest, MessagesRequest
from edgespec.app.serve.apis.streaming import STREAMS, Json, Routes, ServedModel
from edgespec.app.serve.apis.tools import partial_object
from edgespec.core import TokenLogprob

_PATH = "/v1/messages"


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post(_PATH, responses=STREAMS)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        return await served.respond(
            body, request, lambda prepared: MessagesEncoder(body.model, len(prepared[0].prompt))
        )

    @app.post(f"{_PATH}/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        served.accept(body, request)
        (prepared,) = await served.prepare(lambda: [body.conversation()], request)
        return Json({"input_tokens": len(prepared.prompt)})


class MessagesEncoder(Encoder):
    """A message. `body` is updated with every event."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._body: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": prompt_tokens,
                "output_tokens": 0,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
            },
        }
        self._content: list[dict[str, Any]] = self._body["content"]
        self._json = ""  # input of the current tool call
        self._open = False

    @property
    def body(self) -> dict[str, Any]:
        return self._body

    def begin(self) -> Iterator[ServerEvent]:
        yield {"type": "message_start", "message": self._body}
        yield {"type": "ping"}

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        if not self._open or self._content[-1]["type"] != "text":
            yield from self._begin({"type": "text", "text": ""})
        self._content[-1]["text"] += text
        yield self._delta({"type": "text_delta", "text": text})

    def reasoning(self, index: int, text: str) -> Iterator[ServerEvent]:
        if not self._open or self._content[-1]["type"] != "thinking":
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        self._content[-1]["thinking"] += text
        yield self._delta({"type": "thinking_delta", "thinking": text})

    def call(self, index: int, call: int, name: str) -> Iterator[ServerEvent]:
        yield from self._begin({"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}})

    def arguments(self, index: int, call: int, text: str) -> Iterator[ServerEvent]:
        self._json += text
        yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        yield from self._close()
        stopped = {"stop_reason": self._stop_reason(stats), "stop_sequence": stats.stopped_by}
        usage = self._body["usage"]
        usage["input_tokens"] = stats.prompt_tokens - stats.cached_tokens
        usage["cache_read_input_tokens"] = stats.cached_tokens
        usage["output_tokens"] = len(stats.tokens)
        usage["output_tokens_details"] = {"thinking_tokens": stats.reasoning_tokens}
        usage["speculation"] = {"drafted": stats.drafted, "accepted": stats.accepted}
        self._body |= stopped
        yield {"type": "message_delta", "delta": stopped, "usage": usage}
        yield {"type": "message_stop"}

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        yield error_body(error, _PATH)

    def _stop_reason(self, stats: GenerationStats) -> str:
        if stats.stop_reason == "length":
            return "max_tokens"
        if stats.stop_reason == "context":
            return "model_context_window_exceeded"
        if any(block["type"] == "tool_use" for block in self._content):
            return "tool_use"
        return "stop_sequence" if stats.stop_reason == "stop" else "end_turn"

    def _begin(self, block: dict[str, Any]) -> Iterator[ServerEvent]:
        yield from self._close()
        self._content.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**block}}

    def _delta(self, delta: dict[str, Any]) -> ServerEvent:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[ServerEvent]:
        if not self._open:
            return
        self._open = False
        block = self._content[-1]
        if block["type"] == "tool_use":
            block["input"] = partial_object(self._json)
            self._json = ""
        if block["type"] == "thinking":  # nothing is signed; clients wait for the event
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield {"type": "content_block_stop", "index": len(self._content) - 1}
