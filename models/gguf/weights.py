"""The weights of a GGUF file, loaded by an engine that can run them on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.footprint import fitting, refuse_cache_types
from edgespec.models.gguf.heads import DRAFTERS
from edgespec.models.gguf.lora import check_adapters
from edgespec.models.gguf.native import Handle, LlamaOptions
from edgespec.models.gguf.selftest import settle


class LlamaWeights:
    """A checked and loaded file. `options` are those that work here and for which there is memory."""

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes all of it."""
        return not (self.options.gpu_layers and self._C.llama_supports_gpu_offload())

    def __init__(
        self,
        path: Path,
        options: LlamaOptions,
        progress: Callable[[float], bool] | None,
        note: Callable[[str], None],
    ) -> None:
        """Check and load `path`: see LlamaModel."""
        self.path = path
        self.summary: GgufSummary = check_gguf(path)
        check_adapters(options.adapters, self.summary, path.name)
        self._choose(options, progress, note)
        self._model: Handle = None
        if reason := self.library.refusal_of_file(self.summary):
            raise EdgespecError(f"{path.name} {reason}")
        self._model = self._load(progress)
        try:
            if reason := self._refusal():
                raise EdgespecError(f"{path.name} {reason}")
            # Before the first context, whose buffers count the nodes of their graphs.
            load = self.library.load_adapter
            self._adapters = [(load(self._model, one.path), one.scale) for one in self.options.adapters]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the weights."""
        if self._model is not None:
            self._C.llama_model_free(self._model)
        self._model = None

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template: untrusted text."""
        template: bytes | None = self._C.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The scalars of the file's metadata: untrusted."""
        return self.summary.metadata

    @property
    def build(self) -> str:
        """Engine, version and instruction sets: see Backend."""
        return self.library.build

    def _settle(
        self, options: LlamaOptions, progress: Callable[[float], bool] | None, note: Callable[[str], None]
    ) -> LlamaOptions:
        return settle(self.path, options, progress, note)

    def _choose(
        self, options: LlamaOptions, progress: Callable[[float], bool] | None, note: Callable[[str], None]
    ) -> None:
        """Set engine and options: those nearest to `options` that work and for which there is memory."""
        self.options = self._settle(options, progress, note)
        self.library = library(self.options.engine)
        self._C = self.library.C
        refuse_cache_types(self.path.name, self.summary, self.options, self.library)
        if self.on_cpu:  # an accelerator's memory is not checked
            found = self._fitting(note)
            if found.type_k != self.options.type_k:  # other kernels, not tested yet
                self._choose(found, progress, note)
            else:
                self.options = found

    def _fitting(self, note: Callable[[str], None]) -> LlamaOptions:
        return fitting(self.path.name, self.summary, self.options, self.library, note)

    def _load(self, progress: Callable[[float], bool] | None) -> Handle:
        return self.library.load(self.path, self.options, progress)

    def _refusal(self) -> str | None:
        if self.summary.architecture in DRAFTERS:
            return "only drafts for the model it was made for: choose that one, and this with --draft"
        return self.library.refusal(self._model)

    def _is_hybrid(self) -> bool:
        """Whether it has recurrent layers."""
        return bool(
            self._C.llama_model_is_recurrent(self._model) or self._C.llama_model_is_hybrid(self._model)
        )
