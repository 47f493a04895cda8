"""The file of the history: errors, damage, migrations."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from histories import talk, texts

from edgespec.app.history import db as history_db
from edgespec.app.history.db import Presence
from edgespec.app.history.store import History
from edgespec.core import EdgespecError

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes, locks and pipes of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History(path) as history:
        yield history


# --- errors ---


def test_a_lock_of_another_process_is_waited_for_and_then_reported(path: Path) -> None:
    with History(path, wait=0.05) as history, closing(sqlite3.connect(path, isolation_level=None)) as other:
        (first,) = talk(history, "kept")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(EdgespecError, match="in use by another program"):
            history.append(first.conversation, "user", "lost")
        assert texts(history.branch(first.conversation)) == ["kept"]
        other.execute("ROLLBACK")
        history.append(first.conversation, "user", "then")
        assert texts(history.branch(first.conversation)) == ["kept", "then"]


@posix
def test_another_process_that_opens_the_file_is_waited_for(path: Path) -> None:
    path.parent.mkdir()
    other = Presence(path.with_name("history.db.lock"), 0)
    try:
        with pytest.raises(EdgespecError, match="in use by another program"):
            History(path, wait=0.05)
        other.settled()
        History(path, wait=0.05).close()
    finally:
        other.close()


def test_a_full_disk_loses_nothing_that_was_stored(path: Path) -> None:
    with History(path) as history:
        (first,) = talk(history, "kept")
        with history._file.writing() as db:  # the only way to fill the disk for this file alone
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(EdgespecError, match="disk is full"):
            history.append(first.conversation, "user", "x" * 100_000)
        with history._file.reading() as db:
            db.execute("PRAGMA max_page_count = 1000000")
        history.append(first.conversation, "user", "y" * 100_000)
        assert [text[0] for text in texts(history.branch(first.conversation))] == ["k", "y"]


def test_a_path_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgespecError, match="EDGESPEC_DATA"):
        History(tmp_path / "file" / "history.db")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(EdgespecError, match="EDGESPEC_DATA"):
        History(tmp_path / "folder.db")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_reported(path: Path) -> None:
    History(path).close()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(EdgespecError, match="permissions"):
            History(path)
    finally:
        path.parent.chmod(0o700)


def test_the_database_of_another_program_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE bookmarks (x)")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(EdgespecError, match="of another program"):
        History(path)
    assert path.read_bytes() == before


def test_a_newer_file_is_refused_and_not_touched(path: Path) -> None:
    History(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {len(history_db.MIGRATIONS) + 1}")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(EdgespecError, match="of a newer version: update"):
        History(path)
    assert path.read_bytes() == before


# --- damage ---


def damaged(path: Path) -> list[Path]:
    return sorted(file for file in path.parent.iterdir() if ".damaged-" in file.name and file.suffix == ".db")


def filled(path: Path) -> None:
    with History(path) as history:
        for n in range(12):
            talk(history, f"question {n} " + "q" * 300, f"answer {n} " + "a" * 3000 * (n % 3))


def test_a_damaged_file_is_set_aside_and_nothing_is_deleted(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    cuts = (1, 99, 100, 4096, 10_000, len(whole) // 2, len(whole) - 4096)
    broken = [b"x" * len(whole), b"SQLite format 3\0" + b"\xff" * 5000, os.urandom(4096) + whole[4096:]]
    for data in [*broken, *(whole[:cut] for cut in cuts)]:
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(data)
        with History(path) as history:
            (kept,) = damaged(path)
            assert kept.read_bytes() == data
            assert kept.name in history.note
            assert "damaged" in history.note
            (message,) = talk(history, "new")
        with History(path) as history:
            assert history.note == ""
            assert texts(history.branch(message.conversation)) == ["new"]
        assert damaged(path) == [kept]


def test_any_page_may_be_flipped(path: Path) -> None:
    """The file is set aside or used, with no exception but EdgespecError; damaged indexes lose nothing."""
    filled(path)
    whole = path.read_bytes()
    outcomes = []
    for page in range(len(whole) // 4096):
        for file in path.parent.iterdir():
            file.unlink()
        data, at = (
            bytearray(whole),
            page * 4096 + (0, 1500)[page % 2],
        )  # the header of the page, or its contents
        data[at : at + 200] = bytes(255 - byte for byte in data[at : at + 200])
        path.write_bytes(data)
        with History(path) as history:
            outcome = history.note
            if outcome:
                (kept,) = damaged(path)
                assert kept.read_bytes() == data
                assert kept.name in outcome
            for _ in range(2):  # the first search rebuilds a damaged index
                try:
                    history.search("question")
                    for about in history.conversations():
                        history.branch(about.id)
                    talk(history, "and on")
                except EdgespecError as error:
                    assert "damaged search index" in str(error)  # noqa: PT017 - it may not be raised
                else:
                    break
            else:
                pytest.fail("the index was not rebuilt")
            outcomes.append("recovered" if "12 of" in outcome else "empty" if outcome else "used")
    assert set(outcomes) == {"recovered", "empty", "used"}, outcomes


def test_several_damaged_files_in_one_second(path: Path) -> None:
    for n in range(3):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not a database" * 100)
        path.with_name("history.db-wal").write_bytes(b"log")
        History(path).close()
        assert len(damaged(path)) == n + 1
    logs = [file for file in path.parent.iterdir() if file.name.endswith(".db-wal")]
    assert [file.read_bytes() for file in logs] == [b"log"] * 3


def test_a_truncated_file_keeps_its_log(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    path.with_name("history.db-wal").write_bytes(b"log")
    with History(path) as history:
        assert history.note
    (kept,) = damaged(path)
    assert kept.with_name(kept.name + "-wal").read_bytes() == b"log"


def test_chats_that_start_together_find_the_damage_once(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    notes: list[str] = []
    start = threading.Barrier(4)

    def chat() -> None:
        start.wait()
        with History(path) as history:
            notes.append(history.note)
            talk(history, "q", "a")

    threads = [threading.Thread(target=chat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(damaged(path)) == 1
    assert sorted(map(bool, notes)) == [False, False, False, True]
    with History(path) as history:
        assert len(history.conversations()) == 4


@posix
def test_a_damaged_file_that_is_open_elsewhere_stays(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    other = Presence(path.with_name("history.db.lock"), 0)
    other.settled()
    try:
        with pytest.raises(EdgespecError, match="close the other chats"):
            History(path)
    finally:
        other.close()
    assert damaged(path) == []


def test_a_damaged_search_index_is_rebuilt(path: Path, history: History) -> None:
    talk(history, "needle " * 50, "hay")
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE messages_words_data SET block = x'ff00ff' WHERE id > 10")
        db.commit()
    with pytest.raises(EdgespecError, match="rebuilt: try again"):
        history.search("hay")
    assert len(history.search("hay")) == 1


# --- migrations ---

_VERSION_1 = Path(__file__).parents[2] / "support" / "history_v1.sql"


def test_a_file_of_the_first_version_is_migrated(path: Path) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(_VERSION_1.read_text("utf-8"))
    with History(path) as history:
        assert history.note == ""
        first, second = history.conversations()
        assert (first.title, first.pinned, first.system, first.sampling) == (
            "Zwei",
            True,
            "Kurz.",
            {"seed": 7},
        )
        assert texts(history.branch(second.id)) == ["What is a café?", "A place."]
        assert [m.text for m in history.messages(second.id)] == ["What is a café?", "It is", "A place."]
        assert [hit.message for hit in history.search("cafe")] == [None, 1]
        history.append(second.id, "user", "And a bar?")
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(history_db.MIGRATIONS),)
        old = db.execute("SELECT sql FROM sqlite_schema ORDER BY name").fetchall()
    fresh = path.with_name("fresh.db")
    History(fresh).close()
    with closing(sqlite3.connect(fresh)) as db:
        assert db.execute("SELECT sql FROM sqlite_schema ORDER BY name").fetchall() == old


def test_a_migration_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        before = list(db.iterdump())
    with monkeypatch.context() as patch:
        patch.setattr(history_db, "MIGRATIONS", (*history_db.MIGRATIONS, ("CREATE TABLE more (x)", "NO SQL")))
        with pytest.raises(sqlite3.OperationalError):
            History(path)
    with closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before
    with History(path) as history:
        assert len(history.conversations()) == 12
