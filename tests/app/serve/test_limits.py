"""Limits on clients: sizes, depth, number of requests, malformed HTTP."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import (
    CHAT,
    LONG,
    Running,
    endless,
    exchange,
    health_times,
    post,
    question,
    read_answer,
    running,
    warm,
)

PARALLEL, QUEUE = 2, 12
MB = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ["--draft", "none", "--parallel", str(PARALLEL), "--queue", str(QUEUE)]
    with running(tmp_path_factory.mktemp("limits"), *options) as one:
        warm(one)
        yield one


BODIES: list[tuple[str, bytes, int]] = [
    ("empty", b"", 400),
    ("no JSON", b"{", 400),
    ("two values", b"{} {}", 400),
    ("no object", b"[]", 400),
    ("null", b"null", 400),
    ("a number", b"1", 400),
    ("10,000 deep", b"[" * 10_000 + b"]" * 10_000, 400),
    ("10,000 deep and open", b'{"a":' * 10_000, 400),
    ("deep in a schema", b'{"tools":[' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"]}", 400),
    ("NaN", b'{"temperature": NaN}', 400),
    ("infinity", b'{"temperature": Infinity}', 400),
    ("too large a number", b'{"temperature": 1e999}', 400),
    ("a very long number", b'{"seed": ' + b"9" * 10_000 + b"}", 400),
    ("a lone surrogate", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', 400),
    ("a lone low surrogate", rb'{"messages": [{"role": "user", "content": "\udc00x"}]}', 400),
    ("a raw surrogate", b'{"model": "\xed\xa0\x80"}', 400),
    ("no UTF-8", b'{"model": "\xff"}', 400),
    ("UTF-16", "{}".encode("utf-16"), 400),
    ("a NUL", b'{"model": "\\u0000"}', 400),
]


@pytest.mark.parametrize(("body", "status"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
def test_bodies_that_are_none(path: str, body: bytes, status: int, server: Running) -> None:
    with server.connect() as connection:
        found, headers, answer = exchange(connection, post(path, body))
    assert found == status
    assert headers["content-type"] == "application/json"
    assert json.loads(answer)["error"]["message"]


def test_text_comes_back_whole(server: Running) -> None:
    text = 'NUL \0, ESC \x1b[2J, DEL \x7f, C1 \x9b, "quotes", \\, \u2028, emoji 😀'
    with server.client() as client:
        tokens = client.post("/tokenize", json={"content": text}).json()["tokens"]
        answer = client.post("/detokenize", json={"tokens": tokens})
    assert answer.json()["content"] == text
    assert answer.content.isascii()
    assert b"\x1b" not in answer.content


SCHEMAS: dict[str, Any] = {
    "endless": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "recursive": {
        "type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"],
        "additionalProperties": False,
    },
    "another's file": {"$ref": "file:///etc/passwd"},
    "another's server": {"$ref": "http://127.0.0.1:1/x"},
    "10,000 values": {"enum": [f"value {i}" for i in range(10_000)]},
    "10,000 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(10_000)}},
    "a catastrophic pattern": {"type": "string", "pattern": "^(a+)+(a|b|ab)*c{1,999}(x{1,99}){1,99}$"},
    "all of many": {"allOf": [{"anyOf": [{"type": "string"}, {"type": "integer"}]}] * 500},
    "a pattern that is none": {"type": "string", "pattern": "(("},
    "nothing": {"not": {}},
    "a wrong type": {"type": "thing"},
    "deep": json.loads('{"items":' * 150 + "{}" + "}" * 150),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_hostile_schemas_are_refused_or_answered_in_time(name: str, server: Running) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}}
    tool = {
        "type": "function",
        "function": {"name": "x", "parameters": {"type": "object", "properties": {"x": SCHEMAS[name]}}},
    }
    start = time.monotonic()
    with server.client() as client, ThreadPoolExecutor() as pool:
        responses = [
            pool.submit(client.post, CHAT, json=question(8, response_format=form)),
            pool.submit(client.post, CHAT, json=question(8, tools=[tool], tool_choice="required")),
        ]
        health_times(server, 10)  # others are served meanwhile
        for one in responses:
            answer = one.result()
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or len(answer.json()["error"]["message"]) < 1000
    assert time.monotonic() - start < 30


def send_much(connection: socket.socket, size: int, chunked: bool) -> None:
    part = b"x" * MB
    for _ in range(size // MB):
        connection.sendall(b"%x\r\n%s\r\n" % (MB, part) if chunked else part)


@pytest.mark.parametrize("how", ["length", "chunked", "continue"])
def test_a_body_of_100_megabytes(how: str, server: Running) -> None:
    before = server.memory()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    start = time.monotonic()
    with server.connect() as connection:
        if how == "chunked":
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        else:
            wait = "Expect: 100-continue\r\n" if how == "continue" else ""
            connection.sendall(f"{head}{wait}Content-Length: {100 * MB}\r\n\r\n".encode())
        if how != "continue":
            try:
                send_much(connection, 100 * MB, how == "chunked")
                connection.sendall(b"0\r\n\r\n" if how == "chunked" else b"")
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server may close the connection: its response can still be read
        status, _, body = read_answer(connection)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "request_too_large"
    assert time.monotonic() - start < 10
    assert server.memory() - before < 50 * MB


def test_a_body_shorter_than_its_length(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(post("/tokenize", b'{"content": "x"}').replace(b"Length: 16", b"Length: 17"))
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection)[0] in (0, 400)


@pytest.mark.parametrize(
    "length", ["-1", "abc", "1e3", "+1", "1, 2", "9" * 20, "9" * 5000], ids=lambda one: one[:9]
)
def test_a_length_that_is_none(length: str, server: Running) -> None:
    text = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    with server.connect() as connection:
        status, _, body = exchange(connection, text.encode())
    assert status in (400, 413)
    assert json.loads(body)["error"]
    assert not any("Traceback" in line for line in server.said)


def test_many_large_bodies_at_once(server: Running) -> None:
    before = server.memory()
    body = json.dumps(question(1, user="x" * 7 * MB)).encode()
    open_: list[socket.socket] = []
    for _ in range(12):
        connection = server.connect()
        connection.settimeout(5)
        open_.append(connection)
        try:
            connection.sendall(post(CHAT, body)[:-10])  # all but the end: the server has to hold it in memory
        except (BrokenPipeError, ConnectionResetError):
            break
    time.sleep(0.5)
    assert server.memory() - before < 150 * MB
    assert server.health()["status"] == "ok"
    for connection in open_:
        connection.close()
    with server.client() as client:  # and its size is subtracted again
        time.sleep(0.2)
        assert client.post("/tokenize", json={"content": "x" * 7 * MB}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + "x" * 200_000 + "\r\n\r\n",
        "GET /" + "x" * 200_000 + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n" + "X: y\r\n" * 30_000 + "\r\n",
        "nonsense\r\n\r\n",
        "\0\1\2\r\n\r\n",
        "GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["header", "target", "headers", "words", "bytes", "version", "chunk", "smuggling"],
)
def test_requests_that_are_none(text: str, server: Running) -> None:
    with server.connect() as connection:
        try:
            status, _, _ = exchange(connection, text.encode())
        except (BrokenPipeError, ConnectionResetError):
            status = 0
    assert status in (0, 400, 415, 431), status
    assert server.health()["status"] == "ok"


def test_requests_before_the_answer_to_the_last_are_not_taken(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(post(CHAT, LONG))
        time.sleep(0.3)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
    server.wait_until_free()


def test_a_full_queue_reports_when_to_retry(server: Running) -> None:
    with contextlib.ExitStack() as held, server.client() as client:
        for _ in range(PARALLEL + QUEUE):
            held.enter_context(endless(server))
        start = time.monotonic()
        while (state := server.health())["waiting"] < QUEUE:
            assert time.monotonic() - start < 20, state
            time.sleep(0.02)
        answer = client.post(CHAT, json=question())
        assert answer.status_code == 429, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        answer = client.post("/v1/messages", json={k: v for k, v in question().items() if k != "seed"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert client.get("/health").status_code == 200
    server.wait_until_free()


def test_all_choices_of_a_request_are_queued_or_none(server: Running) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json=question(2, n=16))
        assert answer.status_code == 429
    server.wait_until_free()
