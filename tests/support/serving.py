"""A running `edgespec serve`, and raw HTTP to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
from pydantic import BaseModel

MODEL = "smollm2-135m"


def command(patch: str = "") -> list[str]:
    return [sys.executable, "-c", f"{patch}\nfrom edgespec.app.cli.main import main\nmain()"]


@dataclass
class Running:
    """One server: `path` of its socket, `port` and `token` of its TCP side."""

    process: subprocess.Popen[str]
    path: Path
    port: int = 0
    token: str = ""
    said: list[str] = field(default_factory=list)

    def client(self, tcp: bool = False, **options: Any) -> httpx2.Client:
        if tcp:
            headers = {"authorization": f"Bearer {self.token}"}
            return httpx2.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, **options)
        transport = httpx2.HTTPTransport(uds=str(self.path))
        return httpx2.Client(base_url="http://localhost", transport=transport, timeout=60, **options)

    def connect(self, tcp: bool = False) -> socket.socket:
        if tcp:
            return socket.create_connection(("127.0.0.1", self.port), timeout=30)
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(30)
        made.connect(str(self.path))
        return made

    def health(self) -> dict[str, Any]:
        with self.client() as client:
            answer: dict[str, Any] = client.get("/health").json()
        return answer

    def wait_until_free(self, seconds: float = 10.0) -> float:
        """How long it took until nothing ran and nothing waited."""
        start = time.monotonic()
        while (state := self.health())["running"] or state["waiting"]:
            assert time.monotonic() - start < seconds, state
            time.sleep(0.02)
        return time.monotonic() - start

    def descriptors(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def wait_for_descriptors(self, most: int, seconds: float = 10.0) -> None:
        """Until no more than `most` are open."""
        start = time.monotonic()
        while self.descriptors() > most:
            assert time.monotonic() - start < seconds, self.descriptors()
            time.sleep(0.02)

    def memory(self) -> int:
        """Bytes resident, without the shared."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"RssAnon:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


@contextmanager
def running(
    folder: Path, *options: str, tcp: bool = True, env: dict[str, str] | None = None, patch: str = ""
) -> Iterator[Running]:
    """A server that has the model, until the block is left. `patch` is Python to run in it first."""
    path = folder / "edgespec.sock"
    listening = ["--tcp", "127.0.0.1:0"] if tcp else []
    process = subprocess.Popen(
        [
            *command(patch),
            "serve",
            "-m",
            MODEL,
            "--socket",
            str(path),
            "--threads",
            "1",
            *listening,
            *options,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EDGESPEC_DATA": str(folder), **(env or {})},
    )
    server = Running(process, path)
    listener: threading.Thread | None = None
    assert process.stderr is not None
    try:
        for line in process.stderr:
            server.said.append(line)
            if found := re.search(r"is served on 127\.0\.0\.1:(\d+)", line):
                server.port = int(found[1])
            if "is served on" in line and (server.port or not tcp):
                break
        listener = threading.Thread(target=server.said.extend, args=(process.stderr,), daemon=True)
        listener.start()
        assert process.poll() is None, server.said
        if tcp:
            server.token = (folder / "server-token").read_text().strip()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            if listener is not None:
                listener.join(5)
            process.stderr.close()


def exchange(connection: socket.socket, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send `data`, read one answer that has a length or ends with the connection: status, headers, body."""
    connection.sendall(data)
    return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(65536)
        if not part:
            return 0, {}, received
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        body += connection.recv(65536)
    return int(first.split()[1]), headers, body


def post(path: str, body: bytes | dict[str, Any], *headers: str, host: str = "localhost") -> bytes:
    """A POST request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines: Sequence[str] = [
        f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json",
        f"Content-Length: {len(data)}", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def question(max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    messages = [{"role": "user", "content": "Name a colour."}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **more}


@contextmanager
def openai_client(server: Running, tcp: bool) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, as it is."""
    if tcp:
        base, key = f"http://127.0.0.1:{server.port}/v1", server.token
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as client:
            yield client
        return
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.path))) as http:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0)


@contextmanager
def anthropic_client(server: Running, tcp: bool) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client, as it is."""
    if tcp:
        base, key = f"http://127.0.0.1:{server.port}", server.token
        with anthropic.Anthropic(base_url=base, api_key=key, max_retries=0) as client:
            yield client
        return
    with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(server.path))) as http:
        yield anthropic.Anthropic(
            base_url="http://localhost", api_key="none", http_client=http, max_retries=0
        )


def strict(model: type[BaseModel], value: BaseModel) -> None:
    """`value` is what its class says: the SDKs themselves do not look."""
    model.model_validate_json(value.model_dump_json(warnings=False), strict=True)


CITY: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "maximum": 50},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
PARIS: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
COLOUR: Any = [{"role": "user", "content": "Name a colour."}]


CHAT = "/v1/chat/completions"
LONG = question(3000, logit_bias={"2": -100, "0": -100})  # never ends by itself: seconds of work


def warm(server: Running) -> None:
    """What the first answer starts (the process of templates, threads) is not counted against later ones."""
    with server.client() as client:
        assert client.post(CHAT, json=question(2, response_format={"type": "json_object"})).status_code == 200


def endless(server: Running, **more: Any) -> socket.socket:
    """A connection with a long answer under way."""
    connection = server.connect()
    connection.sendall(post(CHAT, LONG | more))
    if more.get("stream"):
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    return connection


def health_times(server: Running, count: int) -> list[float]:
    """Seconds of `count` requests, each on a connection of its own."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        with server.connect() as connection:
            assert exchange(connection, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200
        times.append(time.perf_counter() - start)
        time.sleep(0.01)
    return times


def p95(times: list[float]) -> float:
    return statistics.quantiles(times, n=20)[-1]
