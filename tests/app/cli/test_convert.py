"""`quant gguf`, and the errors of `quant onnx`, on the command line with a real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_tiny

from edgespec.app.cli.convert import own_text
from edgespec.models.gguf.check import check_gguf
from edgespec.quant.agreement import TOKENS
from edgespec.quant.requant import requantize, size_as

EDGESPEC = [sys.executable, "-m", "edgespec.app.cli.main"]


def edgespec(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*EDGESPEC, "quant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_there_is_text_enough_to_compare_on(starter):
    assert len(starter.vocab.tokenize(own_text())) >= TOKENS


def test_the_starter_in_eight_bits_agrees_with_itself(tmp_path, starter_path, starter):
    text, folder = tmp_path / "text", tmp_path / "made"
    text.write_text(own_text()[:1500])
    folder.mkdir()
    out = folder / "made.gguf"
    done = edgespec("gguf", "smollm2-135m", "--type", "Q8_0", "--out", out, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["source"], report["made"]) == (str(starter_path), str(out))
    assert (report["source_bytes"], report["made_bytes"]) == (starter_path.stat().st_size, out.stat().st_size)
    assert report["agreement"]["tokens"] == len(starter.vocab.tokenize(text.read_text()))
    assert report["agreement"]["top1"] > 0.9  # chance would be one in 49,152
    assert 0 < report["agreement"]["divergence"] < 0.1
    assert report["same_tokens"] is True
    assert {name: set(times) for name, times in report["milliseconds"].items()} == {
        "source": {"1", "4", "8"},
        "made": {"1", "4", "8"},
    }
    assert done.stderr.splitlines()[0].endswith("writing q8_0")  # no terminal: plain lines
    assert "\x1b" not in done.stderr
    assert [path.name for path in folder.iterdir()] == ["made.gguf"]


def test_a_mixture_is_llama_cpps_and_a_table_says_what_it_is_worth(tmp_path):
    source, text = write_tiny(tmp_path / "small.gguf", "llama"), tmp_path / "text"
    text.write_text("The sea is large and old. " * 20)
    out = tmp_path / "out.gguf"
    done = edgespec("gguf", source, "--type", "q4_0", "--out", out, "--text", text)
    assert done.returncode == 0, done.stderr
    assert set(check_gguf(out).types) > {"Q4_0", "F32"}  # the head is kept in a wider type
    assert "tokens/s" in done.stdout
    assert "next tokens match the source; KL divergence" in done.stdout
    assert done.stdout.splitlines()[-1] == str(out)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q4_0", "iq4_nl"])
def test_a_size_is_foreseen(tmp_path, kind, starter_path):
    foreseen = size_as(starter_path, check_gguf(starter_path), kind, pure=False)
    out = requantize(starter_path, tmp_path / "out.gguf", kind, pure=False)
    assert 0.6 * foreseen < out.stat().st_size <= foreseen


def test_what_is_there_is_replaced_on_request_only(tmp_path):
    source, out = write_tiny(tmp_path / "small.gguf", "llama"), tmp_path / "out.gguf"
    out.write_text("dear")
    arguments = ("gguf", source, "--type", "q8_0", "--out", out)
    refused = edgespec(*arguments)
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    assert out.read_text() == "dear"
    assert edgespec(*arguments, "--force").returncode == 0
    assert check_gguf(out).types["Q8_0"]
    folder = tmp_path / "folder"
    folder.mkdir()
    refused = edgespec("gguf", source, "--type", "q8_0", "--out", folder, "--force")
    assert refused.returncode == 1
    assert "choose another name" in refused.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_end_from_outside_leaves_nothing(tmp_path, starter_path):
    command = [*EDGESPEC, "quant", "gguf", "smollm2-135m", "--type", "iq4_nl", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not os.listdir(tmp_path) and time.monotonic() < deadline:  # noqa: PTH208
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-name", "--type", "q8_0"], ["no-such-name"]),
        (["smollm2-135m", "--type", "q3"], ["--type 'q3'", "q4_k_m", "bf16"]),
        (["smollm2-135m", "--type", "q8_0", "--text", "/nowhere/text"], ["/nowhere/text"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, words):
    done = edgespec("gguf", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_onnx_is_no_source_of_a_gguf(tmp_path: Path):
    from tiny_onnx import write_tiny_onnx

    done = edgespec("gguf", write_tiny_onnx(tmp_path / "model"), "--type", "q8_0", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "folder" in done.stderr
