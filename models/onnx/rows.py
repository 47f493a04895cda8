"""A change to an ONNX graph so that it computes the logits of the wanted rows only.

Exported decoders return logits for every token of a prompt: 2.5 GB for 4,096 tokens and a vocabulary of
152,000, and up to a quarter of the arithmetic of a small model, for one row. The output head is the last
matrix product in the graph. A Gather before it, with one more input, selects its rows.
"""

from __future__ import annotations

from edgespec.models.onnx.graph import (
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    MODEL_GRAPH,
    NODE_INPUT,
    NODE_OP,
    NODE_OUTPUT,
    Graph,
    Node,
    read_graph,
)
from edgespec.models.onnx.protobuf import BYTES, Wire, bytes_field, number_field

WANTED = "edgespec.wanted"
"""The additional input: indices of the rows wanted, int64 [rows]."""

_PICKED = "edgespec.picked"
_HEADS = {"MatMul", "MatMulNBits"}
_AFTER = {"Cast", "Mul", "Div", "Tanh"}  # may follow the product, because they are elementwise
_INT64 = 7


def pick_rows(model: bytes) -> bytes | None:
    """Return the model with the input WANTED and logits [1, rows, vocab]; None for other graphs."""
    graph = read_graph(model)
    head = _head(graph)
    logits = graph.outputs.get("logits")
    if head is None or logits is None or WANTED in graph.inputs:
        return None
    wire = Wire(model)
    wholes = [field for field in wire.fields(0, len(model)) if field.number == MODEL_GRAPH]
    if len(wholes) != 1:
        return None
    (whole,) = wholes
    source = head.inputs[0]
    parts: list[bytes | memoryview] = []
    for part in wire.fields(whole.value, whole.end):
        if part.number == GRAPH_OUTPUT and "logits" in wire.texts(part.value, part.end, 1):
            vocab = logits.shape[2] if logits.shape and len(logits.shape) == 3 else ""
            parts.append(_value(GRAPH_OUTPUT, "logits", logits.type, [1, "edgespec.rows", vocab]))
        elif part.start == head.start and part.number == GRAPH_NODE:
            parts.append(_gather(source))
            parts.append(_with_first_input(wire, part.value, part.end))
        else:
            parts.append(wire.data[part.start : part.end])
    parts.append(_value(GRAPH_INPUT, WANTED, _INT64, ["edgespec.rows"]))
    return b"".join([wire.data[: whole.start], bytes_field(MODEL_GRAPH, *parts), wire.data[whole.end :]])


def _head(graph: Graph) -> Node | None:
    """Return the matrix product that computes the logits, None if there is none."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    read = [name for node in graph.nodes for name in node.inputs]
    name = "logits"
    while (node := makers.get(name)) is not None:
        if node.op in _HEADS and node.inputs[0] in makers and node.inputs[0] not in graph.weights:
            return node
        name = node.inputs[0] if node.inputs else ""
        rest = [one for one in node.inputs[1:] if one not in graph.weights]
        if node.op not in _AFTER or node.domain or rest or read.count(name) != 1:
            return None
    return None


def _gather(source: str) -> bytes:
    axis = bytes_field(1, "axis") + number_field(3, 1) + number_field(20, 2)  # AttributeProto: an int
    return bytes_field(
        GRAPH_NODE,
        bytes_field(NODE_INPUT, source),
        bytes_field(NODE_INPUT, WANTED),
        bytes_field(NODE_OUTPUT, _PICKED),
        bytes_field(3, _PICKED),
        bytes_field(NODE_OP, "Gather"),
        bytes_field(5, axis),
    )


def _with_first_input(wire: Wire, start: int, end: int) -> bytes:
    parts: list[bytes | memoryview] = []
    first = True
    for part in wire.fields(start, end):
        if part.number == NODE_INPUT and part.kind == BYTES and first:
            parts.append(bytes_field(NODE_INPUT, _PICKED))
            first = False
        else:
            parts.append(wire.data[part.start : part.end])
    return bytes_field(GRAPH_NODE, *parts)


def _value(number: int, name: str, kind: int, shape: list[int | str]) -> bytes:
    dims = [
        bytes_field(1, number_field(1, one) if isinstance(one, int) else bytes_field(2, one) if one else b"")
        for one in shape
    ]
    tensor = number_field(1, kind) + bytes_field(2, *dims)
    return bytes_field(number, bytes_field(1, name), bytes_field(2, bytes_field(1, tensor)))
