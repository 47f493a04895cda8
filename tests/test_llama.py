"""The LanguageModel contract on llama.cpp, with the real starter model and tiny random ones."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.llama import LlamaModel, LlamaOptions
from edgespec.models.vocab import first_difference

TEXT = "The quick brown fox jumps over the lazy dog because the dog would not move."


def test_rows_after_a_rollback_are_those_of_a_fresh_cache(starter):
    tokens = starter.vocab.tokenize(TEXT)
    sequence = starter.sequence()
    whole = sequence.forward(tokens, 4).copy()
    assert whole.shape == (4, starter.vocab.size)
    assert whole.dtype == np.float32
    sequence.forward([11, 12, 13], 1)
    sequence.rollback(len(tokens) - 4)
    assert list(sequence.tokens) == tokens[:-4]
    again = sequence.forward(tokens[-4:], 4)
    assert (again.argmax(axis=1) == whole.argmax(axis=1)).all()
    np.testing.assert_allclose(again, whole, atol=0.5)  # other batch sizes round differently
    sequence.close()


def test_the_last_row_predicts_text(starter):
    sequence = starter.sequence()
    row = sequence.forward(starter.vocab.tokenize("The capital of France is"))[0]
    assert starter.vocab.piece(int(row.argmax())) == b" Paris"
    sequence.close()


def test_a_prompt_longer_than_a_batch_gives_only_the_rows_wanted(starter):
    tokens = (starter.vocab.tokenize(TEXT) * 60)[:700]
    sequence = starter.sequence()
    assert sequence.forward(tokens, 2).shape == (2, starter.vocab.size)
    assert list(sequence.tokens) == tokens
    sequence.close()


def test_logits_are_a_view_not_a_copy(starter):
    sequence = starter.sequence()
    row = sequence.forward([5, 6])[0]
    assert not row.flags.owndata
    address = row.ctypes.data
    assert sequence.forward([7])[0].ctypes.data == address
    sequence.close()


def test_sequences_share_the_pool_without_seeing_each_other(starter):
    one, two = starter.sequence(), starter.sequence()
    tokens = starter.vocab.tokenize(TEXT)
    alone = one.forward(tokens, 2).copy()
    one.rollback(0)
    both = starter.forward([(one, tokens, 2), (two, tokens[:5], 1)])
    assert [rows.shape[0] for rows in both] == [2, 1]
    assert (both[0].argmax(axis=1) == alone.argmax(axis=1)).all()
    assert list(one.tokens) == tokens
    assert list(two.tokens) == tokens[:5]
    one.close()
    two.close()


def test_sequences_run_out(tiny_llama):
    with LlamaModel(tiny_llama, LlamaOptions(context=64)) as model:
        first = model.sequence()
        with pytest.raises(EdgespecError, match="in use"):
            model.sequence()
        first.close()
        assert model.sequence().id == first.id


@pytest.mark.parametrize(
    ("new", "last"), [([], 1), ([1], 2), ([1], 0), ([-1], 1), ([1 << 30], 1), ([1] * 257, 1)]
)
def test_wrong_requests_are_refused_before_native_code_sees_them(tiny_llama, new, last):
    with LlamaModel(tiny_llama, LlamaOptions(context=256)) as model:
        sequence = model.sequence()
        with pytest.raises(ValueError, match=r"rows|fit|vocabulary"):
            sequence.forward(new, last)
        assert list(sequence.tokens) == []


def test_too_many_rows_are_refused(tiny_llama):
    options = LlamaOptions(context=64, max_rows=4)
    with LlamaModel(tiny_llama, options) as model, pytest.raises(ValueError, match="4 rows"):
        model.sequence().forward([1] * 5, 5)


def test_cancel_from_another_thread_stops_a_long_prompt(starter):
    tokens = (starter.vocab.tokenize(TEXT) * 100)[:1000]
    sequence = starter.sequence()
    timer = threading.Timer(0.05, starter.cancel)
    timer.start()
    start = time.perf_counter()
    with pytest.raises(Cancelled):
        sequence.forward(tokens, 1)
    assert time.perf_counter() - start < 2.0
    timer.join()
    held = len(sequence.tokens)
    assert held < len(tokens)
    assert list(sequence.tokens) == tokens[:held]
    # What it says it holds is what it holds: going on from there works.
    rest = sequence.forward(tokens[held : held + 20], 1)[0].copy()
    sequence.rollback(0)
    fresh = sequence.forward(tokens[: held + 20], 1)[0]
    assert rest.argmax() == fresh.argmax()
    sequence.close()


def test_threads_change_between_forward_passes(starter):
    before = starter.threads
    sequence = starter.sequence()
    first = sequence.forward([5, 6, 7])[0].argmax()
    starter.set_threads(1, 1)
    assert starter.library.C.llama_n_threads(starter._context) == 1
    sequence.rollback(0)
    assert sequence.forward([5, 6, 7])[0].argmax() == first
    starter.set_threads(*before)
    sequence.close()


@pytest.mark.parametrize("cache", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("flash", [True, None])
def test_cache_types_and_flash_attention_are_options(starter_path, cache, flash):
    options = LlamaOptions(context=256, flash_attention=flash, type_k=cache, type_v=cache)
    with LlamaModel(starter_path, options) as model:
        row = model.sequence().forward(model.vocab.tokenize("The capital of France is"))[0]
        assert model.vocab.piece(int(row.argmax())) == b" Paris"


def test_recurrent_memory_says_why_and_forgets_everything(tiny_mamba):
    with LlamaModel(tiny_mamba, LlamaOptions(context=64)) as model:
        assert "mamba" in model.rollback_refusal
        sequence = model.sequence()
        sequence.forward([1, 2, 3])
        sequence.rollback(3)
        assert list(sequence.tokens) == [1, 2, 3]
        sequence.rollback(2)
        assert list(sequence.tokens) == []
        assert np.isfinite(sequence.forward([1, 2])).all()


def test_progress_runs_to_one_and_can_stop_the_load(starter_path):
    seen: list[float] = []

    def note(fraction: float) -> bool:
        seen.append(fraction)
        return True

    LlamaModel(starter_path, LlamaOptions(context=64), note).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with pytest.raises(Cancelled):
        LlamaModel(starter_path, LlamaOptions(context=64), lambda fraction: fraction < 0.3)


def test_native_refusals_are_one_line(tmp_path: Path, tiny_llama: Path):
    data = tiny_llama.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(EdgespecError, match=r"broken\.gguf.*attn_q") as caught:
        LlamaModel(broken)
    assert "\n" not in str(caught.value)


def test_vocabularies_agree_or_the_first_difference_is_named(tmp_path, tiny_llama):
    other = write_tiny(tmp_path / "other.gguf", "llama", replaced=(65, "Zebra"))
    larger = write_tiny(tmp_path / "larger.gguf", "llama", extra=3)
    options = LlamaOptions(context=64)
    with LlamaModel(tiny_llama, options) as a, LlamaModel(tiny_llama, options) as b:
        assert first_difference(a.vocab, b.vocab) is None
        with LlamaModel(other, options) as c, LlamaModel(larger, options) as d:
            assert first_difference(a.vocab, c.vocab) == "token 65 is 'A' in the target, 'Zebra' in the draft"
            assert first_difference(a.vocab, d.vocab) == "the target has 257 tokens and the draft 260"


def test_control_tokens_have_no_bytes_and_need_special(starter):
    vocab = starter.vocab
    end = vocab.tokenize("<|im_end|>", special=True)
    assert len(end) == 1
    assert vocab.is_end(end[0])
    assert vocab.piece(end[0]) == b""
    assert "<|im_end|>" in vocab.control_texts()
    as_text = vocab.tokenize("<|im_end|>")
    assert len(as_text) > 1
    assert vocab.detokenize(as_text) == "<|im_end|>"


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "日本語 🦊", "tabs\tand\nlines", "\x00\x1b["])
def test_text_survives_the_vocabulary(starter, text):
    assert starter.vocab.detokenize(starter.vocab.tokenize(text)) == text
