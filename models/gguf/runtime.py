"""GGUF files as a runtime, on llama.cpp or ik_llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgespec.core import Progress
from edgespec.machine.sensors import compute_cores
from edgespec.models.cost_priors import relative_costs
from edgespec.models.gguf.backends import cost_key
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.gguf.selftest import settle

if TYPE_CHECKING:  # loads native code
    from edgespec.models.gguf.model import LlamaModel


class GgufRuntime:
    options = LlamaOptions

    def accepts(self, path: Path) -> bool:
        return True  # `check` refuses other files

    def check(self, path: Path) -> GgufSummary:
        return check_gguf(path)

    def settled(
        self, path: Path, options: LlamaOptions, progress: Progress | None, note: Callable[[str], None]
    ) -> LlamaOptions:
        return settle(path, options, progress, note)

    def load(
        self,
        path: Path,
        options: LlamaOptions,
        progress: Progress | None,
        note: Callable[[str], None],
        draft_of: Path | None = None,
        drafts: bool = False,
    ) -> LlamaModel:
        if drafts:
            from edgespec.models.gguf.trimmed import open_draft

            return open_draft(path, options, progress, draft_of, note)
        from edgespec.models.gguf.model import LlamaModel

        return LlamaModel(path, options, progress, note)

    def cost_key(self, options: LlamaOptions) -> tuple[object, ...]:
        return cost_key(options)

    def cost_prior(self, types: Mapping[str, int], options: LlamaOptions) -> Mapping[int, float]:
        _, many_rows = options.thread_counts(compute_cores())
        return relative_costs(options.engine, types, many_rows)
