"""onnxruntime's execution providers, and the choice among them.

A provider is a back end for one kind of processor: an NPU, a GPU, the CPU. The installed build of onnxruntime
determines which are available; whether one is faster than the CPU depends on the model and is measured. If a
provider fails, the next one is used, and the CPU's is always the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from edgespec.core import Cancelled, EdgespecError

# The environment is untrusted: this variable would take session settings from the model's file.
os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)

T = TypeVar("T")
CPU = "CPUExecutionProvider"
WORTH_USING = 1.05  # times the CPU's speed, to justify memory and a slower start


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider. `label`: its usual name; `package`: the build of onnxruntime that has it."""

    name: str
    label: str
    package: str


KNOWN = (
    Provider("CoreMLExecutionProvider", "CoreML", "onnxruntime on macOS"),
    Provider("QNNExecutionProvider", "QNN", "onnxruntime-qnn on Windows and Android with a Snapdragon"),
    Provider("OpenVINOExecutionProvider", "OpenVINO", "onnxruntime-openvino, for Intel's processors"),
    Provider("VitisAIExecutionProvider", "VitisAI", "onnxruntime-vitisai, for AMD's NPUs"),
    Provider("CUDAExecutionProvider", "CUDA", "onnxruntime-gpu, for Nvidia's GPUs"),
    Provider("DmlExecutionProvider", "DirectML", "onnxruntime-directml or Windows ML"),
    Provider(CPU, "CPU", "every onnxruntime"),
)
_LABELS = {one.name: one.label for one in KNOWN}
_PACKAGES = {one.name: one.package for one in KNOWN}


def label(provider: str) -> str:
    return _LABELS.get(provider, provider.removesuffix("ExecutionProvider"))


@cache
def runtime() -> Any:
    """Import onnxruntime, without its log. Raises EdgespecError if it is not installed or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EdgespecError(f"cannot load onnxruntime ({error}): install it again") from None
    onnxruntime.set_default_logger_severity(4)  # errors are raised; its log would go to the terminal
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def offered() -> list[str]:
    """Return the known providers that the installed onnxruntime has, the CPU's last."""
    here = runtime().get_available_providers()
    return [one.name for one in KNOWN if one.name in here]


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of providers for one model: seconds of a small step on each, or why it failed."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def speed(self, provider: str) -> float | None:
        """Return the speed relative to the CPU, None if it was not measured."""
        mine, cpu = self.seconds.get(provider), self.seconds.get(CPU)
        return cpu / mine if mine and cpu else None

    def order(self, offered: Sequence[str]) -> list[str]:
        """Return the providers to try: those measured as faster than the CPU, fastest first, then the CPU."""
        speeds = {name: self.speed(name) or 0.0 for name in offered if name != CPU}
        worth = [name for name in speeds if speeds[name] >= WORTH_USING]
        return [*sorted(worth, key=lambda name: -speeds[name]), CPU]

    def fate(self, provider: str, offered: Sequence[str]) -> str:
        """Return whether a provider is used, and why, in words."""
        if provider not in offered:
            return f"not available: it is part of {_PACKAGES[provider]}"
        if provider in self.failed:
            return f"not used: {self.failed[provider]}"
        if provider == CPU:
            first = self.order(offered)[0]
            return "used" if first == CPU else f"used if {label(first)} fails"
        speed = self.speed(provider)
        if speed is None:
            return "not used: run `edgespec tune FOLDER` to measure it"
        if provider == self.order(offered)[0]:
            return f"used: {speed:.2f} times the CPU's speed"
        return f"not used: {speed:.2f} times the CPU's speed"


def measure(
    offered: Sequence[str],
    seconds_on: Callable[[str], float],
    progress: Callable[[str], bool] = lambda _: True,
) -> Measured:
    """Measure a model on each of `offered` with `seconds_on`, which raises EdgespecError if one fails.

    `progress` receives the label of each. Raises Cancelled if it returns False.
    """
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in offered:
        if not progress(label(name)):
            raise Cancelled
        try:
            seconds[name] = seconds_on(name)
        except EdgespecError as error:
            failed[name] = str(error)
    return Measured(seconds, failed)


def first_that_works(
    order: Sequence[str], make: Callable[[str], T], note: Callable[[str], None]
) -> tuple[str, T]:
    """Return the first provider for which `make` does not fail, and the result of `make`.

    `note` receives a line for each failure. Raises EdgespecError if all fail.
    """
    for i, name in enumerate(order):
        try:
            return name, make(name)
        except EdgespecError as error:
            if i + 1 == len(order):
                raise
            note(f"{label(name)} is not used ({error}): trying {label(order[i + 1])}")
    raise EdgespecError("onnxruntime has no execution providers: install it again")
