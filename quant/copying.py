"""Writes a GGUF file from the tensors of another, as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from edgespec.core import Ids
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.part import add_metadata, add_names
from edgespec.models.gguf.tensors import Tensor
from edgespec.quant.requant import SOURCE_KEY, fingerprint, replacing

Stored = npt.NDArray[np.uint8]
"""The stored bytes of a tensor: [..., rows, bytes of a row]."""


@contextmanager
def writing(out: Path, summary: GgufSummary, source: Path, ids: Ids) -> Iterator[gguf.GGUFWriter]:
    """Write `out` when the block ends: the scalars of `summary`, tokens named by `ids`, what the block adds.

    The file is marked as made from `source`. It appears complete or not at all.
    """
    with replacing(out) as partial:
        writer = gguf.GGUFWriter(partial, summary.architecture)
        add_metadata(writer, summary, (".vocab_size",))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(SOURCE_KEY, fingerprint(source))
        add_names(writer, [str(token) for token in ids])
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_gguf(partial)


def stored(path: Path, tensor: Tensor) -> Stored:
    """Return `tensor` of the model file `path`, mapped. Raises OSError."""
    return tensor.mapped(path).reshape(*reversed(tensor.shape[1:]), -1)


def add_stored(writer: gguf.GGUFWriter, name: str, rows: Stored, tensor: Tensor) -> None:
    """Add `rows` in the weight type of `tensor`."""
    writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[tensor.type])
