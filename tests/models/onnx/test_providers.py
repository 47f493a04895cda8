"""Execution providers: which are tried, what is said of them, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny_onnx import write_tiny_onnx

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.onnx import providers
from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.models.onnx.providers import CPU, KNOWN, Measured, first_that_works, measure

NPU, GPU = "QNNExecutionProvider", "DmlExecutionProvider"


def test_only_known_providers_are_offered_the_cpus_last(monkeypatch):
    here = ["AzureExecutionProvider", CPU, GPU, NPU]
    monkeypatch.setattr(providers, "runtime", lambda: SimpleNamespace(get_available_providers=lambda: here))
    assert providers.offered() == [NPU, GPU, CPU]


def test_this_machine_offers_the_cpus():
    assert providers.offered()[-1] == CPU


@pytest.mark.parametrize(
    ("seconds", "order"),
    [
        ({}, [CPU]),
        ({CPU: 1.0}, [CPU]),
        ({CPU: 1.0, NPU: 0.5}, [NPU, CPU]),
        ({CPU: 1.0, NPU: 0.5, GPU: 0.25}, [GPU, NPU, CPU]),
        ({CPU: 1.0, NPU: 1.5, GPU: 0.99}, [CPU]),  # no gain is no reason
        ({NPU: 0.5}, [CPU]),  # against nothing
    ],
)
def test_what_was_measured_faster_is_tried_first(seconds, order):
    assert Measured(seconds).order([NPU, GPU, CPU]) == order


def test_what_is_gone_is_not_tried():
    assert Measured({CPU: 1.0, NPU: 0.1}).order([CPU]) == [CPU]


def test_each_provider_has_a_fate_and_a_reason():
    found = Measured({CPU: 1.0, NPU: 1.8}, {GPU: "its libraries did not load."})
    here = [NPU, GPU, "CoreMLExecutionProvider", CPU]
    fates = {one.label: found.fate(one.name, here) for one in KNOWN}
    assert fates["QNN"] == "not used: 0.56 times the CPU's speed"
    assert fates["DirectML"] == "not used: its libraries did not load."
    assert fates["CoreML"].startswith("not used: run")
    assert fates["OpenVINO"].startswith("not available: it is part of onnxruntime-openvino")
    assert fates["CPU"] == "used"
    faster = Measured({CPU: 1.0, NPU: 0.5})
    assert faster.fate(NPU, here) == "used: 2.00 times the CPU's speed"
    assert faster.fate(CPU, here) == "used if QNN fails"


def test_measuring_goes_on_after_one_that_fails():
    def seconds_on(name: str) -> float:
        if name == NPU:
            raise EdgespecError("no driver")
        return {GPU: 2.0, CPU: 1.0}[name]

    assert measure([NPU, GPU, CPU], seconds_on) == Measured({GPU: 2.0, CPU: 1.0}, {NPU: "no driver"})
    with pytest.raises(Cancelled):
        measure([NPU, GPU, CPU], seconds_on, lambda label: label != "DirectML")


def test_the_first_that_works_is_taken_and_the_others_are_said():
    said: list[str] = []

    def make(name: str) -> str:
        if name != CPU:
            raise EdgespecError("no driver.")
        return "session"

    assert first_that_works([NPU, GPU, CPU], make, said.append) == (CPU, "session")
    assert said == [
        "QNN is not used (no driver.): trying DirectML",
        "DirectML is not used (no driver.): trying CPU",
    ]
    with pytest.raises(EdgespecError, match="no driver"):
        first_that_works([NPU, GPU], make, said.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_onnx(tmp_path / "tiny")


def runtime_with(monkeypatch, fail_at: int | None = None, loads: bool = True) -> None:
    """An onnxruntime that has an NPU, which computes on the CPU until its run of number `fail_at`."""

    class Session:
        def __init__(self, source: Any, settings: Any, providers: list[str], **options: Any) -> None:
            self._name, self._runs = providers[0], 0
            self._real = onnxruntime.InferenceSession(source, settings, providers=[CPU], **options)

        def get_providers(self) -> list[str]:
            return [self._name, CPU] if loads else [CPU]

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            self._runs += 1
            if self._name == NPU and self._runs == fail_at:
                raise RuntimeError("[ONNXRuntimeError] : 6 : the device\nwas \x1b[31mlost")
            self._real.run_with_iobinding(binding, options)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    fake = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=onnxruntime.SessionOptions,
        RunOptions=onnxruntime.RunOptions,
        __version__="1.0",
        get_available_providers=lambda: [NPU, CPU],
    )
    monkeypatch.setattr(providers, "runtime", lambda: fake)


def test_a_provider_is_used_while_it_works(folder, monkeypatch):
    runtime_with(monkeypatch)
    with OnnxModel(folder, OnnxOptions(providers=(NPU, CPU))) as model:
        model.sequence().forward([1, 2, 3])
        assert model.provider == NPU
        assert model.build == "onnxruntime 1.0 QNN"


@pytest.mark.parametrize("attention", ["shared", "plain"])
def test_one_that_fails_in_the_middle_is_replaced_and_nothing_is_lost(tmp_path, monkeypatch, attention):
    folder = write_tiny_onnx(tmp_path / attention, attention)
    tokens = list(range(40))
    with OnnxModel(folder) as model:
        expected = model.sequence().forward(tokens, 5).copy()
    runtime_with(monkeypatch, fail_at=3)
    said: list[str] = []
    with OnnxModel(folder, OnnxOptions(providers=(NPU, CPU)), note=said.append) as model:
        sequence = model.sequence()
        sequence.forward(tokens[:20])
        sequence.forward(tokens[20:35])
        rows = sequence.forward(tokens[35:], 5)
        np.testing.assert_allclose(rows, expected, atol=1e-3)
        assert model.provider == CPU
        assert model.options.providers == (CPU,)  # what it costs from here on is not the NPU's
        assert list(sequence.tokens) == tokens
    (line,) = said
    assert line.startswith("QNN failed and is no longer used")
    assert line.isprintable()


def test_the_last_one_that_fails_is_an_error(folder, monkeypatch):
    runtime_with(monkeypatch, fail_at=2)
    with OnnxModel(folder, OnnxOptions(providers=(NPU,))) as model:
        sequence = model.sequence()
        sequence.forward([1])
        with pytest.raises(EdgespecError, match="cannot evaluate tiny"):
            sequence.forward([2])
        assert list(sequence.tokens) == [1]


def test_one_whose_libraries_do_not_load_is_passed_over(folder, monkeypatch):
    runtime_with(monkeypatch, loads=False)
    said: list[str] = []
    fake = providers.runtime()
    monkeypatch.setattr(
        fake.InferenceSession,
        "get_providers",
        lambda self: [CPU],  # onnxruntime's own way of saying so
    )
    with OnnxModel(folder, OnnxOptions(providers=(NPU, CPU)), note=said.append) as model:
        assert model.provider == CPU
    assert said == ["QNN is not used (its libraries did not load): trying CPU"]


def test_one_that_this_onnxruntime_lacks_is_passed_over(folder):
    said: list[str] = []
    with OnnxModel(
        folder, OnnxOptions(providers=("CoreMLExecutionProvider", CPU)), note=said.append
    ) as model:
        model.sequence().forward([1])
    assert said == ["CoreML is not used (the installed onnxruntime does not have it): trying CPU"]


def test_settings_in_the_models_file_are_not_read(folder, monkeypatch):
    """onnxruntime would take a session's settings from the model where the environment says so."""
    code = (
        "import os, edgespec.models.onnx.providers as p; p.runtime(); "
        "print('ORT_LOAD_CONFIG_FROM_MODEL' in os.environ)"
    )
    import subprocess
    import sys

    monkeypatch.setenv("ORT_LOAD_CONFIG_FROM_MODEL", "1")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
