"""What every runtime owes the decoding loop: GGUF on both native engines, ONNX in each form of its graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_attention import FULL_CACHES
from tiny_onnx import write_tiny_onnx

from edgespec.core import Cancelled, EdgespecError
from edgespec.models.gguf.model import LlamaOptions
from edgespec.models.onnx.model import OnnxOptions
from edgespec.models.runtime import Model, ModelSequence, load_model
from edgespec.models.state import load_state, save_state

TEXT = "The quick brown fox jumps over the lazy dog because the dog would not move."
TINY = {
    "onnx-shared": {"attention": "shared"},
    "onnx-plain": {"attention": "plain", "layout": "optimum"},
    "onnx-all-rows": {"attention": "shared", "head": "biased"},
    "onnx-half": {"attention": "plain", "half": True, "external": False},
}
EXPORTED = ("smollm2-135m-int8", "smollm2-135m-int4", "qwen2.5-coder-0.5b-int4", "qwen2.5-coder-0.5b-int8")
"""Folders that `make models-onnx` writes."""

Load = Callable[..., Model]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED]


ENGINES = ("llama.cpp", "ik")
FAMILIES = [f"{name} on {engine}" for name in FULL_CACHES for engine in ENGINES]


@pytest.fixture(scope="module", params=[*ENGINES, *FAMILIES, *TINY, *SLOW])
def kind(request: pytest.FixtureRequest) -> str:
    """Each runtime in turn."""
    if request.param.endswith("ik"):
        request.getfixturevalue("ik")
    return request.param


@pytest.fixture(scope="module")
def path(kind: str, starter_path: Path, tmp_path_factory, exported) -> Path:
    if kind in TINY:
        return write_tiny_onnx(tmp_path_factory.mktemp("onnx") / kind, **TINY[kind])
    if kind in FAMILIES:
        return FULL_CACHES[kind.split()[0]](tmp_path_factory.mktemp("family") / "model.gguf")
    return exported(kind) if kind in EXPORTED else starter_path


@pytest.fixture(scope="module")
def load(kind: str, path: Path) -> Load:
    """Loads the kind's model with options that all kinds have."""
    options = OnnxOptions()
    if kind in ENGINES:
        options = LlamaOptions(engine=kind)
    elif kind in FAMILIES:  # without flash attention and in float32, as far as the engine has that
        engine = kind.split()[-1]
        cache = "f32" if engine == "llama.cpp" else "f16"
        options = LlamaOptions(engine=engine, flash_attention=False, type_k=cache, type_v=cache)

    def load(progress=None, **changes: int) -> Model:
        from dataclasses import replace

        return load_model(path, replace(options, **changes), progress)

    return load


@pytest.fixture(scope="module")
def model(load: Load) -> Iterator[Model]:
    with load(context=1536, sequences=3) as model:
        yield model


@pytest.fixture(scope="module")
def close(kind: str) -> Callable[..., None]:
    """Asserts that two passes gave the same rows, within what other batch sizes round differently.

    That is less where both were short, which `native` says of the native engines.
    """
    near = {"onnx-half": 0.1}.get(kind, 2.0 if kind in EXPORTED else 1e-3)
    if kind in FAMILIES and kind.endswith("ik"):
        near = 0.02

    def close(rows: np.ndarray, others: np.ndarray, native: float = 2.0) -> None:
        assert (rows.argmax(axis=-1) == others.argmax(axis=-1)).all()
        np.testing.assert_allclose(rows, others, atol=native if kind in ENGINES else near)

    return close


def test_rows_after_a_rollback_are_those_of_a_fresh_cache(model, sequence, close):
    tokens = model.vocab.tokenize(TEXT)
    whole = sequence.forward(tokens, 4).copy()
    assert whole.shape == (4, model.vocab.size)
    assert whole.dtype == np.float32
    sequence.forward([11, 12, 13], 1)
    sequence.rollback(len(tokens) - 4)
    assert list(sequence.tokens) == tokens[:-4]
    close(sequence.forward(tokens[-4:], 4), whole, native=0.5)


