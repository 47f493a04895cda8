"""An installation of Edgespec whose llama.cpp is faulty: the real one behind a library that fails on purpose.

It is a virtual environment that has this one's packages, and a copy of llama_cpp in front of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from ctypes import sizeof
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest

from edgespec.models.gguf import kernels

ILLEGAL = "raise(SIGILL);"
HANG = "for (;;) pause();"
KILLED = "raise(SIGKILL);"
NO_MEMORY = 'fprintf(stderr, "ggml_aligned_malloc: insufficient memory (attempted 9 MB)\\n"); abort();'
WRONG = "wrong = 1;"

_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
struct params { _Alignas(8) char bytes[PARAMS]; };
struct batch { _Alignas(8) int tokens; char rest[BATCH - sizeof(int)]; };
static int repacked, wrong;
static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
__attribute__((constructor)) static void loaded(void) {
    int file = open(LOADED, O_CREAT | O_WRONLY | O_APPEND, 0644);
    if (file >= 0) { dprintf(file, "%d\n", getpid()); close(file); }
}
static int has(const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", FOLDER, name);
    return dlopen(path, RTLD_LAZY | RTLD_NOLOAD) != NULL;
}
void *llama_model_load_from_file(const char *path, struct params params) {
    repacked = params.bytes[REPACK];
    return ((void *(*)(const char *, struct params)) next("llama_model_load_from_file"))(path, params);
}
int llama_decode(void *context, struct batch batch) {
    wrong = 0;
    (void) has;
    if (batch.tokens > 1 && (WHEN)) { FAULT }
    return ((int (*)(void *, struct batch)) next("llama_decode"))(context, batch);
}
float *llama_get_logits(void *context) {
    float *rows = ((float *(*)(void *)) next("llama_get_logits"))(context);
    for (int i = 0; wrong && i < 200; i++) rows[i] = -rows[i];
    return rows;
}
"""
_BROKEN = "#include <signal.h>\n__attribute__((constructor)) static void loaded(void) { raise(SIGILL); }\n"


@dataclass(frozen=True, slots=True)
class Faulty:
    """`python` runs Edgespec on the faulty library, `library`; it keeps what it learns in `cache`."""

    python: Path
    library: Path
    cache: Path

    def run(
        self, arguments: Sequence[str], text: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Python with `arguments`, to its end."""
        command, given = [str(self.python), *arguments], self.environment(environment)
        return subprocess.run(
            command, input=text, env=given, capture_output=True, text=True, timeout=200, check=False
        )

    def edgespec(
        self, *arguments: str, text: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run(["-m", "edgespec.app.cli.main", *arguments], text, environment)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "EDGESPEC_CACHE": str(self.cache), **(more or {})}

    def loads(self) -> int:
        """How many processes have loaded llama.cpp since this was last asked."""
        log = self.cache.parent / "loaded"
        count = len(log.read_text().splitlines()) if log.exists() else 0
        log.unlink(missing_ok=True)
        return count


def make(folder: Path, fault: str, when: str = "repacked", wheel: Path | None = None) -> Faulty:
    """llama.cpp with `fault` in passes of several tokens `when` that C expression is true.

    It may ask whether weights are `repacked`, and whether it `has("libggml-cpu-x.so")` loaded. From the
    package that is installed here, or the one in `wheel`.
    """
    packages = _environment(folder)
    shutil.copytree(kernels.folder().parent, packages / "llama_cpp", ignore=shutil.ignore_patterns("*.pyc"))
    lib = packages / "llama_cpp" / "lib"
    if wheel is not None:
        shutil.rmtree(lib)
        shutil.unpack_archive(wheel, folder / "wheel", "zip")
        shutil.move(folder / "wheel" / "llama_cpp" / "lib", lib)
    put_in_front(lib, fault, when, folder / "loaded")
    return Faulty(folder / "venv" / "bin" / "python", lib / "libllama.so", folder / "cache")


def put_in_front(lib: Path, fault: str, when: str, log: Path, seen: Path | None = None) -> None:
    """Replace libllama.so in `lib`, which the program knows as `seen`, by one that fails; see `make`."""
    (lib / "libllama.so").unlink()
    macros = {
        "PARAMS": str(sizeof(llama.llama_model_params)),
        "REPACK": str(llama.llama_model_params.use_extra_bufts.offset),
        "BATCH": str(sizeof(llama.llama_batch)),
        "LOADED": f'"{log}"',
        "FOLDER": f'"{seen or lib}"',
        "WHEN": when,
        "FAULT": fault,
    }
    flags = [f"-D{name}={value}" for name, value in macros.items()]
    link = ["-Wl,--no-as-needed", f"-L{lib}", "-l:libllama.so.0", "-Wl,-rpath,$ORIGIN", "-ldl"]
    _compile(_SHIM, lib / "libllama.so", [*flags, *link])


def break_ik(faulty: Faulty) -> None:
    """ik_llama.cpp's library ends the process that loads it."""
    packages = faulty.library.parent.parent.parent
    found = distribution("ik-llama-cpp-python")
    shutil.copytree(found._path, packages / found._path.name)
    lib = packages / "ik_llama_cpp" / "lib"
    lib.mkdir(parents=True)
    _compile(_BROKEN, lib / "libllama.so", [])


def without_ik(faulty: Faulty) -> None:
    """ik_llama.cpp is installed in another version, which is not used."""
    info = faulty.library.parent.parent.parent / "ik_llama_cpp_python-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ik-llama-cpp-python\nVersion: 0.0.1\n")


def _environment(folder: Path) -> Path:
    """A virtual environment in `folder`; its packages come before those of this one."""
    import sys

    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (packages / "others.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return packages


def _compile(code: str, library: Path, flags: Sequence[str]) -> None:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    source = library.with_suffix(".c")
    source.write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source), *flags], check=True)
    source.unlink()
