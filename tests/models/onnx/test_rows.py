"""Logits of the rows that are wanted, and no others: the graph is changed, what it computes is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from tiny_onnx import write_tiny_onnx

from edgespec.models.onnx.graph import read_graph
from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.models.onnx.rows import WANTED, pick_rows


def file_of(folder: Path) -> bytes:
    return (folder / "model.onnx").read_bytes()


@pytest.mark.parametrize("attention", ["shared", "plain"])
def test_the_changed_model_is_a_sound_one(tmp_path: Path, attention):
    folder = write_tiny_onnx(tmp_path / "tiny", attention, external=False)
    changed = pick_rows(file_of(folder))
    model = onnx.load_from_string(changed)
    before = onnx.load(folder / "model.onnx")
    assert [one.name for one in model.graph.input] == [*(one.name for one in before.graph.input), WANTED]
    assert len(model.graph.node) == len(before.graph.node) + 1
    logits = next(one for one in model.graph.output if one.name == "logits")
    dims = logits.type.tensor_type.shape.dim
    assert (dims[0].dim_value, dims[2].dim_value) == (1, 257)
    assert model.opset_import == before.opset_import
    assert model.graph.initializer == before.graph.initializer
    # Every node but the head is as it was, in order.
    assert [n for n in model.graph.node if n in before.graph.node] == list(before.graph.node)[:-1]


@pytest.mark.parametrize("attention", ["shared", "plain"])
def test_its_rows_are_those_of_the_model_as_it_is(tmp_path: Path, attention, monkeypatch):
    folder = write_tiny_onnx(tmp_path / "tiny", attention)
    tokens = list(range(100))
    with OnnxModel(folder) as model:
        picked = model.sequence().forward(tokens, 7).copy()
    monkeypatch.setattr("edgespec.models.onnx.model.pick_rows", lambda _: None)
    with OnnxModel(folder) as model:
        np.testing.assert_allclose(model.sequence().forward(tokens, 7), picked, atol=1e-4)


def test_one_row_costs_one_row_of_memory(tmp_path: Path):
    """A prompt of 128 tokens is read at once; the buffer for logits has room for the rows of a draft."""
    with OnnxModel(write_tiny_onnx(tmp_path / "tiny"), OnnxOptions(max_rows=4)) as model:
        sequence = model.sequence()
        sequence.forward(list(range(128)))
        assert model._logits.size == 4 * 257


def test_a_graph_that_ends_otherwise_is_left_alone(tmp_path: Path):
    folder = write_tiny_onnx(tmp_path / "tiny", head="biased")
    assert pick_rows(file_of(folder)) is None
    with OnnxModel(folder, OnnxOptions(max_rows=4)) as model:
        assert model.sequence().forward(list(range(50)), 2).shape == (2, 257)
        assert model._logits.size == 4 * 257


def test_a_head_that_something_else_reads_too_is_left_alone(tmp_path: Path):
    """Rows may be picked before a Cast only if nobody else wants them all."""
    folder = write_tiny_onnx(tmp_path / "tiny", external=False)
    model = onnx.load(folder / "model.onnx")
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("Cast", ["raw"], ["logits"], to=1))
    assert pick_rows(model.SerializeToString()) is not None
    model.graph.node.append(helper.make_node("Identity", ["raw"], ["all"]))
    assert pick_rows(model.SerializeToString()) is None


def test_twice_is_once(tmp_path: Path):
    changed = pick_rows(file_of(write_tiny_onnx(tmp_path / "tiny")))
    assert pick_rows(changed) is None
    assert WANTED in read_graph(changed).inputs
