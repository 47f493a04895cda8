"""Which layers for multi-token prediction draft for a model: by what is in the files, not by their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import GgufSummary, check_gguf

ARCHITECTURES = ("qwen35", "qwen35moe")
HEAD_KEY = "edgespec.head_of"
"""Metadata key of a head file: the tokenizer digest of the targets that it drafts for."""

STAND_INS = "edgespec.stand_ins"
"""Metadata key of a head file: for each id of the target's vocabulary the row that is evaluated for it."""


def heads(summary: GgufSummary) -> int:
    """Return how many layers for multi-token prediction a file has that can be used."""
    return summary.number("nextn_predict_layers") if summary.architecture in ARCHITECTURES else 0


def head_prefixes(summary: GgufSummary) -> tuple[str, ...]:
    """Return what the names of these layers' tensors begin with."""
    stop = summary.number("block_count")
    return tuple(f"blk.{i}." for i in range(stop - heads(summary), stop))


def is_head(path: Path) -> bool:
    """Whether `path` is a head file. Raises EdgespecError."""
    return path.suffix == ".gguf" and HEAD_KEY in check_gguf(path).metadata


def drafts_for(head: GgufSummary, target: GgufSummary) -> bool:
    """Whether a head file has the width and the vocabulary of a target."""
    same = head.number("embedding_length") == target.number("embedding_length")
    return same and head.metadata.get(HEAD_KEY) == target.tokenizer_digest


def head_for(target: Path, folders: Iterable[Path] = ()) -> Path | None:
    """Return a head file in the folder of `target` or in `folders`, else `target` if it has such a layer.

    None if there is none.
    """
    summary = check_gguf(target)
    if summary.architecture not in ARCHITECTURES:
        return None
    found = {path for folder in (target.parent, *folders) for path in folder.glob("*.head-*.gguf")}
    for path in sorted(found, key=lambda one: (not one.name.startswith(target.stem), one)):
        try:
            if drafts_for(check_gguf(path), summary):
                return path
        except EdgespecError:
            continue
    return target if heads(summary) else None
