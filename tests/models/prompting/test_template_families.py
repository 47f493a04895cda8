"""Chat templates of many families: each renders, and the calls it writes are read back.

llama.cpp's source has 71 of them; they are not ours to copy. Where its source is at hand (LLAMA_CPP_SOURCE,
or the source of llama-cpp-python) they are all tried; small templates of our own cover the families anyway.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from edgespec.core import EdgespecError
from edgespec.models.prompting import call_syntax
from edgespec.models.prompting.answer_parser import AnswerParser
from edgespec.models.prompting.call_forms import Syntax, written
from edgespec.models.prompting.call_syntax import GENERIC, SYNTAXES, syntax_of
from edgespec.models.prompting.chat_template import ChatTemplate, fold_system
from edgespec.models.prompting.output_events import Arguments, Called, ReasoningPiece
from edgespec.models.prompting.reasoning import thoughts_of
from edgespec.models.prompting.tool_calls import Tool, folded, read_tools, with_calls_as_text

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Of a city.", "parameters": CITY}}
]
PARIS, ROME = {"city": "Paris", "n": 3}, {"city": "Rome", "n": 4}
SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}


def called(*arguments: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": f"call{i:05d}", "type": "function", "function": {"name": "get_weather", "arguments": one}}
        for i, one in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def result(i: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{i:05d}", "name": "get_weather", "content": "sunny"}


CONVERSATIONS: dict[str, tuple[Sequence[dict[str, Any]], bool]] = {
    "plain": ([ASKED], False),
    "system": ([SYSTEM, ASKED], False),
    "tools": ([SYSTEM, ASKED], True),
    "result": ([SYSTEM, ASKED, called(PARIS), result(0)], True),
    "results": ([SYSTEM, ASKED, called(PARIS, ROME), result(0), result(1)], True),
    "turns": ([SYSTEM, ASKED, {"role": "assistant", "content": "Yes."}, ASKED], False),
}


def rendered(source: str, messages: Sequence[dict[str, Any]], tools: bool, prompt: bool = True) -> str:
    template = ChatTemplate(source, bos="<BOS>", eos="<EOS>")
    given = TOOLS if tools else None
    if syntax_of(source).taught:
        messages, given = folded(messages, read_tools(given or ()), syntax_of(source)), None
    messages = with_calls_as_text(messages, source)
    try:
        pieces = template.render(messages, tools=given, add_generation_prompt=prompt)
    except EdgespecError:  # as of Gemma 2: no system role
        pieces = template.render(fold_system(messages), tools=given, add_generation_prompt=prompt)
    return "".join(pieces)


def read_back(source: str, *arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of the calls that a template writes, read from its own text whole and in pieces."""
    before = rendered(source, [SYSTEM, ASKED], True)
    after = rendered(source, [SYSTEM, ASKED, called(*arguments)], True, prompt=False)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False))
    common = "".join(pair[0] for pair in same)
    if (start := max(common.rfind("<"), common.rfind("["))) >= 0 and not set(common[start:]) & set(">]"):
        common = common[:start]  # the prefix ends within a mark
    syntax, thoughts = syntax_of(source), thoughts_of(source)
    opened = thoughts.opened(common) if thoughts is not None else ""
    opened = opened or (syntax.trigger if common.endswith(syntax.trigger) else "")
    found = []
    for size in (len(after), 1, 2, 3, 5, 7, 11):
        parser = AnswerParser(syntax, thoughts, [Tool("get_weather", "", CITY)], opened)
        text = after[len(common) :]
        events = [
            event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])
        ] + parser.finish()
        assert not any(isinstance(event, ReasoningPiece) for event in events)
        calls = [""] * sum(isinstance(event, Called) for event in events)
        for event in events:
            if isinstance(event, Arguments):
                calls[event.index] += event.text
        found.append([json.loads(call) for call in calls])
    assert all(one == found[0] for one in found)
    return found[0]


