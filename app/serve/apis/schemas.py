"""The bodies of OpenAI's chat and text completions.

Every parameter is either implemented, or documented here as accepted without effect, or rejected by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edgespec.app.engine.completions import GenerationRequest
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling


class Body(BaseModel):
    """A part of a request. Unknown fields are rejected."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Body):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # of streamed calls, which some clients send back unchanged


class AssistantMessage(Body):
    """An earlier response. `refusal`, `annotations`, `audio` and `function_call` have no effect."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


ChatMessageParam = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarParam(Body):
    """Edgespec's own: a grammar of the output, in llama.cpp's GBNF, as a regular expression, or in Lark."""

    type: Literal["gbnf", "regex", "lark", "choice"]
    value: str | list[str]


class Speculation(Body):
    """Edgespec's own: the maximum number of draft tokens in a round. It changes speed, not text."""

    max_draft: int = Field(ge=0, le=31)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Common(Body):
    """The parameters that chat and text completions share.

    `metadata`, `store`, `service_tier` and `prompt_cache_key` have no effect. Requests of different users, as
    named by `user` or `safety_identifier`, take turns.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=16)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None
    grammar: str | GrammarParam | None = None
    speculation: Speculation | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Common:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or not all(0 < len(one) <= 1000 for one in stops):
            raise ValueError("stop must be at most 16 texts of 1 to 1000 characters")
        if len(self.logit_bias or {}) > 1024:
            raise ValueError("logit_bias may name at most 1024 tokens")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        self.bias()
        return self

    def bias(self) -> dict[int, float]:
        found = {}
        for token, value in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10 and -100 <= value <= 100):
                raise ValueError("logit_bias maps token ids to numbers from -100 to 100")
            found[int(token)] = value
        return found

    def sampling(self, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.bias(),
            seed=None if self.seed is None else self.seed % 2**63,
            logprobs=logprobs,
        )

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def shared(self, logprobs: int | None) -> dict[str, Any]:
        """Return the fields of a GenerationRequest that these parameters define."""
        return {
            "sampling": self.sampling(logprobs),
            "max_tokens": self.max_tokens or 0,
            "stops": [self.stop] if isinstance(self.stop, str) else self.stop or [],
            "max_draft": self.speculation.max_draft if self.speculation is not None else None,
            "count": self.n or 1,
            "user": self.user or self.safety_identifier or "",
        }

    def grammar_format(self) -> tuple[GrammarKind, Any] | None:
        if self.grammar is None:
            return None
        if isinstance(self.grammar, str):
            return "gbnf", self.grammar
        return self.grammar.type, self.grammar.value


class ChatRequest(Common):
    """`/v1/chat/completions`. `prediction` has no effect."""

    messages: list[ChatMessageParam] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    tools: list[FunctionTool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None

    def requests(self) -> list[GenerationRequest]:
        """Return the one request. Raises ValueError for parameters that contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        settings = self.shared(logprobs)
        if self.max_completion_tokens is not None:
            settings["max_tokens"] = self.max_completion_tokens
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or []]
        request = GenerationRequest(
            messages=[plain_message(message) for message in self.messages],
            tools=tools,
            choice=self._choice(bool(tools)),
            format=self._format(),
            **settings,
        )
        return [request]

    def _choice(self, tools: bool) -> ToolChoice:
        parallel = self.parallel_tool_calls is not False
        match self.tool_choice:
            case None:
                return ToolChoice("auto" if tools else "none", parallel=parallel)
            case NamedTool(function=function):
                return ToolChoice("required", named=function.name, parallel=False)
            case mode:
                return ToolChoice(mode, parallel=parallel)

    def _format(self) -> tuple[GrammarKind, Any] | None:
        given = self.grammar_format()
        if given is not None and not isinstance(self.response_format, TextFormat | None):
            raise ValueError("grammar and response_format cannot be used together")
        match self.response_format:
            case JsonObjectFormat():
                return "json_object", None
            case JsonSchemaFormat(json_schema=schema):
                return "json_schema", schema.schema_
        return given


class CompletionRequest(Common):
    """`/v1/completions`. Control tokens written in a text prompt are text; token ids stay control tokens."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def requests(self) -> list[GenerationRequest]:
        """Return one request for each prompt. Raises ValueError for no prompt and for too many."""
        prompts: list[Any] = [self.prompt]
        if isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int)):
            prompts = list(self.prompt)
        if not 1 <= len(prompts) <= 16:
            raise ValueError("prompt must be 1 to 16 prompts")
        if not all(prompts):
            raise ValueError("a prompt is empty")
        settings = self.shared(self.logprobs)
        if not settings["max_tokens"]:
            settings["max_tokens"] = 16  # OpenAI's default for this endpoint
        return [
            GenerationRequest(prompt=prompt, format=self.grammar_format(), **settings) for prompt in prompts
        ]


def plain_text(content: str | Sequence[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def plain_message(message: Any) -> dict[str, Any]:
    """Convert a message for chat templates: content parts become one text, JSON arguments an object."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": plain_text(message.content)}
    if isinstance(message, AssistantMessage) and message.tool_calls:
        plain["tool_calls"] = [
            template_call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls
        ]
    if isinstance(message, ToolMessage):
        plain["tool_call_id"] = message.tool_call_id
    return plain


def template_call(id_: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """Convert a tool call for chat templates. Raises ValueError unless its arguments are a JSON object."""
    from pydantic_core import from_json

    given = from_json(arguments or "{}", allow_inf_nan=False) if isinstance(arguments, str) else arguments
    if not isinstance(given, Mapping):
        raise ValueError(f"the arguments of the call {id_} are not a JSON object")
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": given}}
