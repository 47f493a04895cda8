"""Layers for multi-token prediction: against the reference logic, evaluated from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from head_rounds import Rounds, check_rounds, random_text
from tiny_hybrids import Qwen35, write_qwen35

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.heads import head_for, heads, is_head
from edgespec.models.gguf.hidden import WINDOW, HiddenRows
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.mtp import MtpModel
from edgespec.quant.head import head_path, write_head

OPTIONS = LlamaOptions(context=1024, threads=1, mtp=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen35(tmp_path_factory.mktemp("mtp") / "whole.gguf", heads=1)


@pytest.fixture(scope="module")
def target(path: Path) -> Iterator[LlamaModel]:
    with LlamaModel(path, OPTIONS) as model:
        yield model


def reference(model: LlamaModel, head: MtpModel, text: list[int], k: int) -> list[np.ndarray]:
    """The logits of k draft tokens after `text`, from scratch: llama.cpp's process() and draft().

    The layer evaluates every token with the target's row for the one before, then its own drafts with its
    own rows.
    """
    target = model.sequence()
    sequence = head.sequence_for(target)
    target.forward(text[:-1])
    rows = [sequence.forward(text)[0].copy()]
    for _ in range(k - 1):
        rows.append(sequence.forward([int(rows[-1].argmax())])[0].copy())
    sequence.close()
    target.close()
    return rows


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_drafts_are_those_of_the_reference(path, k):
    """After rounds in which any number of drafts was accepted."""
    options = replace(OPTIONS, sequences=2)
    with LlamaModel(path, options) as model, MtpModel(path, model) as head:
        check_rounds(model, head, k, lambda text: reference(model, head, text, k))


def test_a_long_prompt_is_read_from_its_window_on(path):
    with LlamaModel(path, OPTIONS) as model, MtpModel(path, model) as head:
        rounds, text = Rounds(model, head), random_text(WINDOW + 100)
        rounds.target.forward(text[:-1])
        assert rounds.drafter.lag(text) == WINDOW
        assert len(rounds.draft(text, 2)) == 2
        assert rounds.head.start == 100
        rounds.close()


def test_hidden_rows_follow_the_sequence():
    rows = HiddenRows(2)
    text = np.arange(2 * 6000, dtype=np.float32).reshape(6000, 2)
    for start in range(0, 6000, 100):
        rows.append(start, text[start : start + 100])
    found, known = rows.before(5990, 5)
    assert known
    np.testing.assert_array_equal(found, text[5989:5994])
    rows.cut(5992)
    found, known = rows.before(5990, 5)
    assert not known
    np.testing.assert_array_equal(found[:3], text[5989:5992])
    assert not found[3:].any()
    rows.append(7000, text[:3])  # a state was restored
    assert not rows.before(6999, 1)[1]
    assert rows.before(7001, 1)[1]
    rows.cut(10)
    rows.append(6, text[6:9])  # below all that was known
    np.testing.assert_array_equal(rows.before(7, 3)[0], text[6:9])
    assert HiddenRows(2).before(0, 1)[1]  # nothing is left of the first token


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target without the layer: the same weights, in the same order."""
    return write_qwen35(tmp_path_factory.mktemp("plain") / "plain.gguf", heads=0)


def test_a_head_file_drafts_what_the_layer_drafts(path, plain, tmp_path):
    summary = check_gguf(path)
    ids = np.sort(np.random.default_rng(0).choice(256, 200, replace=False))
    small = head_path(tmp_path / "plain.gguf", 200)
    write_head(path, summary, ids, small, lambda *_: True)
    assert is_head(small)
    assert small.stat().st_size < path.stat().st_size / 3
    text = [int(token) for token in ids[random_text(45) % np.int64(200)]]
    with (
        LlamaModel(path, OPTIONS) as whole,
        MtpModel(path, whole) as native,
        LlamaModel(plain, OPTIONS) as target,
        MtpModel(small, target) as head,
    ):
        expected, rounds = Rounds(whole, native), Rounds(target, head)
        for one in (expected, rounds):
            one.target.forward(text[:-1])
            one.draft(text, 1)
        np.testing.assert_allclose(rounds.logits[0][ids], expected.logits[0][ids], atol=1e-4)
        left_out = np.setdiff1d(np.arange(257), ids)
        assert np.isneginf(rounds.logits[0][left_out]).all()
        assert rounds.draft([*text, int(left_out[0])], 1)[0] in ids  # evaluated as its stand-in
        expected.close()
        rounds.close()


