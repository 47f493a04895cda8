"""Clients that disconnect, are slow or many; and the server being stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import (
    CHAT,
    LONG,
    MODEL,
    Running,
    command,
    endless,
    exchange,
    health_times,
    post,
    question,
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


@pytest.mark.parametrize("when", ["prefill", "not streaming", "streaming", "waiting", "at once", "half"])
def test_a_client_that_disconnects_leaves_nothing_behind(when: str, server: Running) -> None:
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
    server.wait_until_free()
    server.wait_for_descriptors(before)


def test_a_client_that_disconnects_does_not_disturb_others(server: Running) -> None:
    # The grammar determines the text, so that rounding in a larger batch cannot change it.
    given = question(300, grammar={"type": "regex", "value": "(one two three ){30}"})
    with server.client() as client, ThreadPoolExecutor() as pool:
        other = pool.submit(lambda: client.post(CHAT, json=given).json())
        for _ in range(5):
            connection = endless(server, stream=True)
            connection.recv(200)
            connection.close()
        (choice,) = other.result()["choices"]
    assert choice["message"]["content"] == "one two three " * 30
    assert choice["finish_reason"] == "stop"


ALIVE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
SLOW = (
    "import edgespec.app.serve.connections as c\n"
    "c.REQUEST_SECONDS, c.BODY_SECONDS, c.IDLE_SECONDS, c.WRITE_SECONDS = 1.0, 2.0, 2, 1.0\n"
    "import edgespec.app.serve.apis.streaming as s\ns.KEEP_ALIVE_SECONDS = 0.3\n"
)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with short timeouts."""
    with running(tmp_path_factory.mktemp("hasty"), "--draft", "none", tcp=False, patch=SLOW) as one:
        warm(one)
        yield one


@pytest.mark.parametrize(
    ("first", "drip", "seconds"),
    [(b"", b"", 1), (b"GET", b"", 1), (b"GET /health HTTP/1.1\r\n", b"X: y\r\n", 1),
     (post(CHAT, LONG)[:-50], b" ", 2)],
    ids=["nothing", "a word", "headers", "body"],
)  # fmt: skip
def test_a_slow_client_is_disconnected(first: bytes, drip: bytes, seconds: float, hasty: Running) -> None:
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
            time.sleep(1.2)  # longer than the timeout of a request, shorter than that of an idle connection
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


def test_a_client_that_does_not_read_is_disconnected(hasty: Running) -> None:
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
    health_times(hasty, 30)  # each gets a response; how soon: load_server.py
    hasty.wait_for_descriptors(before + 2)
    assert hasty.memory() - memory < 50 * MB
    for connection in slow:
        connection.close()


def test_1000_connections(server: Running) -> None:
    before, memory = server.descriptors(), server.memory()
    request = post(CHAT, LONG | {"stream": True})
    storm = [server.connect() for _ in range(1000)]
    answers: list[int] = []
    for connection in storm[:500]:  # half of them send a request
        connection.sendall(request)
    health_times(server, 40)
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
    server.wait_until_free()
    server.wait_for_descriptors(before + 2)


def test_more_connections_than_it_may_have(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    patch = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    with running(folder, "--draft", "none", tcp=False, patch=patch) as server:
        first = server.connect()
        assert exchange(first, ALIVE)[0] == 200
        storm = [server.connect() for _ in range(400)]
        time.sleep(0.5)
        assert exchange(first, ALIVE)[0] == 200  # open connections are served
        closed = 0
        for connection in storm:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                closed += 1
        first.close()
        assert 250 < closed < 400
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


@pytest.mark.parametrize(
    "patch",
    [
        "import time, edgespec.app.engine.loading as o\no.load_engine = lambda *a, **k: time.sleep(60)\n",
        # In a callback of native code, which swallows exceptions.
        "import os, signal, edgespec.app.engine.loading as o\nreal = o.load_engine\n"
        "def load(*a, **k):\n"
        "    said = a[1]\n"
        "    def progress(share): os.kill(os.getpid(), signal.SIGTERM); return said(share)\n"
        "    return real(a[0], progress)\n"
        "o.load_engine = load\n",
    ],
    ids=["elsewhere", "in native code"],
)
def test_stopping_while_the_model_is_read(patch: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    path = folder / "edgespec.sock"
    process = subprocess.Popen(
        [*command(patch), "serve", "-m", MODEL, "--socket", str(path)], stderr=subprocess.PIPE, text=True
    )
    if "os.kill" not in patch:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "Traceback" not in printed
    assert "ignored" not in printed
    assert not path.exists()


def test_a_second_server_is_refused(server: Running) -> None:
    second = subprocess.run(
        [*command(), "serve", "-m", MODEL, "--socket", str(server.path)], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert "a server is running on" in second.stderr
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


def test_a_socket_of_systemd_is_served_and_left(tmp_path: Path) -> None:
    """As a unit with ListenStream= starts it: the socket exists before and after."""
    path = tmp_path / "s"
    code = (
        "import os, sys\nos.dup2(int(sys.argv.pop(1)), 3)\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
        "from edgespec.app.cli.main import main\nmain()"
    )
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        options = ["serve", "-m", MODEL, "--threads", "1", "--draft", "none"]
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(listening.fileno()), *options],
            pass_fds=[listening.fileno()], env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "no")},
        )  # fmt: skip
        server = Running(process, path)
        assert server.health()["status"] == "ok"  # a client that connects early waits
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert path.exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["s"]
