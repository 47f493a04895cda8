"""DSpark and DFlash drafters: against the reference logic of llama.cpp, evaluated from scratch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from head_rounds import OPTIONS, Rounds, check_restored, check_rounds, greedy, random_text
from tiny_heads import Dense, write_dense, write_dspark

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.dspark import DsparkModel
from edgespec.models.gguf.heads import head_for, is_head
from edgespec.models.gguf.hidden import WINDOW
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.gguf.native import RowBatch

TAPS, BLOCK, MASK = (0, 2, 3), 5, 255
SOME = np.sort(np.random.default_rng(0).choice(256, 150, replace=False))
# What the drafter's file has, and the row of a block from which its first token is drafted.
KINDS = {
    "dspark": ({}, 0),
    "some tokens": ({"ids": SOME}, 0),
    "bonus anchor": ({"keys": {"sample_from_anchor": False}, "confidence": False}, 1),
    "causal": ({"keys": {"attention.causal": True}}, 0),
    "dflash": ({"markov": False}, 1),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int]:
    folder, (options, first) = tmp_path_factory.mktemp("dspark"), KINDS[request.param]
    return write_dense(folder / "target.gguf"), write_dspark(folder / "head.gguf", **options), first


@contextmanager
def loaded(kind: tuple[Path, Path, int]) -> Iterator[tuple[LlamaModel, DsparkModel, int]]:
    with LlamaModel(kind[0], OPTIONS) as target, DsparkModel(kind[1], target) as head:
        yield target, head, kind[2]


def reference(
    target: LlamaModel, head: DsparkModel, text: list[int], first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The logits of a block after `text` and its confidence, in new contexts: process() and draft()."""
    library, held = target.library, len(text) - 1
    C = library.C  # noqa: N806
    width = target.summary.number("embedding_length")
    options = replace(OPTIONS, batch=256, max_rows=256)

    def context(model, **other):
        abort = ctypes.create_string_buffer(2)
        return library.new_context(model._model, model.path, options, 1, 0, 0, (), abort, **other), abort

    (one, _kept), batch = context(target), library.batch(256)
    library.keep_rows(one, TAPS)
    batch.clear()
    batch.add(0, 0, text[:-1], 0)
    assert C.llama_decode(one, batch.struct) == 0
    two, _kept_too = context(head, other=one)
    library.keep_rows(two)
    C.llama_set_causal_attn(two, bool(head.summary.metadata.get("dflash.attention.causal", False)))
    rows = RowBatch(256, C.llama_batch, len(TAPS) * width)
    rows.struct.token = None
    rows.clear()
    rows.add_rows(0, 0, library.rows(one, 0, held, width, TAPS), 0)
    assert C.llama_decode(two, rows.struct) == 0
    batch.clear()
    batch.add(0, held, [text[-1], *[MASK] * (BLOCK - 1)], BLOCK)
    assert C.llama_decode(two, batch.struct) == 0
    logits = np.ctypeslib.as_array(C.llama_get_logits(two), (BLOCK, 257))[first:].copy()
    confidence = library.rows(two, 0, BLOCK, width)[first:, 0].copy()
    for each in (two, one):
        C.llama_free(each)
    return logits, confidence


@pytest.mark.parametrize("k", [1, 2, 4])
def test_drafts_are_those_of_the_reference(kind, k):
    """After rounds in which any number of drafts was accepted."""
    with loaded(kind) as (target, head, first):
        check_rounds(target, head, k, lambda text: list(reference(target, head, text, first)[0][:k]), lag=2)


def test_a_block_and_its_confidence(kind):
    with loaded(kind) as (target, head, first):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        drafted = rounds.drafter.draft(text, 9, lambda _: True)
        logits, confidence = reference(target, head, text, first)
        assert drafted.tokens == tuple(logits.argmax(axis=1))
        np.testing.assert_allclose(head.block(rounds.head)[0], logits, atol=1e-3)
        if "conf_proj.weight" in head.summary.tensors:
            np.testing.assert_allclose(drafted.confidence, confidence, atol=1e-4)
            assert len(set(drafted.confidence)) > 1
        else:
            odds = np.exp(logits - logits.max(axis=1, keepdims=True))
            np.testing.assert_allclose(drafted.confidence, 1 / odds.sum(axis=1), atol=1e-4)
        assert len(rounds.drafter.draft(text, 9, lambda so_far: len(so_far) < 2).tokens) == 2
        assert rounds.drafter.draft(text, 9, lambda _: False).tokens == ()
        rounds.close()


