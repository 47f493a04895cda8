"""Rendering of a model's own chat template: from messages to the text of a prompt.

Two inputs are untrusted. The *template* is a Jinja program inside a downloaded file (CVE-2024-34359), so
`template_worker` renders it in a sandbox, in a process of its own with limits on time, memory and output. The
*content* of messages may contain the text of control tokens: see `ChatTemplate.render`.

This module does not tokenize, and does not decide which messages a template should accept.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgespec import processes
from edgespec.core import EdgespecError
from edgespec.machine.sensors import process_memory
from edgespec.text import printable

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}, and other keys that the template reads: "tool_calls", "name", ...

Templates write a tool call's "arguments" as JSON themselves, so they should be a mapping, not a string.
"""

_MAX_MEMORY = 768 << 20  # bytes; the worker's own limit applies first where the system enforces it
_START_SECONDS = 60.0  # a cold start on a busy board with a slow SD card; usually a tenth of a second
_POLL_SECONDS = 0.05
_SURROGATES = re.compile("[\ud800-\udfff]")
# The mark for positions in content, where it cannot occur because lone surrogates are replaced before.
# Templates that output values as ASCII JSON, or as Python's repr, output the mark escaped.
_MARK, _ESCAPED = "\udfff", r"\udfff"
_KEPT = ("SYSTEMROOT", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TEMP", "TMP", "TMPDIR")

_ADVICE = "try another GGUF file of this model"
_ERRORS = {
    "syntax": f"the model's chat template is not valid Jinja ({{}}): {_ADVICE}",
    "refused": "the model's chat template refuses this conversation: {}",
    "forbidden": "the model's chat template tried to leave its sandbox ({}): do not use this file",
    "output": f"the output of the model's chat template is too long for a prompt: {_ADVICE}",
    "memory": f"the model's chat template ran out of memory: {_ADVICE}",
    "failed": f"the model's chat template failed ({{}}): {_ADVICE}",
}


class ChatTemplate:
    """A chat template, with the variables that depend on the model. All templates share one worker process.

    `bos` and `eos` are the texts of those tokens: most templates output `bos` themselves, so the tokenizer
    must not add it again. `control_tokens` are the texts that must not come from content: for llama.cpp those
    of all control and unknown tokens, because only these depend on its `parse_special`. Tokens of one
    character are ignored, because they cannot be split.
    """

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        control_tokens: Iterable[str] = (),
        max_seconds: float = 5.0,
        max_characters: int = 8_000_000,
    ) -> None:
        self._source = _clean(source)
        self._tokens = {"bos_token": _clean(bos), "eos_token": _clean(eos)}
        self._guard = _Guard(control_tokens)
        self._seconds = max_seconds
        self._limit = max_characters

    def warm(self) -> None:
        """Start the worker without waiting, so that it initializes while the weights load.

        Raises EdgespecError if no process can be started.
        """
        _WORKER.start()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[str]:
        """Return the prompt in pieces, each to be tokenized separately with special tokens on. Usually one.

        The concatenation of the pieces is the template's output. It is split inside each control token whose
        text is not entirely the template's own, so that `<|im_end|>` from a user or a tool is ten characters
        and not the end of a message. This applies to all strings in `messages`, `tools` and `extra`, keys
        included, and across two strings that the template joins. To this end, a mark is inserted into each
        such text before rendering, or at its ends if they could begin or complete a control token; other
        content reaches the template unchanged, so that it can strip and compare it. There are two known gaps:
        a template that removes something from the middle of a text may form a control token, and a bare word
        that it wraps itself (`'<' ~ key ~ '>'`) counts as its own, because wrapping a role that way is
        common.

        `extra` has further variables (`enable_thinking`); it cannot replace the others. Lone surrogates in
        content become U+FFFD. Raises EdgespecError if the template is invalid, refuses these messages or
        exceeds a limit, and if the messages are not JSON.
        """
        request = self._request(messages, tools, add_generation_prompt, extra)
        data = request.encode("utf-8", "surrogatepass") + b"\n"
        reply = _WORKER.ask(data, self._limit, self._seconds)
        if "error" in reply:
            form = _ERRORS.get(str(reply["error"]), _ERRORS["failed"])
            raise EdgespecError(form.format(printable(str(reply.get("message")).replace(_MARK, ""), 200)))
        marks = _MARK if _ESCAPED in request else f"{_MARK}|{re.escape(_ESCAPED)}"
        pieces = self._guard.cut(re.split(marks, str(reply.get("text"))))
        if _SURROGATES.search("".join(pieces)):
            raise EdgespecError(f"the output of the model's chat template is not Unicode: {_ADVICE}")
        return pieces

    def _request(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        given = {"documents": None, **extra, "messages": messages, "tools": tools or None}
        try:
            variables = _mapped(given, lambda text: self._guard.mark(_clean(text)))
            variables |= {"add_generation_prompt": add_generation_prompt, **self._tokens}
            request = {"source": self._source, "variables": variables}
            bounds = {"limit": self._limit, "seconds": self._seconds}
            return json.dumps(request | bounds, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise EdgespecError(f"the messages are not valid JSON: {printable(e, 200)}") from None


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return `messages` with the system prompts merged into the first user message, separated by a blank
    line.

    For templates that refuse the system role (Gemma's). Without a user message the system prompts become one.
    Contents must be strings.
    """
    system = [m["content"] for m in messages if m["role"] == "system" and m.get("content")]
    rest = [m for m in messages if m["role"] != "system"]
    if not system:
        return rest
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(system)}, *rest]
    user = rest[first]
    merged = {**user, "content": "\n\n".join([*system, user.get("content") or ""])}
    return [*rest[:first], merged, *rest[first + 1 :]]


def worker_command() -> list[str]:
    """Return the command line of the worker, `template_worker.main`."""
    # By path, because as a module it would import edgespec.models.
    return processes.command("_render-worker", "-I", str(Path(__file__).with_name("template_worker.py")))


class _Guard:
    """Finds control tokens in a text that are not entirely the template's."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        self._tokens = {token for token in control_tokens if len(token) > 1}
        self._lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        self._first = re.compile("|".join(sorted({re.escape(t[0]) for t in self._tokens})) or r"(?!)")
        self._beginnings = {t[:n] for t in self._tokens for n in range(1, len(t))}
        self._endings = {t[n:] for t in self._tokens for n in range(1, len(t))}

    def mark(self, text: str) -> str:
        """Return `text` with marks at the positions where `cut` may have to split it."""
        places = {start + 1 for start, _ in self._found(text)}
        body = text.strip()
        # Bare words stay unchanged: templates compare roles and types with them, and they have no brackets.
        if body and not body.isidentifier():
            start = text.index(body[0])
            end = start + len(body)
            lengths = range(1, min(len(body), max(self._lengths, default=0)) + 1)
            if any(body[-n:] in self._beginnings for n in lengths):
                places.add(end)
            if any(body[:n] in self._endings for n in lengths) or self._inside(body):
                places.add(start)
        return _MARK.join(_split(text, places)) if places else text

    def cut(self, parts: Sequence[str]) -> list[str]:
        """Join `parts`, the text between marks, and split it at the marks within a control token."""
        text = "".join(parts)
        if len(parts) == 1:
            return [text]
        marks = list(accumulate(map(len, parts[:-1])))
        places: set[int] = set()
        for start, end in self._found(text):
            first = bisect_right(marks, start)
            if first < len(marks) and marks[first] < end:
                places.add(marks[first])
        return _split(text, places)

    def _inside(self, body: str) -> bool:
        return len(body) < max(self._lengths, default=0) and any(body in token for token in self._tokens)

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of the longest control token at each position; they may overlap."""
        for match in self._first.finditer(text):
            start = match.start()
            for length in self._lengths:
                if text[start : start + length] in self._tokens:
                    yield start, start + length
                    break


class _Worker:
    """The worker process: started when needed, replaced after it exited or was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread()
        self._ready = False

    def start(self) -> None:
        with self._lock:
            self._running()

    def ask(self, request: bytes, limit: int, seconds: float) -> dict[str, Any]:
        """Return the worker's reply. Raises EdgespecError if there is none within `seconds`."""
        with self._lock:
            try:
                process = self._running()
                if not self._ready:
                    self._exchange(process, b"", 100, _START_SECONDS)
                    self._ready = True
                # In JSON a control character has six characters.
                reply = _parsed(self._exchange(process, request, 6 * limit + 10_000, seconds))
            except BaseException:
                # A late reply would be taken for that of the next request.
                self._stop()
                raise
            if reply.get("error") == "memory":
                self._stop()  # the rest of its heap may be too small for the next request
            return reply

    def close(self) -> None:
        """End the process, even while it renders."""
        self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        environment = {k: v for k, v in os.environ.items() if k.upper() in _KEPT or k.startswith("_PYI")}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                worker_command(),
                stdin=pipe,
                stdout=pipe,
                stderr=null,
                cwd=Path(sys.executable).anchor,
                env=environment,
                start_new_session=True,  # no SIGINT on Ctrl-C in the terminal
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as e:
            raise EdgespecError(f"cannot start the process that renders chat templates: {e}") from e
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], data: bytes, limit: int, seconds: float) -> bytes:
        """Send `data` and return one line. Uses a thread, because Windows cannot wait for pipes."""
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout, reply = process.stdin, process.stdout, []

        def talk() -> None:
            with contextlib.suppress(OSError, ValueError):  # it exited, or the pipes were closed
                stdin.write(data)
                stdin.flush()
                reply.append(stdout.readline(limit))
            if self._process is not process:
                _close(process)

        thread = self._thread = threading.Thread(target=talk, name="chat-template", daemon=True)
        thread.start()
        deadline = time.monotonic() + seconds
        thread.join(min(seconds, _POLL_SECONDS))
        while thread.is_alive():
            if time.monotonic() > deadline:
                raise EdgespecError(f"the model's chat template took over {seconds:g} s: {_ADVICE}")
            if (process_memory(process.pid) or 0) > _MAX_MEMORY:
                raise EdgespecError(_ERRORS["memory"])
            thread.join(_POLL_SECONDS)
        if reply and reply[0].endswith(b"\n"):
            return reply[0]
        if reply and len(reply[0]) == limit:
            raise EdgespecError(_ERRORS["output"])
        raise EdgespecError(f"the process that renders chat templates died: try again, or {_ADVICE}")

    def _stop(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.kill()
        process.wait()
        if self._thread.is_alive():
            self._thread.join(1.0)
        # If it still waits, an escaped process has the pipes open. Closing them here would wait as well.
        if not self._thread.is_alive():
            _close(process)


_WORKER = _Worker()
atexit.register(_WORKER.close)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes of a request
                pipe.close()


def _parsed(line: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        reply = json.loads(line.decode("utf-8", "surrogatepass"))
        if isinstance(reply, dict):
            return reply
    raise EdgespecError(_ERRORS["forbidden"].format("a reply that is not JSON"))


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return `value` with `change` applied to each string in it, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(k, change): _mapped(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(v, change) for v in value]
    return value


def _split(text: str, places: Iterable[int]) -> list[str]:
    return [text[a:b] for a, b in pairwise([0, *sorted(places), len(text)])]


def _clean(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text)
