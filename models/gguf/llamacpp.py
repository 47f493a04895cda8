"""llama.cpp through llama-cpp-python: the engine that every installation has."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_float, c_uint32
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgespec.core import EdgespecError
from edgespec.models.gguf import kernels
from edgespec.models.gguf.native import Backend, Handle, LlamaOptions

# The environment is untrusted: the package and ggml would load the libraries that these name.
os.environ.pop("LLAMA_CPP_LIB_PATH", None)
os.environ.pop("GGML_BACKEND_PATH", None)

kernels.linked()
import llama_cpp.llama_cpp as C  # noqa: E402, N812 - ggml first; the C API reads best under its own name
from llama_cpp import __version__  # noqa: E402
from llama_cpp import llama_cpp_ext as extension  # noqa: E402

_FLASH = {
    None: C.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
# Functions of llama-ext.h that llama_cpp_ext does not declare: their names in the ABIs of GCC and of MSVC.
_KEEP_LAYER = (
    "_Z30llama_set_embeddings_layer_inpP13llama_contextjb",
    "?llama_set_embeddings_layer_inp@@YAXPEAUllama_context@@I_N@Z",
)
_LAYER = (
    "_Z30llama_get_embeddings_layer_inpP13llama_contextj",
    "?llama_get_embeddings_layer_inp@@YAPEAMPEAUllama_context@@I@Z",
)


class LlamaCpp(Backend):
    name = "llama.cpp"

    def __init__(self, chosen: str = "") -> None:
        """Load the library, with the kernels `chosen` instead of the best. Raises EdgespecError."""
        self._chosen = chosen
        super().__init__(C, __version__)

    def _load_kernels(self) -> None:
        kernels.load(self._chosen)

    def _adapt_model(self, params: Any, options: LlamaOptions) -> None:
        params.n_gpu_layers = options.gpu_layers
        params.use_extra_bufts = options.repack
        params.load_mtp = options.mtp
        # Repacked weights are copies: with the file mapped, both would be resident (1.9 instead of 1.3 GB for
        # the 1.5B in Q4_K_M). A mapped file that is truncated while in use would also kill the process.
        params.load_mode = C.LLAMA_LOAD_MODE_NONE

    def _adapt_context(self, params: Any, options: LlamaOptions, window: int, snapshots: int) -> None:
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.n_outputs_max = options.max_rows
        params.kv_unified = False  # in a unified cache each row would attend over every sequence
        # A sliding-window cache of the window alone could not be rolled back beyond it.
        params.swa_full = True
        # With less room in a batch the first pass would end the process.
        params.n_rs_seq = max(0, min(snapshots, params.n_ubatch - 2))

    def keep_rows(self, context: Handle, layers: Sequence[int] = ()) -> None:
        for layer in layers:
            _extension(_KEEP_LAYER, None, C.llama_context_p_ctypes, c_uint32, c_bool)(context, layer, True)
        if not layers:
            # Unmasked: masked, a head's context returns the first rows of a batch, not those wanted.
            extension.llama_set_embeddings_nextn(context, True, False)

    def rows(
        self, context: Handle, start: int, count: int, width: int, layers: Sequence[int] = ()
    ) -> npt.NDArray[np.float32]:
        pointers = [extension.llama_get_embeddings_nextn(context)]
        if layers:
            read = _extension(_LAYER, POINTER(c_float), C.llama_context_p_ctypes, c_uint32)
            pointers = [read(context, layer) for layer in layers]
        rows = [np.ctypeslib.as_array(one, (start + count, width))[start:] for one in pointers]
        return np.concatenate(rows, axis=1) if layers else rows[0]

    def row(self, context: Handle, index: int, width: int) -> npt.NDArray[np.float32]:
        pointer = extension.llama_get_embeddings_nextn_ith(context, index)
        return np.ctypeslib.as_array(pointer, (width,)).copy()

    def snapshots(self, context: Handle) -> int:
        return int(C.llama_n_rs_seq(context))

    def cut(self, context: Handle, sequence: int, length: int) -> bool:
        return bool(C.llama_memory_seq_rm(C.llama_get_memory(context), sequence, length, -1))

    def load_adapter(self, model: Handle, path: Path) -> Handle:
        return self.present(C.llama_adapter_lora_init(model, os.fsencode(path)), "LoRA adapter", path)

    def apply_adapters(self, context: Handle, adapters: Sequence[tuple[Handle, float]]) -> None:
        count = len(adapters)
        handles = (C.llama_adapter_lora_p_ctypes * count)(*(handle for handle, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        C.llama_set_adapters_lora(context, handles, count, scales)

    def refusal(self, model: Handle) -> str | None:
        if C.llama_model_has_encoder(model):
            return "has an encoder: Edgespec runs decoder-only models"
        if C.llama_model_is_diffusion(model):
            return "is a diffusion model: Edgespec runs autoregressive models"
        return None

    def token_attributes(self, model: Handle, token: int) -> int:
        return int(C.llama_vocab_get_attr(C.llama_model_get_vocab(model), token))


@cache
def _extension(names: tuple[str, ...], result: Any, *arguments: Any) -> Any:
    """Return the function of the library that has one of `names`. Raises EdgespecError if there is none."""
    for name in names:
        if (function := getattr(C._lib, name, None)) is not None:
            function.restype, function.argtypes = result, arguments
            return function
    raise EdgespecError(f"this llama.cpp has no function {names[0]}: install llama-cpp-python 0.3.36 again")
