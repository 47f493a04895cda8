"""Loading of llama.cpp's libraries, by absolute paths in the package's own folder.

A portable build has one library of kernels for each processor generation; ggml selects the best that runs
here. By default it would search the executable's folder and the current folder, and the system's loader
LD_LIBRARY_PATH before the package. They are loaded before llama_cpp is imported, which loads libllama.
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
    """Return the absolute folder of llama-cpp-python's libraries. Raises EdgespecError if not installed."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EdgespecError("llama-cpp-python is not installed: install Edgespec again")
    return Path(spec.origin).absolute().parent / "lib"


def files() -> list[Path]:
    """Return the libraries, and the file that contains the package's version."""
    here = folder()
    return [*here.glob("*"), here.parent / "__init__.py"]


@cache
def linked() -> list[ctypes.CDLL]:
    """Load and return ggml's libraries, under the names that libllama links.

    The library without the version number is another file, because a wheel has no links: loading it would
    make a second registry, which libllama does not use.
    """
    form = "lib{}.0.dylib" if sys.platform == "darwin" else "lib{}.so.0"
    paths = [folder() / form.format(name) for name in ("ggml-base", "ggml-cpu", "ggml")]
    return [ctypes.CDLL(str(path)) for path in paths if path.exists()]


def load(name: str = "") -> None:
    """Load the kernels `name`, or the best for this processor. Raises EdgespecError if there are none.

    Does nothing if they are part of libggml. ggml's messages go to its log callback, which must be set.
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
        raise EdgespecError(f"llama.cpp has no kernels for this processor in {here}: install Edgespec again")


def ranked() -> list[str]:
    """Return the names of all kernels that run here, by ggml's own score, best first; empty without variants.

    Loads each of them, so it should run in a process of its own.
    """
    linked()
    scores: dict[str, int] = {}
    for name, path in _variants().items():
        score = getattr(ctypes.CDLL(str(path)), "ggml_backend_score", None)
        scores[name] = score() if score is not None else 0
    return sorted((name for name in scores if scores[name] > 0), key=lambda name: -scores[name])


def _variants() -> dict[str, Path]:
    """Return the libraries of kernels by processor name."""
    found = ((_VARIANT.fullmatch(path.name), path) for path in sorted(folder().glob("*ggml-cpu-*")))
    return {match[1]: path for match, path in found if match}
