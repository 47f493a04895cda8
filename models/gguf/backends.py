"""The native engines by name, each loaded once, after a trial in another process."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from edgespec.machine.sensors import compute_cores
from edgespec.models.gguf import kernels, trial
from edgespec.models.gguf.lora import adapters_key
from edgespec.models.gguf.native import Backend, BackendName, LlamaOptions

# Iterations of libgomp's spin loop, each 40 to 140 cycles on x86-64 and one or two elsewhere. 1000 measured
# as fast as the usual 300,000 on an idle machine, and up to four times as fast on a busy one.
_SPINS = {"x86_64": 1_000, "amd64": 1_000}
_SPINS_ELSEWHERE = 30_000


@cache
def library(engine: BackendName = "llama.cpp") -> Backend:
    """Return the engine, loaded and initialized once. Raises EdgespecError if it is not installed.

    Its start on this processor has been tested in another process before.
    """
    found = trial.start(engine, files(engine))
    trial.loaded(engine)
    # Imported late because each takes memory and time, and because the second is optional.
    with _short_waits():
        if engine == "ik":
            from edgespec.models.gguf.ik import Ik

            return Ik()
        from edgespec.models.gguf.llamacpp import LlamaCpp

        return LlamaCpp(found.kernels)


@contextlib.contextmanager
def _short_waits() -> Iterator[None]:
    """Limit the spinning of threads to microseconds in a libgomp that is loaded meanwhile.

    Its default of milliseconds takes the processor from the thread that is waited for while other programs
    run. The user's own setting takes precedence. libgomp reads the variable once, when it is loaded.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = str(_SPINS.get(platform.machine().lower(), _SPINS_ELSEWHERE))
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


def files(engine: BackendName) -> list[Path]:
    """Return the files of an engine without loading them. Raises EdgespecError if it is not installed."""
    if engine == "ik":
        from edgespec.models.gguf.ik import installed_library

        return list(installed_library().parent.glob("*"))
    return kernels.files()


def cost_key(options: LlamaOptions) -> tuple[object, ...]:
    """Return what the cost of a forward pass depends on, apart from the model."""
    return (
        library(options.engine).build, *options.thread_counts(compute_cores()), options.flash_attention,
        options.type_k, options.type_v, options.repack, options.gpu_layers, *adapters_key(options.adapters),
        *(["rows"] if options.rows and options.engine == "ik" else []),
    )  # fmt: skip
