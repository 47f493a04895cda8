"""A sequence of an ONNX model, with its KV cache: arrays that the graph reads and writes in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError, Logits

if TYPE_CHECKING:
    from edgespec.models.onnx.check import OnnxSummary
    from edgespec.models.onnx.vocab import OnnxVocab


class Owner(Protocol):
    """The part of OnnxModel that a sequence uses."""

    vocab: OnnxVocab
    summary: OnnxSummary
    context_length: int

    def forward(self, requests: Sequence[tuple[OnnxSequence[Any], Sequence[int], int]]) -> list[Logits]: ...
    def release(self, sequence: OnnxSequence[Any]) -> None: ...
    def new_binding(self) -> Any: ...


M = TypeVar("M", bound=Owner, covariant=True)


class OnnxSequence(Generic[M]):
    """A sequence of an OnnxModel, with its KV cache: a LanguageModel."""

    def __init__(self, model: M, sequence_id: int) -> None:
        self.model, self.id = model, sequence_id
        self.vocab_size = model.vocab.size
        self._tokens: list[int] = []
        self._binding: Any = None
        shape, summary = model.summary.cache, model.summary
        self._shares = summary.shares_cache_buffer
        self._sizes = [size for _ in range(shape.layers) for size in (shape.key_size, shape.value_size)]
        self._names = [f"{i}.{kind}" for i in range(shape.layers) for kind in ("key", "value")]
        numbers = [shape.heads * model.context_length * size for size in self._sizes]
        try:
            # Pages are allocated when written, so that a cache takes only the memory in use.
            self._now = [np.zeros(n, shape.type) for n in numbers]
            self._next = [] if self._shares else [np.zeros(n, shape.type) for n in numbers]
        except MemoryError:
            raise EdgespecError(
                f"not enough memory for a context of {model.context_length} tokens of {summary.name}: "
                "choose a smaller --context"
            ) from None
        self._stored = 0  # tokens in the arrays if they are contiguous; at least len(tokens)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        return self.model.forward([(self, new, last)])[0]

    def rollback(self, length: int) -> None:
        del self._tokens[length:]

    def reachable(self, length: int) -> int:
        return min(length, len(self._tokens))

    def mark_at(self, lengths: Iterable[int]) -> None:
        """Do nothing: any number of tokens can be taken back."""

    def share(self, other: OnnxSequence[M], length: int) -> bool:
        """Copy the first `length` tokens of `other`, at memory speed."""
        if other is self:
            return False
        self._take(other._tokens[:length], [part[:, :length] for part in other._held()])
        return True

    def state(self) -> npt.NDArray[np.uint8]:
        """Return a copy of the KV cache, for `restore`: uint8, as many bytes as its tokens take."""
        parts = [np.ascontiguousarray(part[:, : len(self._tokens)]) for part in self._held()]
        return np.concatenate([part.reshape(-1).view(np.uint8) for part in parts])

    def restore(self, tokens: Sequence[int], data: npt.NDArray[np.uint8]) -> bool:
        """Restore `tokens`, whose `state` was `data`. For invalid data, be empty and return False."""
        self.rollback(0)
        cache = self.model.summary.cache
        if len(tokens) > self.model.context_length or len(data) != len(tokens) * cache.bytes_per_token:
            return False
        parts, start = [], 0
        for size in self._sizes:
            count = cache.heads * len(tokens) * size
            flat = data[start : start + count * np.dtype(cache.type).itemsize].view(cache.type)
            parts.append(flat.reshape(cache.heads, len(tokens), size))
            start += flat.nbytes
        self._take(list(tokens), parts)
        return True

    def close(self) -> None:
        """Free its memory and release its id."""
        self.forget_buffers()
        self.model.release(self)

    def unbind(self) -> None:
        """Drop the binding, because its session has been replaced."""
        self._binding = None

    def forget_buffers(self) -> None:
        """Free the KV cache. The sequence must not be used afterwards."""
        self._binding = None
        self._now, self._next, self._tokens, self._stored = [], [], [], 0

    def _held(self) -> list[npt.NDArray[Any]]:
        """Return views [heads, positions, size] of each layer's keys and values."""
        length = self.model.context_length if self._shares else self._stored
        heads = self.model.summary.cache.heads
        return [
            flat[: heads * length * size].reshape(heads, length, size)
            for flat, size in zip(self._now, self._sizes, strict=True)
        ]

    def _take(self, tokens: list[int], parts: Sequence[npt.NDArray[Any]]) -> None:
        self._tokens, self._stored = tokens, len(tokens)
        for held, part in zip(self._held(), parts, strict=True):
            held[:, : len(tokens)] = part

    def bind(self, n: int) -> Any:
        """Return a binding with space for `n` more tokens in the cache."""
        heads = self.model.summary.cache.heads
        if self._shares:
            if self._binding is None:
                self._binding = self.model.new_binding()
                for name, part in zip(self._names, self._held(), strict=True):
                    bind_input(self._binding, f"past_key_values.{name}", part[None])
                    bind_output(self._binding, f"present.{name}", part[None])
            return self._binding
        # The graph copies past and new tokens to the other buffer, so rolled-back tokens are removed before.
        if self._stored != len(self._tokens):
            parts = [part[:, : len(self._tokens)] for part in self._held()]
            self._now, self._next = self._next, self._now
            self._take(self._tokens, parts)
        binding = self.model.new_binding()
        length = self._stored + n
        for name, part, flat, size in zip(self._names, self._held(), self._next, self._sizes, strict=True):
            bind_input(binding, f"past_key_values.{name}", part[None])
            present = flat[: heads * length * size].reshape(1, heads, length, size)
            bind_output(binding, f"present.{name}", present)
        return binding

    def took(self, new: Sequence[int]) -> None:
        """Record that the graph has added `new` to the cache."""
        if not self._shares:
            self._now, self._next = self._next, self._now
        self._tokens.extend(new)
        self._stored = len(self._tokens)


def bind_input(binding: Any, name: str, array: npt.NDArray[Any]) -> None:
    """Bind `array`, which must outlive the run, as an input."""
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def bind_output(binding: Any, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
