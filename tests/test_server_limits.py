"""What clients may not do to a server: too much, too slow, too deep, and going away."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, Running, command, exchange, post, question, read_answer, running

PARALLEL, QUEUE = 2, 12
MB = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ["--draft", "none", "--parallel", str(PARALLEL), "--queue", str(QUEUE)]
    with running(tmp_path_factory.mktemp("limits"), *options) as one:
        warm(one)
        yield one


def warm(server: Running) -> None:
    """What the first answer starts (the process of templates, threads) is not counted against later ones."""
    with server.client() as client:
        assert client.post(CHAT, json=question(2, response_format={"type": "json_object"})).status_code == 200


CHAT = "/v1/chat/completions"
LONG = question(3000, logit_bias={"2": -100, "0": -100})  # never ends by itself: seconds of work


def endless(server: Running, **more: Any) -> socket.socket:
    """A connection with a long answer under way."""
    connection = server.connect()
    connection.sendall(post(CHAT, LONG | more))
    if more.get("stream"):
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


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
        asked = [
            pool.submit(client.post, CHAT, json=question(8, response_format=form)),
            pool.submit(client.post, CHAT, json=question(8, tools=[tool], tool_choice="required")),
        ]
        times = health_times(server, 10)
        for one in asked:
            answer = one.result()
            assert answer.status_code in (200, 400), answer.text
            assert answer.status_code == 200 or len(answer.json()["error"]["message"]) < 1000
    assert time.monotonic() - start < 30
    assert p95(times) < 0.5, times


def send_much(connection: socket.socket, size: int, chunked: bool) -> None:
    part = b"x" * MB
    for _ in range(size // MB):
        connection.sendall(b"%x\r\n%s\r\n" % (MB, part) if chunked else part)


@pytest.mark.parametrize("how", ["said", "chunked", "continue"])
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
                pass  # it may stop listening: what it says is still there
        status, _, body = read_answer(connection)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "request_too_large"
    assert time.monotonic() - start < 10
    assert server.memory() - before < 50 * MB


def test_a_body_shorter_than_said(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(post("/tokenize", b'{"content": "x"}').replace(b"Length: 16", b"Length: 17"))
        connection.shutdown(socket.SHUT_WR)
        assert read_answer(connection)[0] in (0, 400)


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "99999999999999999999"])
def test_a_length_that_is_none(length: str, server: Running) -> None:
    text = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    with server.connect() as connection:
        status, _, body = exchange(connection, text.encode())
    assert status in (400, 413)
    assert json.loads(body)["error"]


def test_many_large_bodies_at_once(server: Running) -> None:
    before = server.memory()
    body = json.dumps(question(1, user="x" * 7 * MB)).encode()
    open_: list[socket.socket] = []
    for _ in range(12):
        connection = server.connect()
        connection.settimeout(5)
        open_.append(connection)
        try:
            connection.sendall(post(CHAT, body)[:-10])  # all but the end: the server has to keep it
        except (BrokenPipeError, ConnectionResetError):
            break
    time.sleep(0.5)
    assert server.memory() - before < 150 * MB
    assert server.health()["status"] == "ok"
    for connection in open_:
        connection.close()
    with server.client() as client:  # and it is counted back
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


def test_a_full_queue_says_when_to_come_back(server: Running) -> None:
    held = [endless(server) for _ in range(PARALLEL + QUEUE)]
    deadline = time.monotonic() + 20
    while server.health()["waiting"] < QUEUE and time.monotonic() < deadline:
        time.sleep(0.02)
    with server.client() as client:
        answer = client.post(CHAT, json=question())
        assert answer.status_code == 429, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        answer = client.post("/v1/messages", json={k: v for k, v in question().items() if k != "seed"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (429, "rate_limit_error")
        assert client.get("/health").status_code == 200
    for connection in held:
        connection.close()
    server.wait_until_free()


def test_many_that_ask_for_several_answers_are_let_in_whole_or_not(server: Running) -> None:
    with server.client() as client:
        answer = client.post(CHAT, json=question(2, n=16))
        assert answer.status_code == 429
    server.wait_until_free()


@pytest.mark.parametrize("when", ["prefill", "not streaming", "streaming", "waiting", "at once", "half"])
def test_who_goes_away_leaves_nothing_behind(when: str, server: Running) -> None:
    before = server.descriptors()
    for _ in range(8):
        match when:
            case "prefill":
                prompt = [{"role": "user", "content": "word " * 3500}]
                connection = endless(server, messages=prompt)
                time.sleep(0.15)
            case "not streaming":
                connection = endless(server)
                time.sleep(0.1)
            case "streaming":
                connection = endless(server, stream=True)
                connection.recv(1000)
            case "waiting":
                others = [endless(server) for _ in range(PARALLEL)]
                connection = endless(server)
                time.sleep(0.1)
                connection.close()
                connection = others[0]
                others[1].close()
            case "at once":
                connection = server.connect()
                connection.sendall(post(CHAT, LONG))
            case _:
                connection = server.connect()
                connection.sendall(post(CHAT, LONG)[:-10])
        connection.close()
    assert server.wait_until_free() < 2.0
    deadline = time.monotonic() + 5
    while server.descriptors() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.descriptors() <= before


def test_who_goes_away_does_not_disturb_the_others(server: Running) -> None:
    with server.client() as client:
        alone = client.post(CHAT, json=question(60)).json()["choices"][0]["message"]["content"]
        with ThreadPoolExecutor() as pool:
            other = pool.submit(lambda: client.post(CHAT, json=question(60)).json())
            for _ in range(5):
                connection = endless(server, stream=True)
                connection.recv(200)
                connection.close()
            answer = other.result()
    assert answer["choices"][0]["message"]["content"] == alone


SLOW = (
    "import edgespec.app.connections as c\n"
    "c.REQUEST_SECONDS, c.BODY_SECONDS, c.IDLE_SECONDS, c.WRITE_SECONDS = 1.0, 2.0, 2, 1.0\n"
    "import edgespec.app.streams as s\ns.KEEP_ALIVE_SECONDS = 0.3\n"
)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with little patience."""
    with running(tmp_path_factory.mktemp("hasty"), "--draft", "none", tcp=False, patch=SLOW) as one:
        warm(one)
        yield one


