"""Trials of native code in a child process, because it may crash, hang, or return wrong logits.

This module starts a child and judges its result, and saves whether engines start, and with which kernels.
`selftest` tests models on an engine; `selftest_worker` is the code of the child.
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
"""Called ten times per second while a child runs; returns False to stop it."""

ASK = "?"
"""In place of the name of kernels, requests the list of them."""

_START_SECONDS = 60.0  # limit for the imports of the child, on any machine
_USUAL_START = 0.25  # seconds for these imports on an idle machine
_PATIENCE = 20.0  # seconds without a report until a child is hung; scaled by its start
_TURN = 0.1
_READING = 50e6  # bytes of weights per second on the slowest machine
_MEMORY = re.compile(
    r"insufficient memory|(failed|unable) to alloc|bad_alloc|MemoryError|out of memory|cannot allocate",
    re.IGNORECASE,
)
_ENDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # sent by whoever ends this process as well


@dataclass(frozen=True, slots=True)
class ChildVerdict:
    """The result of a trial.

    `reason` completes "llama.cpp ..." if it failed, and is the child's own message if it refused. `reports`
    are the values that the child reported.
    """

    state: ChildState
    reason: str
    reports: Mapping[str, Any]


class NoStartError(EdgespecError):
    """An engine does not start on this processor; `reason` completes "llama.cpp ..."."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine} {reason} when it was started on this processor: install it again")
        self.reason = reason


class NoMemoryError(EdgespecError):
    """Not enough memory for a trial, which therefore has no result."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"not enough memory for {name}: close other programs, or choose a smaller model or --context"
        )


@dataclass(frozen=True, slots=True)
class Start:
    """How an engine starts here: with the library `kernels`, "" for the best or only one.

    `key` identifies its files and this processor. `lost` is a note on replaced kernels, "" if there are none.
    """

    key: str
    kernels: str = ""
    lost: str = ""


_starts: dict[str, Start] = {}  # by engine: as loaded here, or to be loaded
_loaded: set[str] = set()
_outcomes: dict[tuple[str, str], dict[str, Any]] = {}  # the cache folder may be read-only
_trusting: str | None = None  # the kernels under trial, in the child


def trust(kernels: str) -> None:
    """Load engines with these kernels, and models, without a trial: this process is the child of one."""
    global _trusting
    _trusting = kernels


def trusting() -> bool:
    """Whether this process is the child of a trial."""
    return _trusting is not None


def known(kind: str, key: str) -> dict[str, Any] | None:
    """Return an outcome saved by `keep`, in this process or an earlier one."""
    return _outcomes.get((kind, key)) or machine_cache.load(kind, key)


def loaded(engine: str) -> None:
    """Record that this process has loaded `engine`, so that its kernels can no longer be replaced."""
    _loaded.add(engine)


def known_all(kind: str) -> list[dict[str, Any]]:
    """Return all outcomes of `kind`."""
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
    """Delete all outcomes, so that trials are repeated, except of engines that this process has loaded."""
    _outcomes.clear()
    for engine in _starts.keys() - _loaded:
        del _starts[engine]
    for kind in ("engine", "selftest"):
        machine_cache.forget(kind)


def processor() -> str:
    """Return the name of the processor and its features as the system lists them."""
    features = ""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open("rb") as lines:
        found = (line for line in lines if line.startswith((b"flags", b"Features")))
        features = next(found, b"").decode("utf-8", "replace")
    if not features:
        from archspec.cpu.detect import detected_info

        features = " ".join(sorted(detected_info().features))
    return f"{cpu_name()} {features}"


def start(engine: str, files: Iterable[Path], tick: Tick = lambda: True) -> Start:
    """Return how `engine`, with the libraries `files`, starts on this processor: saved, or from a trial.

    Raises NoStartError if it does not start, NoMemoryError, and Cancelled.
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
        keep_start(engine, found, str(verdict.reports.get("build", "")))
    return found  # if it refused, loading it in this process raises the error


def _try_start(engine: str, kernels: str, tick: Tick) -> ChildVerdict:
    result = "variants" if kernels == ASK else "build"
    return run(lambda: {"engine": engine, "kernels": kernels}, result, tick)


def known_start(engine: str, files: Iterable[Path]) -> Start | None:
    """Return the saved result of `start`, None if there is none. Raises NoStartError if it failed."""
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
    """Return the Start that is tried first."""
    return Start(_engine_key(engine, files))


def keep_start(engine: str, found: Start, build: str = "") -> None:
    """Save how `engine` starts, for all models; `build`: of the engine."""
    _starts[engine] = found
    outcome = {"state": "passed", "kernels": found.kernels, "lost": found.lost, "build": build}
    keep("engine", found.key, {"engine": engine, **outcome})


def lost_kernels(engine: str, reason: str, kernels: str) -> str:
    """Return the note that the best kernels were replaced by `kernels`."""
    return (
        f"{engine} {reason} with its best kernels for this processor: running with those for {kernels}, "
        "which is slower"
    )


