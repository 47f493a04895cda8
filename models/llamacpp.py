"""llama.cpp through llama-cpp-python: the engine that every installation has."""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgespec.core import EdgespecError
from edgespec.models.native import Handle, Library, LlamaOptions

# The environment is untrusted: the package, and ggml, would load whatever libraries these name.
for _name in ("LLAMA_CPP_LIB_PATH", "GGML_BACKEND_PATH"):
    os.environ.pop(_name, None)


def _folder() -> Path:
    """Where the package keeps its libraries, absolute."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgespecError("llama-cpp-python is not installed: install Edgespec again.")
    return Path(spec.origin).absolute().parent / "lib"


def _linked(folder: Path) -> list[ctypes.CDLL]:
    """ggml's libraries, by the names under which libllama links them.

    Loaded by path and before it: the loader then has what it would else look for in LD_LIBRARY_PATH first.
    The same library without the number is another file, since a wheel has no links: a second copy with a
    registry of its own, in which libllama does not look.
    """
    form = "lib{}.0.dylib" if sys.platform == "darwin" else "lib{}.so.0"
    paths = [folder / form.format(name) for name in ("ggml-base", "ggml-cpu", "ggml")]
    return [ctypes.CDLL(str(path)) for path in paths if path.exists()]


_FOLDER = _folder()
_GGML = _linked(_FOLDER)

import llama_cpp.llama_cpp as C  # noqa: N812 - the C API reads best under its own name
from llama_cpp import __version__

_FLASH = {
    None: C.LLAMA_FLASH_ATTN_TYPE_AUTO,
    True: C.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    False: C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}


class LlamaCpp(Library):
    name = "llama.cpp"

    def __init__(self) -> None:
        super().__init__(C, __version__)

    def _load_kernels(self) -> None:
        # A portable build has one library for each generation of processors; ggml takes the best that runs
        # here. Only this folder is searched: by itself it would look in the current one too.
        if not any(_FOLDER.glob("*ggml-cpu-*")):
            return
        ggml = _GGML[-1] if _GGML else ctypes.CDLL(str(_FOLDER / "ggml.dll"))
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path.restype = None
        ggml.ggml_backend_load_all_from_path(os.fsencode(_FOLDER))
        ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        if not ggml.ggml_backend_dev_count():
            raise EdgespecError(
                f"llama.cpp has no library for this processor in {_FOLDER}: install Edgespec again."
            )

    def _adapt_model(self, params: Any, options: LlamaOptions) -> None:
        params.n_gpu_layers = options.gpu_layers
        params.use_extra_bufts = options.repack
        # Repacked weights are copies: with the file mapped, both would be resident (1.9 instead of 1.3 GB for
        # the 1.5B in Q4_K_M). A mapped file that is truncated while in use would also kill the process.
        params.load_mode = C.LLAMA_LOAD_MODE_NONE

    def _adapt_context(self, params: Any, options: LlamaOptions, window: int) -> None:
        params.flash_attn_type = _FLASH[options.flash_attention]
        params.n_outputs_max = options.max_rows
        params.kv_unified = options.sequences > 1
        # A sliding-window cache that keeps only its window could not be rolled back over its edge.
        params.swa_full = True

    def cut(self, context: Handle, sequence: int, length: int) -> bool:
        return bool(C.llama_memory_seq_rm(C.llama_get_memory(context), sequence, length, -1))

    def refusal(self, model: Handle) -> str | None:
        if C.llama_model_has_encoder(model):
            return "has an encoder: Edgespec runs decoder-only models"
        if C.llama_model_is_diffusion(model):
            return "is a diffusion model: Edgespec runs models that write one token after another"
        return None

    def token_attributes(self, model: Handle, token: int) -> int:
        return int(C.llama_vocab_get_attr(C.llama_model_get_vocab(model), token))
