"""Sensors that fail in every way known, and a sampler that goes on."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edgespec.core import Reading
from edgespec.machine import sensors
from edgespec.machine.monitor import SensorMonitor


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Script:
    """A source that gives, or raises, one thing after another, and the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    def __call__(self) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer


class Bench:
    """A watch without a thread, sampled once a second of its own clock."""

    def __init__(self, **sources: Callable[[], Any]) -> None:
        self.clock = Clock()
        self.watch = SensorMonitor(sources, clock=self.clock)

    def sample(self, seconds: float = 1.0) -> Reading:
        self.clock.now += seconds
        return self.watch.sample()

    def celsius(self, samples: int) -> list[float | None]:
        return [self.sample().celsius for _ in range(samples)]


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, "edgespec.machine.monitor")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "edgespec.machine.monitor"]


def temperatures(*values: Any) -> Script:
    return Script(*({"celsius": value} for value in values))


def test_readings_of_all_sources_are_one() -> None:
    bench = Bench(
        a=Script({"celsius": 50.5, "celsius_limit": 95.0}),
        b=Script({"charge": 80, "plugged": False, "seconds_left": None}),
        c=Script({"load": 0.5, "others": 0.25}),
        d=Script({"memory_free": 10**9}),
        e=Script({"pressure": "fair", "celsius": 30.0, "frequency": 1.1, "watts": 0, "joules": 5.0}),
    )
    assert bench.sample() == Reading(
        time=1001.0,
        celsius=50.5,
        celsius_limit=95.0,
        charge=80,
        plugged=False,
        load=0.5,
        others=0.25,
        memory_free=10**9,
        pressure="fair",
        frequency=1.1,
        watts=0,
        joules=5.0,
    )
    assert bench.watch.troubles == {}


def test_before_the_first_sample_nothing_is_known() -> None:
    bench = Bench(a=temperatures(50.0))
    assert bench.watch.latest() == Reading(time=1000.0)


BAD: list[Any] = [
    OSError("gone"),
    ValueError("two\nlines"),
    RuntimeError(),
    None,
    [1, 2],
    {"celsius": math.nan},
    {"celsius": math.inf},
    {"celsius": -40.0},
    {"celsius": -20.0},
    {"celsius": 120.0},
    {"celsius": 200.0},
    {"celsius": "50"},
    {"celsius": True},
    {"celsius": 10**400},
    {"celsius_limit": 0.0},
    {"charge": -1.0},
    {"charge": 100.5},
    {"charge": math.nan},
    {"plugged": 1},
    {"plugged": "AC"},
    {"seconds_left": -2},
    {"frequency": 3000.0},
    {"load": 1.5},
    {"load": False},
    {"others": -0.1},
    {"watts": -5.0},
    {"watts": 1e6},
    {"memory_free": 0},
    {"memory_free": 1.5},
    {"joules": math.inf},
    {"joules": math.nan},
    {"pressure": "hot"},
    {"pressure": 2},
    {"time": 3.0},
    {"speed": 3.0},
    {3: 3},
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad)[:40])
def test_what_cannot_be_is_refused_until_three_good_samples(
    bad: Any, warnings: Callable[[], list[str]]
) -> None:
    good = {"celsius": 50.0}
    source = Script(good, bad, bad, good, good, bad, good, good, good, good)
    bench = Bench(odd=source, memory=Script({"memory_free": 7}))
    assert bench.sample().celsius == 50.0
    notes = []
    for _ in range(9):
        reading = bench.sample()
        notes.append(reading.celsius)
        assert reading.memory_free == 7
        assert ("odd" in bench.watch.troubles) == (reading.celsius is None)
        assert all(text and "\n" not in text for text in bench.watch.troubles.values())
    assert notes == [None] * 7 + [50.0] * 2
    assert len(warnings()) == 1
    assert warnings()[0].startswith("ignoring sensor odd: ")


def test_each_time_trust_is_lost_there_is_one_warning(warnings: Callable[[], list[str]]) -> None:
    good, bad = {"load": 0.5}, OSError("gone")
    bench = Bench(odd=Script(good, bad, bad, good, good, good, bad, bad))
    for _ in range(8):
        bench.sample()
    assert warnings() == ["ignoring sensor odd: gone"] * 2


def test_an_error_without_words_or_with_broken_ones_has_its_name() -> None:
    class OddError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    bench = Bench(a=Script(OddError()), b=Script(TimeoutError()))
    bench.sample()
    assert bench.watch.troubles == {"a": "OddError", "b": "TimeoutError"}


