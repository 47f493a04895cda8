"""`edgespec doctor`: report the machine, its sensors, and the decision of the governor."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from edgespec.app.cli.options import JsonOption, option
from edgespec.app.terminal import clean, one_line
from edgespec.core import EdgespecError, Reading
from edgespec.machine.governor import Governor, Mode
from edgespec.machine.reading import descriptions, reported_fields
from edgespec.models.hub.selection import default_model

_INTERESTING = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8",
    "neon", "asimddp", "i8mm", "sve", "sve2", "sme", "bf16",
)  # fmt: skip
_ROWS = (1, 2, 4, 8, 16, 32)


def doctor(
    model: Annotated[str, option("model")] = "",
    mode: Annotated[Mode | None, option("mode")] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Repeat the self-tests of runtimes and kernels, and the measurement of the cost curve.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Report the machine, its sensors, and how Edgespec would run now."""
    if fresh:
        from edgespec.models.gguf import trial

        trial.forget()
        _measure(model)
    report = examine(model, mode)
    print(json.dumps(report, indent=2) if as_json else clean(table(report)))


def examine(model: str, mode: Mode | None) -> dict[str, Any]:
    """The report, as --json prints it. Takes about a second: load is a difference of two samples."""
    from edgespec.app import settings
    from edgespec.machine.monitor import SensorMonitor
    from edgespec.machine.sensors import cpu_quota, memory_limit, missing, sources
    from edgespec.models import machine_cache
    from edgespec.models.hub.store import installed

    watch = SensorMonitor(sources())
    watch.sample()
    time.sleep(1.0)
    reading = watch.sample()
    governor = Governor(mode or settings.load().mode)
    decision = governor.decide(reading)
    engines, curve = _engines(), _curve(model)  # first, since they run the self-tests that are due
    return {
        "processor": _processor(),
        "limits": {"processors": cpu_quota(), "memory": memory_limit()},
        "engines": engines,
        **_tested(),
        "onnx": _onnx(model),
        "sensors": reported_fields(reading),
        "not_told": {**missing(), **watch.troubles},
        "models": [{"name": one.path.name, "bytes": one.bytes} for one in installed()],
        "curve": curve,
        "cache": str(machine_cache.cache_folder()),
        "governor": {
            "mode": decision.mode,
            "asked": governor.mode,
            "reason": decision.reason,
            "budget": asdict(decision.budget),
        },
    }


def _processor() -> dict[str, Any]:
    from archspec.cpu.detect import detected_info

    from edgespec.machine.processor import core_kinds
    from edgespec.machine.sensors import compute_cores, cpu_name, logical_cores

    features = detected_info().features
    return {
        "name": cpu_name(),
        "features": [name for name in _INTERESTING if name in features],
        "compute_cores": compute_cores(),
        "logical_cores": logical_cores(),
        "kinds": core_kinds(),
    }


def _engines() -> dict[str, str]:
    """Each native runtime with its build, or the reason why it is not used."""
    from edgespec.models.gguf.backends import library
    from edgespec.models.gguf.native import BackendName

    found = {}
    for name in get_args(BackendName):
        try:
            found[name] = library(name).build
        except EdgespecError as error:
            found[name] = f"not used: {error}"
    return found


def _tested() -> dict[str, Any]:
    """Self-tests of the installed runtimes, and lines on what is switched off because it failed."""
    from edgespec.models.gguf import trial
    from edgespec.models.gguf.backends import files
    from edgespec.models.gguf.native import BackendName
    from edgespec.models.gguf.selftest import outcomes

    lost = []
    for name in get_args(BackendName):
        with contextlib.suppress(EdgespecError):
            start = trial.known_start(name, files(name))
            lost += [start.lost] if start is not None and start.lost else []
    tests = outcomes()
    lost += [f"{one.name}: {one.reason}" for one in tests if one.reason]
    return {"self_tests": [{"name": one.name, **asdict(one)} for one in tests], "switched_off": lost}


def _onnx(model: str) -> dict[str, str]:
    """Each execution provider of onnxruntime with whether it is used for `model`, and why."""
    from edgespec.app.engine import calibration
    from edgespec.models.hub.store import installed, is_onnx, resolve
    from edgespec.models.onnx.check import check_onnx
    from edgespec.models.onnx.providers import KNOWN, Measured, offered

    try:
        here = offered()
    except EdgespecError as error:
        return {"onnxruntime": f"not used: {error}"}
    found = Measured()
    with contextlib.suppress(EdgespecError):
        folders = [path] if is_onnx(path := resolve(model)) else []
        folders = folders or [one.path for one in installed() if is_onnx(one.path)]
        found = next(
            (known for one in folders if (known := calibration.provider_figures(check_onnx(one))).seconds),
            found,
        )
    return {one.label: found.fate(one.name, here) for one in KNOWN}


