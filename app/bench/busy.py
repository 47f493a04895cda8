"""Adaptation of the planner when another program takes the processor in the middle of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import monotonic
from typing import Any

from edgespec import processes
from edgespec.app.bench.fixed_length import FixedLength
from edgespec.app.bench.measure import first_difference
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import Request
from edgespec.machine.sensors import logical_cores

LENGTHS = (0, 1, 3, 7, 15)
PHASES = ("calm", "busy", "calm again")
_PHASE = 8.0  # seconds
_SETTLING = 3.0  # seconds after a change of phase that do not count
_PROMPT = (
    "Write a JSON array of 60 employees. Each has the keys id, first_name, last_name, email, department, "
    "city, salary and start_date, with varied values. Indent by two spaces. Answer with the JSON alone."
)


@dataclass(frozen=True, slots=True)
class BusyCourse:
    """One answer: its tokens, and tokens per second in each phase after settling."""

    tokens: tuple[int, ...]
    speeds: tuple[float, ...]


def worker_command() -> list[str]:
    """The command line of a program that uses a whole core."""
    return processes.command("_busy-worker", "-I", "-c", "while True: pass")


def busy() -> None:
    """Use a core until the process is killed."""
    while True:
        pass


@contextmanager
def busy_loops() -> Iterator[None]:
    """Run a program that uses a whole core, for each core."""
    with ExitStack() as loops:
        for _ in range(logical_cores()):
            loops.enter_context(processes.child(worker_command()))
        yield


def measure_busy(
    engine: Engine, repetitions: int = 5, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compare the planner with fixed draft lengths, interleaved: idle, a loop on every core, idle again."""
    ways: list[int | None] = [None, *LENGTHS]
    courses: dict[int | None, list[BusyCourse]] = {way: [] for way in ways}
    _course(engine, None, 1.0)  # warm-up: pages, caches, clock rates
    for repetition in range(repetitions):
        start = repetition % len(ways)
        for way in [*ways[start:], *ways[:start]]:
            if progress:
                progress(f"{repetition + 1} of {repetitions}: {_name(way)}")
            courses[way].append(_course(engine, way, _PHASE))
    plain = courses[0]
    return {
        "model": engine.model.path.name,
        "draft": engine.draft.path.name if engine.draft else None,
        "repetitions": repetitions,
        "tokens_per_second": {
            _name(way): [round(median(one.speeds[i] for one in found), 2) for i in range(len(PHASES))]
            for way, found in courses.items()
        },
        "to_best_fixed": [_to_best(courses, i) for i in range(len(PHASES))],
        "first_differences": [
            first_difference(a.tokens[:n], b.tokens[:n])
            for a, b in zip(courses[None], plain, strict=True)
            if (n := min(len(a.tokens), len(b.tokens)))
        ],
    }


def _to_best(courses: dict[int | None, list[BusyCourse]], phase: int) -> dict[str, Any]:
    """The planner's speed in a phase, relative to the fastest fixed length in it."""

    def speed(way: int | None) -> float:
        return median(one.speeds[phase] for one in courses[way])

    best = max(LENGTHS, key=speed)
    ratios = [
        ours.speeds[phase] / theirs.speeds[phase]
        for ours, theirs in zip(courses[None], courses[best], strict=True)
    ]
    return {"phase": PHASES[phase], "length": best, "ratio": round(median(ratios), 3), "ratios": ratios}


def _course(engine: Engine, length: int | None, phase: float) -> BusyCourse:
    """Generate one answer over three phases, canceled after the last."""
    engine.forget()
    prompt = engine.chat_prompt([{"role": "user", "content": _PROMPT}])
    request = Request(prompt, controller=None if length is None else partial(FixedLength, length))
    times: list[tuple[float, int]] = []
    answering = engine.generate(request)
    steps = iter(answering)
    next(steps, None)
    begin = monotonic()

    def write(until: float) -> None:
        for _ in steps:
            times.append((monotonic() - begin, answering.stats.written))
            if times[-1][0] > until:
                return

    write(phase)
    with busy_loops():
        write(2 * phase)
    write(3 * phase)
    request.cancel()
    for _ in steps:
        pass
    windows = [(i * phase + min(_SETTLING, phase / 2), (i + 1) * phase) for i in range(len(PHASES))]
    return BusyCourse(tuple(answering.stats.tokens), tuple(_speed(times, *window) for window in windows))


def _speed(times: Sequence[tuple[float, int]], start: float, end: float) -> float:
    inside = [one for one in times if start <= one[0] <= end]
    if len(inside) < 2:
        return 0.0
    (first, before), (last, after) = inside[0], inside[-1]
    return (after - before) / (last - first)


def _name(way: int | None) -> str:
    return "edgespec" if way is None else f"fixed {way}"


def busy_table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    lines = ["tokens/s      " + "".join(f"{phase:>12}" for phase in PHASES)]
    for name, speeds in report["tokens_per_second"].items():
        lines.append(f"{name:<14}" + "".join(f"{speed:12.1f}" for speed in speeds))
    lines.append(
        "relative to the best fixed length: "
        + ", ".join(
            f"{one['phase']} {one['ratio']:.2f} (of {one['length']})" for one in report["to_best_fixed"]
        )
    )
    differing = [one for one in report["first_differences"] if one is not None]
    lines.append(
        f"{len(differing)} of {report['repetitions']} answers differ from plain decoding (near-ties)"
    )
    return "\n".join(lines)
