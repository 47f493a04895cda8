"""GGUF models on llama.cpp or ik_llama.cpp.

A `LlamaModel` owns the weights; each of its `LlamaSequence`s is a LanguageModel with its own KV cache. Only
`cancel` is thread-safe.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from edgespec.core import Cancelled, EdgespecError, Logits
from edgespec.models.gguf.footprint import gguf_cache, running_state
from edgespec.models.gguf.lora import adapters_key
from edgespec.models.gguf.native import Handle, LlamaOptions
from edgespec.models.gguf.native_cache import NativeCache, RowStore
from edgespec.models.gguf.running_state import AnyLength, Blob, RunningState, most_bytes, wanted_snapshots
from edgespec.models.gguf.selftest import warn
from edgespec.models.gguf.vocab import LlamaVocab
from edgespec.models.gguf.weights import LlamaWeights
from edgespec.models.hub.store import file_sample

__all__ = ["LlamaModel", "LlamaOptions", "LlamaSequence"]


class LlamaModel(LlamaWeights):
    """The weights of one GGUF file, its vocabulary, and the KV caches of its sequences."""

    fixed_threads = False

    def __init__(
        self,
        path: Path,
        options: LlamaOptions | None = None,
        progress: Callable[[float], bool] | None = None,
        note: Callable[[str], None] = warn,
    ) -> None:
        """Check and load `path`. `progress` receives fractions from 0 to 1 and returns False to stop loading.

        Options that failed in a trial on this processor are replaced; then `note` receives a line. Raises
        EdgespecError if the file is damaged, unsupported or too large, Cancelled if stopped.
        """
        # One context, or if they share no passes, one per sequence, created by the first that needs it.
        self._contexts: dict[int, Handle] = {}
        super().__init__(path, options or LlamaOptions(), progress, note)
        options = self.options
        try:
            self.is_hybrid = self._is_hybrid()
            self.vocab = LlamaVocab(self.library, self._model)
            self._input_size = self._output_size = self.vocab.size  # ids evaluated; logits of a row
            self._abort = ctypes.create_string_buffer(2)
            context = self._contexts[0] = self._new_context()
        except BaseException:
            self.close()
            raise
        self._streams = options.sequences if self.shares_passes else 1  # caches in one context
        self.context_length: int = self._C.llama_n_ctx(context) // self._streams
        self._batch_size: int = self._C.llama_n_batch(context)
        self._batch = self.library.batch(self._batch_size)
        self._free_ids = list(range(options.sequences))
        get = self._C.llama_n_threads, self._C.llama_n_threads_batch
        self.threads: tuple[int, int] = get[0](context), get[1](context)

    @property
    def shares_passes(self) -> bool:
        """Whether all sequences are in one context. With recurrent layers AMX kernels would be wrong."""
        return self.library.shares_passes and not self.is_hybrid

    def fingerprint(self) -> tuple[object, ...]:
        """Return what a saved state depends on: engine build, cache types, caches in one context, weights."""
        options, summary = self.options, self.summary
        return (
            self.build, options.type_k, options.type_v, options.flash_attention, self._streams,
            self.path.stat().st_size, summary.tokenizer_digest,
            sorted((name, one.offset) for name, one in summary.tensors.items()),
            *(file_sample(file) for file in summary.files), *adapters_key(options.adapters),
        )  # fmt: skip

    @property
    def cache_bytes(self) -> int:
        """Bytes of one full KV cache: keys and values of every layer and position."""
        return gguf_cache(self.summary, self.options, self.context_length)

    @property
    def state_bytes(self) -> int:
        """The most bytes that the state of a sequence takes."""
        return 2 * self.cache_bytes + most_bytes(running_state(self.summary)) + (1 << 20)

    @property
    def undo(self) -> int | None:
        """How many rows of a pass can be taken back at once; more are evaluated again. None: any number."""
        return self.library.snapshots(self._contexts[0]) if self.is_hybrid else None

    def sequence(self) -> LlamaSequence:
        """Return a new, empty sequence. Raises EdgespecError if all are in use or memory is too small."""
        return LlamaSequence(self, self._take_id(), self.undo)

    def _take_id(self) -> int:
        """Return the id of a free sequence, whose context exists."""
        if not self._free_ids:
            raise EdgespecError(f"all {self.options.sequences} sequences of this model are in use: close one")
        first = self._free_ids[0]
        if not self.shares_passes and first not in self._contexts:
            self._contexts[first] = self._new_context()
            self._C.llama_set_n_threads(self._contexts[first], *self.threads)
        return self._free_ids.pop(0)

    def set_threads(self, one_row: int, many_rows: int) -> None:
        """Change the thread counts for forward passes of one row and of several."""
        if (one_row, many_rows) != self.threads:
            for context in self._contexts.values():
                self._C.llama_set_n_threads(context, one_row, many_rows)
            self.threads = (one_row, many_rows)

    def cancel(self) -> None:
        """Stop the current forward pass, or else the next. Safe in any thread and in signal handlers."""
        self._abort[0] = b"1"

    def uncancel(self) -> None:
        """Reset a `cancel` that was called between forward passes."""
        self._abort[0] = b"\0"

    def close(self) -> None:
        """Free all native memory. Sequences of this model must not be used afterwards."""
        while self._contexts:
            self._C.llama_free(self._contexts.popitem()[1])
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        """Evaluate requests, each (sequence, new tokens, rows wanted), in as few batches as possible.

        Returns logits [rows wanted, vocab] for each: views of a buffer that the next call overwrites.
        """
        for sequence, new, last in requests:
            self._refuse_request(sequence, new, last)
        if sum(last for _, _, last in requests) > (most := min(self.options.max_rows, self._batch_size)):
            raise ValueError(f"more than {most} rows of logits in one forward pass")
        if self.shares_passes:
            return self._forward(requests)
        return [rows for request in requests for rows in self._forward([request])]

    def _forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        """`forward` for sequences in one context."""
        # The engine evaluates sequences together only if they are in the order of their ids.
        order = sorted(range(len(requests)), key=lambda i: requests[i][0].id)
        requests = [requests[i] for i in order]
        # All rows wanted go into the final batch, because each batch overwrites the logits of the previous
        # one. The rest of it is filled with earlier tokens: one batch costs less than two halves.
        room = self._batch_size - sum(last for _, _, last in requests)
        final: list[tuple[LlamaSequence, Sequence[int], int]] = []
        for sequence, new, last in requests:
            ahead = len(new) - last
            early = max(0, ahead - room)
            room -= ahead - early
            early = max([early, *sequence.stops(ahead)])
            self._prefill(sequence, new[:early])
            sequence.prepare(last)
            final.append((sequence, new[early:], last))
        self._decode(final)
        rows = sum(last for _, _, last in requests)
        logits = self._logits(self._slot(requests[0][0].id)[0], rows)
        starts = np.cumsum([0, *(last for _, _, last in requests)])
        return [logits[starts[i] : starts[i + 1]] for i in np.argsort(order)]

    def _logits(self, context: Handle, rows: int) -> Logits:
        """Return the logits of the last batch, of the `rows` that it was asked for."""
        pointer = self._C.llama_get_logits(context)
        if not pointer:
            raise EdgespecError(
                f"{self.library.name} returned no logits for {self.path.name}{self.library.last_log()}"
            )
        return np.ctypeslib.as_array(pointer, (rows, self._output_size))

    def _prefill(self, sequence: LlamaSequence, new: Sequence[int]) -> None:
        """Evaluate tokens whose logits are not wanted."""
        done = 0
        for stop in [*sequence.stops(len(new)), len(new)]:
            for start in range(done, stop, self._batch_size):
                self._decode([(sequence, new[start : min(start + self._batch_size, stop)], 0)])
            done = stop

    def _refuse_request(self, sequence: LlamaSequence, new: Sequence[int], last: int) -> None:
        if not 1 <= last <= len(new):
            raise ValueError(f"{last} rows wanted of {len(new)} new tokens")
        if len(sequence.tokens) + len(new) > self.context_length:
            raise ValueError(f"{len(new)} new tokens do not fit into a context of {self.context_length}")
        # The engines check ids too, but then refuse the whole batch.
        if min(new) < 0 or max(new) >= self._input_size:
            raise ValueError("a token id outside the vocabulary")

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        """Call llama_decode once; the last `last` rows of each part get logits."""
        batch = self._batch
        batch.clear()
        for sequence, new, last in parts:
            context, native_id = self._slot(sequence.id)
            batch.add(native_id, sequence.position, new, last)
        code: int = self._C.llama_decode(context, batch.struct)
        # ik_llama.cpp returns success for an aborted pass.
        cancelled = self._abort[0] != b"\0"
        if code == 0 and not cancelled:
            start, width = 0, self.summary.number("embedding_length")
            for sequence, new, _ in parts:
                if (hidden := sequence.hidden) is not None:
                    rows = self.library.rows(context, start, len(new), width, hidden.layers)
                    hidden.append(len(sequence.tokens) + len(new) - len(rows), rows)
                sequence.append(new)
                start += len(new)
            return
        for sequence, _, _ in parts:
            sequence.recover()
        if cancelled:
            self.uncancel()
            raise Cancelled
        reason = self.library.last_log()
        raise EdgespecError(f"{self.library.name} cannot evaluate {self.path.name} (code {code}){reason}")

    def _slot(self, sequence_id: int) -> tuple[Handle, int]:
        """Return the context of a sequence, and its id there."""
        if self.shares_passes:
            return self._contexts[0], sequence_id
        return self._contexts[sequence_id], 0

    def _cache(self, sequence_id: int) -> NativeCache:
        return NativeCache(self.library, lambda: self._slot(sequence_id))

    def _new_context(self) -> Handle:
        window = self.summary.number("attention.sliding_window")
        sequences = self.options.sequences if self.shares_passes else 1
        snapshots = wanted_snapshots(self.summary.architecture) if self.is_hybrid else 0
        context = self.library.new_context(
            self._model, self.path, self.options, sequences, window, snapshots,
            self.summary.types.keys(), self._abort,
        )  # fmt: skip
        if self._adapters:
            self.library.apply_adapters(context, self._adapters)
        return context

    def _release(self, sequence_id: int) -> None:
        if self._contexts:
            self._cache(sequence_id).cut(0)
            self._free_ids.append(sequence_id)


class LlamaSequence:
    """A sequence of a LlamaModel, with its KV cache: a LanguageModel."""

    def __init__(self, model: LlamaModel, sequence_id: int, undo: int | None) -> None:
        """`undo`: see LlamaModel."""
        self.model = model
        self.id = sequence_id
        self.vocab_size = model.vocab.size
        self.hidden: RowStore | None = None
        self._tokens: list[int] = []
        self._cache = model._cache(sequence_id)
        self._states = AnyLength(self._cache) if undo is None else RunningState(self._cache, undo)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def position(self) -> int:
        """Where in the cache the next token belongs."""
        return len(self._tokens)

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        return self.model.forward([(self, new, last)])[0]

    def rollback(self, length: int) -> None:
        # Where less is left, tokens are evaluated again, which may give no rows: those known stay.
        self._keep(self._states.rollback(len(self._tokens), length), rows=length)

    def reachable(self, length: int) -> int:
        """Return how many tokens `rollback` to `length` would leave."""
        return self._states.reachable(len(self._tokens), length)

    def mark_at(self, lengths: Iterable[int]) -> None:
        """Make `rollback` to these numbers of tokens possible, once the cache holds as many."""
        self._states.mark_at(len(self._tokens), lengths)

    def recover(self) -> None:
        """After a failed pass: keep what the cache is known to hold."""
        left = self._states.recover(len(self._tokens))
        self._keep(left, rows=left)

    def share(self, other: LlamaSequence, length: int) -> bool:
        """Copy the first `length` tokens of `other`, at memory speed. False if refused.

        It copies the state: llama_memory_seq_cp aborts unless it copies a whole cache, and copies only in the
        next forward pass, when `other` may have changed.
        """
        length = other.reachable(length)
        if other is self or not length or not self.restore(other.tokens, other.state()):
            return False
        self.rollback(length)
        return True

    def state(self) -> Blob:
        """Return a copy of the KV cache and of its checkpoints, for `restore`: uint8."""
        return self._states.pack(len(self._tokens), self._cache.save(partial=False))

    def restore(self, tokens: Sequence[int], data: Blob) -> bool:
        """Restore `tokens`, whose `state` was `data`. If the engine refuses, be empty and return False.

        `data` must be of the same file, engine and cache types: the engine does not check its shape.
        """
        self.rollback(0)
        whole = self._states.unpack(len(tokens), data)
        if whole is None or len(tokens) > self.model.context_length:
            return False
        if not self._cache.load(whole, partial=False):
            self._cache.cut(0)
            return False
        self._tokens = list(tokens)
        return True

    def close(self) -> None:
        """Empty the KV cache and release the id for another sequence."""
        self.model._release(self.id)

    def _keep(self, length: int, rows: int) -> None:
        del self._tokens[length:]
        if self.hidden is not None:
            self.hidden.cut(rows)

    def append(self, new: Sequence[int]) -> None:
        """Record that `new` was evaluated."""
        self._tokens.extend(new)
        self._states.decoded(len(self._tokens), len(new))

    def prepare(self, last: int) -> None:
        """Before a batch with `last` rows of logits, all but one of which may be taken back."""
        self._states.prepare(len(self._tokens), last - 1)

    def stops(self, count: int) -> list[int]:
        """Return after how many of the next `count` tokens a batch must end, ascending."""
        held = len(self._tokens)
        return [stop - held for stop in self._states.stops(held, held + count)]
