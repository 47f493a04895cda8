"""`edgespec bench`: the command line of the benchmarks."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app import options as opt
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

if TYPE_CHECKING:
    from edgespec.app.bench.measure import Prompt
    from edgespec.app.engine import Engine


def bench(
    model: opt.Model = "",
    draft: opt.Draft = "auto",
    max_draft: opt.MaxDraft = 31,
    exact: opt.Exact = False,
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
    chart: Annotated[
        Path | None,
        typer.Option(help="With --against or --replay heat: also draw a PNG file.", show_default=False),
    ] = None,
    context: opt.Context = 4096,
    threads: opt.Threads = 0,
    engine: opt.Native = "auto",
    mode: opt.Governed = None,
    temperature: opt.Temperature = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure plain against speculative decoding on the same prompts, interleaved."""
    if chart is not None:
        from edgespec.app.bench import chart as picture

        if not against and replay != "heat":
            raise EdgespecError("--chart draws a comparison: add --against or --replay heat.")
        picture.check(chart)
    if chat:
        from edgespec.app.bench import screen

        drawing = screen.measure()
        print(json.dumps(drawing) if as_json else screen.table(drawing))
        return
    if replay:
        _replay(replay, mode or "auto", chart, as_json)
        return
    from edgespec.app.bench import measure as benchmark

    prompts = benchmark.read_suite(suite, per_task)
    say = _say if sys.stderr.isatty() else None
    # By default at full speed: what an unplugged charger changes is no property of the program.
    mode = mode or "performance"
    if schemas:
        _schemas(
            lambda: opt.load_engine(
                model, draft, max_draft, context, threads, engine=engine, exact=exact, mode=mode
            ),
            prompts, against or [], modes, repetitions, as_json,
        )  # fmt: skip
        return
    if not against:
        with opt.load_engine(
            model, draft, max_draft, context, threads, engine=engine, exact=exact, mode=mode
        ) as loaded:
            for note in loaded.notes:
                sys.stderr.write(f"edgespec: {one_line(note)}\n")
            if busy:
                from edgespec.app.bench import busy as crowd

                report = crowd.measure_busy(loaded, max(repetitions, 1), say)
                show: Callable[[dict[str, Any]], str] = crowd.busy_table
            elif energy:
                from edgespec.app.bench import energy as spending

                report = spending.measure_energy(loaded, prompts, max_tokens, say, repetitions)
                show = spending.energy_table
            else:
                report = benchmark.measure(loaded, prompts, max_tokens, temperature, say, repetitions)
                show = benchmark.table
        print(json.dumps(report, indent=2) if as_json else show(report))
        return
    if exact or energy or busy:
        raise EdgespecError("--against compares speed: leave out --exact, --energy and --busy.")
    from edgespec.app.bench import figures, versus

    peers = versus.parse_peers(against, temperature)
    with contextlib.ExitStack() as stack:
        engines = {
            label: stack.enter_context(
                opt.load_engine(model, draft, max_draft, context, threads, engine=name, mode=mode)
            )
            for label, name in versus.installed_engines().items()
            if engine in ("auto", name)
        }
        report = versus.bench_against(engines, peers, modes, prompts, max_tokens, repetitions, say)
    print(json.dumps(report) if as_json else figures.table(report))
    if chart is not None:
        picture.draw(report, chart)
    if report["stopped"] == versus.INTERRUPTED:
        sys.exit(130)
    if report["stopped"] is not None:
        raise EdgespecError(report["stopped"])


def _schemas(
    load: Callable[[], Engine],
    prompts: Sequence[Prompt],
    against: Sequence[str],
    modes: str,
    repetitions: int,
    as_json: bool,
) -> None:
    from edgespec.app.bench import extraction as bench_json
    from edgespec.app.bench import peers

    programs = [peers.parse_peer(text) for text in against]
    with load() as loaded:
        draft = loaded.draft_path
        servers = [
            peers.LlamaServer(
                program,
                mode,
                loaded.model.path.absolute(),
                draft.absolute() if draft else None,
                context=loaded.context_length,
                threads=loaded.model.threads,
            )
            for _, program in programs
            for mode in peers.choose_modes(modes, draft is not None)
        ]
        asked = bench_json.extractions(prompts)
        say = _say if sys.stderr.isatty() else None
        report = bench_json.measure_json(loaded, asked, servers, say, repetitions)
    print(json.dumps(report, indent=2) if as_json else bench_json.json_table(report))


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
