"""A model is evaluated in a child process before it is in this one: native code must not crash here.

With the very options, the first time for each build of the engine, processor and shape of the model. Where
that fails, something is given up: repacked weights, then the newest kernels, then the engine. What came of it
is kept.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, get_args

from edgespec.core import EdgespecError
from edgespec.machine.sensors import compute_cores
from edgespec.models import machine_cache
from edgespec.models.gguf import trial
from edgespec.models.gguf.backends import files
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.models.gguf.trial import ChildVerdict, Start, Tick

log = logging.getLogger("edgespec.selftest")

_KIND = "selftest"  # of what is kept
# Differences of batches from single rows, see selftest_worker.differences. Seen with right kernels: at most
# 0.06 of a part (0.12 with a 4-bit cache) and 0.14 of a whole model; with wrong ones 0.5 and more of a part,
# 1.0 of a whole model (docs/experiments.md).
_PART_BOUND, _WHOLE_BOUND = 0.15, 0.3

_ROWS = 32
_CONTEXT = 256, 4096  # bounds: room for the prompt, and no more cache than a small machine has
_STATES = ("passed", False), ("failed", True)
_ENGINES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class SelfTestOutcome:
    """What a test came to: "passed" or "failed", for the `reason` that completes "llama.cpp ...".

    `start` identifies the engine's files and the processor, `kernels` are llama.cpp's where not the best.
    `difference` is that of the worst batch from single rows, None where it did not get so far.
    """

    state: str
    reason: str
    start: str
    engine: BackendName
    kernels: str
    repack: bool
    flash_attention: bool | None
    cache: Sequence[str]
    model: str
    types: Sequence[str]
    difference: float | None
    seconds: float

    @property
    def name(self) -> str:
        """What was tested, in words."""
        how = [f"kernels for {self.kernels}"] * bool(self.kernels)
        how.append("repacked" if self.repack else "not repacked")
        how += ["no flash attention"] * (self.flash_attention is False)
        how += [f"{kind} cache" for kind in sorted({*self.cache} - {"f16"})]
        return f"{self.model} ({' '.join(self.types)}) on {self.engine}, {', '.join(how)}"


class _Found(NamedTuple):
    """The options that work on an engine, with lines on what was given up for that; or why none do."""

    options: LlamaOptions | None
    lost: Sequence[str] = ()
    reason: str = ""


@cache
def warn(line: str) -> None:
    """Where lines go that nobody asked for: to the log, each once."""
    log.warning("%s", line)


def settle(
    path: Path,
    options: LlamaOptions,
    progress: Callable[[float], bool] | None = None,
    say: Callable[[str], None] = warn,
    engines: Sequence[BackendName] = _ENGINES,
) -> LlamaOptions:
    """The options to load the file at `path` with: `options`, or what works here instead.

    Takes a second or two where that is not known yet. `engines` may be used; `say` hears what was given up.
    Raises EdgespecError where nothing works, and Cancelled when `progress` returned False.
    """
    if trial.trusting():
        return options
    summary, tick, failures = check_gguf(path), _tick(progress), list[str]()
    for engine in [options.engine, *(name for name in engines if name != options.engine)]:
        try:
            found = _on_engine(path, summary, replace(options, engine=engine), tick)
        except trial.NoMemoryError:
            raise
        except EdgespecError:
            if not failures:
                raise
            continue  # it is not installed, or does not run such a model
        if found.options is not None:
            for line in found.lost:
                say(line)
            if failures:
                say(f"{failures[0]} on this processor: running on {engine} instead")
            return found.options
        failures.append(f"{engine} {found.reason}")
    raise EdgespecError(
        f"{path.name} cannot be run on this processor: {', and '.join(failures)}; "
        "try another quantization of it, or another model"
    )


def failure(path: Path, options: LlamaOptions, progress: Callable[[float], bool] | None = None) -> str | None:
    """Why these very options do not work here, as in "llama.cpp crashed (SIGILL)"; None if they do.

    Raises EdgespecError as `settle` does.
    """
    tick = _tick(progress)
    start = trial.start(options.engine, files(options.engine), tick)
    reason = _reason(path, check_gguf(path), options, start, tick)
    return reason and f"{options.engine} {reason}"


def test(path: Path, options: LlamaOptions, start: Start, tick: Tick) -> ChildVerdict:
    """Try `options` in a child process, whatever is known of them.

    A failure counts if it is seen twice: with a part of the model, which takes a fraction of the time and of
    the memory, then with the whole.
    """
    summary = check_gguf(path)
    trained = options.context or summary.context_length or _CONTEXT[1]
    context, rows = min(max(trained, _CONTEXT[0]), _CONTEXT[1]), min(_ROWS, options.batch)
    tried = replace(options, context=context, sequences=1, max_rows=rows)

    def attempt(model: Callable[[], Path], fds: Sequence[int], bound: float, size: int) -> ChildVerdict:
        def request() -> dict[str, Any]:
            return {
                "engine": options.engine,
                "kernels": start.kernels,
                "model": str(model()),
                "options": asdict(tried),
            }

        verdict = trial.run(request, "difference", tick, fds, size)
        if verdict.state == "passed" and not verdict.said["difference"] <= bound:
            return ChildVerdict("failed", "gave wrong logits", verdict.said)
        return verdict

    with _part(path, summary) as (part, fds):
        verdict = attempt(part, fds, _PART_BOUND, summary.tensor_bytes)
    if verdict.state in ("passed", "memory"):
        return verdict
    return attempt(path.absolute, (), _WHOLE_BOUND, summary.tensor_bytes)


def outcomes() -> list[SelfTestOutcome]:
    """All that was tested of the engines as they are installed now."""
    starts = set()
    for engine in _ENGINES:
        with suppress(EdgespecError):
            starts.add(trial.unknown_start(engine, files(engine)).key)
    found = (_outcome(data) for data in trial.known_all(_KIND))
    return [one for one in found if one is not None and one.start in starts]


def _on_engine(path: Path, summary: GgufSummary, options: LlamaOptions, tick: Tick) -> _Found:
    """Raises EdgespecError where the engine is not installed, or does not run such models."""
    engine = options.engine
    here = files(engine)
    try:
        start = trial.known_start(engine, here) or trial.unknown_start(engine, here)
        first = _reason(path, summary, options, start, tick)
        if first is None:
            return _Found(options, _lines(start))
        known = trial.start(engine, here, tick)
    except trial.NoStartError as error:
        return _Found(None, reason=error.reason)
    if known != start:  # it does not start with its best kernels, whatever the model
        return _on_engine(path, summary, options, tick)
    plain = replace(options, repack=False)
    if options.repack and _reason(path, summary, plain, start, tick) is None:
        where = f"{engine} {first} with repacked weights on this processor"
        return _Found(plain, [*_lines(start), f"{where}: running without them, which is slower"])
    for kernels in trial.lower_kernels(engine, start.kernels, tick):
        lower = replace(start, kernels=kernels, lost=trial.lost_kernels(engine, first, kernels))
        if _reason(path, summary, options, lower, tick) is None:
            trial.keep_start(engine, lower)
            return _Found(options, _lines(lower))
    return _Found(None, reason=first)


def _reason(path: Path, summary: GgufSummary, options: LlamaOptions, start: Start, tick: Tick) -> str | None:
    """Why `options` do not work with that engine, None if they do: as known, or found out now.

    Raises EdgespecError where there is no telling: it found no memory, or refuses the model.
    """
    key = _key(summary, options, start)
    if known := _outcome(trial.known(_KIND, key)):
        return known.reason or None
    began = perf_counter()
    verdict = test(path, options, start, tick)
    if "build" in verdict.said and start.kernels == "":
        trial.keep_start(options.engine, start, str(verdict.said["build"]))
    if verdict.state == "memory":
        raise trial.NoMemoryError(path.name)
    if verdict.state == "refused":
        raise EdgespecError(verdict.reason)
    difference = verdict.said.get("difference")
    found = SelfTestOutcome(
        verdict.state,
        verdict.reason,
        start.key,
        options.engine,
        start.kernels,
        options.repack,
        options.flash_attention,
        [options.type_k, options.type_v],
        path.name,
        sorted(summary.types),
        round(difference, 4) if difference is not None and isfinite(difference) else None,
        round(perf_counter() - began, 3),
    )
    trial.keep(_KIND, key, asdict(found))
    return found.reason or None


def _outcome(data: Mapping[str, Any] | None) -> SelfTestOutcome | None:
    """What was kept as `data`, None if it is not what it was."""
    with suppress(KeyError, TypeError):
        found = SelfTestOutcome(
            **{field.name: data[field.name] for field in fields(SelfTestOutcome)} if data else {}
        )
        texts = [
            found.state,
            found.reason,
            found.start,
            found.kernels,
            found.model,
            *found.cache,
            *found.types,
        ]
        if all(isinstance(text, str) for text in texts) and (found.state, bool(found.reason)) in _STATES:
            return found
    return None


def _key(summary: GgufSummary, options: LlamaOptions, start: Start) -> str:
    """Identifies what is evaluated by which code: engine, processor, options, shape of the model."""
    one_row = options.threads or compute_cores()
    window = summary.metadata.get(f"{summary.architecture}.attention.sliding_window", 0)
    slides = isinstance(window, int) and 0 < window < (options.context or window + 1)
    return machine_cache.digest((
        start.key, start.kernels, one_row, options.threads_batch or one_row, options.flash_attention,
        options.type_k, options.type_v, options.repack, options.gpu_layers, options.batch, slides,
        summary.architecture, summary.vocab_size, summary.parameters, sorted(summary.types.items()),
    ))  # fmt: skip


def _lines(start: Start) -> list[str]:
    return [start.lost] if start.lost else []


def _tick(progress: Callable[[float], bool] | None) -> Tick:
    return (lambda: progress(0.0)) if progress is not None else lambda: True


@contextmanager
def _part(path: Path, summary: GgufSummary) -> Iterator[tuple[Callable[[], Path], Sequence[int]]]:
    """What writes a part of the model and returns its path in a child that inherits the file descriptors.

    Where there is none, or no place for it, that is the model itself.
    """
    from edgespec.models.gguf.part import part_of, write_part  # slow to import, and rarely needed

    pieces = part_of(summary)
    if pieces is None:
        yield path.absolute, ()
        return

    def write(out: Path) -> Path:
        try:
            write_part(path, summary, pieces, out)
        except (OSError, KeyError, ValueError):
            return path.absolute()
        return out

    if hasattr(os, "memfd_create"):  # needs no room on a disk, and is gone with the last who has it open
        fd = os.memfd_create("part.gguf")
        try:
            yield (lambda: write(Path(f"/proc/self/fd/{fd}"))), (fd,)
        finally:
            os.close(fd)
        return
    with tempfile.TemporaryDirectory(prefix="edgespec-", ignore_cleanup_errors=True) as folder:
        yield (lambda: write(Path(folder) / "part.gguf")), ()
