"""Base classes for runtimes whose only state is a list of tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError, Logits
from edgespec.models.options import Options
from edgespec.models.vocab import Vocabulary


@dataclass(frozen=True)
class SimpleSummary:
    """Properties of a checked file; `types` maps a type to bytes of weights."""

    architecture: str
    vocab_size: int
    tokenizer_digest: str
    parameters: int
    types: dict[str, int] = field(default_factory=dict)
    context_length: int | None = None

    @property
    def tensor_bytes(self) -> int:
        return sum(self.types.values())


class SimpleModel(ABC):
    """A Model whose logits are a function of the tokens, which a subclass defines."""

    chat_template: str | None = None
    undo: int | None = None
    shares_passes, on_cpu, fixed_threads = False, True, True
    threads = 1, 1
    metadata: Mapping[str, Any] = MappingProxyType({})
    cache_bytes = state_bytes = 0

    def __init__(self, path: Path, options: Options, summary: SimpleSummary, vocab: Vocabulary) -> None:
        self.path, self.options, self.summary, self.vocab = path, options, summary, vocab
        self.context_length = options.context or summary.context_length or 4096

    @abstractmethod
    def next_logits(self, tokens: Sequence[int]) -> npt.ArrayLike:
        """Return the logits [vocab] of the token that follows `tokens`."""

    @property
    def build(self) -> str:
        """Name and version of the runtime. Measurements are valid for one build only."""
        return type(self).__name__

    def fingerprint(self) -> tuple[object, ...]:
        return self.build, str(self.path)

    def sequence(self) -> SimpleSequence:
        return SimpleSequence(self)

    def forward(self, requests: Sequence[tuple[Any, Sequence[int], int]]) -> list[Logits]:
        return [sequence.forward(new, last) for sequence, new, last in requests]

    def set_threads(self, one_row: int, many_rows: int) -> None:  # noqa: B027 - few have any
        """Do nothing: one thread computes."""

    def cancel(self) -> None:  # noqa: B027
        """Do nothing: a pass is short."""

    uncancel = close = cancel

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimpleSequence:
    """A sequence of a SimpleModel."""

    def __init__(self, model: SimpleModel) -> None:
        self.model = model
        self.vocab_size = model.vocab.size
        self._tokens: list[int] = []

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        if len(self._tokens) + len(new) > self.model.context_length:
            raise EdgespecError(f"context of {self.model.context_length} tokens is full: raise --context")
        self._tokens.extend(new)
        n = len(self._tokens)
        rows = [self.model.next_logits(self._tokens[:i]) for i in range(n - last + 1, n + 1)]
        return np.array(rows, np.float32)

    def rollback(self, length: int) -> None:
        del self._tokens[length:]

    def reachable(self, length: int) -> int:
        return min(length, len(self._tokens))

    def mark_at(self, lengths: Iterable[int]) -> None:
        """Do nothing: any number of tokens can be taken back."""

    def share(self, other: SimpleSequence, length: int) -> bool:
        self._tokens = list(other.tokens[:length])
        return True

    def state(self) -> npt.NDArray[np.uint8]:
        return np.zeros(0, np.uint8)

    def restore(self, tokens: Sequence[int], data: npt.NDArray[np.uint8]) -> bool:
        self._tokens = list(tokens)
        return True

    def close(self) -> None: ...
