"""Requantized drafts: real llama.cpp on the starter and on tiny models, real processes, real mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import psutil
import pytest
from making import EDGESPEC, edgespec, names
from tiny import write_tiny

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.store import resolve
from edgespec.models.vocab import first_difference
from edgespec.quant import draft, requant
from edgespec.quant.draft import Timing, make_draft
from edgespec.quant.requant import DraftType, draft_path, fingerprint, made_draft, requantize, work_folder


@pytest.fixture(autouse=True)
def _anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "UNDISTURBED", 0.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "small.gguf", "llama")


def weights(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


# --- what is made ---


def test_the_starter_in_q4_0_keeps_its_vocabulary_and_its_mind(tmp_path, starter_path, starter):
    before = hashlib.sha256(starter_path.read_bytes()).hexdigest()
    out = requantize(starter_path, tmp_path / "draft.gguf", "q4_0")
    made = check_gguf(out)
    assert set(made.types) == {"F32", "Q4_0"}
    assert made.tokenizer_digest == check_gguf(starter_path).tokenizer_digest
    assert made.has_chat_template
    assert names(tmp_path) == {"draft.gguf"}
    assert hashlib.sha256(starter_path.read_bytes()).hexdigest() == before
    with LlamaModel(out, LlamaOptions(context=128)) as model:
        assert first_difference(starter.vocab, model.vocab) is None
        text = model.vocab.tokenize(
            "The sea is large and old. The sea is deep and cold. The sea is full of fish."
        )
        best = []
        for sequence in (starter.sequence(), model.sequence()):
            best.append(sequence.forward(text, len(text)).argmax(1))
            sequence.close()
        assert (best[0] == best[1]).mean() > 0.5  # a random model agrees nowhere


@pytest.mark.parametrize("kind", get_args(DraftType))
def test_every_kind_has_the_weights_of_the_source(tmp_path, source, kind):
    out = requantize(source, tmp_path / "out.gguf", kind)
    assert set(check_gguf(out).types) == {"F32", kind.upper()}  # F32: the norms
    coarse = {"q4_0": 0.12, "iq4_nl": 0.12}.get(kind, 0.01)
    ours, theirs = weights(out), weights(source)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        error = np.linalg.norm(ours[name] - values) / np.linalg.norm(values)
        assert error < coarse, name


def test_a_quantized_source_is_upcast(tmp_path, source):
    small = requantize(source, tmp_path / "q4.gguf", "q4_0")
    wide = requantize(small, tmp_path / "bf16.gguf", "bf16")
    assert set(check_gguf(wide).types) == {"F32", "BF16"}
    np.testing.assert_allclose(
        weights(wide)["output.weight"], weights(small)["output.weight"], rtol=2**-8, atol=0
    )


def test_progress_ends_at_one(tmp_path, source):
    heard: list[float] = []
    requantize(source, tmp_path / "out.gguf", "q8_0", lambda fraction: heard.append(fraction) or True)
    assert heard[-1] == 1.0
    assert heard == sorted(heard)


# --- which draft belongs to which source ---


def test_a_made_draft_is_found_by_its_source(source):
    assert made_draft(source) is None
    out = requantize(source, draft_path(source, "q4_0"), "q4_0")
    assert out.name == "small.draft-q4_0.gguf"
    assert made_draft(source) == out
    assert made_draft(out) is None


def test_a_draft_of_another_source_is_not_used(source):
    requantize(source, draft_path(source, "q4_0"), "q4_0")
    write_tiny(source, "llama", extra=1)
    assert made_draft(source) is None


def test_one_changed_byte_makes_a_draft_stale(source):
    requantize(source, draft_path(source, "q4_0"), "q4_0")
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    assert made_draft(source) is None


@pytest.mark.parametrize("damage", [lambda data: data[:-64], lambda data: b"", lambda data: b"GGUF"])
def test_a_damaged_draft_is_not_used(source, damage):
    out = requantize(source, draft_path(source, "q4_0"), "q4_0")
    out.write_bytes(damage(out.read_bytes()))
    assert made_draft(source) is None


def test_a_file_that_only_has_the_name_is_not_used(source):
    write_tiny(draft_path(source, "q4_0"), "llama")
    assert made_draft(source) is None


def test_a_fingerprint_sees_all_parts_of_a_large_file(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(32 << 20))
    seen = {fingerprint(file)}
    for place in (0, (32 << 20) - 1):
        with file.open("r+b") as out:
            out.seek(place)
            out.write(b"x")
        seen.add(fingerprint(file))
    with file.open("ab") as out:
        out.write(b"\0")
    seen.add(fingerprint(file))
    assert len(seen) == 4


# --- mistakes leave nothing ---


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", b"GGUF\3\0\0\0"])
def test_a_source_that_is_no_model(tmp_path, content):
    source = tmp_path / "bad.gguf"
    source.write_bytes(content)
    with pytest.raises(EdgespecError, match=r"bad\.gguf"):
        requantize(source, tmp_path / "out.gguf", "q4_0")
    assert names(tmp_path) == {"bad.gguf"}


def test_a_truncated_source(tmp_path, source):
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(EdgespecError, match="bytes are missing"):
        requantize(source, tmp_path / "out.gguf", "q4_0")
    assert names(tmp_path) == {"small.gguf"}


def test_an_architecture_llama_cpp_does_not_know(tmp_path, source):
    source.write_bytes(source.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lxama", 1))
    with pytest.raises(EdgespecError, match=r"small\.gguf cannot be requantized.*lxama") as raised:
        requantize(source, tmp_path / "out.gguf", "q4_0")
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == {"small.gguf"}


def test_the_source_is_never_overwritten(source):
    before = source.read_bytes()
    with pytest.raises(EdgespecError, match="over itself"):
        requantize(source, source, "q4_0")
    assert source.read_bytes() == before


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, source, monkeypatch):
    monkeypatch.setattr(requant.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(EdgespecError, match="MiB are needed"):
        requantize(source, tmp_path / "out.gguf", "q4_0")
    assert names(tmp_path) == {"small.gguf"}


def test_a_folder_that_is_not_there(tmp_path, source):
    with pytest.raises(EdgespecError, match="cannot write in"):
        requantize(source, tmp_path / "missing" / "out.gguf", "q4_0")


@pytest.mark.skipif(sys.platform == "win32", reason="limits are set by ulimit")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, starter_path):
    (tmp_path / "model.gguf").symlink_to(starter_path)
    command = shlex.join([*EDGESPEC, "quant", "draft", str(tmp_path / "model.gguf")])
    # A limit on the size of files, in KiB, is the same failure of the same write.
    done = subprocess.run(["bash", "-c", f"ulimit -f 20000; exec {command}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [done.stderr.strip()]
    assert "disk or your quota is full" in done.stderr
    assert names(tmp_path) == {"model.gguf"}


def test_stopping_by_progress_leaves_nothing(tmp_path, starter_path):
    before = set(psutil.Process().children())  # workers that other tests left idle
    with pytest.raises(Cancelled):
        requantize(starter_path, tmp_path / "out.gguf", "q4_0", lambda fraction: fraction == 0)
    assert names(tmp_path) == set()
    assert set(psutil.Process().children()) <= before


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_nothing(tmp_path, starter_path, number, code):
    (tmp_path / "model.gguf").symlink_to(starter_path)
    command = [*EDGESPEC, "quant", "draft", str(tmp_path / "model.gguf")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(names(tmp_path)) == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in errors
    assert names(tmp_path) == {"model.gguf"}
    assert not any(str(tmp_path) in " ".join(other.info["cmdline"] or ()) for other in
                   psutil.process_iter(["cmdline"]))  # fmt: skip


def test_a_folder_goes_whenever_ctrl_c_strikes(tmp_path, monkeypatch):
    make = Path.mkdir

    def interrupted(path, *mode):
        make(path, *mode)
        raise KeyboardInterrupt

    with work_folder(tmp_path / "m.gguf", "draft") as folder:
        (folder / "half").write_text("written")
    assert names(tmp_path) == set()
    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), work_folder(tmp_path / "m.gguf", "draft"):
        pass
    assert names(tmp_path) == set()


def test_a_quantizer_that_dies_is_one_line(tmp_path, source, monkeypatch):
    monkeypatch.setattr(requant, "worker_command", lambda: [sys.executable, "-c", "import os; os.abort()"])
    with pytest.raises(EdgespecError, match="ended with code"):
        requantize(source, tmp_path / "out.gguf", "q4_0")
    assert names(tmp_path) == {"small.gguf"}


# --- the fastest is kept ---


@pytest.mark.parametrize(("after", "kept"), [(5.0, True), (9.8, False), (12.0, False)])
def test_only_what_measured_faster_is_kept(source, monkeypatch, after, kept):
    monkeypatch.setattr(
        draft, "measure",
        lambda source, made, progress: tuple(
            Timing(name, 1, time, time)
            for name, time in zip(("as it is", *made), (10.0, 11.0, after), strict=True)
        ),
    )  # fmt: skip
    report = make_draft(source, ("q8_0", "q4_0"))
    assert report.kept == made_draft(source) == (draft_path(source, "q4_0") if kept else None)
    assert names(source.parent) == {"small.gguf", *(["small.draft-q4_0.gguf"] if kept else [])}
    assert report.line == (
        "made a faster draft: 10.0 -> 5.0 ms per token"
        if kept
        else f"no faster draft: 10.0 ms per token as it is, 11.0 as q8_0, {after:.1f} as q4_0"
    )


def test_a_new_draft_replaces_the_old_and_touches_no_other_file(source, monkeypatch):
    requantize(source, draft_path(source, "q8_0"), "q8_0")
    foreign = write_tiny(draft_path(source, "mine"), "llama")
    monkeypatch.setattr(draft, "GAIN", 0.0)  # whatever they measured
    report = make_draft(source, ("q4_0",))
    assert report.kept == made_draft(source) == draft_path(source, "q4_0")
    assert names(source.parent) == {"small.gguf", "small.draft-q4_0.gguf", foreign.name}


def test_measuring_is_real(source):
    (timing,) = draft.measure(source, {}, seconds=0.1)
    assert timing.bytes == source.stat().st_size
    assert 0 < timing.token < 1000
    assert 0 < timing.reading < 1000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system keeps no thread on one core")
def test_what_was_measured_among_busy_programs_is_not_kept(source, monkeypatch):
    """Three endless loops on the core that it is measured on."""
    monkeypatch.undo()
    monkeypatch.setattr(draft, "GAIN", 0.0)  # else whatever they measured
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with pytest.raises(
            EdgespecError, match=r"other programs used \d+% of the processor.*nothing was kept"
        ):
            make_draft(source, ("q4_0",))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
        os.sched_setaffinity(0, cores)
    assert names(source.parent) == {"small.gguf"}


def test_a_model_that_cannot_roll_back_cannot_draft(tmp_path):
    source = write_tiny(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(EdgespecError, match=r"cannot draft.*running state"):
        make_draft(source)
    assert names(tmp_path) == {"mamba.gguf"}


def test_too_little_memory_is_said(source, monkeypatch):
    monkeypatch.setattr(draft, "memory_available", lambda: 1000)
    with pytest.raises(EdgespecError, match="memory"):
        make_draft(source)
    assert names(source.parent) == {"small.gguf"}


# --- the command line ---


def test_quant_draft_on_the_starter(tmp_path, starter_path):
    link = tmp_path / "model.gguf"
    link.symlink_to(starter_path)
    done = edgespec("quant", "draft", str(link), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["source"] == str(link)
    assert [one["kind"] for one in report["timings"]] == ["as it is", "q4_0"]
    kept = made_draft(link)
    assert report["kept"] == (str(kept) if kept else None)
    assert names(tmp_path) <= {"model.gguf", "model.draft-q4_0.gguf"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/x.gguf"], ["/nowhere/x.gguf"]),
        (["no-such-name"], ["no-such-name", "smollm2-135m"]),
        (["qwen2.5-coder-1.5b"], ["edgespec pull qwen2.5-coder-0.5b"]),
        (["smollm2-135m", "--kind", "q3"], ["--kind 'q3'", "q4_0"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    done = edgespec("quant", "draft", *arguments, EDGESPEC_MODELS=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)


def test_pull_makes_the_draft_of_a_pair(tmp_path):
    source = resolve("qwen2.5-coder-0.5b")
    (tmp_path / source.name).symlink_to(source)
    folder = {"EDGESPEC_MODELS": str(tmp_path), "EDGESPEC_OFFLINE": "1"}
    alone = edgespec("pull", "qwen2.5-coder-0.5b", **folder)
    assert (alone.returncode, alone.stdout.strip()) == (0, str(tmp_path / source.name))
    assert alone.stderr == ""  # only chatted with
    (tmp_path / load_catalog()["qwen2.5-coder-1.5b"].file).write_bytes(b"GGUF")
    plain = edgespec("pull", "qwen2.5-coder-0.5b", "--no-requantise", **folder)
    assert plain.returncode == 0
    assert plain.stderr == ""
    assert made_draft(tmp_path / source.name) is None
    done = edgespec("pull", "qwen2.5-coder-0.5b", **folder)
    assert done.returncode == 0
    assert done.stdout.strip() == str(tmp_path / source.name)
    begun, outcome = done.stderr.splitlines()
    assert "measuring" in begun
    assert "faster draft" in outcome
    assert "ms per token" in outcome
    if "made" in outcome:
        made = made_draft(tmp_path / source.name)
        assert made == draft_path(tmp_path / load_catalog()["qwen2.5-coder-0.5b"].file, "q4_0")
        assert edgespec("pull", "qwen2.5-coder-0.5b", **folder).stderr == ""  # once is enough
