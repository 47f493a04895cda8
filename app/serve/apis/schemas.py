"""The bodies of OpenAI's chat and text completions.

Every parameter here is implemented, or documented as accepted without effect, or rejected by name. All others
are ignored and counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.serve.apis.body import Body, template_variables, unset
from edgespec.app.serve.apis.tools import (
    ChatTool,
    Custom,
    CustomTool,
    Function,
    FunctionTool,
    offered,
    read_choice,
)
from edgespec.app.serve.apis.transcript import Content, OpenContent, PastCall, Transcript, text_of
from edgespec.models.prompting.fim import FimPrompt
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.sampling import Sampling


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
    arguments: str | dict[str, Any] = ""


class CustomCall(Body):
    name: str
    input: str = ""


class ToolCall(Body):
    id: str = ""
    type: str = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    index: int | None = None  # of streamed calls, which some clients send back unchanged

    def past(self) -> PastCall | None:
        """Return the call, None if it is neither a function's nor a custom tool's."""
        if self.function is not None:
            return PastCall(self.id, self.function.name, self.function.arguments)
        if self.custom is not None:
            return PastCall(self.id, self.custom.name, {"input": self.custom.input})
        return None


class AssistantMessage(Body):
    """An earlier response. `refusal`, `annotations`, `audio` and `function_call` have no effect.

    Reasoning has an effect only where the model's template uses it.
    """

    role: Literal["assistant"]
    content: OpenContent | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    reasoning_details: Any = None
    thinking: Any = None

    @property
    def reasoned(self) -> str:
        found = (self.reasoning_content, self.reasoning, self.thinking)
        return next((one for one in found if isinstance(one, str)), "")


class ToolMessage(Body):
    role: Literal["tool", "function"]
    content: OpenContent | dict[str, Any] | None = None
    tool_call_id: str | None = None
    name: str | None = None


ChatMessageParam = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object, or one of a `schema`, as llama.cpp and others have it."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")


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
    named by `user` or `safety_identifier`, take turns. `repeat_penalty` is llama.cpp's `repetition_penalty`.
    """

    may_be_minus_one: ClassVar[frozenset[str]] = frozenset(
        {"max_tokens", "max_completion_tokens", "top_k", "seed", "n_predict"}
    )

    model: str = ""
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
    repeat_penalty: float | None = Field(None, gt=0, le=10)
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

    @property
    def _repetition_penalty(self) -> float | None:
        return self.repeat_penalty if self.repetition_penalty is None else self.repetition_penalty

    def sampling(self, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self._repetition_penalty or 1.0,
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
            "unset": unset(self, repetition_penalty=self._repetition_penalty),
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
    """`/v1/chat/completions`.

    `prediction`, `verbosity`, `web_search_options` and `cache_prompt` have no effect.
    """

    messages: list[ChatMessageParam] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: (
        Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")] | None
    ) = None
    tools: list[ChatTool] | None = Field(None, max_length=1024)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prediction: dict[str, Any] | None = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | None = None
    thinking: bool | dict[str, Any] | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    cache_prompt: bool | None = None

    def requests(self) -> list[GenerationRequest]:
        """Return the one request. Raises ValueError for parameters that contradict each other."""
        if self.functions:
            raise ValueError("functions is not supported: use tools")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        settings = self.shared(logprobs)
        if self.max_completion_tokens is not None:
            settings["max_tokens"] = self.max_completion_tokens
        history = read_messages(self.messages)
        continues = bool(self.continue_final_message)
        if continues != history.ends_with_answer:
            raise ValueError(
                "the last message must be of the user or of a tool, unless continue_final_message is true: "
                "then it must be the beginning of the answer"
            )
        if self.add_generation_prompt is not None and self.add_generation_prompt == continues:
            raise ValueError("add_generation_prompt must be the opposite of continue_final_message")
        tools = offered(self._offered())
        parallel = self.parallel_tool_calls is not False
        choice, tools = read_choice(self.tool_choice, tools, parallel=parallel)
        form = self.response_format
        request = GenerationRequest(
            messages=history.messages,
            continues=continues,
            tools=tools,
            choice=choice,
            format=self._format(),
            lenient=not (isinstance(form, JsonSchemaFormat) and form.json_schema.strict),
            variables=template_variables(self),
            **settings,
        )
        return [request]

    @property
    def custom_tools(self) -> set[str]:
        return {tool.custom.name for tool in self.tools or [] if isinstance(tool, CustomTool)}

    def _offered(self) -> Iterator[Function | Custom]:
        for tool in self.tools or []:
            match tool:
                case FunctionTool():
                    yield tool.function
                case CustomTool():
                    yield tool.custom

    def _format(self) -> tuple[GrammarKind, Any] | None:
        given = self.grammar_format()
        if given is not None and not isinstance(self.response_format, TextFormat | None):
            raise ValueError("grammar and response_format cannot be used together")
        match self.response_format:
            case JsonObjectFormat(schema_=None):
                return "json_object", None
            case JsonObjectFormat(schema_=schema) | JsonSchemaFormat(json_schema=JsonSchema(schema_=schema)):
                return "json_schema", schema
        return given


class CompletionRequest(Common):
    """`/v1/completions`. With a `suffix`, the text that belongs between the prompt and it.

    Control tokens written in a text prompt are text, unless these are all the marks of the model for filling
    in the middle; token ids stay control tokens.
    """

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[Any]:
        """All prompts, texts or lists of token ids."""
        if isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int)):
            return list(self.prompt)
        return [self.prompt]

    def requests(self) -> list[GenerationRequest]:
        """Return one request for each prompt. Raises ValueError for no prompt and for too many."""
        prompts = self.prompts
        if not 1 <= len(prompts) <= 16:
            raise ValueError("prompt must be 1 to 16 prompts")
        if not all(prompts):
            raise ValueError("a prompt is empty")
        if self.echo and (self.logprobs is not None or not all(isinstance(one, str) for one in prompts)):
            raise ValueError("echo needs prompts of text, and cannot be used together with logprobs")
        if self.suffix and not all(isinstance(one, str) for one in prompts):
            raise ValueError("suffix needs prompts of text")
        settings = self.shared(self.logprobs)
        if not settings["max_tokens"]:
            settings["max_tokens"] = 16  # OpenAI's default for this endpoint
        return [
            GenerationRequest(
                prompt=FimPrompt(prompt, self.suffix) if self.suffix else prompt,
                format=self.grammar_format(),
                **settings,
            )
            for prompt in prompts
        ]


def read_messages(messages: Sequence[Any]) -> Transcript:
    """Convert messages for chat templates. Raises ValueError for a result whose call is not known."""
    history = Transcript()
    for message in messages:
        match message:
            case SystemMessage() | UserMessage():
                history.add(message.role, text_of(message.content))
            case AssistantMessage():
                calls = [call for one in message.tool_calls or [] if (call := one.past()) is not None]
                history.answer(text_of(message.content), calls, message.reasoned)
            case ToolMessage(content=content):
                if isinstance(content, dict):
                    text = json.dumps(content, ensure_ascii=False)
                else:
                    text = text_of(content, notes=True)
                history.result(text, message.tool_call_id, message.name)
    return history
