"""Which of llama.cpp's libraries are loaded, and from where: by absolute paths in the package's own folder.

A portable build has one library of kernels for each generation of processors; ggml takes the best that runs
here. By itself it would look beside the executable and in the current folder, and the system's loader in
LD_LIBRARY_PATH before the package. Loaded before llama_cpp is imported, which loads libllama.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from edgespec.core import EdgespecError

_VARIANT = re.compile(r"(?:lib)?ggml-cpu-([A-Za-z0-9_]+)\.\w+")


def folder() -> Path:
    """Where llama-cpp-python keeps its libraries, absolute. Raises EdgespecError if it is not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgespecError("llama-cpp-python is not installed: install Edgespec again.")
    return Path(spec.origin).absolute().parent / "lib"


def files() -> list[Path]:
    """The libraries, and the file that names the package's version."""
    here = folder()
    return [*here.glob("*"), here.parent / "__init__.py"]


@cache
def linked() -> list[ctypes.CDLL]:
    """ggml's libraries, loaded under the names that libllama links.

    The same library without the number is another file, since a wheel has no links: a second copy with a
    registry of its own, in which libllama does not look.
    """
    form = "lib{}.0.dylib" if sys.platform == "darwin" else "lib{}.so.0"
    paths = [folder() / form.format(name) for name in ("ggml-base", "ggml-cpu", "ggml")]
    return [ctypes.CDLL(str(path)) for path in paths if path.exists()]


def load(name: str = "") -> None:
    """Load the kernels of that name, or the best for this processor. Raises EdgespecError if there are none.

    Does nothing where they are part of libggml already. ggml's messages go to its log, which is set before.
    """
    here, variants = folder(), _variants()
    if not variants:
        return
    ggml = linked()[-1] if linked() else ctypes.CDLL(str(here / "ggml.dll"))
    if name in variants:
        ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load.restype = ctypes.c_void_p
        ggml.ggml_backend_load(os.fsencode(variants[name]))
    else:
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path.restype = None
        ggml.ggml_backend_load_all_from_path(os.fsencode(here))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    if not ggml.ggml_backend_dev_count():
        raise EdgespecError(f"llama.cpp has no kernels for this processor in {here}: install Edgespec again.")


def ranked() -> list[str]:
    """The names of all kernels that run here by ggml's own score, the best first; none without a choice.

    Loads each of them, which is work for a process of its own.
    """
    linked()
    scores: dict[str, int] = {}
    for name, path in _variants().items():
        score = getattr(ctypes.CDLL(str(path)), "ggml_backend_score", None)
        scores[name] = score() if score is not None else 0
    return sorted((name for name in scores if scores[name] > 0), key=lambda name: -scores[name])


def _variants() -> dict[str, Path]:
    """The libraries of kernels by the names of the processors they are for."""
    found = ((_VARIANT.fullmatch(path.name), path) for path in sorted(folder().glob("*ggml-cpu-*")))
    return {match[1]: path for match, path in found if match}
