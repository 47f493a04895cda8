"""Fixtures. Real models come from the user's models folder; everything else is made in a temporary one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.gguf.ik import installed_library
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.native import BackendName
from edgespec.models.hub.store import is_onnx, models_folder, resolve

# A slow or busy machine is no fault of a test.
hypothesis.settings.register_profile(
    "here", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None
)
hypothesis.settings.load_profile("here")


def pytest_configure(config: pytest.Config) -> None:
    """Each of several workers, and all that it starts, computes on cores of its own.

    ggml's threads wait busily for each other: two models of two threads on two cores take ten times as long.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(worker["workerid"].removeprefix("gw")) % worker["workercount"]
        os.sched_setaffinity(0, cores[number :: worker["workercount"]] or cores)


@pytest.fixture(scope="session", autouse=True)
def _folders_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs here neither uses nor changes what the user's own runs have learned."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EDGESPEC_CACHE", "EDGESPEC_CORPUS", "EDGESPEC_DATA", "EDGESPEC_CONFIG"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name.lower())))
        patch.setenv("EDGESPEC_ENGINE", "llama.cpp")  # else each first use of a model compares engines
        yield


@pytest.fixture(scope="session")
def ik() -> BackendName:
    """The name of the second engine; skips where it is not installed."""
    try:
        installed_library()
    except EdgespecError as error:
        pytest.skip(str(error))
    return "ik"


@pytest.fixture(scope="session", params=["llama.cpp", "ik"])
def engine(request: pytest.FixtureRequest) -> BackendName:
    """Each engine in turn."""
    if request.param == "ik":
        request.getfixturevalue("ik")
    return request.param


@pytest.fixture(scope="session")
def starter_path() -> Path:
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def starter(starter_path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(starter_path, LlamaOptions(context=1024, sequences=3)) as model:
        yield model


@pytest.fixture(scope="session")
def exported() -> Callable[[str], Path]:
    """The folder of an exported ONNX model by its name; skips where `make models-onnx` did not make it."""

    def find(name: str) -> Path:
        folder = models_folder() / name
        if not is_onnx(folder):
            pytest.skip(f"{name} is not in the models folder: `make models-onnx` makes it")
        return folder

    return find


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama.gguf", "llama")


@pytest.fixture(scope="session")
def tiny_mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "mamba.gguf", "mamba")
