"""GGUF models through llama.cpp's C API, as bound by llama-cpp-python.

One `LlamaModel` owns the weights and one KV pool; each `LlamaSequence` in it is a LanguageModel. Nothing here
is safe to call from two threads at once, except `cancel`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API reads best under its own name
import numpy as np

from edgespec.core import Cancelled, EdgespecError, Logits
from edgespec.models.gguf_check import GgufSummary, check_gguf
from edgespec.models.native import STRLEN, Batch, last_log, load, present, start_backend
from edgespec.models.vocab import Vocab
from edgespec.sensors import compute_cores

CacheType = Literal["f16", "q8_0", "q4_0", "f32"]
_CACHE_TYPES = {
    "f16": C.GGML_TYPE_F16,
    "q8_0": C.GGML_TYPE_Q8_0,
    "q4_0": C.GGML_TYPE_Q4_0,
    "f32": C.GGML_TYPE_F32,
}
_CACHE_BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "f32": 32.0}
_FLASH = {
    None: C.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How a model is loaded. Zero or None leaves the choice to the machine or the model.

    `context` tokens are shared by all `sequences`. `max_rows` bounds the logits of one forward pass: its
    buffer costs max_rows * vocabulary * 4 bytes (19 MB for 32 rows of 151,936). `batch` tokens are read at
    once: more cost memory (68 MB for 512 with the 1.5B) and gain nothing on two cores.
    """

    context: int = 4096
    threads: int = 0
    threads_batch: int = 0
    sequences: int = 1
    max_rows: int = 32
    batch: int = 128
    flash_attention: bool | None = None
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    gpu_layers: int = -1
    repack: bool = True


