"""Which drafters that come with a model draft for it: by what is in the files, not by their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgespec.core import EdgespecError, common_prefix
from edgespec.models.gguf.check import GgufSummary, check_gguf, read_architecture, read_arrays
from edgespec.models.hub.store import model_folders

ARCHITECTURES = ("qwen35", "qwen35moe")
DRAFTERS = ("eagle3", "gemma4-assistant", "dflash")
"""Architectures of files that only draft for a model they were made for."""

HEAD_KEY = "edgespec.head_of"
"""Metadata key of a head file: the tokenizer digest of the targets that it drafts for."""

STAND_INS = "edgespec.stand_ins"
"""Metadata key of a head file: for each id of the target's vocabulary the row that is evaluated for it."""

# Architectures whose inner rows llama.cpp gives; asked for those of another it ends the process.
_TAPPED = ("llama", "qwen3", "qwen3moe", "qwen35", "qwen35moe", "gpt-oss", "gemma4")
_EMBEDDING, _OUTPUT, _MAP = "token_embd.weight", "output.weight", "d2t"


def heads(summary: GgufSummary) -> int:
    """Return how many layers for multi-token prediction a file has that can be used."""
    return summary.number("nextn_predict_layers") if summary.architecture in ARCHITECTURES else 0


def head_prefixes(summary: GgufSummary) -> tuple[str, ...]:
    """Return what the names of these layers' tensors begin with."""
    stop = summary.number("block_count")
    return tuple(f"blk.{i}." for i in range(stop - heads(summary), stop))


def is_head(path: Path) -> bool:
    """Whether `path` is a drafter that only drafts for a model it was made for. Raises EdgespecError."""
    if path.suffix != ".gguf":
        return False
    summary = check_gguf(path)
    return HEAD_KEY in summary.metadata or summary.architecture in DRAFTERS


def difference(path: Path, target: GgufSummary) -> str | None:
    """Return why the drafter in `path` does not fit a target, None if it does. Raises EdgespecError.

    llama.cpp compares little of this: it would end the process, or read what is not there. Tokens are
    counted, not compared.
    """
    summary = check_gguf(path)
    match summary.architecture:
        case "eagle3":
            return _eagle3_difference(path, summary, target)
        case "gemma4-assistant":
            return _assistant_difference(path, summary, target)
        case "dflash":
            return _dflash_difference(path, summary, target)
    return _mtp_difference(summary, target)


def head_for(target: Path, engine: str = "llama.cpp") -> Path | None:
    """Return a drafter made for `target` in its folder or a models folder, else `target` if it has one.

    `engine` runs the target: ik gives no inner rows, which only prediction layers do without.
    """
    summary = check_gguf(target)
    for path in _candidates(target, summary):
        try:
            if engine == "ik" and check_gguf(path).architecture in DRAFTERS:
                continue
            if difference(path, summary) is None and _same_tokens(path, summary):
                return path
        except EdgespecError:
            continue
    return target if heads(summary) else None


def target_layers(path: Path) -> tuple[int, ...]:
    """Return the layers of the target whose inputs a drafter reads. Raises EdgespecError."""
    arrays = read_arrays(path, f"{check_gguf(path).architecture}.target_layers")
    return tuple(int(one) for array in arrays.values() for one in array)


def _candidates(target: Path, summary: GgufSummary) -> Iterator[Path]:
    """Yield the files that may be its drafter, those in its folder and named like it first."""
    pulled = (path for folder in model_folders() for path in sorted(folder.glob("*--*")) if path.is_dir())
    for folder in dict.fromkeys([target.parent, *model_folders(), *pulled]):
        for path in sorted(folder.glob("*.gguf"), key=lambda one: (-_alike(one, target), one.name)):
            try:
                architecture = read_architecture(path)
            except EdgespecError:
                continue
            head_file = summary.architecture in ARCHITECTURES and path.match("*.head-*.gguf")
            if path != target and (head_file or architecture in DRAFTERS):
                yield path


def _alike(one: Path, other: Path) -> int:
    return common_prefix(one.name.encode(), other.name.encode())


def _same_tokens(path: Path, target: GgufSummary) -> bool:
    summary = check_gguf(path)
    return target.tokenizer_digest in (summary.tokenizer_digest, summary.metadata.get(HEAD_KEY))


def _mtp_difference(head: GgufSummary, target: GgufSummary) -> str | None:
    if target.architecture not in ARCHITECTURES:
        return f"{target.architecture} models have no layer for multi-token prediction"
    if head.number("embedding_length") != target.number("embedding_length"):
        return "another width"
    return None if head.metadata.get(HEAD_KEY) == target.tokenizer_digest else "another vocabulary"


