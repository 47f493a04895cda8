"""The bodies of Ollama's API.

Parameters are implemented, have no effect as their class says, or are rejected by name; others are ignored.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.serve.apis.body import Body, template_variables
from edgespec.app.serve.apis.tools import ChatTool, FunctionTool, offered
from edgespec.app.serve.apis.transcript import PastCall, Transcript
from edgespec.models.prompting.fim import FimPrompt
from edgespec.models.prompting.grammar import GrammarKind
from edgespec.models.prompting.tool_calls import ToolChoice
from edgespec.sampling import Sampling

_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}


class OllamaOptions(Body):
    """Ollama's options. Those of loading, such as `num_ctx`, and those of other samplers have no effect."""

    counts_unknown: ClassVar[bool] = False
    may_be_minus_one: ClassVar[frozenset[str]] = frozenset({"num_predict", "seed", "top_k"})

    num_predict: int | None = Field(None, ge=-2, le=10_000_000)
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None


class ShowRequest(Body):
    """`/api/show`. `verbose` has no effect."""

    model: str = ""
    verbose: bool | None = None
    stream: bool | None = None


class OllamaRequest(Body):
    """What `/api/chat` and `/api/generate` share. `keep_alive` and `truncate` have no effect."""

    model: str = ""
    stream: bool | None = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    think: bool | str | None = None
    keep_alive: Any = None
    truncate: bool | None = None

    @property
    def enable_thinking(self) -> bool | None:
        return self.think if isinstance(self.think, bool) else None

    @property
    def reasoning_effort(self) -> str | None:
        return self.think if isinstance(self.think, str) else None

    def shared(self) -> dict[str, Any]:
        """Return the fields of a GenerationRequest that these parameters define."""
        options = self.options or OllamaOptions.model_validate({})
        stops = [options.stop] if isinstance(options.stop, str) else options.stop or []
        given: dict[str, Any] = {
            name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")
        }
        given["repetition_penalty"] = options.repeat_penalty
        values: dict[str, Any] = {
            name: _DEFAULTS[name] if value is None else value for name, value in given.items()
        }
        return {
            "sampling": Sampling(
                **values,
                frequency_penalty=options.frequency_penalty or 0.0,
                presence_penalty=options.presence_penalty or 0.0,
                seed=None if options.seed is None else options.seed % 2**63,
            ),
            "unset": frozenset(name for name, value in given.items() if value is None),
            "max_tokens": max(0, options.num_predict or 0),
            "stops": [stop for stop in stops if stop][:32],
            "variables": template_variables(self),
            "format": self._format(),
            "lenient": True,
        }

    def _format(self) -> tuple[GrammarKind, Any] | None:
        if isinstance(self.format, dict):
            return "json_schema", self.format
        return ("json_object", None) if self.format == "json" else None


class OllamaFunction(Body):
    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    index: int | None = None


class OllamaCall(Body):
    function: OllamaFunction
    id: str = ""
    type: str = "function"


class OllamaMessage(Body):
    """A message. `thinking` has an effect only where the model's template uses it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    images: list[Any] | None = None
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(OllamaRequest):
    """`/api/chat`. A last message of the assistant is the beginning of the answer."""

    messages: list[OllamaMessage] = Field(default_factory=list, max_length=10_000)
    tools: list[ChatTool] | None = Field(None, max_length=1024)

    def requests(self) -> list[GenerationRequest]:
        transcript = Transcript()
        for i, message in enumerate(self.messages):
            _add(transcript, message, i)
        tools = offered(tool.function for tool in self.tools or [] if isinstance(tool, FunctionTool))
        return [
            GenerationRequest(
                messages=transcript.messages,
                continues=transcript.ends_with_answer and "tool_calls" not in transcript.messages[-1],
                tools=tools,
                choice=ToolChoice("auto" if tools else "none"),
                **self.shared(),
            )
        ]


class GenerateRequest(OllamaRequest):
    """`/api/generate`. `raw`: the prompt is not a message. `template` and `context` have no effect."""

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    template: str | None = None
    context: list[int] | None = None

    def requests(self) -> list[GenerationRequest]:
        if self.images:
            raise ValueError("images are not supported: this model reads text only")
        if self.suffix:
            return [GenerationRequest(prompt=FimPrompt(self.prompt, self.suffix), **self.shared())]
        if self.raw:
            return [GenerationRequest(prompt=self.prompt, **self.shared())]
        transcript = Transcript()
        if self.system:
            transcript.add("system", self.system)
        transcript.add("user", self.prompt)
        return [GenerationRequest(messages=transcript.messages, **self.shared())]


def _add(transcript: Transcript, message: OllamaMessage, index: int) -> None:
    if message.images and message.role != "tool":
        raise ValueError(f"messages[{index}].images are not supported: this model reads text only")
    match message.role:
        case "assistant":
            calls = [
                PastCall(one.id, one.function.name, one.function.arguments)
                for one in message.tool_calls or []
            ]
            transcript.answer(message.content, calls, message.thinking or "")
        case "tool":
            name = message.tool_name or message.name
            transcript.result(message.content, message.tool_call_id, name, in_order=True)
        case role:
            transcript.add(role, message.content)
