"""The SQLite file of the history: permissions, migrations, damage, error messages."""

# ruff: noqa: S608 - every name that is put into a statement is defined in this file

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

if sys.platform != "win32":
    import fcntl

_HEADER = 100  # bytes at the start of every SQLite file
_APPLICATION = 0x45647370  # "Edsp" in the header of the file identifies the program


def _indexed(table: str, column: str) -> tuple[str, ...]:
    """The statements that create a full-text index `table_words` of `column` of `table`, kept by triggers."""
    index = f"{table}_words"
    add = f"INSERT INTO {index}(rowid, {column}) VALUES (new.id, new.{column});"
    remove = f"INSERT INTO {index}({index}, rowid, {column}) VALUES ('delete', old.id, old.{column});"
    return (
        f"CREATE VIRTUAL TABLE {index} USING fts5({column}, content='{table}', content_rowid='id', "
        "tokenize='unicode61 remove_diacritics 2', prefix='1 2 3')",
        f"CREATE TRIGGER {index}_insert AFTER INSERT ON {table} BEGIN {add} END",
        f"CREATE TRIGGER {index}_update AFTER UPDATE OF {column} ON {table} BEGIN {remove} {add} END",
        f"CREATE TRIGGER {index}_delete AFTER DELETE ON {table} BEGIN {remove} END",
        f"INSERT INTO {index}({index}) VALUES ('rebuild')",
    )


# Entry n migrates version n to n + 1. A released entry is never changed.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT, head INTEGER, pinned INTEGER NOT NULL,
            created REAL NOT NULL, updated REAL NOT NULL, deleted_at REAL, title TEXT NOT NULL,
            model TEXT NOT NULL, persona TEXT NOT NULL, sampling TEXT NOT NULL, system TEXT NOT NULL
        ) STRICT""",
        """CREATE INDEX conversations_shown ON conversations (pinned DESC, updated DESC, id DESC)
            WHERE deleted_at IS NULL""",
        # The id of a child is larger than that of its parent. `chosen`: the child shown last.
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT, conversation INTEGER NOT NULL REFERENCES conversations,
            parent INTEGER REFERENCES messages CHECK (parent < id), chosen INTEGER, role TEXT NOT NULL,
            state TEXT NOT NULL, created REAL NOT NULL, stats TEXT NOT NULL, text TEXT NOT NULL,
            sources TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX messages_siblings ON messages (conversation, parent)",
        "CREATE INDEX messages_children ON messages (parent)",
        "CREATE INDEX messages_partial ON messages (id) WHERE state = 'partial'",
        # Text appended to a message since `text` was written: rewriting that each time would be quadratic.
        """CREATE TABLE pieces (
            id INTEGER PRIMARY KEY, message INTEGER NOT NULL REFERENCES messages, text TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX pieces_message ON pieces (message)",
    ),
    (*_indexed("messages", "text"), *_indexed("conversations", "title")),
)

_SURROGATE = re.compile("[\ud800-\udfff]")
_BUSY = "is in use by another program: close it, or try again"
_LOCKED_OUT = "cannot be opened or written: check its permissions, or set EDGESPEC_DATA to another folder"
_DAMAGED = "is damaged: start Edgespec again, which recovers it"
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_FAULTS = {
    sqlite3.SQLITE_BUSY: _BUSY,
    sqlite3.SQLITE_LOCKED: _BUSY,
    sqlite3.SQLITE_FULL: "cannot grow because the disk is full: free some space and try again",
    sqlite3.SQLITE_IOERR: "cannot be read or written: check the disk and its free space",
    **dict.fromkeys((sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM), _LOCKED_OUT),
    **dict.fromkeys(_DAMAGE, _DAMAGED),
}


class _Damaged(Exception):  # noqa: N818 - never leaves this module
    """Carries the connection that found the damage, or None."""


class Presence:
    """A lock on an open history, through a lock file next to it. It ends with the process.

    `alone` is whether no other process holds it: then a message in state `partial` has no writer, and the
    file may be renamed. Other processes wait until `settled`. On Windows, which has no such locks, every
    process is `alone`: an open file cannot be renamed there.
    """

    def __init__(self, path: Path, wait: float) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.alone = True
        if sys.platform != "win32":
            until = time.monotonic() + wait
            self.alone = self._take(fcntl.LOCK_EX)
            while not self.alone and not self._take(fcntl.LOCK_SH):
                if time.monotonic() > until:
                    self.close()
                    raise BlockingIOError
                time.sleep(0.01)

    def _take(self, kind: int) -> bool:
        if sys.platform != "win32":
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def settled(self) -> None:
        if sys.platform != "win32":
            while not self._take(fcntl.LOCK_SH):  # some systems release a lock before they change its kind
                time.sleep(0.01)

    def close(self) -> None:
        os.close(self._file)


