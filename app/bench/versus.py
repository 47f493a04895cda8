"""Interleaved comparison of several systems on the same prompts.

In a turn, all systems answer the same prompt, in an order that rotates. Machines drift by tens of percent
within minutes, so a figure is a median of ratios taken within a turn.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import edgespec
from edgespec.app.bench.figures import Sample, figures
from edgespec.app.bench.measure import Prompt
from edgespec.app.bench.oracle import best_possible
from edgespec.app.bench.peers import MODES, LlamaServer, choose_modes
from edgespec.app.bench.systems import BenchSystem, EdgespecSystem, SystemAnswer
from edgespec.app.engine.engine import Engine
from edgespec.core import Cancelled, EdgespecError
from edgespec.machine.sensors import load_average, memory_available
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.native import BackendName

INTERRUPTED = "interrupted"
_WARM_UP_TOKENS = 8


@dataclass(slots=True)
class ComparisonRun:
    """The samples of a comparison, in whole turns.

    `stopped` is the reason why it ended early, None if it did not; `passing` are the names of systems that
    were restarted for each answer, because memory does not hold all of them at once.
    """

    samples: list[Sample] = field(default_factory=list)
    stopped: str | None = None
    passing: list[str] = field(default_factory=list)


class Stage:
    """Starts systems for their turn, and keeps as many started as `memory` bytes hold.

    The others are restarted for each turn: weights are read from the page cache within seconds, and every
    start is followed by a warm-up. On exit, all systems are stopped.
    """

    def __init__(self, systems: Sequence[BenchSystem], warm_up: Sequence[int], memory: int) -> None:
        """Raises EdgespecError if one system alone takes more than `memory` bytes."""
        self._kept = kept(systems, memory)
        self.passing = [system.name for system in systems if system.name not in self._kept]
        self._warm_up = warm_up
        self._started: dict[str, BenchSystem] = {}

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # one that cannot be stopped must not keep the others running
            for system in self._started.values():
                stack.callback(system.stop)

    def ask(self, system: BenchSystem, prompt: Sequence[int], max_tokens: int) -> SystemAnswer:
        """One turn of `system`."""
        if system.name not in self._started:
            self._started[system.name] = system
            system.start()
            system.ask(self._warm_up, _WARM_UP_TOKENS)
        answered = system.ask(prompt, max_tokens)
        if system.name not in self._kept:
            self._leave(system)
        return answered

    def forget(self) -> None:
        """Stop the systems that would remember the prompts of the pass that ends."""
        for system in [one for one in self._started.values() if one.remembers]:
            self._leave(system)

    def _leave(self, system: BenchSystem) -> None:
        del self._started[system.name]
        system.stop()


def kept(systems: Sequence[BenchSystem], memory: int) -> set[str]:
    """Names of the systems that stay started: all, or as many as leave room for the largest of the others.

    Raises EdgespecError if one system alone takes more than `memory` bytes.
    """
    for system in systems:
        if system.memory > memory:
            raise EdgespecError(
                f"{system.name} needs about {system.memory / 1e9:.1f} GB and {memory / 1e9:.1f} GB are free: "
                "close programs, lower --context, or leave it out with --modes"
            )
    smallest_first = sorted(systems, key=lambda system: system.memory)
    for count in range(len(systems), -1, -1):
        staying, passing = smallest_first[:count], smallest_first[count:]
        room = max((system.memory for system in passing), default=0)
        if sum(system.memory for system in staying) + room <= memory:
            return {system.name for system in staying}
    return set()


def rotation(systems: Sequence[BenchSystem], repetition: int, prompt: int) -> list[BenchSystem]:
    """The order of a turn: each prompt and each pass starts one system later, every other pass in reverse.

    No system always comes first or always follows the same one.
    """
    start = (repetition + prompt) % len(systems)
    order = [*systems[start:], *systems[:start]]
    return order[::-1] if repetition % 2 else order


def compare(
    systems: Sequence[BenchSystem],
    prompts: Sequence[tuple[Prompt, Sequence[int]]],
    warm_up: Sequence[int],
    max_tokens: int,
    repetitions: int = 1,
    memory: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ComparisonRun:
    """Have every system answer every prompt (token ids), `repetitions` times.

    Ctrl-C or an error ends the run early and keeps the samples. Before the end of the first turn there are
    none: then Ctrl-C raises Cancelled, and an EdgespecError is raised again.
    """
    run = ComparisonRun()
    total = repetitions * len(prompts)
    with _tidy_exit(), Stage(systems, warm_up, memory_available() if memory is None else memory) as stage:
        try:
            for system in systems:  # one that cannot start is found before hours of measuring
                if progress:
                    progress(f"starting {system.name}")
                stage.ask(system, warm_up, _WARM_UP_TOKENS)
            for repetition in range(repetitions):
                stage.forget()
                for i, (prompt, tokens) in enumerate(prompts):
                    turn = []
                    for system in rotation(systems, repetition, i):
                        if progress:
                            done = repetition * len(prompts) + i + 1
                            progress(f"{done} of {total}: {prompt.task}, {system.name}")
                        answered = stage.ask(system, tokens, max_tokens)
                        turn.append(Sample(repetition, i, prompt, system.name, answered))
                    run.samples += turn
        except KeyboardInterrupt:
            if not run.samples:
                raise Cancelled from None
            run.stopped = INTERRUPTED
        except EdgespecError as error:
            if not run.samples:
                raise
            run.stopped = str(error)
        run.passing = stage.passing
    if progress:
        progress("")
    return run


@contextlib.contextmanager
def _tidy_exit() -> Iterator[None]:
    """Exit in the ordinary way on SIGTERM and SIGHUP, so that no server outlives the benchmark."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, lambda number, _: sys.exit(128 + number)) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def notes(systems: Sequence[BenchSystem], run: ComparisonRun) -> list[str]:
    """Notes that a reader of the figures needs, a sentence each."""
    notes = []
    if run.stopped is not None:
        notes.append(f"Stopped early, figures are of what was measured: {run.stopped}")
    if run.passing:
        notes.append(f"Restarted for every answer, for lack of memory: {', '.join(run.passing)}.")
    for system in systems:
        drafted = sum(one.answer.drafted for one in run.samples if one.system == system.name)
        if not drafted and system.name != system.plain:
            notes.append(f"{system.name} never drafted: its figures are those of plain decoding.")
        if drafted and system.name == system.plain:
            notes.append(f"{system.name} drafted {drafted} tokens: it is not plain decoding.")
    return notes


