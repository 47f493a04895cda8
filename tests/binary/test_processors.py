"""Old and new processors, emulated: the program takes the kernels that run there.

qemu 7.2 emulates no AVX-512: its Skylake-Server is one with AVX2. AVX-512 is tried by the other tests, where
the machine has it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 processors")
QEMU = "qemu-x86_64"
CPUS = [
    ("Nehalem", {"SSE3", "SSSE3"}, {"AVX", "AVX2", "AVX512"}),
    ("Haswell", {"AVX", "AVX2", "FMA"}, {"AVX512"}),
    ("Skylake-Server", {"AVX", "AVX2", "FMA"}, set()),
]


def emulated(cpu: str, program: Path, tmp_path: Path, arguments: list[str]) -> str:
    """Standard output of the program on that processor.

    PyInstaller's loader starts the program again to have its libraries found, and would leave the emulator by
    that: it is notes that it did, and where they are.
    """
    executable = str(program / "edgespec")
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "_PYI_ARCHIVE_FILE": executable,
        "_PYI_PARENT_PROCESS_LEVEL": "-1",
        "LD_LIBRARY_PATH": str(program / "_internal"),
    }
    command = [QEMU, "-cpu", cpu, executable, *arguments]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("cpu", "used", "unused"), CPUS, ids=[cpu for cpu, *_ in CPUS])
def test_it_writes_eight_tokens(
    cpu: str, used: set[str], unused: set[str], program: Path, tmp_path: Path
) -> None:
    options = [
        "run",
        "The",
        "-m",
        "smollm2-135m",
        "--raw",
        "--draft",
        "none",
        "--max-tokens",
        "8",
        "--threads",
        "1",
        "--json",
    ]
    answer = json.loads(emulated(cpu, program, tmp_path, options))
    assert len(answer["tokens"]) == 8
    build = set(
        json.loads(emulated(cpu, program, tmp_path, ["doctor", "--json"]))["engines"]["llama.cpp"].split()
    )
    assert used <= build
    assert not unused & build
