"""Cost of the self-test: the first time that a model is loaded, and every time after."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from typing import Any, get_args

from edgespec.app.engine.loading import BackendChoice
from edgespec.core import EdgespecError
from edgespec.models.gguf.backends import files
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.models.gguf.selftest import settle, test
from edgespec.models.gguf.trial import unknown_start
from edgespec.models.hub.store import is_onnx, resolve


def measure_tests(model: str, engine: BackendChoice, repetitions: int) -> dict[str, Any]:
    """Medians in seconds, by runtime.

    "first" is a self-test in a child process, "megabytes" its memory and "outcome" its result; "after" is the
    look-up of a known result. Raises EdgespecError for a model that is no GGUF file.
    """
    path = resolve(model)
    if is_onnx(path):
        raise EdgespecError(f"{path.name} is an ONNX model, which has no self-test: choose a GGUF model")
    report: dict[str, Any] = {"model": path.name, "bytes": path.stat().st_size, "engines": {}}
    for name in get_args(BackendName) if engine == "auto" else [engine]:
        options = LlamaOptions(engine=name)
        first, after = [], []
        try:
            start = unknown_start(name, files(name))
            for _ in range(repetitions):
                began = perf_counter()
                verdict = test(path, options, start, lambda: True)
                first.append(perf_counter() - began)
                settle(path, options)
                began = perf_counter()
                settle(path, options)
                after.append(perf_counter() - began)
        except EdgespecError as error:
            report["engines"][name] = {"outcome": str(error)}
            continue
        report["engines"][name] = {
            "outcome": verdict.reason or verdict.state,
            "first": round(median(first), 3),
            "after": round(median(after), 4),
            "megabytes": (verdict.reports.get("memory") or 0) >> 20,
        }
    return report


def tests_table(report: dict[str, Any]) -> str:
    """Format the report for people."""
    lines = [f"{report['model']}, {report['bytes'] / 1e6:,.0f} MB; seconds before the model is loaded"]
    for name, found in report["engines"].items():
        figures = ""
        if "first" in found:
            figures = f": {found['first']:.2f} the first time, in {found['megabytes']} MB"
            figures += f"; {found['after']:.4f} afterwards"
        lines.append(f"{name:<10} {found['outcome']}{figures}")
    return "\n".join(lines)
