"""Writes head files: the layer for multi-token prediction of a model, with the most useful ids only.

Such a file drafts for every model with the same vocabulary and width: see `models.gguf.mtp`. With 32,768 of
248,320 ids its pass takes a fifth of that of the whole layer (docs/experiments.md).
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize

from edgespec.core import EdgespecError, Ids, NamedProgress
from edgespec.models.gguf.check import GgufSummary, check_gguf, read_arrays
from edgespec.models.gguf.heads import HEAD_KEY, STAND_INS, head_prefixes, heads
from edgespec.quant.copying import Stored, add_stored, stored, writing
from edgespec.quant.draft import useful_ids
from edgespec.quant.requant import SOURCE_KEY, fingerprint, require_space

VOCABULARY = 32_768
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_DIRECTIONS = 64  # of random projections, which keep angles within an eighth (Johnson, Lindenstrauss 1984)
_CHUNK = 2048  # ids compared at once


def head_path(source: Path, size: int) -> Path:
    """Return where a head file of `size` ids that is made of `source` belongs."""
    return source.with_name(f"{source.stem}.head-{size}.gguf")


def made_head(source: Path) -> Path | None:
    """Return a head file made of `source` as it is now, None without one. Raises EdgespecError."""
    for path in source.parent.glob(f"{glob.escape(source.stem)}.head-*.gguf"):
        if check_gguf(path).metadata.get(SOURCE_KEY) == fingerprint(source):
            return path
    return None


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
    tensors = summary.tensors
    embedding, output = tensors[_EMBEDDING], tensors.get(_head_name(summary), tensors[_EMBEDDING])
    layers = head_prefixes(summary)
    kept = {
        name: one
        for name, one in tensors.items()
        if name == "output_norm.weight"
        or (name.startswith(layers) and not name.endswith(("shared_head_head.weight", "embed_tokens.weight")))
    }
    require_space(out.parent, sum(one.bytes for one in (*kept.values(), embedding, output)) // 2)
    stand_ins = _stand_ins(stored(source, embedding), embedding.type, ids, report)
    with writing(out, summary, source, ids) as writer:
        for key, numbers in read_arrays(source, f"{summary.architecture}.").items():
            writer.add_array(key, numbers.tolist())
        writer.add_string(HEAD_KEY, summary.tokenizer_digest)
        writer.add_array(STAND_INS, stand_ins.tolist())
        add_stored(writer, _EMBEDDING, stored(source, embedding)[ids], embedding)
        if output is not embedding:
            add_stored(writer, _OUTPUT, stored(source, output)[ids], output)
        for name, tensor in kept.items():
            add_stored(writer, name, stored(source, tensor), tensor)


def _head_name(summary: GgufSummary) -> str:
    """Return the name of the matrix that gives the layer's logits."""
    own = (name for name in summary.tensors if name.endswith("nextn.shared_head_head.weight"))
    return next(own, _OUTPUT)


def _stand_ins(rows: Stored, kind: str, ids: Ids, report: NamedProgress) -> Ids:
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


def _projected(rows: Stored, kind: str) -> Iterator[npt.NDArray[np.float32]]:
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
