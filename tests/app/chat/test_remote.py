"""A chat with an OpenAI-compatible server: a real HTTP server on TCP and on a Unix socket, good and bad."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from chat_servers import Script, Write, chunk, serving, words
from chats import SIZE, answered, send, shown, until

from edgespec.app.chat.app import ChatApp
from edgespec.app.chat.chat_model import TokenTrace
from edgespec.app.chat.history_worker import HistoryWorker
from edgespec.app.chat.remote_model import RemoteModel
from edgespec.app.engine.request import Request
from edgespec.core import EdgespecError
from edgespec.sampling import Sampling


@pytest.fixture(params=["tcp", "unix"])
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Script]:
    with serving(tmp_path / "s" if request.param == "unix" else None) as script:
        yield script


def ask(engine: RemoteModel, request: Request | None = None) -> tuple[str, TokenTrace]:
    result = TokenTrace()
    messages = [{"role": "user", "content": "Hi"}]
    return "".join(engine.answer(messages, request or Request(()), result)), result


def test_it_asks_streams_and_counts(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    script.answer = words("Hel", "lo")
    engine = RemoteModel(script.url)
    assert (engine.name, engine.context_length) == ("big-model", 8192)
    request = Request((), Sampling(0.5, top_k=3, seed=7), max_tokens=9)
    text, result = ask(engine, request)
    engine.close()
    assert text == "Hello"
    assert script.keys == ["Bearer sk-test"] * 2
    asked = script.asked[0]
    assert asked["stream"] is True
    assert asked["messages"] == [{"role": "user", "content": "Hi"}]
    assert (asked["model"], asked["temperature"], asked["top_k"]) == ("big-model", 0.5, 3)
    assert (asked["seed"], asked["max_tokens"]) == (7, 9)
    assert (result.prompt_tokens, len(result.tokens), result.rounds) == (21, 2, 2)
    assert result.stop_reason == "end"


@pytest.mark.parametrize("texts", [(), ("a",), ("a",) * 400])
def test_an_answer_stops_before_and_while_it_streams(script: Script, texts: tuple[str, ...]) -> None:
    silent = threading.Event()

    def answer(write: Write) -> None:
        for text in texts:
            write(chunk(text))
            sleep(0.01)
        silent.wait(20)  # a silent server, as during the prefill

    script.answer = answer
    engine, request = RemoteModel(script.url), Request(())
    timer = threading.Timer(0.3, request.cancel)
    timer.start()
    start = monotonic()
    text, result = ask(engine, request)
    assert monotonic() - start < 5
    assert result.stop_reason == "cancelled"
    assert set(text) <= {"a"}
    silent.set()
    engine.close()
    timer.join()


@pytest.mark.parametrize(
    "data",
    [
        b"data: not json\n\n",
        b"data: []\n\n",
        b'data: {"choices": [3]}\n\n',
        b'data: {"choices": 7}\n\n',
        b'data: {"error": {"message": "out of \\u001b[2J memory"}}\n\n',
    ],
)
def test_nonsense_is_an_error_in_one_line(script: Script, data: bytes) -> None:
    script.answer = lambda write: write(chunk("fine") + data)
    engine = RemoteModel(script.url)
    with pytest.raises(EdgespecError) as error:
        ask(engine)
    engine.close()
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_an_incomplete_answer_is_reported(script: Script) -> None:
    script.answer = lambda write: write(chunk("half"))
    engine, result, pieces = RemoteModel(script.url), TokenTrace(), []
    with pytest.raises(EdgespecError, match="closed the connection"):
        pieces.extend(engine.answer([{"role": "user", "content": "Hi"}], Request(()), result))
    engine.close()
    assert result.text == "half"


def test_the_reason_of_a_refusal_is_shown(script: Script) -> None:
    script.status, script.models = 401, {"error": {"message": "bad\x1b[31m key"}}
    with pytest.raises(EdgespecError, match=r"401 bad\[31m key: set OPENAI_API_KEY") as error:
        RemoteModel(script.url)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("models", [{"data": 3}, [], {"data": [{}]}, {"data": []}])
def test_a_server_of_another_kind_is_reported(script: Script, models: Any) -> None:
    script.models = models
    with pytest.raises(EdgespecError, match="lists no model"):
        RemoteModel(script.url)


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8080", "http://", "", "http://a b"])
def test_invalid_addresses_are_reported(url: str) -> None:
    with pytest.raises(EdgespecError):
        RemoteModel(url)


def test_a_server_that_does_not_run_is_reported() -> None:
    with pytest.raises(EdgespecError, match="does not respond"):
        RemoteModel("http://127.0.0.1:9")
    with pytest.raises(EdgespecError, match="does not respond"):
        RemoteModel("unix:/nowhere/socket")


async def test_the_chat_uses_it(script: Script, tmp_path: Path) -> None:
    script.answer = words("From ", "\x1b[31mfar", " away.")
    app = ChatApp(lambda progress: RemoteModel(script.url), "far", history=HistoryWorker(tmp_path / "h.db"))
    async with app.run_test(size=SIZE, notifications=True) as pilot:
        await send(pilot, "Hi")
        await answered(pilot)
        assert "From [31mfar away." in shown(app)
        assert "24/8,192" in shown(app).splitlines()[-1]
        await pilot.press("f3")  # no governor there
        await pilot.press("f4")
        await until(pilot, lambda: "the server chooses the model" in shown(app))
        script.answer = words(*["more "] * 300, pause=0.02)
        await send(pilot, "Long")
        await until(pilot, lambda: "more more" in shown(app))
        await pilot.press("escape")
        await answered(pilot)
        assert "stopped" in shown(app).splitlines()[-1]
