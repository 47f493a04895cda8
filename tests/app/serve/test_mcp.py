"""`edgespec mcp` with the SDK's own client, as an agent starts it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from serving import MODEL, command

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}
OPTIONS = ["mcp", "-m", MODEL, "--draft", "none", "--threads", "1"]


@asynccontextmanager
async def connected(patch: str = "") -> AsyncIterator[Client]:
    program, *arguments = [*command(patch), *OPTIONS]
    async with Client(stdio_client(StdioServerParameters(command=program, args=arguments))) as client:
        yield client


def text(result: Any) -> str:
    return "".join(part.text for part in result.content)


async def test_the_three_tools() -> None:
    async with connected() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"generate", "chat", "extract"}
        assert all(tool.description for tool in tools.values())

        arguments: dict[str, Any] = {"prompt": "Name a colour.", "max_tokens": 8}
        answer = await client.call_tool("generate", arguments)
        assert not answer.is_error
        assert text(answer)
        messages = [{"role": "user", "content": "Name a colour."}]
        same = await client.call_tool("chat", {"messages": messages, "max_tokens": 8})
        assert text(same) == text(answer)
        cut = await client.call_tool("generate", {**arguments, "stop": [text(answer)[3:6]]})
        assert text(cut) == text(answer)[: text(answer).index(text(answer)[3:6])]

        found = await client.call_tool("extract", {"text": "Anna, 31, has a dog.", "schema": PERSON})
        assert not found.is_error
        validate(found.structured_content, PERSON)
        assert json.loads(text(found)) == found.structured_content


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("generate", {"prompt": ""}, "prompt"),
    ("generate", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ("generate", {"prompt": "x", "temperature": -1}, "temperature"),
    ("generate", {"prompt": "x", "stop": [""]}, "empty"),
    ("generate", {"prompt": "word " * 6000}, "maximum context length"),
    ("chat", {"messages": []}, "messages"),
    ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ("extract", {"text": "x", "schema": {"type": "array"}}, "object"),
    ("extract", {"text": "x", "schema": {"type": "object", "not": {}}}, ""),
    ("extract", {"text": "x", "schema": PERSON, "max_tokens": 3}, "raise max_tokens"),
    ("nothing", {}, "nothing"),
]


async def test_errors_are_reported_and_the_next_call_works() -> None:
    async with connected() as client:
        for tool, arguments, expected in FAULTS:
            answer = await client.call_tool(tool, arguments)
            assert answer.is_error, (tool, arguments)
            assert expected in text(answer)
            assert "Traceback" not in text(answer)
        good = await client.call_tool("generate", {"prompt": "Hello", "max_tokens": 1})
        assert not good.is_error


async def test_a_canceled_call_frees_the_model() -> None:
    async with connected() as client:
        await client.call_tool("generate", {"prompt": "Hello", "max_tokens": 1})
        long = client.call_tool("generate", {"prompt": "Count to ten thousand.", "max_tokens": 3000})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(long, 0.05)
        async with asyncio.timeout(5):
            answer = await client.call_tool("generate", {"prompt": "Hello", "max_tokens": 1})
        assert not answer.is_error


async def test_a_model_that_cannot_be_loaded_is_reported() -> None:
    patch = (
        "import edgespec.app.engine.loading as o; from edgespec.core import EdgespecError\n"
        "def fail(*a, **k): raise EdgespecError('The file is damaged.')\n"
        "o.load_engine = fail\n"
    )
    async with connected(patch) as client:
        answer = await client.call_tool("generate", {"prompt": "Hello"})
    assert answer.is_error
    assert "The file is damaged." in text(answer)


def test_an_unknown_model_is_one_line() -> None:
    done = subprocess.run(
        [*command(), "mcp", "-m", "nothing.gguf"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_nothing_but_the_protocol_is_written() -> None:
    hello = {
        "jsonrpc": "2.0", "id": 1, "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"},
        },
    }  # fmt: skip
    done = subprocess.run(
        [*command(), *OPTIONS], input=json.dumps(hello) + "\n", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["id"] for line in lines] == [1]
    assert lines[0]["result"]["serverInfo"]["name"] == "edgespec"
    assert "Traceback" not in done.stderr


def test_the_sdk_is_not_imported_for_help(tmp_path: Path) -> None:
    heavy = {"mcp", "fastapi", "uvicorn", "pydantic", "prometheus_client", "sse_starlette"}
    code = f"import sys, edgespec.app.cli.main; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
