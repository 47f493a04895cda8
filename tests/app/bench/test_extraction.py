"""JSON by schema on a real model, and the schemas."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

from edgespec.app.bench.extraction import (
    Extraction,
    ExtractionOutcome,
    extractions,
    json_report,
    json_table,
    measure_json,
)
from edgespec.app.bench.measure import Prompt
from edgespec.app.engine.assembly import open_engine
from edgespec.core import EdgespecError
from edgespec.models.gguf.model import LlamaOptions

TEXT = "The Eiffel Tower in Paris was built by Gustave Eiffel and opened on 31 March 1889."


def test_schemas_are_schemas_and_go_from_flat_to_nested():
    schemas = json.loads((resources.files("edgespec.app.bench") / "schemas.json").read_text())
    assert len(schemas) == 8
    for schema in schemas:
        Draft202012Validator.check_schema(schema)
    assert len(json.dumps(schemas[0])) < len(json.dumps(schemas[-1])) / 3


def test_prompts_with_a_text_take_the_schemas_in_turn():
    prompts = [Prompt(task, str(i), TEXT) for i in range(9) for task in ("rag", "chat")]
    found = extractions(prompts)
    assert [one.number for one in found] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert TEXT in found[0].text
    assert '"topic"' in found[0].text
    with pytest.raises(EdgespecError, match="rag or summarization"):
        extractions([Prompt("chat", "1", TEXT)])


def test_every_answer_keeps_to_its_schema_with_and_without_drafting(starter_path):
    asked = extractions([Prompt("rag", str(i), TEXT) for i in range(3)])
    with open_engine(starter_path, options=LlamaOptions(context=2048)) as engine:
        report = measure_json(engine, asked)
    assert report["valid"] == {"edgespec": 1.0, "edgespec plain": 1.0}
    assert report["answers"] == 3
    assert set(report["ratio_by_schema"]["edgespec plain"]) == {"0", "1", "2"}
    assert "to edgespec plain" in json_table(report)


def test_an_answer_that_is_no_json_counts_as_wrong(tiny_llama):
    turns = [
        (
            0,
            {
                "edgespec": ExtractionOutcome(40.0, 1.0, 40, True),
                "peer": ExtractionOutcome(20.0, 2.0, 40, True),
            },
        ),
        (
            0,
            {
                "edgespec": ExtractionOutcome(40.0, 1.0, 40, True),
                "peer": ExtractionOutcome(40.0, 2.0, 40, False),
            },
        ),
        (
            1,
            {
                "edgespec": ExtractionOutcome(40.0, 1.0, 40, True),
                "peer": ExtractionOutcome(10.0, 2.0, 40, True),
            },
        ),
    ]
    with open_engine(tiny_llama, max_draft=0) as engine:
        report = json_report(engine, ["edgespec", "peer"], turns)
    assert report["valid"] == {"edgespec": 1.0, "peer": pytest.approx(2 / 3)}
    assert report["ratio_by_schema"]["peer"] == {"0": 1.5, "1": 4.0}
    assert report["ratio"]["peer"] == pytest.approx(6**0.5, abs=1e-3)


def test_an_extraction_shows_its_schema():
    one = Extraction(Prompt("rag", "1", TEXT), 0, {"type": "object", "properties": {"x": {"const": 3}}})
    assert '{"x": {"const": 3}}' in one.text
