"""The self-test: a model is evaluated in a child process first, so that native code does not crash here.

It runs with the same options, once for each build of the engine, processor and shape of the model. If it
fails, it is repeated without repacked weights, then with lower kernels, then on the other engine. Outcomes
are saved.
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

_KIND = "selftest"  # of files in machine_cache
# Bounds of the difference of batches from single rows, see selftest_worker.differences. Measured with correct
# kernels: at most 0.06 for a part (0.12 with a 4-bit cache) and 0.14 for a whole model; with wrong ones at
# least 0.5 for a part and 1.0 for a whole model (docs/experiments.md).
_PART_BOUND, _WHOLE_BOUND = 0.15, 0.3

_ROWS = 32
_CONTEXT = 256, 4096  # minimum for the prompt, maximum for the memory of a small machine
_STATES = ("passed", False), ("failed", True)
_ENGINES: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True, slots=True)
class SelfTestOutcome:
    """The outcome of a self-test. `state`: "passed" or "failed"; `reason` completes "llama.cpp ...".

    `start` identifies the engine's files and the processor, `kernels` are llama.cpp's if not the best.
    `difference` is the largest of a batch from single rows, None if the test did not get that far.
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
        """The tested model and options, in words."""
        how = [f"kernels for {self.kernels}"] * bool(self.kernels)
        how.append("repacked" if self.repack else "not repacked")
        how += ["no flash attention"] * (self.flash_attention is False)
        how += [f"{kind} cache" for kind in sorted({*self.cache} - {"f16"})]
        return f"{self.model} ({' '.join(self.types)}) on {self.engine}, {', '.join(how)}"


class _Found(NamedTuple):
    """Options that work on an engine, with a note on each deviation; or the reason why none do."""

    options: LlamaOptions | None
    lost: Sequence[str] = ()
    reason: str = ""


@cache
def warn(line: str) -> None:
    """Log `line`, once: the default for notes."""
    log.warning("%s", line)


def settle(
    path: Path,
    options: LlamaOptions,
    progress: Callable[[float], bool] | None = None,
    note: Callable[[str], None] = warn,
    engines: Sequence[BackendName] = _ENGINES,
) -> LlamaOptions:
    """Return options that work for the file at `path`: `options` if possible, else the nearest to them.

    Takes one or two seconds if no outcome is saved. `engines`: those allowed; `note` receives a line for each
    deviation. Raises EdgespecError if nothing works, and Cancelled if `progress` returned False.
    """
    if trial.trusting():
        return options
    if options.adapters:
        engines = ("llama.cpp",)
    summary, tick, failures = check_gguf(path), _tick(progress), list[str]()
    for engine in [options.engine, *(name for name in engines if name != options.engine)]:
        try:
            found = _on_engine(path, summary, replace(options, engine=engine), tick)
        except trial.NoMemoryError:
            raise
        except EdgespecError:
            if not failures:
                raise
            continue  # not installed, or the model is not supported
        if found.options is not None:
            for line in found.lost:
                note(line)
            if failures:
                note(f"{failures[0]} on this processor: running on {engine} instead")
            return found.options
        failures.append(f"{engine} {found.reason}")
    raise EdgespecError(
        f"{path.name} does not run on this processor ({', and '.join(failures)}): "
        "try another quantization of it, or another model"
    )


def failure(path: Path, options: LlamaOptions, progress: Callable[[float], bool] | None = None) -> str | None:
    """Return why exactly these options fail here ("llama.cpp crashed (SIGILL)"), None if they work.

    Raises EdgespecError like `settle`.
    """
    tick = _tick(progress)
    start = trial.start(options.engine, files(options.engine), tick)
    reason = _reason(path, check_gguf(path), options, start, tick)
    return reason and f"{options.engine} {reason}"


def test(path: Path, options: LlamaOptions, start: Start, tick: Tick) -> ChildVerdict:
    """Run the self-test for `options` in a child process, even if an outcome is saved.

    Only a second failure counts: first a part of the model is tested, which takes a fraction of the time and
    memory, then the whole.
    """
    summary = check_gguf(path)
    trained = options.context or summary.context_length or _CONTEXT[1]
    context, rows = min(max(trained, _CONTEXT[0]), _CONTEXT[1]), min(_ROWS, options.batch)
    tried = replace(
        options, context=context, least_context=0, auto_cache=False, sequences=1, max_rows=rows, adapters=()
    )

    def attempt(model: Callable[[], Path], fds: Sequence[int], bound: float, size: int) -> ChildVerdict:
        def request() -> dict[str, Any]:
            return {
                "engine": options.engine,
                "kernels": start.kernels,
                "model": str(model()),
                "options": asdict(tried),
            }

        verdict = trial.run(request, "difference", tick, fds, size)
        if verdict.state == "passed" and not verdict.reports["difference"] <= bound:
            return ChildVerdict("failed", "gave wrong logits", verdict.reports)
        return verdict

    with _part(path, summary) as (part, fds):
        verdict = attempt(part, fds, _PART_BOUND, summary.tensor_bytes)
    if verdict.state in ("passed", "memory"):
        return verdict
    return attempt(path.absolute, (), _WHOLE_BOUND, summary.tensor_bytes)


def outcomes() -> list[SelfTestOutcome]:
    """Return all saved outcomes of the installed engines."""
    starts = set()
    for engine in _ENGINES:
        with suppress(EdgespecError):
            starts.add(trial.unknown_start(engine, files(engine)).key)
    found = (_outcome(data) for data in trial.known_all(_KIND))
    return [one for one in found if one is not None and one.start in starts]


def _on_engine(path: Path, summary: GgufSummary, options: LlamaOptions, tick: Tick) -> _Found:
    """Find options that work. Raises EdgespecError if the engine is not installed or refuses the model."""
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
    if known != start:  # its best kernels do not start, independent of the model
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
    """Return why `options` fail on that engine, None if they work: the saved outcome, or a new self-test.

    Raises EdgespecError if there is no outcome: not enough memory, or a model that the engine refuses.
    """
    key = _key(summary, options, start)
    if known := _outcome(trial.known(_KIND, key)):
        return known.reason or None
    began = perf_counter()
    verdict = test(path, options, start, tick)
    if "build" in verdict.reports and start.kernels == "":
        trial.keep_start(options.engine, start, str(verdict.reports["build"]))
    if verdict.state == "memory":
        raise trial.NoMemoryError(path.name)
    if verdict.state == "refused":
        raise EdgespecError(verdict.reason)
    difference = verdict.reports.get("difference")
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
    """Parse a saved outcome, None if it is invalid."""
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
    """Return a key for engine, processor, options and shape of the model."""
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
    """Yield a function that writes a part of the model and returns its path, and file descriptors to inherit.

    The path is valid in a child that inherits them. Without a part, or space for it, it is the model's own.
    """
    from edgespec.models.gguf.part import part_of, write_part  # imports slowly, and is rarely needed

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

    if hasattr(os, "memfd_create"):  # uses no disk, and is freed with its last descriptor
        fd = os.memfd_create("part.gguf")
        try:
            yield (lambda: write(Path(f"/proc/self/fd/{fd}"))), (fd,)
        finally:
            os.close(fd)
        return
    with tempfile.TemporaryDirectory(prefix="edgespec-", ignore_cleanup_errors=True) as folder:
        yield (lambda: write(Path(folder) / "part.gguf")), ()
