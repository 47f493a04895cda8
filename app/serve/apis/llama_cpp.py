"""llama.cpp's own endpoints: `/completion`, and `/infill`, which fills in the middle.

https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from edgespec.app.engine.completions import GenerationRequest
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.body import Body
from edgespec.app.serve.apis.encoding import Encoder, ServerEvent
from edgespec.app.serve.apis.errors import ApiError, error_body
from edgespec.app.serve.apis.schemas import Common
from edgespec.app.serve.apis.streaming import STREAMS, Routes, ServedModel
from edgespec.core import TokenLogprob
from edgespec.models.prompting.fim import FimPrompt

_STOP_TYPES = {"end": "eos", "stop": "word", "length": "limit", "context": "limit"}


def add_routes(app: Routes, served: ServedModel) -> None:
    @app.post("/completion", responses=STREAMS)
    async def completion(body: NativeRequest, request: Request) -> Response:
        return await served.respond(body, request, lambda _: NativeEncoder(body))

    @app.post("/infill", responses=STREAMS)
    async def infill(body: InfillRequest, request: Request) -> Response:
        return await served.respond(body, request, lambda _: NativeEncoder(body))


class NativeBody(Common):
    """What both endpoints share.

    `n_predict` 0 evaluates the prompt, for later requests, and generates nothing. After `t_max_predict_ms`
    the output ends with its next complete line. `id_slot`, `cache_prompt`, `samplers`, `t_max_prompt_ms`,
    `n_indent` and `timings_per_token` have no effect.
    """

    n_predict: int | None = Field(None, ge=0, le=10_000_000)
    t_max_predict_ms: float | None = Field(None, ge=0)
    response_fields: list[str] | None = None
    json_schema: dict[str, Any] | None = None
    id_slot: Any = None
    cache_prompt: Any = None
    samplers: Any = None
    t_max_prompt_ms: Any = None
    n_indent: Any = None
    timings_per_token: Any = None

    def generation(self, prompt: str | Sequence[int] | FimPrompt) -> GenerationRequest:
        """Return the request to go on from `prompt`."""
        settings = self.shared(None)
        settings["max_tokens"] = 1 if self.n_predict == 0 else self.n_predict or self.max_tokens or 0
        seconds = None if self.t_max_predict_ms is None else self.t_max_predict_ms / 1000
        given = self.grammar_format()
        if self.json_schema is not None:
            given = "json_schema", self.json_schema
        return GenerationRequest(
            prompt=prompt, format=given, lenient=True, line_seconds=seconds or None, **settings
        )


class NativeRequest(NativeBody):
    """`/completion`. In a text with all marks for filling in the middle, these are the model's tokens."""

    prompt: str | list[int]

    def requests(self) -> list[GenerationRequest]:
        if not self.prompt:
            raise ValueError("the prompt is empty")
        return [self.generation(self.prompt)]


class ExtraText(Body):
    """A part of another file."""

    counts_unknown: ClassVar[bool] = False

    text: str
    filename: str = "file"


class InfillRequest(NativeBody):
    """`/infill`. The gap is after `input_prefix` and `prompt`, and before `input_suffix`.

    What does not fit into the context is left out, the text furthest from the gap first.
    """

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraText] | None = Field(None, max_length=1000)
    prompt: str = ""

    def requests(self) -> list[GenerationRequest]:
        extra = [(one.filename, one.text) for one in self.input_extra or []]
        return [self.generation(FimPrompt(self.input_prefix + self.prompt, self.input_suffix, extra))]


class NativeEncoder(Encoder):
    """A completion. A stream ends with an event that has `stop: true` and the figures."""

    def __init__(self, body: NativeBody) -> None:
        self._fields, self._silent = body.response_fields, body.n_predict == 0
        self._body: dict[str, Any] = {"index": 0, "content": "", "model": body.model, "stop": True}

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        if text and not self._silent:
            self._body["content"] += text
            yield {"index": 0, "content": text, "tokens": [], "stop": False}

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        generated = 0 if self._silent else len(stats.tokens)
        self._body |= {
            "tokens_predicted": generated,
            "tokens_evaluated": stats.prompt_tokens,
            "tokens_cached": stats.prompt_tokens + generated,
            "truncated": False,
            "stop_type": _STOP_TYPES.get(stats.stop_reason, "none"),
            "stopping_word": stats.stopped_by or "",
            "timings": timings(stats, generated),
        }
        yield {**self.body, **({"content": ""} if "content" in self.body else {})}

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        yield error_body(error, "")

    @property
    def body(self) -> Mapping[str, Any]:
        if self._fields is None:
            return self._body
        return {path: value for path in self._fields if (value := _at(self._body, path)) is not None}


def timings(stats: GenerationStats, generated: int) -> dict[str, Any]:
    """Return the figures of a generation by llama.cpp's names. `prompt_n` counts the evaluated tokens."""
    prompt, rest = stats.seconds_to_first_token, max(0.0, stats.seconds - stats.seconds_to_first_token)
    evaluated = stats.prompt_tokens - stats.cached_tokens
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": evaluated,
        "prompt_ms": 1000 * prompt,
        "prompt_per_second": evaluated / prompt if prompt else 0.0,
        "predicted_n": generated,
        "predicted_ms": 1000 * rest,
        "predicted_per_second": stats.tokens_per_second,
        "draft_n": stats.drafted,
        "draft_n_accepted": stats.accepted,
    }


def _at(value: Any, path: str) -> Any:
    """Return the value at a path such as timings/prompt_n, None if there is none."""
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
