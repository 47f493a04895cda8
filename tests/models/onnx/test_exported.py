"""The exported models in the models folder against the GGUF files they were made of: `make test-export`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgespec.app.cli.convert import own_text
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.hub.store import resolve
from edgespec.models.onnx.check import check_onnx
from edgespec.models.runtime import load_model
from edgespec.quant.agreement import CHUNK, WINDOW, compare, reader, windows

TOKENS = 1000
ACTIVATIONS = 16 << 20  # of a pass of 128 tokens, and the graph itself
NAMES = ("smollm2-135m", "qwen2.5-coder-0.5b")

MEMORY = """
import ctypes, json, sys
from pathlib import Path
from edgespec.models.onnx import model as onnx
from edgespec.models.onnx.check import check_onnx
from edgespec.models.onnx.vocab import OnnxVocab

def taken():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

vocab = OnnxVocab(check_onnx(Path(sys.argv[1])))  # the tokenizer's memory is not the model's
vocab.tokenize("The sea is large and old.")
onnx.OnnxVocab = lambda summary: vocab
onnx.providers.runtime()
ctypes.CDLL(None).malloc_trim(0)  # what the tokenizer's reading left free would not be counted again
before = taken()
with onnx.OnnxModel(Path(sys.argv[1]), onnx.OnnxOptions(context=1024, max_rows=8)) as model:
    sequence = model.sequence()
    sequence.forward(list(range(1000)))
    for token in range(8):
        sequence.forward([token])
    print(json.dumps({"taken": taken() - before, "cache": model.cache_bytes}))
"""


@pytest.mark.parametrize(("bits", "least"), [(8, 0.95), (4, 0.6)])
@pytest.mark.parametrize("name", NAMES)
def test_the_next_token_is_the_ggufs(exported: Callable[[str], Path], name, bits, least):
    options = LlamaOptions(context=2 * WINDOW, max_rows=CHUNK)
    with (
        load_model(resolve(name), options) as source,
        load_model(exported(f"{name}-int{bits}"), options) as made,
    ):
        text = own_text()
        tokens = source.vocab.tokenize(text)
        assert made.vocab.tokenize(text) == tokens
        found = compare(reader(source.sequence()), reader(made.sequence()), windows(tokens[:TOKENS]))
    print(f"{name} int{bits}: {found.top1:.1%}, {found.divergence:.4f} nats")
    assert found.tokens == TOKENS
    assert found.top1 >= least


@pytest.mark.parametrize("name", NAMES)
def test_one_table_serves_embeddings_and_head(exported, name):
    """No table in fp32 or fp16: the file takes 5 bits a weight, with scales, and little else."""
    folder = exported(f"{name}-int4")
    weights = json.loads((folder / "genai_config.json").read_text())["model"]
    parameters = {"smollm2-135m": 134_515_008, "qwen2.5-coder-0.5b": 494_032_768}[name]
    tables = 2 * 4 * weights["context_length"] * weights["decoder"]["head_size"] // 2  # of rotary embeddings
    assert check_onnx(folder).weights.stat().st_size < 1.02 * parameters * 5 / 8 + tables


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", NAMES)
def test_running_takes_the_weights_a_table_and_the_cache(exported, name):
    folder = exported(f"{name}-int4")
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]
    table = decoder["vocab_size"] * decoder["decoder"]["hidden_size"] * 5 // 8
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, timeout=200, check=True
    )
    found = json.loads(done.stdout)
    weights = check_onnx(folder).weights.stat().st_size
    sizes = {"weights": weights, "table": table, **found}
    print(name, {key: f"{value >> 20} MiB" for key, value in sizes.items()})
    assert found["taken"] <= weights + table + found["cache"] + ACTIVATIONS
