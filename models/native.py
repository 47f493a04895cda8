"""The seam to llama.cpp's shared library: start-up, messages, batches as numpy arrays, loading a file."""

from __future__ import annotations

import ctypes
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API reads best under its own name
import numpy as np
import numpy.typing as npt

from edgespec.core import Cancelled, EdgespecError

log = logging.getLogger("edgespec.llama")
T = TypeVar("T")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR, which the binding does not name


class Batch:
    """A llama_batch of at most `capacity` tokens whose arrays are numpy's."""

    def __init__(self, capacity: int) -> None:
        self.capacity = n = capacity
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._wanted = np.zeros(n, np.int8)
        self._seq_id = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._seq_pointers = (self._seq_id.ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        self.struct = C.llama_batch(
            n_tokens=0,
            token=_pointer(self._token, C.llama_token),
            embd=None,
            pos=_pointer(self._pos, C.llama_pos),
            n_seq_id=_pointer(self._n_seq, ctypes.c_int32),
            seq_id=_pointer(self._seq_pointers, ctypes.POINTER(C.llama_seq_id)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

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


def _pointer(array: npt.NDArray[Any], kind: type) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _strlen() -> Any:
    libc = ctypes.CDLL("msvcrt") if os.name == "nt" else ctypes.CDLL(None)
    return ctypes.cast(libc.strlen, C.ggml_abort_callback)


STRLEN = _strlen()
_messages: deque[str] = deque(maxlen=8)


def _on_log(level: int, text: bytes, _data: object) -> None:
    # A load says hundreds of lines at lower levels; decoding them would cost more than they tell.
    if level >= _ERROR and (line := text.decode("utf-8", "replace").strip()):
        _messages.append(line)
        log.debug("%s", line)


_LOG_CALLBACK = C.llama_log_callback(_on_log)  # kept alive: llama.cpp holds a bare pointer to it


def last_log() -> str:
    """What llama.cpp complained of since the last time, its first words, which name the cause."""
    if not _messages:
        return ""
    first = " ".join(_messages[0].split())[:300]
    _messages.clear()
    return f"llama.cpp says: {first}"


_started = False


def start_backend() -> None:
    global _started
    _messages.clear()
    if not _started:
        C.llama_log_set(_LOG_CALLBACK, None)
        C.llama_backend_init()
        _started = True


def load(path: Path, gpu_layers: int, repack: bool, progress: Callable[[float], bool] | None) -> Any:
    params = C.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    params.use_extra_bufts = repack
    # Repacked weights are copies: with the file mapped, both would be resident (1.9 instead of 1.3 GB for the
    # 1.5B in Q4_K_M). A mapped file that is truncated while in use would also kill the process.
    params.load_mode = C.LLAMA_LOAD_MODE_NONE
    stopped = False

    def on_progress(fraction: float, _data: object) -> bool:
        nonlocal stopped
        if progress is not None and not progress(fraction):
            stopped = True
        return not stopped

    params.progress_callback = C.llama_progress_callback(on_progress)
    model = C.llama_model_load_from_file(os.fsencode(path), params)
    if stopped:
        if model:
            C.llama_model_free(model)
        raise Cancelled
    return present(model, "model", path)


def present(pointer: T | None, what: str, path: Path) -> T:
    if not pointer:
        raise EdgespecError(f"llama.cpp could not make a {what} of {path.name}. {last_log()}")
    return pointer
