"""Tuning: what is chosen from given figures, what is kept and when it is outdated, and the real command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from edgespec.app.engine import calibration, loading
from edgespec.core import Cancelled, EdgespecError
from edgespec.models import machine_cache
from edgespec.models.gguf.backends import library
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.model import LlamaModel, LlamaOptions
from edgespec.models.gguf.native import BackendName
from edgespec.quant import timing as racing
from edgespec.quant import tune as tuning
from edgespec.quant.requant import draft_path, requantize
from edgespec.quant.timing import PROMPT, Candidate, Figures, TimingBench, TimingBudget, scaled
from edgespec.quant.tune import SettingTrial, choose, draft_forms, judged, score, thread_counts, tune

EDGESPEC = [sys.executable, "-m", "edgespec.app.cli.main"]
FLAT = {PROMPT: 0.01, 1: 0.04, 4: 0.04, 8: 0.04}
STEEP = {PROMPT: 0.01, 1: 0.04, 4: 0.16, 8: 0.32}
SHORT = TimingBudget((1, 2), 32, 1.0, prompts=2, least=2, most=2, seconds=0.0, repeats=1)


# What is chosen


def test_the_score_weighs_plain_decoding_checking_and_reading():
    def gain(**faster: float) -> float:
        names = {"reading": PROMPT, "one": 1, "eight": 8}
        changed = {**FLAT, **{names[name]: FLAT[names[name]] / by for name, by in faster.items()}}
        return score(changed) / score(FLAT)

    assert gain(one=2) == pytest.approx(2**0.5)
    assert gain(eight=2) == pytest.approx(2**0.35)
    assert gain(reading=2) == pytest.approx(2**0.15)
    assert gain(one=2, eight=2, reading=2) == pytest.approx(2)


def test_checking_counts_at_the_batch_size_that_brings_most():
    # Four rows at one row's price bring 1 + .8 + .64 + .512 tokens, eight at eight times the price too few.
    cheap_fours = {PROMPT: 0.01, 1: 0.04, 4: 0.04, 8: 0.32}
    none = {PROMPT: 0.01, 1: 0.04}
    assert score(cheap_fours) / score(none) == pytest.approx(2.952**0.35)
    assert score(STEEP) == pytest.approx(score(none))  # not drafting is always possible


def test_ratios_are_taken_within_a_round_so_that_drift_does_not_count():
    best = [{1: 1.0, 4: 3.0}, {1: 2.0, 4: 6.0}, {1: 4.0, 4: 12.0}]
    other = [{1: 0.8}, {1: 30.0}, {1: 3.2}]  # a fifth faster, and once disturbed
    assert scaled({1: 10.0, 4: 20.0}, best, other) == {1: pytest.approx(8.0), 4: 20.0}
    assert scaled({1: 10.0, 4: 20.0}, best, other[:1])[1] == pytest.approx(8.0)
    steady = [{1: 5.0}, {1: 2.0}, {1: 5.0}]
    assert scaled({1: 10.0}, steady, [{1: 3.0}, {1: 9.0}, {1: 4.0}], quickest=True)[1] == pytest.approx(15.0)
    assert scaled({1: 10.0}, steady, [{1: 4.0}, {}, {1: 1.0}])[1] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [([], None), ([0.9], None), ([1.02], None), ([1.021], 0), ([1.1, 1.3, 1.2], 1), ([1.01, 1.03], 1)],
)
def test_a_setting_must_win_by_more_than_two_percent(scores: list[float], chosen: int | None):
    assert choose(1.0, scores) == chosen
    assert choose(50.0, [50 * one for one in scores]) == chosen


def times(factor: float, of: Figures = FLAT) -> dict[int, float]:
    return {n: seconds * factor for n, seconds in of.items()}


def test_outcomes_say_what_was_chosen_and_why_the_others_were_not():
    best = SettingTrial("first", LlamaOptions(), "where it starts", FLAT, 1.5)
    others = {"slow": 1.5, "same": 1.0, "good": 0.9, "better": 0.8}
    rated = [(name, LlamaOptions(threads=i)) for i, name in enumerate(others)]
    rounds = [[times(factor)] * 3 for factor in others.values()]
    trials = judged(best, rated, [FLAT] * 3, rounds)
    assert [one.outcome for one in trials] == [
        "slower",
        "no gain above 2%",
        "faster, another even more",
        "chosen",
    ]
    assert [one.score for one in trials] == [pytest.approx(1.5 / factor) for factor in others.values()]
    assert [one.options.threads for one in trials] == [0, 1, 2, 3]
    # The best was disturbed in two rounds of three; what ran at the same time gained nothing.
    (unclear,) = judged(best, rated[:1], [FLAT, times(2), times(2)], [[FLAT] * 3])
    assert unclear.outcome == "unclear: not faster undisturbed"
    never = judged(best, rated, [FLAT] * 3, rounds, never="it lies")
    assert {one.outcome for one in never} == {"it lies"}
    assert [one.score for one in never] == [one.score for one in trials]


class ScriptedBench:
    """A Bench without models: each setting takes `cost` times FLAT, on a machine that gets ever slower."""

    def __init__(self, cost: Callable[[LlamaOptions], float], missing: Mapping[str, str]) -> None:
        self.all = tuple(FLAT)
        self.raced: list[str] = []
        self.open_now: set[Candidate] = set()
        self._cost, self._missing, self._drift = cost, missing, 1.0

    def __call__(self, *_: object) -> ScriptedBench:
        return self

    def __enter__(self) -> ScriptedBench:
        return self

    def __exit__(self, *_: object) -> None: ...

    def open(self, variant: Candidate, doing: str, source: Path | None = None) -> None:
        if doing in self._missing:
            raise EdgespecError(self._missing[doing])
        self.open_now.add(variant.model())

    def close(self, but: Candidate | None = None) -> None:
        self.open_now &= {but.model()} if but else set()

    def race(self, variants: Mapping[str, Candidate], quantities: Sequence[int]) -> list[list[Figures]]:
        assert {variant.model() for variant in variants.values()} <= self.open_now
        self.raced += list(variants)[1:]
        rounds: list[list[Figures]] = [[] for _ in variants]
        for _ in range(3):
            self._drift *= 1.1
            for one, variant in zip(rounds, variants.values(), strict=True):
                factor = self._cost(variant.options) * self._drift
                one.append({n: FLAT[n] * factor for n in quantities})
        return rounds


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedBench]:
    def script(cost: Callable[[LlamaOptions], float], **missing: str) -> ScriptedBench:
        bench = ScriptedBench(cost, {name.replace("_", "."): why for name, why in missing.items()})
        monkeypatch.setattr(tuning, "TimingBench", bench)
        monkeypatch.setattr(tuning, "compute_cores", lambda: 4)
        monkeypatch.setattr(tuning, "logical_cores", lambda: 8)
        return bench

    return script


def test_the_search_keeps_each_gain_and_measures_on_from_there(scripted, tiny_llama):
    def cost(options: LlamaOptions) -> float:
        factor = 0.5 if options.engine == "ik" else 1.0
        factor *= 0.8 if options.threads == 3 else 1.0
        factor *= 0.9 if options.flash_attention is False else 1.0
        factor *= 0.5 if not options.repack and options.engine == "llama.cpp" else 1.0  # not asked for
        return factor * (0.1 if options.type_v == "q8_0" else 1.0)

    bench = scripted(cost)
    report = tune(tiny_llama)
    best = report.best.options
    assert (best.engine, best.threads, best.repack, best.flash_attention) == ("ik", 3, True, False)
    assert best.threads_batch in (0, 4)  # what the others were measured with
    assert (best.type_k, best.type_v) == ("f16", "f16")
    cache = next(one for one in report.trials if one.setting == "8-bit cache")
    assert cache.score is not None
    assert cache.score > report.best.score
    assert "never chosen" in cache.outcome
    assert [one.outcome for one in report.trials].count("chosen") == 3
    assert report.start.setting == "llama.cpp"
    # Only one row ran faster with 3 threads: half the weight is plain decoding's, and checking has n = 8.
    assert report.best.score == pytest.approx(1 / 0.5 / 0.8**0.5 / 0.9, rel=0.01)
    assert len(bench.open_now) == 1


def test_quick_leaves_out_steps(scripted, tiny_llama):
    bench = scripted(lambda options: 1.0)
    report = tune(tiny_llama, quick=True)
    assert "weights not repacked" in bench.raced
    assert not {"no flash attention", "8-bit cache"} & set(bench.raced)
    assert report.best is report.start
    assert report.best.options.engine == "llama.cpp"


def test_engines_that_do_not_run_the_model_are_reported_with_their_reason(scripted, tiny_llama):
    scripted(lambda options: 1.0, ik="ik is not installed: do this")
    report = tune(tiny_llama, quick=True)
    skipped = next(one for one in report.trials if one.setting == "ik")
    assert skipped.outcome == "not measured: ik is not installed: do this"
    assert skipped.score is None
    assert report.best.options.engine == "llama.cpp"
    scripted(lambda options: 1.0, llama_cpp="this one cannot")
    report = tune(tiny_llama, quick=True)
    assert report.start.setting == "ik"
    assert report.best.options.engine == "ik"
    scripted(lambda options: 1.0, llama_cpp="the model is broken", ik="not here")
    with pytest.raises(EdgespecError, match=r"^the model is broken$"):
        tune(tiny_llama)


@pytest.mark.parametrize(
    ("cores", "logical", "counts"),
    [
        (1, 1, [1]),
        (2, 2, [1, 2]),
        (4, 8, [1, 2, 3, 4, 8]),
        (8, 16, [2, 3, 4, 6, 8, 16]),
        (14, 20, [4, 6, 8, 12, 14, 20]),
    ],
)
def test_thread_counts(monkeypatch, cores, logical, counts):
    monkeypatch.setattr(tuning, "compute_cores", lambda: cores)
    monkeypatch.setattr(tuning, "logical_cores", lambda: logical)
    assert thread_counts() == counts


# Measuring


def test_a_race_times_everything_on_real_models(engine, tiny_llama):
    path = tiny_llama
    steps: list[tuple[str, float]] = []
    options = LlamaOptions(context=128, engine=engine)
    with TimingBench(SHORT, 2, lambda *one: steps.append(one) or True) as bench:
        variants = {
            "a": Candidate(path, options),
            "b": Candidate(path, replace(options, flash_attention=False)),
        }
        variants["c"] = Candidate(path, replace(options, threads=1, threads_batch=2))
        for name, variant in variants.items():
            bench.open(variant, name)
        assert len(bench._timers) == 2  # other threads need no other model
        rounds = bench.race(variants, bench.all)
        assert len(rounds[0]) == 2
        assert all(set(one) == {PROMPT, 1, 2} for of in rounds for one in of)
        assert all(0 < seconds < 5 for of in rounds for one in of for seconds in one.values())
        assert [set(one) for one in bench.race({"a": variants["a"]}, (1,))[0]] == [{1}, {1}]
        bench._effort = replace(SHORT, prompts=1)
        assert [set(one) for one in bench.race({"a": variants["a"]}, (PROMPT, 1))[0]] == [{PROMPT, 1}, {1}]
        assert [set(one) for one in bench.race({"a": variants["a"]}, (PROMPT,))[0]] == [{PROMPT}]
        bench.close(but=variants["c"])
        assert set(bench._timers) == {variants["a"].model()}
    assert not bench._timers
    assert {name for name, _ in steps} == set("abc")
    assert [share for _, share in steps] == sorted(share for _, share in steps)


def test_threads_are_those_of_the_setting(tiny_llama):
    options = LlamaOptions(context=128)
    with TimingBench(SHORT, 1, lambda *_: True) as bench:
        bench.open(Candidate(tiny_llama, options), "")
        (timer,) = bench._timers.values()
        for threads, batch, seen in [(3, 2, (3, 2)), (2, 0, (2, 2)), (0, 1, (racing.compute_cores(), 1))]:
            timer.time(replace(options, threads=threads, threads_batch=batch), (1,))
            assert timer.model.threads == seen


def test_the_hopeless_leave_the_race_and_end_it(tiny_llama, monkeypatch):
    effort = replace(SHORT, least=9, most=9)
    with TimingBench(effort, 1, lambda *_: True) as bench:
        variants = {n: Candidate(tiny_llama, LlamaOptions(context=128, threads=int(n))) for n in "123"}
        for variant in variants.values():
            bench.open(variant, "")
        cost = {1: 1.0, 2: 1.0, 3: 2.0}
        monkeypatch.setattr(racing._Timer, "time", lambda self, options, _: {1: cost[options.threads]})
        assert [len(one) for one in bench.race(variants, (1,))] == [9, 9, 2]
        cost[2] = 2.0
        assert [len(one) for one in bench.race(variants, (1,))] == [2, 2, 2]


def test_a_second_model_needs_free_memory(tiny_llama, monkeypatch):
    monkeypatch.setattr(racing, "memory_available", lambda: 1000)
    with TimingBench(SHORT, 1, lambda *_: True) as bench:
        bench.open(Candidate(tiny_llama, LlamaOptions(context=128)), "")
        with pytest.raises(EdgespecError, match="GB of memory are needed"):
            bench.open(Candidate(tiny_llama, LlamaOptions(context=128, repack=False)), "")


def test_a_stop_frees_every_model(tiny_llama, monkeypatch):
    closed = []
    close = LlamaModel.close
    monkeypatch.setattr(LlamaModel, "close", lambda self: closed.append(self.path) or close(self))
    answers = iter([True] * 40 + [False] * 1000)
    with pytest.raises(Cancelled):
        tune(tiny_llama, quick=True, progress=lambda *_: next(answers))
    assert closed


def test_a_model_with_a_running_state_is_tuned(tiny_mamba, monkeypatch):
    monkeypatch.setattr(tuning, "QUICK", SHORT)
    report = tune(tiny_mamba, quick=True)
    assert report.start.figures is not None
    assert set(report.start.figures) > {PROMPT, 1}
    assert report.best.options.engine == "llama.cpp"
    outcomes = {one.setting: one.outcome for one in report.trials}
    assert outcomes["ik"].startswith("not measured: ")


# Drafts


def test_draft_forms_are_those_made_of_exactly_this_file(tmp_path, tiny_llama):
    source = Path(shutil.copy(tiny_llama, tmp_path / "d.gguf"))
    assert draft_forms(source) == [source]
    made = requantize(source, draft_path(source, "q8_0"), "q8_0")
    shutil.copy(source, draft_path(source, "f16"))  # named so, made by nobody
    draft_path(source, "q4_0").write_bytes(b"GGUF, or nearly")
    assert draft_forms(source) == [source, made]
    source.write_bytes(source.read_bytes() + bytes(32))
    assert draft_forms(source) == [source]


def test_the_fastest_form_is_chosen_and_its_best_case_reported(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(tuning, "QUICK", SHORT)
    source = Path(shutil.copy(tiny_llama, tmp_path / "d.gguf"))
    made = requantize(source, draft_path(source, "q8_0"), "q8_0")
    time_ = racing._Timer.time

    def timed(self: Any, options: LlamaOptions, quantities: Sequence[int]) -> Figures:
        figures = time_(self, options, quantities)
        fixed = {str(tiny_llama): FLAT, str(source): times(0.5), str(made): times(0.1)}[str(self.model.path)]
        return {n: fixed.get(n, fixed[4]) for n in figures}

    monkeypatch.setattr(racing._Timer, "time", timed)
    report = tune(tiny_llama, source, quick=True)
    assert [(form.path, form.outcome) for form in report.forms] == [
        (source, "a made form is faster"),
        (made, "chosen"),
    ]
    assert report.draft is report.forms[1]
    assert [form.seconds for form in report.forms] == [pytest.approx(0.02), pytest.approx(0.004)]
    # The target was timed with up to two rows, both at one row's price: 1 + .9 tokens in 1.1 passes.
    assert report.draft.best_case == pytest.approx(1.9 / 1.1)


# What is kept


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine_cache, "cache_folder", lambda: tmp_path / "machine")
    return tmp_path / "machine"


TUNED = LlamaOptions(threads=2, threads_batch=3, flash_attention=False, repack=False)


def test_tuned_settings_are_found_again_for_the_same_shape_only(folder, tiny_llama, tiny_mamba):
    summary = check_gguf(tiny_llama)
    assert calibration.tuned(summary) is None
    calibration.keep_tuned(summary, replace(TUNED, context=77, type_k="q8_0"), "d.gguf")
    assert calibration.tuned(summary) == (TUNED, "d.gguf")  # context and cache are the user's
    assert calibration.tuned(check_gguf(tiny_mamba)) is None


def test_tuned_settings_of_another_machine_are_not_there(folder, tiny_llama, monkeypatch):
    summary = check_gguf(tiny_llama)
    calibration.keep_tuned(summary, TUNED)
    monkeypatch.setattr(calibration, "cpu_name", lambda: "another")
    assert calibration.tuned(summary) is None


@pytest.mark.parametrize("change", ["updated", "gone"])
def test_settings_for_an_engine_that_changed_are_not_there(folder, tiny_llama, monkeypatch, change):
    summary = check_gguf(tiny_llama)
    calibration.keep_tuned(summary, TUNED)

    def library(_name: str) -> SimpleNamespace:
        if change == "gone":
            raise EdgespecError("not installed")
        return SimpleNamespace(build="llama.cpp 99.0 AVX")

    monkeypatch.setattr(calibration, "library", library)
    assert calibration.tuned(summary) is None


@pytest.mark.parametrize(
    "damage",
    [
        {"engine": "vllm"}, {"engine": ["ik"]}, {"engine": None}, {"threads": -1}, {"threads": 10**9},
        {"threads": True}, {"threads": "2"}, {"threads_batch": 1.5}, {"flash_attention": "yes"},
        {"flash_attention": {}}, {"repack": 1}, {"repack": None}, {"draft": None}, {"draft": 7},
        {"build": ""},
    ],
)  # fmt: skip
def test_a_damaged_entry_is_not_there(folder, tiny_llama, damage):
    summary = check_gguf(tiny_llama)
    calibration.keep_tuned(summary, TUNED)
    (path,) = folder.glob("tuned-*.json")
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **damage}))
    assert calibration.tuned(summary) is None
    for name in damage:
        del data[name]
    path.write_text(json.dumps(data))
    assert calibration.tuned(summary) is None


def test_something_is_reported_once_and_again_after_tuning(folder, tiny_llama):
    summary = check_gguf(tiny_llama)
    key = calibration.tuned_key(summary)
    assert [calibration.first_time(key) for _ in range(3)] == [True, False, False]
    calibration.keep_tuned(summary, TUNED)
    assert calibration.first_time(key)


def test_what_cannot_be_remembered_is_not_reported_every_time(folder):
    folder.write_text("a file where the folder should be")
    assert not calibration.first_time("key")


# Use


def load(path: Path, **settings: Any) -> Any:
    chosen = {"draft": "none", "max_draft": 0, "context": 128, **settings}
    return loading.load_engine(loading.EngineSpec(str(path), **chosen))


def test_engines_are_loaded_with_what_was_found(folder, engine, tiny_llama, monkeypatch):
    monkeypatch.delenv("EDGESPEC_ENGINE")
    calibration.keep_tuned(check_gguf(tiny_llama), replace(TUNED, engine=engine))
    with load(tiny_llama) as loaded:
        model = loaded.model
        assert model.library.name == engine
        assert model.threads == (2, 3)
        assert (model.options.flash_attention, model.options.repack, model.options.context) == (
            False,
            False,
            128,
        )
        assert not any("tune" in note for note in loaded.notes)


def test_explicit_settings_win(folder, ik, tiny_llama, starter_path, monkeypatch):
    monkeypatch.delenv("EDGESPEC_ENGINE")
    calibration.keep_tuned(check_gguf(tiny_llama), replace(TUNED, engine=ik))
    with load(tiny_llama, threads=1) as loaded:
        assert (loaded.model.library.name, loaded.model.threads) == (ik, (1, 1))
    with load(tiny_llama, engine="llama.cpp") as loaded:  # the other settings were found for another engine
        assert loaded.model.options == LlamaOptions(context=128)
    with load(tiny_llama, engine=ik) as loaded:
        assert loaded.model.options == replace(TUNED, engine=ik, context=128)
    calibration.keep_tuned(check_gguf(starter_path), replace(TUNED, engine=ik))
    with load(starter_path, exact=True) as loaded:
        assert loaded.model.library.name == "llama.cpp"
    with pytest.raises(EdgespecError, match="leave out --engine ik"):
        load(tiny_llama, engine=ik, exact=True)


def test_the_form_found_fastest_drafts(folder, tmp_path, tiny_llama):
    source = Path(shutil.copy(tiny_llama, tmp_path / "d.gguf"))
    f16 = requantize(source, draft_path(source, "f16"), "f16")
    q8 = requantize(source, draft_path(source, "q8_0"), "q8_0")
    assert loading.form_of(source, "") == f16
    assert loading.form_of(source, source.name) == source
    assert loading.form_of(source, q8.name) == q8
    q8.unlink()
    assert loading.form_of(source, q8.name) == f16
    f16.unlink()
    assert loading.form_of(source, q8.name) == source


def edgespec(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EDGESPEC_CACHE": str(cache / "edgespec")}
    return subprocess.run(
        [*EDGESPEC, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )


def test_the_command_tunes_the_starter(tmp_path, starter_path):
    done = edgespec(tmp_path, "tune", str(starter_path), "--quick", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    outcomes = {one["setting"]: one["outcome"] for one in report["trials"]}
    for engine in get_args(BackendName):
        with suppress(EdgespecError):
            library(engine)
            assert not outcomes[engine].startswith("not measured")
    assert set(report["trials"][0]["ms"]) == {"1", "4", "8"}
    assert report["trials"][0]["score"] == 1.0
    assert report["build"].startswith(report["best"]["engine"])
    (entry,) = (tmp_path / "edgespec/machine").glob("tuned-*.json")
    kept = json.loads(entry.read_text())
    names = ("engine", "threads", "threads_batch", "repack")
    assert [kept[name] for name in names] == [report["best"][name] for name in names]


def test_the_table_says_what_was_chosen_and_kept(tmp_path, tiny_llama):
    done = edgespec(tmp_path, "tune", str(tiny_llama), "--quick")
    assert done.returncode == 0, done.stderr
    assert "where it starts" in done.stdout
    assert "weights not repacked" in done.stdout
    assert "fastest: " in done.stdout
    assert not [line for line in done.stderr.splitlines() if "busy" not in line]  # no bar without a terminal
    again = edgespec(tmp_path, "run", "-m", str(tiny_llama), "a", "--max-tokens", "2", "--draft", "none")
    assert again.returncode == 0, again.stderr
    assert "edgespec tune" not in again.stderr


def test_ctrl_c_leaves_the_old_entry(tmp_path, starter_path, monkeypatch):
    monkeypatch.setattr(machine_cache, "cache_folder", lambda: tmp_path / "edgespec/machine")
    summary = check_gguf(starter_path)
    calibration.keep_tuned(summary, TUNED)
    environment = {**os.environ, "EDGESPEC_CACHE": str(tmp_path / "edgespec")}
    process = subprocess.Popen(
        [*EDGESPEC, "tune", str(starter_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert said.splitlines()[-1] == "edgespec: stopped; nothing was changed"
    assert "Traceback" not in said
    assert calibration.tuned(summary) == (TUNED, "")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, tiny_llama):
    (tmp_path / "edgespec").write_text("in the way")
    done = edgespec(tmp_path, "tune", str(tiny_llama), "--quick")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("edgespec: cannot keep the settings: make ")


def test_a_missing_model_is_one_line(tmp_path):
    done = edgespec(tmp_path, "tune", "nothing.gguf")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
