"""ONNX models on OpenVINO's provider, CPU device: `make test-openvino`, with an onnxruntime of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_onnx import write_tiny_onnx

from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.models.onnx.providers import CPU, measure, offered
from edgespec.quant.tune_onnx import seconds_on

OPENVINO = "OpenVINOExecutionProvider"

pytestmark = pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(),
    reason="this onnxruntime has no OpenVINO: `make test-openvino` runs these",
)


@pytest.mark.parametrize("attention", ["shared", "plain"])
def test_it_gives_the_rows_of_the_cpu_or_the_cpu_does(tmp_path: Path, attention):
    """Graphs that it takes only in part, or not at all, end on the CPU's provider with the same rows."""
    folder = write_tiny_onnx(tmp_path / attention, attention)
    tokens = list(range(60))
    with OnnxModel(folder) as model:
        expected = model.sequence().forward(tokens, 5).copy()
    said: list[str] = []
    with OnnxModel(folder, OnnxOptions(providers=(OPENVINO, CPU)), note=said.append) as model:
        sequence = model.sequence()
        sequence.forward(tokens[:40])
        sequence.forward([7, 7, 7], 3)
        sequence.rollback(40)
        rows = sequence.forward(tokens[40:], 5)
        np.testing.assert_allclose(rows, expected, atol=0.1)
        assert model.provider == OPENVINO or said


def test_it_is_measured_or_says_why_not(tmp_path: Path):
    folder = write_tiny_onnx(tmp_path / "tiny")
    found = measure(offered(), lambda name: seconds_on(folder, name))
    assert CPU in found.seconds
    assert found.fate(OPENVINO, offered()).startswith(("used: ", "not used: "))


@pytest.mark.slow
def test_a_real_model_is_measured_on_it(exported, capsys):
    folder = exported("smollm2-135m-int4")
    found = measure(offered(), lambda name: seconds_on(folder, name))
    with capsys.disabled():
        print(f"\nOpenVINO: {found.fate(OPENVINO, offered())}")
    assert CPU in found.seconds
