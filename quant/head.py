"""Writes head files: the layer for multi-token prediction of a model, with the most useful ids only.

Such a file drafts for every model with the same vocabulary and width: see `models.gguf.mtp`. With 32,768 of
248,320 ids its pass takes a fifth of that of the whole layer (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from edgespec.core import EdgespecError, Ids, NamedProgress
from edgespec.models.gguf.check import GgufSummary, Tensor, check_gguf, read_arrays
from edgespec.models.gguf.heads import HEAD_KEY, STAND_INS, heads
from edgespec.models.gguf.part import add_metadata, add_names
from edgespec.quant.draft import useful_ids
from edgespec.quant.requant import SOURCE_KEY, fingerprint, replacing, require_space

VOCABULARY = 32_768
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_DIRECTIONS = 64  # of random projections, which keep angles within an eighth (Johnson, Lindenstrauss 1984)
_CHUNK = 2048  # ids compared at once


def head_path(source: Path, size: int) -> Path:
    """Return where a head file of `size` ids that is made of `source` belongs."""
    return source.with_name(f"{source.stem}.head-{size}.gguf")


def make_head(source: Path, size: int = VOCABULARY, progress: NamedProgress | None = None) -> Path:
    """Write the head file of `source` next to it, with its `size` most useful ids, and return its path.

    Raises EdgespecError if `source` has no layer for multi-token prediction, Cancelled if stopped.
    """
    report = progress or (lambda *_: True)
    summary = check_gguf(source)
    if not heads(summary):
        raise EdgespecError(
            f"{source.name} has no layer for multi-token prediction: choose a file that has one"
        )
    size = min(size, summary.vocab_size)
    report("choosing tokens", 0.0)
    ids = np.arange(size) if size == summary.vocab_size else useful_ids(source, size)
    out = head_path(source, len(ids))
    write_head(source, summary, ids, out, report)
    return out


def write_head(source: Path, summary: GgufSummary, ids: Ids, out: Path, report: NamedProgress) -> None:
    """Write the layer of `source` and the rows `ids` (ascending) of embeddings and output head to `out`."""
    tensors, data = summary.tensors, np.memmap(source, np.uint8, "r")
    embedding, output = tensors[_EMBEDDING], tensors.get(_head_name(summary), tensors[_EMBEDDING])
    first = summary.number("block_count") - heads(summary)
    layers = tuple(f"blk.{i}." for i in range(first, first + heads(summary)))
    kept = {
        name: one
        for name, one in tensors.items()
        if name == "output_norm.weight"
        or (name.startswith(layers) and not name.endswith(("shared_head_head.weight", "embed_tokens.weight")))
    }
    require_space(out.parent, sum(one.bytes for one in (*kept.values(), embedding, output)) // 2)
    stand_ins = _stand_ins(_rows(data, embedding), embedding.type, ids, report)
    with replacing(out) as partial:
        writer = gguf.GGUFWriter(partial, summary.architecture)
        add_metadata(writer, summary, (".vocab_size",))
        for key, numbers in read_arrays(source, f"{summary.architecture}.").items():
            writer.add_array(key, numbers.tolist())
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(SOURCE_KEY, fingerprint(source))
        writer.add_string(HEAD_KEY, summary.tokenizer_digest)
        writer.add_array(STAND_INS, stand_ins.tolist())
        add_names(writer, [str(token) for token in ids])
        _add(writer, _EMBEDDING, _rows(data, embedding)[ids], embedding)
        if output is not embedding:
            _add(writer, _OUTPUT, _rows(data, output)[ids], output)
        for name, tensor in kept.items():
            _add(writer, name, _rows(data, tensor), tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_gguf(partial)


def _head_name(summary: GgufSummary) -> str:
    """Return the name of the matrix that gives the layer's logits."""
    own = (name for name in summary.tensors if name.endswith("nextn.shared_head_head.weight"))
    return next(own, _OUTPUT)


def _rows(data: npt.NDArray[np.uint8], tensor: Tensor) -> npt.NDArray[np.uint8]:
    """Return the stored bytes of a tensor: uint8 [..., rows, bytes of a row]."""
    raw = data[tensor.offset : tensor.offset + tensor.bytes]
    return raw.reshape(*reversed(tensor.shape[1:]), -1)


def _add(writer: gguf.GGUFWriter, name: str, rows: npt.NDArray[np.uint8], tensor: Tensor) -> None:
    kind = gguf.GGMLQuantizationType[tensor.type]
    if tensor.type in ("F32", "F16"):
        writer.add_tensor(name, rows.view(np.float32 if tensor.type == "F32" else np.float16))
    else:
        writer.add_tensor(name, rows, raw_dtype=kind)


def _stand_ins(rows: npt.NDArray[np.uint8], kind: str, ids: Ids, report: NamedProgress) -> Ids:
    """Return for each row of the embeddings the index in `ids` of the kept one that is most like it."""
    report("choosing stand-ins", 0.0)
    projected = np.concatenate(list(_projected(rows, kind)))
    near = np.zeros(len(rows), np.int64)
    kept = projected[ids].T.copy()
    for start in range(0, len(rows), _CHUNK):
        near[start : start + _CHUNK] = (projected[start : start + _CHUNK] @ kept).argmax(axis=1)
        report("choosing stand-ins", min(1.0, (start + _CHUNK) / len(rows)))
    near[ids] = np.arange(len(ids))
    return near


def _projected(rows: npt.NDArray[np.uint8], kind: str) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the directions of rows in fewer dimensions: float32 [_CHUNK, _DIRECTIONS] of length one."""
    matrix: npt.NDArray[np.float32] | None = None
    for start in range(0, len(rows), _CHUNK):
        values = np.asarray(
            dequantize(rows[start : start + _CHUNK], gguf.GGMLQuantizationType[kind]), np.float32
        )
        if matrix is None:
            matrix = np.random.default_rng(0).standard_normal((values.shape[1], _DIRECTIONS), np.float32)
        few = values @ matrix
        yield few / np.maximum(np.linalg.norm(few, axis=1, keepdims=True), 1e-9)
