"""Real exports of tiny models, by torch, transformers and the model builder: `make test-export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from edgespec.core import EdgespecError
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.onnx.check import check_onnx
from edgespec.models.runtime import load_model
from edgespec.quant.assess import assess
from edgespec.quant.export import EXTRA, export_onnx, find_source

for name in EXTRA:
    pytest.importorskip(name)

EDGESPEC = [sys.executable, "-m", "edgespec.app.cli.main"]
TEXT = "The sea is large and old: 1234 ships, ab and ba.\n" * 12


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny GGUF file whose one merge makes a token that it has."""
    return write_tiny(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", extra=1, replaced=(257, "ab"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tiny_checkpoint(folder: Path, *, tied: bool) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=300, eos_token_id=299, tie_word_embeddings=tied, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gguf_becomes_a_folder_that_answers_alike(tmp_path, source, bits):
    steps = []
    out = export_onnx(
        find_source(str(source)), tmp_path / "out", bits, progress=lambda *step: not steps.append(step)
    )
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= names(out)
    assert names(tmp_path) == {"out"}
    assert max(fraction for _, fraction in steps) > 0.9
    found = assess(source, out, TEXT)
    assert found.same_tokens
    assert found.agreement.top1 > (0.4 if bits == 4 else 0.9)  # a random model agrees in one of 258
    with load_model(out, LlamaOptions(context=64, max_rows=1)) as model:
        assert model.vocab.tokenize("ab") == [257]
        assert model.vocab.is_end(256)
        assert model.vocab.size == 258


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_compared_with_what_transformers_computes(tmp_path, tied):
    folder = tiny_checkpoint(tmp_path / "hub", tied=tied)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = export_onnx(find_source(str(folder)), tmp_path / "out", 8)
    found = assess(folder, out, TEXT)
    assert found.agreement.top1 > 0.9
    assert found.agreement.divergence < 0.01
    assert found.milliseconds.keys() == {"made"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == {"hub", "out"}
    summary = check_onnx(out)
    assert summary.vocab_size == 300
    tables = 300 * 64 * 9 // 8 * (1 if tied else 2)
    assert (out / "model.onnx.data").stat().st_size < tables + 2 * 64 * 64 * 8 * 2 + 300_000


def test_a_wrong_model_does_not_agree(tmp_path, source):
    out = export_onnx(find_source(str(source)), tmp_path / "out", 8)
    data = np.memmap(out / "model.onnx.data", np.uint8, "r+")
    data[len(data) // 2 :] = data[len(data) // 2 :][::-1].copy()
    data.flush()
    del data
    assert assess(source, out, TEXT).agreement.top1 < 0.5


def test_programs_of_a_checkpoint_are_not_run(tmp_path):
    folder = tiny_checkpoint(tmp_path / "hub", tied=True)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    with pytest.raises(EdgespecError) as caught:
        export_onnx(find_source(str(folder)), tmp_path / "out", 8)
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    assert names(tmp_path) == {"hub"}


def test_an_architecture_nobody_can_export_is_one_line(tmp_path):
    source = write_tiny(tmp_path / "mamba.gguf", "mamba")
    with pytest.raises(EdgespecError, match=r"mamba\.gguf cannot be exported") as caught:
        export_onnx(find_source(str(source)), tmp_path / "out", 8)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"mamba.gguf"}


def test_the_command_reports_what_it_made(tmp_path, source):
    text = tmp_path / "text"
    text.write_text(TEXT)
    out = tmp_path / "out"
    done = subprocess.run(
        [*EDGESPEC, "quant", "onnx", source, "--bits", "8", "--out", out, "--text", text, "--json"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["made"] == str(out)
    assert report["made_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert report["agreement"]["top1"] > 0.9
    assert "building the graph" in done.stderr  # shorter parts of what the child notes can pass unheard
