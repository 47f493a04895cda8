"""What a newcomer meets first: which model is fetched, why, and whether its answers are right."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgespec.app.bench.measure import answered
from edgespec.app.cli import main
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaOptions
from edgespec.models.hub import selection
from edgespec.models.hub.catalog import load_catalog
from edgespec.models.hub.references import load_references
from edgespec.models.hub.store import resolve

STARTER = next(entry for entry in load_catalog().values() if entry.starter)
QUESTIONS = [
    ("What is the capital of France?", r"\bParis\b"),
    ("What is 2 + 2?", r"\b(4|four)\b"),
    ("What is the opposite of hot?", r"\bcold\b"),
    ("How many days are in a week?", r"\b(7|seven)\b"),
    ("What color is the sky on a clear day?", r"\bblue\b"),
    ("How many minutes are in an hour?", r"\b(60|sixty)\b"),
    ("What is the capital of Japan?", r"\bTokyo\b"),
    ("What do bees make?", r"\bhoney\b"),
    ("Who wrote Romeo and Juliet?", r"\bShakespeare\b"),
    ("What is the largest ocean on Earth?", r"\bPacific\b"),
]


def test_the_starter_answers_simple_questions(capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy, through the chat template; an answer that rambles on is wrong."""
    right = 0
    with open_engine(
        resolve(STARTER.name), suffix=False, max_draft=0, options=LlamaOptions(context=512)
    ) as engine:
        for question, wanted in QUESTIONS:
            prompt = engine.chat_prompt([{"role": "user", "content": question}])
            result = answered(engine, Request(prompt, max_tokens=48))
            good = result.stop_reason == "end" and re.search(wanted, result.text, re.IGNORECASE) is not None
            right += good
            with capsys.disabled():
                print(f"\n{'right' if good else 'wrong'}: {question} {' '.join(result.text.split())}", end="")
    assert right >= 8


# --- which one is fetched, and why ---

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a model; gives a function that sets its memory and free disk in bytes."""
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "models"))

    def set_to(memory: float, disk: float) -> Path:
        monkeypatch.setattr("edgespec.machine.sensors.memory_total", lambda: int(memory))
        monkeypatch.setattr("shutil.disk_usage", lambda _: Disk(10**12, 0, int(disk)))
        (tmp_path / "models").mkdir(exist_ok=True)
        return tmp_path / "models"

    return set_to


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / load_catalog()[name].file).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("memory", "disk", "name", "words"),
    [
        (64e9, 1e12, "qwen2.5-coder-0.5b", ["smallest that answers simple questions", "64.0 GB of memory"]),
        (1e9, 600e6, "qwen2.5-coder-0.5b", ["smallest that answers simple questions", "0.6 GB of disk free"]),
        (600e6, 1e12, "smollm2-135m", ["largest that fits", "0.6 GB of memory", "need qwen2.5-coder-0.5b"]),
        (64e9, 400e6, "smollm2-135m", ["largest that fits", "0.4 GB of disk free"]),
    ],
)
def test_memory_and_disk_choose_what_to_begin_with(machine, memory, disk, name, words):
    machine(memory, disk)
    entry, why = selection.first_model()
    assert entry.name == name
    assert all(word in why for word in words)
    choices = selection.choices()
    assert choices[0].name == name  # the screen offers the same first, and says the same
    assert why in choices[0].about
    assert not any(why in one.about for one in choices[1:])
    with pytest.raises(EdgespecError, match=f"edgespec pull {re.escape(name)}`"):
        selection.default_model()


def test_a_machine_without_room_is_said(machine):
    machine(64e9, 50e6)
    with pytest.raises(EdgespecError, match=r"fits this machine.*0\.1 GB of disk free"):
        selection.first_model()
    assert all("larger than the free disk" in one.about for one in selection.choices())


@pytest.mark.parametrize(
    ("here", "memory", "name"),
    [
        (["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"], 64e9, "qwen2.5-coder-1.5b"),
        (["smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"], 1e9, "qwen2.5-coder-0.5b"),
        (["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"], 100e6, "qwen2.5-coder-0.5b"),
        (["smollm2-135m", "gemma-3-270m"], 64e9, "smollm2-135m"),
    ],
)
def test_without_a_name_the_largest_that_fits_is_used(machine, here, memory, name):
    put(machine(memory, 1e12), *here)
    assert selection.default_model() == name
    assert selection.choices()[0].here


# --- `edgespec chat --pull` ---


def chat(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, list[str]]:
    """Its standard error, and the models that were fetched or opened."""
    did: list[str] = []
    monkeypatch.setattr("edgespec.app.cli.fetching.fetch", lambda entry: did.append(f"fetch {entry.name}"))
    monkeypatch.setattr("edgespec.app.chat.plain.talk", lambda s, *_, **__: did.append(s.name) or 0)
    result = CliRunner().invoke(main.app, ["chat", "--plain", *arguments])
    return f"{result.stderr}{result.exception}", did


def test_the_first_start_says_what_it_fetches_and_why(machine, monkeypatch):
    folder = machine(64e9, 1e12)
    said, did = chat(monkeypatch, "--pull")
    assert did == ["fetch qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b"]
    (line, *_) = said.splitlines()
    assert line.startswith("edgespec: fetching qwen2.5-coder-0.5b, 491 MB: the smallest that answers")
    put(folder, "smollm2-135m")
    said, did = chat(monkeypatch, "--pull")
    assert did == ["smollm2-135m"]
    assert "fetching" not in said


def test_without_leave_nothing_is_fetched(machine, monkeypatch):
    machine(64e9, 1e12)
    said, did = chat(monkeypatch)
    assert did == []
    assert "edgespec pull qwen2.5-coder-0.5b" in said


def test_references_are_complete() -> None:
    known, catalog = load_references(), load_catalog()
    assert len(known) >= 20
    assert not set(known) & set(catalog)
    assert {one.draft for one in known.values()} - {""} <= {*known, *catalog}
    assert all(one.bytes > 0.2e9 and one.parameters > 0.3e9 and one.licence for one in known.values())
