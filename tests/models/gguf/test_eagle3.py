"""EAGLE-3 drafters: against the reference logic of llama.cpp, evaluated from scratch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from head_rounds import OPTIONS, Rounds, check_restored, check_rounds, greedy, random_text
from tiny import write_tiny
from tiny_heads import Dense, write_dense, write_eagle3, write_gemma4
from tiny_hybrids import write_qwen35

from edgespec.app.engine.loading import EngineSpec, load_engine
from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.eagle3 import Eagle3Model
from edgespec.models.gguf.heads import head_for, is_head
from edgespec.models.gguf.hidden import WINDOW
from edgespec.models.gguf.model import LlamaModel
from edgespec.models.gguf.native import RowBatch

SOME = np.sort(np.random.default_rng(0).choice(256, 150, replace=False))
NARROW = Dense(width=32, heads=2)
# The target, and what the drafter's file has: all it needs, or the target's embeddings and output head.
KINDS = {
    "llama": (write_dense, {"ids": SOME}),
    "qwen3": (partial(write_dense, architecture="qwen3"), {"ids": SOME, "embeddings": True, "shape": NARROW}),
    "shared": (write_dense, {}),
    "gemma4": (write_gemma4, {"ids": SOME, "embeddings": True, "shape": NARROW}),
    "qwen35": (write_qwen35, {"ids": SOME, "embeddings": True, "shape": NARROW, "target": Dense(width=256)}),
}


@pytest.fixture(scope="module", params=KINDS)
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, (write, options) = tmp_path_factory.mktemp("eagle3"), KINDS[request.param]
    return write(folder / "target.gguf"), write_eagle3(folder / "head.gguf", **options)


@contextmanager
def loaded(paths: tuple[Path, Path]) -> Iterator[tuple[LlamaModel, Eagle3Model]]:
    with LlamaModel(paths[0], OPTIONS) as target, Eagle3Model(paths[1], target) as head:
        yield target, head


def reference(target: LlamaModel, head: Eagle3Model, text: list[int], k: int) -> list[np.ndarray]:
    """The logits of k draft tokens after `text`, in new contexts: llama.cpp's process() and draft().

    Position P has token P + 1 and the row that the encoder gives for the target's token P.
    """
    library, held = target.library, len(text) - 1
    C, kind = library.C, library.C.llama_batch  # noqa: N806
    width, own = (model.summary.number("embedding_length") for model in (target, head))
    options = replace(OPTIONS, batch=256, max_rows=256)

    def context(model, **other):
        abort = ctypes.create_string_buffer(2)
        return library.new_context(model._model, model.path, options, 1, 0, 0, (), abort, **other), abort

    (one, _kept), batch = context(target), library.batch(256)
    library.keep_rows(one, (1, 2, 3))
    batch.clear()
    batch.add(0, 0, text[:-1], 0)
    assert C.llama_decode(one, batch.struct) == 0
    two, _kept_too = context(head, other=one)
    library.keep_rows(two)
    batch = RowBatch(256, kind, 3 * width)
    batch.struct.token = None
    batch.clear()
    batch.add_rows(0, 0, library.rows(one, 0, held, width, (1, 2, 3)), held)
    assert C.llama_encode(two, batch.struct) == 0
    rows = library.rows(two, 0, held, own).copy()

    def decode(tokens, position, states):
        batch = RowBatch(256, kind, own)
        batch.clear()
        batch.add(0, position, tokens, 1)
        batch._embd[: len(tokens)] = states
        assert C.llama_decode(two, batch.struct) == 0

    decode(text[1:held], 0, rows[:-1])
    tokens, logits, state = [text[-1]], [], rows[-1:]
    for i in range(k):
        decode(tokens[-1:], held - 1 + i, state)
        logits.append(np.ctypeslib.as_array(C.llama_get_logits(two), (257,)).copy())
        tokens.append(int(logits[-1].argmax()))
        state = library.row(two, 0, own)[np.newaxis]
    for one_context in (two, one):
        C.llama_free(one_context)
    return logits


@pytest.mark.parametrize("k", [1, 2, 4])
def test_drafts_are_those_of_the_reference(paths, k):
    """After rounds in which any number of drafts was accepted."""
    with loaded(paths) as (target, head):
        check_rounds(target, head, k, lambda text: reference(target, head, text, k))


def test_a_head_of_some_tokens_drafts_only_these(tmp_path):
    paths = write_dense(tmp_path / "target.gguf"), write_eagle3(tmp_path / "head.gguf", ids=SOME)
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        assert set(rounds.draft(text, 4)) <= set(SOME.tolist())
        assert (np.flatnonzero(np.isfinite(rounds.logits[0])) == SOME).all()
        rounds.close()


def test_texts_in_one_pass_keep_their_rows(paths):
    """Two sequences with unequally many tokens, side by side in the target's batches."""
    texts = [random_text(45), random_text(30, seed=2)]
    with loaded(paths) as (target, head):
        both = [Rounds(target, head) for _ in texts]
        target.forward([(one.target, text[:-1], 1) for one, text in zip(both, texts, strict=True)])
        for _ in range(3):
            for one, text in zip(both, texts, strict=True):
                draft = one.draft(text, 2)
                expected = reference(target, head, text, 2)
                assert draft == [int(row.argmax()) for row in expected]
                text.append(draft[0])
            target.forward([(one.target, text[-2:-1], 1) for one, text in zip(both, texts, strict=True)])
        for one in both:
            one.close()


