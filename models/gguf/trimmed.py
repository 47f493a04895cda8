"""Draft models whose output head has only some ids of the vocabulary, with the interface of a complete model.

The file is a regular GGUF with two differences. Its tokens are named after their ids in the source's
vocabulary, "0" to "151935". And its embeddings are the rows of its output head, so its input embeddings are
read from the source's file, which must be present.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from edgespec.core import EdgespecError, Logits
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.kept_ids import SpreadLogits, kept_ids
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import Handle, LlamaOptions, RowBatch
from edgespec.models.gguf.selftest import warn

TRIMMED_KEY = "edgespec.trimmed_from"
"""Metadata key of a trimmed draft model: the tokenizer digest of its source."""

SOURCE_NAME_KEY = "edgespec.source_name"
"""Metadata key of a trimmed draft model: the name of its source, a file in the same folder."""

EMBEDDING = "token_embd.weight"
_CACHED_ROWS = 4096


def open_draft(
    path: Path,
    options: LlamaOptions | None = None,
    progress: Callable[[float], bool] | None = None,
    source: Path | None = None,
    note: Callable[[str], None] = warn,
) -> LlamaModel:
    """Load the draft model in `path`. A trimmed one needs its `source`, by default in the same folder.

    Raises EdgespecError like LlamaModel, and for a trimmed draft model without its source.
    """
    metadata = check_gguf(path).metadata
    if TRIMMED_KEY not in metadata:
        return LlamaModel(path, options, progress, note)
    if source is None:
        name = str(metadata.get(SOURCE_NAME_KEY, ""))
        if not name.endswith(".gguf") or Path(name).name != name:  # must not lead out of the folder
            raise EdgespecError(f"{path.name} does not name its source: create it again")
        source = path.with_name(name)
    return TrimmedModel(path, source, options, progress, note)


class Embeddings:
    """The rows of a GGUF's input embeddings, mapped, and dequantized one at a time."""

    def __init__(self, path: Path, summary: GgufSummary) -> None:
        tensor = summary.tensors.get(EMBEDDING)
        if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != summary.vocab_size:
            raise EdgespecError(f"{path.name} has no embedding for each of its tokens: choose another source")
        self.width, self.size = tensor.shape
        self._data = tensor.mapped(path).reshape(self.size, -1)
        self._type = GGMLQuantizationType[tensor.type]
        self._row = lru_cache(_CACHED_ROWS)(self._read)

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embeddings of `ids`: float32 [len(ids), width]."""
        return np.stack([self._row(token) for token in ids])

    def _read(self, token: int) -> npt.NDArray[np.float32]:
        return np.asarray(dequantize(self._data[token], self._type), np.float32)


class TrimmedModel(LlamaModel):
    """A LlamaModel with all ids of its source. Trimmed ids are valid input; their logits are -inf."""

    def __init__(
        self,
        path: Path,
        source: Path,
        options: LlamaOptions | None = None,
        progress: Callable[[float], bool] | None = None,
        note: Callable[[str], None] = warn,
    ) -> None:
        """Load it. Raises EdgespecError if `path` is not trimmed, or not from `source`."""
        source_summary = check_gguf(source)
        super().__init__(path, options, progress, note)
        try:
            embeddings = Embeddings(source, source_summary)
            self.size = self._input_size = embeddings.size
            ids = kept_ids(self.vocab, self.size)
            # With another width the engine would read past the rows.
            if (
                ids is None
                or self.summary.metadata.get(TRIMMED_KEY) != source_summary.tokenizer_digest
                or self.summary.number("embedding_length") != embeddings.width
            ):
                raise EdgespecError(f"{path.name} was not made from {source.name}: create it again")
            # The target's vocabulary is compared with the source's, not with the names of the rows.
            self.summary = replace(self.summary, tokenizer_digest=source_summary.tokenizer_digest)
            kind = type(self._batch.struct)
            self._batch = _EmbeddingBatch(self._batch.capacity, kind, embeddings)
            self._spread = SpreadLogits(ids, self.options.max_rows, self.size)
        except BaseException:
            self.close()
            raise

    def _new_context(self) -> Handle:
        context = super()._new_context()
        if self.library.name == "ik":
            # Its first pass of one row reads a token id, also where the batch has embeddings instead.
            batch = self.library.batch(1)
            batch.add(0, 0, [0], 1)
            self._C.llama_decode(context, batch.struct)
            self._C.llama_synchronize(context)
            self.library.cut(context, 0, 0)
        return context

    def sequence(self) -> LlamaSequence:
        sequence = super().sequence()
        sequence.vocab_size = self.size
        return sequence

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        return self._spread(super().forward(requests))


class _EmbeddingBatch(RowBatch):
    """A batch of embedding rows in place of token ids."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], embeddings: Embeddings) -> None:
        super().__init__(capacity, kind, embeddings.width)
        self._embeddings = embeddings
        self.struct.token = None

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        start = self.struct.n_tokens
        super().add(sequence_id, position, new, last)
        self._embd[start : start + len(new)] = self._embeddings.rows(new)