def test_which_head_belongs_to_a_target(path, plain, tmp_path):
    assert heads(check_gguf(path)) == 1
    assert head_for(path) == path
    target = tmp_path / "target.gguf"
    target.write_bytes(plain.read_bytes())
    assert head_for(target) is None
    ids = np.arange(257)
    wide = write_qwen35(tmp_path / "wide.gguf", Qwen35(width=512), heads=1)
    write_head(wide, check_gguf(wide), ids, tmp_path / "a.head-257.gguf", lambda *_: True)
    (tmp_path / "b.head-257.gguf").write_bytes(b"GGUF")
    assert head_for(target) is None  # another width, and a damaged file
    made = tmp_path / "c.head-257.gguf"
    write_head(path, check_gguf(path), ids, made, lambda *_: True)
    assert head_for(target) == made
    wrong = pytest.raises(EdgespecError, match=r"a\.head-257\.gguf was not made for target\.gguf")
    with LlamaModel(target, OPTIONS) as model, wrong:
        MtpModel(tmp_path / "a.head-257.gguf", model)


def test_a_head_drafts_for_a_target_on_ik(ik, tmp_path):
    """Rows cross from one engine to the other: those of the tokens whose logits were wanted."""
    shape = Qwen35(width=256, state=128)  # with smaller states ik computes other logits
    path = write_qwen35(tmp_path / "whole.gguf", shape, heads=1)
    plain = write_qwen35(tmp_path / "plain.gguf", shape)
    small = head_path(plain, 257)
    write_head(path, check_gguf(path), np.arange(257), small, lambda *_: True)
    text = random_text(45)
    drafts = []
    for engine in ("llama.cpp", "ik"):
        options = replace(OPTIONS, engine=engine, rows=True)
        with LlamaModel(plain, options) as target, MtpModel(small, target) as head:
            rounds = Rounds(target, head)
            rounds.target.forward(text, 1)
            known = [*text, 7]
            assert rounds.drafter.lag(known) == (46 if engine == "llama.cpp" else 1)
            # With the last five rows on both, the layer begins where they do.
            rounds.target.rollback(0)
            rounds.target.forward(text, 5)
            last = rounds.target.hidden.before(41, 5)[0]
            rounds.target.hidden = HiddenRows(shape.width)
            rounds.target.hidden.append(40, last)
            drafts.append((rounds.draft(known, 3), rounds.logits[0]))
            rounds.close()
    np.testing.assert_allclose(drafts[1][1], drafts[0][1], atol=0.02)
    assert drafts[0][0] == drafts[1][0]


def test_rows_of_tokens_that_are_evaluated_again_stay_known(ik, tmp_path):
    """ik gives rows only where logits are wanted: not for what follows a checkpoint again."""
    shape = Qwen35(width=256, state=128)
    plain = write_qwen35(tmp_path / "plain.gguf", shape)
    with LlamaModel(plain, replace(OPTIONS, engine="ik", rows=True)) as target:
        sequence = target.sequence()
        rows = sequence.hidden = HiddenRows(shape.width)
        sequence.forward(random_text(20))
        sequence.forward([1, 2, 3], 3)
        before = rows.before(21, 2)
        assert before[1]
        sequence.rollback(22)
        assert len(sequence.tokens) == 20  # the checkpoint
        assert rows.first == 20
        np.testing.assert_array_equal(rows.before(21, 2)[0], before[0])
        sequence.forward([1, 2, 4])
        assert rows.first == 20
        assert rows.before(22, 2)[1]
