"""Programs without knowledge of Edgespec, over TCP: the `llm` command line, and LangChain with OpenAI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, Field, SecretStr
from serving import MODEL, Running, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("programs"), "--draft", "none", "--parallel", "2") as one:
        yield one


@pytest.fixture
def base(server: Running) -> str:
    return f"http://127.0.0.1:{server.port}/v1"


@pytest.mark.parametrize("more", [[], ["--no-stream"]], ids=["streaming", "whole"])
def test_llm(more: list[str], base: str, server: Running, tmp_path: Path) -> None:
    models = f"- model_id: local\n  model_name: {MODEL}\n  api_base: {base}\n  api_key_name: edge\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    (tmp_path / "keys.json").write_text(json.dumps({"edge": server.token}))
    done = subprocess.run(
        [
            sys.executable, "-m", "llm", "-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "8",
            *more, "Name a colour.",
        ],
        capture_output=True, text=True, env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=12)
    degrees: int = Field(ge=-50, le=50)


def test_langchain(base: str, server: Running) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=base, api_key=SecretStr(server.token), model=MODEL, temperature=0, max_retries=0,
        max_completion_tokens=100,
    )  # fmt: skip
    whole = chat.invoke("Name a colour.")
    assert whole.content
    assert whole.usage_metadata is not None
    streamed = list(chat.stream("Name a colour."))
    assert "".join(str(chunk.content) for chunk in streamed) == whole.content
    shaped = chat.with_structured_output(Weather, method="json_schema").invoke("The weather in Paris?")
    assert isinstance(shaped, Weather)
    called = chat.bind_tools([Weather], tool_choice="any").invoke("The weather in Paris?")
    assert Weather.model_validate(called.tool_calls[0]["args"])
