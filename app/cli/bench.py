"""`edgespec bench`: one subcommand for each benchmark."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app.cli.bench_flags import BenchGroup
from edgespec.app.cli.options import JsonOption, grouped, option
from edgespec.app.engine import loading
from edgespec.app.engine.loading import BackendChoice, EngineSpec
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError
from edgespec.machine.governor import Mode

if TYPE_CHECKING:
    from edgespec.app.engine.engine import Engine

app = typer.Typer(cls=BenchGroup, help="Measure decoding; without a subcommand: `speed`.")

FULL_SPEED = EngineSpec(mode="performance")  # figures should not depend on whether a charger is plugged in
SuiteOption = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines with task, id and prompt.", show_default="a small suite that comes with Edgespec"
    ),
]
PerTaskOption = Annotated[int, typer.Option(min=1, help="Prompts per task.")]
AnswerTokensOption = Annotated[int, typer.Option("--max-tokens", min=2, help="Most tokens per answer.")]
RepetitionsOption = Annotated[int, typer.Option(min=1, help="Passes over all prompts.")]
ModesOption = Annotated[
    str, typer.Option(help="How llama-server speculates: usual, all, or names separated by commas.")
]
ChartOption = Annotated[
    Path | None, typer.Option(help="Draw the result as a PNG file, too.", show_default=False)
]


@app.callback()
def root() -> None: ...


@app.command()
@grouped
def speed(
    *,
    spec: EngineSpec = FULL_SPEED,
    suite: SuiteOption = None,
    per_task: PerTaskOption = 2,
    max_tokens: AnswerTokensOption = 128,
    repetitions: RepetitionsOption = 1,
    temperature: Annotated[float, option("temperature")] = 0.0,
    synthetic: Annotated[
        str,
        typer.Option(
            help="Let the prediction layer's drafts be accepted at these rates by position, as 0.7,0.5,0.35; "
            "for models without their weights.",
            show_default=False,
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Compare plain and speculative decoding on the same prompts, interleaved."""
    from edgespec.app.bench import measure

    prompts = measure.read_suite(suite, per_task)
    with _load(spec) as engine:
        if synthetic:
            from edgespec.app.bench.synthetic import measure_synthetic, read_rates

            rates = read_rates(synthetic)
            report = measure_synthetic(engine, prompts, max_tokens, rates, _progress(), repetitions)
        else:
            report = measure.measure(engine, prompts, max_tokens, temperature, _progress(), repetitions)
    _show(report, measure.table, as_json)


