"""The index of the texts for a tokenizer: built once, extended, rebuilt when damaged."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from corpora import DIGEST, Letters, words

from edgespec.app.engine import corpus_store
from edgespec.core import EdgespecError
from edgespec.corpus import MAX_TOKENS, Corpus


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGESPEC_CORPUS", str(tmp_path / "store"))
    return tmp_path / "store"


def test_no_texts_no_index(folder):
    assert corpus_store.index_for(Letters(), DIGEST) is None
    assert not folder.exists()
    corpus_store.set_remember(True)
    assert corpus_store.index_for(Letters(), DIGEST) is None


def test_an_index_is_made_once_for_each_tokenizer_and_grows():
    vocab, other = Letters(), Letters()
    corpus_store.add({"a": "first"})
    assert words(corpus_store.index_for(vocab, DIGEST)) == ["first"]
    assert words(corpus_store.index_for(vocab, DIGEST)) == ["first"]
    assert vocab.read == "first"
    corpus_store.add({"b": "second"})
    assert words(corpus_store.index_for(vocab, DIGEST)) == ["first", "second"]
    assert vocab.read == "firstsecond"
    assert words(corpus_store.index_for(other, "1" * 64)) == ["first", "second"]
    assert sorted(other.read) == sorted("firstsecond")


def test_indexes_of_models_no_longer_used_go(folder):
    corpus_store.add({"a": "text"})
    for i in range(6):
        corpus_store.index_for(Letters(), str(i) * 64)
        os.utime(folder / f"{str(i) * 64}.index", (i, i))
    (folder / ".5.index.killed").write_text("of a process that was killed")
    corpus_store.add({"b": "more"})
    corpus_store.index_for(Letters(), "5" * 64)
    names = sorted(path.name[0] for path in folder.glob("*.index"))
    assert names == ["2", "3", "4", "5"]
    assert not list(folder.glob(".5*"))


@pytest.mark.parametrize("size", [256, 100])
def test_an_index_that_is_damaged_or_foreign_is_made_anew(folder, size):
    corpus_store.add({"a": "text"})
    corpus_store.index_for(Letters(), DIGEST)
    path = folder / f"{DIGEST}.index"
    if size == 256:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        Corpus.open(path).extended([[300]], key=Corpus.open(path).key).save(path)
    vocab = Letters()
    assert words(corpus_store.index_for(vocab, DIGEST)) == ["text"]
    assert vocab.read == "text"


def test_what_exceeds_the_tokens_is_left_out_oldest_first():
    notes: list[str] = []
    corpus_store.add({"oldest": "a" * 900_000, "old": "b" * 900_000, "new": "c" * 900_000})
    index = corpus_store.index_for(Letters(), DIGEST, notes.append)
    assert [text[0] for text in words(index)] == ["b", "c"]
    assert notes == ["the corpus exceeds 2,000,000 tokens: its 1 oldest texts are not used"]
    corpus_store.add({"small": "d"})
    vocab = Letters()
    assert [text[0] for text in words(corpus_store.index_for(vocab, DIGEST))] == ["b", "c", "d"]
    assert vocab.read == "d"
    corpus_store.add({"newest": "e" * 3_000_000})
    index = corpus_store.index_for(Letters(), DIGEST, notes.append)
    assert [set(text) for text in words(index)] == [{"e"}]
    assert index is not None
    assert MAX_TOKENS * 0.9 < len(index.text) < MAX_TOKENS
    assert "newest text" in notes[1]


def test_long_texts_are_cut_at_ends_of_lines():
    pieces: list[str] = []

    class Pieces(Letters):
        def tokenize(self, text: str) -> list[int]:
            pieces.append(text)
            return super().tokenize(text)

    text = "".join(f"line {i}\n" for i in range(30_000)) + "x" * 200_000
    corpus_store.add({"a": text})
    assert words(corpus_store.index_for(Pieces(), DIGEST)) == [text]
    assert max(map(len, pieces)) <= 1 << 16
    assert pieces[0].endswith("\n")


def test_while_another_process_makes_an_index_the_old_one_serves():
    corpus_store.add({"a": "first"})
    assert words(corpus_store.index_for(Letters(), DIGEST)) == ["first"]
    corpus_store.add({"b": "second"})
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with corpus_store._lock():
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(30)
        assert words(corpus_store.index_for(Letters(), DIGEST)) == ["first"]
        assert corpus_store.index_for(Letters(), "1" * 64) is None
    finally:
        done.set()
        thread.join()
    assert words(corpus_store.index_for(Letters(), DIGEST)) == ["first", "second"]


def test_making_an_index_that_fails_leaves_the_old_one(folder):
    corpus_store.add({"a": "first"})
    corpus_store.index_for(Letters(), DIGEST)
    before = (folder / f"{DIGEST}.index").read_bytes()
    corpus_store.add({"b": "second"})

    class Failing(Letters):
        def tokenize(self, text: str) -> list[int]:
            raise EdgespecError("the tokenizer failed")

    with pytest.raises(EdgespecError, match="tokenizer failed"):
        corpus_store.index_for(Failing(), DIGEST)
    assert (folder / f"{DIGEST}.index").read_bytes() == before
    assert words(corpus_store.index_for(Letters(), DIGEST)) == ["first", "second"]
