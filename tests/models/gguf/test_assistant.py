"""Assistants of Gemma 4: against the reference logic of llama.cpp, evaluated from scratch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from head_rounds import OPTIONS, Rounds, check_rounds, greedy, random_text
from tiny_heads import ASSISTANT, Gemma4, write_assistant, write_dense, write_gemma4

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.assistant import AssistantModel
from edgespec.models.gguf.heads import head_for, is_head
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.gguf.native import RowBatch


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("assistant")
    return write_gemma4(folder / "target.gguf"), write_assistant(folder / "head.gguf")


@contextmanager
def loaded(paths: tuple[Path, Path]) -> Iterator[tuple[LlamaModel, AssistantModel]]:
    with LlamaModel(paths[0], OPTIONS) as target, AssistantModel(paths[1], target) as head:
        yield target, head


def reference(target: LlamaModel, head: AssistantModel, text: list[int], k: int) -> list[np.ndarray]:
    """The logits of k draft tokens after `text`, in new contexts: llama.cpp's process() and draft()."""
    library, held = target.library, len(text) - 1
    C = library.C  # noqa: N806
    width = target.summary.number("embedding_length")
    options = replace(OPTIONS, batch=256, max_rows=256)

    def context(model, **other):
        abort = ctypes.create_string_buffer(2)
        return library.new_context(model._model, model.path, options, 1, 0, 0, (), abort, **other), abort

    one, _kept = context(target)
    two, _kept_too = context(head, other=one, head=True)  # before the target's cache has anything
    library.keep_rows(one)
    library.keep_rows(two)
    batch = library.batch(256)
    batch.clear()
    batch.add(0, 0, text[:-1], 0)
    assert C.llama_decode(one, batch.struct) == 0
    state, token, logits = library.rows(one, 0, held, width)[-1].copy(), text[-1], []
    for _ in range(k):
        batch = RowBatch(1, C.llama_batch, width)
        batch.clear()
        batch.add(0, held, [token], 1)
        batch._embd[0] = state
        assert C.llama_decode(two, batch.struct) == 0
        logits.append(np.ctypeslib.as_array(C.llama_get_logits(two), (257,)).copy())
        token, state = int(logits[-1].argmax()), library.row(two, 0, width)
    for each in (two, one):
        C.llama_free(each)
    return logits


@pytest.mark.parametrize("k", [1, 2, 4])
def test_drafts_are_those_of_the_reference(paths, k):
    """After rounds in which any number of drafts was accepted, also beyond the window of 16."""
    with loaded(paths) as (target, head):
        check_rounds(target, head, k, lambda text: reference(target, head, text, k), lag=None)


def test_texts_side_by_side(paths):
    """Sequences read the keys of their own texts, in a context that both share."""
    texts = [random_text(45), random_text(30, seed=2)]
    with loaded(paths) as (target, head):
        both = [Rounds(target, head) for _ in texts]
        target.forward([(one.target, text[:-1], 1) for one, text in zip(both, texts, strict=True)])
        for _ in range(3):
            for one, text in zip(both, texts, strict=True):
                draft = one.draft(text, 3)
                assert draft == [int(row.argmax()) for row in reference(target, head, text, 3)]
                text.append(draft[0])
            target.forward([(one.target, text[-2:-1], 1) for one, text in zip(both, texts, strict=True)])
        for one in both[::-1]:
            one.close()
        again = Rounds(target, head)
        again.close()


def test_it_continues_the_draft_of_another(paths):
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        draft = rounds.draft(text, 4)
        assert rounds.drafter.lag(text) == 1
        assert rounds.drafter.lag([*text, *draft[:2]]) == 3
        assert rounds.draft([*text, *draft[:2]], 2) == draft[2:]
        assert rounds.draft(text[:20], 2) == []  # the cache is not that of this text
        assert rounds.draft(text, 4) == draft
        rounds.close()


def test_a_full_context(paths):
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(1024)
        rounds.target.forward(text[:1022])
        assert len(rounds.draft(text[:1023], 4)) == 1
        rounds.target.forward(text[1022:])
        assert rounds.draft([*text, 1], 4) == []
        rounds.close()


def test_a_canceled_pass_leaves_no_trace(paths):
    with loaded(paths) as (target, head):
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
        assert rounds.draft(text, 3) == [int(row.argmax()) for row in reference(target, head, text, 3)]
        rounds.close()


def test_a_restored_text(paths):
    """The row of its last token is unknown: drafts are worse until the next pass, the text is the same."""
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        state = rounds.target.state()
        rounds.target.rollback(0)
        assert rounds.target.restore(text[:-1], state)
        assert len(rounds.draft(text, 2)) == 2
        rounds.verify(text, [])
        text.append(9)
        assert rounds.draft(text, 2) == [int(row.argmax()) for row in reference(target, head, text, 2)]
        rounds.close()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_text_is_that_of_plain_decoding(paths, monkeypatch, length):
    plain, fast = greedy(paths, monkeypatch, length)
    assert fast.tokens == plain.tokens
    assert fast.drafted > 50


def test_which_assistant_belongs_to_a_target(tmp_path):
    target = write_gemma4(tmp_path / "target.gguf")
    shape = "attention of another shape"
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("another width", {"target": Gemma4(width=32)}),
        ("another vocabulary", {"extra": 3}),
        (shape, {"shape": replace(ASSISTANT, kv=4)}),
        (shape, {"shape": replace(ASSISTANT, head=64)}),
        (shape, {"keys": {"attention.head_count": 3}}),
        (shape, {"keys": {"rope.dimension_count_swa": 18}}),
        ("other layers", {"keys": {"nextn_predict_layers": 1}}),
    ]
    files = [write_assistant(tmp_path / f"{i}.gguf", **options) for i, (_, options) in enumerate(wrong)]
    assert head_for(target) is None
    with LlamaModel(target, OPTIONS) as model:
        for (reason, _), path in zip(wrong, files, strict=True):
            assert is_head(path)
            with pytest.raises(EdgespecError, match=rf"was not made for target\.gguf \({reason}\)"):
                AssistantModel(path, model)
    right = write_assistant(tmp_path / "z.gguf")
    assert head_for(target) == right
    other = write_gemma4(tmp_path / "odd.gguf", Gemma4(layers=5))  # its last layer has a window
    with LlamaModel(other, OPTIONS) as model, pytest.raises(EdgespecError, match="last layers"):
        AssistantModel(right, model)
    refused = pytest.raises(EdgespecError, match="assistants draft for gemma4 models, not for llama")
    with LlamaModel(write_dense(tmp_path / "llama.gguf"), OPTIONS) as model, refused:
        AssistantModel(right, model)
