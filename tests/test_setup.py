"""The set-up scripts: progress of slow commands, compiled wheels, and the flags they are compiled with."""

from __future__ import annotations

import json
import os
import platform
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tiles import disassembled, loads, never_stored

from edgespec.models.gguf.kernels import folder

PACKAGING = Path(__file__).parent.parent / "packaging"
PROGRESS = PACKAGING / "progress.py"


def progress(log: Path, *command: str, patch: str = "") -> list[str]:
    """The command line of progress.py for a command. `patch` is Python to run first."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGING)!r})\nimport progress\n{patch}\n"
    code += "from pathlib import Path\nsys.exit(progress.main('trying', Path(sys.argv[1]), sys.argv[2:]))"
    return [sys.executable, "-c", code, str(log), *command]


def script(*lines: str) -> list[str]:
    return [sys.executable, "-u", "-c", "\n".join(("import os, signal, subprocess, sys, time", *lines))]


def wait(until: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + 30
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Watched:
    """A command on a terminal of 80 columns, and what it has written there so far."""

    def __init__(self, command: list[str]) -> None:
        self.said = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)

    def sees(self, text: str) -> None:
        deadline = time.monotonic() + 30
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            self._read()

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def ended(self) -> int:
        """The exit status, after all was read."""
        deadline = time.monotonic() + 30
        while self._read():
            assert time.monotonic() < deadline, self.said
        return self._wait()

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._terminal)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def _read(self) -> bool:
        if not select.select([self._terminal], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # Linux's way to say that nobody holds the other end
            return False
        self.said += data.decode()
        return bool(data)


@pytest.fixture
def watch() -> Iterator[Callable[[list[str]], Watched]]:
    """Runs a command on a terminal; it is gone after the test."""
    began: list[Watched] = []

    def run(command: list[str]) -> Watched:
        began.append(Watched(command))
        return began[-1]

    yield run
    for one in began:
        one.close()


# --- progress.py ---

STEPS = {
    "  Installing build dependencies: started": "installing build dependencies, ",
    "Collecting numpy>=2.0": "package 1: numpy, ",
    "  Downloading numpy-2.3.0-cp311-manylinux_x86_64.whl (16.9 MB)": "downloading numpy (16.9 MB), ",
    "Progress 8450000 of 16900000": "downloading numpy (16.9 MB): 50%, ",
    "Installing collected packages: numpy, rich, typer": "installing 3 packages, ",
    "  Building wheel for llama-cpp-python (pyproject.toml): started": "building llama-cpp-python, ",
    "  *** Configuring CMake...": "configuring, ",
    "  [12/83] /usr/bin/g++ -O3 -c ggml.cpp": "step 12 of 83 (14%), ",
    "[ 42%] Building CXX object ggml.o": "42%, ",
}


def test_a_terminal_shows_each_step_on_one_line(
    tmp_path: Path, watch: Callable[[list[str]], Watched]
) -> None:
    lines = [
        f"print({line!r})\nwhile not os.path.exists({str(tmp_path / str(i))!r}): time.sleep(0.01)"
        for i, line in enumerate(STEPS)
    ]
    watched = watch(progress(tmp_path / "log", *script(*lines)))
    for i, shown in enumerate(STEPS.values()):
        watched.sees(f"\r\x1b[Kedgespec: trying: {shown}")
        (tmp_path / str(i)).touch()
    assert watched.ended() == 0
    assert "\n" not in watched.said.rstrip("\r\n")
    assert watched.said.rstrip().rpartition("\x1b[K")[2].startswith("edgespec: trying: done in ")
    assert (tmp_path / "log").read_text().splitlines() == list(STEPS)


def test_the_clock_goes_on_while_a_command_is_silent(
    tmp_path: Path, watch: Callable[[list[str]], Watched]
) -> None:
    go = tmp_path / "go"
    command = script(f"while not os.path.exists({str(go)!r}): time.sleep(0.01)")
    watched = watch(progress(tmp_path / "log", *command))
    watched.sees("starting, 0 s")
    watched.sees("starting, 1 s")
    go.touch()
    assert watched.ended() == 0


def test_without_a_terminal_there_are_whole_lines(tmp_path: Path) -> None:
    command = script(*(f"print({line!r}); time.sleep(0.2)" for line in STEPS))
    done = subprocess.run(progress(tmp_path / "log", *command), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    first, last = done.stderr.splitlines()  # the next would come after 15 s
    assert first == "edgespec: trying: starting, 0 s"
    assert last.startswith("edgespec: trying: done in ")
    done = subprocess.run(
        progress(tmp_path / "log", *command, patch="progress._QUIET = 0.0"),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "\x1b" not in done.stderr
    assert "edgespec: trying: step 12 of 83 (14%), " in done.stderr


def test_a_failure_says_where_the_log_is_and_how_it_ends(tmp_path: Path) -> None:
    log = tmp_path / "new" / "log"
    command = script(
        "for i in range(40): print(f'line {i}')",
        "print('error: \\x1b]0;no\\x07 space', end='')",
        "sys.exit(3)",
    )
    done = subprocess.run(progress(log, *command), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    _, failed, *tail = done.stderr.splitlines()
    assert failed.startswith("edgespec: trying: failed after ")
    assert f"the log is {log} and ends with" in failed
    assert tail[-2:] == ["  line 39", "  error: ]0;no space"]
    assert len(tail) == 12
    assert log.read_text().startswith("line 0\nline 1\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_ends_all_that_runs(
    tmp_path: Path, watch: Callable[[list[str]], Watched], ignored: bool
) -> None:
    """Also a command that hears no signal, and what it started."""
    deaf = "for one in (signal.SIGINT, signal.SIGTERM): signal.signal(one, signal.SIG_IGN)"
    command = script(
        deaf * ignored,
        "child = subprocess.Popen(['sleep', '60'])",
        "print('[1/2] pids')",
        f"open({str(tmp_path / 'part')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')",
        f"os.rename({str(tmp_path / 'part')!r}, {str(tmp_path / 'pids')!r})",
        "while True: time.sleep(60)",
    )
    watched = watch(progress(tmp_path / "log", *command, patch="progress._PATIENCE = 0.5"))
    watched.sees("step 1 of 2")
    wait((tmp_path / "pids").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    watched.press(b"\x03")
    assert watched.ended() == 130
    assert watched.said.rstrip().endswith("edgespec: trying: canceled")
    assert "Traceback" not in watched.said
    assert "Traceback" not in (tmp_path / "log").read_text() or not ignored
    wait(lambda: not any(map(psutil.pid_exists, pids)), pids)


def test_an_end_from_outside_ends_all_that_runs(tmp_path: Path) -> None:
    process = subprocess.Popen(
        progress(tmp_path / "log", *script("print(os.getpid())", "time.sleep(60)")),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "log"
    wait(lambda: log.exists() and log.read_text().endswith("\n"))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said.endswith("edgespec: trying: canceled\n")
    wait(lambda: not psutil.pid_exists(int(log.read_text().split()[0])))


def test_what_cannot_run_is_one_line(tmp_path: Path) -> None:
    for log, command, word in (
        (tmp_path / "log", "/nowhere/pip", "/nowhere/pip"),
        (Path("/dev/null/log"), sys.executable, "/dev/null"),
    ):
        done = subprocess.run(progress(log, command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("edgespec: trying: failed: ")
        assert word in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- wheel.sh ---


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """wheel.sh with a `python` whose pip makes an empty wheel, or fails with what FAILS says."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
[ "$1" = -m ] || exec {sys.executable} "$@"
echo "$CMAKE_ARGS" >> {tmp_path}/ran
[ -z "$FAILS" ] || {{ echo "$FAILS"; exit 1; }}
while [ "$1" != --wheel-dir ]; do shift; done
touch "$2/some-1.0-py3-none-any.whl"
"""
    )
    python.chmod(0o755)

    def run(kind: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(PACKAGING / "wheel.sh"), kind, str(python)],
            env={**os.environ, "EDGESPEC_CACHE": str(tmp_path / "cache"), **env},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def test_a_wheel_is_compiled_once(tmp_path: Path, compiler: Callable[..., subprocess.CompletedProcess[str]]):
    first, again = compiler("native"), compiler("native")
    assert first.returncode == again.returncode == 0
    assert first.stdout == again.stdout
    wheel = Path(first.stdout.strip())
    assert wheel.is_relative_to(tmp_path / "cache" / "wheels")
    assert {path.name for path in wheel.parent.iterdir()} == {wheel.name, "build.log"}
    assert "compiling llama.cpp: done" in first.stderr
    assert again.stderr == ""
    others = [compiler("portable"), compiler("native", CXX="true")]  # other flags, another compiler
    assert len({first.stdout, *(one.stdout for one in others)}) == 3
    ran = (tmp_path / "ran").read_text().splitlines()
    assert len(ran) == 3
    assert all(f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={PACKAGING}/llama.cmake" in one for one in ran)
    assert ["GGML_CPU_ALL_VARIANTS=ON" in one for one in ran] == [False, True, False]


def test_a_failed_compilation_leaves_its_log_alone(
    tmp_path: Path, compiler: Callable[..., subprocess.CompletedProcess[str]]
):
    done = compiler("native", FAILS="g++: fatal error: Killed")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.endswith("  g++: fatal error: Killed\n")
    (folder,) = (tmp_path / "cache" / "wheels").iterdir()
    assert [path.name for path in folder.iterdir()] == ["build.log"]
    assert compiler("native").returncode == 0  # and the next one tries again


def test_an_unknown_wheel_is_refused(compiler: Callable[..., subprocess.CompletedProcess[str]]):
    done = compiler("gpu")
    assert done.returncode == 2
    assert "unknown kind 'gpu'" in done.stderr


# --- llama.cmake ---

TILES = ["-fno-tree-dse", "-fno-dse"]


def configured(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """CMake on a source tree of llama-cpp-python's layout, where two libraries have the file of the tiles."""
    folder = tmp_path / "vendor" / "llama.cpp" / "ggml" / "src"
    (folder / "ggml-cpu" / "amx").mkdir(parents=True, exist_ok=True)
    (folder / "ggml-cpu" / "other.cpp").write_text("int other;\n")
    (folder / "CMakeLists.txt").write_text(
        "foreach(name one two)\n"
        "  add_library(${name} ggml-cpu/amx/mmq.cpp ggml-cpu/other.cpp)\n"
        "endforeach()\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.21)\nproject(llama_cpp CXX)\n"
        "add_subdirectory(vendor/llama.cpp/ggml/src)\n"
    )
    cmake, ninja = (Path(sys.executable).with_name(name) for name in ("cmake", "ninja"))
    command = [
        cmake,
        "-S",
        tmp_path,
        "-B",
        tmp_path / "build",
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
    ]
    command += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DLLAMA_BUILD_COMMON=ON"]
    command += [f"-DCMAKE_PROJECT_llama_cpp_INCLUDE={PACKAGING}/llama.cmake"]
    return subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=120)


