"""Native code runs in a child process before this one trusts it: it may crash, hang, or compute wrongly.

Here is how a child is started and judged, and what is known of engines: whether they start, and with which
kernels. What is known of models with such an engine is in `selftest`; the child's side in `selftest_worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import IO, Any, Literal

from edgespec import processes
from edgespec.core import Cancelled, EdgespecError
from edgespec.machine.sensors import cpu_name
from edgespec.models import machine_cache
from edgespec.text import printable

ChildState = Literal["passed", "failed", "refused", "memory"]
Tick = Callable[[], bool]
"""Called ten times a second while a child runs; stops it by returning False."""

ASK = "?"
"""In place of the name of kernels: which are there?"""

_START_SECONDS = 60.0  # until the child has imported what it needs, whatever the machine
_USUAL_START = 0.25  # seconds that this takes on an idle machine
_PATIENCE = 20.0  # seconds without a sign of life where starting took so long, in proportion elsewhere
_TURN = 0.1
_READING = 50e6  # bytes of weights a second that the slowest machine gets through
_MEMORY = re.compile(
    r"insufficient memory|(failed|unable) to alloc|bad_alloc|MemoryError|out of memory|cannot allocate",
    re.IGNORECASE,
)
_ENDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # by whoever ends this process, too


@dataclass(frozen=True, slots=True)
class ChildVerdict:
    """What came of a child.

    `reason` completes "llama.cpp ..." where it failed, and is the child's own line where it refused. `said`
    is what it reported on the way, as far as it came.
    """

    state: ChildState
    reason: str
    said: Mapping[str, Any]


class NoStartError(EdgespecError):
    """An engine does not start on this processor; `reason` completes "llama.cpp ..."."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine} {reason} when it was started on this processor: install it again")
        self.reason = reason


class NoMemoryError(EdgespecError):
    """There was too little memory to try something, which says nothing of what was tried."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"Not enough memory for {name}: close other programs, or choose a smaller model or --context."
        )


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine starts here: with the library of `kernels` by name, "" for the best or only ones.

    `key` identifies its files and this processor. `lost` is a line on what was given up, "" for nothing.
    """

    key: str
    kernels: str = ""
    lost: str = ""


_starts: dict[str, Start] = {}  # by engine: what this process has loaded, or would
_loaded: set[str] = set()
_outcomes: dict[tuple[str, str], dict[str, Any]] = {}  # also where the cache folder cannot be written
_trusting: str | None = None  # the kernels, in a child that was started to try them


def trust(kernels: str) -> None:
    """Load engines with these kernels, and anything on them, without a trial: this process is one."""
    global _trusting
    _trusting = kernels


def trusting() -> bool:
    """Whether this process is itself a trial."""
    return _trusting is not None


def known(kind: str, key: str) -> dict[str, Any] | None:
    """An outcome that `keep` was given, in this process or an earlier one."""
    return _outcomes.get((kind, key)) or machine_cache.load(kind, key)


def loaded(engine: str) -> None:
    """This process has loaded `engine`: its kernels cannot be replaced by others any more."""
    _loaded.add(engine)


def known_all(kind: str) -> list[dict[str, Any]]:
    """All outcomes of that kind."""
    here = [
        data
        for (one, key), data in _outcomes.items()
        if one == kind and machine_cache.load(kind, key) is None
    ]
    return [*machine_cache.load_all(kind), *here]


def keep(kind: str, key: str, outcome: dict[str, Any]) -> None:
    _outcomes[kind, key] = outcome
    machine_cache.save(kind, key, outcome)


def forget() -> None:
    """Everything is tried again when it is next needed, but for what this process has loaded."""
    _outcomes.clear()
    for engine in _starts.keys() - _loaded:
        del _starts[engine]
    for kind in ("engine", "selftest"):
        machine_cache.forget(kind)


