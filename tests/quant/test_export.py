"""What surrounds an export: refusals, a folder that appears whole or not at all. The exporter is faked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tiny import write_tiny
from tiny_onnx import write_tiny_onnx

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.hub.store import is_onnx
from edgespec.quant import export
from edgespec.quant.export import ExportSource, export_onnx, find_source

EDGESPEC = [sys.executable, "-m", "edgespec.app.cli.main"]


@pytest.fixture(autouse=True)
def _extra_is_there(monkeypatch):
    monkeypatch.setattr(export, "EXTRA", ("json",))


@pytest.fixture
def source(tmp_path: Path) -> ExportSource:
    return find_source(str(write_tiny(tmp_path / "small.gguf", "llama")))


def fake(monkeypatch, body: str) -> None:
    """Let a few lines of Python stand for the exporter; they know `source`, `work` and `bits`."""
    head = "import os, pathlib, shutil, signal, sys, time\nsource, work, bits = sys.argv[1:]\n"
    head += "work = pathlib.Path(work)\n"
    monkeypatch.setattr(export, "worker_command", lambda: [sys.executable, "-c", head + body])


def copies(tmp_path: Path) -> str:
    """An exporter that writes a model which runs."""
    good = write_tiny_onnx(tmp_path / "good")
    return f"shutil.copytree({str(good)!r}, work / 'model')\n"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"good"}


def test_the_folder_appears_with_what_was_written(tmp_path, source, monkeypatch):
    fake(monkeypatch, copies(tmp_path) + "(work / 'model' / 'note').write_text(f'{source} {bits}')")
    out = export_onnx(source, tmp_path / "out", 8)
    assert is_onnx(out)
    assert (out / "note").read_text() == f"{source.path} 8"
    assert names(tmp_path) == {"small.gguf", "out"}


def test_progress_is_what_the_exporter_says(tmp_path, source, monkeypatch):
    say = "(work / 'progress').write_text('0.5 halfway there')\ntime.sleep(1)\n"
    fake(monkeypatch, copies(tmp_path) + say)
    notes = set()

    def hear(what: str, fraction: float) -> bool:
        notes.add((what, fraction))
        return True

    export_onnx(source, tmp_path / "out", 4, progress=hear)
    assert ("halfway there", 0.5) in notes


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory"),
        ("os.abort()", "ended with code"),
        ("sys.exit('ValueError: the shape \\x1b[2J is odd')", r"ValueError: the shape \\x1b\[2J is odd"),
        ("sys.exit('OSError: [Errno 28] No space left on device')", "disk is full"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_exporter_that_dies_leaves_nothing(tmp_path, source, monkeypatch, body, words):
    fake(monkeypatch, copies(tmp_path) + body)
    with pytest.raises(EdgespecError, match=words) as caught:
        export_onnx(source, tmp_path / "out", 8)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"small.gguf"}


def test_a_model_that_does_not_run_is_not_kept(tmp_path, source, monkeypatch):
    fake(monkeypatch, copies(tmp_path) + "os.truncate(work / 'model' / 'model.onnx.data', 100)")
    with pytest.raises(EdgespecError, match="does not run here"):
        export_onnx(source, tmp_path / "out", 8)
    assert names(tmp_path) == {"small.gguf"}


def test_stopping_ends_the_exporter_and_leaves_nothing(tmp_path, source, monkeypatch):
    fake(monkeypatch, copies(tmp_path) + "time.sleep(300)")
    start = time.monotonic()
    with pytest.raises(Cancelled):
        export_onnx(source, tmp_path / "out", 8, progress=lambda *_: time.monotonic() < start + 1)
    assert names(tmp_path) == {"small.gguf"}
    commands = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not any(str(tmp_path) in one for one in commands)


# --- what is there already ---


def test_a_model_is_replaced_on_request_only(tmp_path, source, monkeypatch):
    fake(monkeypatch, copies(tmp_path))
    out = write_tiny_onnx(tmp_path / "out")
    (out / "mark").touch()
    with pytest.raises(EdgespecError, match="--force"):
        export_onnx(source, out, 8)
    assert (out / "mark").exists()
    export_onnx(source, out, 8, force=True)
    assert is_onnx(out)
    assert not (out / "mark").exists()
    assert names(tmp_path) == {"small.gguf", "out"}


def test_a_failure_keeps_the_model_that_was_to_be_replaced(tmp_path, source, monkeypatch):
    fake(monkeypatch, "sys.exit('no')")
    out = write_tiny_onnx(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(EdgespecError, match="no"):
        export_onnx(source, out, 8, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == {"small.gguf", "out"}


def test_an_empty_folder_is_filled(tmp_path, source, monkeypatch):
    fake(monkeypatch, copies(tmp_path))
    (tmp_path / "out").mkdir()
    assert is_onnx(export_onnx(source, tmp_path / "out", 8))


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_model_is_never_replaced(tmp_path, source, monkeypatch, force):
    fake(monkeypatch, copies(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    write_tiny_onnx(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = names(tmp_path)
    for name in ("folder", "file", "link"):
        with pytest.raises(EdgespecError, match="choose another name"):
            export_onnx(source, tmp_path / name, 8, force=force)
    assert names(tmp_path) == before
    assert (tmp_path / "folder" / "letter.txt").read_text() == "dear"


# --- room, extras, sources ---


def test_too_little_disk_is_said_before_anything_is_done(tmp_path, source, monkeypatch):
    fake(monkeypatch, "sys.exit('was run')")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(EdgespecError, match=r"not enough disk .* 1 are free"):
        export_onnx(source, tmp_path / "out", 8)
    assert names(tmp_path) == {"small.gguf"}


def test_too_little_memory_is_said_before_anything_is_done(tmp_path, source, monkeypatch):
    fake(monkeypatch, "sys.exit('was run')")
    monkeypatch.setattr(export, "memory_available", lambda: 100 << 20)
    with pytest.raises(EdgespecError, match=r"MiB of memory and 100 are free"):
        export_onnx(source, tmp_path / "out", 8)
    assert names(tmp_path) == {"small.gguf"}


def test_a_folder_that_is_not_there_is_said(tmp_path, source):
    with pytest.raises(EdgespecError, match="nowhere"):
        export_onnx(source, tmp_path / "nowhere" / "out", 8)


def test_a_missing_extra_is_one_line_that_says_what_to_do(tmp_path, source, monkeypatch):
    monkeypatch.setattr(export, "EXTRA", ("json", "not_there", "nor_this"))
    with pytest.raises(EdgespecError) as caught:
        export_onnx(source, tmp_path / "out", 8)
    said = str(caught.value)
    assert "not_there, nor_this" in said
    assert "pip install 'edgespec[export]'" in said
    assert "CPU build" in said
    assert "\n" not in said


def test_a_damaged_gguf_never_reaches_the_exporter(tmp_path, source):
    with source.path.open("r+b") as file:
        file.truncate(source.path.stat().st_size - 100)
    with pytest.raises(EdgespecError, match="bytes are missing"):
        find_source(str(source.path))


def checkpoint(folder: Path, config: object = None, header: bytes | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    if header is None:
        header = json.dumps({"__metadata__": {}, "a": {"shape": [3, 4]}, "b": {"shape": [5]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_a_checkpoint_is_weighed_by_its_headers(tmp_path):
    assert find_source(str(checkpoint(tmp_path / "hub"))) == ExportSource(tmp_path / "hub", 17)


@pytest.mark.parametrize(
    ("config", "header", "words"),
    [
        (None, b"{]", "damaged"),
        (None, b'{"a": 3}', "damaged"),
        ([], None, "quantized already"),
        ({"quantization_config": {"quant_method": "gptq"}}, None, "quantized already"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_one_line(tmp_path, config, header, words):
    with pytest.raises(EdgespecError, match=words):
        find_source(str(checkpoint(tmp_path / "hub", config, header)))


def test_pickled_weights_are_no_checkpoint(tmp_path):
    (checkpoint(tmp_path / "hub") / "model.safetensors").rename(tmp_path / "hub" / "pytorch_model.bin")
    with pytest.raises(EdgespecError, match=r"\.safetensors"):
        find_source(str(tmp_path / "hub"))


def test_a_name_on_the_hub_is_not_fetched_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGESPEC_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(EdgespecError, match="offline"):
        find_source("nobody/nothing-of-this-name")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smollm2-135m", "--bits", "5", "--out", "out"], ["--bits 5", "4, 8"]),
        (["smollm2-135m", "--out", "out", "--text", "/nowhere"], ["/nowhere"]),
        (["/nowhere/x.gguf", "--out", "out"], ["/nowhere/x.gguf"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words, monkeypatch):
    # The extra's libraries are not looked at further than whether they are there.
    for name in ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "onnxruntime_genai"):
        (tmp_path / f"{name}.py").touch()
    done = subprocess.run(
        [*EDGESPEC, "quant", "onnx", *arguments],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)
    assert not (tmp_path / "out").exists()
