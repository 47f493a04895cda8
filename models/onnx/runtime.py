"""ONNX folders as a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgespec.core import Progress
from edgespec.machine.sensors import compute_cores
from edgespec.models.cost_priors import relative_costs
from edgespec.models.hub.store import is_onnx
from edgespec.models.onnx.check import OnnxSummary, check_onnx
from edgespec.models.onnx.model import OnnxModel, OnnxOptions, cost_key


class OnnxRuntime:
    options = OnnxOptions

    def accepts(self, path: Path) -> bool:
        return is_onnx(path)

    def check(self, path: Path) -> OnnxSummary:
        return check_onnx(path)

    def settled(
        self, path: Path, options: OnnxOptions, progress: Progress | None, note: Callable[[str], None]
    ) -> OnnxOptions:
        return options

    def load(
        self,
        path: Path,
        options: OnnxOptions,
        progress: Progress | None,
        note: Callable[[str], None],
        draft_of: Path | None = None,
        drafts: bool = False,
    ) -> OnnxModel:
        return OnnxModel(path, options, progress, note)

    def cost_key(self, options: OnnxOptions) -> tuple[object, ...]:
        return cost_key(options)

    def cost_prior(self, types: Mapping[str, int], options: OnnxOptions) -> Mapping[int, float]:
        return relative_costs("onnx", types, options.threads or compute_cores())
