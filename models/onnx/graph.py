"""A parser for the graph of an ONNX file: inputs, outputs, nodes, weights and their locations.

It does not validate: see `check`. Field numbers are those of onnx.proto,
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from edgespec.models.onnx.protobuf import BYTES, VARINT, Wire, WireError

_MAX_DEPTH = 16  # graphs in graphs

# ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto, FunctionProto
MODEL_GRAPH, MODEL_OPSET, MODEL_TRAINING, MODEL_FUNCTION = 7, 8, 20, 25
GRAPH_NODE, GRAPH_WEIGHT, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_VALUE, GRAPH_SPARSE = 1, 5, 11, 12, 13, 15
NODE_INPUT, NODE_OUTPUT, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 4, 5, 7
_ATTRIBUTE_GRAPHS, _ATTRIBUTE_TENSORS, _ATTRIBUTE_SPARSE = (6, 11), (5, 10), (22, 23)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_FUNCTION_NODE, _FUNCTION_DOMAIN = 7, 10

TYPES: Mapping[int, tuple[str, int]] = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16),
    6: ("int32", 32), 7: ("int64", 64), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64),
    12: ("uint32", 32), 13: ("uint64", 64), 16: ("bfloat16", 16), 17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8), 19: ("float8e5m2", 8), 20: ("float8e5m2fnuz", 8), 21: ("uint4", 4),
    22: ("int4", 4), 23: ("float4e2m1", 4), 24: ("float8e8m0", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
"""Name and bits per element, by the number of a tensor type."""


@dataclass(frozen=True, slots=True)
class GraphValue:
    """An input or output. `type`: see TYPES; `shape`: a number or a name per dimension, "" for neither."""

    name: str
    type: int
    shape: tuple[int | str, ...] | None


@dataclass(frozen=True, slots=True)
class Node:
    """A node. `start` to `end`: its field in the file."""

    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant. `external`: its location in another file, None if it is in this file."""

    name: str
    type: int
    shape: tuple[int, ...]
    external: tuple[tuple[str, str], ...] | None


@dataclass(slots=True)
class Graph:
    """A model file. `nodes` and `weights` are the main graph's, `inner` those in nodes and functions."""

    inputs: dict[str, GraphValue] = field(default_factory=dict)
    outputs: dict[str, GraphValue] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    inner: list[Weight] = field(default_factory=list)
    domains: set[str] = field(default_factory=set)
    own_domains: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)
    trains: bool = False


def read_graph(data: bytes | memoryview) -> Graph:
    """Parse `data`. Raises WireError if it is not an ONNX model."""
    wire, graph = Wire(data), Graph()
    end = len(wire.data)
    found = False
    for part in wire.fields(0, end):
        if part.kind != BYTES:
            continue
        if part.number == MODEL_GRAPH:
            found = True
            _read_main(wire, graph, part.value, part.end)
        elif part.number == MODEL_TRAINING:
            graph.trains = True
        elif part.number == MODEL_FUNCTION:
            graph.own_domains.update(wire.texts(part.value, part.end, _FUNCTION_DOMAIN))
            for node in wire.parts(part.value, part.end, _FUNCTION_NODE):
                _read_inner(wire, graph, *node, depth=1)
    if not found:
        raise WireError("no graph in it")
    return graph


def _read_main(wire: Wire, graph: Graph, start: int, end: int) -> None:
    for part in wire.fields(start, end):
        place = part.value, part.end
        if part.kind != BYTES:
            continue
        if part.number == GRAPH_NODE:
            _read_inner(wire, graph, *place, depth=1)
            graph.nodes.append(_node(wire, *place, part.start))
        elif part.number == GRAPH_WEIGHT:
            weight = _weight(wire, *place)
            if weight.name in graph.weights:
                raise WireError("two weights with the same name")
            graph.weights[weight.name] = weight
        elif part.number in (GRAPH_INPUT, GRAPH_OUTPUT):
            value = _value(wire, *place)
            (graph.inputs if part.number == GRAPH_INPUT else graph.outputs)[value.name] = value
        elif part.number == GRAPH_SPARSE:
            graph.inner.extend(_sparse(wire, *place))


def _read_inner(wire: Wire, graph: Graph, start: int, end: int, depth: int) -> None:
    """Read the operator, constants and subgraphs of a node."""
    if depth > _MAX_DEPTH:
        raise WireError("graphs nested too deeply")
    graph.operators.update(wire.texts(start, end, NODE_OP))
    graph.domains.update(wire.texts(start, end, NODE_DOMAIN))
    for attribute in wire.parts(start, end, NODE_ATTRIBUTE):
        for part in wire.fields(*attribute):
            if part.kind != BYTES:
                continue
            place = part.value, part.end
            if part.number in _ATTRIBUTE_TENSORS:
                graph.inner.append(_weight(wire, *place))
            elif part.number in _ATTRIBUTE_SPARSE:
                graph.inner.extend(_sparse(wire, *place))
            elif part.number in _ATTRIBUTE_GRAPHS:
                for inner in wire.fields(*place):
                    if inner.kind != BYTES:
                        continue
                    if inner.number == GRAPH_NODE:
                        _read_inner(wire, graph, inner.value, inner.end, depth + 1)
                    elif inner.number == GRAPH_WEIGHT:
                        graph.inner.append(_weight(wire, inner.value, inner.end))
                    elif inner.number == GRAPH_SPARSE:
                        graph.inner.extend(_sparse(wire, inner.value, inner.end))


def _node(wire: Wire, start: int, end: int, field_start: int) -> Node:
    return Node(
        _last(wire.texts(start, end, NODE_OP)),
        _last(wire.texts(start, end, NODE_DOMAIN)),
        tuple(wire.texts(start, end, NODE_INPUT)),
        tuple(wire.texts(start, end, NODE_OUTPUT)),
        field_start,
        end,
    )


def _weight(wire: Wire, start: int, end: int) -> Weight:
    entries = [
        (_last(wire.texts(*entry, 1)), _last(wire.texts(*entry, 2)))
        for entry in wire.parts(start, end, _TENSOR_EXTERNAL)
    ]
    outside = entries or any(wire.numbers(start, end, _TENSOR_LOCATION))
    return Weight(
        _last(wire.texts(start, end, _TENSOR_NAME)),
        (wire.numbers(start, end, _TENSOR_TYPE) or [0])[-1],
        tuple(wire.numbers(start, end, _TENSOR_DIMS)),
        tuple(entries) if outside else None,
    )


def _sparse(wire: Wire, start: int, end: int) -> Iterator[Weight]:
    for number in (1, 2):  # values, indices
        for part in wire.parts(start, end, number):
            yield _weight(wire, *part)


def _value(wire: Wire, start: int, end: int) -> GraphValue:
    kind, shape = 0, None
    for whole in wire.parts(start, end, 2):  # TypeProto
        for tensor in wire.parts(*whole, 1):
            kind = (wire.numbers(*tensor, 1) or [0])[-1]
            for dims in wire.parts(*tensor, 2):
                shape = tuple(_dimension(wire, *dim) for dim in wire.parts(*dims, 1))
    return GraphValue(_last(wire.texts(start, end, 1)), kind, shape)


def _dimension(wire: Wire, start: int, end: int) -> int | str:
    for part in wire.fields(start, end):
        if part.number == 1 and part.kind == VARINT:
            return part.value
        if part.number == 2 and part.kind == BYTES:
            return wire.text(part.value, part.end)
    return ""


def _last(values: list[str]) -> str:
    """Return the value of a singular field: if repeated, the last counts."""
    return values[-1] if values else ""
