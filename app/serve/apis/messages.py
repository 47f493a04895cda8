"""Anthropic's Messages: requests, answers whole and streamed, and counting tokens."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import Delta, Finished, GenerationRequest, ResponseStream
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import new_id
from edgespec.app.serve.apis.errors import error_body
from edgespec.app.serve.apis.schemas import Body, Speculation, template_call
from edgespec.app.serve.apis.streaming import Json, Served, Stream, event, failure, unless_gone
from edgespec.models.prompting.tool_calls import Arguments, Called, TextPiece, ToolChoice
from edgespec.sampling import Sampling

_PATH = "/v1/messages"


class Block(Body):
    """`cache_control` has no effect: what was read before is always reused."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    """Of another model's answer. Has no effect."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


AnyBlock = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]


class MessageParam(Body):
    role: Literal["user", "assistant"]
    content: str | list[AnyBlock]


class ToolParam(Block):
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoiceParam(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class UserId(Body):
    user_id: str | None = None


class NoThinking(Body):
    type: Literal["disabled"]


class JsonOutput(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    format: JsonOutput | None = None


class CountRequest(Body):
    """`/v1/messages/count_tokens`."""

    model: str
    messages: list[MessageParam] = Field(min_length=1, max_length=10_000)
    system: str | list[TextBlock] | None = None
    tools: list[ToolParam] | None = Field(None, max_length=128)
    tool_choice: ToolChoiceParam | None = None
    thinking: NoThinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    def ask(self, **wanted: Any) -> GenerationRequest:
        """Raises ValueError for what contradicts itself."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system)})
        for message in self.messages:
            messages += _plain(message)
        if messages[-1]["role"] == "assistant":
            raise ValueError("messages must end with one of the user: answers cannot be begun for the model")
        output = self.output_config.format if self.output_config is not None else None
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                    "strict": bool(tool.strict),
                },
            }
            for tool in self.tools or []
        ]
        return GenerationRequest(
            messages=messages,
            tools=tools,
            choice=self._choice(bool(tools)),
            format=("json_schema", output.schema_) if output is not None else None,
            **wanted,
        )

    def _choice(self, tools: bool) -> ToolChoice:
        given = self.tool_choice
        if given is None:
            return ToolChoice("auto" if tools else "none")
        parallel = not given.disable_parallel_tool_use
        if (given.type == "tool") != (given.name is not None):
            raise ValueError("tool_choice needs a name for the type tool, and for no other")
        if given.type == "tool":
            return ToolChoice("required", named=given.name, parallel=False)
        modes: dict[str, Literal["auto", "none", "required"]] = {"any": "required", "none": "none"}
        return ToolChoice(modes.get(given.type, "auto"), parallel=parallel)


class MessagesRequest(CountRequest):
    """`/v1/messages`. `metadata` makes users take turns; `service_tier` has no effect."""

    max_tokens: int = Field(ge=1, le=10_000_000)
    stream: bool | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=1000)]] | None = Field(
        None, max_length=16
    )
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    metadata: UserId | None = None
    service_tier: str | None = None
    speculation: Speculation | None = None

    def full_ask(self) -> GenerationRequest:
        return self.ask(
            sampling=Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k or 0,
                top_p=1.0 if self.top_p is None else self.top_p,
            ),
            max_tokens=self.max_tokens,
            stops=self.stop_sequences or [],
            max_draft=self.speculation.max_draft if self.speculation is not None else None,
            user=(self.metadata.user_id if self.metadata is not None else None) or "",
        )


async def count(served: Served, body: CountRequest, request: Request) -> Response:
    served.check_model(body.model)
    (job,) = await served.jobs(lambda: [body.ask()], request)
    return Json({"input_tokens": len(job.prompt)})


async def messages(served: Served, body: MessagesRequest, request: Request) -> Response:
    served.check_model(body.model)
    jobs = await served.jobs(lambda: [body.full_ask()], request)
    (answer,) = served.submit(jobs, request)
    message = _Message(body.model, len(jobs[0].prompt))
    if body.stream:
        return Stream(_events(answer, message), [answer])

    async def whole() -> None:
        async for news in answer:
            if not isinstance(news, Finished):
                for _ in message.part(news):
                    pass
            elif (error := failure(news)) is not None:
                raise error
            else:
                message.end(news.result)

    with answer:
        await unless_gone(request, whole())
    return Json(message.body)


async def _events(answer: ResponseStream, message: _Message) -> AsyncIterator[bytes]:
    yield _event({"type": "message_start", "message": message.body})
    yield _event({"type": "ping"})
    async for news in answer:
        if not isinstance(news, Finished):
            for one in message.part(news):
                yield _event(one)
        elif (error := failure(news)) is not None:
            yield _event(error_body(error, _PATH))
            return
        else:
            for one in message.end(news.result):
                yield _event(one)


class _Message:
    """An answer as it grows: `part` and `end` give the events of what they add to `body`."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self.body: dict[str, Any] = {
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
        self._content: list[dict[str, Any]] = self.body["content"]
        self._json = ""  # of the input of the call under way
        self._open = False

    def part(self, part: Delta) -> Iterator[dict[str, Any]]:
        for one in part.events:
            match one:
                case TextPiece(text):
                    if not self._open or self._content[-1]["type"] != "text":
                        yield from self._begin({"type": "text", "text": ""})
                    self._content[-1]["text"] += text
                    yield self._delta({"type": "text_delta", "text": text})
                case Called(_, name):
                    yield from self._begin(
                        {"type": "tool_use", "id": new_id("toolu_"), "name": name, "input": {}}
                    )
                case Arguments(_, text):
                    self._json += text
                    yield self._delta({"type": "input_json_delta", "partial_json": text})

    def end(self, result: GenerationStats) -> list[dict[str, Any]]:
        events = list(self._close())
        if result.stop_reason in ("length", "context"):
            reason = "max_tokens" if result.stop_reason == "length" else "model_context_window_exceeded"
        elif any(block["type"] == "tool_use" for block in self._content):
            reason = "tool_use"
        else:
            reason = "stop_sequence" if result.stop_reason == "stop" else "end_turn"
        stopped = {"stop_reason": reason, "stop_sequence": result.stopped_by}
        usage = self.body["usage"]
        usage["input_tokens"] = result.prompt_tokens - result.cached_tokens
        usage["cache_read_input_tokens"] = result.cached_tokens
        usage["output_tokens"] = len(result.tokens)
        usage["speculation"] = {"drafted": result.drafted, "accepted": result.accepted}
        self.body |= stopped
        return [
            *events,
            {"type": "message_delta", "delta": stopped, "usage": usage},
            {"type": "message_stop"},
        ]

    def _begin(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._content.append(block)
        self._open = True
        yield {"type": "content_block_start", "index": len(self._content) - 1, "content_block": {**block}}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._content) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if not self._open:
            return
        self._open = False
        block = self._content[-1]
        if block["type"] == "tool_use":
            block["input"] = _object(self._json)
            self._json = ""
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def _event(data: Mapping[str, Any]) -> bytes:
    return event(data, data["type"])


def _object(text: str) -> dict[str, Any]:
    """The input of a call, as far as it was written: one that was cut short is not whole JSON."""
    from pydantic_core import from_json

    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial="trailing-strings")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(content: str | list[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text for block in content)


def _plain(message: MessageParam) -> list[dict[str, Any]]:
    """A message as chat templates read it. There, results of tools are messages, which come first."""
    blocks = [] if isinstance(message.content, str) else message.content
    texts = [message.content] if isinstance(message.content, str) else []
    texts += [block.text for block in blocks if isinstance(block, TextBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    if (results and message.role == "assistant") or (calls and message.role == "user"):
        raise ValueError("a tool_use is the assistant's and a tool_result the user's")
    plain: list[dict[str, Any]] = [
        {"role": "tool", "content": _text(one.content), "tool_call_id": one.tool_use_id} for one in results
    ]
    if texts or calls or not results:
        told: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
        if calls:
            told["tool_calls"] = [template_call(call.id, call.name, call.input) for call in calls]
        plain.append(told)
    return plain
