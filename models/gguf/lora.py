"""LoRA adapters: their files, checked against the model they change before llama.cpp opens them.

An adapter adds scale * B·A·x to the products of some of the model's matrices with x. llama.cpp compares two
dimensions of A and B itself, and aborts in the first forward pass if another one is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import GgufSummary, check_general, read_metadata, read_preamble
from edgespec.models.gguf.read import NAME_LENGTH, Cursor, GgufValue, file_error, map_file
from edgespec.models.gguf.tensors import Tensor, read_tensors
from edgespec.models.hub.store import file_sample
from edgespec.text import printable

_OTHER = "choose an adapter for this model"
_TYPES = ("F32", "F16", "BF16", "Q8_0")  # all that convert_lora_to_gguf.py writes
_ALPHA = "adapter.lora.alpha"
_NOT_APPLIED = re.compile(r"conv1d|shortconv\.conv\b|norm|ssm_[ad]$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in a GGUF file, and how strongly it is applied; 0: not at all."""

    path: Path
    scale: float = 1.0


def parse_adapter(text: str) -> Adapter:
    """Return the adapter of `FILE[:SCALE]`. Raises EdgespecError for a scale that is not finite."""
    file, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon and file else None
    except ValueError:  # the colon is part of the name
        scale = None
    if scale is None:
        return Adapter(Path(text).expanduser())
    if not math.isfinite(scale):
        raise EdgespecError(f"invalid scale in --lora {printable(text)}: write FILE:SCALE, as in a.gguf:0.5")
    return Adapter(Path(file).expanduser(), scale)


def adapters_key(adapters: Sequence[Adapter]) -> tuple[object, ...]:
    """Return what states and costs of a model with these adapters depend on; nothing if there are none."""
    return tuple(sorted((file_sample(one.path), one.scale) for one in adapters))


def check_adapters(adapters: Sequence[Adapter], target: GgufSummary, name: str) -> None:
    """Check that llama.cpp can apply each file to `target`, called `name`. Raises EdgespecError."""
    seen: set[Path] = set()
    for adapter in adapters:
        _check_adapter(adapter.path, target, name)
        if (path := adapter.path.resolve()) in seen:
            raise file_error(adapter.path, "is given twice", "give it once, with the sum of the scales")
        seen.add(path)


def _check_adapter(path: Path, target: GgufSummary, name: str) -> None:
    with map_file(path) as data:
        cursor = Cursor(path, data)
        n_tensors, n_keys = read_preamble(cursor)
        values = read_metadata(cursor, n_keys)
        architecture, alignment = check_general(cursor, values)
        if _text(values, "general.type") != "adapter" or _text(values, "adapter.type") != "lora":
            raise file_error(path, "is not a LoRA adapter", "give a model with --model")
        if (alpha := values.get(_ALPHA)) is not None and not _is_finite(alpha):
            raise cursor.error("not a finite float32", alpha)
        if any(key.startswith("adapter.alora.") for key in values):
            raise file_error(path, "is an activated LoRA, for a part of the text only", _OTHER)
        if architecture != target.architecture:
            own = printable(target.architecture)
            raise file_error(path, f"is for {architecture} models, and {name} is of {own}", _OTHER)
        tensors = read_tensors(cursor, n_tensors, alignment)
    _check_pairs(path, tensors, target, name)


def _text(values: Mapping[str, GgufValue], key: str) -> str | None:
    value = values.get(key)
    return value.scalar if value is not None and isinstance(value.scalar, str) else None


def _is_finite(value: GgufValue) -> bool:
    return value.type == "float32" and isinstance(value.scalar, float) and math.isfinite(value.scalar)


def _check_pairs(path: Path, tensors: Mapping[str, Tensor], target: GgufSummary, name: str) -> None:
    """Check that `tensors` are pairs A and B that fit matrices of `target`; llama.cpp ignores norms."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        base, _, part = full.rpartition(".lora_")
        shown = printable(full, NAME_LENGTH)
        if not base and full.endswith("_norm.weight"):
            continue
        if part not in ("a", "b"):
            raise file_error(path, f"tensor '{shown}' is not one of an adapter", _OTHER)
        if tensor.type not in _TYPES:
            raise file_error(path, f"tensor '{shown}' is {tensor.type}", f"convert it to {_TYPES[1]}")
        pairs.setdefault(base, {})[part] = tensor
    if not pairs:
        raise file_error(path, "is an adapter without weights")
    for base, pair in pairs.items():
        shown = printable(base, NAME_LENGTH)
        if len(pair) < 2:
            raise file_error(path, f"of the pair for '{shown}' one is missing")
        matrix = target.tensors.get(base)
        if matrix is None:
            raise file_error(path, f"changes '{shown}', which {name} does not have", _OTHER)
        if _NOT_APPLIED.search(base):
            raise file_error(path, f"changes '{shown}', to which llama.cpp applies no adapter", _OTHER)
        shapes = pair["a"].shape, pair["b"].shape
        if shapes != _expected(base, matrix.shape, shapes[0]):
            raise file_error(
                path, f"shapes {list(shapes[0])} and {list(shapes[1])} do not fit '{shown}' of {name}", _OTHER
            )
        if base == "token_embd.weight" and "output.weight" not in target.tensors:
            # The product with the output head, which is the same tensor, would have the wrong shape.
            raise file_error(path, f"changes the embeddings, which are the output head of {name}", _OTHER)


def _expected(base: str, matrix: tuple[int, ...], a: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Return the shapes of A and B for a matrix, or one for each expert, of the rank that `a` has.

    For embeddings A is the table of rows of length `rank`. None if nothing fits.
    """
    if len(matrix) < 2 or len(a) != len(matrix):
        return None
    columns, rows, *experts = matrix
    if base == "token_embd.weight":
        return (a[0], rows), (a[0], columns)
    return (columns, a[1], *experts), (a[1], rows, *experts)
