"""The page docs/add-an-api.md: its module, run as it is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from asgi import fetch
from fake_service import MODEL, FakeScheduler, fake_app
from imports import ROOT

from edgespec.core import EdgespecError

PAGE = Path(ROOT, "docs", "add-an-api.md").read_text("utf-8")
ASK = {"model": MODEL, "question": "hi"}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The module of the page, imported under a name of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 60
    module = ModuleType("ask_api")
    sys.modules[module.__name__] = module  # where annotations are resolved
    exec(compile(code, "docs/add-an-api.md", "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


async def test_the_answer_as_a_whole(example: ModuleType) -> None:
    with fake_app(FakeScheduler(["hello", " world"]), [example.add_routes]) as app:
        answer = await fetch(app, "/v1/ask", ASK)
    assert (answer.status, answer.json()) == (200, {"answer": "hello world", "tokens": 3})


async def test_the_answer_as_a_stream(example: ModuleType) -> None:
    with fake_app(FakeScheduler(["hello", " world"]), [example.add_routes]) as app:
        answer = await fetch(app, "/v1/ask", ASK | {"stream": True})
    assert answer.events() == [
        ("text", {"type": "text", "text": "hello"}),
        ("text", {"type": "text", "text": " world"}),
        ("end", {"type": "end", "answer": "hello world", "tokens": 3}),
    ]


async def test_its_errors(example: ModuleType) -> None:
    with fake_app(FakeScheduler(["hello", EdgespecError("It broke.")]), [example.add_routes]) as app:
        whole = await fetch(app, "/v1/ask", ASK)
        streamed = await fetch(app, "/v1/ask", ASK | {"stream": True})
        wrong = await fetch(app, "/v1/ask", ASK | {"answer": 1})
        other = await fetch(app, "/v1/ask", ASK | {"model": "gpt"})
    assert (whole.status, whole.json()["error"]["message"]) == (400, "It broke.")
    assert [name for name, _ in streamed.events()] == ["text", "error"]
    assert (wrong.status, other.status) == (400, 404)


async def test_its_description(example: ModuleType) -> None:
    with fake_app(FakeScheduler(), [example.add_routes]) as app:
        described = (await fetch(app, "/openapi.json")).json()
    assert "/v1/ask" in described["paths"]


def test_the_page_names_what_there_is() -> None:
    from edgespec.app.serve.apis.encoding import Encoder

    named = re.findall(r"^\| `(\w+)\(", PAGE, re.MULTILINE)
    assert {*named, "body", "media_type"} == {name for name in vars(Encoder) if not name.startswith("_")}
