"""The native engines by name: each is loaded and started once, after it was seen to start elsewhere."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from edgespec.machine.sensors import compute_cores
from edgespec.models.gguf import kernels, trial
from edgespec.models.gguf.native import Backend, BackendName, LlamaOptions

# Turns of libgomp's waiting loop. A turn pauses for 40 to 140 cycles on x86-64 and for one or two elsewhere.
# 1000 measured as fast as the usual 300,000 on an idle machine, and up to four times as fast on a busy one.
_SPINS = {"x86_64": 1_000, "amd64": 1_000}
_SPINS_ELSEWHERE = 30_000


@cache
def library(engine: BackendName = "llama.cpp") -> Backend:
    """The engine of that name, loaded and started once. Raises EdgespecError where it is not installed.

    That it starts on this processor was seen in another process before.
    """
    found = trial.start(engine, files(engine))
    trial.loaded(engine)
    # Loaded here because each costs memory and time, and because the second is an extra.
    with _short_waits():
        if engine == "ik":
            from edgespec.models.gguf.ik import Ik

            return Ik()
        from edgespec.models.gguf.llamacpp import LlamaCpp

        return LlamaCpp(found.kernels)


@contextlib.contextmanager
def _short_waits() -> Iterator[None]:
    """Have threads wait busily for microseconds only, in a libgomp that is loaded meanwhile, then sleep.

    Its default of milliseconds takes the processor from the very thread waited for where other programs
    run. The user's own setting is left alone. libgomp reads the variable once, as it is loaded.
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
    """What an engine is made of, none of it loaded. Raises EdgespecError where it is not installed."""
    if engine == "ik":
        from edgespec.models.gguf.ik import installed_library

        return list(installed_library().parent.glob("*"))
    return kernels.files()


def cost_key(options: LlamaOptions) -> tuple[object, ...]:
    """What the cost of a forward pass depends on, apart from the model."""
    return (
        library(options.engine).build, *options.thread_counts(compute_cores()), options.flash_attention,
        options.type_k, options.type_v, options.repack, options.gpu_layers,
    )  # fmt: skip
