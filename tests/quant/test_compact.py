"""One table for embeddings and head: graphs like the builder's, run by onnxruntime before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgespec.models.onnx.providers import runtime
from edgespec.quant.compact import MODEL, WEIGHTS, compact

VOCAB, WIDTH, BLOCK = 3000, 64, 32
IDS = np.array([[0, 5, 2999, 7]])


def quantized(matrix: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [rows, blocks, bytes] and scales as onnxruntime has them, and the numbers they stand for."""
    blocks = matrix.reshape(len(matrix), -1, BLOCK)
    middle = 1 << (bits - 1)
    scales = (np.abs(blocks).max(2) / (middle - 1)).astype(np.float32)
    codes = (np.rint(blocks / scales[..., None]) + middle).astype(np.uint8)
    numbers = ((codes.astype(np.float32) - middle) * scales[..., None]).reshape(matrix.shape)
    return (codes[..., ::2] | codes[..., 1::2] << 4) if bits == 4 else codes, scales, numbers


def write(folder: Path, table: np.ndarray, head: np.ndarray, bits: int) -> np.ndarray:
    """A model with no layers, logits = table[ids] @ head, and the numbers its head represents."""
    codes, scales, numbers = quantized(head, bits)
    weights = {"table": table, "codes": codes, "scales": scales, "spare": np.ones(5000, np.float32)}
    how = {"K": WIDTH, "N": VOCAB, "bits": bits, "block_size": BLOCK}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["embedded"], "/model/embed_tokens/Gather"),
            helper.make_node(
                "MatMulNBits", ["embedded", "codes", "scales"], ["logits"], domain="com.microsoft", **how
            ),
            helper.make_node("Identity", ["spare"], ["nowhere"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", VOCAB])],
        [numpy_helper.from_array(one, name) for name, one in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.save(model, folder / MODEL, save_as_external_data=True, location=WEIGHTS, size_threshold=0)
    return numbers


def logits(folder: Path) -> np.ndarray:
    session = runtime().InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": IDS})[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_embeddings_are_read_from_the_head(tmp_path, bits):
    matrix = np.random.default_rng(3).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    numbers = write(tmp_path, matrix, matrix, bits)
    before = (tmp_path / WEIGHTS).stat().st_size
    compact(tmp_path, tied=True)
    assert np.allclose(logits(tmp_path)[0], numbers[IDS[0]] @ numbers.T, atol=1e-3)
    head = VOCAB * WIDTH * bits // 8 + VOCAB * WIDTH // BLOCK * 4
    assert head <= (tmp_path / WEIGHTS).stat().st_size < head + 3 * 4096 < before
    assert {path.name for path in tmp_path.iterdir()} == {MODEL, WEIGHTS}


def test_embeddings_of_their_own_get_eight_bits(tmp_path):
    random = np.random.default_rng(3)
    table, matrix = random.normal(size=(2, VOCAB, WIDTH)).astype(np.float32)
    table[5] = 0  # a row without any scale
    head = write(tmp_path, table, matrix, 4)
    compact(tmp_path, tied=False)
    found = logits(tmp_path)[0]
    _, _, rounded = quantized(np.where(table == 0, 1, table), 8)
    rounded[5] = 0
    assert np.allclose(found, rounded[IDS[0]] @ head.T, atol=1e-3)
    assert np.all(found[1] == 0)


def test_what_nothing_reads_is_dropped_and_what_is_read_is_within_the_file(tmp_path):
    matrix = np.random.default_rng(3).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    write(tmp_path, matrix, matrix, 8)
    compact(tmp_path, tied=True)
    graph = onnx.load(tmp_path / MODEL, load_external_data=False).graph
    assert {node.op_type for node in graph.node} == {"GatherBlockQuantized", "MatMulNBits"}
    places = {}
    for weight in graph.initializer:
        entries = {one.key: one.value for one in weight.external_data}
        assert entries["location"] == WEIGHTS
        places[weight.name] = int(entries["offset"]), int(entries["length"])
    assert places.keys() == {"codes", "scales", "embed_tokens.table"}
    assert places["embed_tokens.table"] == places["codes"]  # the same bytes
    assert max(map(sum, places.values())) == (tmp_path / WEIGHTS).stat().st_size


def test_another_graph_is_refused_and_left(tmp_path):
    matrix = np.zeros((VOCAB, WIDTH), np.float32) + 1
    write(tmp_path, matrix, matrix, 8)
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    model.graph.node[0].op_type = "Identity"
    onnx.save(model, tmp_path / MODEL)
    before = (tmp_path / MODEL).read_bytes(), (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match="no embedding"):
        compact(tmp_path, tied=True)
    assert ((tmp_path / MODEL).read_bytes(), (tmp_path / WEIGHTS).read_bytes()) == before