def _llama_cpp() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    roots = [Path(os.environ.get("LLAMA_CPP_SOURCE", "-"))]
    roots += [Path(spec.origin).parents[1] / "vendor" / "llama.cpp"] if spec and spec.origin else []
    return next((one for root in roots if (one := root / "models" / "templates").is_dir()), None)


FOLDER = _llama_cpp()
FILES = sorted(FOLDER.glob("*.jinja")) if FOLDER is not None else []
WITHOUT_CALLS = {  # their templates have no tools; the prompt teaches a syntax that is ours
    "HuggingFaceTB-SmolLM3-3B", "google-gemma-2-2b-it", "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",  # writes calls only where the content is None
}  # fmt: skip
ONE_CALL = ("GigaChat", "meta-llama", "openai-gpt-oss")

without_source = pytest.mark.skipif(
    not FILES, reason="llama.cpp's templates are not here: set LLAMA_CPP_SOURCE to its source"
)


@without_source
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_llama_cpps_templates_render(path: Path) -> None:
    for messages, tools in CONVERSATIONS.values():
        text = rendered(path.read_text("utf-8"), messages, tools)
        assert "Hi there" in text


@without_source
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_calls_that_llama_cpps_templates_write_are_read_back(path: Path) -> None:
    source = path.read_text("utf-8")
    if path.stem in WITHOUT_CALLS:
        assert syntax_of(source).taught
        return
    assert read_back(source, PARIS) == [PARIS]
    if not path.stem.startswith(ONE_CALL):
        assert read_back(source, PARIS, ROME) == [PARIS, ROME]


def test_the_marks_of_every_syntax_lead_to_it() -> None:
    for marks, syntax in call_syntax.MARKS:
        assert syntax_of("{% if tools %}" + " ".join(marks)) in (syntax, *SYNTAXES)
    chosen = {syntax_of("{% if tools %}" + " ".join(marks)) for marks, _ in call_syntax.MARKS}
    assert chosen | {GENERIC} >= set(SYNTAXES)


def own_template(syntax: Syntax) -> str:
    """A template of the family: a loop over messages, the marks of its syntax, and a call as text."""
    marks = next(marks for marks, one in call_syntax.MARKS if one is syntax)
    shown = " ".join(marks)
    return (
        "{% if tools %}{{ tools | tojson }}{% endif %}{# " + shown.replace("#}", "") + " #}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


@pytest.mark.parametrize("syntax", [s for s in SYNTAXES if s is not GENERIC], ids=lambda one: one.family)
def test_a_template_without_a_place_for_calls_keeps_them_as_text(syntax: Syntax) -> None:
    source = own_template(syntax)
    assert syntax_of(source) is syntax
    text = rendered(source, *CONVERSATIONS["result"])
    assert written(syntax, [("get_weather", PARIS)]) in text
    assert "sunny" in text


def test_templates_may_expect_what_older_programs_gave_them() -> None:
    def text(source: str, name: str = "results") -> str:
        return rendered(source + "{# tool_calls functools[ #}", *CONVERSATIONS[name])

    assert text("{% for tool in tools %}x{% endfor %}Hi", "plain") == "Hi"
    assert "get_weather" in text("{{ 'Functions: ' + functions }}")
    loop = "{% for m in messages %}{% for c in m.tool_calls or [] %}%s{% endfor %}{% endfor %}"
    assert "Paris" in text(loop.replace("%s", "{{ 'call ' + c.function.arguments }}"))
    many = "{% for m in messages %}{% if (m.tool_calls or [])|length > 1 %}"
    assert text(many + "{{ raise_exception('one') }}{% endif %}{{ m.role[0] }}{% endfor %}") == "suatat"
    assert "get_weather" in text("{{ tools | map(attribute='function') | tojson }}")
    assert text("{% set seen = [] %}{% set _ = seen.append(1) %}{{ seen | length }}") == "1"
    assert "of " in text("{{ 'of ' + tools[0].function.none }}")
