"""Concurrent agents and agents one after another, on a real model."""

from __future__ import annotations

import json

import pytest

from edgespec.app.bench.agents import AgentScript, AgentStep, _report, agents_table, measure_agents
from edgespec.app.engine.assembly import open_engine
from edgespec.app.engine.request import GenerationStats
from edgespec.models.gguf.model import LlamaOptions
from edgespec.models.prompting.output_events import Arguments, Called


def test_conversations_grow_by_a_call_and_its_result_and_keep_the_first_call():
    script = AgentScript()
    assert [message["role"] for message in script.messages(0, 0)] == ["system", "user"]
    script.note(0, 0, [Called(0, "list_files"), Arguments(0, '{"fol'), Arguments(0, 'der": "src"}')])
    script.note(0, 0, [Called(0, "search"), Arguments(0, "{}")])
    *_, call, notes = script.messages(0, 1)
    assert call["tool_calls"][0]["function"] == {"name": "list_files", "arguments": {"folder": "src"}}
    assert "src/parser.py" in notes["content"]
    assert script.messages(1, 0)[1] != script.messages(0, 0)[1]
    assert script.messages(8, 0) == script.messages(0, 0)  # there are eight tasks


def test_two_agents_on_a_real_model(starter_path):
    said: list[str] = []
    options = LlamaOptions(context=2048)
    one = open_engine(starter_path, options=options)
    many = open_engine(starter_path, parallel=2, options=options)
    report = measure_agents(one, many, said.append, agents=2, steps=2)
    assert report["answers"] == 4
    assert report["ratio"] > 0
    assert all(value > 0 for value in report["tokens_per_second"].values())
    # Later steps evaluate only new tokens, so their first token comes sooner than after the whole prompt.
    smallest, largest = report["prompt_tokens"]
    assert report["read_again"]["together"] < smallest / 2 < largest
    for one_ in report["differences"]:
        assert one_["gap"] is None or one_["gap"] < 1.0  # as in test_service: this model's batches differ
    assert said[0].endswith("one after another")
    assert "all at once" in agents_table(report)
    json.dumps(report)


def test_what_is_reported(tiny_llama):
    def step(agent: int, number: int, first: float) -> AgentStep:
        return AgentStep(
            agent, number, [1] * 10, GenerationStats(tokens=[1, 2, 3], rounds=2, prompt_tokens=10), first, 1.0
        )

    found = {
        "alone": [step(0, 0, 4.0), step(0, 1, 1.0), step(0, 2, 1.0)],
        "together": [step(0, 0, 4.0), step(0, 1, 1.0), step(0, 2, 2.0)],
    }
    with open_engine(tiny_llama, max_draft=0) as engine:
        cold = [(found["together"][1], 10.0), (found["together"][2], 8.0)]
        report = _report(engine, found, {"alone": 6.0, "together": 3.0}, cold, [])
    assert report["tokens_per_second"] == {"alone": 1.5, "together": 3.0}
    assert report["ratio"] == 2.0
    assert report["warm_to_cold"]["median"] == pytest.approx(0.175)
    assert report["warm_to_cold"]["largest"] == 0.25
    assert report["seconds_to_first_token"]["together"]["median"] == 1.5
    assert report["tokens_per_round"]["alone"] == 1.5