@app.command()
@grouped
def energy(
    *,
    spec: EngineSpec = FULL_SPEED,
    suite: SuiteOption = None,
    per_task: PerTaskOption = 2,
    max_tokens: AnswerTokensOption = 128,
    repetitions: RepetitionsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Compare the energy per token of plain decoding and of each mode."""
    from edgespec.app.bench import energy
    from edgespec.app.bench.measure import read_suite

    prompts = read_suite(suite, per_task)
    with _load(spec) as engine:
        report = energy.measure_energy(engine, prompts, max_tokens, _progress(), repetitions)
    _show(report, energy.energy_table, as_json)


@app.command()
@grouped
def busy(
    *, spec: EngineSpec = FULL_SPEED, repetitions: RepetitionsOption = 1, as_json: JsonOption = False
) -> None:
    """Compare with fixed draft lengths while another program takes all cores in the middle of an answer."""
    from edgespec.app.bench import busy

    with _load(spec) as engine:
        report = busy.measure_busy(engine, repetitions, _progress())
    _show(report, busy.busy_table, as_json)


@app.command()
@grouped
def agents(
    *, spec: EngineSpec = FULL_SPEED, repetitions: RepetitionsOption = 1, as_json: JsonOption = False
) -> None:
    """Compare eight agents that call tools at the same time and one after another. Loads the model twice."""
    from edgespec.app.bench import agents

    with _load(spec) as one, _load(replace(spec, parallel=agents.AGENTS)) as many:
        report = agents.measure_agents(one, many, _progress(), repetitions=repetitions)
    _show(report, agents.agents_table, as_json)


@app.command("json")
@grouped
def json_(
    *,
    spec: EngineSpec = FULL_SPEED,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="Measure llama-server=PATH in the same turns.", show_default=False
        ),
    ] = None,
    modes: ModesOption = "usual",
    suite: SuiteOption = None,
    per_task: PerTaskOption = 2,
    repetitions: RepetitionsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Extract JSON by schema from the texts of a suite, with and without speculation."""
    from edgespec.app.bench import extraction, versus
    from edgespec.app.bench.measure import read_suite
    from edgespec.app.bench.peers import parse_peer

    peers = [parse_peer(text) for text in against or []]
    if peers and spec.lora:
        raise EdgespecError("--against gives llama-server the model alone: leave out --lora")
    tasks = extraction.extractions(read_suite(suite, per_task))
    with _load(spec) as engine:
        servers = versus.servers_of(engine, peers, modes)
        report = extraction.measure_json(engine, tasks, servers, _progress(), repetitions)
    _show(report, extraction.json_table, as_json)


@app.command()
@grouped
def versus(
    *,
    program: Annotated[str, typer.Argument(metavar="NAME=PATH", help="llama-server=PATH.")],
    spec: EngineSpec = FULL_SPEED,
    modes: ModesOption = "usual",
    chart: ChartOption = None,
    suite: SuiteOption = None,
    per_task: PerTaskOption = 2,
    max_tokens: AnswerTokensOption = 128,
    repetitions: RepetitionsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Compare with another program on the same prompts, interleaved."""
    from edgespec.app.bench import figures, versus
    from edgespec.app.bench.measure import read_suite
    from edgespec.app.bench.peers import parse_peer

    if spec.exact:
        raise EdgespecError("versus compares speed: leave out --exact")
    if spec.lora:
        raise EdgespecError("versus gives llama-server the model alone: leave out --lora")
    peer = parse_peer(program)
    draw = _chart(chart)
    prompts = read_suite(suite, per_task)
    with contextlib.ExitStack() as stack:
        engines = {
            label: stack.enter_context(_load(replace(spec, engine=name)))
            for label, name in versus.installed_engines().items()
            if spec.engine in ("auto", name)
        }
        report = versus.bench_against(engines, [peer], modes, prompts, max_tokens, repetitions, _progress())
    print(json.dumps(report) if as_json else figures.table(report))
    draw(report)
    if report["stopped"] == versus.INTERRUPTED:
        sys.exit(130)
    if report["stopped"] is not None:
        raise EdgespecError(report["stopped"])


@app.command()
def replay(
    *,
    trace: Annotated[str, typer.Argument(metavar="TRACE|heat", help="Readings as JSON lines, or heat.")],
    mode: Annotated[Mode, option("mode", default="auto")] = "auto",
    chart: ChartOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay recorded readings, or half an hour of simulated heat, to the governor. Loads no model."""
    from edgespec.app.bench import replay

    if trace == "heat":
        draw = _chart(chart, heat=True)
        course = replay.heat()
        print(json.dumps(course) if as_json else "\n".join(replay.heat_lines(course)))
        draw(course)
        return
    if chart is not None:
        raise EdgespecError("--chart draws simulated heat: leave it out, or replay heat")
    decisions = replay.replay(replay.read_trace(Path(trace)), mode)
    print(json.dumps(decisions, indent=2) if as_json else "\n".join(replay.lines(decisions)))


@app.command()
def chat(as_json: JsonOption = False) -> None:
    """Measure the cost of drawing the terminal chat. Loads no model."""
    from edgespec.app.bench import screen

    drawing = screen.measure()
    print(json.dumps(drawing) if as_json else screen.table(drawing))


@app.command()
def untouched(
    *,
    model: Annotated[str, option("model")] = "",
    context: Annotated[int, option("context", default=4096)] = 4096,
    suite: SuiteOption = None,
    per_task: PerTaskOption = 2,
    max_tokens: AnswerTokensOption = 128,
    repetitions: RepetitionsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Compare a fresh installation with one that `edgespec tune` has set up. Takes minutes."""
    from edgespec.app.bench import untouched
    from edgespec.app.bench.measure import read_suite
    from edgespec.models.hub.selection import default_model
    from edgespec.models.hub.store import resolve

    name, prompts = model or default_model(), read_suite(suite, per_task)
    report = untouched.measure_untouched(
        resolve(name), loading.partner(name), context, prompts, max_tokens, repetitions, _progress()
    )
    _show(report, untouched.untouched_table, as_json)


@app.command()
def self_test(
    *,
    model: Annotated[str, option("model")] = "",
    engine: Annotated[BackendChoice, option("engine")] = "auto",
    repetitions: RepetitionsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure the cost of the self-test that a GGUF model passes before it is loaded, by runtime."""
    from edgespec.app.bench import trials
    from edgespec.models.hub.selection import default_model

    report = trials.measure_tests(model or default_model(), engine, repetitions)
    print(json.dumps(report) if as_json else trials.tests_table(report))


def _load(spec: EngineSpec) -> Engine:
    engine = loading.load_engine(spec)
    for note in engine.notes:
        sys.stderr.write(f"edgespec: {one_line(note)}\n")
    return engine


def _chart(path: Path | None, *, heat: bool = False) -> Callable[[Mapping[str, Any]], None]:
    """A function that draws a report into `path`. Raises EdgespecError, before the run, if it could not."""
    if path is None:
        return lambda _: None
    from edgespec.app.bench import chart

    chart.check(path)
    return lambda report: chart.draw_heat(report, path) if heat else chart.draw(report, path)


def _show(report: dict[str, Any], table: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    print(json.dumps(report, indent=2) if as_json else table(report))


def _progress() -> Callable[[str], None] | None:
    return _write_over if sys.stderr.isatty() else None


def _write_over(line: str) -> None:
    sys.stderr.write(f"\r\x1b[K{line}")
