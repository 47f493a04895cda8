"""Other programs to compare with: llama-server, a child process with an HTTP API.

For a fair result, prompts are sent as token ids, every prompt is evaluated from scratch, settings from the
environment are dropped, and the figures that the server reports are checked.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from edgespec import processes
from edgespec.app.bench.systems import UNKNOWN, SystemAnswer
from edgespec.core import EdgespecError

STOP_SECONDS = 10.0  # to exit after SIGTERM, before it is killed
_WORKING_MEMORY = 512 << 20  # bytes: compute buffers of one model, with the logits of a batch


@dataclass(frozen=True, slots=True)
class PeerMode:
    """A way of llama-server to speculate, and the flags for it."""

    flags: tuple[str, ...] = ()
    needs_draft: bool = False
    remembers: bool = False


def _draft(tokens: int, probability: str) -> PeerMode:
    limits = ("--spec-draft-n-max", str(tokens), "--spec-draft-p-min", probability)
    return PeerMode(("--spec-type", "draft-simple", *limits), needs_draft=True)


def _ngram(kind: str, *flags: str) -> PeerMode:
    return PeerMode(("--spec-type", kind, *flags), remembers=True)


def _sizes(kind: str, n: int, m: int) -> PeerMode:
    return _ngram(kind, f"--spec-{kind}-size-n", str(n), f"--spec-{kind}-size-m", str(m))


PLAIN = "plain"
MODES: dict[str, PeerMode] = {
    PLAIN: PeerMode(),
    "draft-simple": _draft(3, "0.75"),
    "draft-simple-p0": _draft(3, "0"),
    "draft-simple-8": _draft(8, "0.9"),
    "ngram-simple": _ngram("ngram-simple"),
    "ngram-simple-4-8": _sizes("ngram-simple", 4, 8),
    "ngram-map-k-8-16": _sizes("ngram-map-k", 8, 16),
    "ngram-map-k-4-8": _sizes("ngram-map-k", 4, 8),
    "ngram-map-k4v": _ngram("ngram-map-k4v"),
    "ngram-cache": _ngram("ngram-cache"),
    "ngram-mod": _ngram("ngram-mod"),
    "ngram-mod-16": _ngram(
        "ngram-mod", "--spec-ngram-mod-n-match", "16", "--spec-ngram-mod-n-min", "4",
        "--spec-ngram-mod-n-max", "16",
    ),
}  # fmt: skip
"""By name. Without numbers in the name, n-gram modes have the server's defaults; draft-simple drafts 3 tokens
as long as each has a probability of 0.75: faster than the default without that bound, draft-simple-p0."""

_USUAL = (PLAIN, "draft-simple", "ngram-simple", "ngram-mod")


def choose_modes(text: str, has_draft: bool) -> list[str]:
    """The names in `--modes`: "usual", "all", or a list separated by commas; plain always comes first.

    Modes that need a draft model are left out of "usual" and "all" if there is none. Raises EdgespecError for
    an unknown name, and for one that needs a draft model if there is none.
    """
    if text in ("usual", "all"):
        return [
            name
            for name in (_USUAL if text == "usual" else MODES)
            if has_draft or not MODES[name].needs_draft
        ]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in MODES:
            raise EdgespecError(f"unknown --modes {name!r} (valid: usual, all, {', '.join(MODES)})")
        if MODES[name].needs_draft and not has_draft:
            raise EdgespecError(f"--modes {name} needs a draft model: name one with --draft")
    return list(dict.fromkeys([PLAIN, *names]))


class LlamaServer:
    """llama-server in one of its modes: a `BenchSystem` that can be started and stopped repeatedly.

    It listens on a socket file in a private folder, where no other program reaches it and no port can be
    taken meanwhile; on Windows on a free port of 127.0.0.1.
    """

    def __init__(
        self,
        program: Path,
        mode: str,
        target: Path,
        draft: Path | None = None,
        *,
        label: str = "llama-server",
        context: int = 4096,
        threads: tuple[int, int] = (1, 1),
        cache_bytes: int = 0,
        patience: float = 300.0,
        tcp: bool = os.name == "nt",
    ) -> None:
        """`threads` are for one row and for many, `cache_bytes` the size of the KV caches, and `patience` the
        longest silence, in seconds, while it loads or evaluates a prompt."""
        self.name = f"{label} {mode}"
        self.plain = f"{label} {PLAIN}"
        self.remembers = MODES[mode].remembers
        files = [target] + ([draft] if draft is not None and MODES[mode].needs_draft else [])
        self.memory = cache_bytes + sum(file.stat().st_size + _WORKING_MEMORY for file in files)
        one, many = map(str, threads)
        self.command = [
            str(program), "-m", str(target), "-t", one, "-tb", many, "-np", "1", "-c", str(context),
            "--no-cache-prompt", "--cache-ram", "0", *MODES[mode].flags,
        ]  # fmt: skip
        if MODES[mode].needs_draft:
            self.command += ["-md", str(draft), "-td", one, "-tbd", many]
        self.build = ""
        self._patience = patience
        self._tcp = tcp
        self._port = 0
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = ExitStack()  # ends the process, then removes the folder

    def start(self) -> None:
        self.stop()
        try:
            folder = tempfile.TemporaryDirectory(prefix="edgespec-bench-", ignore_cleanup_errors=True)
            self._folder = Path(self._stopping.enter_context(folder))
            self._process = self._spawn()
            self._await_health()
            props = json.loads(self._get("/props")[1] or b"{}")
            self.build = str(props.get("build_info", "")) if isinstance(props, dict) else ""
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = self._failure(error)
            self.stop()
            raise reason from None
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int | None:
        """The process id while it is started, else None."""
        return self._process.pid if self._process is not None else None

    def _spawn(self) -> subprocess.Popen[bytes]:
        if self._tcp:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
            where = ["--host", "127.0.0.1", "--port", str(self._port)]
        else:
            where = ["--host", str(self._file("http.sock"))]
        # Every option of llama-server can also come from an environment variable, which would go unnoticed.
        env = {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}
        with self._file("log").open("wb") as log:
            try:
                server = processes.child(
                    [*self.command, *where],
                    STOP_SECONDS,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=env,
                    start_new_session=True,  # Ctrl-C goes to the benchmark, which then stops its servers
                )
                return self._stopping.enter_context(server)
            except OSError as error:
                raise EdgespecError(f"cannot start {self.command[0]}: {error.strerror}") from None

    def _await_health(self) -> None:
        deadline = time.monotonic() + self._patience
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ConnectionError("ended")
            try:
                status, _ = self._get("/health")
                if status == 200:
                    return
            except (OSError, http.client.HTTPException):
                pass  # not listening yet; a process that is no server reaches the deadline
            time.sleep(0.05)
        raise TimeoutError

    def ask(
        self, prompt: Sequence[int], max_tokens: int, schema: Mapping[str, Any] | None = None
    ) -> SystemAnswer:
        """Answer as a `BenchSystem`; with a JSON `schema`, the answer conforms to it."""
        question: dict[str, Any] = {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": False,
            "return_tokens": True,
            "stream": True,
            **({"json_schema": schema} if schema is not None else {}),
        }
        try:
            return self._read(tuple(prompt), json.dumps(question).encode())
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as error:
            raise self._failure(error) from None

    def _read(self, prompt: tuple[int, ...], body: bytes) -> SystemAnswer:
        connection = self._connect(self._patience)
        try:
            tokens: list[int] = []
            text = ""
            first = last = 0.0
            start = perf_counter()
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            for event in _events(connection.getresponse()):
                now = perf_counter() - start
                written = int(event["tokens_predicted"])
                text += str(event.get("content", ""))
                if written > len(tokens):
                    first, last = first or now, now
                    known = [int(token) for token in event["tokens"]]
                    tokens += [UNKNOWN] * (written - len(tokens) - len(known)) + known
                if event["stop"]:
                    return replace(self._checked(prompt, tokens, first, last, event), text=text)
        finally:
            connection.close()
        raise http.client.HTTPException("the response broke off")

    def _checked(
        self, prompt: tuple[int, ...], tokens: list[int], first: float, last: float, final: dict[str, Any]
    ) -> SystemAnswer:
        timings = final["timings"]
        if final["tokens_evaluated"] != len(prompt) or timings.get("cache_n", 0):
            raise EdgespecError(
                f"{self.name} cannot be compared: of a prompt of {len(prompt)} tokens it counted "
                f"{final['tokens_evaluated']} and took {timings.get('cache_n', 0)} from its cache"
            )
        written, accepted = len(tokens), int(timings.get("draft_n_accepted", 0))
        ended = final.get("stop_type") == "eos"
        return SystemAnswer(
            prompt,
            tuple(tokens[:-1] if ended else tokens),
            written,
            first,
            last,
            int(timings.get("draft_n", 0)),
            accepted,
            # Each pass gives one token in addition to the accepted ones. Those accepted after the end are in
            # the server's count and not in the answer.
            max(1, written - accepted),
        )

    def stop(self) -> None:
        self._process, self._folder = None, None
        self._stopping.close()

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        if self._process is None:
            raise ConnectionError("not started")
        if self._tcp:
            return http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout)
        return _FileConnection(self._file("http.sock"), timeout)

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = self._connect(10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _failure(self, error: Exception) -> EdgespecError:
        """`error` with the reason, and with the last line of the server's log."""
        broken = isinstance(error, (OSError, http.client.HTTPException))
        if isinstance(error, _Refused):
            what = f"refused: {error}"
        elif isinstance(error, TimeoutError):
            what = f"was silent for {self._patience:.0f} seconds"
        elif broken and (code := self._exit_code()) is not None:
            what = f"ended with code {code}"
        elif broken:
            what = f"broke off ({error or type(error).__name__})"
        else:
            what = "sent a response that is not llama-server's"
        return EdgespecError(f"{self.name} {what}; its log: {self._last_words() or 'empty'}")

    def _exit_code(self) -> int | None:
        """The exit code, None while it runs. Its socket closes a moment before the process exits."""
        try:
            return self._process.wait(0.5) if self._process is not None else None
        except subprocess.TimeoutExpired:
            return None

    def _last_words(self) -> str:
        """The last line of the log that names an error, else the last line."""
        try:
            log = self._file("log").read_bytes()[-8192:].decode("utf-8", "replace")
        except (OSError, AssertionError):
            return ""
        lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"\b(error|failed|invalid)\b", line, re.IGNORECASE)]
        return (errors or lines or [""])[-1][:300]


