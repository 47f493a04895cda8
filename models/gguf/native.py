"""The interface of native engines: a shared library behind one object, and batches as numpy arrays.

llama.cpp and ik_llama.cpp share most of llama.h. The shared part is here, the rest in `llamacpp` and `ik`;
`backends` loads them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from edgespec.core import Cancelled, EdgespecError
from edgespec.machine.sensors import compute_cores
from edgespec.models.gguf.check import GgufSummary
from edgespec.models.gguf.lora import Adapter
from edgespec.models.options import Options

log = logging.getLogger("edgespec.llama")
T = TypeVar("T")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_STRLEN = (ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)).strlen

BackendName = Literal["llama.cpp", "ik"]
CacheType = Literal["f16", "q8_0", "q4_0", "f32"]
_CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type
Handle = Any
"""A native pointer, as ctypes gives it."""


@dataclass(frozen=True, slots=True)
class LlamaOptions(Options):
    """Loading options of a GGUF file. Zero or None leaves the choice to the machine or the model.

    `repack` converts weights to a layout for the processor's widest instructions while loading. `mtp` also
    loads the layers for multi-token prediction. `rows` makes contexts that can give the rows from before the
    output head, where the engine must know that when it creates them. `adapters` change the model's matrices.
    `auto_cache`: keys and values of 8 bits where memory is short.
    """

    threads_batch: int = 0
    flash_attention: bool | None = None
    type_k: CacheType = "f16"
    type_v: CacheType = "f16"
    gpu_layers: int = -1
    repack: bool = True
    mtp: bool = False
    rows: bool = False
    engine: BackendName = "llama.cpp"
    adapters: tuple[Adapter, ...] = ()
    auto_cache: bool = False

    def thread_counts(self, cores: int) -> tuple[int, int]:
        one_row = self.threads or cores
        return one_row, self.threads_batch or one_row

    def with_threads(self, one_row: int, many_rows: int) -> LlamaOptions:
        return replace(self, threads=one_row, threads_batch=many_rows)

    def with_cache(self, kind: CacheType) -> LlamaOptions:
        """Return a copy with keys and values of this type; quantized values need flash attention."""
        flash = self.flash_attention or None if kind in ("q8_0", "q4_0") else self.flash_attention
        return replace(self, type_k=kind, type_v=kind, flash_attention=flash)


class Batch:
    """A llama_batch of at most `capacity` tokens whose arrays are numpy's."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure]) -> None:
        """Allocate. `kind`: the engine's llama_batch; fields that only one engine has stay zero."""
        self.capacity = n = capacity
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._wanted = np.zeros(n, np.int8)
        self._seq_id = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._seq_pointers = (self._seq_id.ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        self.struct: Any = kind()
        arrays: dict[str, npt.NDArray[Any]] = {
            "token": self._token,
            "pos": self._pos,
            "n_seq_id": self._n_seq,
            "seq_id": self._seq_pointers,
            "logits": self._wanted,
        }
        for name, array in arrays.items():
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, field_type(kind, name)))

    def clear(self) -> None:
        self.struct.n_tokens = 0

    def add(self, sequence_id: int, position: int, new: Sequence[int], last: int) -> None:
        start = self.struct.n_tokens
        stop = start + len(new)
        if stop > self.capacity:
            raise ValueError(f"more than {self.capacity} tokens in one batch")
        self._token[start:stop] = new
        self._pos[start:stop] = range(position, position + len(new))
        self._seq_id[start:stop] = sequence_id
        self._wanted[start:stop] = 0
        self._wanted[stop - last : stop] = 1
        self.struct.n_tokens = stop


class RowBatch(Batch):
    """A batch with a row of `width` numbers for each token, in `_embd` [capacity, width]."""

    def __init__(self, capacity: int, kind: type[ctypes.Structure], width: int) -> None:
        super().__init__(capacity, kind)
        self._embd = np.zeros((capacity, width), np.float32)
        self.struct.embd = ctypes.cast(self._embd.ctypes.data, field_type(kind, "embd"))

    def add_rows(self, sequence_id: int, position: int, rows: npt.NDArray[np.float32], last: int) -> None:
        """Add tokens that have rows only."""
        start = self.struct.n_tokens
        self.add(sequence_id, position, [0] * len(rows), last)
        self._embd[start : start + len(rows)] = rows


