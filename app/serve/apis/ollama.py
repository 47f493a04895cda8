"""Ollama's API: https://github.com/ollama/ollama/blob/main/docs/api.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import edgespec
from edgespec.app.engine.request import GenerationStats
from edgespec.app.serve.apis.embeddings import EmbeddingsRequest, refusal
from edgespec.app.serve.apis.encoding import Encoder, ServerEvent
from edgespec.app.serve.apis.errors import ApiError, dumps, error_body
from edgespec.app.serve.apis.ollama_body import GenerateRequest, OllamaChatRequest, ShowRequest
from edgespec.app.serve.apis.streaming import Json, Routes, ServedModel
from edgespec.app.serve.apis.tools import partial_object
from edgespec.core import TokenLogprob

_PATH = "/api/chat"
_LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The response.", "content": {"application/x-ndjson": {}}}
}
_NEVER = "9999-12-31T23:59:59Z"  # when the model is unloaded
_DONE_REASONS = {"length": "length", "context": "length"}


def add_routes(app: Routes, served: ServedModel) -> None:
    _add_generation(app, served)
    about = _About(served)

    @app.get("/api/version")
    async def version() -> Response:
        return Json({"version": edgespec.__version__})

    @app.get("/api/tags")
    async def tags() -> Response:
        return Json({"models": [about.entry(name) for name in served.names.listed]})

    @app.get("/api/ps")
    async def ps() -> Response:
        loaded = {"expires_at": _NEVER, "size_vram": 0, "context_length": served.service.context_length}
        return Json({"models": [{**about.entry(served.names.listed[0]), **loaded}]})

    @app.post("/api/show")
    async def show(body: ShowRequest, request: Request) -> Response:
        served.accept(body, request)
        return Json(about.details(body.model))

    @app.post("/api/embed")
    async def embed(body: EmbeddingsRequest) -> Response:
        raise refusal(served.check_name(body.model), "embeddings")

    @app.post("/api/embeddings")
    async def embeddings(body: EmbeddingsRequest) -> Response:
        raise refusal(served.check_name(body.model), "embeddings")


def _add_generation(app: Routes, served: ServedModel) -> None:
    @app.post(_PATH, responses=_LINES)
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        if not body.messages:
            served.accept(body, request)
            return Json(OllamaEncoder(body.model, chat=True).loaded)
        return await served.respond(body, request, lambda _: OllamaEncoder(body.model, chat=True))

    @app.post("/api/generate", responses=_LINES)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        if not body.prompt and not body.suffix:
            served.accept(body, request)
            return Json(OllamaEncoder(body.model, chat=False).loaded)
        return await served.respond(body, request, lambda _: OllamaEncoder(body.model, chat=False))


class _About:
    """What the API says of the model."""

    def __init__(self, served: ServedModel) -> None:
        model = served.service.model
        self._summary, self._template = model.summary, model.chat_template or ""
        self._context, self._fills_in = served.service.context_length, served.service.fills_in
        self._format = "gguf" if model.path.suffix == ".gguf" else "onnx"
        self._since = _now()

    def entry(self, name: str) -> dict[str, Any]:
        summary = self._summary
        description = (
            f"{summary.architecture} {summary.parameters} {summary.tensor_bytes} {summary.tokenizer_digest}"
        )
        return {
            "name": name,
            "model": name,
            "modified_at": self._since,
            "size": summary.tensor_bytes,
            "digest": sha256(description.encode()).hexdigest(),
            "details": self._family(),
        }

    def details(self, name: str) -> dict[str, Any]:
        architecture = self._summary.architecture
        info = {
            "general.architecture": architecture,
            "general.parameter_count": self._summary.parameters,
            f"{architecture}.context_length": self._context,
        }
        return {
            "license": "",
            "modelfile": f"FROM {name}\n",
            "parameters": f"num_ctx {self._context}",
            "template": self._template,
            "details": self._family(),
            "model_info": info,
            "capabilities": ["completion", "tools", *(["insert"] if self._fills_in else [])],
            "modified_at": self._since,
        }

    def _family(self) -> dict[str, Any]:
        summary = self._summary
        return {
            "parent_model": "",
            "format": self._format,
            "family": summary.architecture,
            "families": [summary.architecture],
            "parameter_size": _rounded(summary.parameters),
            "quantization_level": max(summary.types, key=lambda name: summary.types[name], default=""),
        }


class OllamaEncoder(Encoder):
    """A response of `/api/chat`, or of `/api/generate` unless it is a `chat`. A stream has lines of JSON."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, *, chat: bool) -> None:
        self._model, self._chat = model, chat
        self._text = self._thinking = ""
        self._calls: list[dict[str, Any]] = []
        self._open: tuple[str, str] | None = None  # the name of a call, and its arguments so far
        self._end: Mapping[str, Any] = {"done": True, "done_reason": "stop"}

    def frame(self, event: ServerEvent) -> bytes:
        return f"{dumps(event)}\n".encode()

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> Iterator[ServerEvent]:
        if text:
            self._text += text
            yield self._message(text, (), {"done": False})

    def reasoning(self, index: int, text: str) -> Iterator[ServerEvent]:
        self._thinking += text
        yield self._message("", (), {"done": False}, text)

    def call(self, index: int, call: int, name: str) -> Iterator[ServerEvent]:
        yield from self._close()
        self._open = name, ""

    def arguments(self, index: int, call: int, text: str) -> Iterator[ServerEvent]:
        if self._open is not None:
            self._open = self._open[0], self._open[1] + text
        yield from ()

    def end(self, index: int, stats: GenerationStats) -> Iterator[ServerEvent]:
        yield from self._close()
        first, rest = stats.seconds_to_first_token, max(0.0, stats.seconds - stats.seconds_to_first_token)
        self._end = {
            "done": True,
            "done_reason": _DONE_REASONS.get(stats.stop_reason, "stop"),
            "total_duration": int(1e9 * stats.seconds),
            "load_duration": 0,
            "prompt_eval_count": stats.prompt_tokens,
            "prompt_eval_duration": int(1e9 * first),
            "eval_count": len(stats.tokens),
            "eval_duration": int(1e9 * rest),
        }
        yield self._message("", (), self._end)

    def fail(self, error: ApiError) -> Iterator[ServerEvent]:
        yield error_body(error, _PATH)

    @property
    def body(self) -> Mapping[str, Any]:
        return self._message(self._text, self._calls, self._end, self._thinking)

    @property
    def loaded(self) -> Mapping[str, Any]:
        """The response to a request without a prompt, which loads the model."""
        return self._message("", (), {"done": True, "done_reason": "load"})

    def _close(self) -> Iterator[ServerEvent]:
        """Complete the last call."""
        if self._open is not None:
            (name, arguments), self._open = self._open, None
            self._calls.append({"function": {"name": name, "arguments": partial_object(arguments)}})
            yield self._message("", self._calls[-1:], {"done": False})

    def _message(
        self, text: str, calls: Sequence[Any], more: Mapping[str, Any], thinking: str = ""
    ) -> Mapping[str, Any]:
        head = {"model": self._model, "created_at": _now()}
        thought = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return {**head, "response": text, **thought, **more}
        message: dict[str, Any] = {"role": "assistant", "content": text, **thought}
        message |= {"tool_calls": [*calls]} if calls else {}
        return {**head, "message": message, **more}


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _rounded(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"
