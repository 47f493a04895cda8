"""Models of Hub repositories, pulled from a small HTTP server that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from commands import edgespec, one_line_error
from tiny import write_tiny
from tiny_hybrids import write_qwen35

from edgespec.app.cli.models import pull
from edgespec.core import EdgespecError
from edgespec.models.gguf.heads import head_for
from edgespec.models.hub import listing
from edgespec.models.hub.listing import pull_repository
from edgespec.models.hub.references import Reference
from edgespec.models.hub.repository import RepositoryFile, RepositoryName, all_pinned, group, parse_name
from edgespec.models.hub.selection import default_model
from edgespec.models.hub.store import remove, resolve

NAME = RepositoryName("someone/tiny-GGUF")


def content(seed: int, size: int = 200_000) -> bytes:
    return b"GGUF" + random.Random(seed).randbytes(size - 4)


@dataclass
class Hub:
    """A repository; `cuts`: bytes of each next answer that are sent before the connection drops."""

    files: dict[str, bytes]
    revision: str = "a" * 40
    hashes: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    gated: bool = False
    private: bool = False
    granted: str = "hf_secret"
    requests: list[str] = field(default_factory=list)

    def listing(self) -> bytes:
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {
                    "sha256": self.hashes.get(name, hashlib.sha256(data).hexdigest()),
                    "size": len(data),
                    "pointerSize": 134,
                },
            }
            for name, data in self.files.items()
        ]
        siblings.append({"rfilename": "README.md", "size": 10})
        return json.dumps(
            {
                "id": NAME.repo,
                "sha": self.revision,
                "siblings": siblings,
                "gated": "auto" if self.gated else False,
            }
        ).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    for name in list(os.environ):
        if name.startswith(("HF_", "EDGESPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    state = Hub(
        {f"tiny-{quant}.gguf": content(i, 9000 - i) for i, quant in enumerate(("Q8_0", "Q4_K_M", "Q3_K_S"))}
    )

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection |= cut is not None

        def do_GET(self) -> None:
            state.requests.append(self.path)
            granted = self.headers.get("Authorization") == f"Bearer {state.granted}"
            prefix = f"/{NAME.repo}/resolve/{state.revision}/"
            if self.path.startswith(f"/api/models/{NAME.repo}?") and (granted or not state.private):
                return self.answer(200, state.listing(), {"Content-Type": "application/json"})
            data = state.files.get(self.path.removeprefix(prefix))
            if data is None:
                return self.answer(401, b"", {"X-Error-Message": "Invalid username or password."})
            if state.gated and not granted:
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            ranges = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.answer(206, data[start:], ranges, state.cuts.pop(0) if state.cuts else None)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    huggingface_hub.close_session()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def failure(name: RepositoryName, models: Path) -> str:
    with pytest.raises(EdgespecError) as caught:
        pull_repository(name, models)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-4B-GGUF", RepositoryName("Qwen/Qwen3-4B-GGUF")),
        ("hf.co/Qwen/Qwen3-4B-GGUF:Q8_0", RepositoryName("Qwen/Qwen3-4B-GGUF", "Q8_0")),
        ("https://huggingface.co/a/b", RepositoryName("a/b")),
        ("a/b:sub/c.gguf", RepositoryName("a/b", "sub/c.gguf")),
        ("qwen2.5-coder-0.5b", None),
        ("models/x.gguf", None),
        ("../a/b", None),
        ("a/..", None),
        ("/a/b", None),
        ("a/b/c", None),
        ("a--b/c", None),
        ("a/b\n", None),
    ],
)
def test_names(text: str, name: RepositoryName | None) -> None:
    assert parse_name(text) == name


def test_the_default_is_pulled_pinned_and_used_without_network(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {"mmproj-tiny-Q4_K_M.gguf": content(7), "draft/tiny-Q4_K_M.gguf": content(8)}
    path = pull_repository(NAME, models)
    assert path == models / "someone--tiny-GGUF" / "tiny-Q4_K_M.gguf"
    assert path.read_bytes() == hub.files["tiny-Q4_K_M.gguf"]
    assert [model.revision for model in all_pinned(models)] == [hub.revision]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    for name in ("someone/tiny-GGUF", "someone/tiny-GGUF:q4_k_m", "hf.co/someone/tiny-GGUF:tiny-Q4_K_M.gguf"):
        assert resolve(name) == path
    with pytest.raises(EdgespecError, match="run `edgespec pull someone/tiny-GGUF:Q8_0`"):
        resolve("someone/tiny-GGUF:Q8_0")
    notes: list[str] = []
    assert pull_repository(NAME, models, note=notes.append) == path
    assert "cannot reach the Hub" in notes[0]
    assert "stays" in notes[0]
    assert pull_repository(NAME, models, offline=True) == path


def test_a_larger_one_is_pulled_by_request_and_a_smaller_one_for_little_memory(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pull_repository(RepositoryName(NAME.repo, "Q8_0"), models).name == "tiny-Q8_0.gguf"
    monkeypatch.setattr(listing, "memory_total", lambda: 12_598)
    assert pull_repository(NAME, models).name == "tiny-Q3_K_S.gguf"
    monkeypatch.setattr(listing, "memory_total", lambda: 5000)
    assert "run `edgespec pull someone/tiny-GGUF:Q3_K_S`" in failure(NAME, models)


def test_split_files_are_pulled_as_one(hub: Hub, models: Path) -> None:
    hub.files = {f"Q4_K_M/t-Q4_K_M-0000{n}-of-00003.gguf": content(n) for n in (1, 2, 3)}
    path = pull_repository(NAME, models)
    assert path.name == "Q4_K_M--t-Q4_K_M-00001-of-00003.gguf"
    assert len(list(path.parent.glob("*.gguf"))) == 3
    assert resolve("someone/tiny-GGUF:Q4_K_M") == path
    path.with_name(path.name.replace("00001-", "00002-")).unlink()
    with pytest.raises(EdgespecError, match=r"00002-of-00003.gguf is missing"):
        resolve("someone/tiny-GGUF")


def test_an_incomplete_or_hostile_listing_has_no_model(hub: Hub, models: Path) -> None:
    hub.files = dict.fromkeys(
        ("../../x-Q4_K_M.gguf", "/etc/y-Q4_K_M.gguf", ".z-Q4_K_M.gguf", "a\nb.gguf"), content(0)
    )
    hub.files["t-Q4_K_M-00001-of-00002.gguf"] = content(1)
    assert "no .gguf model in someone/tiny-GGUF: check the name" in failure(NAME, models)
    assert not models.exists()
    assert group("a/b", "c", [RepositoryFile("x.gguf", 10, "../x")]) == []


def test_a_gated_repository_needs_a_token_which_others_do_not_get(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated = True
    assert (
        failure(NAME, models) == "someone/tiny-GGUF is gated: accept its terms on the Hub, then set HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "access not granted to this token" in failure(NAME, models)
    monkeypatch.setenv("HF_TOKEN", hub.granted)
    assert pull_repository(NAME, models).exists()


def test_a_private_repository_is_listed_with_the_token_of_the_cache(
    hub: Hub, models: Path, tmp_path: Path
) -> None:
    hub.private = hub.gated = True
    assert "private or gated: check the name, or set HF_TOKEN" in failure(NAME, models)
    (tmp_path / "token").write_text(hub.granted)
    assert pull_repository(NAME, models).exists()


def test_a_moved_revision_is_taken_by_pull_alone(hub: Hub, models: Path) -> None:
    old = pull_repository(NAME, models).read_bytes()
    hub.revision, hub.files["tiny-Q4_K_M.gguf"] = "b" * 40, content(9, 9500)
    assert resolve("someone/tiny-GGUF").read_bytes() == old
    notes: list[str] = []
    path = pull_repository(NAME, models, note=notes.append)
    assert notes[0] == "someone/tiny-GGUF: moved from aaaaaaaaaaaa to bbbbbbbbbbbb, which is pinned now"
    assert path.read_bytes() == hub.files["tiny-Q4_K_M.gguf"]
    assert [model.revision for model in all_pinned(models)] == ["b" * 40]


def test_a_wrong_hash_leaves_nothing(hub: Hub, models: Path) -> None:
    hub.hashes["tiny-Q4_K_M.gguf"] = "0" * 64
    assert "wrong SHA-256, deleted" in failure(NAME, models)
    assert [path.suffix for path in (models / "someone--tiny-GGUF").iterdir()] in ([], [".lock"])
    assert all_pinned(models) == []


def test_an_interrupted_download_is_resumed(hub: Hub, models: Path) -> None:
    hub.cuts = [1000, 0]
    assert "no connection" in failure(NAME, models)
    assert all_pinned(models) == []
    assert len(list((models / "someone--tiny-GGUF").glob("*.partial/*.data"))) == 1
    assert pull_repository(NAME, models).read_bytes() == hub.files["tiny-Q4_K_M.gguf"]


def test_without_network_it_says_so(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    assert "cannot reach the Hub for someone/tiny-GGUF" in failure(NAME, models)


def test_a_pulled_model_is_removed_by_name(hub: Hub, models: Path) -> None:
    path, larger = pull_repository(NAME, models), pull_repository(RepositoryName(NAME.repo, "Q8_0"), models)
    with pytest.raises(
        EdgespecError, match=r"choose one of someone/tiny-GGUF:Q4_K_M, someone/tiny-GGUF:Q8_0"
    ):
        remove("someone/tiny-GGUF")
    assert remove("someone/tiny-GGUF:Q4_K_M") > 8999
    assert not path.exists()
    assert resolve("someone/tiny-GGUF") == larger
    with pytest.raises(EdgespecError, match="is not on this machine"):
        remove("someone/tiny-GGUF:Q4_K_M")


def test_damaged_records_do_not_count(hub: Hub, models: Path) -> None:
    path = pull_repository(NAME, models)
    record = path.with_name(f".{path.name}.pin.json")
    for text in ("", "[]", "{}", record.read_text().replace("tiny-Q4_K_M", "../x-Q4_K_M"), "[" * 100_000):
        record.write_text(text)
        assert all_pinned(models) == []


def test_a_command_fetches_what_cannot_be_a_path_and_answers(hub: Hub, models: Path, tmp_path: Path) -> None:
    hub.files = {"t-Q8_0.gguf": write_tiny(tmp_path / "source.gguf", "llama").read_bytes()}
    ask = ("run", "hello", "--max-tokens", "2", "--draft", "none")
    done = edgespec(*ask, "-m", "someone/tiny-GGUF")
    one_line_error(done, "not on this machine", "edgespec pull someone/tiny-GGUF")
    assert hub.requests == []
    done = edgespec(*ask, "-m", "hf.co/someone/tiny-GGUF")
    assert done.returncode == 0, done.stderr
    assert "someone/tiny-GGUF:Q8_0: revision aaaaaaaaaaaa, SHA-256" in done.stderr
    seen = len(hub.requests)
    done = edgespec(*ask, "-m", "someone/tiny-GGUF:q8_0")
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == seen
    names = {row["name"] for row in json.loads(edgespec("models", "--json").stdout)}
    assert "someone/tiny-GGUF:Q8_0" in names
    assert default_model() == "someone/tiny-GGUF:Q8_0"
    assert edgespec("models", "verify").stdout.split()[0] == "good"


def test_a_reference_takes_the_hash_of_the_first_pull_and_its_layer_drafts(
    hub: Hub, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {"t-Q8_0.gguf": write_qwen35(tmp_path / "source.gguf", heads=1).read_bytes()}
    one = Reference("tiny", NAME, "MIT", 1000, 1000, "prediction layer")
    monkeypatch.setattr("edgespec.models.hub.references.load_references", lambda: {"tiny": one})
    monkeypatch.setattr("edgespec.models.hub.store.load_references", lambda: {"tiny": one})
    monkeypatch.setattr("edgespec.app.cli.fetching.load_references", lambda: {"tiny": one})
    with pytest.raises(EdgespecError, match="tiny is not on this machine: run `edgespec pull tiny`"):
        resolve("tiny")
    pull(["tiny"])
    path = resolve("tiny")
    assert one.here(models) is not None
    head = head_for(path)
    assert head is not None
    assert head.name.startswith("t-Q8_0.head-")
    other = write_qwen35(tmp_path / "plain.gguf")
    assert head_for(other) == head  # for every model of the family
    before = head.stat().st_mtime_ns
    pull(["tiny"])
    assert head.stat().st_mtime_ns == before