@pytest.mark.parametrize(
    ("first", "drip", "seconds"),
    [(b"", b"", 1), (b"GET", b"", 1), (b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 1),
     (post(CHAT, LONG)[:-50], b" ", 2)],
    ids=["nothing", "a word", "headers", "body"],
)  # fmt: skip
def test_who_is_too_slow_is_let_go(first: bytes, drip: bytes, seconds: float, hasty: Running) -> None:
    start = time.monotonic()
    with hasty.connect() as connection:
        connection.settimeout(0.2)
        connection.sendall(first)
        while time.monotonic() - start < 8:
            try:
                connection.sendall(drip)
                if not connection.recv(100):
                    break
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
    assert seconds - 0.3 < time.monotonic() - start < seconds + 3


def test_an_idle_connection_may_come_back_in_time(hasty: Running) -> None:
    with hasty.connect() as connection:
        for _ in range(3):
            assert exchange(connection, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 200
            time.sleep(1.2)  # longer than a request may take, shorter than a connection may idle
        time.sleep(3)
        assert connection.recv(10) == b""


def test_a_stream_that_waits_is_kept_alive(hasty: Running) -> None:
    with endless(hasty), endless(hasty, stream=True) as waiting:
        received = b""
        deadline = time.monotonic() + 10
        while b": keep-alive" not in received and time.monotonic() < deadline:
            received += waiting.recv(1000)
    assert b"\n: keep-alive\n\n" in received or b": keep-alive\n" in received
    hasty.wait_until_free()


def test_who_does_not_read_is_let_go(hasty: Running) -> None:
    wordy = {"stream": True, "n": 2, "logprobs": True, "top_logprobs": 20}
    connection = hasty.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(post(CHAT, LONG | wordy))
    assert connection.recv(10)
    assert hasty.wait_until_free(30) > 1.0
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(65536):
            pass
    connection.close()


def test_200_slow_clients(hasty: Running) -> None:
    before, memory = hasty.descriptors(), hasty.memory()
    slow = [hasty.connect() for _ in range(200)]
    for connection in slow:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: ")
    times = health_times(hasty, 30)
    assert p95(times) < 0.1, times
    time.sleep(2)
    assert hasty.descriptors() <= before + 2
    assert hasty.memory() - memory < 50 * MB
    for connection in slow:
        connection.close()


def health_times(server: Running, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        assert server.health()["status"] == "ok"
        times.append(time.perf_counter() - start)
    return times


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]


def test_1000_connections(server: Running) -> None:
    before, memory = server.descriptors(), server.memory()
    request = post(CHAT, question(400, stream=True))
    storm = [server.connect() for _ in range(1000)]
    answers: list[int] = []
    for connection in storm[:500]:  # half of them ask
        connection.sendall(request)
    times = health_times(server, 40)
    assert p95(times) < 0.1, times
    assert server.memory() - memory < 50 * MB
    for connection in storm[:500]:
        connection.settimeout(0.5)
        try:
            answers.append(int(connection.recv(100).split()[1]))
        except TimeoutError:
            answers.append(0)
    assert answers.count(429) > 400
    assert answers.count(200) == PARALLEL + QUEUE
    for connection in storm:
        connection.close()
    assert server.wait_until_free() < 2.0
    time.sleep(0.5)
    assert server.descriptors() <= before + 2


def test_more_connections_than_it_may_have(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    patch = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    with running(folder, "--draft", "none", tcp=False, patch=patch) as server:
        storm = [server.connect() for _ in range(400)]
        time.sleep(0.5)
        closed = 0
        for connection in storm:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                closed += 1
        assert 100 < closed < 300
        for connection in storm:
            connection.close()
        time.sleep(0.3)
        assert server.health()["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("streaming", [True, False])
def test_stopping(number: signal.Signals, streaming: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with running(folder, "--draft", "none", tcp=False) as server:
        busy, waiting = endless(server, stream=streaming), endless(server, stream=streaming)
        time.sleep(0.5)
        start = time.monotonic()
        server.process.send_signal(number)
        assert server.process.wait(10) == 0
        assert time.monotonic() - start < 5
        assert not server.path.exists()
        for connection in (busy, waiting):
            received = b""
            while part := connection.recv(65536):
                received += part
            assert b"[DONE]" not in received
            if not streaming:
                assert received.startswith(b"HTTP/1.1 503")
            connection.close()
        assert not any("Traceback" in line for line in server.said), server.said


def test_stopping_while_the_model_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    path = folder / "edgespec.sock"
    patch = "import time\nimport edgespec.app.options as o\no.load_engine = lambda *a, **k: time.sleep(60)\n"
    process = subprocess.Popen([*command(patch), "serve", "-m", MODEL, "--socket", str(path)])
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not path.exists()


def test_a_second_server_is_refused(server: Running) -> None:
    second = subprocess.run(
        [*command(), "serve", "-m", MODEL, "--socket", str(server.path)], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "A server answers on" in second.stderr
    assert server.health()["status"] == "ok"


def test_threads_are_not_left_behind(server: Running) -> None:
    def count() -> int:
        return sum(1 for _ in Path(f"/proc/{server.process.pid}/task").iterdir())

    with server.client() as client:
        client.post(CHAT, json=question(2))
        before = count()
        started = [threading.Thread(target=lambda: client.post(CHAT, json=question(2))) for _ in range(10)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert count() <= before + 8
