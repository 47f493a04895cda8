"""The Python API and examples/, with the starter model in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.py"))
EXPECTED = {
    "chat.py": "tokens/s",
    "json_schema.py": "'country': 'France'",
    "custom_drafter.py": "quick brown fox",
}


def python(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], input=text, capture_output=True, text=True, timeout=120, env=os.environ
    )


def test_five_lines_write_an_answer(starter_path: Path) -> None:
    code = f"""from edgespec import load
with load({str(starter_path)!r}) as model:
    for step in model.generate("What is the capital of France? One word.", max_tokens=12):
        print(step.text, end="")
"""
    assert code.count("\n") <= 5
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_there_is_a_line_of_expectation_for_each_example() -> None:
    assert {path.name for path in EXAMPLES} == set(EXPECTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, starter_path: Path) -> None:
    assert path.read_text("utf-8").count("\n") <= 30
    done = python(str(path), str(starter_path), text="What is the capital of France?\n\n")
    assert done.returncode == 0, done.stderr
    assert EXPECTED[path.name] in done.stdout


def test_importing_the_package_loads_nothing() -> None:
    done = python("-c", "import sys, edgespec; print('numpy' in sys.modules, edgespec.__version__)")
    assert done.stdout.startswith("False 0.")