def test_it_drafts_only_after_what_the_target_has_evaluated(kind):
    with loaded(kind) as (target, head, _first):
        rounds, text = Rounds(target, head), random_text(45)
        assert rounds.draft(text[:1], 2) == []
        rounds.target.forward(text[:-1])
        draft = rounds.draft(text, 2)
        assert len(draft) == 2
        assert rounds.draft([*text, draft[0]], 2) == []
        state = rounds.target.state()
        rounds.target.rollback(0)
        assert rounds.target.restore(text[:-1], state)
        assert rounds.draft(text, 2) == []  # the rows of a restored text are unknown
        rounds.close()


def test_texts_side_by_side(kind):
    texts = [random_text(45), random_text(30, seed=2)]
    with loaded(kind) as (target, head, first):
        both = [Rounds(target, head) for _ in texts]
        target.forward([(one.target, text[:-1], 1) for one, text in zip(both, texts, strict=True)])
        for _ in range(3):
            for one, text in zip(both, texts, strict=True):
                draft = one.draft(text, 3)
                assert draft == reference(target, head, text, first)[0][:3].argmax(axis=1).tolist()
                text.append(draft[0])
            target.forward([(one.target, text[-2:-1], 1) for one, text in zip(both, texts, strict=True)])
        for one in both:
            one.close()


def test_a_long_prompt_is_read_from_its_window_on(kind):
    with loaded(kind) as (target, head, _first):
        rounds, text = Rounds(target, head), random_text(WINDOW + 100)
        rounds.target.forward(text[:-1])
        assert rounds.drafter.lag(text) == WINDOW
        assert len(rounds.draft(text, 2)) == 2
        assert rounds.head.start == 100
        rounds.close()


def test_a_full_context(kind):
    with loaded(kind) as (target, head, _first):
        rounds, text = Rounds(target, head), random_text(1024)
        rounds.target.forward(text[:1000])
        rounds.drafter._window = 1024
        assert len(rounds.draft(text[:1001], 3)) == 3
        rounds.target.forward(text[1000:1020])
        assert rounds.draft(text[:1021], 3) == []
        rounds.close()


def test_a_restored_text_is_read_from_its_first_known_row(kind):
    with loaded(kind) as (target, head, _first):
        check_restored(target, head)


def test_a_canceled_pass_leaves_no_trace(kind):
    with loaded(kind) as (target, head, first):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        draft = rounds.draft(text, 3)
        head.cancel()
        with pytest.raises(Cancelled):
            rounds.draft(text, 3)
        target.cancel()
        with pytest.raises(Cancelled):
            rounds.verify(text, draft)
        rounds.verify(text, draft)
        text = [*text, *draft[:2], 7]
        rounds.target.rollback(len(text) - 1)
        expected = reference(target, head, text, first)[0][:3].argmax(axis=1).tolist()
        assert rounds.draft(text, 3) == expected
        rounds.close()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_text_is_that_of_plain_decoding(kind, monkeypatch, length):
    plain, fast = greedy(kind[:2], monkeypatch, length)
    assert fast.tokens == plain.tokens
    assert fast.drafted > 50


def test_which_drafter_belongs_to_a_target(tmp_path):
    target = write_dense(tmp_path / "target.gguf")
    wrong = {
        "another width": {"shape": Dense(width=32)},
        "another vocabulary": {"extra": 3},
        r"it reads the layers \(0, 4\) of 4": {"taps": (0, 4)},
        "its table d2t is damaged": {"ids": np.array([1, 257])},
        "attention of another shape": {"shape": Dense(heads=4, kv=3)},
        "a mask token 300 and blocks of 5 tokens": {"mask": 300},
        "a mask token 255 and blocks of 99 tokens": {"keys": {"block_size": 99}},
        "only drafters with plain attention, or a Markov head, are supported": {
            "keys": {"rope.dimension_sections": [8, 0, 0, 0]}
        },
        "a window that no layer has": {"keys": {"attention.sliding_window": 16}},
    }
    with LlamaModel(target, OPTIONS) as model:
        for i, (reason, options) in enumerate(wrong.items()):
            path = write_dspark(tmp_path / f"{i}.gguf", **options)
            assert is_head(path)
            with pytest.raises(EdgespecError, match=rf"was not made for target\.gguf \({reason}\)"):
                DsparkModel(path, model)
    assert head_for(target) is None
    right = write_dspark(tmp_path / "z.gguf")
    assert head_for(target) == right