def test_rounds_of_any_size_give_what_one_pass_gives(model, sequence, close):
    """One row after many, many after one, with wrong drafts rolled back between: graphs may be reused."""
    tokens = (model.vocab.tokenize(TEXT) * 20)[:300]
    whole = sequence.forward(tokens, 24).copy()
    sequence.rollback(len(tokens) - 24)
    rows: list[np.ndarray] = []
    for size, wrong in ((1, 0), (1, 3), (4, 1), (1, 0), (1, 0), (8, 2), (1, 1), (5, 0), (1, 5), (1, 0)):
        done = len(sequence.tokens)
        logits = sequence.forward([*tokens[done : done + size], *range(50, 50 + wrong)], size + wrong)
        rows.extend(logits[:size].copy())
        sequence.rollback(done + size)
    assert list(sequence.tokens) == tokens
    close(np.array(rows), whole)


def test_rows_depend_on_all_that_came_before(model, sequence):
    """A cache that forgot its beginning, or notes positions wrongly, would pass the other tests."""
    tokens = (model.vocab.tokenize(TEXT) * 20)[:200]
    first = sequence.forward(tokens)[0].copy()
    sequence.rollback(0)
    other = sequence.forward([(tokens[0] + 1) % 200, *tokens[1:]])[0].copy()
    sequence.rollback(0)
    swapped = sequence.forward([tokens[1], tokens[0], *tokens[2:]])[0].copy()
    assert np.abs(first - other).max() > 1e-6
    assert np.abs(first - swapped).max() > 1e-6


def test_a_prompt_longer_than_a_batch_gives_only_the_rows_wanted(model, sequence, close):
    tokens = (model.vocab.tokenize(TEXT) * 60)[:400]
    rows = sequence.forward(tokens, 2).copy()
    assert rows.shape == (2, model.vocab.size)
    assert list(sequence.tokens) == tokens
    sequence.rollback(0)
    for start in range(0, 390, 30):
        sequence.forward(tokens[start : start + 30])
    close(sequence.forward(tokens[390:], 2), rows)


def test_logits_are_a_view_not_a_copy(model, sequence, kind):
    if kind == "onnx-half":
        pytest.skip("logits of 16 bits are converted")
    row = sequence.forward([5, 6])[0]
    assert not row.flags.owndata
    address = row.ctypes.data
    assert sequence.forward([7])[0].ctypes.data == address or kind == "onnx-all-rows"


def test_several_sequences_in_one_call_do_not_see_each_other(model, close):
    one, two = model.sequence(), model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    alone = one.forward(tokens, 2).copy()
    one.rollback(0)
    both = model.forward([(one, tokens, 2), (two, tokens[:5], 1)])
    assert [rows.shape[0] for rows in both] == [2, 1]
    close(both[0], alone)
    assert list(one.tokens) == tokens
    assert list(two.tokens) == tokens[:5]
    one.close()
    two.close()


def test_sequences_that_take_turns_row_by_row_do_not_see_each_other(model):
    texts = "The capital of France is", "One, two, three, four, five,"
    prompts = [model.vocab.tokenize(text) for text in texts]

    def greedy(sequences: list[ModelSequence], which: list[int], steps: int) -> list[list[int]]:
        new, written = [list(prompts[i]) for i in which], [[] for _ in sequences]
        for _ in range(steps):
            for i, sequence in enumerate(sequences):
                new[i] = [int(sequence.forward(new[i])[0].argmax())]
                written[i] += new[i]
        return written

    one, two = model.sequence(), model.sequence()
    alone = [*greedy([one], [0], 8), *greedy([two], [1], 8)]
    one.rollback(0)
    two.rollback(0)
    assert greedy([one, two], [0, 1], 8) == alone
    one.close()
    two.close()


def test_a_sequence_that_shares_goes_on_from_there(model, close):
    one, two = model.sequence(), model.sequence()
    tokens = model.vocab.tokenize(TEXT)
    one.forward(tokens)
    assert two.share(one, len(tokens) - 2)
    assert list(two.tokens) == tokens[:-2]
    close(two.forward(tokens[-2:], 2), one_again(one, tokens))
    assert list(one.tokens) == tokens
    one.close()
    two.close()


