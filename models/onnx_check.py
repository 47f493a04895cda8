"""Checks a folder with an ONNX model before onnxruntime opens it, and says what the model is.

onnxruntime maps whatever file an ONNX model names for its weights, at whatever offset, and libraries of custom
operators are programs. So what the file names must be one regular file beside it, every part of which lies in
that file; operators that are not onnxruntime's own, and programs compiled for one accelerator, are refused.
Nothing here trusts a size before it was compared with a file's.

Two layouts are in use: onnxruntime-genai's folder with `genai_config.json`, and Optimum's with `config.json`.
The graph is the same in both: tokens and a cache go in, logits and a longer cache come out.

What it does not know: whether the graph computes what its names say, and what happens to the files afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.catalog import printable
from edgespec.models.onnx_graph import TYPES, Graph, Value, Weight, read_graph
from edgespec.models.protobuf import WireError

GENAI, CONFIG, TOKENIZER = "genai_config.json", "config.json", "tokenizer.json"

_MAX_MODEL = 2 << 30  # bytes of the graph's file: what protocol buffers can hold
_MAX_JSON = {TOKENIZER: 128 << 20}
_MAX_CONFIG = 16 << 20
_MAX_LAYERS, _MAX_TOKENS, _MAX_CONTEXT = 512, 1 << 21, 1 << 24

_AGAIN = "Export or download the model again."
# Operator sets that are compiled into onnxruntime. Any other needs a library, or is a function of the file's.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
# They run, or read, files of their own: a program compiled for one accelerator, or Python.
_FORBIDDEN = {"EPContext", "PyOp", "PythonOp"}
_PLAIN_INPUTS = {"input_ids", "attention_mask", "position_ids"}
_CACHE = re.compile(r"(past_key_values|present)\.(\d{1,3})\.(key|value)")
_ENTRIES = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The keys and values of one text: `layers` pairs of [1, heads, positions, size] of `type`."""

    layers: int
    heads: int
    key_size: int
    value_size: int
    type: str

    @property
    def bytes_per_token(self) -> int:
        width = 2 if self.type == "float16" else 4
        return self.layers * self.heads * (self.key_size + self.value_size) * width


@dataclass(frozen=True, slots=True)
class OnnxSummary:
    """What a checked folder says about itself, with the names that a GgufSummary has.

    `path` is the graph's file, `weights` the one that most of it lies in, which may be the same. `types` maps a type's name to bytes of weights. `shares_cache_buffer`: the graph can write the longer
    cache where the shorter one lies. `positions`: it wants to be told each token's position. `ends` are the
    ids that end a text.
    """

    path: Path
    weights: Path
    architecture: str
    name: str
    vocab_size: int
    tokenizer_digest: str
    parameters: int
    tensor_bytes: int
    types: Mapping[str, int]
    context_length: int
    cache: CacheShape
    shares_cache_buffer: bool
    positions: bool
    id_type: str
    logits_type: str
    bos: int | None
    ends: tuple[int, ...]


