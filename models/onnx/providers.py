"""Where an ONNX model may run: onnxruntime's execution providers, and which of them to use.

A provider is a back end for one kind of processor: an NPU, a graphics card, the CPU. Which there are depends
on the build of onnxruntime that is installed; whether one is quicker than the CPU depends on the model and is
measured. Everything that can go wrong with one ends with the next, and the CPU's is always the last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from edgespec.core import Cancelled, EdgespecError

# The environment is untrusted: it would have the settings of a session read from the model's own file.
os.environ.pop("ORT_LOAD_CONFIG_FROM_MODEL", None)

T = TypeVar("T")
CPU = "CPUExecutionProvider"
WORTH_USING = 1.05  # times the CPU's speed: what is no faster costs memory and the start for nothing


@dataclass(frozen=True, slots=True)
class Provider:
    """`label`: what people call it. `package`: the build of onnxruntime that has it."""

    name: str
    label: str
    package: str


KNOWN = (
    Provider("CoreMLExecutionProvider", "CoreML", "onnxruntime on macOS"),
    Provider("QNNExecutionProvider", "QNN", "onnxruntime-qnn on Windows and Android with a Snapdragon"),
    Provider("OpenVINOExecutionProvider", "OpenVINO", "onnxruntime-openvino, for Intel's processors"),
    Provider("VitisAIExecutionProvider", "VitisAI", "onnxruntime-vitisai, for AMD's NPUs"),
    Provider("CUDAExecutionProvider", "CUDA", "onnxruntime-gpu, for Nvidia's graphics cards"),
    Provider("DmlExecutionProvider", "DirectML", "onnxruntime-directml or Windows ML"),
    Provider(CPU, "CPU", "every onnxruntime"),
)
_LABELS = {one.name: one.label for one in KNOWN}
_PACKAGES = {one.name: one.package for one in KNOWN}


def label(provider: str) -> str:
    return _LABELS.get(provider, provider.removesuffix("ExecutionProvider"))


@cache
def runtime() -> Any:
    """The module onnxruntime, silent. Raises EdgespecError where it is not installed or does not load."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EdgespecError(f"onnxruntime cannot be loaded ({error}): install it again.") from None
    onnxruntime.set_default_logger_severity(4)  # what matters is raised; the rest would go to the terminal
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def offered() -> list[str]:
    """The providers of the onnxruntime that is installed, of those that Edgespec knows, the CPU's last."""
    here = runtime().get_available_providers()
    return [one.name for one in KNOWN if one.name in here]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of providers for one model: seconds of a small round on each, or why it did not run."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def speed(self, provider: str) -> float | None:
        """Times the CPU's speed, None where it is not known."""
        mine, cpu = self.seconds.get(provider), self.seconds.get(CPU)
        return cpu / mine if mine and cpu else None

    def order(self, offered: Sequence[str]) -> list[str]:
        """The providers to try, the fastest first, the CPU's last; none slower than that, none unmeasured."""
        speeds = {name: self.speed(name) or 0.0 for name in offered if name != CPU}
        worth = [name for name in speeds if speeds[name] >= WORTH_USING]
        return [*sorted(worth, key=lambda name: -speeds[name]), CPU]

    def fate(self, provider: str, offered: Sequence[str]) -> str:
        """Whether it is used, and why, in words."""
        if provider not in offered:
            return f"not here: it comes with {_PACKAGES[provider]}"
        if provider in self.failed:
            return f"not used: {self.failed[provider]}"
        if provider == CPU:
            first = self.order(offered)[0]
            return "used" if first == CPU else f"used where {label(first)} fails"
        speed = self.speed(provider)
        if speed is None:
            return "not used yet: measured when a model is tuned (`edgespec tune FOLDER`)"
        if provider == self.order(offered)[0]:
            return f"used: {speed:.2f} times the CPU's speed"
        return f"not used: {speed:.2f} times the CPU's speed"


def measure(
    offered: Sequence[str],
    seconds_on: Callable[[str], float],
    progress: Callable[[str], bool] = lambda _: True,
) -> Measured:
    """Time a model on each of `offered`. `seconds_on` raises EdgespecError where one does not run it.

    Raises Cancelled when `progress`, which hears of each, says so.
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
    order: Sequence[str], make: Callable[[str], T], say: Callable[[str], None]
) -> tuple[str, T]:
    """What `make` makes on the first provider that does not fail, and that provider.

    `say` hears a line of each that does. Raises EdgespecError when the last one fails, too.
    """
    for i, name in enumerate(order):
        try:
            return name, make(name)
        except EdgespecError as error:
            if i + 1 == len(order):
                raise
            say(f"{label(name)} is not used: {error} Going on with {label(order[i + 1])}.")
    raise EdgespecError("onnxruntime offers nothing to run a model on: install it again.")
