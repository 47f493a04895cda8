"""Model runtimes behind one interface, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from edgespec.core import LanguageModel, Logits, Progress
from edgespec.models.gguf.runtime import GgufRuntime
from edgespec.models.gguf.selftest import warn
from edgespec.models.onnx.runtime import OnnxRuntime
from edgespec.models.options import Options
from edgespec.models.vocab import Vocabulary


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


class Runtime(Protocol):
    """One kind of model: how it is recognized, checked and loaded. Its methods raise EdgespecError."""

    @property
    def options(self) -> type[Any]:
        """The class of its options, an Options."""

    def accepts(self, path: Path) -> bool:
        """Whether `path` is of this kind, by its name or what is in the folder."""

    def check(self, path: Path) -> Summary:
        """What the file or folder contains, without running any of it."""

    def settled(
        self, path: Path, options: Any, progress: Progress | None, note: Callable[[str], None]
    ) -> Any:
        """The options that `path` will be loaded with if asked for with `options`."""

    def load(
        self,
        path: Path,
        options: Any,
        progress: Progress | None,
        note: Callable[[str], None],
        draft_of: Path | None = None,
        drafts: bool = False,
    ) -> Model:
        """Check and load it. `drafts`: as a draft model, which may be a trimmed one of `draft_of`."""

    def cost_key(self, options: Any) -> tuple[object, ...]:
        """What the cost of a forward pass depends on, apart from the model."""

    def cost_prior(self, types: Mapping[str, int], options: Any) -> Mapping[int, float]:
        """What a batch of n rows costs relative to one, before it is measured; `types`: bytes by type."""


RUNTIMES: list[Runtime] = [OnnxRuntime(), GgufRuntime()]
"""In the order in which they are asked; the last one accepts anything."""


def runtime_of(path: Path) -> Runtime:
    return next(one for one in RUNTIMES if one.accepts(path))


def runtime_for(options: Options) -> Runtime:
    """The runtime that `options` are of."""
    return next(one for one in RUNTIMES if isinstance(options, one.options))


def check_model(path: Path) -> Summary:
    """Check the file or folder at `path`. Raises EdgespecError."""
    return runtime_of(path).check(path)


def load_model(
    path: Path,
    options: Options | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
) -> Model:
    """Check and load what is at `path`, with `options` of its kind.

    `progress` returns False to stop it; `note` receives what went otherwise than asked for. Raises
    EdgespecError, or Cancelled when stopped.
    """
    return runtime_of(path).load(path, options_for(path, options), progress, note)


def load_draft(
    path: Path,
    options: Options | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
    source: Path | None = None,
) -> Model:
    """The same for a draft model, which may be a trimmed one of `source`."""
    return runtime_of(path).load(path, options_for(path, options), progress, note, source, drafts=True)


def settled(
    path: Path,
    options: Options,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
) -> Options:
    """The options that what is at `path` will be loaded with if asked for with `options`, of its kind."""
    return cast(Options, runtime_of(path).settled(path, options, progress, note))


def options_for(path: Path, options: Options | None) -> Options:
    """`options`, or those of the kind that `path` needs with what all kinds have."""
    kind = runtime_of(path).options
    if options is not None and isinstance(options, kind):
        return options
    common = {field.name: getattr(options, field.name) for field in fields(Options)} if options else {}
    return cast(Options, kind(**common))
