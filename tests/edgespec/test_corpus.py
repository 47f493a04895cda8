"""The suffix array against plain search, what followed against plain counting, and files that lie."""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespec import corpus as module
from edgespec.core import EdgespecError
from edgespec.corpus import MAX_MATCH, MAX_TOKENS, SEPARATOR, Corpus, build

# Ids whose order as numbers is not the order of their bytes are among them.
TOKENS = st.sampled_from([0, 1, 2, 255, 256, 151_935])
DOCUMENTS = st.lists(st.lists(TOKENS, max_size=40), max_size=6)


def make(documents, min_match=1) -> Corpus:
    return Corpus(*build(documents), min_match=min_match)


def count(documents, phrase) -> int:
    n = len(phrase)
    return sum(document[i : i + n] == phrase for document in documents for i in range(len(document) - n + 1))


def followers(documents, phrase) -> Counter[int]:
    """What follows each occurrence of `phrase`; SEPARATOR where a document ends."""
    n = len(phrase)
    return Counter(
        [*document, SEPARATOR][i + n]
        for document in documents
        for i in range(len(document) - n + 1)
        if document[i : i + n] == phrase
    )


def check_continuation(documents, context, limit, corpus) -> None:
    tokens, probabilities, length = corpus.continuation(context, limit)
    assert len(tokens) == len(probabilities) <= limit
    assert length == corpus.match(context).length
    phrase = context[len(context) - length :]
    for token, probability in zip(tokens, probabilities, strict=True):
        after = followers(documents, phrase)
        assert after[token] == max(after.values())
        assert probability == after[token] / after.total() >= 0.1
        phrase = [*phrase, token]
    if length and len(tokens) < min(limit, MAX_MATCH):
        after = followers(documents, phrase)
        most = max(after.values())
        assert after[SEPARATOR] == most or most / after.total() < 0.1


@given(DOCUMENTS)
def test_the_array_has_every_suffix_in_order(documents):
    text, suffixes = build(documents)
    assert text.dtype == suffixes.dtype == np.int32
    assert text.tolist() == [token for document in documents for token in [*document, SEPARATOR]]
    assert sorted(suffixes.tolist()) == list(range(len(text)))
    data = text.tobytes()
    phrases = [data[4 * p : 4 * (p + 128)] for p in suffixes.tolist()]
    assert phrases == sorted(phrases)


@given(DOCUMENTS, st.lists(TOKENS, max_size=80), st.integers(1, 5))
def test_a_match_is_the_longest_end_that_occurs(documents, context, min_match):
    length, start, stop = make(documents, min_match).match(context)
    longest = max((n for n in range(len(context) + 1) if count(documents, context[-n:])), default=0)
    longest = min(longest, MAX_MATCH)
    assert length == (longest if longest >= min_match else 0)
    assert stop - start == (count(documents, context[-length:]) if length else 0)


@given(DOCUMENTS, st.data())
def test_a_continuation_counts_exactly(documents, data):
    corpus = make(documents)
    document = data.draw(st.sampled_from(documents or [[]]))
    context = data.draw(st.lists(TOKENS, max_size=4)) + document[: data.draw(st.integers(0, len(document)))]
    check_continuation(documents, context, data.draw(st.integers(0, 20)), corpus)


@given(st.lists(st.integers(0, 5), min_size=300, max_size=1500), st.randoms(use_true_random=False))
def test_counts_are_exact_where_only_a_sample_is_read(followed_by, random):
    """Hundreds of occurrences, of followers that are nearly equally frequent."""
    documents = [[7, 8, token, random.randrange(40)] for token in followed_by]
    check_continuation(documents, [3, 7, 8], 4, make(documents))


@pytest.mark.parametrize("times", [98, 99, 100, 101, 110, 140])
def test_a_follower_is_a_draft_from_a_tenth_on(times):
    documents = [[7, 8, 9]] * times + [[7, 8, 1000 + i] for i in range(1000 - times)]
    expected = ((9,), (times / 1000,), 2) if times >= 100 else ((), (), 2)
    assert make(documents).continuation([7, 8], 1) == expected


