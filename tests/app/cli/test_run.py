"""`edgespec run --schema` and `--tool`: processes, the starter model, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import edgespec, one_line_error
from jsonschema import Draft202012Validator
from serving import CITY

ASK = ("run", "-m", "smollm2-135m", "--draft", "suffix", "The weather in Paris?")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city.", "parameters": CITY},
}
NOTE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 20}},
            "required": ["text"],
        },
    },
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path):
    """A function that writes a value as JSON, or text as it is, and returns the path."""
    made: list[Path] = []

    def write(value: Any) -> str:
        made.append(tmp_path / f"{len(made)}.json")
        made[-1].write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        return str(made[-1])

    return write


def test_an_answer_keeps_to_a_schema(file):
    done = edgespec(*ASK, "--schema", file(CITY), "--stats")
    assert done.returncode == 0, done.stderr
    Draft202012Validator(CITY).validate(json.loads(done.stdout))
    plain = edgespec(*ASK, "--schema", file(CITY), "--max-draft", "0", "--json")
    notes = json.loads(plain.stdout)
    assert notes["text"] + "\n" == done.stdout
    assert notes["drafted"] == 0
    assert "tool_calls" not in notes


def test_an_answer_that_is_cut_says_so(file):
    done = edgespec(*ASK, "--schema", file(CITY), "--max-tokens", "3")
    assert done.returncode == 1
    assert done.stdout.startswith('{"')
    assert "cut before it was complete: raise --max-tokens" in done.stderr
    done = edgespec(*ASK, "--tool", file(WEATHER), "--tool-choice", "required", "--max-tokens", "4")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cut before it was complete" in done.stderr


def test_a_call_is_a_line_of_json(file):
    tools = [file([WEATHER]), file(NOTE)]
    done = edgespec(
        *ASK, *(part for one in tools for part in ("--tool", one)), "--tool-choice", "get_weather"
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    call = json.loads(line)
    assert call["name"] == "get_weather"
    Draft202012Validator(CITY).validate(call["arguments"])


def test_calls_in_json(file):
    done = edgespec(*ASK, "--tool", file([WEATHER, NOTE]), "--tool-choice", "note", "--json")
    notes = json.loads(done.stdout)
    assert [call["name"] for call in notes["tool_calls"]] == ["note"]
    assert notes["text"] == ""


def test_a_model_may_answer_in_words(file):
    done = edgespec(*ASK, "--tool", file(WEATHER), "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (b"{", ["is not valid JSON"]),
        (b"\xff{}", ["not text in UTF-8"]),
        (b'{"a": NaN}', ["NaN is not JSON"]),
        ([1], ["must be a JSON object"]),
        ({"type": "string", "pattern": "(a{999}){999}"}, ["repeats more than"]),
        ({"type": "object", "properties": {"a": {"type": "thing"}}}, ["property a: Invalid type: thing"]),
        (False, ["no value satisfies it"]),
    ],
    ids=["no JSON", "no text", "NaN", "a list", "too much", "a wrong type", "nothing"],
)
def test_schemas_that_are_none(schema, words, file):
    done = edgespec(*ASK, "--schema", file(schema))
    assert done.returncode == 1
    assert done.stdout == ""
    lines = [
        line
        for line in done.stderr.splitlines()
        if not any(note in line for note in ("running at the same time", "tune", "measured the costs"))
    ]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines


@pytest.mark.parametrize(
    ("tools", "options", "words"),
    [
        ({"name": "x"}, [], ["tools[0] must be"]),
        ({"type": "function", "function": {"name": "no spaces"}}, [], ["tools[0] needs a name"]),
        ([WEATHER, WEATHER], [], ["duplicate tool get_weather"]),
        ([WEATHER], ["--tool-choice", "other"], ["'other'", "get_weather"]),
        ([WEATHER], ["--raw"], ["--raw"]),
        ([], [], ["no function"]),
    ],
    ids=["another form", "a name", "twice", "a choice", "raw", "none"],
)
def test_tools_that_are_none(tools, options, words, file):
    one_line_error(edgespec(*ASK, "--tool", file(tools), *options), *words)


def test_what_does_not_go_together(file):
    one_line_error(edgespec(*ASK, "--tool", file(WEATHER), "--schema", file(CITY)), "--schema")
    one_line_error(edgespec(*ASK, "--tool-choice", "required"), "--tool")
    one_line_error(edgespec(*ASK, "--schema", "/nowhere/x.json"), "cannot read /nowhere/x.json")
