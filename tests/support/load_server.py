"""What many, slow and vanishing clients do to a server, in figures: `python tests/support/load_server.py`.

The tests assert what must hold on any machine; how long things take is printed here, and asserted nowhere.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from serving import CHAT, LONG, Running, endless, health_times, p95, post, running, warm

SLOW_SECONDS = 30.0
_DRIP = b"X"


def report(server: Running, name: str, act: Callable[[], list[float]]) -> None:
    """Do `act`, which gives times of /health meanwhile, and print what is left of it."""
    memory, descriptors = server.memory(), server.descriptors()
    times = act()
    grown = server.memory() - memory
    free = server.wait_until_free(60)
    deadline = time.monotonic() + 10
    while server.descriptors() > descriptors and time.monotonic() < deadline:
        time.sleep(0.02)
    left = max(0, server.descriptors() - descriptors)
    print(
        f"{name:<34} health p95 {p95(times) * 1000:5.1f} ms, memory {grown / 1e6:+6.1f} MB, "
        f"slot free after {free:.2f} s, descriptors left {left}",
        flush=True,
    )


def thousand(server: Running) -> list[float]:
    """1,000 connections of which each asks for a long answer."""
    storm = [server.connect() for _ in range(1000)]
    for connection in storm:
        connection.sendall(post(CHAT, LONG | {"stream": True}))
    times = health_times(server, 60)
    for connection in storm:
        connection.close()
    return times


def slow(server: Running) -> list[float]:
    """200 clients that send a byte of a header a second; who is let go connects again."""
    clients: list[socket.socket] = []
    times: list[float] = []
    end = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end:
        alive = []
        for connection in clients:
            try:
                connection.sendall(_DRIP)
                connection.settimeout(0)
                if connection.recv(1):
                    alive.append(connection)
                else:
                    connection.close()
            except BlockingIOError:
                alive.append(connection)
            except OSError:
                connection.close()
        clients = alive
        while len(clients) < 200:
            clients.append(server.connect())
            clients[-1].sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: ")
        times += health_times(server, 5)
        time.sleep(1)
    for connection in clients:
        connection.close()
    return times


def leaving(server: Running, when: str) -> list[float]:
    """100 clients, one after the other, that go away."""
    times: list[float] = []
    for i in range(100):
        match when:
            case "while the prompt is read":
                words = [{"role": "user", "content": f"{i} " + "word " * 3000}]
                connection = endless(server, messages=words)
                time.sleep(0.1)
            case "in the middle of a stream":
                connection = endless(server, stream=True)
                connection.recv(1000)
            case _:
                connection = endless(server)
                time.sleep(0.1)
        connection.close()
        times += health_times(server, 1)
    return times


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with running(folder, "--draft", "none", "--parallel", "1", tcp=False) as server:
            warm(server)
            report(server, "1,000 connections, one slot", lambda: thousand(server))
            report(server, "200 slow clients for 30 s", lambda: slow(server))
            for when in ("while the prompt is read", "in the middle of a stream", "not streaming"):
                report(server, f"100 leave {when}", lambda when=when: leaving(server, when))  # type: ignore[misc]
            if any("Traceback" in line for line in server.said):
                sys.exit("the server printed a traceback")


if __name__ == "__main__":
    main()