class Database:
    """An open history file, migrated to the current version and checked for damage.

    A new file gets mode 0600, a new folder 0700. `note` is a message for the user, empty unless a damaged
    file was set aside. `wait` is in seconds, for another process that holds the file. Raises EdgespecError if
    the file cannot be used. To be used in the thread that opened it.
    """

    def __init__(self, path: Path, wait: float) -> None:
        self.path, self.note, self._wait = path.absolute(), "", wait
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._presence = Presence(path.with_name(path.name + ".lock"), wait)
        except BlockingIOError:
            raise self._fault(_BUSY) from None
        except OSError:
            raise self._fault(_LOCKED_OUT) from None
        try:
            self._db = self._open()
            self._presence.settled()
        except BaseException:
            self._presence.close()
            raise

    def close(self) -> None:
        self._db.close()
        self._presence.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A read transaction: every read inside it sees the same state. Raises EdgespecError."""
        try:
            if self._db.in_transaction:
                yield self._db
            else:
                with _transaction(self._db, "DEFERRED"):
                    yield self._db
        except sqlite3.Error as error:
            raise self._explained(error) from None

    @contextmanager
    def writing(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """A write transaction. Once committed it survives a kill, and a power failure if `durable`."""
        try:
            if not durable:
                self._db.execute("PRAGMA synchronous = NORMAL")
            with _transaction(self._db):
                yield self._db
        except sqlite3.Error as error:
            raise self._explained(error) from None
        finally:
            if not durable:
                self._db.execute("PRAGMA synchronous = FULL")

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except _Damaged as damage:
            (db,) = damage.args
        try:
            if not self._presence.alone:
                raise self._fault(
                    "is damaged and open in another chat: close the other chats and start again"
                )
            if sys.platform == "win32" and db is not None:
                db.close()
            kept = self._set_aside()
        finally:
            if db is not None:
                db.close()  # after the file is renamed: closing deletes a log that cannot be read
        db = self._connect()
        count = self._rescue(db, kept)
        result = f"{count} of its conversations were recovered" if count else "the history starts empty"
        self.note = one_line(f"history {self.path} was damaged and renamed to {kept.name}: {result}")
        return db

    def _connect(self) -> sqlite3.Connection:
        self._make()
        db: sqlite3.Connection | None = None
        try:
            db = sqlite3.connect(self.path.as_uri(), uri=True, timeout=self._wait, isolation_level=None)
            self._prepare(db)
        except sqlite3.Error as error:
            if _code(error) & 0xFF in _DAMAGE:
                raise _Damaged(db) from None
            if db is not None:
                db.close()
            raise self._explained(error) from None
        except EdgespecError:
            if db is not None:
                db.close()
            raise
        return db

    def _make(self) -> None:
        wal = self.path.with_name(self.path.name + "-wal")
        try:
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            with suppress(PermissionError):
                self.path.chmod(0o600)  # SQLite gives its other files the same
            size = self.path.stat().st_size
            if 0 < size < _HEADER or (not size and wal.exists() and wal.stat().st_size):
                # SQLite would treat it as a new file, and drop the log of one that was truncated.
                raise _Damaged(None)
        except OSError:
            raise self._fault(_LOCKED_OUT) from None

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.text_factory = lambda data: data.decode("utf-8", "replace")
        if sqlite3.sqlite_version_info < (3, 37) or not _one(
            db, "SELECT count(*) FROM pragma_module_list WHERE name = 'fts5'"
        ):
            raise EdgespecError(
                f"SQLite {sqlite3.sqlite_version} cannot hold the history: use a Python with 3.37 and FTS5"
            )
        if _one(db, "SELECT count(*) FROM sqlite_schema"):
            if _one(db, "PRAGMA application_id") != _APPLICATION:
                raise self._fault("is the database of another program: set EDGESPEC_DATA to another folder")
            if _one(db, "PRAGMA user_version") > len(MIGRATIONS):
                raise self._fault(
                    "is of a newer version: update Edgespec, or set EDGESPEC_DATA to another folder"
                )
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}")
        if self._presence.alone and not _sound_pages(db):  # the first process has checked them
            raise _Damaged(db)
        if _one(db, "PRAGMA user_version") < len(MIGRATIONS):
            with _transaction(db):
                version = _one(db, "PRAGMA user_version")  # another process may have been faster
                for statement in (s for step in MIGRATIONS[version:] for s in step):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION}")
                db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        if self._presence.alone:
            orphans = db.execute("SELECT id FROM messages WHERE state = 'partial'").fetchall()
            with _transaction(db):
                for (message,) in orphans:
                    settle(db, message, "stopped")

    def _set_aside(self) -> Path:
        """Rename the file, its log and its shared memory. Returns the new path."""
        stamp = f"{self.path.stem}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{stamp}{more}{self.path.suffix}" for more in ("", *(f"-{n}" for n in range(2, 1000))))
        kept = next(path for path in map(self.path.with_name, names) if not path.exists())
        try:
            for ending in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + ending).rename(f"{kept}{ending}")
        except OSError:
            raise self._fault("is damaged and cannot be renamed: move it away") from None
        return kept

    def _rescue(self, db: sqlite3.Connection, kept: Path) -> int:
        """Copy all rows of `kept` if each of them can be read, as when only an index is damaged, else none.

        Returns the number of conversations copied.
        """
        # From a copy: SQLite may write to a file that it opens, and delete its log.
        with suppress(sqlite3.Error, OSError), tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            copy = Path(folder) / "copy.db"
            for ending in ("", "-wal"):
                with suppress(FileNotFoundError):
                    shutil.copyfile(f"{kept}{ending}", f"{copy}{ending}")
            db.execute("ATTACH ? AS damaged", (str(copy),))
            with suppress(sqlite3.Error), _transaction(db):
                for table in ("conversations", "messages", "pieces"):
                    db.execute(f"INSERT INTO {table} SELECT * FROM damaged.{table} NOT INDEXED")
            db.execute("DETACH damaged")
        return _one(db, "SELECT count(*) FROM conversations")

    def _explained(self, error: sqlite3.Error) -> Exception:
        """The exception to raise for `error`. A damaged search index is rebuilt first."""
        code = _code(error)
        if code == sqlite3.SQLITE_CORRUPT_VTAB:
            with suppress(sqlite3.Error):
                for index in ("messages_words", "conversations_words"):
                    self._db.execute(f"INSERT INTO {index}({index}) VALUES ('rebuild')")
                return self._fault("had a damaged search index, which is rebuilt: try again")
        if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            return gone()
        return self._fault(_FAULTS[code & 0xFF]) if code & 0xFF in _FAULTS else error

    def _fault(self, what: str) -> EdgespecError:
        return EdgespecError(f"history {one_line(str(self.path))} {what}")


def settle(db: sqlite3.Connection, message: int, state: str) -> None:
    """Append the pieces of a message to its text, and set its state."""
    db.execute(
        """UPDATE messages SET state = ?1, text = text || coalesce((SELECT group_concat(text, '')
            FROM (SELECT text FROM pieces WHERE message = ?2 ORDER BY id)), '') WHERE id = ?2""",
        (state, message),
    )
    db.execute("DELETE FROM pieces WHERE message = ?", (message,))


def sound(text: str) -> str:
    """Replace every lone surrogate by U+FFFD, so that SQLite can store the text."""
    return _SURROGATE.sub("\ufffd", text)


def gone() -> EdgespecError:
    return EdgespecError("no such conversation in the history")


@contextmanager
def _transaction(db: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    try:
        db.execute(f"BEGIN {kind}")  # immediate for writes: a read lock cannot always become a write lock
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _sound_pages(db: sqlite3.Connection) -> bool:
    """Check the pages of every table and its indexes. Reads the whole file."""
    # Table by table: without a name, newer versions of SQLite also check every word of the search index.
    tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0").fetchall()
    quoted = [table.replace('"', '""') for (table,) in tables]
    return all(db.execute(f'PRAGMA quick_check("{table}")').fetchone() == ("ok",) for table in quoted)


def _one(db: sqlite3.Connection, statement: str) -> int:
    """Return the number that a statement selects."""
    return int(db.execute(statement).fetchone()[0])


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0)