class LlamaModel:
    """The weights of one GGUF file, its vocabulary, and one context."""

    def __init__(
        self, path: Path, options: LlamaOptions | None = None, progress: Callable[[float], bool] | None = None
    ) -> None:
        """Check and load `path`. `progress` hears fractions from 0 to 1 and stops it by returning False.

        Raises EdgespecError when the file is damaged, unsupported or too large, Cancelled when stopped.
        """
        options = options or LlamaOptions()
        self.path = path
        self.options = options
        self.summary: GgufSummary = check_gguf(path)
        self._model = self._context = None
        start_backend()
        self._model = load(path, options.gpu_layers, options.repack, progress)
        try:
            self._refuse_unsupported()
            self.vocab = Vocab(present(C.llama_model_get_vocab(self._model), "vocabulary", path))
            self._abort = ctypes.create_string_buffer(2)
            self._context = self._new_context(options)
            self._memory = present(C.llama_get_memory(self._context), "memory", path)
        except BaseException:
            self.close()
            raise
        self.context_length = C.llama_n_ctx(self._context)
        self._batch_size = C.llama_n_batch(self._context)
        self._batch = Batch(self._batch_size)
        self._free_ids = list(range(options.sequences))
        self.threads = (C.llama_n_threads(self._context), C.llama_n_threads_batch(self._context))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's own chat template: untrusted text."""
        template = C.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def cache_bytes(self) -> int:
        """What the KV cache takes when full: keys and values of every layer and position."""
        get = C.llama_model_n_layer, C.llama_model_n_head_kv, C.llama_model_n_head, C.llama_model_n_embd
        layers, kv_heads, heads, width = (f(self._model) for f in get)
        bits = _CACHE_BITS[self.options.type_k] + _CACHE_BITS[self.options.type_v]
        return int(self.context_length * layers * kv_heads * (width // max(heads, 1)) * bits // 8)

    @property
    def rollback_refusal(self) -> str | None:
        """Why this model's memory cannot be cut, None if it can. Such a model is decoded plainly."""
        if C.llama_model_is_recurrent(self._model) or C.llama_model_is_hybrid(self._model):
            return f"{self.summary.architecture} models keep a running state that cannot be rolled back"
        return None

    def sequence(self) -> LlamaSequence:
        """A new, empty sequence in this model's KV pool. Raises EdgespecError when all are taken."""
        if not self._free_ids:
            raise EdgespecError(f"All {self.options.sequences} conversations of this model are in use.")
        return LlamaSequence(self, self._free_ids.pop(0))

    def set_threads(self, one_row: int, many_rows: int) -> None:
        """Change the thread counts for forward passes of one row and of several."""
        if (one_row, many_rows) != self.threads:
            C.llama_set_n_threads(self._context, one_row, many_rows)
            self.threads = (one_row, many_rows)

    def cancel(self) -> None:
        """Stop the forward pass under way, or else the next. Any thread or signal handler may call this."""
        self._abort[0] = b"1"

    def uncancel(self) -> None:
        """Forget a `cancel` that came when nothing was under way."""
        self._abort[0] = b"\0"

    def close(self) -> None:
        """Free everything native. Sequences of this model are dead afterwards."""
        if self._context is not None:
            C.llama_free(self._context)
        if self._model is not None:
            C.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, requests: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> list[Logits]:
        """Evaluate (sequence, new tokens, rows wanted) of several sequences in as few batches as fit.

        The logits of each are views into one buffer that the next call overwrites.
        """
        for sequence, new, last in requests:
            self._refuse_request(sequence, new, last)
        if sum(last for _, _, last in requests) > self.options.max_rows:
            raise ValueError(f"more than {self.options.max_rows} rows of logits in one forward pass")
        # All rows wanted go into one final batch, because each batch overwrites the logits of the last.
        for sequence, new, last in requests:
            ahead = len(new) - last
            for start in range(0, ahead, self._batch_size):
                self._decode([(sequence, new[start : min(start + self._batch_size, ahead)], 0)])
        self._decode([(sequence, new[len(new) - last :], last) for sequence, new, last in requests])
        rows = sum(last for _, _, last in requests)
        pointer = C.llama_get_logits(self._context)
        if not pointer:
            raise EdgespecError(f"llama.cpp returned no logits for {self.path.name}. {last_log()}")
        logits = np.ctypeslib.as_array(pointer, (rows, self.vocab.size))
        ends = np.cumsum([last for _, _, last in requests])
        return [logits[end - last : end] for end, (_, _, last) in zip(ends, requests, strict=True)]

    def _refuse_request(self, sequence: LlamaSequence, new: Sequence[int], last: int) -> None:
        if not 1 <= last <= len(new):
            raise ValueError(f"{last} rows wanted of {len(new)} new tokens")
        if len(sequence.tokens) + len(new) > self.context_length:
            raise ValueError(f"{len(new)} new tokens do not fit into a context of {self.context_length}")
        # llama.cpp checks ids too, but a wrong one there costs the whole batch.
        if min(new) < 0 or max(new) >= self.vocab.size:
            raise ValueError("a token id outside the vocabulary")

    def _decode(self, parts: Sequence[tuple[LlamaSequence, Sequence[int], int]]) -> None:
        """One llama_decode; `last` rows at the end of each part have logits."""
        batch = self._batch
        batch.clear()
        for sequence, new, last in parts:
            batch.add(sequence.id, len(sequence.tokens), new, last)
        code = C.llama_decode(self._context, batch.struct)
        if code == 0:
            for sequence, new, _ in parts:
                sequence._tokens.extend(new)
            return
        if code == 2:
            self.uncancel()
            # Of a batch cut into several physical ones, those before the interrupted one have been kept.
            for sequence, new, _ in parts:
                held = C.llama_memory_seq_pos_max(self._memory, sequence.id) + 1
                sequence._tokens.extend(new[: max(0, held - len(sequence.tokens))])
            raise Cancelled
        for sequence, _, _ in parts:
            sequence.rollback(len(sequence.tokens))
        if code == 1:
            raise EdgespecError(
                "The conversation does not fit into the model's context: start with a larger one."
            )
        raise EdgespecError(f"llama.cpp could not evaluate {self.path.name} (code {code}). {last_log()}")

    def _cut(self, sequence_id: int, length: int) -> bool:
        return bool(C.llama_memory_seq_rm(self._memory, sequence_id, length, -1))

    def _release(self, sequence_id: int) -> None:
        if self._context is not None:
            self._cut(sequence_id, 0)
            self._free_ids.append(sequence_id)

    def _refuse_unsupported(self) -> None:
        kinds = (
            (C.llama_model_has_encoder, "an encoder"),
            (C.llama_model_is_diffusion, "a diffusion model"),
        )
        for is_kind, what in kinds:
            if is_kind(self._model):
                raise EdgespecError(f"{self.path.name} has or is {what}: Edgespec runs decoder-only models.")

    def _new_context(self, options: LlamaOptions) -> Any:
        params = C.llama_context_default_params()
        params.n_ctx = options.context or C.llama_model_n_ctx_train(self._model)
        params.n_batch = params.n_ubatch = min(options.batch, params.n_ctx)
        params.n_seq_max = options.sequences
        params.n_outputs_max = options.max_rows
        cores = compute_cores()
        params.n_threads = options.threads or cores
        params.n_threads_batch = options.threads_batch or options.threads or cores
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.type_k, params.type_v = _CACHE_TYPES[options.type_k], _CACHE_TYPES[options.type_v]
        params.kv_unified = options.sequences > 1
        # A sliding-window cache that keeps only its window could not be rolled back over its edge.
        params.swa_full = True
        # A Python callback would run once for every node of the graph, some thousand times a token. strlen
        # of a buffer that is "" or "1" is the same question answered in native code: 0 or 1.
        params.abort_callback = STRLEN
        params.abort_callback_data = ctypes.addressof(self._abort)
        context = C.llama_init_from_model(self._model, params)
        if not context:
            raise EdgespecError(
                f"No room for a context of {params.n_ctx} tokens of {self.path.name}: try a smaller one with "
                f"--context. {last_log()}"
            )
        return context


class LlamaSequence:
    """One conversation in a LlamaModel's KV pool: a LanguageModel."""

    def __init__(self, model: LlamaModel, sequence_id: int) -> None:
        self.model = model
        self.id = sequence_id
        self.vocab_size = model.vocab.size
        self._tokens: list[int] = []

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def forward(self, new: Sequence[int], last: int = 1) -> Logits:
        return self.model.forward([(self, new, last)])[0]

    def rollback(self, length: int) -> None:
        if not self.model._cut(self.id, length):
            self.model._cut(self.id, 0)
            length = 0
        del self._tokens[length:]

    def close(self) -> None:
        """Give the sequence's cells back to the pool."""
        self.model._release(self.id)