class _Refused(http.client.HTTPException):
    """The server responded with an error."""


class _FileConnection(http.client.HTTPConnection):
    """HTTP over a socket file."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a stream of server-sent events."""
    if response.status != 200:
        raise _Refused(_message(response.read()) or f"HTTP {response.status}")
    while line := response.readline():
        name, _, data = line.partition(b":")
        if name == b"error":
            raise _Refused(_message(data))
        if name == b"data":
            event = json.loads(data)
            if "error" in event:
                raise _Refused(_message(data))
            yield event


def _message(data: bytes) -> str:
    """The message of an error object, or the bytes themselves as text."""
    try:
        error = json.loads(data)
        error = error.get("error", error)
        return " ".join(str(error["message"]).split())[:300]
    except (ValueError, LookupError, TypeError, AttributeError):
        return " ".join(data.decode("utf-8", "replace").split())[:300]


def parse_peer(text: str) -> tuple[str, Path]:
    """Parse `llama-server=PATH`. Raises EdgespecError unless it names a program that can be run."""
    name, equals, path = text.partition("=")
    if name != "llama-server" or not equals:
        raise EdgespecError(f"invalid program {text!r}: write llama-server=PATH")
    program = Path(path).expanduser()
    if not program.is_file():
        raise EdgespecError(f"no file {program}: write llama-server=PATH")
    if not os.access(program, os.X_OK):
        raise EdgespecError(f"{program} is not executable: allow it with `chmod +x`")
    return name, program.absolute()
