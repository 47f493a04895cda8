"""GGUF models on both native engines: what test_contract.py does not ask of every runtime."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.model import LlamaModel, LlamaOptions, LlamaSequence
from edgespec.models.gguf.native import BackendName
from edgespec.models.vocab import first_difference

TEXT = "The quick brown fox jumps over the lazy dog because the dog would not move."


@pytest.fixture(scope="module")
def starter(starter_path: Path, engine: BackendName) -> Iterator[LlamaModel]:
    with LlamaModel(starter_path, LlamaOptions(context=512, sequences=4, engine=engine)) as model:
        yield model


@pytest.fixture
def sequence(starter: LlamaModel) -> Iterator[LlamaSequence]:
    sequence = starter.sequence()
    yield sequence
    sequence.close()


def test_a_prompt_is_read_in_the_batch_that_others_rows_are_in(starter, sequence, monkeypatch):
    if not starter.shares_passes:
        pytest.skip("its sequences share no batch")
    other = starter.sequence()
    tokens = starter.vocab.tokenize(TEXT)
    alone = sequence.forward(tokens, 1).copy()
    sequence.rollback(0)
    other.forward(tokens[:5])
    batches: list[int] = []
    decode = starter._decode
    monkeypatch.setattr(
        starter,
        "_decode",
        lambda parts: (batches.append(sum(len(new) for _, new, _ in parts)), decode(parts)),
    )
    logits, rows = starter.forward([(sequence, tokens, 1), (other, tokens[5:9], 4)])
    assert batches == [len(tokens) + 4]
    assert (logits.shape[0], rows.shape[0]) == (1, 4)
    assert logits.argmax() == alone.argmax()
    np.testing.assert_allclose(logits, alone, atol=0.5)
    batches.clear()
    long = (tokens * 20)[:270]  # more than two batches: what is read first, then the rest with the rows
    sequence.rollback(0)
    starter.forward([(sequence, long, 1), (other, tokens[9:13], 4)])
    assert batches == [128, 18, 128]
    assert list(sequence.tokens) == long
    other.close()


def test_the_last_row_predicts_text(starter, sequence):
    row = sequence.forward(starter.vocab.tokenize("The capital of France is"))[0]
    assert starter.vocab.piece(int(row.argmax())) == b" Paris"


def test_each_sequence_has_a_whole_context_whatever_others_hold(tiny_llama, engine):
    options = LlamaOptions(context=256, sequences=3, engine=engine)
    with LlamaModel(tiny_llama, options) as model:
        assert model.context_length == 256
        if model.shares_passes:  # in a cache for all, each row would be compared with the tokens of all
            assert model._C.llama_n_ctx_seq(model._contexts[0]) == 256
        sequences = [model.sequence() for _ in range(3)]
        for one in sequences:
            one.forward([1] * 256)
        for one in sequences:
            with pytest.raises(ValueError, match="do not fit into a context of 256"):
                one.forward([1])
            one.rollback(250)
        model.forward([(one, [2] * 6, 1) for one in sequences])
        assert [len(one.tokens) for one in sequences] == [256] * 3


def test_texts_of_any_length_and_order_give_what_each_gives_alone(starter, engine):
    """The engine splits such a pass into several: rows come in order, and each text sees itself alone."""
    sequences = [starter.sequence() for _ in range(4)]
    tokens = starter.vocab.tokenize(TEXT)
    asked = [(tokens[2:9], 2), (tokens[:3], 3), (tokens * 2, 1), (tokens[4:8], 4)]
    alone = []
    for sequence, (new, last) in zip(sequences, asked, strict=True):
        alone.append(sequence.forward(new, last).copy())
        sequence.rollback(0)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0], [3, 0, 1]):
        answers = starter.forward([(sequences[i], *asked[i]) for i in order])
        for i, rows in zip(order, answers, strict=True):
            assert rows.shape == (asked[i][1], starter.vocab.size)
            np.testing.assert_allclose(rows, alone[i], atol=0.5)
            assert list(sequences[i].tokens) == asked[i][0]
            sequences[i].rollback(0)
    for sequence in sequences:
        sequence.close()


def test_texts_side_by_side_are_evaluated_in_order_of_their_caches(starter, monkeypatch):
    """Out of order the engine would read the weights once for each."""
    if not starter.shares_passes:
        pytest.skip("its sequences share no batch")
    sequences = [starter.sequence() for _ in range(3)]
    batches: list[list[int]] = []
    decode = starter._decode
    monkeypatch.setattr(
        starter, "_decode", lambda parts: (batches.append([one.id for one, _, _ in parts]), decode(parts))
    )
    rows = starter.forward([(sequences[i], [5 + i, 6], 1) for i in (2, 0, 1)])
    assert batches == [sorted(one.id for one in sequences)]
    first = rows[1].copy()
    sequences[0].rollback(0)
    np.testing.assert_allclose(sequences[0].forward([5, 6]), first, atol=0.5)
    for sequence in sequences:
        sequence.close()


def test_threads_change_between_forward_passes(starter, sequence):
    before = starter.threads
    first = sequence.forward([5, 6, 7])[0].argmax()
    starter.set_threads(1, 1)
    assert starter.library.C.llama_n_threads(starter._contexts[0]) == 1
    sequence.rollback(0)
    assert sequence.forward([5, 6, 7])[0].argmax() == first
    starter.set_threads(*before)


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0", "f32"])
@pytest.mark.parametrize("flash", [True, None])
def test_cache_types_and_flash_attention_are_options(starter_path, engine, cache, flash):
    options = LlamaOptions(context=256, flash_attention=flash, type_k=cache, type_v=cache, engine=engine)
    if engine == "ik" and cache == "f32":
        with pytest.raises(EdgespecError, match="f32 cache: choose one of f16"):
            LlamaModel(starter_path, options)
        return
    with LlamaModel(starter_path, options) as model:
        row = model.sequence().forward(model.vocab.tokenize("The capital of France is"))[0]
        assert model.vocab.piece(int(row.argmax())) == b" Paris"


def test_plain_attention_is_an_option(starter_path, engine):
    with LlamaModel(starter_path, LlamaOptions(context=256, flash_attention=False, engine=engine)) as model:
        row = model.sequence().forward(model.vocab.tokenize("The capital of France is"))[0]
        assert model.vocab.piece(int(row.argmax())) == b" Paris"


def test_a_cache_that_cannot_hold_the_heads_is_refused(tiny_llama, engine):
    with pytest.raises(EdgespecError, match=r"16 numbers each: choose f16"):
        LlamaModel(tiny_llama, LlamaOptions(context=256, type_k="q8_0", engine=engine))


def test_cache_bytes_count_every_layer_and_position_of_one_sequence(tiny_llama, engine):
    with LlamaModel(tiny_llama, LlamaOptions(context=256, sequences=2, engine=engine)) as model:
        assert model.cache_bytes == 256 * 2 * 16 * 2 * 2  # positions, heads, head size, keys and values, f16


def test_progress_runs_to_one_and_can_stop_the_load(starter_path, engine):
    seen: list[float] = []
    options = LlamaOptions(context=64, engine=engine)

    def note(fraction: float) -> bool:
        seen.append(fraction)
        return True

    LlamaModel(starter_path, options, note).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with pytest.raises(Cancelled):
        LlamaModel(starter_path, options, lambda fraction: fraction < 0.3)


def test_native_refusals_are_one_line(tmp_path: Path, tiny_llama: Path, engine):
    data = tiny_llama.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(EdgespecError, match=r"broken\.gguf.*attn_q") as caught:
        LlamaModel(broken, LlamaOptions(engine=engine))
    assert "\n" not in str(caught.value)


def test_a_build_names_engine_version_and_instructions(starter, engine):
    name, version, *instructions = starter.library.build.split()
    assert name == engine
    assert version.count(".") == 2
    assert instructions


def test_vocabularies_agree_or_the_first_difference_is_named(tmp_path, tiny_llama, engine):
    other = write_tiny(tmp_path / "other.gguf", "llama", replaced=(65, "Zebra"))
    larger = write_tiny(tmp_path / "larger.gguf", "llama", extra=3)
    options = LlamaOptions(context=64, engine=engine)
    with LlamaModel(tiny_llama, options) as a, LlamaModel(tiny_llama, options) as b:
        assert first_difference(a.vocab, b.vocab) is None
        with LlamaModel(other, options) as c, LlamaModel(larger, options) as d:
            assert first_difference(a.vocab, c.vocab) == "token 65 is 'A' in the target, 'Zebra' in the draft"
            assert first_difference(a.vocab, d.vocab) == "the target has 257 tokens and the draft 260"


@pytest.mark.skipif(sys.platform != "linux", reason="its engines are not built with libgomp")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000|30000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "[3-9].{9,}")],
)
def test_threads_wait_busily_for_microseconds_unless_the_user_says_otherwise(engine, given, spins):
    code = (
        "import os, sys; from edgespec.models.gguf.backends import library; library(sys.argv[1]);"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, engine],
        env={**os.environ, **given, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert found, done.stderr
    assert all(re.fullmatch(spins, one) for one in found), found
    assert done.stdout.split() == [given.get("GOMP_SPINCOUNT", "None")]
