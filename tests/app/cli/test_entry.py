"""The entry point of the frozen program and of its child processes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from edgespec.app.bench import busy
from edgespec.models.gguf import trial
from edgespec.models.hub import download
from edgespec.models.prompting import chat_template
from edgespec.quant import requant

PROGRAM = [sys.executable, "-m", "edgespec.app.cli.entry"]


def start(arguments: list[str], said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], input=said, capture_output=True, text=True, timeout=60, check=False
    )


def children(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The arguments with which a frozen program starts its children."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    commands = {
        "render": chat_template.worker_command(),
        "selftest": trial.worker_command(),
        "quantize": requant.worker_command(),
        "pip": download.pip_command(),
        "busy": busy.worker_command(),
    }
    assert {command[0] for command in commands.values()} == {sys.executable}
    return {name: command[1:] for name, command in commands.items()}


def test_it_is_edgespec() -> None:
    assert start(["--version"]).stdout.startswith("edgespec 0.")
    assert start(["_no-worker"]).returncode == 2


def test_every_child_is_what_its_starter_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = children(monkeypatch)
    request = {"source": "{{ a }}!", "variables": {"a": 1}, "limit": 9, "seconds": 5}
    done = start(commands["render"], json.dumps(request) + "\n")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{}, {"text": "1!"}]
    done = start(
        [*commands["quantize"], "/absent.gguf", "/absent/out.gguf", "q4_0", "pure", "1", "key", "value"]
    )
    assert done.returncode == 1
    assert "absent" in done.stderr
    monkeypatch.setattr(trial, "worker_command", lambda: [*PROGRAM, *commands["selftest"]])
    said = trial.run(lambda: {"engine": "llama.cpp", "kernels": ""}, "build", lambda: True).reports
    assert said["build"].startswith("llama.cpp ")
    assert start([*commands["pip"], "--version"]).stdout.startswith("pip ")
    with subprocess.Popen([*PROGRAM, *commands["busy"]]) as loop:
        with pytest.raises(subprocess.TimeoutExpired):
            loop.wait(2)
        loop.kill()


def test_the_child_that_renders_loads_nothing_else() -> None:
    code = "import sys; sys.argv = ['edgespec', '_render-worker']; from edgespec.app.cli import entry; "
    code += "entry.main(); print(sorted(sys.modules.keys() & {'numpy', 'typer', 'llama_cpp', 'textual'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["{}", "[]"]
