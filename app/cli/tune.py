"""`edgespec tune`: finds the settings that are fastest on this machine, and keeps them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edgespec.app.console import bar, stopped_by_ctrl_c
from edgespec.app.engine import loading
from edgespec.app.terminal import one_line
from edgespec.core import Cancelled, EdgespecError
from edgespec.machine.sensors import compute_cores, load_average
from edgespec.models import machine_cache
from edgespec.models.hub.selection import default_model
from edgespec.models.hub.store import is_onnx, resolve

if TYPE_CHECKING:
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.quant.tune import DraftForm, SettingTrial, TuneReport

_SHOWN = (1, 4, 8, 16)  # rows in the table


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="A catalogue name, a .gguf file or the folder of an ONNX model.", show_default="as for `run`"
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer rounds and steps: under a minute for a gigabyte.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure engines, threads and kernels for a model, and use what is fastest from now on."""
    from edgespec.app.engine import calibration
    from edgespec.models.gguf.check import check_gguf
    from edgespec.quant import tune as tuning

    name = model or default_model()
    path = resolve(name)
    if busy := _busy():
        sys.stderr.write(f"edgespec: {busy}\n")
    if is_onnx(path):
        _tune_onnx(path, quick=quick, as_json=as_json)
        return
    summary = check_gguf(path)
    try:
        with bar(path.name) as show, stopped_by_ctrl_c(show) as progress:
            report = tuning.tune(path, loading.partner(name), quick=quick, progress=progress)
    except (Cancelled, KeyboardInterrupt):
        sys.stderr.write("edgespec: stopped; nothing was changed.\n")
        sys.exit(130)
    calibration.keep_tuned(summary, report.best.options, report.draft.path.name if report.draft else "")
    if calibration.tuned(summary) is None:
        raise EdgespecError(
            f"The settings cannot be kept: make {machine_cache.cache_folder()} a folder that can be written."
        )
    if as_json:
        print(json.dumps(_as_json(report, busy), indent=2))
    else:
        _print(report)


def _tune_onnx(folder: Path, *, quick: bool, as_json: bool) -> None:
    """Find the provider that is fastest for an ONNX model, and compare with the same model as a GGUF file."""
    from edgespec.app.engine import calibration
    from edgespec.models.onnx.check import check_onnx
    from edgespec.models.onnx.providers import KNOWN, offered
    from edgespec.quant import tune_onnx

    summary = check_onnx(folder)
    try:
        with bar(folder.name) as show, stopped_by_ctrl_c(show) as progress:
            report = tune_onnx.tune(folder, tune_onnx.gguf_of(folder), quick=quick, progress=progress)
    except (Cancelled, KeyboardInterrupt):
        sys.stderr.write("edgespec: stopped; nothing was changed.\n")
        sys.exit(130)
    calibration.keep_providers(summary, report.found)
    fates = {one.label: report.found.fate(one.name, offered()) for one in KNOWN}
    rows = sorted(n for n in next(iter(report.engines.values()), {}) if n)
    fastest = {n: min(report.engines, key=lambda name: report.engines[name][n]) for n in rows}
    if as_json:
        engines = {
            name: {str(n): round(1000 * figures[n], 3) for n in rows}
            for name, figures in report.engines.items()
        }
        data = {
            "model": str(folder), "providers": fates, "ms": engines,
            "fastest": {str(n): name for n, name in fastest.items()}, "notes": report.notes,
        }  # fmt: skip
        print(json.dumps(data, indent=2))
        return
    for name, fate in fates.items():
        print(f"{name:<10} {one_line(fate)}")
    table = _table(["engine", *(f"{n} row{'s' * (n > 1)}" for n in rows), "prompt", ""])
    for name, figures in report.engines.items():
        best = [str(n) for n in rows if fastest[n] == name]
        times = [f"{1000 * figures[n]:.1f}" for n in rows]
        table.add_row(name, *times, f"{1 / figures[0]:.0f}", f"fastest for {', '.join(best)}" if best else "")
    print()
    _console().print(table)
    print("rows: milliseconds of a forward pass; prompt: tokens a second")
    for note in report.notes:
        print(one_line(note))


