"""Writes drafts with a smaller output head: see `models.gguf.trimmed`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from edgespec.core import EdgespecError, Ids
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.trimmed import EMBEDDING, SOURCE_NAME_KEY, TRIMMED_KEY
from edgespec.quant.copying import add_stored, stored, writing
from edgespec.quant.requant import require_space

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Architectures that do not scale embedding rows and may have one matrix for input and output."""

_HEAD = "output.weight"


def trim(whole: Path, source: Path, ids: Ids, out: Path) -> Path:
    """Write `whole` with an output head of the rows `ids` (ascending) only, and return `out`.

    `whole` is `source` or was requantized from it; `source` gives the embeddings when the draft runs. Raises
    EdgespecError for an architecture that cannot be run like this.
    """
    summary = check_gguf(whole)
    if summary.architecture not in ARCHITECTURES:
        raise EdgespecError(
            f"the vocabulary of {summary.architecture} models cannot be trimmed, only that of "
            f"{', '.join(ARCHITECTURES)}: leave out --vocabulary"
        )
    head = summary.tensors.get(_HEAD, summary.tensors[EMBEDDING])
    require_space(out.parent, summary.tensor_bytes)
    with writing(out, summary, source, ids) as writer:
        writer.add_file_type(int(summary.metadata.get("general.file_type", 0)))
        writer.add_string(SOURCE_NAME_KEY, source.name)
        writer.add_string(TRIMMED_KEY, check_gguf(source).tokenizer_digest)
        for name, tensor in summary.tensors.items():
            if name == EMBEDDING:
                add_stored(writer, name, stored(whole, head)[ids], head)
            elif name != _HEAD:
                add_stored(writer, name, stored(whole, tensor), tensor)
    return out


def coverage(ids: Ids, tokens: Iterable[int]) -> float:
    """Return the share of `tokens` that are among `ids`."""
    return float(np.isin(np.fromiter(tokens, np.int64), ids).mean())