def one_again(one: ModelSequence, tokens: list[int]) -> np.ndarray:
    one.rollback(len(tokens) - 2)
    return one.forward(tokens[-2:], 2).copy()


def test_a_cache_goes_to_disk_and_comes_back(model, sequence, tmp_path):
    tokens = (model.vocab.tokenize(TEXT) * 20)[:280]
    sequence.forward(tokens)
    assert save_state(sequence, tmp_path / "one.state")
    after = sequence.forward([5])[0].copy()
    sequence.rollback(0)
    sequence.forward([1, 2, 3])
    assert load_state(sequence, tmp_path / "one.state")
    assert list(sequence.tokens) == tokens
    np.testing.assert_array_equal(sequence.forward([5])[0], after)


def test_sequences_run_out(load):
    with load(context=64) as model:
        first = model.sequence()
        with pytest.raises(EdgespecError, match="in use"):
            model.sequence()
        first.close()
        assert model.sequence().id == first.id


@pytest.mark.parametrize(
    ("new", "last"), [([], 1), ([1], 2), ([1], 0), ([-1], 1), ([1 << 30], 1), ([1] * 1537, 1)]
)
def test_wrong_requests_are_refused_before_native_code_sees_them(sequence, new, last):
    with pytest.raises(ValueError, match=r"rows|fit|vocabulary"):
        sequence.forward(new, last)
    assert list(sequence.tokens) == []


def test_too_many_rows_are_refused(load):
    with load(context=64, max_rows=4) as model, pytest.raises(ValueError, match="4 rows"):
        model.sequence().forward([1] * 5, 5)


def test_cancel_from_another_thread_stops_a_long_prompt(model, sequence, close):
    tokens = (model.vocab.tokenize(TEXT) * 100)[:1500]

    def cancel() -> None:
        while not sequence.tokens:
            pass
        model.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(Cancelled):
        sequence.forward(tokens, 1)
    thread.join()
    held = len(sequence.tokens)
    assert 0 < held < len(tokens)
    assert list(sequence.tokens) == tokens[:held]
    # What it says it holds is what it holds: going on from there gives what a fresh cache gives.
    rest = sequence.forward(tokens[held : held + 20], 1).copy()
    sequence.rollback(0)
    close(sequence.forward(tokens[: held + 20], 1), rest)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_cancel_that_came_early_stops_the_next_pass_and_only_that(model, sequence, rows, close):
    tokens = model.vocab.tokenize(TEXT)
    expected = sequence.forward(tokens, rows).copy()
    sequence.rollback(len(tokens) - rows)
    model.cancel()
    with pytest.raises(Cancelled):
        sequence.forward(tokens[-rows:], rows)
    assert list(sequence.tokens) == tokens[:-rows]
    close(sequence.forward(tokens[-rows:], rows), expected, native=0.5)
    model.cancel()
    model.uncancel()
    sequence.forward([5])


def test_progress_runs_to_one_and_can_stop_the_load(load):
    seen: list[float] = []

    def note(fraction: float) -> bool:
        seen.append(fraction)
        return True

    load(note, context=64).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with pytest.raises(Cancelled):
        load(lambda fraction: fraction < 0.3, context=64)


def test_nothing_is_written_to_the_terminal(load, capfd):
    with load(context=256) as model:
        model.sequence().forward([1, 2, 3])
    assert capfd.readouterr() == ("", "")


def test_control_tokens_have_no_bytes_and_need_special(model):
    vocab = model.vocab
    text = vocab.text(vocab.eos)
    end = vocab.tokenize(text, special=True)
    assert end == [vocab.eos]
    assert vocab.is_end(end[0])
    assert vocab.piece(end[0]) == b""
    assert text in vocab.control_texts()
    as_text = vocab.tokenize(text)
    assert len(as_text) > 1
    assert vocab.detokenize(as_text) == text


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "日本語 🦊", "tabs\tand\nlines", "\x00\x1b["])
def test_text_survives_the_vocabulary(model, text):
    assert model.vocab.detokenize(model.vocab.tokenize(text)) == text
