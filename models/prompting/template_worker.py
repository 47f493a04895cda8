"""The worker process that renders chat templates for `chat_template`.

A template is a program in a downloaded file. Jinja's sandbox denies it access to Python's internals, resource
limits are set here, and `chat_template` kills the process on a timeout. Code that escapes the sandbox has no
environment variables, no free file descriptor and cannot start processes; this limits damage but is no
isolation: the process still has the user's permissions.

One request and one reply per line, both JSON. Run by path, with only the standard library and Jinja, so that
it starts quickly; it does not import edgespec.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

if sys.platform != "win32":
    import resource
    import signal

MAX_MEMORY = 768 << 20
"""Bytes of address space, of which Python and Jinja use about 30 MB."""

_MESSAGE = 1000  # characters of an error message; a malicious one may fill the memory


class Refusal(Exception):  # noqa: N818 - named after what the template does
    """The template called raise_exception."""


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own convention

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Lenient(jinja2.Undefined):
    """An undefined value that adds nothing to a text."""

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which templates may use lists as queues, as Kimi's do; all are made for one rendering."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (type(obj) is list and attr in ("append", "pop")) or super().is_safe_attribute(
            obj, attr, value
        )


def environment() -> ImmutableSandboxedEnvironment:
    """Return a Jinja environment with the settings, globals and filters that transformers documents."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
    env.filters["tojson"] = _tojson  # Jinja's own filter escapes <, > and & for HTML
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(template: jinja2.Template, variables: dict[str, Any], limit: int) -> dict[str, Any]:
    """Return {"text"}, or {"error", "message"} if it is longer than `limit` characters."""
    parts, length = [], 0
    for part in template.generate(variables):
        length += len(part)
        if length > limit:
            return {"error": "output", "message": ""}
        parts.append(part)
    return {"text": "".join(parts)}


def answer(env: jinja2.Environment, cache: dict[str, jinja2.Template], line: bytes) -> dict[str, Any]:
    """Compile and render. Errors of the template become {"error", "message"}."""
    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        if sys.platform != "win32":
            # The parent enforces the limit; this is for a parent that has exited.
            signal.alarm(math.ceil(request["seconds"]) + 5)
        source = request["source"]
        if source not in cache:
            cache.clear()
            cache[source] = env.from_string(source)
        try:
            return render(cache[source], request["variables"], request["limit"])
        except (Refusal, TypeError, jinja2.UndefinedError):
            lenient = env.overlay(undefined=Lenient).from_string(source)
            for variables in adapted(json.loads(line.decode("utf-8", "surrogatepass"))["variables"]):
                with suppress(Refusal, TypeError, jinja2.UndefinedError):
                    return render(lenient, variables, request["limit"])
            raise
    except jinja2.TemplateSyntaxError as e:
        return _error("syntax", f"line {e.lineno}: {e.message}")
    except Refusal as e:
        return _error("refused", e)
    except SecurityError as e:
        return _error("forbidden", e)
    except MemoryError:
        return _error("memory", "")
    except Exception as e:  # noqa: BLE001 - a template is a program: it can raise anything
        return _error("failed", f"{type(e).__name__}: {e}")
    finally:
        if sys.platform != "win32":
            signal.alarm(0)


def adapted(variables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what else older templates may expect, one change after the other.

    Tools as a list in any case, and as text in `functions`; one call in each message; arguments as text.
    """
    tools = variables.get("tools") or []
    variables |= {"tools": tools, "functions": json.dumps(tools, ensure_ascii=False)}
    yield variables
    messages = variables.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        return
    calls = [call for one in messages for call in one.get("tool_calls") or ()]
    if calls:
        yield {**variables, "messages": _one_call_each(messages)}
        for call in calls:
            function = call.get("function", call)
            function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        yield variables


def _one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `messages` with a message for each call, followed by its result."""
    result: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") != "tool":
            result += waiting
            waiting = [{**message, "tool_calls": [call]} for call in message.get("tool_calls") or ()]
            result += [] if waiting else [message]
            continue
        wanted = message.get("tool_call_id")
        found = next((one for one in waiting if one["tool_calls"][0].get("id") == wanted), None)
        if found is None and waiting:
            found = waiting[0]
        if found is not None:
            waiting.remove(found)
            result.append(found)
        result.append(message)
    return result + waiting


def main() -> None:
    """Send an empty object when ready, then serve requests until the pipe is closed."""
    env = environment()
    _rehearse(env)
    _lock_down()
    cache: dict[str, jinja2.Template] = {}
    _send({})
    for line in sys.stdin.buffer:
        _send(answer(env, cache, line))


def _send(reply: dict[str, Any]) -> None:
    # Lone surrogates are legal here: one of them is the parent's marker.
    data = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()


def _error(kind: str, message: object) -> dict[str, Any]:
    return {"error": kind, "message": str(message)[:_MESSAGE]}


def _raise(message: object = "") -> None:
    raise Refusal(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        list(value) if isinstance(value, GeneratorType) else value,  # what `map` returns
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _rehearse(env: jinja2.Environment) -> None:
    """Trigger the lazy imports of Jinja and the C library while files can still be opened."""
    env.from_string("{{ strftime_now('%d %b') }}{{ '\\n' | tojson(indent=1) }}").render()
    with suppress(jinja2.UndefinedError):
        env.from_string("{{ nothing.at.all }}").render()


def _lock_down() -> None:
    if sys.platform == "win32":
        return
    limits = {
        "RLIMIT_AS": MAX_MEMORY,
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,  # does not apply to pipes
        "RLIMIT_NOFILE": 3,  # the three pipes: no file and no socket can be opened
        "RLIMIT_NPROC": 0,
    }
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            # Refused if a stricter limit is set, and on macOS, where the parent checks memory.
            with suppress(ValueError, OSError):
                resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
