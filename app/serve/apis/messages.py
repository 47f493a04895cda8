"""Anthropic's Messages API, and its endpoint that counts tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.encoding import Encoder, ServerEvent, new_id
from edgespec.app.serve.apis.errors import ApiError, error_body
from edgespec.app.serve.apis.schemas import Body, Speculation, template_call
from edgespec.app.serve.apis.streaming import STREAMS, Json, Routes, ServedModel
from edgespec.core import TokenLogprob
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling

_PATH = "/v1/messages"


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post(_PATH, responses=STREAMS)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        return await served.respond(
            body, request, lambda prepared: MessagesEncoder(body.model, len(prepared[0].prompt))
        )

    @app.post(f"{_PATH}/count_tokens")
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        served.check_name(body.model)
        (prepared,) = await served.prepare(lambda: [body.conversation()], request)
        return Json({"input_tokens": len(prepared.prompt)})


class Block(Body):
    """A content block. `cache_control` has no effect: the KV cache of earlier requests is always reused."""

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
    """A part of another model's response. Has no effect."""

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

    def conversation(self, **settings: Any) -> GenerationRequest:
        """Return the conversation as a request. Raises ValueError for fields that contradict each other."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system)})
        for message in self.messages:
            messages += _plain(message)
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "messages must end with a user message: prefilling the response is not supported"
            )
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
            **settings,
        )

    def _choice(self, tools: bool) -> ToolChoice:
        given = self.tool_choice
        if given is None:
            return ToolChoice("auto" if tools else "none")
        parallel = not given.disable_parallel_tool_use
        if (given.type == "tool") != (given.name is not None):
            raise ValueError("tool_choice needs a name if its type is tool, and only then")
        if given.type == "tool":
            return ToolChoice("required", named=given.name, parallel=False)
        modes: dict[str, Literal["auto", "none", "required"]] = {"any": "required", "none": "none"}
        return ToolChoice(modes.get(given.type, "auto"), parallel=parallel)


class MessagesRequest(CountRequest):
    """`/v1/messages`. Users in `metadata` take turns; `service_tier` has no effect."""

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

    def requests(self) -> list[GenerationRequest]:
        request = self.conversation(
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
        return [request]


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
            block["input"] = _object(self._json)
            self._json = ""
        yield {"type": "content_block_stop", "index": len(self._content) - 1}


def _object(text: str) -> dict[str, Any]:
    """Parse the input of a tool call, as far as it was generated."""
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
    """Convert a message for chat templates, in which tool results are separate messages before it."""
    blocks = [] if isinstance(message.content, str) else message.content
    texts = [message.content] if isinstance(message.content, str) else []
    texts += [block.text for block in blocks if isinstance(block, TextBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    results = [block for block in blocks if isinstance(block, ToolResultBlock)]
    if (results and message.role == "assistant") or (calls and message.role == "user"):
        raise ValueError("tool_use belongs in assistant messages and tool_result in user messages")
    plain: list[dict[str, Any]] = [
        {"role": "tool", "content": _text(one.content), "tool_call_id": one.tool_use_id} for one in results
    ]
    if texts or calls or not results:
        converted: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
        if calls:
            converted["tool_calls"] = [template_call(call.id, call.name, call.input) for call in calls]
        plain.append(converted)
    return plain
