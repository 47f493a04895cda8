"""A check of GGUF files in pure Python before native code opens them.

llama.cpp aborts the process on some invalid values and trusts others. So each count, length, type and offset
is compared with the file's size before anything is read or allocated because of it, and values that llama.cpp
asserts must be within its limits. Files that llama.cpp would refuse (arrays of arrays, gaps between tensors)
are refused here too, with a message a user can act on.

Not checked: whether the tensors are those the architecture needs (llama.cpp compares names and shapes itself
and reports a mismatch), except for a few that it does not miss before it uses them; the values of the
weights, and changes to the file afterwards.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Limits: those in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgespec.models.gguf.read import NAME_LENGTH, U64, Cursor, GgufValue, Scalar, file_error, map_file
from edgespec.models.gguf.tensors import Tensor, read_tensors
from edgespec.models.split import part_paths
from edgespec.text import printable

# Far above any model, so that a malicious file costs seconds and megabytes, not hours and gigabytes.
_MAX_ENTRIES, _MAX_TOKENS, _MAX_LAYERS = 0xFFFF, 1 << 21, 512
_MAX_KEY = 0xFFFF

_LOOKALIKES = {
    rb"\s*<(!doctype|html|\?xml)": ("a web page", "the link may need a login or have expired"),
    rb"version https://git-lfs": ("a git-lfs pointer", "run `git lfs pull` to fetch the model itself"),
    rb".{6}\0\0\{\s*\"": ("safetensors", "convert it to GGUF or download a GGUF version"),
    rb"PK\x03\x04|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": ("an archive", "unpack it first"),
    rb"tjgg|lmgg|fmgg|algg": ("a format from before GGUF", "download a newer version of the model"),
}

# Minimum and maximum, where llama.cpp asserts one or allocates memory by the value.
_RANGES = {
    "block_count": (1, _MAX_LAYERS),
    "nextn_predict_layers": (0, _MAX_LAYERS),
    "context_length": (1, 1 << 30),
    "embedding_length": (1, 1 << 20),
    "vocab_size": (0, _MAX_TOKENS),
    "expert_count": (0, 1024),
    "expert_used_count": (0, 1024),
    "expert_group_count": (0, 1024),
    "expert_group_used_count": (0, 1024),
}
_GATED_DELTA = "ssm_out.weight", ("attn_qkv.weight", "attn_gate.weight")
_MAMBA_2 = "ssm_in.weight", ("ssm_conv1d.bias",)
# By architecture: tensors without which llama.cpp loads a layer that has the first one, and then crashes.
_NEEDED = {
    "qwen35": _GATED_DELTA,
    "qwen35moe": _GATED_DELTA,
    "granitehybrid": _MAMBA_2,
    "falcon-h1": _MAMBA_2,
    "nemotron_h": _MAMBA_2,
    "nemotron_h_moe": _MAMBA_2,
}
_ARRAYS = {
    "tokenizer.ggml.tokens": ("string[]",),
    "tokenizer.ggml.scores": ("float32[]", "int32[]"),
    "tokenizer.ggml.token_type": ("int32[]",),
    "tokenizer.ggml.merges": ("string[]",),
    "tokenizer.ggml.precompiled_charsmap": ("uint8[]", "int8[]"),
}
_NUMBERS = {"int32[]": "<i4", "uint32[]": "<u4", "float32[]": "<f4", "bool[]": "?"}


@dataclass(frozen=True, slots=True)
class GgufSummary:
    """Properties of a checked file.

    `name` is safe to print; the strings in `metadata` are those of the file, undecodable bytes replaced, and
    are not. `metadata` has scalars and strings of up to 1024 bytes, no arrays. Equal `tokenizer_digest`s mean
    equal vocabularies. `parameters` counts weights, `types` maps a ggml type's name to bytes of tensor data,
    which add up to `tensor_bytes`; `tensors` is by name. `context_length` is in tokens, None if the file does
    not contain it. `files` are all parts of a split model, or the file alone.
    """

    architecture: str
    name: str
    metadata: Mapping[str, Scalar]
    vocab_size: int
    tokenizer_digest: str
    parameters: int
    tensor_bytes: int
    types: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    has_chat_template: bool
    context_length: int | None
    files: tuple[Path, ...] = ()

    def number(self, key: str) -> int:
        """Return an integer from the metadata under the architecture's name, 0 if there is none."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    def only(self, tensors: Mapping[str, Tensor]) -> GgufSummary:
        """Return the summary of a model that has only these tensors."""
        types = _bytes_by_type(tensors)
        size = sum(types.values())
        return replace(self, tensors=tensors, types=types, tensor_bytes=size, parameters=_weights(tensors))


