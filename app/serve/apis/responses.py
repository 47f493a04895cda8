"""OpenAI's Responses API, stateless: every request contains its whole conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import time
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Encoder, Pieces, ServerEvent, new_id, token_logprobs
from edgespec.app.serve.apis.errors import ApiError
from edgespec.app.serve.apis.schemas import (
    Body,
    Content,
    JsonObjectFormat,
    Speculation,
    TextFormat,
    plain_text,
    template_call,
)
from edgespec.app.serve.apis.streaming import STREAMS, Routes, ServedModel
from edgespec.core import TokenLogprob
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post("/v1/responses", responses=STREAMS)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await served.respond(body, request, lambda _: ResponsesEncoder(served.service, body))


class OutputText(Body):
    """A content part of a message, of a user or of an earlier response."""

    type: Literal["output_text", "input_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(Body):
    """`id`, `status` and `phase` have no effect."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[OutputText]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: str | None = None


class ResponseTool(Body):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedResponseTool(Body):
    type: Literal["function"]
    name: str


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    """`/v1/responses`. `metadata` is returned; `store`, `service_tier`, `prompt_cache_key` have no effect."""

    model: str
    input: str | list[CallItem | CallOutputItem | MessageItem]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    speculation: Speculation | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or []) or bool(self.top_logprobs)

    def requests(self) -> list[GenerationRequest]:
        """Return the one request. Raises ValueError for fields that contradict each other."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for item in self.input:
                _add(messages, item)
        if not messages or not self.input:
            raise ValueError("input is empty")
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools or []
        ]
        request = GenerationRequest(
            messages=messages,
            tools=tools,
            choice=self._choice(bool(tools)),
            format=self._format(),
            sampling=Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            ),
            max_tokens=self.max_output_tokens or 0,
            max_draft=self.speculation.max_draft if self.speculation is not None else None,
            user=self.user or self.safety_identifier or "",
        )
        return [request]

    def _choice(self, tools: bool) -> ToolChoice:
        parallel = self.parallel_tool_calls is not False
        match self.tool_choice:
            case None:
                return ToolChoice("auto" if tools else "none", parallel=parallel)
            case NamedResponseTool(name=name):
                return ToolChoice("required", named=name, parallel=False)
            case mode:
                return ToolChoice(mode, parallel=parallel)

    def _format(self) -> tuple[GrammarKind, Any] | None:
        match self.text.format if self.text is not None else None:
            case JsonObjectFormat():
                return "json_object", None
            case SchemaFormat(schema_=schema):
                return "json_schema", schema
        return None


class ResponsesEncoder(Encoder):
    """A response. `body` is updated with every event."""

    def __init__(self, vocab: Pieces, body: ResponsesRequest) -> None:
        self._vocab, self._logprobs = vocab, body.wants_logprobs
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text is not None else {}
        choice = body.tool_choice
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
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedResponseTool) else choice or "auto",
            "tools": [
                {"strict": False, "parameters": {}, **tool.model_dump(exclude_none=True)}
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

    def call(self, index: int, call: int, name: str) -> Iterator[ServerEvent]:
        begun = {"type": "function_call", "call_id": new_id("call_"), "name": name, "arguments": ""}
        yield from self._add({"id": new_id("fc_"), **begun})

    def arguments(self, index: int, call: int, text: str) -> Iterator[ServerEvent]:
        self._output[-1]["arguments"] += text
        yield self._event("response.function_call_arguments.delta", **self._place(), delta=text)

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        cut = stats.stop_reason in ("length", "context")
        status = "incomplete" if cut else "completed"
        if not self._output:  # a response without text contains one empty message
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
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": stats.accepted,
                "rejected_prediction_tokens": stats.drafted - stats.accepted,
            },
            "total_tokens": stats.prompt_tokens + len(stats.tokens),
            "speculation": {"drafted": stats.drafted, "accepted": stats.accepted},
        }
        yield self._event(f"response.{status}", response=self._body)

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        self._body["status"] = "failed"
        self._body["error"] = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response=self._body)

    def _open_message(self) -> Iterator[ServerEvent]:
        if self._open and self._output[-1]["type"] == "message":
            return
        yield from self._add({"id": new_id("msg_"), "type": "message", "role": "assistant", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output[-1]["content"].append(part)
        yield self._event("response.content_part.added", **self._place(), content_index=0, part=part)

    def _add(self, item: dict[str, Any]) -> Iterator[ServerEvent]:
        yield from self._close("completed")
        self._output.append({**item, "status": "in_progress"})
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
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **place, **done)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _event(self, type_: str, **fields: Any) -> ServerEvent:
        number, self._sent = self._sent, self._sent + 1
        return {"type": type_, **fields, "sequence_number": number}


def _add(messages: list[dict[str, Any]], item: CallItem | CallOutputItem | MessageItem) -> None:
    """Append `item` to `messages` in the form of chat templates, which have tool calls within a message."""
    match item:
        case CallItem():
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = template_call(item.call_id, item.name, item.arguments)
            messages[-1].setdefault("tool_calls", []).append(call)
        case CallOutputItem():
            output = plain_text(item.output)
            messages.append({"role": "tool", "content": output, "tool_call_id": item.call_id})
        case MessageItem():
            content = item.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text})
