"""Answers of OpenAI's chat and text completions, whole and in chunks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from time import time
from typing import Any

from edgespec.app.engine.completions import CompletionService, Delta
from edgespec.app.engine.request import GenerationStats
from edgespec.core import TokenLogprob
from edgespec.models.prompting.tool_calls import Arguments, Called, TextPiece


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def usage(results: Sequence[GenerationStats]) -> dict[str, Any]:
    """What the answers to one prompt took. `speculation` is Edgespec's own."""
    prompt = max((one.prompt_tokens for one in results), default=0)
    written = sum(len(one.tokens) for one in results)
    drafted, accepted = sum(one.drafted for one in results), sum(one.accepted for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": max((one.cached_tokens for one in results), default=0)},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
        "speculation": {
            "drafted": drafted,
            "accepted": accepted,
            "rounds": sum(one.rounds for one in results),
            "tokens_per_second": round(sum(one.tokens_per_second for one in results), 3),
            "seconds_to_first_token": round(
                max((one.seconds_to_first_token for one in results), default=0.0), 4
            ),
        },
    }


def finish_reason(result: GenerationStats, calls: bool) -> str:
    if result.stop_reason in ("length", "context"):
        return "length"
    return "tool_calls" if calls else "stop"


class Collected:
    """One answer, put together from its parts."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def add(self, part: Delta) -> None:
        for event in part.events:
            match event:
                case TextPiece(text):
                    self.text += text
                case Called(_, name):
                    function = {"name": name, "arguments": ""}
                    self.calls.append({"id": new_id("call_"), "type": "function", "function": function})
                case Arguments(index, text):
                    self.calls[index]["function"]["arguments"] += text
        self.tokens += part.tokens
        self.logprobs += part.logprobs


def chat_choice(
    service: CompletionService, index: int, answer: Collected, result: GenerationStats, logprobs: bool
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None, "refusal": None}
    if answer.calls:
        message["tool_calls"] = answer.calls
    else:
        message["content"] = answer.text
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(service, answer.tokens, answer.logprobs) if logprobs else None,
        "finish_reason": finish_reason(result, bool(answer.calls)),
    }


def chat_body(
    id_: str, model: str, choices: Sequence[Any], results: Sequence[GenerationStats]
) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "chat.completion",
        "created": int(time()),
        "model": model,
        "choices": list(choices),
        "usage": usage(results),
    }


class ChatChunks:
    """The chunks of a streamed chat completion. With `include_usage` each has a usage, null until the end."""

    def __init__(self, service: CompletionService, model: str, logprobs: bool, include_usage: bool) -> None:
        self._service, self._logprobs, self._usage = service, logprobs, include_usage
        self._head = {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": int(time()),
            "model": model,
        }
        self._calls: dict[int, int] = {}  # how many each answer has made

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "choices": choices, **({"usage": None} if self._usage else {})}

    def _delta(
        self, index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def begin(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": "", "refusal": None})

    def part(self, part: Delta) -> list[dict[str, Any]]:
        chunks = []
        logprobs = (
            chat_logprobs(self._service, part.tokens, part.logprobs)
            if self._logprobs and part.logprobs
            else None
        )
        for event in part.events:
            match event:
                case TextPiece(text):
                    chunks.append(self._delta(part.index, {"content": text}, logprobs=logprobs))
                    logprobs = None
                case Called(index, name):
                    self._calls[part.index] = index + 1
                    function = {"name": name, "arguments": ""}
                    call = {"index": index, "id": new_id("call_"), "type": "function", "function": function}
                    chunks.append(self._delta(part.index, {"tool_calls": [call]}))
                case Arguments(index, text):
                    call = {"index": index, "function": {"arguments": text}}
                    chunks.append(self._delta(part.index, {"tool_calls": [call]}))
        if logprobs is not None:
            chunks.append(self._delta(part.index, {"content": ""}, logprobs=logprobs))
        return chunks

    def end(self, index: int, result: GenerationStats) -> dict[str, Any]:
        return self._delta(index, {}, finish_reason(result, bool(self._calls.get(index))))

    def usage(self, results: Sequence[GenerationStats]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": usage(results)}


def chat_logprobs(
    service: CompletionService, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]
) -> dict[str, Any]:
    content = [
        {
            **_token_logprob(service, one.token, one.logprob),
            "top_logprobs": [_token_logprob(service, token, value) for token, value in one.top],
        }
        for one in logprobs[: len(tokens)]  # the token that ends an answer is not part of it
    ]
    return {"content": content, "refusal": None}


def _token_logprob(service: CompletionService, token: int, logprob: float) -> dict[str, Any]:
    piece = service.piece(token)
    return {
        "token": piece.decode("utf-8", "replace"),
        "logprob": max(logprob, -9999.0),
        "bytes": list(piece),
    }


def completion_logprobs(
    service: CompletionService, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], offset: int = 0
) -> dict[str, Any]:
    """OpenAI's older form. `offset` is where in the text the first of `tokens` begins."""
    texts = [service.piece(one).decode("utf-8", "replace") for one in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    kept = logprobs[: len(tokens)]
    return {
        "tokens": texts[: len(kept)],
        "token_logprobs": [max(one.logprob, -9999.0) for one in kept],
        "top_logprobs": [
            {service.piece(token).decode("utf-8", "replace"): max(value, -9999.0) for token, value in one.top}
            for one in kept
        ],
        "text_offset": offsets[: len(kept)],
    }


def completion_body(id_: str, model: str, choices: Sequence[Any]) -> dict[str, Any]:
    """A whole text completion, or a chunk of one: they have the same form. Its usage comes on top."""
    return {
        "id": id_,
        "object": "text_completion",
        "created": int(time()),
        "model": model,
        "choices": list(choices),
    }


def completion_choice(index: int, text: str, finish: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
