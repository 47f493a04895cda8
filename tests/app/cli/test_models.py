"""`edgespec models`: the list, and the verification of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import edgespec

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def folder(tmp_path: Path, starter_path: Path) -> Path:
    """A models folder with a copy of the starter, and a file of unknown origin."""
    shutil.copy(starter_path, tmp_path / NAME)
    (tmp_path / "stray.gguf").write_bytes(b"GGUF")
    return tmp_path


def test_verify_finds_a_flipped_bit(folder: Path) -> None:
    env = {"EDGESPEC_MODELS": str(folder)}
    done = edgespec("models", "verify", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good", str(folder / NAME), "unknown", str(folder / "stray.gguf")]
    with (folder / NAME).open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    done = edgespec("models", "verify", "smollm2-135m", "--json", env=env)
    assert done.returncode == 1
    assert json.loads(done.stdout) == [{"path": str(folder / NAME), "state": "damaged"}]
    assert done.stderr.startswith(f"edgespec: damaged: {NAME}: ")
    assert edgespec("models", "verify", "stray.gguf", env=env).returncode == 0


def test_verify_of_what_is_not_here_is_one_line(folder: Path) -> None:
    done = edgespec("models", "verify", "\x1b[2J", env={"EDGESPEC_MODELS": str(folder)})
    assert done.returncode == 1
    assert "\x1b" not in done.stderr
    assert "is not installed" in done.stderr
    assert edgespec("models", "--json", env={"EDGESPEC_MODELS": str(folder)}).returncode == 0
