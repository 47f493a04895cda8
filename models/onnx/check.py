"""A check of folders with an ONNX model before onnxruntime opens them, which also summarizes the model.

onnxruntime maps any file that an ONNX model names for its weights, at any offset, and libraries of custom
operators are native code. So weights must be within one regular file in the model's folder; operators that
are not onnxruntime's own, and programs compiled for one accelerator, are refused. Sizes are compared with
the size of the file before they are used.

Two layouts are in use: onnxruntime-genai's, with `genai_config.json`, and Optimum's, with `config.json`. The
graph is the same in both: inputs are tokens and a KV cache, outputs are logits and the extended cache.

Not checked: whether the graph computes what its names mean, and changes to the files afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from edgespec.core import EdgespecError
from edgespec.models.onnx.folder import (
    AGAIN,
    TOKENIZER,
    FolderConfig,
    read_bytes,
    regular_file,
    shown_name,
)
from edgespec.models.onnx.graph import TYPES, Graph, GraphValue, Weight, read_graph
from edgespec.models.onnx.protobuf import WireError
from edgespec.text import printable

_MAX_MODEL = 2 << 30  # bytes of the graph's file: the limit of protocol buffers
_MAX_LAYERS, _MAX_TOKENS, _MAX_CONTEXT = 512, 1 << 21, 1 << 24

# Operator sets that are part of onnxruntime. Others need a library, or are functions in the file.
_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
# Operators that read or execute other files: a program compiled for one accelerator, or Python.
_FORBIDDEN = {"EPContext", "PyOp", "PythonOp"}
_PLAIN_INPUTS = {"input_ids", "attention_mask", "position_ids"}
_CACHE = re.compile(r"(past_key_values|present)\.(\d{1,3})\.(key|value)")
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
_ENTRIES = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The KV cache of one sequence: `layers` pairs of [1, heads, positions, size] of `type`."""

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
    """Properties of a checked folder, with the names of GgufSummary.

    `path` is the graph's file, `weights` the one with most of the weights, which may be the same. `types`
    maps a type's name to bytes of weights. `shares_cache_buffer`: the graph can extend the KV cache in place.
    `positions`: it has an input for the positions of tokens. `ends` are the ids that end a
    text. `mapped_bytes` of the weights are tables outside the model's file that rows are looked up in: only
    those rows come into memory.
    """

    path: Path
    weights: Path
    architecture: str
    name: str
    vocab_size: int
    tokenizer_digest: str
    parameters: int
    tensor_bytes: int
    mapped_bytes: int
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
    """Check that onnxruntime can open the model in `folder` safely, and summarize it.

    Raises EdgespecError, one printable line. A folder is read again only if it has changed.
    """
    state: list[object] = []
    with contextlib.suppress(OSError):  # the check raises it below
        for path in sorted(folder.iterdir())[:1000]:
            status = path.lstat()
            state.append((path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return _checked(folder, tuple(state))


@lru_cache(8)
def _checked(folder: Path, _state: tuple[object, ...]) -> OnnxSummary:
    shown = shown_name(folder)
    if not folder.is_dir():
        raise EdgespecError(f"no folder {printable(folder)}: check the path")
    config = FolderConfig(folder)
    model = config.model_file()
    size = regular_file(folder, model, "the model").st_size
    if size > _MAX_MODEL:
        raise EdgespecError(f"{shown}/{model} is larger than an ONNX file can be: {AGAIN}")
    try:
        with (folder / model).open("rb") as file:
            if size == 0:
                raise WireError("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data, memoryview(data) as view:
                graph = _parsed(view)
    except (WireError, ValueError) as error:
        raise EdgespecError(
            f"{shown}/{model} is not an ONNX model or is damaged ({error}): {AGAIN}"
        ) from None
    except OSError as error:
        raise EdgespecError(f"cannot read {shown}/{model}: {error.strerror}") from None
    _refuse_foreign(shown, graph)
    weights = _check_weights(folder, graph) or model
    return _summary(folder, folder / model, folder / weights, graph, config)


def _parsed(view: memoryview) -> Graph:
    graph = read_graph(view)
    if graph.trains:
        raise WireError("it contains a training graph")
    return graph


def _refuse_foreign(shown: str, graph: Graph) -> None:
    foreign = sorted(graph.domains - _DOMAINS - graph.own_domains)
    if foreign:
        raise EdgespecError(
            f"{shown} needs operators that onnxruntime does not have ({printable(foreign[0])}): "
            "export it without custom operators"
        )
    if forbidden := sorted(graph.operators & _FORBIDDEN):
        raise EdgespecError(
            f"{shown} contains an unsupported operator ({forbidden[0]}): export the model for the CPU"
        )


# --- weights ---


def _check_weights(folder: Path, graph: Graph) -> str:
    """Check the locations of the weights and return the name of their file, "" for the model's own."""
    shown = shown_name(folder)
    files: dict[str, int] = {}
    for weight in [*graph.weights.values(), *graph.inner]:
        size = _weight_bytes(shown, weight)
        if weight.external is None:
            continue
        entries = dict(weight.external)
        location = entries.get("location", "")
        if len(entries) != len(weight.external) or not entries.keys() <= _ENTRIES:
            raise EdgespecError(f"{shown} has weights with an unknown kind of location: {AGAIN}")
        if not location or location in (".", "..") or re.search(r"[/\\:\0]", location):
            raise EdgespecError(
                f"{shown} refers to weights outside its folder ({printable(location) or 'no path'}): "
                "do not use this model"
            )
        if location not in files:
            files[location] = regular_file(folder, location, "a file of weights", alone=True).st_size
        if len(files) > 1:
            raise EdgespecError(f"{shown} has its weights in several files: export it with one")
        offset, length = (_number(shown, entries, name) for name in ("offset", "length"))
        offset = offset or 0
        if length is not None and length != size:
            raise EdgespecError(
                f"{shown} has {length} bytes for {printable(weight.name)} instead of {size}: {AGAIN}"
            )
        if offset + size > files[location]:
            raise EdgespecError(
                f"{shown}/{printable(location)} is incomplete ({files[location]} bytes, and "
                f"{printable(weight.name)} ends at {offset + size}): {AGAIN}"
            )
    return next(iter(files), "")


def _weight_bytes(shown: str, weight: Weight) -> int:
    if weight.type == 8 and weight.external is None:  # strings, which no decoder uses
        return 0
    if weight.type not in TYPES or any(n < 0 for n in weight.shape) or len(weight.shape) > 8:
        raise EdgespecError(f"{shown} has a weight of unknown type or shape: {AGAIN}")
    return (math.prod(weight.shape) * TYPES[weight.type][1] + 7) // 8


def _number(shown: str, entries: Mapping[str, str], name: str) -> int | None:
    text = entries.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text):
        raise EdgespecError(f"{shown} has weights with an invalid {name} ({printable(text)[:40]}): {AGAIN}")
    return int(text)


# --- summary ---


def _summary(folder: Path, model: Path, weights: Path, graph: Graph, config: FolderConfig) -> OnnxSummary:
    shown = shown_name(folder)
    cache = _cache_shape(shown, graph, config)
    logits, ids = graph.outputs.get("logits"), graph.inputs.get("input_ids")
    if logits is None or logits.shape is None or len(logits.shape) != 3 or ids is None:
        raise EdgespecError(f"{shown} has no input_ids or no logits: choose a language model")
    # Old files list weights among the inputs.
    inputs = graph.inputs.keys() - graph.weights.keys()
    unknown = sorted(name for name in inputs - _PLAIN_INPUTS if not _CACHE.fullmatch(name))
    if unknown:
        raise EdgespecError(
            f"{shown} has an unknown input ({printable(unknown[0])}): "
            "export the model as a decoder with a cache"
        )
    vocab_size = (
        logits.shape[2] if isinstance(logits.shape[2], int) else config.number("vocab_size", "vocab_size")
    )
    if not 0 < vocab_size <= _MAX_TOKENS:
        raise EdgespecError(f"{shown} has no valid vocabulary size: {AGAIN}")
    tokenizer = read_bytes(folder, TOKENIZER)
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
        mapped_bytes=sum(_weight_bytes(shown, weight) for weight in _tables(graph)),
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


def _tables(graph: Graph) -> list[Weight]:
    """Return the external weights that are used as lookup tables only."""
    used = Counter(name for node in graph.nodes for name in node.inputs)
    looked_up = Counter(node.inputs[0] for node in graph.nodes if node.op in _LOOKUPS and node.inputs)
    names = (name for name, times in looked_up.items() if times == used[name])
    return [
        one for name in names if (one := graph.weights.get(name)) is not None and one.external is not None
    ]


def _cache_shape(shown: str, graph: Graph, config: FolderConfig) -> CacheShape:
    names: dict[str, set[tuple[int, str]]] = {"past_key_values": set(), "present": set()}
    for name in (*graph.inputs, *graph.outputs):
        if found := _CACHE.fullmatch(name):
            names[found[1]].add((int(found[2]), found[3]))
    past = names["past_key_values"]
    layers = len(past) // 2
    if not past:
        raise EdgespecError(
            f"{shown} has no inputs for a cache (past_key_values.0.key and so on): export it with one"
        )
    if past != names["present"] or past != {(i, kind) for i in range(layers) for kind in ("key", "value")}:
        raise EdgespecError(f"{shown} has inputs and outputs for its cache that do not match: {AGAIN}")
    if layers > _MAX_LAYERS:
        raise EdgespecError(f"{shown} has more than {_MAX_LAYERS} layers: {AGAIN}")
    shapes = {kind: _pair(shown, graph, config, kind, layers) for kind in ("key", "value")}
    types = {graph.inputs[f"past_key_values.{i}.{kind}"].type for i, kind in past}
    if len(types) != 1 or shapes["key"][0] != shapes["value"][0]:
        raise EdgespecError(f"{shown} has a cache whose layers differ: choose a model with equal ones")
    kind = _type(shown, graph.inputs["past_key_values.0.key"], ("float32", "float16"))
    return CacheShape(layers, shapes["key"][0], shapes["key"][1], shapes["value"][1], kind)


def _pair(shown: str, graph: Graph, config: FolderConfig, kind: str, layers: int) -> tuple[int, int]:
    """Return the number of heads and the head size of all keys or all values."""
    found = set()
    for i in range(layers):
        for value in (graph.inputs[f"past_key_values.{i}.{kind}"], graph.outputs[f"present.{i}.{kind}"]):
            shape: Sequence[int | str] = value.shape or ()
            if len(shape) != 4:
                raise EdgespecError(f"{shown} has a cache of {len(shape)} dimensions instead of 4: {AGAIN}")
            heads = (
                shape[1]
                if isinstance(shape[1], int)
                else config.number("num_key_value_heads", "num_key_value_heads")
            )
            size = shape[3] if isinstance(shape[3], int) else config.head_size
            if (isinstance(shape[0], int) and shape[0] != 1) or isinstance(shape[2], int):
                raise EdgespecError(f"{shown} has a cache of fixed length: export it with one that grows")
            found.add((heads, size))
    if len(found) != 1 or not all(0 < n <= 1 << 14 for n in next(iter(found))):
        raise EdgespecError(f"{shown} has no shape for its cache, or several: {AGAIN}")
    return found.pop()


def _shares(graph: Graph, layers: int) -> bool:
    """Whether each layer's cache is used by GroupQueryAttention only, which can extend it in place."""
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
    """Return the number of positions in the tables of rotary embeddings, which are not bounds-checked."""
    rows = [
        weight.shape[0]
        for node in graph.nodes
        if node.op == "GroupQueryAttention" and len(node.inputs) > 8
        for weight in (graph.weights.get(node.inputs[7]), graph.weights.get(node.inputs[8]))
        if weight is not None and weight.shape
    ]
    return min(rows, default=_MAX_CONTEXT)


def _type(shown: str, value: GraphValue, allowed: Sequence[str]) -> str:
    name = TYPES.get(value.type, ("unknown", 0))[0]
    if name not in allowed:
        raise EdgespecError(f"{shown} has {value.name} of type {name}: export it with {' or '.join(allowed)}")
    return name
