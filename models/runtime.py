"""The interface of model runtimes, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Properties of a checked model, with the names of GgufSummary."""

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
    """A sequence of tokens in a model, with its KV cache."""

    @property
    def model(self) -> Model: ...

    def reachable(self, length: int) -> int:
        """Return how many tokens `rollback` to `length` would leave."""

    def mark_at(self, lengths: Iterable[int]) -> None:
        """Make `rollback` to these numbers of tokens possible, once the cache holds as many."""

    def share(self, other: Any, length: int) -> bool:
        """Copy the first `length` tokens of `other`, or fewer, a sequence of the same model.

        Returns False if that is impossible.
        """

    def state(self) -> npt.NDArray[np.uint8]:
        """Return a copy of the KV cache, for `restore`."""

    def restore(self, tokens: Sequence[int], data: npt.NDArray[np.uint8]) -> bool:
        """Restore `tokens`, whose `state` was `data`. If refused, empty the sequence and return False."""

    def close(self) -> None: ...


class Model(Protocol):
    """The weights of one model, its vocabulary, and the KV caches of its sequences."""

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
        """Engine, version and kernels. Measurements are valid for one build only."""

    @property
    def context_length(self) -> int:
        """Capacity of each sequence, in tokens."""

    @property
    def shares_passes(self) -> bool:
        """Whether several sequences are evaluated in one forward pass."""

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU computes all of it."""

    @property
    def fixed_threads(self) -> bool:
        """Whether `set_threads` has no effect."""

    @property
    def threads(self) -> tuple[int, int]:
        """Compute threads for forward passes of one row and of several."""

    @property
    def undo(self) -> int | None:
        """How many rows of a pass can be taken back at once; more are evaluated again. None: any number."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the model's own files say of it, by GGUF key: `general.sampling.temp`. Untrusted."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of one full KV cache."""

    @property
    def state_bytes(self) -> int:
        """The most bytes that the state of a sequence takes."""

    def fingerprint(self) -> tuple[object, ...]:
        """Return what a saved state depends on: weights, build, cache types."""

    def sequence(self) -> ModelSequence: ...
    def set_threads(self, one_row: int, many_rows: int) -> None: ...
    def cancel(self) -> None: ...
    def uncancel(self) -> None: ...
    def forward(self, requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Logits]:
        """Evaluate requests, each (sequence of this model, new tokens, rows wanted).

        Returns logits [rows wanted, vocabulary] for each: views that the next call overwrites.
        """

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def refusal_as_draft(model: Model) -> str | None:
    """Return why `model` cannot draft, None if it can."""
    if model.undo is None:
        return None
    return (
        f"{model.summary.architecture} models keep a running state, which a draft model would copy per token"
    )


class Runtime(Protocol):
    """A model format: how it is recognized, checked and loaded. Its methods raise EdgespecError."""

    @property
    def options(self) -> type[Any]:
        """The subclass of Options that this runtime takes."""

    def accepts(self, path: Path) -> bool:
        """Whether `path` has this format, by its name or the files in the folder."""

    def check(self, path: Path) -> Summary:
        """Check the file or folder without executing any of it, and summarize it."""

    def settled(
        self, path: Path, options: Any, progress: Progress | None, note: Callable[[str], None]
    ) -> Any:
        """Return the options that `path` will be loaded with when `options` are requested."""

    def load(
        self,
        path: Path,
        options: Any,
        progress: Progress | None,
        note: Callable[[str], None],
        draft_of: Path | None = None,
        drafts: bool = False,
    ) -> Model:
        """Check and load `path`. `drafts`: as a draft model, possibly one trimmed from `draft_of`."""

    def cost_key(self, options: Any) -> tuple[object, ...]:
        """Return what the cost of a forward pass depends on, apart from the model."""

    def cost_prior(self, types: Mapping[str, int], options: Any) -> Mapping[int, float]:
        """Return the cost of n rows relative to one, until it is measured; `types`: bytes by type."""


RUNTIMES: list[Runtime] = [OnnxRuntime(), GgufRuntime()]
"""Tried in this order; the last one accepts any path."""


def runtime_of(path: Path) -> Runtime:
    return next(one for one in RUNTIMES if one.accepts(path))


def runtime_for(options: Options) -> Runtime:
    """Return the runtime that takes `options`."""
    return next(one for one in RUNTIMES if isinstance(options, one.options))


def check_model(path: Path) -> Summary:
    """Check the file or folder at `path` and summarize it. Raises EdgespecError."""
    return runtime_of(path).check(path)


def load_model(
    path: Path,
    options: Options | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
) -> Model:
    """Check and load the model at `path`, with `options` of its runtime.

    `progress` returns False to stop loading; `note` receives one line for each deviation from `options`.
    Raises EdgespecError, or Cancelled if stopped.
    """
    return runtime_of(path).load(path, options_for(path, options), progress, note)


def load_draft(
    path: Path,
    options: Options | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
    source: Path | None = None,
) -> Model:
    """Check and load a draft model, possibly one trimmed from `source`; see `load_model`."""
    return runtime_of(path).load(path, options_for(path, options), progress, note, source, drafts=True)


def settled(
    path: Path,
    options: Options,
    progress: Progress | None = None,
    note: Callable[[str], None] = warn,
) -> Options:
    """Return the options that `path` will be loaded with when `options`, of its runtime, are requested."""
    return cast(Options, runtime_of(path).settled(path, options, progress, note))


def options_for(path: Path, options: Options | None) -> Options:
    """Return `options`, converted if `path` needs another runtime: then the shared fields are kept."""
    kind = runtime_of(path).options
    if options is not None and isinstance(options, kind):
        return options
    common = {field.name: getattr(options, field.name) for field in fields(Options)} if options else {}
    return cast(Options, kind(**common))
