"""Layers for multi-token prediction (MTP) as drafters: in the target's file or in one of their own.

Such a layer evaluates each token with the target's row for the token before, from before its output head
(DeepSeek-V3, arXiv 2412.19437, section 2.2; llama.cpp, docs/speculative.md): see `hidden`.

A head file has only the layer and the most useful ids of the vocabulary, named by their numbers in the
target's, "0" to "248319"; `quant.head` writes it. Its logits of other ids are -inf, and these are evaluated
as the ids in `STAND_INS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgespec.core import EdgespecError, Ids, Logits
from edgespec.models.gguf.check import GgufSummary, read_arrays
from edgespec.models.gguf.heads import STAND_INS, head_prefixes
from edgespec.models.gguf.hidden import HeadDrafter, HeadModel, mismatch
from edgespec.models.gguf.kept_ids import SpreadLogits, kept_ids
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import BackendName, Handle, LlamaOptions


class MtpDrafter(HeadDrafter):
    """Drafts with a layer for multi-token prediction."""

    source = "mtp"


class MtpModel(HeadModel):
    """A layer for multi-token prediction with the interface of a draft model."""

    drafter = MtpDrafter

    def __init__(
        self,
        path: Path,
        target: LlamaModel,
        progress: Callable[[float], bool] | None = None,
    ) -> None:
        """Open the layer in `path`, which is the target's own file or a head file. Raises EdgespecError."""
        # A head file runs on llama.cpp, also for a target on another engine: only the rows are exchanged.
        engine: BackendName = "llama.cpp"
        options = replace(target.options, engine=engine, mtp=True)
        super().__init__(path, target, options, progress)
        try:
            self._spread: SpreadLogits | None = None
            self._stand_ins: Ids | None = None
            if self._shared:
                self.summary = _layer_of(self.summary)  # its passes cost what the layer costs
            else:
                ids, self._stand_ins = self._vocabulary()
                self._spread = SpreadLogits(ids, self.options.max_rows, target.vocab.size)
                self.summary = replace(self.summary, tokenizer_digest=target.summary.tokenizer_digest)
            self.vocab, self._input_size = target.vocab, target.vocab.size
        except BaseException:
            self.close()
            raise

    @property
    def _shared(self) -> bool:
        """Whether the layer is part of the target's file."""
        return self.path == self._target.path

    def _vocabulary(self) -> tuple[Ids, Ids]:
        """Return the ids of the file's rows, and the row for each id of the target."""
        path, size = self.path, self._target.vocab.size
        ids = kept_ids(self.vocab, size)
        if ids is None:
            raise mismatch(path, self._target, "not a head file")
        stand_ins: Ids = read_arrays(path, STAND_INS).get(STAND_INS, np.zeros(0)).astype(np.int64)
        if len(stand_ins) != size or not 0 <= stand_ins.min() <= stand_ins.max() < len(ids):
            raise EdgespecError(f"{path.name} is damaged ({STAND_INS}): create it again")
        return ids, stand_ins

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        answers = super().forward(requests)
        return answers if self._spread is None else self._spread(answers)

    def _ids(self, new: Sequence[int]) -> Sequence[int]:
        return new if self._stand_ins is None else self._stand_ins[np.array(new)].tolist()

    def close(self) -> None:
        if self._shared:
            self._model = None  # the target's
        super().close()

    def _load(self, progress: Callable[[float], bool] | None) -> Handle:
        return self._target._model if self._shared else super()._load(progress)

    def _fitting(self, note: Callable[[str], None]) -> LlamaOptions:
        return self.options if self._shared else super()._fitting(note)

    def _new_context(self) -> Handle:
        context = self.library.new_context(
            self._model, self.path, self.options, 1, 0, 0, self.summary.types.keys(), self._abort, head=True
        )
        self.library.keep_rows(context)
        return context


def _layer_of(summary: GgufSummary) -> GgufSummary:
    """Return `summary` with only the tensors that the layer reads."""
    output = "output.weight" if "output.weight" in summary.tensors else "token_embd.weight"
    read = output, *head_prefixes(summary)
    return summary.only({name: one for name, one in summary.tensors.items() if name.startswith(read)})