@pytest.fixture
def gnu() -> None:
    found = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
    if "Free Software Foundation" not in found.stdout:
        pytest.skip("the flags are for GCC")


def test_the_stores_of_the_tiles_are_kept_in_one_file_alone(tmp_path: Path, gnu: None) -> None:
    (tmp_path / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx").mkdir(parents=True)
    (tmp_path / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp").write_text(
        "int mmq;\n"
    )
    done = configured(tmp_path)
    assert done.returncode == 0, done.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    flags = [
        (Path(one["file"]).name, [flag for flag in TILES if flag in one["command"].split()])
        for one in commands
    ]
    assert sorted(flags) == [("mmq.cpp", TILES), ("mmq.cpp", TILES), ("other.cpp", []), ("other.cpp", [])]
    assert all(f"-ffile-prefix-map={tmp_path}=llama-cpp-python" in one["command"] for one in commands)


def test_a_file_of_the_tiles_that_moved_stops_the_build(tmp_path: Path) -> None:
    done = configured(tmp_path)
    assert done.returncode != 0
    assert "mmq.cpp has moved" in done.stderr


# --- compiled code ---

REMOVED = """
0000000000000000 <_Z4initv>:
   0:\tpush   %rbp
   1:\tvpxor  %xmm0,%xmm0,%xmm0
   5:\tmov    %rsp,%rbp
   8:\tmovb   $0x1,-0x40(%rsp)
   d:\tvmovdqu8 %ymm0,-0x3f(%rsp)
  18:\tldtilecfg -0x40(%rsp)
"""
"""What GCC 12 makes of `SOURCE` without the flags."""
SOURCE = """
#include <cstdint>
#include <immintrin.h>
struct Config { uint8_t palette = 0, row = 0, no[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };
void init() {
    Config config;
    config.palette = 1;
    for (int i = 0; i < 8; ++i) { config.rows[i] = 16; config.bytes[i] = 64; }
    _tile_loadconfig(&config);
}
"""


def test_removed_stores_are_found() -> None:
    assert loads(REMOVED) == 1
    assert [one.partition(":")[0] for one in never_stored(REMOVED)] == ["the columns' bytes", "the rows"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 processors")
def test_the_flags_keep_the_stores(tmp_path: Path, gnu: None) -> None:
    (tmp_path / "tiles.cpp").write_text(SOURCE)
    command = [os.environ.get("CXX", "c++"), "-O3", "-march=sapphirerapids", *TILES, "-c", "tiles.cpp"]
    subprocess.run([*command, "-o", "tiles.o"], cwd=tmp_path, check=True)
    listing = disassembled(tmp_path / "tiles.o")
    assert loads(listing) == 1
    assert never_stored(listing) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 processors")
def test_the_engine_here_stores_what_its_tiles_load() -> None:
    libraries = [path for path in folder().glob("libggml-cpu*.so") if not path.is_symlink()]
    listings = [disassembled(path) for path in libraries]
    assert listings
    assert [fault for listing in listings for fault in never_stored(listing)] == []
    flags = Path("/proc/cpuinfo").read_text().split()
    assert any(map(loads, listings)) == ("amx_int8" in flags and "avx512_vnni" in flags)
