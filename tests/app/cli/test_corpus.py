"""`edgespec corpus` on the command line, and the index of a real model."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from corpora import DIGEST, Letters, split, words

from edgespec.app.cli import corpus, main
from edgespec.app.engine import corpus_store
from edgespec.core import EdgespecError

ROOT = Path(__file__).parents[3]
posix = pytest.mark.skipif(os.name != "posix", reason="links, pipes and modes of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDGESPEC_CORPUS", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def texts(tmp_path) -> Path:
    """A folder with two texts to add, and files to skip."""
    top = tmp_path / "texts"
    (top / "deeper").mkdir(parents=True)
    (top / ".git").mkdir()
    (top / "one.txt").write_text("The quick brown fox jumps over the lazy dog.\n")
    (top / "deeper" / "two.txt").write_text("Sphinx of black quartz, judge my vow.\n")
    (top / ".git" / "config").write_text("hidden folder")
    (top / ".env").write_text("SECRET=1")
    (top / "binary").write_bytes(b"\x7fELF\0\1\2")
    (top / "latin").write_bytes("naïve".encode("latin-1"))
    (top / "empty").write_text(" \n")
    return top


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def edgespec(*arguments: object) -> Done:
    """Run the command in this process: a new process would take most of the time."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["edgespec", "corpus", *map(str, arguments)])
        try:
            main.main()
        except SystemExit as exit_:
            code = exit_.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line of the error."""
    done = edgespec(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def listed() -> list[str]:
    return [Path(row["name"]).name for row in json.loads(edgespec("list", "--json").stdout)["sources"]]


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


# --- the commands ---


def test_from_files_to_drafts(starter, texts):
    """From files to the tokens of the starter model and their continuation."""
    assert (
        edgespec("add", ROOT / "README.md", texts / "one.txt").stdout == "added 2, unchanged 0, skipped 0\n"
    )
    vocab = starter.vocab
    index = corpus_store.index_for(vocab, starter.summary.tokenizer_digest)
    assert index is not None
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [vocab.detokenize(document) for document in split(index.text.tolist())] == [
        readme,
        (texts / "one.txt").read_text(),
    ]
    context = vocab.tokenize("Somebody wrote: The quick brown fox jumps")
    tokens, probabilities, length = index.continuation(context, 16)
    assert vocab.detokenize(tokens) == " over the lazy dog.\n"
    assert set(probabilities) == {1.0}
    assert length == len(vocab.tokenize(" quick brown fox jumps"))


def test_the_program_itself(texts):
    command = [sys.executable, "-m", "edgespec.app.cli.main", "corpus"]

    def run(*arguments: object) -> tuple[int, str, str]:
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, done.stderr

    assert run("add", texts / "one.txt") == (0, "added 1, unchanged 0, skipped 0\n", "")
    code, out, err = run("rm", "nothing")
    assert (code, out) == (1, "")
    assert err == "edgespec: no text matches nothing: run `edgespec corpus list`\n"


def test_list_says_what_there_is(texts):
    assert "corpus add" in edgespec("list").stdout
    edgespec("add", texts / "one.txt")
    line = edgespec("list").stdout
    assert str(texts / "one.txt") in line
    assert " 45 " in line
    data = json.loads(edgespec("list", "--json").stdout)
    assert data["sessions"] == {"remember": False, "texts": 0, "bytes": 0}
    (row,) = data["sources"]
    assert row["name"] == str(texts / "one.txt")
    assert row["bytes"] == 45
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(row["added"])).total_seconds()) < 60


def test_a_folder_is_taken_only_when_asked_for(texts):
    assert "--recursive" in refused("add", texts)
    assert listed() == []
    assert edgespec("add", "-r", texts).stdout == "added 2, unchanged 0, skipped 3\n"
    assert listed() == ["one.txt", "two.txt"]


@posix
def test_links_in_a_folder_are_not_followed(texts, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "private.txt").write_text("private")
    (texts / "link.txt").symlink_to(tmp_path / "outside" / "private.txt")
    (texts / "linked").symlink_to(tmp_path / "outside")
    (texts / "deeper" / "loop").symlink_to(texts)
    (texts / "deeper" / "up.txt").symlink_to("../one.txt")
    os.mkfifo(texts / "pipe")
    assert edgespec("add", "--recursive", texts).stdout == "added 2, unchanged 0, skipped 4\n"
    assert listed() == ["one.txt", "two.txt"]
    edgespec("add", texts / "link.txt")  # the user named this one
    assert listed() == ["one.txt", "two.txt", "private.txt"]


@posix
def test_a_file_that_turns_into_a_link_is_not_followed(texts, tmp_path, monkeypatch):
    (tmp_path / "private.txt").write_text("private")
    (texts / "one.txt").unlink()
    (texts / "one.txt").symlink_to(tmp_path / "private.txt")
    monkeypatch.setattr(Path, "is_symlink", lambda path: False)
    found, _ = corpus.read_texts([texts], True)
    assert [Path(name).name for name in found] == ["two.txt"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("binary", "not text"), ("latin", "UTF-8"), ("empty", "empty"), ("none", "No such file"),
        ("large", "larger than 16 MB"),
    ],
)  # fmt: skip
def test_a_named_file_that_cannot_be_taken_stops_all(texts, name, why):
    if name == "large":
        (texts / "large").write_bytes(b"a" * (corpus.MAX_FILE + 1))
    line = refused("add", texts / "one.txt", texts / name)
    assert why in line
    assert name in line
    assert listed() == []


def test_a_name_cannot_steer_the_terminal(texts):
    name = texts / "evil\x1b[2J\n.txt"
    name.write_text("text")
    edgespec("add", name)
    for output in (edgespec("list").stdout, refused("rm", "no\x1b[2J")):
        assert "\x1b" not in output
        assert len(output.splitlines()) == 1
    assert edgespec("rm", name).returncode == 0


def test_the_same_file_again_replaces_its_text(texts, folder):
    edgespec("add", texts / "one.txt", texts / "deeper" / "two.txt")
    index = corpus_store.index_for(Letters(), DIGEST)
    assert edgespec("add", texts / "one.txt").stdout == "added 0, unchanged 1, skipped 0\n"
    again = corpus_store.index_for(Letters(), DIGEST)
    assert index is not None
    assert again is not None
    assert index.key == again.key
    (texts / "one.txt").write_text("Pack my box.\r\n")
    assert edgespec("add", texts / "deeper" / ".." / "one.txt").stdout == "added 1, unchanged 0, skipped 0\n"
    assert words(corpus_store.index_for(Letters(), DIGEST)) == [
        "Sphinx of black quartz, judge my vow.\n",
        "Pack my box.\n",
    ]
    assert b"quick brown" not in everything_in(folder)


def test_rm_by_path_name_and_folder(texts, folder):
    edgespec("add", "-r", texts, ROOT / "README.md")
    edgespec("add", ROOT / "tests" / "support" / "tiny.py")
    (texts / "tiny.py").write_text("another")
    edgespec("add", texts / "tiny.py")
    assert "2 texts" in refused("rm", "tiny.py")
    assert "corpus list" in refused("rm", "nothing")
    assert edgespec("rm", "README.md").stdout == "removed 1\n"
    corpus_store.index_for(Letters(), DIGEST)
    (texts / "one.txt").unlink()  # removing does not need the file
    assert edgespec("rm", texts / "one.txt").stdout == "removed 1\n"
    assert b"quick brown" not in everything_in(folder)
    assert not list(folder.glob("*.index"))
    assert edgespec("rm", texts).stdout == "removed 2\n"
    assert listed() == ["tiny.py"]
    assert (texts / "tiny.py").exists()


def test_clear_leaves_nothing(texts, folder):
    assert edgespec("clear").stdout == "freed 0 MB\n"
    edgespec("add", texts / "one.txt")
    edgespec("remember", "on")
    corpus_store.remember("a question", "an answer")
    corpus_store.index_for(Letters(), DIGEST)
    assert edgespec("clear").stdout.startswith("freed 0.0")
    assert [path.name for path in folder.iterdir() if path.stat().st_size] == []
    assert corpus_store.index_for(Letters(), DIGEST) is None
    assert corpus_store.sessions() == (False, 0, 0)


@pytest.mark.parametrize("damage", [b"not a database" * 100, None])
def test_a_damaged_store_says_so_and_can_be_cleared(texts, folder, damage):
    edgespec("add", texts / "one.txt")
    path = folder / "texts.sqlite"
    if damage is None:
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    else:
        path.write_bytes(damage)
    assert "`edgespec corpus clear`" in refused("list")
    with pytest.raises(EdgespecError, match="corpus clear"):
        corpus_store.index_for(Letters(), DIGEST)
    assert edgespec("clear").returncode == 0
    assert edgespec("add", texts / "one.txt").returncode == 0


@posix
def test_only_the_owner_may_read(texts, folder):
    edgespec("add", texts / "one.txt")
    corpus_store.index_for(Letters(), DIGEST)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 3


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(texts, folder):
    folder.mkdir(mode=0o500)
    assert "Permission denied" in refused("add", texts / "one.txt")


def test_a_store_that_is_a_file(texts, folder):
    folder.write_text("in the way")
    assert "store" in refused("add", texts / "one.txt")


def test_too_much_at_once_is_refused(texts, monkeypatch):
    monkeypatch.setattr(corpus_store, "MAX_TEXT", 60)
    with pytest.raises(EdgespecError, match="add less"):
        corpus.read_texts([texts], True)


def test_the_oldest_go_when_there_is_too_much(monkeypatch):
    monkeypatch.setattr(corpus_store, "MAX_TEXT", 10)
    assert corpus_store.add({"a": "1234", "b": "5678"}).dropped == ()
    corpus_store.set_remember(True)
    corpus_store.remember("what was said", "is bounded by itself")
    assert corpus_store.add({"c": "90", "d": "12"}).dropped == ("a",)
    assert [source.name for source in corpus_store.sources()] == ["b", "c", "d"]
    assert corpus_store.sessions().texts == 2


# --- past sessions ---


def test_nothing_is_remembered_unless_switched_on(folder):
    corpus_store.remember("a question", "an answer")
    assert not folder.exists()
    corpus_store.add({"a": "text"})
    corpus_store.remember("a question", "an answer")
    assert corpus_store.sessions() == (False, 0, 0)
    assert b"an answer" not in everything_in(folder)


def test_remember_on_and_off(folder):
    assert edgespec("remember", "off").returncode == 0
    assert not folder.exists()
    assert str(folder) in edgespec("remember", "on").stdout
    corpus_store.remember("a question", "an answer")
    corpus_store.remember("", "only \ud800 an answer")
    assert corpus_store.sessions() == (True, 3, 35)
    assert "3 prompts and answers" in edgespec("list").stdout
    assert words(corpus_store.index_for(Letters(), DIGEST)) == ["a question", "an answer", "only ? an answer"]
    assert "no text matches" in refused("rm", "")
    edgespec("remember", "off")
    corpus_store.remember("a question", "an answer")
    assert corpus_store.sessions() == (False, 0, 0)
    assert b"an answer" not in everything_in(folder)
    assert edgespec("remember", "maybe").returncode == 2


def test_what_is_remembered_is_bounded():
    corpus_store.set_remember(True)
    for i in range(12):
        corpus_store.remember("", f"{i:03}" * 30_000)
        assert corpus_store.sessions().bytes <= corpus_store.MAX_SESSIONS
    last = [text[:3] for text in words(corpus_store.index_for(Letters(), DIGEST))]
    assert last == [f"{i:03}" for i in range(12 - len(last), 12)]
    assert len(last) >= 8
    corpus_store.remember("", "x" * 5_000_000)
    assert corpus_store.sessions().bytes <= corpus_store.MAX_SESSIONS


def test_many_processes_at_once():
    """Each remembers while others add and index, and nothing is lost."""
    corpus_store.set_remember(True)
    code = (
        "import sys; from edgespec.app.engine import corpus_store as corpus\n"
        "class V:\n size = 256\n def tokenize(self, text): return list(text.encode())\n"
        "for i in range(5):\n"
        "    corpus.remember('', f'said by {sys.argv[1]} {i}')\n"
        "    corpus.add({f'{sys.argv[1]} {i}': f'added by {sys.argv[1]} {i}'})\n"
        f"    corpus.index_for(V(), '{DIGEST}')\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(4)]
    assert [process.wait(120) for process in processes] == [0] * 4
    found = words(corpus_store.index_for(Letters(), DIGEST))
    assert sorted(found) == sorted(
        f"{did} by {n} {i}" for did in ("said", "added") for n in range(4) for i in range(5)
    )


def test_the_store_is_plain_sqlite(folder):
    corpus_store.add({"a": "text"})
    db = sqlite3.connect(folder / "texts.sqlite")
    try:
        assert db.execute("SELECT name, text FROM texts").fetchall() == [("a", "text")]
    finally:
        db.close()
