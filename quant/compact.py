"""One table for embeddings and output head, in the ONNX folders that onnxruntime-genai's builder writes.

The builder stores the embeddings in fp32 in addition to the quantized head: 545 MB where the head takes 153.
(Its own way of sharing them is for 4 bits only, and makes onnxruntime hold a second copy of the head in
memory.) Here the embedding looks its rows up in the head's own bytes, which onnxruntime maps from the file:
rows that are not looked up take no memory at all. Where a model has two different matrices, its embeddings
get 8 bits.

Needs `onnx`, so it runs in the exporting process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"

_TABLE, _SCALES = "embed_tokens.table", "embed_tokens.scales"
_BLOCK = 32  # weights that share a scale
_ROWS = 1024  # of a table at a time
_PART = 1 << 24  # bytes written at a time
_ALIGNMENT = 4096  # a page: what is mapped is then whole pages of one tensor

Bytes = npt.NDArray[np.uint8]


def compact(folder: Path, tied: bool) -> None:
    """Rewrite the model in `folder`. `tied`: its embeddings and its output head are one matrix.

    Raises ValueError for a graph that is not the builder's.
    """
    model = onnx.load(str(folder / MODEL), load_external_data=False)
    graph = model.graph
    stored = np.memmap(folder / WEIGHTS, np.uint8, "r")
    weights = {one.name: one for one in graph.initializer}
    gather = _first(node for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    head = _first(node for node in graph.node if "logits" in node.output)
    made: dict[str, Bytes] = {}
    how = {one.name: helper.get_attribute_value(one) for one in head.attribute}
    if tied and head.op_type == "MatMulNBits" and how["K"] % how["block_size"] == 0:
        table = graph.initializer.add()
        table.CopyFrom(weights[head.input[1]])  # the same place in the file, in another shape
        table.name = _TABLE
        table.dims[:] = [how["N"], how["K"] * how["bits"] // 8]
        _look_up(gather, head.input[2:], how["bits"], how["block_size"])
    elif weights[gather.input[0]].dims[1] % _BLOCK == 0:
        shape = tuple(weights[gather.input[0]].dims)
        plain = _stored(stored, weights[gather.input[0]]).view(np.float32).reshape(shape)
        made[_TABLE], made[_SCALES] = _eight_bits(plain)
        for name, dims, kind in (
            (_TABLE, shape, onnx.TensorProto.UINT8),
            (_SCALES, (shape[0], shape[1] // _BLOCK), onnx.TensorProto.FLOAT),
        ):
            graph.initializer.add(name=name, dims=dims, data_type=kind)
        _look_up(gather, [_SCALES], 8, _BLOCK)
    _drop_unused(graph)
    _store(graph, stored, made, folder / f"{WEIGHTS}.new")
    del stored  # Windows replaces no file that is mapped
    onnx.save(model, str(folder / MODEL))
    os.replace(folder / f"{WEIGHTS}.new", folder / WEIGHTS)  # noqa: PTH105


def _first(nodes: Iterator[Any]) -> Any:
    if (node := next(nodes, None)) is None:
        raise ValueError("the graph has no embedding or no output head")
    return node


def _look_up(gather: Any, scales: Any, bits: int, block: int) -> None:
    """Make `gather` look its rows up in the quantized table."""
    gather.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            [_TABLE, "input_ids", *scales],
            list(gather.output),
            name=gather.name,
            domain="com.microsoft",
            bits=bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
    )


def _eight_bits(table: npt.NDArray[np.float32]) -> tuple[Bytes, Bytes]:
    """`table` as onnxruntime's 8-bit kernels want it, 128 for zero, and the scales of its blocks."""
    codes, scales = [], []
    for start in range(0, len(table), _ROWS):
        rows = table[start : start + _ROWS]
        blocks = rows.reshape(len(rows), -1, _BLOCK)
        scale = np.abs(blocks).max(2) / np.float32(127)
        unit = np.where(scale == 0, np.float32(1), scale)[..., None]
        codes.append((np.rint(blocks / unit) + 128).astype(np.uint8).reshape(rows.shape))
        scales.append(scale)
    return np.concatenate(codes).reshape(-1), np.concatenate(scales).reshape(-1).view(np.uint8)


def _drop_unused(graph: Any) -> None:
    """Remove nodes and weights that nothing reads any more."""
    ends = {one.name for one in graph.output}
    while True:
        read = ends.union(*(node.input for node in graph.node))
        unread = [node for node in graph.node if read.isdisjoint(node.output)]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for weight in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(weight)


def _store(graph: Any, stored: Bytes, made: dict[str, Bytes], path: Path) -> None:
    """Write all that lies outside the model's file to `path`, each piece once, and note where it lies."""
    places: dict[tuple[str, ...], int] = {}
    with path.open("xb") as file:
        for weight in graph.initializer:
            if weight.name in made:
                piece, known = made[weight.name], (weight.name,)
            elif weight.data_location == onnx.TensorProto.EXTERNAL:
                piece, known = _stored(stored, weight), tuple(one.value for one in weight.external_data)
            else:
                continue
            if known not in places:
                if piece.nbytes >= _ALIGNMENT:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                places[known] = file.tell()
                for part in range(0, piece.nbytes, _PART):
                    file.write(piece[part : part + _PART].tobytes())
            weight.data_location = onnx.TensorProto.EXTERNAL
            del weight.external_data[:]
            for key, value in (("location", WEIGHTS), ("offset", places[known]), ("length", piece.nbytes)):
                weight.external_data.add(key=key, value=str(value))


def _stored(stored: Bytes, weight: Any) -> Bytes:
    place = {one.key: one.value for one in weight.external_data}
    offset, length = int(place.get("offset", 0)), int(place["length"])
    return stored[offset : offset + length]
