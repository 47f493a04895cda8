"""Errors in the format of an API: Anthropic's under /v1/messages, Ollama's under /api, else OpenAI's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgespec.app.engine.engine import ContextFullError
from edgespec.app.engine.scheduler import BusyError, StoppingError
from edgespec.core import EdgespecError

_UNPAIRED = re.compile("[\ud800-\udfff]")
_WANTED = "Input should be "
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An error response. `param` is the invalid parameter, as a path into the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.headers = param, code, dict(headers or {})


def as_api_error(error: BaseException) -> ApiError:
    """Convert `error`. The message of an unexpected exception is not disclosed."""
    match error:
        case ApiError():
            return error
        case BusyError():
            wait = {"retry-after": str(max(1, round(error.retry_after)))}
            return ApiError(
                429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers=wait
            )
        case ContextFullError():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case StoppingError():
            return ApiError(503, str(error), kind="server_error")
        case EdgespecError():
            return ApiError(400, str(error))
        case MemoryError():
            return ApiError(503, "Not enough memory for this request.", kind="server_error")
    name = type(error).__name__
    return ApiError(500, f"Internal error, please report it: {name}.", kind="server_error")


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """Return the body of the error response to a request for `path`."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": None}
    if path.startswith("/api/"):
        return {"error": error.message}
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return {"error": fields}


def first_fault(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """Return the most specific of the errors that pydantic lists for `body`."""
    # Every member of a union reports errors: the one that matched deepest is the one that was meant.
    paths = [_path(one["loc"], body, one["type"] == "missing") for one in errors]
    path, worst = max(zip(paths, errors, strict=True), key=lambda pair: len(pair[0]))
    param = ""
    for part in path:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    if worst["type"] == "missing":
        message = f"Missing required parameter: {param}"
        return ApiError(400, message, param=param or None, code="missing_required_parameter")
    # Of a union, every member that was tried says what it would have accepted.
    found = [_reason(error) for error, place in zip(errors, paths, strict=True) if place == path]
    wanted = [one.removeprefix(_WANTED) for one in found if one.startswith(_WANTED)]
    reason = _WANTED + " or ".join(dict.fromkeys(wanted)) if wanted else found[0]
    message = f"Invalid {param}: {reason}" if param else reason
    return ApiError(400, message[:500], param=param or None, code="invalid_value")


def _reason(error: Mapping[str, Any]) -> str:
    if error["type"] == "union_tag_not_found":
        return "its role or type is missing"
    return str(error["msg"]).removeprefix("Value error, ")


def dumps(value: Any) -> str:
    """Serialize `value` as ASCII JSON. Lone surrogates, which many parsers reject, are replaced."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    if "\\ud" in text:  # rare: a surrogate pair, or a lone surrogate
        text = json.dumps(_paired(value), allow_nan=False, separators=(",", ":"))
    return text


def _paired(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPAIRED.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_paired(key): _paired(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_paired(one) for one in value]
    return value


def _path(location: Sequence[int | str], body: Any, missing: bool) -> list[int | str]:
    """Return pydantic's `location` without the names of the types that it tried: a path into `body`."""
    path: list[int | str] = []
    for i, part in enumerate(location[1:], 2):
        inside = isinstance(body, Mapping) and part in body
        if inside or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            path.append(part)
            body = body[part]
        elif missing and i == len(location):
            path.append(part)
    return path
