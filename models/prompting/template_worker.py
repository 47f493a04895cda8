"""Renders chat templates in a process of its own: the other end of `chat`'s pipes.

A template is a program that came with a downloaded file. Jinja's sandbox keeps it from Python's internals,
the limits set here keep it small, and `chat` ends the process when it takes too long. Should the sandbox
fail, what got out finds no environment, no free file descriptor and no new process; that hinders, it does
not imprison: the process still runs under the user's name.

One request and one answer per line, both JSON. Run by path and by nothing but the standard library and Jinja,
so that it starts quickly; it knows nothing of Edgespec.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import suppress
from datetime import datetime
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
"""Bytes of address space, of which Python and Jinja take about 30 MB."""

_MESSAGE = 1000  # characters of a message worth sending; a hostile one may be as long as memory allows


class Refusal(Exception):  # noqa: N818 - named after what the template does
    """The template called raise_exception."""


class GenerationTag(Extension):
    """`{% generation %}` marks an assistant's words for training; here it only opens a scope."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own convention

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: the settings, globals and filters that transformers documents."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    env.filters["tojson"] = _tojson  # Jinja's own escapes <, > and & for HTML
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(template: jinja2.Template, variables: dict[str, Any], limit: int) -> dict[str, Any]:
    """The answer to one request: {"text"}, or {"error", "message"} where it grew over `limit` characters."""
    parts, length = [], 0
    for part in template.generate(variables):
        length += len(part)
        if length > limit:
            return {"error": "output", "message": ""}
        parts.append(part)
    return {"text": "".join(parts)}


def answer(env: jinja2.Environment, cache: dict[str, jinja2.Template], line: bytes) -> dict[str, Any]:
    """Compile and render. Whatever the template does wrong becomes an {"error", "message"}."""
    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        if sys.platform != "win32":
            # The parent keeps the time; this is for the day it is gone while a template loops.
            signal.alarm(math.ceil(request["seconds"]) + 5)
        source = request["source"]
        if source not in cache:
            cache.clear()
            cache[source] = env.from_string(source)
        return render(cache[source], request["variables"], request["limit"])
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


def main() -> None:
    """Say that all is ready with an empty object, then answer requests until the pipe is closed."""
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
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _rehearse(env: jinja2.Environment) -> None:
    """Make Jinja and the C library load what they load late, while files can still be opened."""
    env.from_string("{{ strftime_now('%d %b') }}{{ '\\n' | tojson(indent=1) }}").render()
    with suppress(jinja2.UndefinedError):
        env.from_string("{{ nothing.at.all }}").render()


def _lock_down() -> None:
    if sys.platform == "win32":
        return
    limits = {
        "RLIMIT_AS": MAX_MEMORY,
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": 0,  # pipes are no files
        "RLIMIT_NOFILE": 3,  # the three pipes: no file and no socket can be opened
        "RLIMIT_NPROC": 0,
    }
    for name, most in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            # Refused where a stricter limit holds already, and on macOS, where the parent looks after memory.
            with suppress(ValueError, OSError):
                resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
