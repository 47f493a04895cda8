"""KV caches on disk, of a real model on each engine."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgespec.models.llama import LlamaModel, LlamaOptions
from edgespec.models.state import load_state, save_state

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def model(engine, starter_path) -> Iterator[LlamaModel]:
    with LlamaModel(starter_path, LlamaOptions(context=1024, sequences=2, engine=engine)) as loaded:
        yield loaded


@pytest.fixture
def saved(model, tmp_path) -> tuple[Path, list[int], np.ndarray]:
    """A file, the tokens in it, and the logits that follow them."""
    sequence = model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    sequence.forward(tokens)
    path = tmp_path / "new" / "one.state"
    assert save_state(sequence, path)
    after = sequence.forward([5])[0].copy()
    sequence.rollback(0)
    sequence.close()
    return path, tokens, after


def test_a_restored_cache_goes_on_to_the_bit(model, saved):
    path, tokens, after = saved
    sequence = model.sequence()
    sequence.forward([1, 2, 3])
    assert load_state(sequence, path)
    assert list(sequence.tokens) == tokens
    assert np.array_equal(sequence.forward([5])[0], after)
    sequence.rollback(10)
    assert list(sequence.tokens) == tokens[:10]
    sequence.rollback(0)
    sequence.close()


def test_only_its_owner_reads_it(saved):
    path = saved[0]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o077 == 0
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_not_there(model, saved):
    path = saved[0]
    whole = path.read_bytes()
    sequence = model.sequence()
    damaged = [
        b"",
        b"x",
        whole[:10],
        whole[:-1],
        whole + b"x",
        whole.replace(b'"tokens": [', b'"tokens": ["a", ', 1),
    ]
    places = (3, 30, len(whole) // 2, len(whole) - 5)
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for content in damaged:
        path.write_bytes(content)
        sequence.forward([1, 2])
        assert not load_state(sequence, path)
        assert list(sequence.tokens) == []
    assert not load_state(sequence, path.with_name("none"))
    path.write_bytes(whole)
    assert load_state(sequence, path)
    sequence.rollback(0)
    sequence.close()


def test_a_file_of_another_model_or_cache_is_refused(engine, saved, starter_path, tiny_llama):
    path = saved[0]
    with LlamaModel(tiny_llama, LlamaOptions(engine=engine)) as other:
        assert not load_state(other.sequence(), path)
    with LlamaModel(starter_path, LlamaOptions(context=1024, engine=engine, type_k="q8_0")) as other:
        assert not load_state(other.sequence(), path)
    with LlamaModel(starter_path, LlamaOptions(context=256, engine=engine)) as smaller:
        assert not load_state(smaller.sequence(), path)


def test_what_cannot_be_written_is_not(model, tmp_path):
    sequence = model.sequence()
    assert not save_state(sequence, tmp_path / "empty")
    sequence.forward([1, 2, 3])
    (tmp_path / "file").write_text("in the way")
    assert not save_state(sequence, tmp_path / "file" / "one.state")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    sequence.rollback(0)
    sequence.close()


def test_a_shared_beginning_is_as_good_as_one_read(model):
    first, second = model.sequence(), model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    first.forward(tokens)
    shared = second.share(first, 200)
    assert shared == model.library.shares_cache
    if shared:
        assert list(second.tokens) == tokens[:200]
        new = model.vocab.tokenize(" But then")
        ours = second.forward(new)[0].copy()
        first.rollback(0)  # which leaves the cells to the other
        first.forward(tokens[:200])
        theirs = first.forward(new)[0].copy()
        other = first.forward(new)[0].copy()
        assert np.abs(ours - theirs).max() < 0.2 * np.abs(other - theirs).max()
        assert ours.argmax() == theirs.argmax()
    for sequence in (first, second):
        sequence.rollback(0)
        sequence.close()