def lower_kernels(engine: str, kernels: str, tick: Tick) -> list[str]:
    """Return the kernels to try after `kernels` failed: the next lower ones, and those for any processor."""
    if engine != "llama.cpp" or engine in _loaded:
        return []
    variants = _try_start(engine, ASK, tick).reports.get("variants")
    names = [name for name in variants if isinstance(name, str)] if isinstance(variants, list) else []
    lower = names[names.index(kernels) + 1 :] if kernels in names else names[1:]
    return [*lower[:1], *lower[1:][-1:]]


def _engine_key(engine: str, files: Iterable[Path]) -> str:
    """Return a key for the engine's code: another size or time of a library means another build."""
    states = []
    for path in sorted(files):
        with contextlib.suppress(OSError):
            state = path.stat()
            states.append((path.name, state.st_size, state.st_mtime_ns))
    return machine_cache.digest((engine, processor(), states))


def worker_command() -> list[str]:
    """Return the child's command line. A frozen program runs `selftest_worker.main` for it."""
    return processes.command("_selftest-worker", "-I", "-m", "edgespec.models.gguf.selftest_worker")


def run(
    request: Callable[[], Mapping[str, Any]],
    result: str,
    tick: Tick,
    files: Sequence[int] = (),
    size: int = 0,
) -> ChildVerdict:
    """Send a child the value of `request`, which is called while the child starts, and judge its result.

    It passed if it reported a value named `result`. The child inherits the file descriptors `files` and reads
    about `size` bytes of weights. Raises EdgespecError if no child can be started, and Cancelled if `tick`
    returned False; the child has ended in any case.
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
        raise EdgespecError(f"cannot start a process to test the engine: {error.strerror or error}") from None
    try:
        return _Listener(process, result, tick).judge(request, size)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and its processes, if it still runs."""
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
    """Receives a child's output: lines of JSON are reports; others serve to explain its exit."""

    def __init__(self, process: subprocess.Popen[bytes], result: str, tick: Tick) -> None:
        assert process.stdout is not None
        self._process, self._result, self._tick = process, result, tick
        self._began, self._ready = monotonic(), 0.0
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._noise: list[str] = []
        self._due = 0.0  # when `tick` is called next
        self.reports: dict[str, Any] = {}
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def judge(self, request: Callable[[], Mapping[str, Any]], size: int) -> ChildVerdict:
        data = json.dumps({**request(), "paths": sys.path}).encode() + b"\n"
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: its exit code is judged below
            self._process.stdin.write(data)
            self._process.stdin.flush()
        patience = _START_SECONDS
        while line := self._next(patience):
            self._receive(line)
            if self._ready:
                slowness = max(1.0, (self._ready - self._began) / _USUAL_START)
                patience = _PATIENCE * slowness + size / _READING
        if line is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._ended(self._process.wait(patience))
        return ChildVerdict("failed", "hung", self.reports)

    def _read(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed by `_end`
            for line in pipe:
                if not self._ready and line.startswith(b'{"ready"'):
                    self._ready = monotonic()
                self._lines.put(line)
        self._lines.put(b"")

    def _next(self, seconds: float) -> bytes | None:
        """Return the child's next line, b"" at its end, None after `seconds` without one. Raises Cancelled.

        Waits in short turns, so that time in which both processes are suspended does not count.
        """
        for _ in range(int(seconds / _TURN) + 1):
            if monotonic() > self._due:
                self._due = monotonic() + _TURN
                if not self._tick():
                    raise Cancelled
            with contextlib.suppress(queue.Empty):
                return self._lines.get(timeout=_TURN)
        return None

    def _receive(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()
        if text.startswith("{"):
            with contextlib.suppress(ValueError, RecursionError):
                self.reports.update(json.loads(text))
                return
        if text:
            self._noise = [*self._noise[-19:], text]

    def _ended(self, code: int) -> ChildVerdict:
        refusal = str(self.reports.get("refused", ""))
        if _MEMORY.search("\n".join([*self._noise, refusal])) and (code or refusal):
            return ChildVerdict("memory", "", self.reports)
        if code < 0:
            name = _signal_name(-code)
            if name == "SIGKILL":  # by the kernel, when memory runs out
                return ChildVerdict("memory", "", self.reports)
            if name in _ENDED:
                return ChildVerdict(
                    "refused", f"the test of the engine was terminated ({name}): try again", self.reports
                )
            return ChildVerdict("failed", f"crashed ({name})", self.reports)
        if code >= 1 << 31:  # Windows' exceptions
            return ChildVerdict("failed", f"crashed (0x{code:X})", self.reports)
        if code:
            last = f": {printable(self._noise[-1], 200)}" if self._noise else ""
            return ChildVerdict("failed", f"ended with code {code}{last}", self.reports)
        if refusal:
            return ChildVerdict("refused", refusal, self.reports)
        if self._result not in self.reports:
            return ChildVerdict("failed", "ended without a result", self.reports)
        return ChildVerdict("passed", "", self.reports)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