def _inner_difference(path: Path, head: GgufSummary, target: GgufSummary) -> str | None:
    """Why a drafter cannot read inner rows of a target, or use its embeddings and output head."""
    own, layers = head.tensors, target_layers(path)
    last = target.number("block_count") - target.number("nextn_predict_layers")
    if target.architecture not in _TAPPED:
        return f"llama.cpp gives no inner rows of {target.architecture} models"
    rows = own[_EMBEDDING].shape[-1] if _EMBEDDING in own else head.vocab_size
    if not target.vocab_size == head.vocab_size <= rows:
        return "another vocabulary"
    if not layers or not all(0 <= layer < last for layer in layers):
        return f"it reads the layers {layers} of {last}"
    if not _has_regular_heads(head) or head.number("nextn_predict_layers"):
        return "attention of another shape"
    return None if _MAP not in own or _has_good_map(path, head) else "its table d2t is damaged"


def _eagle3_difference(path: Path, head: GgufSummary, target: GgufSummary) -> str | None:
    width = target.number("embedding_length")
    borrows = not {_EMBEDDING, _OUTPUT} <= head.tensors.keys()
    if head.number("target_hidden_size") != width or (borrows and head.number("embedding_length") != width):
        return "another width"
    if len(target_layers(path)) != 3 or head.number("block_count") != 1:
        return "not one layer that reads three of the target"
    return _inner_difference(path, head, target)


def _dflash_difference(path: Path, head: GgufSummary, target: GgufSummary) -> str | None:
    mask, size = head.metadata.get("tokenizer.ggml.mask_token_id"), head.number("block_size")
    if head.number("embedding_length") != target.number("embedding_length"):
        return "another width"
    if not isinstance(mask, int) or not 0 <= mask < head.vocab_size or not 2 <= size <= 32:
        return f"a mask token {mask} and blocks of {size} tokens"
    arrays = read_arrays(path, "dflash.rope.dimension_sections")
    if head.number("hyper_connection.count") or "selector_hidden.weight" in head.tensors or arrays:
        return "only drafters with plain attention, or a Markov head, are supported"
    if head.number("attention.sliding_window") and not any(one[0] for one in _attention(path, head)):
        return "a window that no layer has"
    return _inner_difference(path, head, target)


def _assistant_difference(path: Path, head: GgufSummary, target: GgufSummary) -> str | None:
    if target.architecture != "gemma4":
        return f"assistants draft for gemma4 models, not for {target.architecture}"
    if head.number("embedding_length_out") != target.number("embedding_length"):
        return "another width"
    if head.vocab_size != target.vocab_size:
        return "another vocabulary"
    # Its layers with a window read the keys of the target's last layer but one, the others those of the last.
    last = [layer[:3] for layer in _attention(target.files[0], target)[-2:]]
    if [is_window for is_window, *_ in last] != [True, False]:
        return "the target's last layers are not one with a window and one without"
    for *keys, queries in _attention(path, head):
        if tuple(keys) not in last or not queries or not keys[1] or queries % keys[1]:
            return "attention of another shape"
    rotary = [
        (head.number(f"rope.dimension_count{kind}"), head.number(f"attention.key_length{kind}"))
        for kind in ("", "_swa")
    ]
    if any(count > size or count % 2 for count, size in rotary):
        return "attention of another shape"
    return None if head.number("nextn_predict_layers") == head.number("block_count") else "other layers"


def _attention(path: Path, summary: GgufSummary) -> list[tuple[int, ...]]:
    """Return for each layer whether it has a window, the number and size of its keys, and its queries."""
    arrays, layers = read_arrays(path, f"{summary.architecture}.attention."), summary.number("block_count")

    def by_layer(key: str) -> list[int]:
        array = arrays.get(f"{summary.architecture}.attention.{key}")
        return [summary.number(f"attention.{key}")] * layers if array is None else array.tolist()

    windows, keys, queries = map(by_layer, ("sliding_window_pattern", "head_count_kv", "head_count"))
    if not len(windows) == len(keys) == len(queries) == layers:
        raise EdgespecError(f"{path.name} is damaged (attention): download it again")
    size = {False: summary.number("attention.key_length"), True: summary.number("attention.key_length_swa")}
    return [
        (window, count, size[bool(window)], heads)
        for window, count, heads in zip(windows, keys, queries, strict=True)
    ]


def _has_regular_heads(head: GgufSummary) -> bool:
    queries, keys = head.number("attention.head_count"), head.number("attention.head_count_kv")
    if not keys or not queries or queries % keys or head.number("attention.key_length_swa"):
        return False
    size = head.number("attention.key_length") or head.number("embedding_length") // queries
    values = head.number("attention.value_length") or size
    rotary = head.number("rope.dimension_count") or size
    return size == values >= rotary and not rotary % 2


def _has_good_map(path: Path, head: GgufSummary) -> bool:
    """Whether the table from a drafter's rows to ids of the target stays within the vocabulary."""
    table = head.tensors[_MAP]
    if table.type != "I64" or _OUTPUT not in head.tensors:
        return False
    ids = table.mapped(path).view(np.int64)
    return bool(0 <= ids.min() <= ids.max() < head.vocab_size)
