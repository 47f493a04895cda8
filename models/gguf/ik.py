"""ik_llama.cpp through ik-llama-cpp-python: a second engine for the same files, with faster CPU kernels."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError
from edgespec.extras import how_to_get
from edgespec.models.gguf.check import GgufSummary
from edgespec.models.gguf.footprint import running_state
from edgespec.models.gguf.ik_api import Functions
from edgespec.models.gguf.native import Backend, Handle, LlamaOptions

PACKAGE = "ik-llama-cpp-python"
TESTED = "0.1.5"
_ROWS = b"result_norm"  # the tensor from before the output head, of the rows that are wanted
_FILES = {"win32": "llama.dll", "darwin": "libllama.dylib"}


class Ik(Backend):
    name = "ik"
    # Its flash attention aborts on other types, and on a second sequence in one cache: it treats a block of
    # keys whose first one is masked for a row as fully masked.
    cache_types = ("f16", "q8_0", "q4_0")
    shares_passes = False

    def __init__(self) -> None:
        """Load the library. Raises EdgespecError if the package is missing, broken or of another version."""
        path = installed_library()
        try:
            functions = Functions(path)
        except (OSError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise EdgespecError(
                f"{PACKAGE} is broken ({reason}): pip install --force-reinstall {PACKAGE}=={TESTED}"
            ) from None
        super().__init__(functions, TESTED)
        self._rows: list[npt.NDArray[np.float32]] = []  # of the last pass
        # Like the log's, it must live as long as a context has the pointer.
        self._eval_callback = functions.ggml_eval_callback(self._on_tensor)

    def _adapt_model(self, params: Any, options: LlamaOptions) -> None:
        gpu = self.C.llama_supports_gpu_offload()
        params.n_gpu_layers = (999 if options.gpu_layers < 0 else options.gpu_layers) if gpu else 0
        # A mapped file that is truncated while in use would kill the process, and repacking writes into the
        # map.
        params.use_mmap = False
        params.repack_tensors = options.repack

    def _adapt_context(self, params: Any, options: LlamaOptions, window: int, snapshots: int) -> None:
        # With a sliding window its flash attention drops the farthest keys of some rows of a batch, so that
        # the logits of many rows would differ from those of one.
        slides = window > 0 and not 0 < params.n_ctx <= window
        params.flash_attn = options.flash_attention is not False and not slides
        if options.rows:
            params.cb_eval = self._eval_callback

    def _on_tensor(self, tensor: Handle, ask: bool, _data: object) -> bool:
        """Take the rows of a pass. With `ask`, return whether the computed `tensor` is to be seen."""
        if ask:
            return bool(self.C.ggml_get_name(tensor) == _ROWS)
        count = self.C.ggml_nelements(tensor)
        pointer = ctypes.cast(self.C.ggml_get_data(tensor), ctypes.POINTER(ctypes.c_float))
        self._rows.append(np.ctypeslib.as_array(pointer, (count,)).copy())
        return True

    def keep_rows(self, context: Handle, layers: Sequence[int] = ()) -> None:
        if layers:
            super().keep_rows(context, layers)
        if self.C.llama_supports_gpu_offload():
            raise EdgespecError("ik_llama.cpp gives no rows from a GPU: use the engine llama.cpp")

    def rows(
        self, context: Handle, start: int, count: int, width: int, layers: Sequence[int] = ()
    ) -> npt.NDArray[np.float32]:
        found, self._rows = self._rows, []
        return np.concatenate(found or [np.zeros(0, np.float32)]).reshape(-1, width)

    def cut(self, context: Handle, sequence: int, length: int) -> bool:
        return bool(self.C.llama_kv_cache_seq_rm(context, sequence, length, -1))

    def most_rows(self, types: Collection[str]) -> int:
        # From 32 rows on it uses another kernel for Q4_1 and Q5_1, which changed logits of SmolLM2-135M by
        # up to 27 and the distribution by 0.9 nats (31 rows: 0.002).
        return 16 if {"Q4_1", "Q5_1"} & set(types) else super().most_rows(types)

    def refusal(self, model: Handle) -> str | None:
        if self.C.llama_model_has_encoder(model):
            return "has an encoder: Edgespec runs decoder-only models"
        return None

    def refusal_of_file(self, summary: GgufSummary) -> str | None:
        if "rope_freqs.weight" in summary.tensors:
            return "has rotary frequencies of its own, which ik_llama.cpp ignores: use the engine llama.cpp"
        if not running_state(summary):
            return None
        if summary.architecture != "qwen35":
            return "has recurrent layers that ik_llama.cpp cannot run: use the engine llama.cpp"
        if summary.number("nextn_predict_layers"):
            return (
                "has a layer for multi-token prediction, which ik_llama.cpp cannot load: "
                "use the engine llama.cpp, or a file without it"
            )
        return None

    def token_attributes(self, model: Handle, token: int) -> int:
        return int(self.C.llama_token_get_attr(model, token))


def installed_library() -> Path:
    """Return the shared library of the installed package. Raises EdgespecError unless it has version TESTED.

    Another version may have other struct layouts, which would crash instead of failing.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise EdgespecError(f"{PACKAGE} is not installed: {how_to_get('ik')}") from None
    if package.version != TESTED:
        raise EdgespecError(
            f"{PACKAGE} {package.version} is not the version Edgespec was tested with ({TESTED}): "
            f"pip install {PACKAGE}=={TESTED}"
        )
    return Path(str(package.locate_file("ik_llama_cpp/lib"))).resolve() / _FILES.get(
        sys.platform, "libllama.so"
    )
