"""The first use of a model compares the engines on this machine, once, and says what came of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_tiny

from edgespec.app.engine import calibration, first_use
from edgespec.app.engine.loading import EngineSpec, load_engine
from edgespec.core import EdgespecError
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.native import BackendName, LlamaOptions
from edgespec.quant.tune import SettingTrial, TuneReport


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDGESPEC_ENGINE")
    monkeypatch.setattr(first_use, "_others", lambda: 0.0)  # whatever runs next to these tests


def choose(
    path: Path, progress: Callable[[float], bool] | None = lambda _: True
) -> tuple[LlamaOptions | None, list[str]]:
    notes: list[str] = []
    return first_use.choose_engine(path, check_gguf(path), progress, notes.append), notes


def test_engines_are_compared_once_and_the_faster_is_used(ik: BackendName, starter_path: Path) -> None:
    fractions: list[float] = []
    start = time.monotonic()
    options, notes = choose(starter_path, lambda fraction: not fractions.append(fraction))
    assert options is not None
    assert options.engine in ("llama.cpp", ik)
    assert time.monotonic() - start < 2 * first_use.LIMIT
    assert len(notes) == 1
    assert f"using the engine {options.engine} from now on" in notes[0]
    assert 0.0 <= min(fractions) < max(fractions) <= 1.0
    kept = calibration.tuned(check_gguf(starter_path))
    assert kept == (replace(options, context=kept[0].context), "") if kept else False
    with load_engine(EngineSpec(str(starter_path), "suffix", 7, context=128)) as engine:
        assert engine.model.options.engine == options.engine  # type: ignore[union-attr]
        assert not any("used from now on" in note for note in engine.notes)


def test_stopping_it_keeps_nothing_and_it_does_not_come_again(ik: BackendName, starter_path: Path) -> None:
    options, notes = choose(starter_path, lambda fraction: False)
    assert options is None
    assert notes == ["the engines were not compared: run `edgespec tune`, which compares more settings, too"]
    assert calibration.tuned(check_gguf(starter_path)) is None
    assert choose(starter_path) == (None, [])


def test_it_takes_no_longer_than_its_limit(
    ik: BackendName, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "LIMIT", 0.0)
    options, notes = choose(starter_path)
    assert options is None
    assert len(notes) == 1


def test_nothing_is_compared_among_other_programs(
    ik: BackendName, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_use, "_others", lambda: 0.8)
    assert choose(starter_path) == (
        None,
        ["other programs use 80% of the processor: the engines are compared at a later start"],
    )
    calm = TuneReport(starter_path, (), SettingTrial("ik", LlamaOptions(engine=ik), "chosen"))
    monkeypatch.setattr("edgespec.quant.tune.compare_engines", lambda *_: calm)
    monkeypatch.setattr(first_use, "_others", lambda: 0.0)
    assert choose(starter_path)[0] == calm.best.options


def test_other_programs_are_seen() -> None:
    """A process of this test's keeps all its cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.3)
        seen = _others()
    finally:
        for one in busy:
            one.kill()
            one.wait()
    assert seen > 0.25


_others = first_use._others


def test_one_engine_is_not_compared(starter_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "find_spec", lambda name: None)
    assert choose(starter_path) == (None, [])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((1.0, 1.3), "using the engine ik from now on: ik is 1.30 times as fast as llama.cpp"),
        ((1.0, None), "using the engine llama.cpp: the other does not run this model on this machine"),
    ],
)
def test_the_outcome_names_both_engines(scores: tuple[float | None, ...], expected: str) -> None:
    trials = tuple(
        SettingTrial(name, LlamaOptions(engine=name), "", score=score)
        for name, score in zip(("llama.cpp", "ik"), scores, strict=True)  # type: ignore[arg-type]
    )
    best = max(trials, key=lambda one: one.score or 0.0)
    assert first_use._outcome(TuneReport(Path("x.gguf"), trials, best)).startswith(expected)


def test_the_environment_chooses_an_engine(
    ik: BackendName, starter_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESPEC_ENGINE", "ik")
    with load_engine(EngineSpec(str(starter_path), "suffix", 7, context=128)) as engine:
        assert engine.model.options.engine == "ik"  # type: ignore[union-attr]
    monkeypatch.setenv("EDGESPEC_ENGINE", "vllm")
    with pytest.raises(
        EdgespecError, match=r"unknown EDGESPEC_ENGINE .vllm. \(valid: auto, llama\.cpp, ik\)"
    ):
        load_engine(EngineSpec(str(starter_path), "suffix", 7, context=128))


def test_an_engine_that_was_chosen_before_but_refuses_the_file_is_not_used(
    ik: BackendName, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "model.gguf", "llama", frequencies=4.0)
    calibration.keep_tuned(check_gguf(path), LlamaOptions(engine=ik))
    with load_engine(EngineSpec(str(path), "none")) as engine:
        assert engine.model.options.engine == "llama.cpp"  # type: ignore[union-attr]
