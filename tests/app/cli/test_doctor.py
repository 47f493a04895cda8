"""`edgespec doctor` on this machine, and the kinds of cores on recorded ones."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgespec.app.cli import main
from edgespec.app.engine import calibration
from edgespec.core import Reading
from edgespec.costs import CostCurve
from edgespec.machine.processor import core_kinds
from edgespec.machine.reading import descriptions, reported_fields
from edgespec.machine.sensors import compute_cores, memory_available, missing, sources
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.native import LlamaOptions


def doctor(*arguments: str) -> str:
    result = CliRunner().invoke(main.app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_it_tells_what_is_here(starter_path):
    report = json.loads(doctor("--json", "-m", str(starter_path), "--mode", "saver"))
    assert report["processor"]["compute_cores"] == compute_cores()
    assert report["engines"]["llama.cpp"].startswith("llama.cpp 0.3.")
    assert report["sensors"]["memory_free"] == pytest.approx(memory_available(), rel=0.5)
    assert 0.0 <= report["sensors"]["load"] <= 1.0
    assert {"name": starter_path.name, "bytes": starter_path.stat().st_size} in report["models"]
    assert report["curve"]["model"] == starter_path.name
    assert report["governor"]["mode"] == "saver"
    assert report["governor"]["budget"]["objective"] == "energy"


def test_each_sensor_has_a_value_or_a_reason():
    report = json.loads(doctor("--json"))
    assert set(report["not_told"]) >= set(missing())
    assert all(report["not_told"].values())
    assert not set(report["not_told"]) & (set(sources()) - {"load"})


def test_as_text_every_line_has_a_value(starter_path):
    lines = doctor("-m", str(starter_path)).splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert [name for name in names if name != "unavailable"] == [
        "processor", "limits", "features", "engine", "self-tests", "switched", "onnx", "sensors", "models",
        "cost", "governor",
    ]  # fmt: skip
    assert "MB of memory free" in "\n".join(lines)


def test_a_missing_model_is_reported_with_the_rest():
    report = json.loads(doctor("--json", "-m", "no-such-model"))
    assert "no-such-model" in report["curve"]["missing"]
    assert report["processor"]["name"]


def test_costs_have_a_source_an_age_and_a_spread(starter_path, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    summary, options = check_gguf(starter_path), LlamaOptions()
    curve = CostCurve({1: 0.004, 4: 0.009}, most=32)
    for _ in range(3):
        curve.observe(4, 0, 0.009)
    calibration.save(
        "costs", calibration.cost_key(summary, options), {**curve.as_json(), "time": int(time.time()) - 7300}
    )
    found = json.loads(doctor("--json", "-m", "smollm2-135m"))["curve"]
    assert {rows: found["sources"][rows] for rows in ("1", "4", "16")} == {
        "1": "measured", "4": "refined", "16": "prior",
    }  # fmt: skip
    assert found["milliseconds"]["4"] == pytest.approx(9.0, rel=0.1)
    assert found["deviations"]["16"] > found["deviations"]["4"] > 0.0
    assert 0.0 < found["spread"] < 0.2
    (line,) = [line for line in doctor("-m", "smollm2-135m").splitlines() if line.startswith("cost curve")]
    assert "2 hours old" in line
    assert "(refined)" in line


def test_fresh_measures_again(starter_path, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    monkeypatch.setattr(
        calibration, "ProcessorLoad", lambda: lambda: {"others": 0.0}
    )  # whatever runs next to this test
    key = calibration.cost_key(check_gguf(starter_path), LlamaOptions())
    calibration.save("costs", key, CostCurve({1: 90.0, 4: 300.0}).as_json())
    doctor("--json", "-m", "smollm2-135m", "--fresh")
    kept = calibration.load("costs", key)
    assert kept is not None
    assert kept["pace"] < 60.0
    assert kept["load"] == 0.0


def cores(root: Path, measure: str, values: list[int]) -> Path:
    for i, value in enumerate(values):
        path = root / f"cpu{i}" / measure
        path.parent.mkdir(parents=True)
        path.write_text(f"{value}\n")
    (root / "cpuidle").mkdir()
    return root


def test_kinds_of_cores(tmp_path):
    # An i7-1360P: 4 fast cores of two threads, favored ones among them, and 8 slow ones.
    hybrid = cores(
        tmp_path / "a", "cpufreq/cpuinfo_max_freq", [5_000_000] * 4 + [4_800_000] * 4 + [3_700_000] * 8
    )
    assert core_kinds(hybrid) == [{"name": "fast", "cores": 8}, {"name": "slow", "cores": 8}]
    # A Snapdragon 8 Gen 2: one, four and three.
    phone = cores(tmp_path / "b", "cpu_capacity", [325] * 3 + [828] * 4 + [1024])
    assert [kind["cores"] for kind in core_kinds(phone)] == [1, 4, 3]
    assert [kind["name"] for kind in core_kinds(phone)] == ["fast", "middle", "slow"]
    assert core_kinds(cores(tmp_path / "c", "cpu_capacity", [1024] * 4)) == [{"name": "equal", "cores": 4}]
    assert core_kinds(tmp_path / "none") == []


def test_readings_in_words():
    reading = Reading(1.0, celsius=61.4, plugged=False, charge=63.6, memory_free=3_000_000_000)
    assert descriptions(reading) == [
        "61 °C",
        "battery at 64%",
        "plugged in: False",
        "3,000 MB of memory free",
    ]
    assert reported_fields(reading) == {
        "celsius": 61.4, "plugged": False, "charge": 63.6, "memory_free": 3_000_000_000,
    }  # fmt: skip
    assert descriptions(None) == []