def _curve(model: str) -> dict[str, Any]:
    """Milliseconds of a forward pass by rows, as far as known: nothing is measured here."""
    from edgespec.app.engine import calibration
    from edgespec.models import machine_cache
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.models.hub.store import resolve
    from edgespec.models.runtime import check_model, options_for, settled

    try:
        path = resolve(model or default_model())
        summary = check_model(path)
    except EdgespecError as error:
        return {"missing": str(error)}
    found = calibration.tuned(summary)
    try:
        options = settled(path, options_for(path, found[0] if found else LlamaOptions()), note=lambda _: None)
    except EdgespecError as error:
        return {"missing": str(error)}
    curve = calibration.known_curve(summary, options)
    if curve is None:
        return {"model": Path(path).name, "missing": "not measured yet: the first answer measures it"}
    file = machine_cache.load("costs", calibration.cost_key(summary, options)) or {}
    return {
        "model": Path(path).name,
        "engine": options.engine,
        "milliseconds": {rows: round(curve.seconds(rows) * 1000, 1) for rows in _ROWS},
        "sources": {rows: curve.source(rows) for rows in _ROWS},
        "deviations": {rows: round(curve.uncertainty(rows), 3) for rows in _ROWS},
        "spread": round(curve.noise, 3),
        "time": file.get("time"),
        "load": file.get("load"),
    }


def table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    cpu, curve, governor = report["processor"], report["curve"], report["governor"]
    kinds = ", ".join(f"{kind['cores']} {kind['name']}" for kind in cpu["kinds"])
    lines = [
        (
            "processor",
            f"{cpu['name']}, {cpu['compute_cores']} compute cores" + (f" ({kinds})" if kinds else ""),
        ),
        ("limits", _limits(**report["limits"])),
        ("features", " ".join(cpu["features"]) or "none known"),
        *(
            ("engine" if i == 0 else "", f"{name}: {text}")
            for i, (name, text) in enumerate(report["engines"].items())
        ),
        *_listed("self-tests", [f"{one['name']}: {_fate(one)}" for one in report["self_tests"]]),
        *_listed("switched off", report["switched_off"]),
        *_listed("onnx", [f"{name}: {fate}" for name, fate in report["onnx"].items()]),
        *_listed("sensors", descriptions(Reading(0.0, **report["sensors"]))),
        *_listed("unavailable", [f"{name}: {why}" for name, why in report["not_told"].items()]),
        *_listed("models", [f"{one['name']}, {one['bytes'] / 1e6:,.0f} MB" for one in report["models"]]),
        ("cost curve", curve["missing"] if "missing" in curve else _curve_line(curve)),
        ("governor", f"{governor['mode']} ({governor['reason']})"),
    ]
    return "\n".join(f"{name:<12} {one_line(text)}" for name, text in lines)


def _fate(test: dict[str, Any]) -> str:
    passed = f"passed in {test['seconds']} s, {test['difference']} from single rows"
    return test["reason"] or passed


def _limits(processors: float | None, memory: int | None) -> str:
    """The limits of control groups, in words."""
    limits = [] if processors is None else [f"{processors:g} processors"]
    limits += [] if memory is None else [f"{memory / 1e6:,.0f} MB of memory"]
    return f"{' and '.join(limits) or 'none'} by control groups"


def _listed(name: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(name if i == 0 else "", text) for i, text in enumerate(texts or ["none"])]


def _curve_line(curve: dict[str, Any]) -> str:
    costs = ", ".join(
        f"{rows}: {ms} ({curve['sources'][rows]})" for rows, ms in curve["milliseconds"].items()
    )
    age = f", {_age(time.time() - curve['time'])} old" if isinstance(curve["time"], int) else ""
    return f"{curve['model']} on {curve['engine']}{age}, spread {curve['spread']:.0%}, ms by rows: {costs}"


def _measure(model: str) -> None:
    """Measure the cost curve of `model` again and keep it. Raises EdgespecError if it cannot be loaded."""
    from edgespec.app.engine import calibration
    from edgespec.models.gguf.native import LlamaOptions
    from edgespec.models.hub.store import resolve
    from edgespec.models.runtime import check_model, load_model, options_for

    path = resolve(model or default_model())
    found = calibration.tuned(check_model(path))
    with load_model(path, options_for(path, found[0] if found else LlamaOptions())) as loaded:
        notes: list[str] = []
        calibration.curve(loaded.sequence(), notes.append, fresh=True)
    for note in notes:
        sys.stderr.write(f"edgespec: {one_line(note)}\n")


def _age(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"
