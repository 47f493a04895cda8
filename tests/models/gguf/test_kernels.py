"""llama.cpp's libraries come from the package's folder, whatever lies about elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgespec.models.gguf import kernels

LOAD = "from edgespec.models.gguf.backends import library; print(library().build)"


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder of libraries, one for each of the package's names, that leave `ran` behind when loaded."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    code, folder = tmp_path / "planted.c", tmp_path / "planted"
    code.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void ran(void)\n"
        f'{{ fclose(fopen("{tmp_path}/ran", "w")); }}\n'
    )
    folder.mkdir()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / "libllama.so"), str(code)], check=True)
    names = {path.name for path in kernels.folder().iterdir()} | {"libggml-cpu-zen4.so", "libggml-cpu.so"}
    for name in names - {"libllama.so"}:
        shutil.copy(folder / "libllama.so", folder / name)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="names and variables of Linux")
def test_nothing_planted_is_loaded(planted: Path) -> None:
    variables = ("LD_LIBRARY_PATH", "LLAMA_CPP_LIB_PATH")
    hostile = dict.fromkeys(variables, str(planted)) | {"GGML_BACKEND_PATH": str(planted / "libggml-cpu.so")}
    ran = planted.parent / "ran"
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=planted, env=os.environ | hostile, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.startswith("llama.cpp ")
    assert not ran.exists()
    trap = "import ctypes; ctypes.CDLL('libggml-base.so.0')"
    subprocess.run([sys.executable, "-c", trap], env=os.environ | hostile, check=True)
    assert ran.exists()