def check_onnx(folder: Path) -> OnnxSummary:
    """Check that onnxruntime can be trusted with the model in `folder`.

    Raises EdgespecError, one printable line. What did not change is read once.
    """
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    state: list[object] = []
    for name in names[:1000]:
        try:
            status = (folder / name).lstat()
        except OSError:
            continue
        state.append((name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return _checked(folder, tuple(state))


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder, None if it is not there. Raises EdgespecError for anything else."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    try:
        value = json.loads(_read(folder, name, _MAX_JSON.get(name, _MAX_CONFIG)))
    except (ValueError, RecursionError):
        raise EdgespecError(f"{_shown(folder)}/{name} is not valid JSON. {_AGAIN}") from None
    if not isinstance(value, dict):
        raise EdgespecError(f"{_shown(folder)}/{name} is not a JSON object. {_AGAIN}")
    return value


def read_text(folder: Path, name: str) -> str | None:
    """A text file of the folder, None if it is not there."""
    if not os.path.lexists(folder / name):
        return None
    return _read(folder, name, _MAX_CONFIG).decode("utf-8", "replace")


@lru_cache(8)
def _checked(folder: Path, _state: tuple[object, ...]) -> OnnxSummary:
    shown = _shown(folder)
    if not folder.is_dir():
        raise EdgespecError(f"There is no folder {printable(folder)}: check the path.")
    config = _Config(folder)
    model = config.model_file()
    size = _regular(folder, model, "the model").st_size
    if size > _MAX_MODEL:
        raise EdgespecError(f"{shown}/{model} is larger than an ONNX file can be. {_AGAIN}")
    try:
        with (folder / model).open("rb") as file:
            if size == 0:
                raise WireError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                graph = _parsed(view)
    except (WireError, ValueError) as error:
        raise EdgespecError(f"{shown}/{model} is no ONNX model, or damaged: {error}. {_AGAIN}") from None
    except OSError as error:
        raise EdgespecError(f"{shown}/{model} cannot be read: {error.strerror}.") from None
    _refuse_foreign(shown, graph)
    weights = _check_weights(folder, graph) or model
    return _summary(folder, folder / model, folder / weights, graph, config)


def _parsed(view: memoryview) -> Graph:
    graph = read_graph(view)
    if graph.trains:
        raise WireError("it holds a training graph")
    return graph


def _refuse_foreign(shown: str, graph: Graph) -> None:
    foreign = sorted(graph.domains - _DOMAINS - graph.own_domains)
    if foreign:
        raise EdgespecError(
            f"{shown} needs operators that onnxruntime does not have ({printable(foreign[0])}): "
            "Edgespec loads no libraries from a model's folder."
        )
    if forbidden := sorted(graph.operators & _FORBIDDEN):
        raise EdgespecError(
            f"{shown} holds an operator that Edgespec does not run ({forbidden[0]}): export the model for the "
            "CPU."
        )


# --- weights ---


def _check_weights(folder: Path, graph: Graph) -> str:
    """Check where weights lie; the name of the file that they are in, "" where they are in the model's."""
    shown = _shown(folder)
    files: dict[str, int] = {}
    for weight in [*graph.weights.values(), *graph.inner]:
        size = _weight_bytes(shown, weight)
        if weight.external is None:
            continue
        entries = dict(weight.external)
        location = entries.get("location", "")
        if len(entries) != len(weight.external) or not entries.keys() <= _ENTRIES:
            raise EdgespecError(f"{shown} says in an unknown way where its weights are. {_AGAIN}")
        if not location or location in (".", "..") or re.search(r"[/\\:\0]", location):
            raise EdgespecError(
                f"{shown} wants to read its weights from {printable(location) or 'nowhere'}: "
                "they must be a file in its own folder. Do not use this model."
            )
        if location not in files:
            files[location] = _regular(folder, location, "a file of weights", alone=True).st_size
        if len(files) > 1:
            raise EdgespecError(f"{shown} has its weights in several files: export it with one.")
        offset, length = (_number(shown, entries, name) for name in ("offset", "length"))
        offset = offset or 0
        if length is not None and length != size:
            raise EdgespecError(
                f"{shown} says of {printable(weight.name)} that it has {length} bytes, and it needs {size}. "
                f"{_AGAIN}"
            )
        if offset + size > files[location]:
            raise EdgespecError(
                f"{shown}/{printable(location)} is incomplete: it has {files[location]} bytes, and "
                f"{printable(weight.name)} ends at {offset + size}. {_AGAIN}"
            )
    return next(iter(files), "")


def _weight_bytes(shown: str, weight: Weight) -> int:
    if weight.type == 8 and weight.external is None:  # strings; nothing of a decoder uses them
        return 0
    if weight.type not in TYPES or any(n < 0 for n in weight.shape) or len(weight.shape) > 8:
        raise EdgespecError(f"{shown} has a weight of unknown type or shape. {_AGAIN}")
    return (math.prod(weight.shape) * TYPES[weight.type][1] + 7) // 8


def _number(shown: str, entries: Mapping[str, str], name: str) -> int | None:
    text = entries.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise EdgespecError(
            f"{shown} has weights with an impossible {name} ({printable(text)[:40]}). {_AGAIN}"
        )
    return int(text)


def _regular(folder: Path, name: str, what: str, alone: bool = False) -> os.stat_result:
    """The status of a regular file directly in `folder`; `alone`: under no other name anywhere."""
    shown = f"{_shown(folder)}/{printable(name)}"
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise EdgespecError(f"{_shown(folder)} names {printable(name)} as {what}: it must be in the folder.")
    try:
        status = (folder / name).lstat()
    except OSError as error:
        raise EdgespecError(
            f"{shown} cannot be read ({error.strerror}): {what} is missing. {_AGAIN}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise EdgespecError(f"{shown} is {kind}: put {what} itself into the folder.")
    if alone and status.st_nlink > 1:
        raise EdgespecError(f"{shown} has another name elsewhere (a hard link): copy {what} instead.")
    return status


def _read(folder: Path, name: str, most: int) -> bytes:
    if _regular(folder, name, "a part of the model").st_size > most:
        raise EdgespecError(f"{_shown(folder)}/{name} is far larger than such a file is. {_AGAIN}")
    try:
        return (folder / name).read_bytes()[: most + 1]
    except OSError as error:
        raise EdgespecError(f"{_shown(folder)}/{name} cannot be read: {error.strerror}.") from None


# --- what it is ---


class _Config:
    """What the JSON files of either layout say, by the same names. None for what they do not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        genai, plain = read_json(folder, GENAI), read_json(folder, CONFIG)
        if genai is None and plain is None:
            raise EdgespecError(
                f"{_shown(folder)} has neither {GENAI} nor {CONFIG}: it is no folder of an ONNX model."
            )
        self._model = _mapping((genai or {}).get("model"))
        self._decoder = _mapping(self._model.get("decoder"))
        self._plain = plain or {}
        self._generation = read_json(folder, "generation_config.json") or {}

    def model_file(self) -> str:
        name = self._decoder.get("filename")
        if isinstance(name, str):
            return name
        found = sorted(path.name for path in self._folder.glob("*.onnx"))
        if "model.onnx" in found:
            return "model.onnx"
        if len(found) != 1:
            raise EdgespecError(f"{_shown(self._folder)} has no model.onnx. {_AGAIN}")
        return found[0]

    @property
    def architecture(self) -> str:
        kind = self._model.get("type") or self._plain.get("model_type")
        return kind if isinstance(kind, str) else "unknown"

    def number(self, genai: str, plain: str) -> int:
        """A positive number, 0 where none is said."""
        for value in (self._decoder.get(genai), self._model.get(genai), self._plain.get(plain)):
            if type(value) is int and value > 0:
                return value
        return 0

    @property
    def head_size(self) -> int:
        heads = self.number("num_attention_heads", "num_attention_heads")
        return self.number("head_size", "head_dim") or (
            self.number("hidden_size", "hidden_size") // heads if heads else 0
        )

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids: a number or a list of them, from all files that have them."""
        found: list[int] = []
        for place in (self._model, self._generation, self._plain):
            value = place.get(name)
            found += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
        return tuple(dict.fromkeys(found))


def _summary(folder: Path, model: Path, weights: Path, graph: Graph, config: _Config) -> OnnxSummary:
    shown = _shown(folder)
    cache = _cache_shape(shown, graph, config)
    logits, ids = graph.outputs.get("logits"), graph.inputs.get("input_ids")
    if logits is None or logits.shape is None or len(logits.shape) != 3 or ids is None:
        raise EdgespecError(f"{shown} does not turn input_ids into logits: it is no language model.")
    # A weight may be listed among the inputs, where old files have all of them.
    inputs = graph.inputs.keys() - graph.weights.keys()
    unknown = sorted(name for name in inputs - _PLAIN_INPUTS if not _CACHE.fullmatch(name))
    if unknown:
        raise EdgespecError(
            f"{shown} wants an input that Edgespec does not know ({printable(unknown[0])}): export the model as "
            "a decoder with a cache."
        )
    vocab_size = (
        logits.shape[2] if isinstance(logits.shape[2], int) else config.number("vocab_size", "vocab_size")
    )
    if not 0 < vocab_size <= _MAX_TOKENS:
        raise EdgespecError(f"{shown} does not say how many tokens it knows. {_AGAIN}")
    tokenizer = _read(folder, TOKENIZER, _MAX_JSON[TOKENIZER])
    context = config.number("context_length", "max_position_embeddings") or 4096
    types: dict[str, int] = {}
    for weight in graph.weights.values():
        name = TYPES[weight.type][0] if weight.type in TYPES else "string"
        types[name] = types.get(name, 0) + _weight_bytes(shown, weight)
    bos = config.ids("bos_token_id")
    return OnnxSummary(
        path=model,
        weights=weights,
        architecture=printable(config.architecture),
        name=shown,
        vocab_size=vocab_size,
        tokenizer_digest=hashlib.sha256(tokenizer).hexdigest(),
        parameters=sum(math.prod(weight.shape) for weight in graph.weights.values()),
        tensor_bytes=max(1, sum(types.values())),
        types=types,
        context_length=min(context, _positions(graph), _MAX_CONTEXT),
        cache=cache,
        shares_cache_buffer=_shares(graph, cache.layers),
        positions="position_ids" in graph.inputs,
        id_type=_type(shown, ids, ("int64", "int32")),
        logits_type=_type(shown, logits, ("float32", "float16")),
        bos=bos[0] if bos else None,
        ends=config.ids("eos_token_id"),
    )


def _cache_shape(shown: str, graph: Graph, config: _Config) -> CacheShape:
    names: dict[str, set[tuple[int, str]]] = {"past_key_values": set(), "present": set()}
    for name in (*graph.inputs, *graph.outputs):
        if found := _CACHE.fullmatch(name):
            names[found[1]].add((int(found[2]), found[3]))
    past = names["past_key_values"]
    layers = len(past) // 2
    if not past:
        raise EdgespecError(
            f"{shown} has no inputs for a cache (past_key_values.0.key and so on): export it with one."
        )
    if past != names["present"] or past != {(i, kind) for i in range(layers) for kind in ("key", "value")}:
        raise EdgespecError(f"{shown} has inputs and outputs for its cache that do not match. {_AGAIN}")
    if layers > _MAX_LAYERS:
        raise EdgespecError(f"{shown} has more layers than any model. {_AGAIN}")
    shapes = {kind: _pair(shown, graph, config, kind, layers) for kind in ("key", "value")}
    types = {graph.inputs[f"past_key_values.{i}.{kind}"].type for i, kind in past}
    if len(types) != 1 or shapes["key"][0] != shapes["value"][0]:
        raise EdgespecError(f"{shown} has a cache whose layers differ: Edgespec runs models with equal ones.")
    kind = _type(shown, graph.inputs["past_key_values.0.key"], ("float32", "float16"))
    return CacheShape(layers, shapes["key"][0], shapes["key"][1], shapes["value"][1], kind)


def _pair(shown: str, graph: Graph, config: _Config, kind: str, layers: int) -> tuple[int, int]:
    """Heads and head size of all keys or all values."""
    found = set()
    for i in range(layers):
        for value in (graph.inputs[f"past_key_values.{i}.{kind}"], graph.outputs[f"present.{i}.{kind}"]):
            shape: Sequence[int | str] = value.shape or ()
            if len(shape) != 4:
                raise EdgespecError(f"{shown} has a cache of {len(shape)} dimensions in place of 4. {_AGAIN}")
            heads = (
                shape[1]
                if isinstance(shape[1], int)
                else config.number("num_key_value_heads", "num_key_value_heads")
            )
            size = shape[3] if isinstance(shape[3], int) else config.head_size
            if (isinstance(shape[0], int) and shape[0] != 1) or isinstance(shape[2], int):
                raise EdgespecError(f"{shown} has a cache of fixed length: export it with one that grows.")
            found.add((heads, size))
    if len(found) != 1 or not all(0 < n <= 1 << 14 for n in next(iter(found))):
        raise EdgespecError(f"{shown} does not say what shape its cache has, or says it twice. {_AGAIN}")
    return found.pop()


def _shares(graph: Graph, layers: int) -> bool:
    """Whether every layer's cache goes through GroupQueryAttention alone, which can extend it in place."""
    shared = 0
    for node in graph.nodes:
        past = [name for name in node.inputs if name.startswith("past_key_values.")]
        if not past:
            continue
        if (
            node.op != "GroupQueryAttention"
            or node.domain != "com.microsoft"
            or node.inputs[3:5] != tuple(past)
        ):
            return False
        if node.outputs[1:3] != tuple(name.replace("past_key_values", "present") for name in past):
            return False
        shared += 1
    return shared == layers


def _positions(graph: Graph) -> int:
    """Positions that the tables of rotary embeddings have: beyond them is other memory."""
    rows = [
        weight.shape[0]
        for node in graph.nodes
        if node.op == "GroupQueryAttention" and len(node.inputs) > 8
        for weight in (graph.weights.get(node.inputs[7]), graph.weights.get(node.inputs[8]))
        if weight is not None and weight.shape
    ]
    return min(rows, default=_MAX_CONTEXT)


def _type(shown: str, value: Value, allowed: Sequence[str]) -> str:
    name = TYPES.get(value.type, ("unknown", 0))[0]
    if name not in allowed:
        raise EdgespecError(
            f"{shown} has {value.name} of type {name}: Edgespec runs models with {' or '.join(allowed)}."
        )
    return name


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(folder: Path) -> str:
    return printable(folder.name or folder)
