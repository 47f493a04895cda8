"""The body of OpenAI's Responses API.

Parameters are implemented, have no effect as their class says, or are rejected by name; others are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.serve.apis.body import Body, template_variables, unset
from edgespec.app.serve.apis.response_store import StoredMessages
from edgespec.app.serve.apis.schemas import JsonObjectFormat, Speculation, TextFormat
from edgespec.app.serve.apis.tools import Custom, Function, OtherTool, kind_of_tool, offered, read_choice
from edgespec.app.serve.apis.transcript import OpenContent, PastCall, TextPart, Transcript, text_of
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.sampling import Sampling


class OutputText(TextPart):
    """A content part of a message, of a user or of an earlier response."""

    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Body):
    """An item of the input. `id`, `status` and `phase` have no effect."""

    id: str | None = None
    status: str | None = None
    phase: str | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: str | list[OutputText]


class AnswerItem(Item):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: OpenContent


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str


class CallOutputItem(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str | None = None
    output: OpenContent | None = None
    name: str | None = None


class ReasoningItem(Item):
    """Reasoning of an earlier response. It has an effect only where the model's template uses it."""

    type: Literal["reasoning"]
    summary: Any = None
    content: Any = None
    encrypted_content: str | None = None

    @property
    def reasoned(self) -> str:
        parts = self.content or self.summary
        texts = (
            (one.get("text") for one in parts if isinstance(one, Mapping)) if isinstance(parts, list) else ()
        )
        return "\n".join(text for text in texts if isinstance(text, str))


class OtherItem(Body):
    """An item of another kind: a call of a shell or a search, and its output.

    With a `call_id` it is a call of the tool of that kind, or its result; else it has no effect.
    """

    counts_unknown: ClassVar[bool] = False

    type: str


def _kind(item: Any) -> str | None:
    get = item.get if isinstance(item, dict) else lambda name, other=None: getattr(item, name, other)
    kind = get("type", "message" if get("role") is not None else None)
    if kind == "message":
        return "answer" if get("role") == "assistant" else "message"
    if kind in ("function_call_output", "custom_tool_call_output"):
        return "output"
    if kind in ("function_call", "custom_tool_call", "reasoning"):
        return str(kind)
    return "other" if isinstance(kind, str) else None


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[AnswerItem, Tag("answer")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[CallOutputItem, Tag("output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_kind),
]


class FlatFunction(Function):
    type: Literal["function"]


class FlatCustom(Custom):
    type: Literal["custom"]


ResponseTool = Annotated[
    Annotated[FlatFunction, Tag("function")]
    | Annotated[FlatCustom, Tag("custom")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(kind_of_tool),
]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    """`verbosity` has no effect."""

    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: str | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    """`/v1/responses`.

    `metadata` is returned. `service_tier`, `prompt_cache_key`, `prompt_cache_retention`, `client_metadata`,
    `max_tool_calls` and what `include` names of other models' outputs have no effect. `truncation` has none
    either: a prompt that does not fit is refused. An empty input is an empty message of the user.
    """

    may_be_minus_one: ClassVar[frozenset[str]] = frozenset({"max_output_tokens"})

    model: str = ""
    input: str | list[AnyItem] = ""
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=1024)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    reasoning: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: Literal[False] | None = None
    previous_response_id: str | None = None
    conversation: None = None
    prompt: None = None
    speculation: Speculation | None = None
    metadata: dict[str, Any] | None = None
    client_metadata: dict[str, Any] | None = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    _earlier: StoredMessages = PrivateAttr(())

    def go_on_from(self, earlier: StoredMessages) -> None:
        """Let the conversation begin with `earlier` messages."""
        self._earlier = earlier

    @property
    def custom_tools(self) -> set[str]:
        return {tool.name for tool in self.tools or [] if isinstance(tool, FlatCustom)}

    @property
    def wants_logprobs(self) -> bool:
        return "message.output_text.logprobs" in (self.include or []) or bool(self.top_logprobs)

    def requests(self) -> list[GenerationRequest]:
        """Return the one request. Raises ValueError for fields that contradict each other."""
        history = self._history()
        if history.ends_with_answer and "tool_calls" not in history.messages[-1]:
            raise ValueError("input must end with a message of the user, or the output of a call")
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools = offered(tool for tool in self.tools or [] if isinstance(tool, Function | Custom))
        parallel = self.parallel_tool_calls is not False
        choice, tools = read_choice(self.tool_choice, tools, parallel=parallel)
        form = self.text.format if self.text is not None else None
        request = GenerationRequest(
            messages=[*instructions, *history.messages],
            variables=template_variables(self),
            tools=tools,
            choice=choice,
            format=self._format(),
            lenient=not (isinstance(form, SchemaFormat) and form.strict),
            sampling=Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            ),
            unset=unset(self),
            max_tokens=self.max_output_tokens or 0,
            max_draft=self.speculation.max_draft if self.speculation is not None else None,
            user=self.user or self.safety_identifier or "",
        )
        return [request]

    def conversation_with(self, output: Iterable[Mapping[str, Any]]) -> StoredMessages:
        """Return the conversation without instructions, with the items of `output`."""
        history = self._history()
        for item in output:
            match item["type"]:
                case "message":
                    history.answer("".join(part["text"] for part in item["content"]))
                case "function_call":
                    history.call(PastCall(item["call_id"], item["name"], item["arguments"]))
                case "custom_tool_call":
                    history.call(PastCall(item["call_id"], item["name"], {"input": item["input"]}))
        return history.messages

    def _history(self) -> Transcript:
        history = Transcript(self._earlier)
        if isinstance(self.input, str):
            history.add("user", self.input)
        else:
            for item in self.input:
                _add(history, item)
        if history.ends_with_reasoning:
            history.messages.pop()
        if not history.messages:
            history.add("user", "")
        return history

    def _format(self) -> tuple[GrammarKind, Any] | None:
        match self.text.format if self.text is not None else None:
            case JsonObjectFormat(schema_=None):
                return "json_object", None
            case JsonObjectFormat(schema_=schema) | SchemaFormat(schema_=schema):
                return "json_schema", schema
        return None


def _add(history: Transcript, item: AnyItem) -> None:
    """Add an item to `history`, in which tool calls are part of a message."""
    match item:
        case MessageItem():
            history.add(item.role, text_of(item.content))
        case AnswerItem():
            history.answer(text_of(item.content))
        case CallItem():
            history.call(PastCall(item.call_id, item.name, item.arguments))
        case CustomCallItem():
            history.call(PastCall(item.call_id, item.name, {"input": item.input}))
        case CallOutputItem():
            history.result(text_of(item.output, notes=True), item.call_id, item.name)
        case ReasoningItem() if item.reasoned:
            history.answer("", reasoning=item.reasoned)
        case OtherItem():
            _add_other(history, item.type, item.model_dump())


def _add_other(history: Transcript, kind: str, item: Mapping[str, Any]) -> None:
    id_ = item.get("call_id")
    if not isinstance(id_, str):
        return
    if kind.endswith("_output"):
        output = item.get("output")
        history.result(output if isinstance(output, str) else str(output or ""), id_)
    elif kind.endswith("_call"):
        action = item.get("action")
        arguments = action if isinstance(action, Mapping) else {}
        history.call(PastCall(id_, kind.removesuffix("_call"), arguments))
