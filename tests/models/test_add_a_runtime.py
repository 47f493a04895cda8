"""The code of docs/add-a-runtime.md, as it is printed there."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.models import runtime

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-runtime.md").read_text("utf-8")
TEXT = b"one two three one two three one two three "


def test_the_page_adds_a_runtime_in_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, line = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert module.count("\n") <= 60
    assert line.count("\n") == 1
    runtimes = list(runtime.RUNTIMES)
    monkeypatch.setattr(runtime, "RUNTIMES", runtimes)
    names: dict[str, Any] = {"RUNTIMES": runtimes}
    exec(compile(module + line, "add-a-runtime.md", "exec"), names)

    table = np.zeros((256, 256), np.float32)
    for before, after in pairwise(TEXT):
        table[before, after] += 5.0
    table.tofile(tmp_path / "text.bigram")
    answers = {}
    for speculate in (False, True):
        with open_engine(tmp_path / "text.bigram", mode="performance") as engine:
            assert engine.model.build == "BigramModel"
            prompt = engine.model.vocab.tokenize("one two three one ")
            answering = engine.generate(Request(prompt, max_tokens=40, speculate=speculate))
            answers[speculate] = "".join(step.text for step in answering)
    assert answers[False] == answers[True]
    assert answers[False].startswith("t")
    (tmp_path / "short.bigram").write_bytes(b"abc")
    with pytest.raises(EdgespecError, match="3 bytes"):
        open_engine(tmp_path / "short.bigram")
