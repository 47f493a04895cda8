"""OpenAI's Responses API. The latest conversations are kept in memory, for `previous_response_id`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Encoder, Pieces, ServerEvent, new_id, token_logprobs
from edgespec.app.serve.apis.errors import ApiError
from edgespec.app.serve.apis.response_store import ResponseStore
from edgespec.app.serve.apis.responses_body import FlatFunction, ResponsesRequest
from edgespec.app.serve.apis.streaming import STREAMS, Routes, ServedModel
from edgespec.app.serve.apis.tools import custom_input
from edgespec.core import TokenLogprob

_ADDED = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "custom_tool_call": "ctc_"}


def add_routes(app: Routes, served: ServedModel) -> None:
    store = ResponseStore()

    @app.post("/v1/responses", responses=STREAMS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        if body.previous_response_id:
            if (earlier := store.get(body.previous_response_id)) is None:
                raise ApiError(
                    400,
                    f"Previous response with id {body.previous_response_id[:100]!r} not found: "
                    "only the latest are kept, so send the whole conversation as input.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            body.go_on_from(earlier)

        def keep(whole: Mapping[str, Any]) -> None:
            if body.store is not False:
                store.put(whole["id"], body.conversation_with(whole["output"]))

        return await served.respond(body, request, lambda _: ResponsesEncoder(served.service, body, keep))


class ResponsesEncoder(Encoder):
    """A response. `body` is updated with every event."""

    def __init__(
        self,
        vocab: Pieces,
        body: ResponsesRequest,
        keep: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        """`keep` is called with the complete response."""
        self._keep, self._custom = keep, body.custom_tools
        self._vocab, self._logprobs = vocab, body.wants_logprobs
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
        self._body: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None, **(body.reasoning or {})},
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [
                {
                    **({"strict": False, "parameters": {}} if isinstance(tool, FlatFunction) else {}),
                    **tool.model_dump(exclude_none=True),
                }
                for tool in body.tools or []
            ],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }
        self._output: list[dict[str, Any]] = self._body["output"]
        self._open = False
        self._sent = 0  # number of events

    @property
    def body(self) -> dict[str, Any]:
        return self._body

    def begin(self) -> Iterator[ServerEvent]:
        yield self._event("response.created", response=self._body)
        yield self._event("response.in_progress", response=self._body)

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        if not text:
            return  # no event contains log probabilities alone
        yield from self._open_message()
        shown = token_logprobs(self._vocab, logprobs or ()) if self._logprobs else []
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += shown
        place = {**self._place(), "content_index": 0}
        yield self._event("response.output_text.delta", **place, delta=text, logprobs=shown)

    def reasoning(self, index: int, text: str) -> Iterator[ServerEvent]:
        if not self._open or self._output[-1]["type"] != "reasoning":
            yield from self._add({"type": "reasoning", "summary": [], "content": []})
            part = {"type": "reasoning_text", "text": ""}
            self._output[-1]["content"].append(part)
            yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)
        self._output[-1]["content"][0]["text"] += text
        place = {**self._place(), "content_index": 0}
        yield self._event("response.reasoning_text.delta", **place, delta=text)

    def call(self, index: int, call: int, name: str) -> Iterator[ServerEvent]:
        custom = name in self._custom
        begun = {"type": "custom_tool_call" if custom else "function_call", "call_id": new_id("call_")}
        yield from self._add({**begun, "name": name, "input" if custom else "arguments": ""})

    def arguments(self, index: int, call: int, text: str) -> Iterator[ServerEvent]:
        item = self._output[-1]
        if item["type"] == "custom_tool_call":  # JSON, until it is complete
            item["input"] += text
            return
        item["arguments"] += text
        yield self._event("response.function_call_arguments.delta", **self._place(), delta=text)

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        cut = stats.stop_reason in ("length", "context")
        status = "incomplete" if cut else "completed"
        # A response without text or a call contains one empty message.
        if all(item["type"] == "reasoning" for item in self._output):
            yield from self._open_message()
        yield from self._close(status)
        self._body["status"] = status
        self._body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self._body["completed_at"] = None if cut else int(time())
        self._body["usage"] = {
            "input_tokens": stats.prompt_tokens,
            "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": len(stats.tokens),
            "output_tokens_details": {
                "reasoning_tokens": stats.reasoning_tokens,
                "accepted_prediction_tokens": stats.accepted,
                "rejected_prediction_tokens": stats.drafted - stats.accepted,
            },
            "total_tokens": stats.prompt_tokens + len(stats.tokens),
            "speculation": {"drafted": stats.drafted, "accepted": stats.accepted},
        }
        self._keep(self._body)
        yield self._event(f"response.{status}", response=self._body)

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        self._body["status"] = "failed"
        self._body["error"] = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=self._body)

    def _open_message(self) -> Iterator[ServerEvent]:
        if self._open and self._output[-1]["type"] == "message":
            return
        yield from self._add({"type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output[-1]["content"].append(part)
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _add(self, item: dict[str, Any]) -> Iterator[ServerEvent]:
        yield from self._close("completed")
        self._output.append({"id": new_id(_ADDED[item["type"]]), **item, "status": "in_progress"})
        self._open = True
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item=self._output[-1])

    def _close(self, status: str) -> Iterator[ServerEvent]:
        if not self._open:
            return
        self._open = False
        item, place = self._output[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            place["content_index"] = 0
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **place, **done)
            yield self._event("response.content_part.done", **place, part=part)
        elif item["type"] == "reasoning":
            (part,) = item["content"]
            place["content_index"] = 0
            yield self._event("response.reasoning_text.done", **place, text=part["text"])
            yield self._event("response.content_part.done", **place, part=part)
        elif item["type"] == "custom_tool_call":
            item["input"] = text = custom_input(item["input"])
            yield self._event("response.custom_tool_call_input.delta", **place, delta=text)
            yield self._event("response.custom_tool_call_input.done", **place, input=text)
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **place, **done)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _event(self, type_: str, **fields: Any) -> ServerEvent:
        number, self._sent = self._sent, self._sent + 1
        return {"type": type_, **fields, "sequence_number": number}