def test_one_spike_is_nothing() -> None:
    bench = Bench(t=temperatures(50.0, 51.0, 50.0, 95.0, 51.0, 50.0, 52.0))
    assert max(value or 0.0 for value in bench.celsius(7)) <= 52.0
    assert bench.watch.troubles == {}


def test_a_rise_that_lasts_is_followed_at_the_second_sample() -> None:
    bench = Bench(t=temperatures(50.0, 50.0, 50.0, 80.0, 81.0))
    assert bench.celsius(5) == [50.0, 50.0, 50.0, 50.0, 80.0]


def test_a_temperature_that_is_accepted_still_under_changing_load_is_frozen(
    warnings: Callable[[], list[str]],
) -> None:
    loads = Script(*({"load": 0.1 + 0.8 * (i // 20 % 2)} for i in range(100)))
    bench = Bench(load=loads, t=temperatures(*[45.0] * 65, 46.0, 46.0, 47.0, 47.0))
    notes = bench.celsius(70)
    assert notes[:59] == [45.0] * 59
    assert (
        notes[59:67] == [None] * 8
    )  # frozen at the 60th, alive at the 66th, believed at its third sign of life
    assert notes[67:] == [46.0, 47.0, 47.0]
    assert len(warnings()) == 1
    assert "is stuck at 45" in warnings()[0]


@pytest.mark.parametrize("low", [0.4, None])
def test_a_temperature_may_stand_still_while_the_load_does(low: float | None) -> None:
    loads = Script(*({"load": 0.9 if i % 2 else low} for i in range(99)))
    bench = Bench(load=loads, t=temperatures(45.0))
    assert bench.celsius(90) == [45.0] * 90


def test_joules_that_fall_are_not_believed() -> None:
    bench = Bench(e=Script(*({"joules": j} for j in (5.0, 9.0, 9.0, 4.0, 5.0, 6.0, 7.0))))
    assert [bench.sample().joules for _ in range(7)] == [5.0, 9.0, 9.0, None, None, None, 7.0]


@pytest.mark.parametrize("jump", [3600.0, -500.0])
def test_after_a_jump_of_the_clock_nothing_old_counts(jump: float) -> None:
    bench = Bench(t=temperatures(80.0, 80.0, 80.0, 30.0, 30.0), e=Script({"joules": 9.0}, {"joules": 1.0}))
    bench.celsius(3)
    bench.clock.now += jump
    assert bench.watch.latest() == Reading(time=bench.clock.now)
    reading = bench.sample()
    assert reading.celsius == 30.0
    assert reading.time == bench.clock.now


def test_a_jump_lets_the_energy_counter_begin_again() -> None:
    bench = Bench(e=Script({"joules": 9.0}, {"joules": 1.0}))
    bench.sample()
    assert bench.sample(60.0).joules == 1.0
    assert bench.watch.troubles == {}


def test_a_jump_ends_the_count_of_a_frozen_temperature() -> None:
    loads = Script(*({"load": i % 2} for i in range(200)))
    bench = Bench(load=loads, t=temperatures(45.0))
    bench.celsius(50)
    bench.clock.now += 60.0
    assert bench.celsius(59) == [45.0] * 59
    assert bench.celsius(1) == [None]


def test_a_sample_is_good_for_five_seconds() -> None:
    bench = Bench(t=temperatures(50.0))
    reading = bench.sample()
    bench.clock.now += 5.0
    assert bench.watch.latest() == reading
    bench.clock.now += 0.1
    assert bench.watch.latest() == Reading(time=bench.clock.now)


def wait_for(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Gate:
    """A source that hangs while it is shut."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.asked = 0
        self.fault: Exception | None = None
        self.threads: set[threading.Thread] = set()

    def __call__(self) -> dict[str, float]:
        self.asked += 1
        self.threads.add(threading.current_thread())
        self.open.wait()
        if self.fault is not None:
            raise self.fault
        return {"celsius": 50.0}


class Live:
    """A running watch of a gate and a healthy source, on a clock moved by hand."""

    def __init__(self) -> None:
        self.gate, self.clock = Gate(), Clock()
        self.memory = Script({"memory_free": 7})
        sources = {"gate": self.gate, "memory": self.memory}
        self.watch = SensorMonitor(sources, interval=0.005, clock=self.clock)

    def sampled(self) -> None:
        """Wait for two more samples of the healthy source."""
        asked = self.memory.asked
        wait_for(lambda: self.memory.asked >= asked + 2)

    def hang(self) -> None:
        self.gate.open.clear()
        asked = self.gate.asked
        wait_for(lambda: self.gate.asked > asked)


@pytest.fixture
def live() -> Iterator[Live]:
    live = Live()
    live.watch.start()
    yield live
    live.gate.open.set()
    live.watch.close()
    wait_for(lambda: all(thread.name != "edgespec-watch" for thread in threading.enumerate()))


def test_a_source_that_hangs_holds_nobody_up(live: Live, warnings: Callable[[], list[str]]) -> None:
    wait_for(lambda: live.watch.latest().celsius == 50.0)
    live.hang()
    live.clock.now += 1.9
    assert live.watch.latest().celsius == 50.0
    live.clock.now += 0.2
    start = time.monotonic()
    assert live.watch.latest().celsius is None
    assert time.monotonic() - start < 0.5
    live.sampled()
    asked = live.gate.asked
    for _ in range(5):  # no second thread is caught
        live.clock.now += 4.0
        live.sampled()
        assert live.watch.latest().memory_free == 7
    assert live.gate.asked == asked
    assert live.watch.troubles == {"gate": "takes over 2 s"}
    assert warnings() == ["ignoring sensor gate: takes over 2 s"]
    live.gate.open.set()
    wait_for(lambda: live.watch.latest().celsius == 50.0)
    assert live.watch.troubles == {}
    wait_for(lambda: sum(thread.is_alive() for thread in live.gate.threads) == 1)


def test_a_source_that_is_distrusted_already_hangs_without_another_word(
    live: Live, warnings: Callable[[], list[str]]
) -> None:
    live.gate.fault = OSError("gone")
    wait_for(lambda: live.watch.troubles == {"gate": "gone"})
    live.hang()
    live.clock.now += 2.1
    assert live.watch.troubles == {"gate": "takes over 2 s"}
    live.sampled()
    assert warnings() == ["ignoring sensor gate: gone"]


def test_closing_does_not_wait_for_what_hangs(live: Live) -> None:
    live.hang()
    start = time.monotonic()
    live.watch.close()
    live.watch.close()
    assert time.monotonic() - start < 2.0
    asked = live.gate.asked
    live.watch.start()  # the other source is there at once, the stuck one is left alone
    live.sampled()
    assert live.watch.latest().memory_free == 7
    assert live.gate.asked == asked
    live.gate.open.set()
    wait_for(lambda: live.watch.latest().celsius == 50.0)


def test_a_slow_source_is_distrusted_and_asked_again() -> None:
    clock = Clock()

    def slow() -> dict[str, float]:
        clock.now += 2.5
        return {"load": 0.5}

    watch = SensorMonitor({"slow": slow, "memory": Script({"memory_free": 7})}, clock=clock)
    for _ in range(4):
        reading = watch.sample()
        assert (reading.load, reading.memory_free) == (None, 7)
    assert watch.troubles == {"slow": "takes over 2 s"}


def test_starting_twice_and_sampling_while_running_ask_no_source_twice(live: Live) -> None:
    live.hang()
    live.watch.start()
    asked = live.gate.asked
    live.watch.sample()
    assert live.gate.asked == asked


def test_the_sampler_leaves_the_processor_alone() -> None:
    """A source of 2 ms cannot be asked more than twice a second at 0.4% of a core."""

    def dear() -> dict[str, float]:
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        return {}

    source = Script({})
    watch = SensorMonitor({"dear": dear, "count": source}, interval=0.001)
    watch.start()
    time.sleep(0.6)
    watch.close()
    assert source.asked <= 6


def test_real_sensors_are_watched_by_default() -> None:
    watch = SensorMonitor(interval=0.01)
    assert watch.latest().memory_free is None
    watch.start()
    wait_for(lambda: watch.latest().memory_free is not None)
    watch.close()
    assert watch.troubles == {}


def test_sensors_that_hang_when_listed_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(sensors, "sources", lambda: gate.wait() and {})
    watch = SensorMonitor()
    watch.start()
    assert watch.latest().memory_free is None
    watch.close()
    gate.set()


def test_no_thread_left_to_start_is_no_error(monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    wait_for(lambda: live.watch.latest().memory_free == 7)
    live.hang()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    live.clock.now += 2.1
    assert live.watch.latest().memory_free == 7
    live.clock.now += 3.0
    assert live.watch.latest() == Reading(time=live.clock.now)