@given(DOCUMENTS)
def test_no_match_and_no_continuation_crosses_documents(documents):
    corpus = make(documents)
    for left, right in itertools.pairwise(documents):
        both = left + right
        length = corpus.match(both).length
        assert count(documents, both[len(both) - length :]) or not length
        assert corpus.match([*left, SEPARATOR]).length == 0
        assert corpus.match([SEPARATOR, *left, SEPARATOR, *right]) == corpus.match(right)


def test_matches_are_bounded_and_continuations_too():
    corpus = make([list(range(300))])
    assert corpus.match(list(range(200))).length == MAX_MATCH
    tokens, probabilities, length = corpus.continuation(list(range(200)), 1000)
    assert tokens == tuple(range(200, 264))
    assert probabilities == (1.0,) * 64
    assert length == MAX_MATCH


def test_one_token_repeated():
    """Every round of doubling has ties, and every interval is wide."""
    corpus = make([[5] * 100_000])
    start, stop = corpus.match([5] * 70)[1:]
    assert stop - start == 100_000 - 63
    tokens, probabilities, _ = corpus.continuation([5] * 70, 3)
    assert tokens == (5, 5, 5)
    assert probabilities[0] == (100_000 - 64) / (100_000 - 63)


def test_a_large_text_against_plain_search():
    generator = np.random.default_rng(1)
    document = (generator.zipf(1.4, 50_000) % 3000).tolist()
    corpus = make([document], 2)
    data = np.array(document, np.int32)
    for at in generator.integers(100, 50_000, 50).tolist():
        context = [*document[at - 3 : at], int(generator.integers(0, 20))]
        length, start, stop = corpus.match(context)
        expected = [
            n for n in (2, 3, 4)
            if (np.lib.stride_tricks.sliding_window_view(data, n) == context[-n:]).all(axis=1).any()
        ]  # fmt: skip
        assert length == max(expected, default=0)
        if length:
            windows = np.lib.stride_tricks.sliding_window_view(data, length)
            assert stop - start == (windows == context[-length:]).all(axis=1).sum()


def test_nothing_in_it_matches_nothing():
    for corpus in (make([]), make([[]]), make([[], []])):
        assert corpus.match([1, 2, 3]) == (0, 0, 0)
        assert corpus.match([]) == (0, 0, 0)
        assert corpus.continuation([1, 2, 3], 8) == ((), (), 0)


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="negative"):
        build([[1, -1]])
    with pytest.raises(ValueError, match="more than"):
        build([[1] * MAX_TOKENS])
    with pytest.raises(ValueError, match="out of bounds"):
        make([[1]], 0)


