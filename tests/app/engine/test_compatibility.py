"""What the version before wrote is read: names and contents of cache files, as literals of that version.

The database of conversations is in tests/app/history/test_damage.py, the settings file in tests/app/chat.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgespec.acceptance import Acceptance
from edgespec.app.engine import calibration
from edgespec.drafting import MODEL
from edgespec.models.gguf import backends
from edgespec.models.gguf.native import LlamaOptions

SUMMARY: Any = SimpleNamespace(
    architecture="llama", vocab_size=100, parameters=1000, types={"Q4_K": 500, "F32": 20}
)
COSTS = {
    "version": 1, "pace": 0.0068, "slope": 3.46e-05, "most": 32, "noise": 0.1,
    "shape": {"1": 1.0, "2": 1.06, "4": 1.11, "8": 1.24, "16": 1.48, "32": 1.95},
    "deviation": {"1": 0.0, "2": 0.0973, "4": 0.1008, "8": 0.102, "16": 0.1023, "32": 0.1037},
    "seen": {"1": 9, "2": 9, "4": 9, "8": 9, "16": 9, "32": 9}, "time": 1795909755, "load": None,
}  # fmt: skip
ACCEPTANCE = {
    "version": 1, "bins": {"suffix": [[20.0, 134.0]] + [[4.0, 27.0]] * 12}, "levels": {"model": 0.84},
    "account": {"whole": 12.0, "end": 9.085, "reading": 2.3005},
}  # fmt: skip
TUNED = {
    "version": 1, "engine": "ik", "threads": 0, "threads_batch": 0, "flash_attention": None, "repack": True,
    "build": "ik 0.1.5 AVX2", "draft": "",
}  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The machine on which the names were written down."""
    monkeypatch.setattr(calibration, "cpu_name", lambda: "a processor")
    monkeypatch.setattr(calibration, "compute_cores", lambda: 4)
    monkeypatch.setattr(backends, "compute_cores", lambda: 4)
    builds = {"llama.cpp": "llama.cpp 0.3.36 AVX2", "ik": "ik 0.1.5 AVX2"}
    monkeypatch.setattr(backends, "library", lambda name: SimpleNamespace(build=builds[name]))
    monkeypatch.setattr(calibration, "library", lambda name: SimpleNamespace(build=builds[name]))
    monkeypatch.setenv("EDGESPEC_CACHE", str(tmp_path))
    (tmp_path / "machine").mkdir()
    return tmp_path / "machine"


def test_cost_curves_are_found_and_read(machine: Path) -> None:
    (machine / "costs-7b854f82763111c3a000dc59.json").write_text(json.dumps(COSTS))
    known = calibration.known_curve(SUMMARY, LlamaOptions())
    assert known is not None
    assert known.seconds(16) == pytest.approx(0.0068 * 1.48, rel=0.01)


def test_tuned_settings_are_found_and_read(machine: Path) -> None:
    (machine / "tuned-b1045dc6a9c7af77cbbd1daf.json").write_text(json.dumps(TUNED))
    found = calibration.tuned(SUMMARY)
    assert found is not None
    assert found[0] == LlamaOptions(engine="ik")


def test_acceptance_and_the_draft_models_account_are_read() -> None:
    known = Acceptance.from_json(ACCEPTANCE)
    assert known.level(MODEL) == 0.84
    assert known.probability("suffix", 0.05) < 0.2
    assert known.account(MODEL).as_json() == ACCEPTANCE["account"]