def processor() -> str:
    """The name of the processor, and what it can do as the system lists it."""
    features = ""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open("rb") as lines:
        found = (line for line in lines if line.startswith((b"flags", b"Features")))
        features = next(found, b"").decode("utf-8", "replace")
    if not features:
        from archspec.cpu.detect import detected_info

        features = " ".join(sorted(detected_info().features))
    return f"{cpu_name()} {features}"


def start(engine: str, files: Iterable[Path], tick: Tick = lambda: True) -> Start:
    """How `engine`, whose libraries are `files`, starts on this processor: tried if that is not known.

    Raises NoStartError where it does not, NoMemoryError, and Cancelled.
    """
    if _trusting is not None:
        return Start("", _trusting)
    if (found := known_start(engine, files)) is not None:
        return found
    found = unknown_start(engine, files)
    verdict = _try_start(engine, "", tick)
    reason = verdict.reason
    for kernels in lower_kernels(engine, "", tick) if verdict.state == "failed" else ():
        if (verdict := _try_start(engine, kernels, tick)).state == "passed":
            found = replace(found, kernels=kernels, lost=lost_kernels(engine, reason, kernels))
            break
    if verdict.state == "memory":
        raise NoMemoryError(engine)
    if verdict.state == "failed":
        keep("engine", found.key, {"engine": engine, "state": "failed", "reason": reason})
        raise NoStartError(engine, reason)
    if verdict.state == "passed":
        keep_start(engine, found, str(verdict.said.get("build", "")))
    return found  # or it refuses to start, and will say why in this process, too


def _try_start(engine: str, kernels: str, tick: Tick) -> ChildVerdict:
    result = "variants" if kernels == ASK else "build"
    return run(lambda: {"engine": engine, "kernels": kernels}, result, tick)


def known_start(engine: str, files: Iterable[Path]) -> Start | None:
    """What `start` found earlier, None if nothing. Raises NoStartError where it found that it does not."""
    key = _engine_key(engine, files)
    here = _starts.get(engine)
    if here is not None and here.key == key:
        return here
    data = known("engine", key)
    if data is None:
        return None
    if data.get("state") == "failed":
        raise NoStartError(engine, str(data.get("reason")))
    _starts[engine] = Start(key, str(data.get("kernels", "")), str(data.get("lost", "")))
    return _starts[engine]


def unknown_start(engine: str, files: Iterable[Path]) -> Start:
    """What is tried first where nothing is known."""
    return Start(_engine_key(engine, files))


def keep_start(engine: str, found: Start, build: str = "") -> None:
    """Keep that `engine` starts like this, for all models; `build` as it names itself."""
    _starts[engine] = found
    outcome = {"state": "passed", "kernels": found.kernels, "lost": found.lost, "build": build}
    keep("engine", found.key, {"engine": engine, **outcome})


def lost_kernels(engine: str, reason: str, kernels: str) -> str:
    """The line on kernels that were given up for `kernels`."""
    return (
        f"{engine} {reason} with its best kernels for this processor: running with those for {kernels}, "
        "which is slower"
    )


def lower_kernels(engine: str, kernels: str, tick: Tick) -> list[str]:
    """What to try where `kernels` failed: the next lower ones, and those that run everywhere."""
    if engine != "llama.cpp" or engine in _loaded:
        return []
    said = _try_start(engine, ASK, tick).said.get("variants")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    lower = names[names.index(kernels) + 1 :] if kernels in names else names[1:]
    return [*lower[:1], *lower[1:][-1:]]


def _engine_key(engine: str, files: Iterable[Path]) -> str:
    """Identifies what computes: another size or time of a library is another build, whatever its version."""
    states = []
    for path in sorted(files):
        with contextlib.suppress(OSError):
            state = path.stat()
            states.append((path.name, state.st_size, state.st_mtime_ns))
    return machine_cache.digest((engine, processor(), states))


