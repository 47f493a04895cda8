"""The tensors of a GGUF file: types, shapes and where their data is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgespec.models.gguf.read import NAME_LENGTH, Cursor, file_error
from edgespec.text import printable

# Type id: name, weights per block, bytes per block. Excluded are retired types and those that ggml has
# no matrix product for, where it jumps to address zero: Q8_1, Q8_K, I8, I16, F64. (I32 and I64: see
# _read_shape.)
GGML_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip

_MAX_TENSOR_NAME, _INT64 = 63, 1 << 63


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor. `shape[0]` is the length of a row, `offset` is from the start of its file.

    `file` is the part of a split model that has the tensor; None: the model's own file.
    """

    type: str
    shape: tuple[int, ...]
    offset: int
    bytes: int
    file: Path | None = None

    def mapped(self, path: Path) -> npt.NDArray[np.uint8]:
        """Return the stored bytes, mapped; `path` is the model's file. Raises OSError."""
        return np.memmap(self.file or path, np.uint8, "r", self.offset, (self.bytes,))


def read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, Tensor]:
    """Return all tensors by name. llama.cpp requires their data in order, without gaps."""
    found: dict[str, Tensor] = {}
    expected = 0
    for number in range(count):
        name = cursor.name("tensor", number, _MAX_TENSOR_NAME)
        if name in found:
            raise cursor.error("it appears twice")
        shape, type_name, size = _read_shape(cursor, name)
        offset = cursor.u64()
        if offset % alignment:
            raise cursor.error(f"data offset {offset} is not a multiple of {alignment}")
        if offset != expected:
            raise cursor.error(f"data offset {offset}, but the previous tensor ends at {expected}")
        found[name] = Tensor(type_name, shape, offset, size)
        expected = _padded(offset + size, alignment)
    start = _padded(cursor.pos, alignment)
    end = max((tensor.offset + tensor.bytes for tensor in found.values()), default=0)
    missing = end - (len(cursor.data) - start)
    for name, tensor in found.items():
        if tensor.offset + tensor.bytes > len(cursor.data) - start:
            raise file_error(
                cursor.path, f"ends in tensor '{printable(name, NAME_LENGTH)}', {missing} bytes are missing"
            )
    return {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}


def _read_shape(cursor: Cursor, tensor: str) -> tuple[tuple[int, ...], str, int]:
    """Return the shape of `tensor`, the name of its type, and its size in bytes."""
    rank = cursor.u32()
    if not 1 <= rank <= 4:
        raise cursor.error(f"{rank} dimensions instead of 1 to 4")
    shape = tuple(cursor.u64() for _ in range(rank))
    kind = cursor.u32()
    if kind not in GGML_TYPES:
        raise cursor.error(f"ggml type {kind} is not supported", advice="get another quantization")
    name, block, block_size = GGML_TYPES[kind]
    # ggml supports integers only in tables from token to token or expert, and vectors only in F32. On
    # anything else it aborts or jumps to address zero.
    table = name in ("I32", "I64")
    vector = rank == 1 or tensor.endswith("norm.weight")
    if (table and not re.search("d2t|tid2eid", tensor)) or (vector and not table and name != "F32"):
        raise cursor.error(f"{name} weights, which llama.cpp cannot compute with here")
    weights = math.prod(shape)
    size = weights // block * block_size
    # Python's integers do not overflow, llama.cpp's signed 64-bit ones do.
    if weights == 0 or max(*shape, weights, size) >= _INT64:
        raise cursor.error(f"impossible shape {list(shape)}")
    if shape[0] % block:
        raise cursor.error(f"rows of {shape[0]} weights in {name} blocks of {block}")
    return shape, name, size


def _padded(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
