"""The bodies of Anthropic's Messages API.

Parameters are implemented, have no effect as their class says, or are rejected by name; others are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.serve.apis.body import Body, template_variables, unset
from edgespec.app.serve.apis.schemas import Speculation
from edgespec.app.serve.apis.transcript import PastCall, Transcript, note_of, text_in
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling

_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*")
"""A block of Claude Code's system prompt that changes with each request, and concerns no model."""


class Block(Body):
    """A content block. `cache_control` has no effect: the KV cache of earlier requests is always reused."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Any = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class OtherBlock(Body):
    """An image, a document, a search result, a server's tool use or its result, redacted reasoning."""

    counts_unknown: ClassVar[bool] = False

    type: str


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str | None = None
    content: str | list[ResultPart] | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    """Reasoning of an earlier response. It has an effect only where the model's template uses it."""

    type: Literal["thinking"]
    thinking: str = ""
    signature: str | None = None


def _kind(block: Any) -> str | None:
    given = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    if not isinstance(given, str):
        return None
    return given if given in ("text", "tool_use", "tool_result", "thinking") else "other"


def _result_kind(block: Any) -> str | None:
    kind = _kind(block)
    return kind if kind in ("text", None) else "other"


def _tool_kind(tool: Any) -> str:
    given = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if given in ("custom", None) else "other"


ResultPart = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")], Discriminator(_result_kind)
]
AnyBlock = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_kind),
]


class MessageParam(Body):
    """A message. System messages may be anywhere. `output_config` has no effect."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[AnyBlock]
    output_config: Any = None


class ToolParam(Block):
    """A tool. `defer_loading`, `allowed_callers`, `input_examples` and `eager_input_streaming`: no effect."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: Any = None
    input_examples: Any = None


class ServerTool(Body):
    """A tool that Anthropic's servers run, or whose schema only their models know: it is left out."""

    counts_unknown: ClassVar[bool] = False

    type: str


AnyTool = Annotated[
    Annotated[ToolParam, Tag("custom")] | Annotated[ServerTool, Tag("other")], Discriminator(_tool_kind)
]


class ToolChoiceParam(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class UserId(Body):
    user_id: str | None = None


class JsonOutput(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """`effort` reaches the template as `reasoning_effort`."""

    format: JsonOutput | None = None
    effort: str | None = None


class CountRequest(Body):
    """`/v1/messages/count_tokens`. `context_management`, `container` and `mcp_servers` have no effect."""

    may_be_minus_one: ClassVar[frozenset[str]] = frozenset({"top_k"})

    model: str = ""
    messages: list[MessageParam] = Field(min_length=1, max_length=10_000)
    system: str | list[TextBlock] | None = None
    tools: list[AnyTool] | None = Field(None, max_length=1024)
    tool_choice: ToolChoiceParam | None = None
    thinking: dict[str, Any] | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None
    cache_control: dict[str, Any] | None = None
    context_management: Any = None
    container: Any = None
    mcp_servers: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def reasoning_effort(self) -> str | None:
        return self.output_config.effort if self.output_config is not None else None

    def conversation(self, **settings: Any) -> GenerationRequest:
        """Return the conversation as a request. Raises ValueError for fields that contradict each other."""
        history = Transcript()
        if system := _system(self.system):
            history.add("system", system)
        for message in self.messages:
            _add(history, message)
        if history.messages[-1].get("tool_calls"):
            raise ValueError("messages must not end with a tool_use block: add its tool_result")
        output = self.output_config.format if self.output_config is not None else None
        output = output or self.output_format
        tools = [_offered(tool) for tool in self.tools or [] if isinstance(tool, ToolParam)]
        return GenerationRequest(
            messages=history.messages,
            continues=history.ends_with_answer,
            variables=template_variables(self),
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
    temperature: float | None = Field(None, ge=0, le=2)
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
            unset=unset(self),
            max_tokens=self.max_tokens,
            stops=self.stop_sequences or [],
            max_draft=self.speculation.max_draft if self.speculation is not None else None,
            user=(self.metadata.user_id if self.metadata is not None else None) or "",
        )
        return [request]


def _offered(tool: ToolParam) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or "",
        "parameters": tool.input_schema,
        "strict": bool(tool.strict),
    }
    return {"type": "function", "function": function}


def _system(system: str | Sequence[TextBlock] | None) -> str:
    if system is None or isinstance(system, str):
        return system or ""
    return "\n".join(block.text for block in system if not _BILLING.fullmatch(block.text.strip()))


def _add(history: Transcript, message: MessageParam) -> None:
    """Add a message to `history`, in which tool results are separate messages before it."""
    role = message.role
    if isinstance(message.content, str):
        return history.answer(message.content) if role == "assistant" else history.add(role, message.content)
    texts, reasoning, calls, results = list[str](), list[str](), list[PastCall](), 0
    for i, block in enumerate(message.content):
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                reasoning.append(block.thinking)
            case ToolUseBlock() if role == "assistant":
                calls.append(PastCall(block.id, block.name, block.input))
            case ToolResultBlock() if role == "user":
                history.result(_result(block), block.tool_use_id)
                results += 1
            case OtherBlock() if role != "assistant":
                texts.append(_readable(block, i))
            case ToolUseBlock() | ToolResultBlock():
                raise ValueError("tool_use belongs in assistant messages and tool_result in user messages")
    text = "\n".join(texts)
    if role == "assistant":
        history.answer(text, calls, "\n".join(reasoning))
    elif texts or not results:
        history.add(role, text)
    return None


def _result(block: ToolResultBlock) -> str:
    content = block.content
    if content is None or isinstance(content, str):
        return content or ""
    parts = [one.text if isinstance(one, TextBlock) else note_of(one.model_dump()) for one in content]
    return "\n".join(part for part in parts if part)


def _readable(block: OtherBlock, index: int) -> str:
    """Return the text of a block of the user. Raises ValueError if it is an image, or has no text."""
    found = text_in(block.model_dump())
    if found is None:
        raise ValueError(f"content[{index}] is of type {block.type[:40]!r}: this model reads text only")
    return found