def test_a_long_prompt_is_read_from_its_window_on(paths):
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(WINDOW + 100)
        rounds.target.forward(text[:49])
        assert rounds.drafter.reads_whole(text[:50])
        rounds.target.forward(text[49:-1])
        assert rounds.drafter.lag(text) == WINDOW
        assert len(rounds.draft(text, 2)) == 2
        assert rounds.head.start == 100
        rounds.close()


def test_a_restored_text_is_read_from_its_first_known_row(paths):
    with loaded(paths) as (target, head):
        check_restored(target, head)


def test_a_canceled_pass_leaves_no_trace(paths):
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(45)
        rounds.target.forward(text[:-1])
        draft = rounds.draft(text, 3)
        head.cancel()
        with pytest.raises(Cancelled):
            rounds.draft([*text, draft[0]], 3)
        target.cancel()
        with pytest.raises(Cancelled):
            rounds.verify(text, draft)
        rounds.verify(text, draft)
        text = [*text, *draft[:2], 7]
        rounds.target.rollback(len(text) - 1)
        expected = reference(target, head, text, 3)
        assert rounds.draft(text, 3) == [int(row.argmax()) for row in expected]
        rounds.close()


def test_a_text_of_one_token_is_no_beginning(paths):
    with loaded(paths) as (target, head):
        rounds, text = Rounds(target, head), random_text(12)
        rounds.draft(text[:1], 1)  # no row is left of it
        rounds.target.forward(text[:-1])
        assert rounds.draft(text, 2) == [int(row.argmax()) for row in reference(target, head, text, 2)]
        rounds.close()


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_text_is_that_of_plain_decoding(paths, monkeypatch, length):
    plain, fast = greedy(paths, monkeypatch, length)
    assert fast.tokens == plain.tokens
    assert fast.drafted > 50


def test_which_drafter_belongs_to_a_target(tmp_path):
    target = write_dense(tmp_path / "target.gguf")
    assert head_for(target) is None
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    shape = "attention of another shape"
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("another width", {"target": Dense(width=32)}),
        ("another width", {"shape": NARROW}),  # and the target's embeddings
        ("another vocabulary", {"extra": 3}),
        (r"it reads the layers \(1, 2, 4\) of 4", {"taps": (1, 2, 4)}),
        ("not one layer that reads three of the target", {"taps": (1, 2)}),
        ("its table d2t is damaged", {"ids": np.array([1, 257])}),
        (shape, {"shape": Dense(heads=4, kv=3)}),
        (shape, {"keys": {"rope.dimension_count": 18}}),
        (shape, {"keys": {"attention.head_count": 0}}),
        (shape, {"keys": {"nextn_predict_layers": 1}}),
        (shape, {"keys": {"attention.key_length_swa": 8}}),
    ]
    files = [write_eagle3(tmp_path / f"{i}.gguf", **options) for i, (_, options) in enumerate(wrong)]
    assert head_for(target) is None
    with LlamaModel(target, OPTIONS) as model:
        for (reason, _), path in zip(wrong, files, strict=True):
            assert is_head(path)
            with pytest.raises(EdgespecError, match=rf"was not made for target\.gguf \({reason}\)"):
                Eagle3Model(path, model)
    right = write_eagle3(tmp_path / "z.gguf", ids=SOME)
    assert head_for(target) == right
    named = write_eagle3(tmp_path / "targeted.gguf", ids=SOME)
    assert head_for(target) == named
    with pytest.raises(EdgespecError, match="only drafts for the model it was made for"):
        LlamaModel(right, OPTIONS)
    plain = write_tiny(tmp_path / "mamba.gguf", "mamba")
    assert head_for(plain) is None


def test_a_drafter_among_the_models_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("edgespec.app.engine.assembly.WORTH_LOADING", 0.0)
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "models"))
    target = write_dense(tmp_path / "target.gguf")
    (tmp_path / "models" / "owner--repository").mkdir(parents=True)
    head = write_eagle3(tmp_path / "models" / "owner--repository" / "head.gguf", ids=SOME)
    for draft in ("auto", str(head)):
        spec = EngineSpec(str(target), draft, engine="llama.cpp", context=512, threads=1, parallel=2)
        with load_engine(spec) as engine:
            assert engine.drafters.draft is not None
            assert engine.drafters.draft.model.path == head
            drafted = [part for slot in engine.pool.slots if (part := slot.drafting)]
            assert len(drafted) == 2
