"""The memory a model needs: estimated for files of all kinds, and held against real processes and limits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cgroups import real_group
from commands import EDGESPEC, one_line_error
from tiny import write_tiny
from tiny_attention import write_gemma3
from tiny_onnx import write_tiny_onnx

from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.loading import EngineSpec, load_engine
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.models import memory
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.footprint import gguf_cache, gguf_weights, has_small_cache
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.selftest import settle
from edgespec.models.gguf.tensors import Tensor
from edgespec.models.memory import SWITCH, TooLargeError
from edgespec.models.onnx.check import _tables, check_onnx
from edgespec.models.onnx.graph import Graph, Node, Weight
from edgespec.models.onnx.model import OnnxModel, OnnxOptions

MB = 1 << 20


def summary(shapes: dict[str, tuple[int, ...]], **metadata: int) -> GgufSummary:
    """A file with tensors of a byte a weight."""
    tensors = {
        f"{name}.weight": Tensor("Q8_0", shape, 0, shape[0] * shape[1]) for name, shape in shapes.items()
    }
    size = sum(tensor.bytes for tensor in tensors.values())
    numbers = {f"some.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return GgufSummary("some", "some", numbers, 9, "", size, size, {"Q8_0": size}, tensors, False, 4096)


HEADS = {"attention__head_count": 8, "embedding_length": 64}
WIDTHS = {
    "grouped": (
        summary({"blk.0.attn_k": (64, 16), "blk.0.attn_v": (64, 24)}, block_count=1, **HEADS), 16 + 24
    ),
    # Layers that differ: metadata has such counts in arrays, which are not read.
    "not equal": (
        summary(
            {
                "blk.0.attn_k": (64, 16), "blk.0.attn_v": (64, 16),
                "blk.1.attn_k": (64, 8), "blk.1.attn_v": (64, 8),
            },
            block_count=2, **HEADS,
        ),
        48,
    ),
    "recurrent": (summary({"blk.0.ssm_in": (64, 256), "blk.0.ssm_out": (64, 64)}, block_count=1), 0),
    "every other layer recurrent": (
        summary(
            {
                "blk.0.ssm_in": (64, 256), "blk.0.attn_qkv": (64, 256),
                "blk.1.attn_k": (64, 16), "blk.1.attn_v": (64, 16),
            },
            block_count=2, **HEADS,
        ),
        32,
    ),
    "both kinds in each layer": (
        summary({"blk.0.ssm_in": (64, 9), "blk.0.attn_k": (64, 4), "blk.0.attn_v": (64, 4)}, block_count=1), 8
    ),
    "queries, keys and values in one": (
        summary({"blk.0.attn_qkv": (64, 96)}, block_count=1, attention__head_count_kv=2, **HEADS), 32
    ),
    "in one, with as many keys as queries": (
        summary({"blk.0.attn_qkv": (64, 96)}, block_count=1, **HEADS), 64
    ),
    "in one, with a number of heads that cannot be": (
        summary({"blk.0.attn_qkv": (64, 96)}, block_count=1, attention__head_count_kv=-4, **HEADS), 18
    ),
    "latent attention": (
        summary({"blk.0.attn_kv_a_mqa": (64, 20), "blk.0.attn_kv_b": (16, 99)}, block_count=1, **HEADS), 20
    ),
    "layers that use another's": (
        summary(
            {f"blk.{i}.attn_{kind}": (64, 16) for i in range(3) for kind in "kv"},
            block_count=3, attention__shared_kv_layers=2, **HEADS,
        ),
        32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDTHS)
def test_a_cache_is_as_wide_as_its_projections(name: str) -> None:
    file, width = WIDTHS[name]
    assert gguf_cache(file, LlamaOptions(), 10) == 10 * 2 * width
    assert gguf_cache(file, LlamaOptions(type_k="q8_0", type_v="q8_0"), 32) == 34 * width
    assert gguf_weights(file) == file.tensor_bytes


def test_layers_that_predict_further_tokens_are_not_loaded() -> None:
    shapes = {f"blk.{i}.{name}": (64, 16) for i in range(3) for name in ("attn_k", "attn_v", "ffn_up")}
    file = summary(shapes, block_count=3, nextn_predict_layers=1, **HEADS)
    assert gguf_weights(file) == 2 * 3 * 64 * 16
    assert gguf_cache(file, LlamaOptions(), 1) == 2 * 2 * 32


TAKEN = """
import sys, json
from edgespec.models import memory
from edgespec.models.gguf import footprint
from edgespec.models.gguf.selftest import settle
from edgespec.models.gguf.tensors import Tensor
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.backends import library
def taken():
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))
path, engine, context, sequences = sys.argv[1:]
options = LlamaOptions(engine=engine, context=int(context), sequences=int(sequences), threads=1)
library(engine)
asked = []
memory.memory_available = lambda: asked.append(taken()) or 1 << 60
needed, check = [], footprint.require_memory
footprint.require_memory = lambda name, *parts: needed.extend(parts) or check(name, *parts)
import pathlib
with LlamaModel(pathlib.Path(path), options) as model:
    sequences = [model.sequence() for _ in range(options.sequences)]
    sequences[0].forward([5] * 32, 32)
    weights, caches, logits, contexts = needed
    print(json.dumps([weights + caches + 2 * logits + (1 + contexts) * memory._BUFFERS, taken() - asked[0]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what memory a process took is read from /proc")
@pytest.mark.parametrize(("context", "sequences"), [(512, 1), (2048, 2), (0, 2)])
def test_what_is_needed_is_what_a_model_takes(starter_path, engine, context: int, sequences: int) -> None:
    arguments = [str(starter_path), engine, str(context), str(sequences)]
    done = subprocess.run(
        [sys.executable, "-c", TAKEN, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    needed, taken = json.loads(done.stdout)
    # Never more than it takes, but for what the allocator had at hand, and little less: buffers differ.
    assert needed < taken + 4 * MB
    assert taken < needed + (50 * MB if engine == "ik" else 25 * MB)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(
    starter_path, engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress: list[float] = []
    monkeypatch.setattr(memory, "memory_available", lambda: 200_000_000)
    options = LlamaOptions(engine=engine)
    settle(starter_path, options)  # a test of the engine would call progress, too
    with pytest.raises(TooLargeError) as caught:
        LlamaModel(starter_path, options, lambda fraction: not progress.append(fraction))
    assert progress == []
    needed = 238 if engine == "ik" else 221  # whose contexts have buffers of their own
    assert str(caught.value) == (
        f"{starter_path.name} needs about {needed} MB of memory and 200 MB are free: "
        f"choose a smaller model or context, or set {SWITCH}=1 to load it anyway"
    )
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(TooLargeError):
        LlamaModel(starter_path, options)
    monkeypatch.setenv(SWITCH, "1")
    LlamaModel(starter_path, options).close()


def test_a_context_of_the_files_own_length_is_counted(starter_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: 300_000_000)
    with pytest.raises(TooLargeError, match=r"315 MB"):  # 8,192 tokens
        LlamaModel(starter_path, LlamaOptions(context=0))
    with pytest.raises(TooLargeError, match=r"410 MB"):
        LlamaModel(starter_path, LlamaOptions(sequences=3))
    LlamaModel(starter_path, LlamaOptions(context=512, sequences=3)).close()


@pytest.mark.parametrize(
    ("needed", "free", "words"),
    [
        (1_200_000_001, 1_200_000_000, "about 1.3 GB of memory and 1.2 GB are"),
        (5_150_000_000, 3_099_999_999, "about 5.2 GB of memory and 3.0 GB are"),
        (1_000_000_000, 999_999_999, "about 1.0 GB of memory and 999 MB are"),
        (500_000_001, 500_000_000, "about 501 MB of memory and 500 MB are"),
        (9_999_000_000_000, 0, "about 9,999.0 GB of memory and 0 MB are"),
    ],
)
def test_the_larger_never_looks_smaller(
    needed: int, free: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: free)
    with pytest.raises(EdgespecError, match=words):
        memory.require_memory("some.gguf", needed - memory._BUFFERS, 0, 0)
    memory.require_memory("some.gguf", free - memory._BUFFERS, 0, 0)


def test_a_draft_model_that_does_not_fit_is_left_out(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([1 << 40, 1000])
    monkeypatch.setattr(memory, "memory_available", lambda: next(answers))
    draft = write_tiny(tmp_path / "draft.gguf", "llama", extra=3)
    options = LlamaOptions(least_context=64)  # for the target: a draft model has as much context
    with open_engine(tiny_llama, draft, suffix=False, options=options) as engine:
        assert engine.draft is None
        assert any(
            note.startswith("decoding without a draft model: draft.gguf needs about 18 MB")
            for note in engine.notes
        )
    with pytest.raises(StopIteration):
        next(answers)


NOTE = "memory is short: "


@pytest.mark.parametrize(
    ("free", "kv_type", "context", "cache", "words"),
    [
        (230, "f16", 4096, "f16", []),
        (230, "auto", 4096, "f16", []),
        (200, "f16", 2048, "f16", ["has a context of 2,048 instead of 4,096 tokens (--context 4096 refuses"]),
        (200, "auto", 4096, "q8_0", ["is of 8 bits, which changes its output a little"]),
        (155, "auto", 2048, "q8_0", ["context of 2,048", "of 8 bits"]),
        (155, "f16", 1024, "f16", ["context of 1,024"]),
    ],
)
def test_context_and_cache_are_smaller_where_memory_is_short(
    starter_path, monkeypatch: pytest.MonkeyPatch, free, kv_type, context, cache, words
) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: free * 1_000_000)
    spec = EngineSpec(model=str(starter_path), draft="none", kv_type=kv_type)
    with load_engine(spec) as engine:
        assert engine.context_length == context
        assert engine.model.options.type_k == engine.model.options.type_v == cache
        assert next(iter(engine.generate(Request([1, 2, 3], max_tokens=1)))).tokens
        notes = [note for note in engine.notes if note.startswith(NOTE)]
    assert len(notes) == len(words)
    assert all(word in note and starter_path.name in note for word, note in zip(words, notes, strict=True))


def test_what_was_asked_for_is_refused_where_memory_is_short(
    starter_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_available", lambda: 200_000_000)
    spec = EngineSpec(model=str(starter_path), draft="none", context=4096)
    with pytest.raises(TooLargeError, match="221 MB"):
        load_engine(spec)
    with load_engine(replace(spec, kv_type="q8_0")) as engine:
        assert engine.model.options.type_v == "q8_0"
        assert not any(note.startswith(NOTE) for note in engine.notes)
    monkeypatch.setattr(memory, "memory_available", lambda: 120_000_000)
    with pytest.raises(TooLargeError, match="221 MB"):
        load_engine(replace(spec, context=None, kv_type="auto"))


def test_a_small_cache_where_the_engine_has_one(ik, tmp_path, tiny_llama) -> None:
    gemma, spec = write_gemma3(tmp_path / "gemma.gguf"), EngineSpec(draft="none", kv_type="q8_0")
    with pytest.raises(EdgespecError, match=r"ik has no q8_0 cache for gemma\.gguf: leave out --engine ik"):
        load_engine(replace(spec, model=str(gemma), engine="ik"))
    with load_engine(replace(spec, model=str(gemma))) as engine:
        assert engine.model.options.engine == "llama.cpp"
        assert engine.model.options.type_k == "q8_0"
    with pytest.raises(EdgespecError, match="16 numbers each"):
        load_engine(replace(spec, model=str(tiny_llama)))
    assert not has_small_cache(check_gguf(tiny_llama), "llama.cpp")


def test_quantized_values_have_flash_attention() -> None:
    assert LlamaOptions(flash_attention=False).with_cache("q8_0").flash_attention is None
    assert LlamaOptions(flash_attention=False).with_cache("f16").flash_attention is False
    assert LlamaOptions(flash_attention=True).with_cache("q8_0").flash_attention is True


def test_an_onnx_context_is_smaller_where_memory_is_short(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, notes = write_tiny_onnx(tmp_path / "tiny"), list[str]()
    with OnnxModel(folder, OnnxOptions(context=64)) as model:
        each = model.cache_bytes // 64
        needed = model.summary.tensor_bytes - model.summary.mapped_bytes + 2 * 32 * 257 * 4 + memory._BUFFERS
    monkeypatch.setattr(memory, "memory_available", lambda: needed + 20 * each)
    with OnnxModel(folder, OnnxOptions(context=64, least_context=16), note=notes.append) as model:
        assert model.context_length == model.options.context == 16
    assert notes == [
        "memory is short: tiny has a context of 16 instead of 64 tokens (--context 64 refuses that)"
    ]
    with pytest.raises(TooLargeError):
        OnnxModel(folder, OnnxOptions(context=64, least_context=32))


def test_an_onnx_model_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = (write_tiny_onnx(tmp_path / name, external=name == "out") for name in ("out", "in"))
    table = 257 * 32 * 4
    assert check_onnx(outside).mapped_bytes == table
    assert check_onnx(inside).mapped_bytes == 0
    monkeypatch.setattr(memory, "memory_available", lambda: 1000)
    with pytest.raises(TooLargeError, match=r"^out needs about 18 MB of memory and 0 MB are free"):
        OnnxModel(outside)
    needed: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        "edgespec.models.onnx.model.require_memory", lambda name, *parts: needed.append(parts)
    )
    with OnnxModel(outside, OnnxOptions(context=100, sequences=3)) as model:
        assert needed == [(model.summary.tensor_bytes - table, 3 * model.cache_bytes, 32 * 257 * 4)]


def test_a_table_that_is_multiplied_with_as_well_is_no_table() -> None:
    outside = (("location", "model.onnx.data"),)
    weights = {name: Weight(name, 1, (9, 4), outside) for name in ("embed", "tied", "head")}
    nodes = [
        Node(op, "", inputs, (), 0, 0)
        for op, *inputs in (
            ("Gather", "embed", "input_ids"), ("Gather", "tied", "input_ids"), ("MatMul", "x", "tied"),
            ("MatMul", "x", "head"), ("Gather", "x", "head"),
        )
    ]  # fmt: skip
    assert [weight.name for weight in _tables(Graph(nodes=nodes, weights=weights))] == ["embed"]


# --- real limits ---


def test_a_real_limit_refuses_what_it_would_end(tmp_path: Path) -> None:
    with real_group() as group:
        group.limit(memory=400 * MB)
        done = group.run(*EDGESPEC, "run", "-m", "qwen2.5-coder-0.5b", "Hi")
        one_line_error(done, "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf needs about 592 MB", "MB are free")


def test_what_fits_a_real_limit_runs_though_files_fill_it(starter_path, tmp_path: Path) -> None:
    fill = f"for _ in range(2): open({str(tmp_path / 'file')!r}, 'ab').write(bytes({200 * MB}))"
    with real_group() as group:
        group.limit(memory=450 * MB)
        assert group.run(sys.executable, "-c", fill).returncode == 0
        env = {"EDGESPEC_CACHE": str(tmp_path), "OMP_WAIT_POLICY": "passive"}
        command = ["run", "-m", str(starter_path), "The capital of France is", "--raw", "--max-tokens", "4"]
        done = group.run(*EDGESPEC, *command, "--draft", "none", env=env)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert (tmp_path / "file").stat().st_size == 400 * MB
