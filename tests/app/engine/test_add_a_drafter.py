"""The code of docs/add-a-drafter.md, as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_engine import fake_engine

from edgespec.app.engine import drafters
from edgespec.app.engine.drafters import Drafters
from edgespec.app.engine.request import Request

PAGE = (Path(__file__).parents[3] / "docs" / "add-a-drafter.md").read_text("utf-8")
PROMPT = list(b"one two one two one two one")


def test_the_page_adds_a_drafter_in_one_file_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module, line = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert module.count("\n") <= 60
    assert line.count("\n") == 1
    answering = fake_engine().generate(Request(PROMPT, max_tokens=60))
    plain = [token for step in answering for token in step.tokens]

    chain: list[Any] = []
    monkeypatch.setattr(drafters, "FREE", chain)
    names: dict[str, Any] = {"FREE": chain, "TABLE": {}}
    exec(compile(module + line, "add-a-drafter.md", "exec"), names)
    engine, stats = fake_engine(drafters=Drafters(most=7)), None
    for _ in range(2):  # the table is the engine's, so that the second answer is drafted from the first
        answering = engine.generate(Request(PROMPT, max_tokens=60))
        assert [token for step in answering for token in step.tokens] == plain
        stats, before = answering.stats, stats
        engine.forget()
    assert before is not None
    assert stats is not None
    drafted, accepted = stats.drafters["pairs"]
    assert 0 < accepted <= drafted
    assert stats.rounds < before.rounds <= 60
