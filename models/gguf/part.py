"""A part of a GGUF model for the self-test: the model's tensors, few layers, a short vocabulary.

It runs the same kernels as the whole. Its logits are meaningless; the self-test compares those of one row
with those of many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from edgespec.models.gguf.check import GgufSummary, read_arrays
from edgespec.models.gguf.footprint import running_state
from edgespec.models.gguf.tensors import Tensor

_ROWS = 2048  # of tensors with a row for each token; more would only take longer
_PERIOD = 6  # layers that include all kinds of attention
_GROUP = 256  # rows modulo this are as in the whole: kernels are selected by divisors of the row count


class Piece(NamedTuple):
    """The first `bytes` of a tensor, which have `shape`."""

    tensor: Tensor
    shape: tuple[int, ...]
    bytes: int


def part_of(summary: GgufSummary) -> dict[str, Piece] | None:
    """Return the tensors of the part by their names in it; None if they exceed half of the model."""
    numbers = {f"blk.{old}.": f"blk.{new}." for new, old in enumerate(_blocks(summary))}
    rows = _rows(summary)
    pieces = {}
    for name, tensor in summary.tensors.items():
        block = re.match(r"blk\.\d+\.", name)
        if block is None:
            last = rows if tensor.shape[-1] == summary.vocab_size else tensor.shape[-1]
            size = tensor.bytes // tensor.shape[-1] * last
            pieces[name] = Piece(tensor, (*tensor.shape[:-1], last), size)
        elif block[0] in numbers:
            pieces[numbers[block[0]] + name[block.end() :]] = Piece(tensor, tensor.shape, tensor.bytes)
    size = sum(piece.bytes for piece in pieces.values())
    return pieces if 2 * size <= summary.tensor_bytes else None


def write_part(path: Path, summary: GgufSummary, pieces: Mapping[str, Piece], out: Path) -> None:
    """Write `pieces` of the checked file at `path` to `out`.

    Raises OSError, and KeyError for a type of weights that this version of gguf does not know.
    """
    writer = gguf.GGUFWriter(out, summary.architecture)
    blocks = _blocks(summary)
    without_heads = (".nextn_predict_layers",) if running_state(summary) else ()
    add_metadata(writer, summary, (".block_count", ".vocab_size", *without_heads))
    writer.add_block_count(len(blocks))
    for key, numbers in read_arrays(path, f"{summary.architecture}.").items():
        of_layers = len(numbers) == summary.number("block_count")
        if len(numbers):
            writer.add_array(key, (numbers[blocks] if of_layers else numbers).tolist())
    add_names(writer, [str(i) for i in range(_rows(summary))])
    first = summary.metadata.get("tokenizer.ggml.bos_token_id")
    if isinstance(first, int) and first < _rows(summary):
        writer.add_bos_token_id(first)
    for name, (tensor, shape, size) in pieces.items():
        kind = gguf.GGMLQuantizationType[tensor.type]
        # Only for bytes would the shape be changed.
        writer.add_tensor_info(name, shape[::-1], np.dtype(np.float32), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, _, size in pieces.values():
            # Not mapped: truncating a mapped file would kill this process.
            data = np.fromfile(tensor.file or path, np.uint8, size, offset=tensor.offset)
            if len(data) != size:
                raise OSError(f"{path} became shorter")
            writer.write_tensor_data(data)
    finally:
        writer.close()


def add_metadata(writer: gguf.GGUFWriter, summary: GgufSummary, left_out: tuple[str, ...]) -> None:
    """Add the scalars under the architecture's name, except keys that end with one of `left_out`."""
    for key, value in summary.metadata.items():
        if not key.startswith(f"{summary.architecture}.") or key.endswith(left_out):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def add_names(writer: gguf.GGUFWriter, names: Sequence[str]) -> None:
    """Add a vocabulary of `names`, which is never used to tokenize."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges(["a b"])


def _blocks(summary: GgufSummary) -> list[int]:
    """Return the fewest layers that include each combination of tensor name, type and shape.

    In models with a sliding window some layers, at least every sixth, have full attention: engines do not
    support such models without one. In models with recurrent layers their number decides which these are.
    """
    found: dict[int, set[tuple[str, str, tuple[int, ...]]]] = {}
    for name, tensor in summary.tensors.items():
        if match := re.fullmatch(r"blk\.(\d+)\.(.+)", name):
            found.setdefault(int(match[1]), set()).add((match[2], tensor.type, tensor.shape))
    slides = f"{summary.architecture}.attention.sliding_window" in summary.metadata
    chosen = sorted(found)[:_PERIOD] if slides else []
    if running_state(summary):
        last = summary.number("block_count") - summary.number("nextn_predict_layers")
        kinds = set().union(*(found[number] for number in range(last)))
        stop = next(n for n in range(1, last + 1) if set().union(*(found[i] for i in range(n))) >= kinds)
        return list(range(stop))
    missing = set().union(*found.values()).difference(*(found[number] for number in chosen))
    while missing:
        best = max(found, key=lambda number: (len(found[number] & missing), -number))
        chosen.append(best)
        missing -= found[best]
    return sorted(chosen)


def _rows(summary: GgufSummary) -> int:
    return min(summary.vocab_size, _ROWS + summary.vocab_size % _GROUP)
