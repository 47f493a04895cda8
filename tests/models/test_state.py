"""KV caches on disk, of a real model on each engine."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.state import load_state, save_state, state_tokens

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def model(engine, starter_path) -> Iterator[LlamaModel]:
    with LlamaModel(starter_path, LlamaOptions(context=512, sequences=2, engine=engine)) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def read(model, tmp_path_factory) -> tuple[Path, list[int], np.ndarray]:
    """A file, the tokens in it, and the logits that follow them."""
    sequence = model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    sequence.forward(tokens)
    path = tmp_path_factory.mktemp("state") / "new" / "one.state"
    assert save_state(sequence, path)
    after = sequence.forward([5])[0].copy()
    sequence.rollback(0)
    sequence.close()
    return path, tokens, after


@pytest.fixture
def saved(read, tmp_path) -> tuple[Path, list[int], np.ndarray]:
    """A copy that the test may damage."""
    path, *rest = read
    shutil.copytree(path.parent, tmp_path / "new")
    return tmp_path / "new" / path.name, *rest


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


def test_only_its_owner_reads_it(read):
    path = read[0]
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


def test_a_file_of_another_model_or_cache_is_refused(model, engine, saved, starter_path, tiny_llama):
    path = saved[0]
    options = replace(model.options, context=512)
    with LlamaModel(tiny_llama, LlamaOptions(engine=engine)) as other:
        assert not load_state(other.sequence(), path)
    with LlamaModel(starter_path, replace(options, type_k="q8_0")) as other:
        assert not load_state(other.sequence(), path)
    with LlamaModel(starter_path, replace(options, context=256)) as smaller:
        assert not load_state(smaller.sequence(), path)
    # llama.cpp refuses what came from a context of more or fewer caches: it is not even found.
    with LlamaModel(starter_path, replace(options, sequences=1)) as single:
        fits = not model.shares_passes
        assert (state_tokens(single.sequence(), path) is not None) == fits


def test_what_cannot_be_written_is_not(model, tmp_path):
    sequence = model.sequence()
    assert not save_state(sequence, tmp_path / "empty")
    sequence.forward([1, 2, 3])
    (tmp_path / "file").write_text("in the way")
    assert not save_state(sequence, tmp_path / "file" / "one.state")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    sequence.rollback(0)
    sequence.close()


def test_a_shared_beginning_is_what_was_read(model):
    """Cut to what is common, and the copy's own at once: whatever becomes of the other's cache."""
    first, second = model.sequence(), model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    new = model.vocab.tokenize(" But then")
    first.forward(tokens)
    first.rollback(200)
    expected = first.forward(new)[0].copy()
    first.rollback(0)
    first.forward(tokens[60:300])
    state = first.state()
    first.rollback(0)
    first.forward(tokens)
    second.forward(tokens[50:90])
    assert second.share(first, 200)
    assert list(second.tokens) == tokens[:200]
    assert list(first.tokens) == tokens
    assert first.restore(tokens[60:300], state)  # before any pass that might have copied lazily
    assert np.array_equal(second.forward(new)[0], expected)
    assert not first.share(first, 10)
    for sequence in (first, second):
        sequence.rollback(0)
        sequence.close()
