"""Agreement of two models by hand-made logits, and of a real one with itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgespec.core import Cancelled
from edgespec.fakes import ScriptedModel, noise_script
from edgespec.quant.agreement import CHUNK, WINDOW, LogitsReader, compare, reader, speeds, windows


def scripted(rows: np.ndarray, heard: list[tuple[list[int], bool]] | None = None) -> LogitsReader:
    place = 0

    def read(new: Sequence[int], fresh: bool) -> np.ndarray:
        nonlocal place
        if heard is not None:
            heard.append((list(new), fresh))
        place += len(new)
        return rows[place - len(new) : place]

    return read


def test_top1_and_divergence_are_those_of_the_definition():
    ours = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]], np.float32))
    theirs = np.log(np.array([[0.5, 0.25, 0.25], [0.4, 0.3, 0.3], [0.25, 0.25, 0.5]], np.float32))
    found = compare(scripted(ours + 3), scripted(theirs - 5), [[1, 2, 3]])  # logits are free up to a constant
    second = 0.1 * math.log(0.1 / 0.4) + 0.8 * math.log(0.8 / 0.3) + 0.1 * math.log(0.1 / 0.3)
    third = 2 * 0.2 * math.log(0.2 / 0.25) + 0.6 * math.log(0.6 / 0.5)
    assert found.tokens == 3
    assert found.top1 == pytest.approx(2 / 3)
    assert found.divergence == pytest.approx((second + third) / 3, rel=1e-5)


def test_the_divergence_is_from_the_source():
    sharp = np.log(np.array([[0.98, 0.01, 0.01]], np.float32))
    flat = np.log(np.array([[0.4, 0.3, 0.3]], np.float32))
    there = compare(scripted(sharp), scripted(flat), [[0]]).divergence
    back = compare(scripted(flat), scripted(sharp), [[0]]).divergence
    assert there == pytest.approx(0.98 * math.log(0.98 / 0.4) + 0.02 * math.log(0.01 / 0.3), rel=1e-5)
    assert back != pytest.approx(there, rel=0.1)


def test_a_text_is_read_in_windows_that_begin_anew():
    tokens = list(range(WINDOW + CHUNK + 3))
    heard: list[tuple[list[int], bool]] = []
    rows = np.zeros((len(tokens), 4), np.float32)
    found = compare(scripted(rows), scripted(rows, heard), windows(tokens))
    assert [token for new, _ in heard for token in new] == tokens
    assert [new[0] for new, fresh in heard if fresh] == [0, WINDOW]
    assert max(len(new) for new, _ in heard) == CHUNK
    assert (found.tokens, found.top1, found.divergence) == (len(tokens), 1.0, 0.0)


def test_a_model_agrees_with_itself_and_not_with_its_past(starter):
    tokens = starter.vocab.tokenize("The sea is large and old. The sea is deep, and full of fish.")
    ours, theirs = starter.sequence(), starter.sequence()
    try:
        same = compare(reader(ours), reader(theirs), windows(tokens))
        assert same.top1 == 1.0
        assert same.divergence < 1e-3
        # What a reader held before is forgotten at the beginning of a text.
        theirs.forward(tokens)
        again = compare(reader(ours), reader(theirs), windows(tokens))
        assert again.divergence < 1e-3
        assert list(theirs.tokens) == tokens
    finally:
        ours.close()
        theirs.close()


def test_progress_is_reported_and_may_stop_it():
    rows, notes = np.zeros((100, 3), np.float32), list[float]()

    def stop(fraction: float) -> bool:
        notes.append(fraction)
        return len(notes) < 2

    with pytest.raises(Cancelled):
        compare(scripted(rows), scripted(rows), windows(list(range(100))), stop)
    assert notes == [0.25, 0.5]


def test_speeds_are_reported_for_every_model_and_leave_what_was_held():
    models = {name: ScriptedModel(noise_script(50)) for name in ("one", "two")}
    found = speeds(models, seconds=0.0)
    assert found.keys() == models.keys()
    assert all(set(times) == {1, 4, 8} and min(times.values()) > 0 for times in found.values())
    assert {len(model.tokens) for model in models.values()} == {64}
