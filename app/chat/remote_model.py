"""An OpenAI-compatible server in place of a local model. Its responses are not trusted."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httpx
from httpx_sse import SSEError, connect_sse

from edgespec.app.chat.chat_model import ChatMessage, TokenTrace
from edgespec.app.chat.thoughts import JoinedAnswer
from edgespec.app.engine.request import Request
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

_CONNECT, _BETWEEN = 10.0, 600.0  # seconds; the prefill may take minutes
_MOST_TEXT = 4_000_000  # characters of an answer
_MOST_ERROR = 300


class RemoteModel:
    """A model of a server. `url` is `http(s)://host:port`, with or without `/v1`, or `unix:/path/to/socket`.

    Without `model`, the first model of the server is used. The key in OPENAI_API_KEY is sent to that server
    only: redirects are not followed. Raises EdgespecError if the server does not respond.
    """

    notes: Sequence[str] = ()
    decision = None
    reading = None

    def __init__(self, url: str, model: str = "") -> None:
        base, transport = url, None
        if url.startswith("unix:"):
            path = url.removeprefix("unix:").removeprefix("//")
            if not Path(path).is_socket():
                raise EdgespecError(f"{url} does not respond: no such socket")
            transport, base = httpx.HTTPTransport(uds=path), "http://localhost"
        elif urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise EdgespecError(f"invalid --server {url!r}: pass http://host:port or unix:/path/to/socket")
        base = base.rstrip("/")
        base = base if base.endswith("/v1") else base + "/v1"
        key = os.environ.get("OPENAI_API_KEY", "")
        try:
            headers = {"Authorization": f"Bearer {key}".encode("ascii").decode()} if key else {}
            self._client = httpx.Client(
                base_url=base,
                headers=headers,
                timeout=httpx.Timeout(_BETWEEN, connect=_CONNECT),
                limits=httpx.Limits(max_keepalive_connections=0),  # so that each request reports its socket
                transport=transport,
                trust_env=not url.startswith("unix:"),
            )
        except (UnicodeEncodeError, ValueError, httpx.InvalidURL) as error:
            raise EdgespecError(f"invalid --server {url!r} or OPENAI_API_KEY: {error}") from None
        self._url = url
        self.context_length = 0
        try:
            models = self._models()
            self.name = model or next(iter(models), "")
            if not self.name:
                raise EdgespecError(f"{url} lists no model: pass --model")
            about = models.get(self.name, {})
            for field in ("max_model_len", "context_length"):
                if type(length := about.get(field)) is int and length > 0:
                    self.context_length = length
        except BaseException:
            self.close()
            raise

    def prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        return []

    def count(self, text: str) -> int:
        return (len(text) + 3) // 4

    def choose(self, mode: object) -> None:
        return None

    def forget(self, messages: Sequence[ChatMessage]) -> None:
        """Nothing is stored on this machine."""

    def close(self) -> None:
        self._client.close()

    def answer(self, messages: Sequence[ChatMessage], request: Request, result: TokenTrace) -> Iterator[str]:
        start, sockets, done, joined = perf_counter(), _Sockets(), False, JoinedAnswer()
        result.stop_reason = "end"
        request.arm(sockets.shut)
        try:
            with connect_sse(
                self._client,
                "POST",
                "/chat/completions",
                json=self._body(messages, request),
                extensions={"trace": sockets.trace},
            ) as source:
                self._check(source.response)
                for event in source.iter_sse():
                    done = done or event.data.strip() == "[DONE]"
                    if done or request.cancelled:
                        break
                    text = self._text_of(event.data, result, joined)
                    result.seconds = perf_counter() - start
                    if not text:
                        continue
                    if not result.tokens:
                        result.seconds_to_first_token = result.seconds
                    result.tokens.append(0)  # approximately: a piece may be several tokens
                    result.text += text
                    if len(result.text) > _MOST_TEXT:
                        raise EdgespecError(
                            f"{self._url} sent more than {_MOST_TEXT:,} characters: the answer was stopped"
                        )
                    yield text
        except EdgespecError:
            raise
        except Exception as error:
            if not request.cancelled:  # else an error of the socket that was shut down
                if not isinstance(error, (httpx.HTTPError, httpx.StreamError, SSEError, OSError)):
                    raise
                raise EdgespecError(f"{self._url} closed the connection: {_description(error)}") from None
        finally:
            request.disarm()
        if request.cancelled:
            result.stop_reason = "cancelled"
        elif not done:
            raise EdgespecError(f"{self._url} closed the connection before the end of the answer")

    def _body(self, messages: Sequence[ChatMessage], request: Request) -> dict[str, Any]:
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.name, "messages": list(messages), "stream": True,
            "stream_options": {"include_usage": True}, "temperature": s.temperature, "top_p": s.top_p,
        }  # fmt: skip
        extra = {
            "max_tokens": request.max_tokens, "seed": s.seed, "frequency_penalty": s.frequency_penalty,
            "presence_penalty": s.presence_penalty, "top_k": s.top_k, "min_p": s.min_p,
        }  # fmt: skip
        body |= {name: value for name, value in extra.items() if value}
        if s.repetition_penalty != 1.0:
            body["repetition_penalty"] = s.repetition_penalty
        if (
            messages and messages[-1]["role"] == "assistant"
        ):  # of vLLM; other servers start a new answer or continue
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    def _models(self) -> dict[str, dict[str, Any]]:
        try:
            response = self._client.get("/models", timeout=_CONNECT)
            self._check(response)
            listed = response.json()["data"]
            return {one["id"]: one for one in listed if isinstance(one["id"], str)}
        except (httpx.HTTPError, OSError) as error:
            raise EdgespecError(
                f"{self._url} does not respond: check that it is running ({_description(error)})"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise EdgespecError(
                f"{self._url} is not an OpenAI-compatible server: it lists no models"
            ) from None

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        reason = ""
        with suppress(ValueError, KeyError, TypeError, httpx.HTTPError, httpx.StreamError):
            response.read()
            reason = str(response.json()["error"]["message"])
        hint = ": set OPENAI_API_KEY" if response.status_code == 401 else ""
        raise EdgespecError(
            f"{self._url} refused: {response.status_code} {one_line(reason)[:_MOST_ERROR]}".rstrip() + hint
        )

    def _text_of(self, data: str, result: TokenTrace, joined: JoinedAnswer) -> str:
        """Return the text of a chunk, and put its other values into `result`."""
        try:
            chunk = json.loads(data)
            if isinstance(error := chunk.get("error"), dict):
                raise EdgespecError(f"{self._url}: {one_line(str(error.get('message')))[:_MOST_ERROR]}")
            if isinstance(usage := chunk.get("usage"), dict):
                _count(usage, result)
            for choice in chunk.get("choices") or []:
                if choice.get("finish_reason"):
                    result.stop_reason = "length" if choice["finish_reason"] == "length" else "end"
                delta = choice.get("delta") or {}
                thought, text = delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")
                shown = joined.reasoning(thought) if isinstance(thought, str) and thought else ""
                return shown + (joined.text(text) if isinstance(text, str) and text else "")
        except (ValueError, TypeError, AttributeError):
            raise EdgespecError(f"{self._url} sent an invalid chunk") from None
        return ""


class _Sockets:
    """The sockets of one request, to end it while it waits for data."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._shut = False

    def trace(self, name: str, info: dict[str, Any]) -> None:
        if name.startswith("connection.") and name.endswith(".complete"):
            with suppress(AttributeError, KeyError):
                if isinstance(one := info["return_value"].get_extra_info("socket"), socket.socket):
                    self._sockets.append(one)
        if self._shut:
            self.shut()

    def shut(self) -> None:
        self._shut = True
        for one in self._sockets:
            with suppress(OSError, ValueError):
                one.shutdown(socket.SHUT_RDWR)


def _description(error: Exception) -> str:
    return one_line(str(error)) or type(error).__name__


def _count(usage: dict[str, Any], result: TokenTrace) -> None:
    def number(holder: Any, name: str) -> int:
        value = holder.get(name) if isinstance(holder, dict) else None
        return value if type(value) is int and 0 <= value < 1 << 31 else 0

    result.prompt_tokens = number(usage, "prompt_tokens")
    if tokens := number(usage, "completion_tokens"):
        result.tokens = [0] * min(tokens, _MOST_TEXT)
        result.written = tokens
    own = usage.get("speculation")  # of Edgespec's server
    result.rounds, result.drafted = number(own, "rounds"), number(own, "drafted")
    result.accepted = number(own, "accepted")
