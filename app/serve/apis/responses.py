"""OpenAI's Responses, without memory: nothing is stored, so every request carries its whole conversation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from time import time
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import (
    CompletionService,
    Delta,
    Finished,
    GenerationRequest,
    ResponseStream,
)
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import chat_logprobs, new_id
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
from edgespec.app.serve.apis.streaming import Json, Served, Stream, event, failure, unless_gone
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.models.prompting.tool_calls import Arguments, Called, TextPiece, ToolChoice
from edgespec.sampling import Sampling


class OutputText(Body):
    """A part of an earlier answer."""

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
    """`/v1/responses`. `metadata` is sent back; `store`, `service_tier`, `prompt_cache_key` do nothing."""

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

    def ask(self) -> GenerationRequest:
        """Raises ValueError for a request that makes no sense."""
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
        return GenerationRequest(
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


async def respond(served: Served, body: ResponsesRequest, request: Request) -> Response:
    served.check_model(body.model)
    jobs = await served.jobs(lambda: [body.ask()], request)
    (answer,) = served.submit(jobs, request)
    response = _Response(served.service, body)
    if body.stream:
        return Stream(_stream(answer, response), [answer])

    async def whole() -> None:
        async for news in answer:
            if not isinstance(news, Finished):
                for _ in response.part(news):
                    pass
            elif (error := failure(news)) is not None:
                raise error
            else:
                for _ in response.end(news.result):
                    pass

    with answer:
        await unless_gone(request, whole())
    return Json(response.body)


async def _stream(answer: ResponseStream, response: _Response) -> AsyncIterator[bytes]:
    number = 0

    def numbered(events: Iterator[dict[str, Any]]) -> Iterator[bytes]:
        nonlocal number
        for one in events:
            yield event({**one, "sequence_number": number}, one["type"])
            number += 1

    for data in numbered(response.begin()):
        yield data
    async for news in answer:
        if not isinstance(news, Finished):
            events = response.part(news)
        elif (error := failure(news)) is not None:
            events = response.fail(error)
        else:
            events = response.end(news.result)
        for data in numbered(events):
            yield data


class _Response:
    """An answer as it grows: each method gives the events of what it adds to `body`."""

    def __init__(self, service: CompletionService, asked: ResponsesRequest) -> None:
        self._service, self._logprobs = service, asked.wants_logprobs
        text = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text is not None else {}
        choice = asked.tool_choice
        self.body: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedResponseTool) else choice or "auto",
            "tools": [
                {"strict": False, "parameters": {}, **tool.model_dump(exclude_none=True)}
                for tool in asked.tools or []
            ],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": asked.user,
        }
        self._output: list[dict[str, Any]] = self.body["output"]
        self._open = False

    def begin(self) -> Iterator[dict[str, Any]]:
        yield {"type": "response.created", "response": self.body}
        yield {"type": "response.in_progress", "response": self.body}

    def part(self, part: Delta) -> Iterator[dict[str, Any]]:
        logprobs: Sequence[Any] = ()
        if self._logprobs and part.logprobs:
            logprobs = chat_logprobs(self._service, part.tokens, part.logprobs)["content"]
        for one in part.events:
            match one:
                case TextPiece(text):
                    yield from self._write(text, logprobs)
                    logprobs = ()
                case Called(_, name):
                    call = {
                        "type": "function_call",
                        "call_id": new_id("call_"),
                        "name": name,
                        "arguments": "",
                    }
                    yield from self._add({"id": new_id("fc_"), **call})
                case Arguments(_, text):
                    self._output[-1]["arguments"] += text
                    yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": text}

    def end(self, result: GenerationStats) -> Iterator[dict[str, Any]]:
        cut = result.stop_reason in ("length", "context")
        if not self._output:  # an answer without a word
            yield from self._write("", ())
        yield from self._close("incomplete" if cut else "completed")
        self.body["status"] = "incomplete" if cut else "completed"
        self.body["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        self.body["completed_at"] = None if cut else int(time())
        self.body["usage"] = {
            "input_tokens": result.prompt_tokens,
            "input_tokens_details": {"cached_tokens": result.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": len(result.tokens),
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "accepted_prediction_tokens": result.accepted,
                "rejected_prediction_tokens": result.drafted - result.accepted,
            },
            "total_tokens": result.prompt_tokens + len(result.tokens),
            "speculation": {"drafted": result.drafted, "accepted": result.accepted},
        }
        yield {"type": f"response.{self.body['status']}", "response": self.body}

    def fail(self, error: ApiError) -> Iterator[dict[str, Any]]:
        self.body["status"] = "failed"
        self.body["error"] = {"code": "server_error", "message": error.message}
        yield {"type": "response.failed", "response": self.body}

    def _write(self, text: str, logprobs: Sequence[Any]) -> Iterator[dict[str, Any]]:
        if not self._open or self._output[-1]["type"] != "message":
            message = {"type": "message", "role": "assistant", "content": []}
            yield from self._add({"id": new_id("msg_"), **message})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._output[-1]["content"].append(part)
            yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": part}
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text:
            yield {
                "type": "response.output_text.delta",
                **self._place(),
                "content_index": 0,
                "delta": text,
                "logprobs": list(logprobs),
            }

    def _add(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._output.append({**item, "status": "in_progress"})
        self._open = True
        index = len(self._output) - 1
        yield {"type": "response.output_item.added", "output_index": index, "item": self._output[-1]}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        self._open = False
        item, place = self._output[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            place["content_index"] = 0
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **place, **done}
            yield {"type": "response.content_part.done", **place, "part": part}
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}


def _add(messages: list[dict[str, Any]], item: CallItem | CallOutputItem | MessageItem) -> None:
    """Add an item to `messages` as chat templates read them: calls belong to the message before them."""
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
