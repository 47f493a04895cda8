"""Model runtimes behind one interface: GGUF files on two native engines, ONNX folders on onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from edgespec.core import LanguageModel, Logits
from edgespec.models.gguf.backends import cost_key as gguf_cost_key
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.gguf.selftest import settle, warn
from edgespec.models.hub.store import is_onnx
from edgespec.models.onnx.check import check_onnx
from edgespec.models.onnx.model import OnnxModel, OnnxOptions
from edgespec.models.onnx.model import cost_key as onnx_cost_key
from edgespec.models.vocab import Vocabulary

Options = LlamaOptions | OnnxOptions
"""How a model is loaded. Both have context, threads, sequences, max_rows and batch."""


def cost_key(options: Options) -> tuple[object, ...]:
    """What the cost of a forward pass depends on, apart from the model."""
    return onnx_cost_key(options) if isinstance(options, OnnxOptions) else gguf_cost_key(options)


class Summary(Protocol):
    """What a checked model says about itself, by GgufSummary's names."""

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def tokenizer_digest(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def tensor_bytes(self) -> int: ...
    @property
    def types(self) -> Mapping[str, int]: ...
    @property
    def context_length(self) -> int | None: ...


class ModelSequence(LanguageModel, Protocol):
    """One conversation in a model."""

    @property
    def model(self) -> Model: ...

    def share(self, other: Any, length: int) -> bool:
        """Hold a copy of the first `length` tokens of `other`, of the same model. False where it cannot."""

    def state(self) -> npt.NDArray[np.uint8]:
        """A copy of what the cache holds, for `restore`."""

    def restore(self, tokens: Sequence[int], data: npt.NDArray[np.uint8]) -> bool:
        """Hold `tokens` again, whose `state` was `data`. False where it is refused: then it is empty."""

    def close(self) -> None: ...


class Model(Protocol):
    """The weights of one model, its vocabulary, and the caches of its sequences."""

    @property
    def path(self) -> Path: ...
    @property
    def options(self) -> Options: ...
    @property
    def summary(self) -> Summary: ...
    @property
    def vocab(self) -> Vocabulary: ...
    @property
    def build(self) -> str:
        """Engine, version and kernels: a measurement made under one build says nothing of another."""

    @property
    def context_length(self) -> int:
        """Tokens that each sequence holds."""

    @property
    def shares_passes(self) -> bool:
        """Several sequences are evaluated in one pass."""

    @property
    def on_cpu(self) -> bool:
        """Whether all of it is computed on the processor's own cores."""

    @property
    def fixed_threads(self) -> bool:
        """`set_threads` does nothing."""

    @property
    def threads(self) -> tuple[int, int]:
        """Compute threads for forward passes of one row and of several."""

    @property
    def rollback_refusal(self) -> str | None:
        """Why this model's memory cannot be cut, None if it can."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def cache_bytes(self) -> int:
        """What one sequence's cache takes when full."""

    def fingerprint(self) -> tuple[object, ...]:
        """What the state of a sequence fits: weights, build, cache types."""

    def sequence(self) -> ModelSequence: ...
    def set_threads(self, one_row: int, many_rows: int) -> None: ...
    def cancel(self) -> None: ...
    def uncancel(self) -> None: ...
    def forward(self, requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Logits]:
        """Evaluate (sequence of this model, new tokens, rows wanted) of several.

        The logits of each, (rows wanted, vocabulary), are views that the next call overwrites.
        """

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def check_model(path: Path) -> Summary:
    """Check the file or folder at `path`. Raises EdgespecError."""
    return check_onnx(path) if is_onnx(path) else check_gguf(path)


def load_model(
    path: Path,
    options: Options | None = None,
    progress: Callable[[float], bool] | None = None,
    say: Callable[[str], None] = warn,
) -> Model:
    """Check and load what is at `path`, with `options` of its kind.

    `progress` hears fractions from 0 to 1 and stops it by returning False; `say` hears what went otherwise
    than asked for. Raises EdgespecError, or Cancelled when stopped.
    """
    if is_onnx(path):
        return OnnxModel(path, options_for(path, options), progress, say)
    from edgespec.models.gguf.model import LlamaModel

    return LlamaModel(path, options_for(path, options), progress, say)


def load_draft(
    path: Path,
    options: Options | None = None,
    progress: Callable[[float], bool] | None = None,
    say: Callable[[str], None] = warn,
    source: Path | None = None,
) -> Model:
    """The same for a model that drafts, which may be a trimmed one of `source`."""
    if is_onnx(path):
        return load_model(path, options, progress, say)
    from edgespec.models.gguf.trimmed import open_draft

    return open_draft(path, options_for(path, options), progress, source, say)


def settled(
    path: Path,
    options: Options,
    progress: Callable[[float], bool] | None = None,
    say: Callable[[str], None] = warn,
) -> Options:
    """The options that what is at `path` will be loaded with if asked for with `options`, of its kind."""
    return options if isinstance(options, OnnxOptions) else settle(path, options, progress, say)


def options_for(path: Path, options: Options | None) -> Any:
    """`options`, or those of the kind that `path` needs with what both kinds have."""
    kind = OnnxOptions if is_onnx(path) else LlamaOptions
    if options is None or isinstance(options, kind):
        return options
    return kind(
        context=options.context,
        threads=options.threads,
        sequences=options.sequences,
        max_rows=options.max_rows,
        batch=options.batch,
    )