def check_gguf(path: Path) -> GgufSummary:
    """Read the header of the GGUF file at `path` and check that llama.cpp can open it safely.

    Of a split model, `path` is the first part, and all parts are checked. Raises EdgespecError, one printable
    line, unless it is a well-formed model. Opens regular files only, so that a pipe or a device never blocks.
    A file is read again only if it has changed.
    """
    state: tuple[int, ...] = ()
    for file in (path, *part_paths(path)[1:]):
        try:
            s = file.stat()
        except (OSError, ValueError):
            break  # reading it raises the error
        state += s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
    return _checked(path, state)


@lru_cache(8)
def _checked(path: Path, _state: tuple[int, ...]) -> GgufSummary:
    with map_file(path) as data:
        cursor = Cursor(path, data)
        n_tensors, n_keys = read_preamble(cursor)
        values = read_metadata(cursor, n_keys)
        files = _files(cursor, values)
        architecture, alignment = check_general(cursor, values)
        _check_hyperparameters(cursor, values, architecture)
        vocab_size = _check_tokenizer(cursor, values)
        tensors = read_tensors(cursor, n_tensors, alignment)
        _add_parts(files, values, tensors)
        if not tensors:
            raise file_error(path, "no tensors, so this is only a vocabulary", "download the model itself")
        _check_needed(path, architecture, tensors)
        types = _bytes_by_type(tensors)
        metadata = {key: value.scalar for key, value in values.items() if value.scalar is not None}
        context = metadata.get(f"{architecture}.context_length")
        template = values.get("tokenizer.chat_template")
        return GgufSummary(
            architecture=architecture,
            name=printable(metadata.get("general.name", path.stem), NAME_LENGTH),
            metadata=metadata,
            vocab_size=vocab_size,
            tokenizer_digest=_tokenizer_digest(data, values),
            parameters=_weights(tensors),
            tensor_bytes=sum(types.values()),
            types=types,
            tensors=tensors,
            has_chat_template=template is not None and template.type == "string",
            context_length=context if isinstance(context, int) else None,
            files=files,
        )


