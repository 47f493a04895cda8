"""`edgespec tune`: find the settings that are fastest on this machine, and keep them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgespec.app.cli.options import JsonOption
from edgespec.app.console import bar, interruptible, stopped_by_ctrl_c, table
from edgespec.app.engine import loading
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError
from edgespec.models import machine_cache
from edgespec.models.hub.selection import default_model
from edgespec.models.hub.store import is_onnx, resolve

if TYPE_CHECKING:
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.quant.tune import DraftForm, SettingTrial, TuneReport

_SHOWN = (1, 4, 8, 16)  # numbers of rows in the table


def tune(
    model: Annotated[
        str,
        typer.Argument(
            help="A catalog name, a .gguf file or the folder of an ONNX model.", show_default="as for `run`"
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure less: under a minute for a model of one gigabyte.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure runtimes, threads and kernels for a model, and use the fastest from now on."""
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
    with interruptible(), bar(path.name) as show, stopped_by_ctrl_c(show) as progress:
        report = tuning.tune(path, loading.partner(name), quick=quick, progress=progress)
    calibration.keep_tuned(summary, report.best.options, report.draft.path.name if report.draft else "")
    if calibration.tuned(summary) is None:
        raise EdgespecError(
            f"cannot keep the settings: make {machine_cache.cache_folder()} a writable folder"
        )
    if as_json:
        print(json.dumps(_as_json(report, busy), indent=2))
    else:
        _print(report)


def _tune_onnx(folder: Path, *, quick: bool, as_json: bool) -> None:
    """Find the fastest execution provider of an ONNX model, and compare with its GGUF file."""
    from edgespec.app.engine import calibration
    from edgespec.models.onnx.check import check_onnx
    from edgespec.models.onnx.providers import KNOWN, offered
    from edgespec.quant import tune_onnx

    summary = check_onnx(folder)
    with interruptible(), bar(folder.name) as show, stopped_by_ctrl_c(show) as progress:
        report = tune_onnx.tune(folder, tune_onnx.gguf_of(folder), quick=quick, progress=progress)
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
    lines = []
    for name, figures in report.engines.items():
        best = [str(n) for n in rows if fastest[n] == name]
        times = [f"{1000 * figures[n]:.1f}" for n in rows]
        lines.append(
            [name, *times, f"{1 / figures[0]:.0f}", f"fastest for {', '.join(best)}" if best else ""]
        )
    titles = ["engine", *(f"{n} row{'s' * (n > 1)}" for n in rows), "prompt", ""]
    print(f"\n{table(titles, lines, right=range(1, len(titles) - 1))}")
    print("rows: milliseconds per forward pass; prompt: tokens per second")
    for note in report.notes:
        print(one_line(note))


def _busy() -> str:
    """A warning if other programs compete for the processor, else empty."""
    from edgespec.machine.sensors import compute_cores, load_average

    load = load_average()
    busy = load > max(1.0, compute_cores() / 4)
    return f"the machine is busy (load {load:.1f}): tune again when it is idle" if busy else ""


def _print(report: TuneReport) -> None:
    rows = [n for n in _SHOWN if n in (report.best.figures or {})]
    titles = ["setting", *(f"{n} row{'s' * (n > 1)}" for n in rows), "prompt", "score", ""]
    lines = [[trial.setting, *_figures(trial, rows), one_line(trial.outcome)] for trial in report.trials]
    print(table(titles, lines, right=range(1, len(titles) - 1)))
    print("rows: milliseconds per forward pass; prompt: tokens per second; score: relative to the start\n")
    if report.forms:
        lines = [
            [one_line(form.path.name), *_draft_figures(form), one_line(_fate(form))] for form in report.forms
        ]
        print(table(["draft", "ms per token", "at best", ""], lines, right={1, 2}))
        print("at best: speed relative to plain decoding if nine of ten draft tokens were accepted\n")
    best = report.best
    print(
        f"fastest: {describe(best.options)}; {best.score or 1:.2f} times the speed of {report.start.setting}"
    )
    print("kept: all commands use it from now on")


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
    return form.outcome if pays else f"{form.outcome}; does not pay here, is not loaded"


def describe(options: LlamaOptions) -> str:
    """Describe settings in words."""
    one, many = options.threads, options.threads_batch or options.threads
    threads = (
        "one thread per core" if not (one or many) else f"threads {one or 'per core'} / {many or 'per core'}"
    )
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
