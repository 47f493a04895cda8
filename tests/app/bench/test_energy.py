"""The benchmarks `energy` and `busy`, on short runs of a real model and on made-up results."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psutil
import pytest
from typer.testing import CliRunner

from edgespec.app.bench import busy as bench_busy
from edgespec.app.bench.energy import WAYS, energy_report, energy_table, measure_energy
from edgespec.app.bench.measure import measure, read_suite
from edgespec.app.cli import main
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.request import GenerationStats
from edgespec.machine.energy import Energy
from edgespec.models.gguf.model import LlamaOptions


@pytest.fixture(scope="module")
def engine(starter_path) -> Iterator[Engine]:
    with open_engine(starter_path, mode="performance", options=LlamaOptions(context=1024)) as loaded:
        yield loaded


def result(cpu: float, joules: float | None = None) -> GenerationStats:
    """An answer of eleven tokens, ten of them after the first step."""
    made = GenerationStats(tokens=[1] * 11, seconds=2.0, seconds_to_first_token=1.0, written=11, rounds=11)
    made._first = 1
    made.energy = Energy(cpu, joules, None if joules is None else "battery")
    return made


def row(*prices: float, metered: bool = False) -> dict[str, GenerationStats]:
    return {
        way.name: result(price, 3 * price if metered else None)
        for way, price in zip(WAYS, prices, strict=True)
    }


def test_figures_are_medians_of_ratios_within_a_turn(engine):
    turns = [("a", row(10, 8, 7, 5)), ("a", row(20, 12, 12, 8)), ("b", row(10, 10, 10, 9))]
    report = energy_report(engine, turns)
    assert report["unit"] == "CPU-s"
    assert report["tasks"]["a"]["plain"] == {"per_token": 1.5, "to_plain": 1.0, "tokens_per_second": 10.0}
    assert report["tasks"]["a"]["performance"]["to_plain"] == 0.7  # of 0.8 and 0.6
    assert report["overall"]["saver"] == {"per_token": 0.8, "to_plain": 0.5, "tokens_per_second": 10.0}
    assert "saver CPU-s/token" in energy_table(report).splitlines()[0]


def test_joules_count_only_where_all_is_metered(engine):
    assert energy_report(engine, [("a", row(1, 1, 1, 1, metered=True))])["unit"] == "J"
    mixed = [("a", row(1, 1, 1, 1, metered=True)), ("a", row(1, 1, 1, 1))]
    assert energy_report(engine, mixed)["unit"] == "CPU-s"


def test_every_way_is_measured_on_a_real_model(engine):
    prompts = read_suite(None, 1)[:2]
    report = measure_energy(engine, prompts, 10)
    assert report["answers"] == 2
    assert set(report["overall"]) == {way.name for way in WAYS}
    assert all(one["per_token"] > 0 for one in report["overall"].values())
    assert report["overall"]["plain"]["to_plain"] == 1.0
    assert set(report["threads"]) == {"performance", "balanced", "saver"}
    assert report["threads"]["performance"] == list(engine.resources.loaded)
    assert engine.resources.governor.mode == "performance"


def test_the_ordinary_benchmark_reports_mode_reading_and_energy(engine):
    report = measure(engine, read_suite(None, 1)[:1], 10)
    assert report["governor"]["modes"] == {"performance": "chosen by the user"}
    assert report["governor"]["reading"]["memory_free"] > 0
    for name in ("plain", "speculative"):
        assert report["energy"][name]["cpu_seconds_per_token"] > 0
        assert "joules_per_token" not in report["energy"][name]


def test_loops_run_on_every_core_and_end():
    before = {child.pid for child in psutil.Process().children()}
    with bench_busy.busy_loops():
        loops = [child for child in psutil.Process().children() if child.pid not in before]
        assert len(loops) == bench_busy.logical_cores()
    assert not [loop for loop in loops if loop.is_running()]


def test_speed_of_a_window():
    times = [(float(second), 10 * second) for second in range(20)]
    assert bench_busy._speed(times, 3.0, 8.0) == 10.0
    assert bench_busy._speed(times, 30.0, 40.0) == 0.0


def test_the_planner_is_compared_with_the_best_length_of_each_phase():
    def course(*speeds: float) -> bench_busy.BusyCourse:
        return bench_busy.BusyCourse((), speeds)

    courses = {None: [course(9, 30, 5)] * 3, 0: [course(10, 20, 5)] * 3}
    courses |= {length: [course(2, 25, 1)] * 3 for length in bench_busy.LENGTHS[1:]}
    ratios = [bench_busy._to_best(courses, phase) for phase in range(3)]
    assert [one["ratio"] for one in ratios] == [0.9, 1.2, 1.0]
    assert [one["length"] for one in ratios] == [0, 1, 0]


def test_replay_and_heat_on_the_command_line(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"time": 0, "plugged": true}\n{"time": 5, "plugged": false, "charge": 12}\n')
    rows = json.loads(CliRunner().invoke(main.app, ["bench", "replay", str(trace), "--json"]).output)
    assert [(row["time"], row["mode"]) for row in rows] == [(0, "performance"), (5, "saver")]
    picture = tmp_path / "heat.png"
    shown = CliRunner().invoke(main.app, ["bench", "replay", "heat", "--chart", str(picture)])
    assert "auto reaches" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
