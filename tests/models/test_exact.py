"""Exact mode: which batches are equal to single rows, and answers that no draft can change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.app.bench.measure import answer, read_suite
from edgespec.app.engine import calibration
from edgespec.app.engine.assembly import open_engine
from edgespec.core import EdgespecError, Logits
from edgespec.models.exact import equal_sizes, exact_options
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.sampling import Sampling

PROMPTS = 6


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))


def test_the_recipe_is_llama_cpps() -> None:
    options = exact_options(LlamaOptions(engine="ik", context=512))
    assert (options.engine, options.context, options.type_k, options.type_v) == (
        "llama.cpp", 512, "q8_0", "q8_0",
    )  # fmt: skip


def test_sizes_are_those_that_single_rows_confirm(
    starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bit of one logit, changed from 8 rows on, is found."""
    with LlamaModel(starter_path, exact_options(LlamaOptions(context=1024))) as model:
        text = model.vocab.tokenize("In the beginning was the word, and 12 others. " * 60)
        sequence = model.sequence()
        honest = equal_sizes(sequence, text, 32)
        assert len(sequence.tokens) == 0
        forward = LlamaModel.forward

        def rounding(self: LlamaModel, requests: Any) -> list[Logits]:
            rows = forward(self, requests)
            if requests[0][2] >= 8:
                rows[0][3, 7] = np.nextafter(rows[0][3, 7], np.float32(np.inf))
            return rows

        monkeypatch.setattr(LlamaModel, "forward", rounding)
        assert equal_sizes(sequence, text, 32) == [n for n in honest if n < 8]
    assert honest[0] == 1
    assert len(honest) > 1


def test_exact_answers_are_plain_decodings(starter_path: Path) -> None:
    drafted = 0
    with open_engine(starter_path, exact=True, options=LlamaOptions(context=2048)) as engine:
        assert any("bit-identical" in note for note in engine.notes)
        for prompt in read_suite(None, 1)[:PROMPTS]:
            plain, fast = (answer(engine, prompt, 96, Sampling(), speculate=yes) for yes in (False, True))
            assert fast.tokens == plain.tokens
            drafted += fast.drafted
    assert drafted > 0


@pytest.fixture(scope="module")
def short(starter_path: Path) -> Iterator[LlamaModel]:
    """So few rows and tokens that checking its batches is quick."""
    with LlamaModel(starter_path, exact_options(LlamaOptions(context=128, max_rows=2))) as model:
        yield model


@pytest.mark.parametrize("kept", [[], [True], [-3, 1], [2, 4], ["1"], {"1": 1}, "1", None])
def test_a_damaged_verdict_is_found_anew(short: LlamaModel, kept: object) -> None:
    calibration.save("exact", calibration.cost_key(short.summary, short.options), {"sizes": kept})
    said: list[str] = []
    sequence = short.sequence()
    try:
        assert calibration.exact_sizes(sequence, said.append)[0] == 1
    finally:
        sequence.close()
    assert len(said) == 1


def test_a_file_whose_batches_all_differ_is_refused(starter_path: Path) -> None:
    with LlamaModel(starter_path, exact_options(LlamaOptions(context=1024))) as model:
        calibration.save("exact", calibration.cost_key(model.summary, model.options), {"sizes": [1]})
        with pytest.raises(EdgespecError, match="--draft none"):
            calibration.exact_sizes(model.sequence(), print)