class Backend(ABC):
    """An engine loaded in this process, with its log captured. Get it from `backends.library`.

    `C` has the functions that both engines have, under llama.cpp's names; where the engines differ there is
    a method. `build` contains the engine, its version and the instruction sets it was compiled for:
    measurements are valid for one `build` only. `shares_passes`: one context has many sequences, each with a
    KV cache of its own, and evaluates them in one forward pass.
    """

    name: ClassVar[BackendName]
    cache_types: ClassVar[tuple[CacheType, ...]] = ("f16", "q8_0", "q4_0", "f32")
    shares_passes: ClassVar[bool] = True

    def __init__(self, functions: Any, version: str) -> None:
        self.C = functions
        self._messages: deque[str] = deque(maxlen=8)
        # Keeps the callback alive: the library has a bare pointer to it.
        self._log_callback = functions.llama_log_callback(self._on_log)
        functions.llama_log_set(self._log_callback, None)
        self._load_kernels()
        functions.llama_backend_init()
        flags = re.findall(r"(\w+) = 1\b", (functions.llama_print_system_info() or b"").decode())
        self.build = " ".join([self.name, version, *flags])

    def _load_kernels(self) -> None:  # noqa: B027 - most engines have them built in
        """Load the kernels if they are a separate library. Raises EdgespecError."""

    @abstractmethod
    def _adapt_model(self, params: Any, options: LlamaOptions) -> None:
        """Set the fields that only this engine's llama_model_params have."""

    @abstractmethod
    def _adapt_context(self, params: Any, options: LlamaOptions, window: int, snapshots: int) -> None:
        """Set the fields that only this engine's llama_context_params have."""

    @abstractmethod
    def cut(self, context: Handle, sequence: int, length: int) -> bool:
        """Remove all but the first `length` positions of a sequence; False if that is not supported."""

    def keep_rows(self, context: Handle, layers: Sequence[int] = ()) -> None:
        """Let passes keep the inputs of `layers` for `rows`, or else the rows from before the output head."""
        raise EdgespecError(f"{self.name} gives no rows for a prediction layer: use the engine llama.cpp")

    def rows(
        self, context: Handle, start: int, count: int, width: int, layers: Sequence[int] = ()
    ) -> npt.NDArray[np.float32]:
        """Return these rows of `count` tokens of the last batch, from its token `start` on.

        They are [count, width], a view; those of several layers, next to each other, a copy. ik gives those
        of the last tokens alone, for which logits were wanted.
        """
        raise NotImplementedError

    def row(self, context: Handle, index: int, width: int) -> npt.NDArray[np.float32]:
        """Return a copy of the one of token `index` of the last batch: [width]."""
        raise NotImplementedError

    def snapshots(self, context: Handle) -> int:
        """Return how many earlier states of recurrent layers a context keeps."""
        return 0

    def load_adapter(self, model: Handle, path: Path) -> Handle:
        """Load a checked LoRA adapter, which lives as long as `model`. Raises EdgespecError."""
        raise EdgespecError(f"{self.name} cannot load LoRA adapters: use the engine llama.cpp")

    def apply_adapters(self, context: Handle, adapters: Sequence[tuple[Handle, float]]) -> None:
        """Let the passes of `context` use these adapters, each with its scale."""
        raise NotImplementedError

    def most_rows(self, types: Collection[str]) -> int:
        """Return the largest number of rows for which products with weights of `types` are correct."""
        return 1 << 30

    @abstractmethod
    def refusal(self, model: Handle) -> str | None:
        """Return why the model is not supported, to follow its name ("has ..."), None if it is."""

    def refusal_of_file(self, summary: GgufSummary) -> str | None:
        """Return why a file is not supported, before it is loaded; the same form."""
        return None

    @abstractmethod
    def token_attributes(self, model: Handle, token: int) -> int:
        """Return the bits of enum llama_token_attr."""

    def batch(self, capacity: int) -> Batch:
        return Batch(capacity, self.C.llama_batch)

    def load(self, path: Path, options: LlamaOptions, progress: Callable[[float], bool] | None) -> Handle:
        """Load the checked file `path`. Raises EdgespecError, and Cancelled if `progress` returns False."""
        C = self.C  # noqa: N806 - the C API reads best under its own name
        self._messages.clear()
        params = C.llama_model_default_params()
        stopped = False

        def on_progress(fraction: float, _data: object) -> bool:
            nonlocal stopped
            if progress is not None and not progress(fraction):
                stopped = True
            return not stopped

        params.progress_callback = C.llama_progress_callback(on_progress)
        self._adapt_model(params, options)
        model = C.llama_model_load_from_file(os.fsencode(path), params)
        if stopped:
            if model:
                C.llama_model_free(model)
            raise Cancelled
        return self.present(model, "model", path)

    def new_context(
        self,
        model: Handle,
        path: Path,
        options: LlamaOptions,
        sequences: int,
        window: int,
        snapshots: int,
        types: Collection[str],
        abort: ctypes.Array[Any],
        *,
        head: bool = False,
        other: Handle = None,
    ) -> Handle:
        """Create a context of `model`. Its forward passes stop soon after the two-byte buffer `abort` is
        not "".

        `window`: size of the sliding window in positions, 0 if the model has none; `snapshots`: earlier
        states of recurrent layers to keep, where the engine can; `types`: of its tensors; `head`:
        for the layer for multi-token prediction alone; `other`: the target's context, for a model that uses
        tensors or the cache of its target. Raises EdgespecError if there is not enough memory.
        """
        C = self.C  # noqa: N806
        params = C.llama_context_default_params()
        params.n_seq_max = sequences
        params.n_ctx = options.context * params.n_seq_max
        params.n_batch = min(options.batch, options.context or options.batch)
        params.n_ubatch = min(params.n_batch, self.most_rows(types))
        params.n_threads, params.n_threads_batch = options.thread_counts(compute_cores())
        params.type_k, params.type_v = _CACHE_TYPES[options.type_k], _CACHE_TYPES[options.type_v]
        # A Python callback would run for every node of the graph, about a thousand times per token. strlen
        # of a buffer that is "" or "1" returns the same, 0 or 1, in native code.
        params.abort_callback = ctypes.cast(_STRLEN, field_type(type(params), "abort_callback"))
        params.abort_callback_data = ctypes.addressof(abort)
        self._adapt_context(params, options, window, snapshots)
        if head:
            params.ctx_type = C.LLAMA_CONTEXT_TYPE_MTP
        if other is not None:
            params.ctx_other = other
        context = C.llama_init_from_model(model, params)
        if not context:
            raise EdgespecError(
                f"not enough memory for a context of {options.context} tokens of {path.name}"
                f"{self.last_log()}: choose a smaller --context"
            )
        return context

    def present(self, pointer: T | None, what: str, path: Path) -> T:
        if not pointer:
            raise EdgespecError(f"{self.name} cannot load a {what} from {path.name}{self.last_log()}")
        return pointer

    def last_log(self) -> str:
        """Return the first error logged since the last call, in parentheses, "" if there is none."""
        if not self._messages:
            return ""
        first = " ".join(self._messages[0].split())[:300]
        self._messages.clear()
        return f" ({self.name}: {first})"

    def _on_log(self, level: int, text: bytes, _data: object) -> None:
        # Loading logs hundreds of lines at lower levels, which are not worth decoding.
        if level >= _ERROR and (line := text.decode("utf-8", "replace").strip()):
            self._messages.append(line)
            log.debug("%s", line)


def field_type(struct: type[ctypes.Structure], name: str) -> Any:
    """Return the ctypes type of a field."""
    return next(field[1] for field in struct._fields_ if field[0] == name)