def worker_command() -> list[str]:
    """The child's command line. A frozen program must call `selftest_worker.main` for `_selftest-worker`."""
    return processes.command("_selftest-worker", "-I", "-m", "edgespec.models.gguf.selftest_worker")


def run(
    request: Callable[[], Mapping[str, Any]],
    result: str,
    tick: Tick,
    files: Sequence[int] = (),
    size: int = 0,
) -> ChildVerdict:
    """Have a child do what `request` returns, which is asked while the child starts, and judge how it ended.

    It passed if it reported a `result`, by that name. The child inherits the file descriptors `files` and
    reads about `size` bytes of weights. Raises EdgespecError if there is no child to be had, and Cancelled
    when `tick` says so: then it is gone.
    """
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        process = subprocess.Popen(
            worker_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=files,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal reaches it through this process
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise EdgespecError(
            f"The process that tries the engine did not start: {error.strerror or error}."
        ) from None
    try:
        return _Listener(process, result, tick).judge(request, size)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child and what it started; nothing if it has ended."""
    if process.returncode is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


class _Listener:
    """Hears a child: lines in JSON are reports and signs of life; others are looked at when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], result: str, tick: Tick) -> None:
        assert process.stdout is not None
        self._process, self._result, self._tick = process, result, tick
        self._began, self._ready = monotonic(), 0.0
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._noise: list[str] = []
        self._due = 0.0  # when `tick` is called next
        self.said: dict[str, Any] = {}
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def judge(self, request: Callable[[], Mapping[str, Any]], size: int) -> ChildVerdict:
        data = json.dumps({**request(), "paths": sys.path}).encode() + b"\n"
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died: its exit code says how
            self._process.stdin.write(data)
            self._process.stdin.flush()
        patience = _START_SECONDS
        while line := self._next(patience):
            self._hear(line)
            if self._ready:
                slowness = max(1.0, (self._ready - self._began) / _USUAL_START)
                patience = _PATIENCE * slowness + size / _READING
        if line is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._ended(self._process.wait(patience))
        return ChildVerdict("failed", "hung", self.said)

    def _read(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed under it
            for line in pipe:
                if not self._ready and line.startswith(b'{"ready"'):
                    self._ready = monotonic()
                self._lines.put(line)
        self._lines.put(b"")

    def _next(self, seconds: float) -> bytes | None:
        """The child's next line, b"" at its end, None if there was none for so long. Raises Cancelled.

        Time is what this process waited in short turns: while both are stopped, nobody hangs.
        """
        for _ in range(int(seconds / _TURN) + 1):
            if monotonic() > self._due:
                self._due = monotonic() + _TURN
                if not self._tick():
                    raise Cancelled
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=_TURN)
        return None

    def _hear(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        if text.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                self.said.update(json.loads(text))
                return
        if text:
            self._noise = [*self._noise[-19:], text]

    def _ended(self, code: int) -> ChildVerdict:
        refusal = str(self.said.get("refused", ""))
        if _MEMORY.search("\n".join([*self._noise, refusal])) and (code or refusal):
            return ChildVerdict("memory", "", self.said)
        if code < 0:
            name = _signal_name(-code)
            if name == "SIGKILL":  # by the system, which needs the memory: nobody else ends it like that
                return ChildVerdict("memory", "", self.said)
            if name in _ENDED:
                return ChildVerdict("refused", f"The trial of the engine was ended ({name}).", self.said)
            return ChildVerdict("failed", f"crashed ({name})", self.said)
        if code >= 1 << 31:  # Windows' exceptions
            return ChildVerdict("failed", f"crashed (0x{code:X})", self.said)
        if code:
            last = f": {printable(self._noise[-1], 200)}" if self._noise else ""
            return ChildVerdict("failed", f"ended with code {code}{last}", self.said)
        if refusal:
            return ChildVerdict("refused", refusal, self.said)
        if self._result not in self.said:
            return ChildVerdict("failed", "ended without a result", self.said)
        return ChildVerdict("passed", "", self.said)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