def _bytes_by_type(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    types: dict[str, int] = {}
    for tensor in tensors.values():
        types[tensor.type] = types.get(tensor.type, 0) + tensor.bytes
    return types


def _weights(tensors: Mapping[str, Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def read_arrays(path: Path, prefix: str) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of numbers in the metadata of the file at `path` whose keys begin with `prefix`."""
    with map_file(path) as data:
        cursor = Cursor(path, data)
        _, n_keys = read_preamble(cursor)
        return {
            key: np.frombuffer(data, kind, value.count, value.start).copy()
            for key, value in read_metadata(cursor, n_keys).items()
            if key.startswith(prefix) and (kind := _NUMBERS.get(value.type))
        }


def read_architecture(path: Path) -> str:
    """Return the architecture of the file at `path` without reading the rest. Raises EdgespecError."""
    with map_file(path) as data:
        cursor = Cursor(path, data)
        _, n_keys = read_preamble(cursor)
        for number in range(n_keys):
            key = cursor.name("key", number, _MAX_KEY)
            value = cursor.value(key)
            if key == "general.architecture":
                return str(value.scalar)
    raise file_error(path, "has no key 'general.architecture'")


def read_preamble(cursor: Cursor) -> tuple[int, int]:
    """Return the number of tensors and of metadata keys."""
    head = cursor.data[:256]
    if not head.startswith(b"GGUF"):
        begins = f"is not a GGUF file: it begins with '{printable(head[:24])}'"
        for pattern, (what, advice) in _LOOKALIKES.items():
            if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
                raise file_error(cursor.path, f"{begins} ({what})", advice)
        raise file_error(cursor.path, begins)
    cursor.skip(4)
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF", advice="download the little-endian version of the model")
    if version not in (2, 3):
        advice = "update Edgespec" if version > 3 else "download a newer version of the model"
        raise cursor.error(f"GGUF version {version}, but only 2 and 3 can be read", advice=advice)
    n_tensors, n_keys = cursor.u64(), cursor.u64()
    for count, what in ((n_tensors, "tensors"), (n_keys, "metadata keys")):
        if count > _MAX_ENTRIES:
            raise cursor.error(f"{count} {what}, but no model has more than {_MAX_ENTRIES}")
    return n_tensors, n_keys


def read_metadata(cursor: Cursor, n_keys: int) -> Mapping[str, GgufValue]:
    """Return the metadata by key."""
    values: dict[str, GgufValue] = {}
    for number in range(n_keys):
        key = cursor.name("key", number, _MAX_KEY)
        if key in values:
            raise cursor.error("it appears twice")
        values[key] = cursor.value(key)
    return values


def check_general(cursor: Cursor, values: Mapping[str, GgufValue]) -> tuple[str, int]:
    """Return the name of the architecture and the alignment of tensor data in bytes."""
    if (value := values.get("general.architecture")) is None:
        raise file_error(cursor.path, "has no key 'general.architecture'")
    architecture = value.scalar
    if not isinstance(architecture, str) or not re.fullmatch("[A-Za-z0-9_.+-]{1,64}", architecture):
        raise cursor.error("not the name of an architecture", value)
    return architecture, _alignment(cursor, values)


def _alignment(cursor: Cursor, values: Mapping[str, GgufValue]) -> int:
    alignment: Scalar | None = 32
    if value := values.get("general.alignment"):
        alignment = value.scalar if value.type == "uint32" else None
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise cursor.error("not a uint32 that is a power of two from 8 to 65536", value)
    return alignment


def _check_hyperparameters(cursor: Cursor, values: Mapping[str, GgufValue], architecture: str) -> None:
    greatest = dict.fromkeys(_RANGES, 0)
    for name, (low, high) in _RANGES.items():
        if value := values.get(f"{architecture}.{name}"):
            if value.type not in ("uint32", "uint32[]", "int32[]") or value.count > _MAX_LAYERS:
                raise cursor.error("not a uint32, nor one for each layer", value)
            code = "i" if value.type == "int32[]" else "I"
            numbers = struct.unpack_from(f"<{value.count}{code}", cursor.data, value.start)
            if wrong := [number for number in numbers if not low <= number <= high]:
                raise cursor.error(f"{wrong[0]} is not within {low} to {high}", value)
            greatest[name] = max(numbers, default=0)

    if greatest["nextn_predict_layers"] > greatest["block_count"]:
        raise file_error(cursor.path, "has more prediction layers than layers")
    experts, used = greatest["expert_count"], greatest["expert_used_count"]
    groups, groups_used = greatest["expert_group_count"], greatest["expert_group_used_count"]
    if experts <= 1 and architecture in ("hunyuan-dense", "hunyuan_vl"):
        return  # llama.cpp reads a single expert as none here
    possible = 0 < used <= experts and groups < experts if experts else used == groups == 0
    if not possible or (groups > 1 and (experts % groups or not 0 < groups_used < groups)):
        choice = f"uses {used} of {experts} experts in {groups_used} of {groups} groups"
        raise file_error(cursor.path, f"{choice}, which is impossible")


def _check_tokenizer(cursor: Cursor, values: Mapping[str, GgufValue]) -> int:
    """Return the size of the vocabulary. llama.cpp indexes the tokenizer's arrays by token."""
    for key, types in _ARRAYS.items():
        if (value := values.get(key)) and value.type not in types:
            raise cursor.error(f"{value.type} instead of {' or '.join(types)}", value)
    if (tokens := values.get("tokenizer.ggml.tokens")) is None:
        raise file_error(
            cursor.path, "has no vocabulary (tokenizer.ggml.tokens), so it cannot generate text", ""
        )
    if not 0 < tokens.count <= _MAX_TOKENS:
        raise cursor.error(f"{tokens.count} tokens instead of 1 to {_MAX_TOKENS}", tokens)
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if (value := values.get(key)) and value.count != tokens.count:
            raise cursor.error(f"{value.count} elements for {tokens.count} tokens", value)

    # llama.cpp aborts on equal tokens, after it has cut them at a zero byte and named empty ones.
    data, pos, seen = cursor.data, tokens.start, set[bytes]()
    for i in range(tokens.count):
        start = pos + 8
        pos = start + U64.unpack_from(data, pos)[0]
        text = data[start:pos].partition(b"\0")[0] or b"[EMPTY_%d]" % i
        if text in seen:
            raise cursor.error(f"token {i}, '{printable(text, NAME_LENGTH)}', appears twice", tokens)
        seen.add(text)
    return tokens.count


def _tokenizer_digest(data: mmap.mmap, values: Mapping[str, GgufValue]) -> str:
    """Return the SHA-256, in hex, of the values that define token ids, their types and lengths included."""
    digest = hashlib.sha256()
    for name in ("model", "pre", "tokens", "token_type", "merges"):
        digest.update(name.encode() + b"\0")
        if value := values.get(f"tokenizer.ggml.{name}"):
            digest.update(data[value.tag : value.end])
    return digest.hexdigest()


def _files(cursor: Cursor, values: Mapping[str, GgufValue]) -> tuple[Path, ...]:
    """Return the paths of all parts of the model whose first part is checked, or its only file."""
    path, count = cursor.path, _number(values, "split.count")
    if count is None or count <= 1:
        return (path,)
    files = part_paths(path)
    if len(files) != count:
        raise file_error(path, f"is one of {count} parts", f"name it NAME-00001-of-{count:05d}.gguf")
    if path != files[0] or _number(values, "split.no") != 0:
        raise file_error(path, f"is not the first of {count} parts", f"load {printable(files[0].name)}")
    return files


def _add_parts(files: tuple[Path, ...], values: Mapping[str, GgufValue], tensors: dict[str, Tensor]) -> None:
    """Add the tensors of all parts but the first to `tensors`."""
    path, count = files[0], len(files)
    for number, file in enumerate(files[1:], start=1):
        if not file.exists():
            raise file_error(path, f"part {number + 1} of {count} is missing", f"add {printable(file.name)}")
        with map_file(file) as data:
            part = Cursor(file, data)
            n_tensors, n_keys = read_preamble(part)
            own = read_metadata(part, n_keys)
            if (_number(own, "split.no"), _number(own, "split.count")) != (number, count):
                raise file_error(file, f"is not part {number + 1} of {count} of this model")
            added = read_tensors(part, n_tensors, _alignment(part, own))
        if twice := sorted(tensors.keys() & added):
            raise file_error(file, f"tensor '{printable(twice[0], NAME_LENGTH)}' is in two parts")
        tensors.update((name, replace(tensor, file=file)) for name, tensor in added.items())
    if count > 1 and (total := _number(values, "split.tensors.count")) != len(tensors):
        raise file_error(path, f"its parts have {len(tensors)} tensors instead of {total}")


def _number(values: Mapping[str, GgufValue], key: str) -> int | None:
    value = values.get(key)
    return value.scalar if value is not None and isinstance(value.scalar, int) else None


def _check_needed(path: Path, architecture: str, tensors: Mapping[str, Tensor]) -> None:
    sign, needed = _NEEDED.get(architecture, ("", ()))
    for name in tensors:
        if sign and name.endswith(f".{sign}"):
            layer = name.removesuffix(sign)
            for one in needed:
                if layer + one not in tensors:
                    raise file_error(path, f"has no tensor '{printable(layer, NAME_LENGTH)}{one}'")
