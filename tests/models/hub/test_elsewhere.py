"""Models of other programs: found by their names, used in place, never written to."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from commands import edgespec, one_line_error
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.hub.elsewhere import belongs_to_other, other_model, other_models
from edgespec.models.hub.store import resolve

REGISTRY = "manifests/registry.ollama.ai/library"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which no other program was used yet."""
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "own"))
    return tmp_path


def put(path: Path, data: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def ollama(folder: Path, name: str, data: bytes, *more: str, kind: str = "model") -> Path:
    """A model as Ollama keeps it: the manifest `name`, and the file under its SHA-256."""
    digest = hashlib.sha256(data).hexdigest()
    layers = [{"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"}]
    layers += [{"mediaType": f"application/vnd.ollama.image.{one}", "digest": "sha256:0"} for one in more]
    put(folder / name, json.dumps({"schemaVersion": 2, "layers": layers}).encode())
    return put(folder / f"blobs/sha256-{digest}", data)


def test_each_program_is_found_under_its_own_names(home: Path) -> None:
    folder = home / ".ollama/models"
    wanted = {
        "ollama:llama3.2:1b": ollama(folder, f"{REGISTRY}/llama3.2/1b", b"GGUF1", "template", "params"),
        "ollama:me/mine:latest": ollama(folder, "manifests/registry.ollama.ai/me/mine/latest", b"GGUF2"),
        "ollama:hf.co/a/b:Q4_K_M": ollama(folder, "manifests/hf.co/a/b/Q4_K_M", b"GGUF3"),
        "lmstudio:a/b-GGUF/b-Q4_K_M.gguf": put(home / ".lmstudio/models/a/b-GGUF/b-Q4_K_M.gguf"),
        "llama.cpp:a_b_c.gguf": put(home / ".cache/llama.cpp/a_b_c.gguf"),
        "gpt4all:d.gguf": put(home / ".local/share/nomic.ai/GPT4All/d.gguf"),
        "jan:a/b-Q4": put(home / ".local/share/Jan/data/llamacpp/models/a/b-Q4/model.gguf"),
    }
    hub = home / ".cache/huggingface/hub/models--a--b-GGUF"
    blob = put(hub / "blobs/0123")
    link = hub / "snapshots/abc/b-Q8_0.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    wanted["huggingface:a/b-GGUF/b-Q8_0.gguf"] = link
    assert {one.name: one.path for one in other_models()} == wanted
    for name, path in wanted.items():
        assert resolve(name) == path
        assert belongs_to_other(path)
    assert not belongs_to_other(home / "own/x.gguf")


def test_what_is_no_whole_model_is_left_out(home: Path) -> None:
    folder = home / ".ollama/models"
    ollama(folder, f"{REGISTRY}/adapted/1b", b"GGUF1", "adapter")
    ollama(folder, f"{REGISTRY}/picture/1b", b"GGUF2", kind="projector")
    ollama(folder, f"{REGISTRY}/gone/1b", b"GGUF3").unlink()
    hostile = b'{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]}'
    for number, data in enumerate((b"", b"[]", b'{"layers": 5}', b"[" * 100_000, hostile, b"x" * 2_000_000)):
        put(folder / f"{REGISTRY}/damaged/{number}", data)
    studio = home / ".lmstudio/models/a/b"
    put(studio / "mmproj-b-f16.gguf")
    put(studio / "notes.txt")
    put(studio / "m-00002-of-00002.gguf")
    assert other_models() == []
    put(studio / "m-00001-of-00002.gguf", b"GGUF12345")
    assert [(one.name, one.bytes) for one in other_models()] == [("lmstudio:a/b/m-00001-of-00002.gguf", 13)]


def test_the_environment_and_the_pointer_of_lm_studio_name_folders(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ollama(home / "moved", f"{REGISTRY}/a/1b", b"GGUF1")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "moved"))
    put(home / "studio/models/a/b/c.gguf")
    put(home / ".lmstudio-home-pointer", str(home / "studio").encode())
    assert [one.name for one in other_models()] == ["lmstudio:a/b/c.gguf", "ollama:a:1b"]
    put(home / ".lmstudio-home-pointer", b"\xff\x00")
    assert [one.name for one in other_models()] == ["ollama:a:1b"]


def test_a_name_of_no_program_is_not_searched(home: Path) -> None:
    assert other_model("huggingface:a/b/c.gguf") is None
    with pytest.raises(EdgespecError):
        resolve("ollama:nothing:1b")


def test_it_is_run_in_place_and_its_folder_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    folder = home / ".ollama/models"
    data = write_tiny(tmp_path / "tiny.gguf", "llama").read_bytes()
    ollama(folder, f"{REGISTRY}/tiny/1b", data)
    before = sorted(folder.rglob("*"))
    environment = {"HOME": str(home), "EDGESPEC_MODELS": os.environ["EDGESPEC_MODELS"]}
    done = edgespec("run", "hello", "-m", "ollama:tiny:1b", "--max-tokens", "2", env=environment)
    assert done.returncode == 0, done.stderr
    assert "ollama:tiny:1b" in edgespec("models", "--all", env=environment).stdout
    assert "ollama:tiny:1b" not in edgespec("models", env=environment).stdout
    done = edgespec("quant", "draft", "ollama:tiny:1b", env=environment)
    one_line_error(done, "another program", "only read")
    assert sorted(folder.rglob("*")) == before


def test_a_damaged_file_of_another_program_is_one_line(home: Path) -> None:
    ollama(home / ".ollama/models", f"{REGISTRY}/bad/1b", b"GGUF" + b"\xff" * 100)
    done = edgespec("run", "hello", "-m", "ollama:bad:1b", env={"HOME": str(home)})
    one_line_error(done, "sha256-")
