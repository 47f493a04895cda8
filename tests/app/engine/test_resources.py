"""An engine under the governor: a real model, and sensors that say what a test wants, or fail."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgespec.acceptance import Acceptance
from edgespec.app import settings
from edgespec.app.engine import resources
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats, Request
from edgespec.core import EdgespecError
from edgespec.costs import CostCurve
from edgespec.machine.monitor import SensorMonitor
from edgespec.models.gguf.model import LlamaOptions
from edgespec.planner import Chain, Planner

CALM = {"celsius": 50.0, "plugged": True, "charge": 90.0, "others": 0.0, "load": 0.5}


class Sensors:
    """Sources that give `says`, or do what `fault` does instead."""

    def __init__(self) -> None:
        self.says: dict[str, Any] = dict(CALM)
        self.fault: Callable[[], Mapping[str, Any]] | None = None

    def __call__(self) -> Mapping[str, Any]:
        return self.says if self.fault is None else self.fault()


@pytest.fixture
def sensors(monkeypatch) -> Iterator[Sensors]:
    """Instead of this machine's: asked 50 times a second."""
    notes = Sensors()
    monkeypatch.setattr(resources, "SensorMonitor", lambda: SensorMonitor({"notes": notes}, interval=0.02))
    yield notes
    notes.fault = None


@pytest.fixture
def engine(sensors, starter_path) -> Iterator[Engine]:
    with open_engine(starter_path, options=LlamaOptions(context=1024)) as loaded:
        yield loaded


def ask(
    engine: Engine, tokens: int = 48, meanwhile: Callable[[int], None] = lambda _: None
) -> GenerationStats:
    """A greedy answer; `meanwhile` is called after each piece with their count."""
    engine.forget()
    prompt = engine.chat_prompt([{"role": "user", "content": "Count from one to forty in words."}])
    answering = engine.generate(Request(prompt, max_tokens=tokens))
    for i, _ in enumerate(answering):
        meanwhile(i)
    return answering.stats


def raised(error: Exception) -> Callable[[], Mapping[str, Any]]:
    def fault() -> Mapping[str, Any]:
        raise error

    return fault


def spike() -> Mapping[str, Any]:
    return {**CALM, "celsius": 119.0 if time.monotonic() % 0.1 < 0.02 else 50.0}


FAULTS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "raises": raised(OSError("the sensor's file is gone")),
    "raises something odd": raised(RuntimeError("\x1b[2J")),
    "denied": raised(PermissionError(13, "Permission denied")),
    "not a number": lambda: {**CALM, "celsius": math.nan},
    "infinite": lambda: {**CALM, "celsius": math.inf},
    "-40": lambda: {**CALM, "celsius": -40.0},
    "200": lambda: {**CALM, "celsius": 200.0},
    "words": lambda: {**CALM, "celsius": "hot"},
    "yes for a number": lambda: {**CALM, "charge": True},
    "charge of 900%": lambda: {**CALM, "charge": 900.0},
    "load of 7": lambda: {**CALM, "load": 7.0, "others": 7.0},
    "negative memory": lambda: {**CALM, "memory_free": -1},
    "unknown field": lambda: {**CALM, "colour": 3},
    "nothing": dict,
    "spikes": spike,
    "not a mapping": lambda: 7,  # type: ignore[dict-item,return-value]
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_sensor_failing_in_the_middle_changes_nothing(engine, sensors, name):
    calm = ask(engine)

    def break_it(piece: int) -> None:
        sensors.fault = FAULTS[name] if piece >= 5 else None

    result = ask(engine, meanwhile=break_it)
    assert result.tokens == calm.tokens
    assert [mode for mode, _ in result.modes] == ["performance"]
    assert result.reading is not None
    assert result.reading.celsius in (50.0, None)


def test_a_sensor_that_hangs_holds_up_nothing(engine, sensors):
    calm = ask(engine)
    release, asked, gaps = threading.Event(), threading.Event(), [time.monotonic()]

    def hang() -> Mapping[str, Any]:
        asked.set()
        release.wait(30)
        return {}

    def meanwhile(piece: int) -> None:
        gaps.append(time.monotonic())
        if piece == 5:
            sensors.fault = hang
            assert asked.wait(5)
            gaps[-1] = time.monotonic()

    try:
        result = ask(engine, meanwhile=meanwhile)
    finally:
        release.set()
    assert result.tokens == calm.tokens
    later = [b - a for a, b in itertools.pairwise(gaps[7:])]
    assert max(later) < 2.0  # a source is waited for 2 s, a round for none of them