@given(DOCUMENTS, st.lists(DOCUMENTS, max_size=3), st.lists(TOKENS, max_size=70))
def test_growing_is_building(documents, more, context):
    """Also where it grows a little, and inserts, and where it has grown before."""
    filler = [[9] * 500]
    grown, everything = make(filler + documents, 2), filler + documents
    for new in more:
        grown = grown.extended(new, key=bytes(32))
        everything = everything + new
    built = make(everything, 2)
    assert grown.text.tolist() == built.text.tolist()
    assert sorted(grown.suffixes.tolist()) == sorted(built.suffixes.tolist())
    for ending in (context, *(document[: len(document) // 2] for document in everything)):
        assert grown.match(ending) == built.match(ending)
        check_continuation(everything, ending, 8, grown)


def test_growing_keeps_within_bounds():
    corpus = make([[1] * (MAX_TOKENS - 10)])
    assert len(corpus.extended([[2] * 8], key=bytes(32)).text) == MAX_TOKENS
    with pytest.raises(ValueError, match="more than"):
        corpus.extended([[2] * 9], key=bytes(32))


# --- files ---


@given(documents=DOCUMENTS, key=st.binary(min_size=32, max_size=32))
def test_a_file_holds_all_of_it(tmp_path_factory, documents, key):
    path = tmp_path_factory.mktemp("corpus") / "x.index"
    corpus = Corpus(*build(documents), key=key)
    corpus.save(path)
    again = Corpus.open(path)
    assert again.key == key
    assert np.array_equal(again.text, corpus.text)
    assert np.array_equal(again.suffixes, corpus.suffixes)
    assert path.stat().st_size == 80 + 8 * len(corpus.text)
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def signed(text, suffixes, n=None, version=1, magic=b"EDGECORP") -> bytes:
    """A file with a good checksum whatever is in it."""
    body = np.asarray(text, np.int32).tobytes() + np.asarray(suffixes, np.int32).tobytes()
    digest = hashlib.sha256(bytes(32) + body).digest()
    return struct.pack("=8sII32s32s", magic, version, len(text) if n is None else n, bytes(32), digest) + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"EDGECORP",
        signed([1, 2, -1], [0, 1, 2], version=2),
        signed([1, 2, -1], [0, 1, 2], magic=b"EDGECORQ"),
        signed([1, 2, -1], [0, 1, 2], n=2),
        signed([1, 2, -1], [0, 1, 2], n=2**32 - 1),
        signed([1, 2, -1], [0, 1, 3]),
        signed([1, 2, -1], [0, -1, 2]),
        signed([1, -2, -1], [0, 1, 2]),
        signed([1, 2, -1], [0, 1, 2]) + b"\0",
        signed([1, 2, -1], [0, 1, 2])[:-4],
    ],
)
def test_a_bad_file_is_refused(tmp_path, data):
    path = tmp_path / "x.index"
    path.write_bytes(signed([1, 2, -1], [0, 1, 2]))
    assert Corpus.open(path).text.tolist() == [1, 2, -1]
    path.write_bytes(data)
    with pytest.raises(EdgespecError, match=r"x\.index.*`edgespec corpus clear`"):
        Corpus.open(path)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x.index"
    make([[1, 2, 3], [1, 2, 4]]).save(path)
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(EdgespecError):
            Corpus.open(path)


def test_a_file_that_claims_more_than_may_be_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x.index"
    n = MAX_TOKENS + 1
    path.write_bytes(signed([], [], n=n))
    os.truncate(path, 80 + 8 * n)
    monkeypatch.setattr(np, "fromfile", None)
    with pytest.raises(EdgespecError, match="damaged"):
        Corpus.open(path)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    path = tmp_path / "x.index"
    make([[1, 2, 300]]).save(path)
    assert Corpus.open(path, vocab_size=301)
    with pytest.raises(EdgespecError, match="outside the model's vocabulary"):
        Corpus.open(path, vocab_size=300)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(EdgespecError, match="No such file"):
        Corpus.open(tmp_path / "none")
    with pytest.raises(EdgespecError, match="not a regular file"):
        Corpus.open(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(EdgespecError, match="not a regular file"):
            Corpus.open(tmp_path / "pipe")


@given(st.data())
def test_a_hostile_array_can_only_mislead(tmp_path_factory, data):
    """Bounds and checksum are good, the order is not: every answer is still tokens of the text, in time."""
    n = data.draw(st.integers(1, 300))
    text = data.draw(st.lists(st.integers(-1, 3), min_size=n, max_size=n))
    suffixes = data.draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
    path: Path = tmp_path_factory.mktemp("corpus") / "x.index"
    path.write_bytes(signed(text, suffixes))
    corpus = Corpus.open(path, min_match=1)
    for context in data.draw(st.lists(st.lists(st.integers(0, 3), max_size=66), max_size=4)):
        tokens, probabilities, _ = corpus.continuation(context, 70)
        assert set(tokens) <= set(text) - {SEPARATOR}
        assert all(0.1 <= probability <= 1 for probability in probabilities)
    corpus.extended([[1, 2, 3]], key=bytes(32))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.index"
    make([[1, 2, 3]]).save(path)

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", no_space)
    with pytest.raises(EdgespecError, match="No space left"):
        make([[4, 5, 6]]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.index"]
    assert Corpus.open(path).text.tolist() == [1, 2, 3, -1]