def _busy() -> list[str]:
    """A note if other programs compete for the processor: ratios stay fair, but spreads grow."""
    load = load_average()
    return [f"The machine was busy before the run (load {load:.1f}): measure again when it is idle."] * (
        load > 1
    )


def installed_engines() -> dict[str, BackendName]:
    """The native runtimes of this installation, by the name of the system that uses them."""
    names = []
    for name in get_args(BackendName):
        with contextlib.suppress(EdgespecError):
            library(name)
            names.append(name)
    return {"edgespec" if name == names[0] else f"edgespec {name}": name for name in names}


def bench_against(
    engines: Mapping[str, Engine],
    peers: Sequence[tuple[str, Path]],
    modes: str,
    prompts: Sequence[Prompt],
    max_tokens: int,
    repetitions: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare Edgespec on each engine (by label), plain and speculative, with each peer in each mode.

    All engines have the same target and draft; peers get their files, thread counts and context size. Returns
    the report, which `table` shows; "stopped" in it is None unless the run was cut short.
    """
    first = next(iter(engines.values()))
    target, draft = first.model, first.drafters.asked_for
    ours = [
        EdgespecSystem(engine, label, speculate=speculate)
        for label, engine in engines.items()
        for speculate in (False, True)
    ]
    servers = servers_of(first, peers, modes)
    systems: list[BenchSystem] = [*ours, *servers]
    asked = [(prompt, first.chat_prompt([{"role": "user", "content": prompt.text}])) for prompt in prompts]
    warm_up = first.chat_prompt([{"role": "user", "content": "Hello!"}])
    by_plain = {system.plain: system.engine for system in ours}

    def oracle(name: str, answer: SystemAnswer) -> float | None:
        return best_possible(by_plain[name], answer.prompt, answer.tokens) if name in by_plain else None

    busy = _busy()
    run = compare(systems, asked, warm_up, max_tokens, repetitions, progress=progress)
    return {
        "edgespec": edgespec.__version__,
        "model": target.path.name,
        "draft": draft.name if draft else None,
        "threads": list(target.threads),
        "context": target.context_length,
        "max_tokens": max_tokens,
        "repetitions": repetitions,
        "stopped": run.stopped,
        "notes": [*busy, *notes(systems, run)],
        "peers": {one.name: {"build": one.build, "command": one.command} for one in servers},
        **figures(systems, run.samples, servers[0].plain, oracle),
        "prompts": [{"task": p.task, "id": p.id, "tokens": list(tokens)} for p, tokens in asked],
        "answers": [one.as_json() for one in run.samples],
    }


def servers_of(engine: Engine, peers: Sequence[tuple[str, Path]], modes: str) -> list[LlamaServer]:
    """Each peer (label and program) in each of `modes`, with the files, context and threads of `engine`.

    Raises EdgespecError for a mode that is unknown or needs a draft model where there is none.
    """
    target, draft = engine.model, engine.drafters.asked_for
    # The cache size of a draft model is unknown where it does not pay and is not loaded: it is small.
    draft_cache = engine.draft.cache_bytes if engine.draft else 0
    return [
        LlamaServer(
            program,
            mode,
            target.path.absolute(),
            draft.absolute() if draft else None,
            label=label,
            context=target.context_length,
            threads=target.threads,
            cache_bytes=target.cache_bytes + (draft_cache if MODES[mode].needs_draft else 0),
        )
        for label, program in peers
        for mode in choose_modes(modes, draft is not None)
    ]