def _busy() -> str:
    """What to say if other programs compete for the processor."""
    load = load_average()
    busy = load > max(1.0, compute_cores() / 4)
    return f"The machine is busy (load {load:.1f}): tune again at rest." if busy else ""


def _print(report: TuneReport) -> None:
    console = _console()
    rows = [n for n in _SHOWN if n in (report.best.figures or {})]
    titles = ["setting", *(f"{n} row{'s' * (n > 1)}" for n in rows), "prompt", "score", ""]
    table = _table(titles)
    for trial in report.trials:
        table.add_row(trial.setting, *_figures(trial, rows), one_line(trial.outcome))
    console.print(table)
    print("rows: milliseconds of a forward pass; prompt: tokens a second; score: relative to the start\n")
    if report.forms:
        table = _table(["draft", "ms a token", "at best", ""])
        for form in report.forms:
            table.add_row(one_line(form.path.name), *_draft_figures(form), one_line(_fate(form)))
        console.print(table)
        print("at best: times the plain speed if nine of ten guesses stood\n")
    best = report.best
    print(
        f"Best here: {describe(best.options)}; {best.score or 1:.2f} times {report.start.setting} as it is."
    )
    print("Kept: run, chat and bench use it.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)


def _table(titles: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        outer = i in (0, len(titles) - 1)
        table.add_column(title, justify="left" if outer else "right", no_wrap=i + 1 < len(titles))
    return table


def _figures(trial: SettingTrial, rows: list[int]) -> list[str]:
    from edgespec.quant.timing import PROMPT

    figures = trial.figures
    if figures is None or trial.score is None:
        return [""] * (len(rows) + 2)
    times = [f"{1000 * figures[n]:.1f}" for n in rows]
    return [*times, f"{1 / figures[PROMPT]:.0f}", f"{trial.score:.2f}"]


def _draft_figures(form: DraftForm) -> list[str]:
    return ["", ""] if form.seconds is None else [f"{1000 * form.seconds:.1f}", f"{form.best_case:.2f}"]


def _fate(form: DraftForm) -> str:
    from edgespec.app.engine.assembly import WORTH_LOADING

    pays = form.seconds is None or form.best_case >= WORTH_LOADING
    return form.outcome if pays else f"{form.outcome}; cannot pay here, stays unloaded"


def describe(options: LlamaOptions) -> str:
    """Settings in words."""
    one, many = options.threads, options.threads_batch or options.threads
    threads = "a thread a core" if not (one or many) else f"threads {one or 'a core'} / {many or 'a core'}"
    return ", ".join(
        [
            options.engine,
            threads,
            "weights repacked" if options.repack else "weights not repacked",
            "no flash attention" if options.flash_attention is False else "flash attention",
        ]
    )


def _as_json(report: TuneReport, busy: str) -> dict[str, Any]:
    from edgespec.models.gguf.backends import library
    from edgespec.quant.timing import PROMPT

    def trial(one: SettingTrial) -> dict[str, Any]:
        figures = one.figures or {}
        return {
            "setting": one.setting,
            "ms": {str(n): round(1000 * s, 3) for n, s in figures.items() if n != PROMPT},
            "prompt_tokens_per_second": round(1 / figures[PROMPT], 2) if figures else None,
            "score": None if one.score is None else round(one.score, 4),
            "outcome": one.outcome,
        }

    best = report.best.options
    return {
        "model": str(report.path),
        "build": library(best.engine).build,
        "busy": bool(busy),
        "trials": [trial(one) for one in report.trials],
        "forms": [
            {
                "path": str(form.path),
                "ms_token": None if form.seconds is None else round(1000 * form.seconds, 3),
                "at_best": round(form.best_case, 3),
                "outcome": form.outcome,
            }
            for form in report.forms
        ],
        "best": {
            "engine": best.engine,
            "threads": best.threads,
            "threads_batch": best.threads_batch,
            "flash_attention": best.flash_attention,
            "repack": best.repack,
            "score": report.best.score,
            "draft": report.draft and str(report.draft.path),
        },
    }
