"""Joules are notes where they were measured from end to end, and nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest

from edgespec.core import Reading
from edgespec.machine.energy import Energy, Meter


def measure(readings: Iterable[Reading], cpu: Iterable[float] = (1.0, 3.5), ticks: bool = True) -> Energy:
    """What a meter says between the first of `readings` and the last."""
    first, *between, last = readings
    now, clock = [first], iter(cpu)
    meter = Meter(lambda: now[0], lambda: next(clock))
    mark = meter.mark()
    for reading in between if ticks else []:
        meter.tick(reading)
        meter.tick(reading)
    now[0] = last
    return meter.since(mark)


def test_without_any_meter_there_is_processor_time_alone() -> None:
    assert measure(Reading(float(t), load=1.0) for t in range(10)) == Energy(2.5, None, None)


def test_processor_time_is_that_of_all_threads() -> None:
    meter = Meter(lambda: Reading(0.0))
    mark = meter.mark()
    thread = threading.Thread(target=lambda: sum(range(2_000_000)))
    start = time.thread_time()
    thread.start()
    thread.join()
    assert meter.since(mark).cpu_seconds > 2 * (time.thread_time() - start)


@pytest.mark.parametrize("ticks", [True, False])
def test_the_counter_gives_its_difference(ticks: bool) -> None:
    energy = measure((Reading(float(t), joules=100.0 + 7 * t) for t in range(11)), ticks=ticks)
    assert energy == Energy(2.5, 70.0, "powercap")


def test_the_counter_goes_before_the_battery() -> None:
    readings = [Reading(float(t), joules=2.0 * t, watts=9.0, plugged=False) for t in range(11)]
    assert measure(readings).source == "powercap"


def test_the_battery_is_integrated() -> None:
    watts = [10.0, 10.0, 20.0, 20.0, 30.0]
    energy = measure(Reading(100.0 + t, watts=w, plugged=False) for t, w in enumerate(watts))
    assert energy.joules == pytest.approx(10 + 15 + 20 + 25)
    assert energy.source == "battery"


def test_marks_do_not_disturb_each_other() -> None:
    now = [Reading(0.0, watts=10.0, plugged=False)]
    meter = Meter(lambda: now[0], lambda: 0.0)
    first = meter.mark()
    now[0] = Reading(4.0, watts=10.0, plugged=False)
    second = meter.mark()
    now[0] = Reading(8.0, watts=10.0, plugged=False)
    assert [meter.since(mark).joules for mark in (first, second, first)] == [80.0, 40.0, 80.0]


def broken(at: int, **fields: float | bool | None) -> list[Reading]:
    """Ten good readings of both meters, of which the one `at` has other `fields`."""
    good = {"joules": 0.0, "watts": 10.0, "plugged": False}
    return [
        Reading(float(t), **(good | {"joules": 5.0 * t} | (fields if t == at else {})))  # type: ignore[arg-type]
        for t in range(10)
    ]


@pytest.mark.parametrize("at", [0, 4, 9])
@pytest.mark.parametrize(
    "fields",
    [
        {"joules": None, "watts": None},
        {"joules": None, "plugged": True},
        {"joules": None, "plugged": None},
    ],
)
def test_an_interruption_of_both_leaves_no_joules(at: int, fields: dict[str, float | bool | None]) -> None:
    assert measure(broken(at, **fields)) == Energy(2.5, None, None)


@pytest.mark.parametrize("at", [0, 4, 9])
def test_an_interruption_of_the_counter_leaves_the_battery(at: int) -> None:
    energy = measure(broken(at, joules=None))
    assert energy.source == "battery"
    assert energy.joules == pytest.approx(90.0)


def test_a_counter_that_went_back_is_no_energy_though_it_grows_beyond() -> None:
    joules = [0.0, 10.0, 2.0, 30.0, 60.0]
    assert measure(Reading(float(t), joules=j) for t, j in enumerate(joules)).joules is None


def test_a_counter_that_is_accepted_still_is_no_energy() -> None:
    assert measure(Reading(float(t), joules=5.0) for t in range(10)).joules is None


def test_a_gap_in_the_battery_is_no_energy() -> None:
    assert measure(Reading(t, watts=9.0, plugged=False) for t in (0.0, 1.0, 7.0, 8.0)).joules is None
    assert measure(Reading(t, watts=9.0, plugged=False) for t in (0.0, 1.0, 6.0, 7.0)).joules == 63.0


def test_readings_too_close_tell_no_joules() -> None:
    assert measure(Reading(float(t), joules=5.0 * t) for t in range(3)) == Energy(2.5, None, None)
    assert measure(Reading(float(t), joules=5.0 * t) for t in range(4)).joules == 15.0


def test_a_clock_set_back_is_no_energy() -> None:
    times = (10.0, 11.0, 4.0, 5.0, 9.0, 13.0)
    assert measure(Reading(t, watts=9.0, plugged=False) for t in times).joules is None