def test_saver_uses_threads_of_its_own_and_gives_them_back(engine, sensors):
    fast = engine.model.threads
    engine.choose("saver")
    result = ask(engine)
    chosen = engine.resources.governor.threads["saver"]
    assert engine.model.threads == chosen
    assert result.modes == [("saver", "chosen by the user")]
    engine.choose("performance")
    ask(engine, 8)
    assert engine.model.threads == fast


def test_on_battery_it_is_balanced_and_says_so(engine, sensors):
    sensors.says = {**CALM, "plugged": False, "charge": 64.0}
    time.sleep(0.1)
    result = ask(engine, 8)
    assert result.modes == [("balanced", "on battery at 64%")]
    assert result.as_json()["mode"] == [{"mode": "balanced", "reason": "on battery at 64%"}]
    assert result.as_json()["reading"]["charge"] == 64.0


def test_heat_in_the_middle_brings_rests(engine, sensors):
    calm = ask(engine, 200)

    def heat(piece: int) -> None:
        if piece == 5:
            sensors.says = {**CALM, "celsius": 90.0}

    start = time.monotonic()
    result = ask(engine, 200, meanwhile=heat)
    assert time.monotonic() - start > result.bookkeeping
    assert result.tokens == calm.tokens
    assert result.modes[0][0] == "performance"
    assert result.modes[1][0] == "balanced"
    assert "hot: 90 °C" in result.modes[1][1]
    assert engine.decision.budget.rest > 0.0


def test_a_rest_ends_when_the_answer_is_cancelled(engine, sensors):
    request = Request(engine.model.vocab.tokenize("One two three"), max_tokens=50)
    from edgespec.core import Draft, Round

    slow = Round((1,), Draft(), 0, seconds=60.0, drafting=0.0, waiting=60.0)
    sensors.says = {**CALM, "celsius": 110.0}
    time.sleep(0.15)
    engine.resources.governor.decide(engine.resources.watch.latest())
    assert engine.decision.budget.rest > 0.5
    threading.Timer(0.1, request.cancel).start()
    start = time.monotonic()
    engine.resources.rest(slow, lambda: request.cancelled)
    assert 0.05 < time.monotonic() - start < 1.0


def test_energy_is_processor_time_where_nothing_meters_it(engine, sensors):
    before = time.process_time()
    result = ask(engine)
    used = time.process_time() - before
    assert result.energy is not None
    assert result.energy.source is None
    assert 0.3 * used < result.energy.cpu_seconds < used  # of all tokens but the first
    assert result.joules_per_token is None
    assert result.cpu_seconds_per_token == pytest.approx(result.energy.cpu_seconds / (result.written - 1))
    assert "joules_per_token" not in result.as_json()["energy"]


@pytest.mark.parametrize("fixed", [True, False])
def test_fixed_threads_stay(sensors, starter, fixed):
    """An exact answer needs that: an F16 cache rounds differently for each number of threads."""
    before, costs = starter.threads, CostCurve({1: 0.01, 2: 0.02, 4: 0.03})
    sequence = starter.sequence()
    steered = resources.ResourceController(sequence, costs, "saver", fixed_threads=fixed)
    steered.governor.threads = {} if fixed else {"saver": (1, 1)}
    try:
        steered.begin(Planner(costs, Acceptance(), Chain()), None)
        assert starter.threads == (before if fixed else (1, 1))
    finally:
        steered.close()
        sequence.close()
        starter.set_threads(*before)


@pytest.fixture
def settings_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGESPEC_CONFIG", str(tmp_path))
    return tmp_path / "config.toml"


def test_the_settings_choose_the_mode(settings_file):
    assert settings.load().mode == "auto"
    settings_file.write_text('mode = "saver"\n')
    assert settings.load().mode == "saver"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mode = ", "is not TOML"),
        ('mode = "fast"', r"unknown mode 'fast' \(valid: auto, performance, balanced, saver\)"),
        ("mode = []", r"unknown mode \[\]"),
        ("speed = 3", r"unknown setting 'speed' \(valid: mode"),
        ("\xff", "'\\\\xff'|is not TOML"),
    ],
)
def test_wrong_settings_are_one_line(settings_file, text, says):
    settings_file.write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgespecError, match=says) as error:
        settings.load()
    assert "\n" not in str(error.value)
