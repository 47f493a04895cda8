"""Which of llama.cpp's libraries are loaded, and from where: by absolute paths in the package's own folder.

A portable build has one library of kernels for each generation of processors; ggml takes the best that runs
here. By itself it would look beside the executable and in the current folder, and the system's loader in
LD_LIBRARY_PATH before the package. Imported before llama_cpp, which loads libllama.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from edgespec.core import EdgespecError


def folder() -> Path:
    """Where llama-cpp-python keeps its libraries, absolute. Raises EdgespecError if it is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgespecError("llama-cpp-python is not installed: install Edgespec again.")
    return Path(spec.origin).absolute().parent / "lib"


def linked() -> list[ctypes.CDLL]:
    """ggml's libraries, loaded under the names that libllama links.

    The same library without the number is another file, since a wheel has no links: a second copy with a
    registry of its own, in which libllama does not look.
    """
    form = "lib{}.0.dylib" if sys.platform == "darwin" else "lib{}.so.0"
    paths = [folder() / form.format(name) for name in ("ggml-base", "ggml-cpu", "ggml")]
    return [ctypes.CDLL(str(path)) for path in paths if path.exists()]


_LINKED = linked()


def load() -> None:
    """Load the kernels for this processor. Raises EdgespecError if there are none.

    Does nothing where they are part of libggml already. ggml's messages go to its log, which is set before.
    """
    here = folder()
    if not any(here.glob("*ggml-cpu-*")):
        return
    ggml = _LINKED[-1] if _LINKED else ctypes.CDLL(str(here / "ggml.dll"))
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_load_all_from_path(os.fsencode(here))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    if not ggml.ggml_backend_dev_count():
        raise EdgespecError(f"llama.cpp has no kernels for this processor in {here}: install Edgespec again.")
