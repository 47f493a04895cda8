"""EAGLE-3 drafters (arXiv 2503.01840): one layer in a file of its own, which reads inner rows of the target.

The rows of three layers of the target are fused into one by the drafter's encoder. Its layer evaluates each
token with the fused row of the token before; it continues with rows of its own (llama.cpp,
docs/speculative.md). Embeddings and output head may be the target's. With `d2t` the head has only some ids;
logits of the others are -inf.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgespec.core import Cancelled, EdgespecError, Logits
from edgespec.models.gguf.heads import target_layers
from edgespec.models.gguf.hidden import HeadDrafter, HeadModel, Rows
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.native import Handle, RowBatch


class Eagle3Drafter(HeadDrafter):
    """Drafts with an EAGLE-3 layer. Its cache begins at the second token: no row is left of the first."""

    source = "eagle3"

    def reads_whole(self, context: Sequence[int]) -> bool:
        return self._view(context)[0] <= 1

    def _view(self, context: Sequence[int]) -> tuple[int, int]:
        start, held = super()._view(context)
        return (start, held) if start or len(context) < 2 else (1, 0)


class Eagle3Model(HeadModel):
    """An EAGLE-3 layer with the interface of a draft model."""

    drafter = Eagle3Drafter

    def __init__(
        self, path: Path, target: LlamaModel, progress: Callable[[float], bool] | None = None
    ) -> None:
        """Open the layer in `path`. Raises EdgespecError if it is damaged or not for `target`."""
        self.layers = target_layers(path)
        # Its graph computes logits for every row, so that a larger batch would only take memory.
        rows = target.options.max_rows
        options = replace(target.options, batch=rows)
        super().__init__(path, target, options, progress)
        width = len(self.layers) * target.summary.number("embedding_length")
        self._features = RowBatch(self._batch.capacity, type(self._batch.struct), width)
        # The encoder has no positions, but those of a batch must continue the cache's: the engine sets them.
        self._features.struct.token = self._features.struct.pos = None
        self._unwanted = 0  # rows of the last batch before those that are wanted

    def encoded(self, rows: Rows) -> Rows:
        context, batch = self._contexts[0], self._features
        batch.clear()
        batch.add_rows(0, 0, rows, len(rows))
        code: int = self._C.llama_encode(context, batch.struct)
        if self._abort[0] != b"\0":
            self.uncancel()
            raise Cancelled
        if code:
            raise EdgespecError(
                f"{self.library.name} cannot evaluate {self.path.name} (code {code}){self.library.last_log()}"
            )
        width = self.summary.number("embedding_length")
        return self.library.rows(context, 0, len(rows), width).copy()

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        # The graph has a row of logits for each token and the engine copies the first ones, not those wanted.
        ((sequence, new, last),) = parts
        self._unwanted = len(new) - last
        super()._decode([(sequence, new, len(new))])

    def _logits(self, context: Handle, rows: int) -> Logits:
        return super()._logits(context, self._unwanted + rows)[self._unwanted :]

    def _new_context(self) -> Handle:
        context = self.library.new_context(
            self._model, self.path, self.options, 1, 0, 0, self.summary.types.keys(), self._abort,
            other=self._target._contexts[0],
        )  # fmt: skip
        self.library.keep_rows(context)
        return context
