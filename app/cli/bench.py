"""`edgespec bench`: the command line of the benchmarks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app.cli import options as opt
from edgespec.app.engine import loading
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

if TYPE_CHECKING:
    from edgespec.app.bench.measure import Prompt
    from edgespec.app.engine.engine import Engine

Say = Callable[[str], None] | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What every benchmark is told. `load` makes the engine asked for, or another, for so many texts."""

    load: Callable[..., Engine]
    prompts: Sequence[Prompt]
    max_tokens: int
    repetitions: int
    temperature: float
    say: Say
    as_json: bool

    def show(self, report: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> None:
        print(json.dumps(report, indent=2) if self.as_json else table(report))


def bench(
    model: opt.ModelOption = "",
    draft: opt.DraftOption = "auto",
    max_draft: opt.MaxDraftOption = 31,
    exact: opt.ExactOption = False,
    suite: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with task, id and prompt; default: a small one of its own.", show_default=False
        ),
    ] = None,
    per_task: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Passes over all prompts.")] = 1,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure another program in the same turns: llama-server=PATH.",
            metavar="NAME=PATH",
            show_default=False,
        ),
    ] = None,
    modes: Annotated[
        str, typer.Option(help="How the other program speculates: usual, all, or names with commas.")
    ] = "usual",
    energy: Annotated[
        bool, typer.Option("--energy", help="Compare what a token costs in energy, in each mode.")
    ] = False,
    schemas: Annotated[
        bool,
        typer.Option("--schemas", help="Extract JSON by schema from the suite's texts, also with --against."),
    ] = False,
    agents: Annotated[
        bool,
        typer.Option(
            "--agents",
            help="Eight agents that call tools, all at once and one after another. Takes twice the memory.",
        ),
    ] = False,
    busy: Annotated[
        bool,
        typer.Option(
            "--busy",
            help="Let another program take all cores in the middle of an answer, and compare with "
            "fixed draft lengths.",
        ),
    ] = False,
    replay: Annotated[
        str,
        typer.Option(
            metavar="TRACE|heat",
            help="No model: show what the governor decides on recorded readings (JSON lines), or on half an "
            "hour of simulated heat.",
            show_default=False,
        ),
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="No model: what drawing the terminal chat costs.")
    ] = False,
    untouched: Annotated[
        bool,
        typer.Option(
            "--untouched", help="An install as it comes against one that tune has set. Takes minutes."
        ),
    ] = False,
    chart: Annotated[
        Path | None,
        typer.Option(help="With --against or --replay heat: also draw a PNG file.", show_default=False),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="What the self-test of a model costs, by engine.")
    ] = False,
    context: opt.ContextOption = 4096,
    threads: opt.ThreadsOption = 0,
    engine: opt.EngineOption = "auto",
    mode: opt.ModeOption = None,
    temperature: opt.TemperatureOption = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure plain against speculative decoding on the same prompts, interleaved."""
    _check(chart, against or [], replay, [agents, schemas, energy, busy, chat, self_test, untouched])
    if chat:
        from edgespec.app.bench import screen

        drawing = screen.measure()
        print(json.dumps(drawing) if as_json else screen.table(drawing))
        return
    if replay:
        _replay(replay, mode or "auto", chart, as_json)
        return
    if self_test:
        from edgespec.app.bench import trials
        from edgespec.models.hub.selection import default_model

        report = trials.measure_tests(model or default_model(), engine, repetitions)
        print(json.dumps(report) if as_json else trials.tests_table(report))
        return
    from edgespec.app.bench.measure import read_suite

    def load(backend: loading.BackendChoice = engine, parallel: int = 1) -> Engine:
        # By default at full speed: what an unplugged charger changes is no property of the program.
        loaded = loading.load_engine(
            model, draft, max_draft, context, threads,
            engine=backend, exact=exact, mode=mode or "performance", parallel=parallel,
        )  # fmt: skip
        for note in loaded.notes:
            sys.stderr.write(f"edgespec: {one_line(note)}\n")
        return loaded

    say = _say if sys.stderr.isatty() else None
    if untouched:
        _untouched(model, context, read_suite(suite, per_task), max_tokens, repetitions, say, as_json)
        return
    plan = Plan(load, read_suite(suite, per_task), max_tokens, repetitions, temperature, say, as_json)
    if agents:
        _agents(plan)
    elif schemas:
        _schemas(plan, against or [], modes)
    elif against:
        if exact:
            raise EdgespecError("--against compares speed: leave out --exact.")
        _against(plan, against, modes, engine, chart)
    elif busy:
        _busy(plan)
    elif energy:
        _energy(plan)
    else:
        _speed(plan)


def _check(chart: Path | None, against: Sequence[str], replay: str, kinds: Sequence[bool]) -> None:
    """Raise EdgespecError for options that contradict each other, before anything is loaded."""
    schemas = kinds[1]
    names = "--agents, --schemas, --energy, --busy, --chat, --self-test"
    if sum(kinds) > 1:
        raise EdgespecError(f"Choose one of {names} and --untouched.")
    if against and sum(kinds) > schemas:
        raise EdgespecError(
            f"--against compares speed: leave out {names.replace('--schemas, ', '')} and --untouched."
        )
    if chart is not None:
        from edgespec.app.bench import chart as picture

        if (not against or schemas) and replay != "heat":
            raise EdgespecError("--chart draws a comparison: add --against or --replay heat.")
        picture.check(chart)


def _speed(plan: Plan) -> None:
    from edgespec.app.bench import measure

    with plan.load() as engine:
        report = measure.measure(
            engine, plan.prompts, plan.max_tokens, plan.temperature, plan.say, plan.repetitions
        )
    plan.show(report, measure.table)


def _untouched(
    model: str,
    context: int,
    prompts: Sequence[Prompt],
    max_tokens: int,
    repetitions: int,
    say: Say,
    as_json: bool,
) -> None:
    from edgespec.app.bench import untouched
    from edgespec.models.hub.selection import default_model
    from edgespec.models.hub.store import resolve

    name = model or default_model()
    report = untouched.measure_untouched(
        resolve(name), loading.partner(name), context, prompts, max_tokens, repetitions, say
    )
    print(json.dumps(report, indent=2) if as_json else untouched.untouched_table(report))


def _energy(plan: Plan) -> None:
    from edgespec.app.bench import energy

    with plan.load() as engine:
        report = energy.measure_energy(engine, plan.prompts, plan.max_tokens, plan.say, plan.repetitions)
    plan.show(report, energy.energy_table)


def _busy(plan: Plan) -> None:
    from edgespec.app.bench import busy

    with plan.load() as engine:
        report = busy.measure_busy(engine, plan.repetitions, plan.say)
    plan.show(report, busy.busy_table)


def _agents(plan: Plan) -> None:
    from edgespec.app.bench import agents

    with plan.load() as one, plan.load(parallel=agents.AGENTS) as many:
        report = agents.measure_agents(one, many, plan.say, repetitions=plan.repetitions)
    plan.show(report, agents.agents_table)


def _schemas(plan: Plan, against: Sequence[str], modes: str) -> None:
    from edgespec.app.bench import extraction, peers

    programs = [peers.parse_peer(text) for text in against]
    with plan.load() as engine:
        draft = engine.drafters.asked_for
        servers = [
            peers.LlamaServer(
                program,
                mode,
                engine.model.path.absolute(),
                draft.absolute() if draft else None,
                context=engine.context_length,
                threads=engine.model.threads,
            )
            for _, program in programs
            for mode in peers.choose_modes(modes, draft is not None)
        ]
        asked = extraction.extractions(plan.prompts)
        report = extraction.measure_json(engine, asked, servers, plan.say, plan.repetitions)
    plan.show(report, extraction.json_table)


def _against(
    plan: Plan, against: list[str], modes: str, engine: loading.BackendChoice, chart: Path | None
) -> None:
    from edgespec.app.bench import figures, versus

    peers = versus.parse_peers(against, plan.temperature)
    with contextlib.ExitStack() as stack:
        engines = {
            label: stack.enter_context(plan.load(name))
            for label, name in versus.installed_engines().items()
            if engine in ("auto", name)
        }
        report = versus.bench_against(
            engines, peers, modes, plan.prompts, plan.max_tokens, plan.repetitions, plan.say
        )
    print(json.dumps(report) if plan.as_json else figures.table(report))
    if chart is not None:
        from edgespec.app.bench import chart as picture

        picture.draw(report, chart)
    if report["stopped"] == versus.INTERRUPTED:
        sys.exit(130)
    if report["stopped"] is not None:
        raise EdgespecError(report["stopped"])


def _replay(trace: str, mode: Any, chart: Path | None, as_json: bool) -> None:
    from edgespec.app.bench import replay

    if trace == "heat":
        course = replay.heat()
        print(json.dumps(course) if as_json else "\n".join(replay.heat_lines(course)))
        if chart is not None:
            from edgespec.app.bench import chart as picture

            picture.draw_heat(course, chart)
        return
    decisions = replay.replay(replay.read_trace(Path(trace)), mode)
    print(json.dumps(decisions, indent=2) if as_json else "\n".join(replay.lines(decisions)))


def _say(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}")
