"""The user's texts for drafts by retrieval: the database, and the indexes built from it.

Texts are stored in one SQLite file, because every vocabulary splits them differently. An index is built for
each tokenizer when a model needs it. Text of past sessions is private: it is kept only after `edgespec corpus
remember on`, at most the last megabyte, and `remember off` deletes it again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from edgespec.core import EdgespecError
from edgespec.machine.paths import user_folder
from edgespec.text import printable

if TYPE_CHECKING:  # their import would slow the start of the command line down
    from sqlite3 import Connection

    from edgespec.corpus import Corpus

MAX_TEXT = 32_000_000
MAX_SESSIONS = 1_000_000
"""The most bytes of UTF-8 kept: of all named texts, and of past sessions."""

T = TypeVar("T")

_SESSION = ""  # the name of texts from past sessions: no file has it
_INDEXES_KEPT = 4
_CHUNK = 1 << 16
_SCHEMA = """
PRAGMA auto_vacuum = FULL;
PRAGMA secure_delete = ON;
CREATE TABLE IF NOT EXISTS texts (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, text TEXT NOT NULL,
    bytes INTEGER NOT NULL, added INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS texts_by_name ON texts (name);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
# AUTOINCREMENT: ids are never reused, so the list of ids identifies the texts that an index was built from.


class Tokenizer(Protocol):
    """The part of models.vocab.Vocab that an index needs."""

    @property
    def size(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...


class TextSource(NamedTuple):
    """A named text: `name` is the file's full path, `added` in seconds since 1970."""

    name: str
    bytes: int
    added: int


class Sessions(NamedTuple):
    """Whether questions and answers are remembered; the number remembered, and their bytes."""

    remember: bool
    texts: int
    bytes: int


class Added(NamedTuple):
    """How many texts are new or changed, how many existed already, and which were deleted to make room."""

    added: int
    unchanged: int
    dropped: tuple[str, ...]


def corpus_folder() -> Path:
    """Return EDGESPEC_CORPUS, or `edgespec/corpus` in the user's data folder. May not exist yet."""
    return user_folder("data", "EDGESPEC_CORPUS", "corpus")


# --- for programs that run a model ---


def index_for(vocab: Tokenizer, digest: str, note: Callable[[str], None] | None = None) -> Corpus | None:
    """Return the index of all texts for the tokenizer with this digest; None without texts.

    An outdated index is updated now, at about 4 µs per token of new text. While another process does that,
    the existing one is returned. `note` gets what is left out. Raises EdgespecError if the store is unusable.
    """
    if not _database_path().exists():
        return None
    from edgespec.corpus import Corpus

    path = corpus_folder() / f"{digest}.index"

    def stored() -> Corpus | None:
        with suppress(EdgespecError):  # missing or damaged: it can be built again from the texts
            return Corpus.open(path, vocab_size=vocab.size)
        return None

    def is_current(index: Corpus | None) -> bool:
        return not ids or (index is not None and index.key == _keys(ids)[-1])

    ids = _ids()
    index = stored() if ids else None
    if is_current(index):
        return index
    try:
        with _lock(0):
            ids, index = _ids(), stored()
            if not is_current(index):
                index = _updated(index, ids, vocab, note or (lambda _: None))
                index.save(path)
                _tidy()
    except _BusyError:
        pass
    return index if ids else None


def remember(prompt_text: str, answer_text: str) -> None:
    """Store a question and its answer, if the user has switched that on.

    Above MAX_SESSIONS bytes, the oldest quarter is deleted. Raises EdgespecError.
    """
    if not _database_path().exists():
        return
    with _database() as db:
        if not _remembers(db):
            return
        _insert(db, [(_SESSION, text[-MAX_SESSIONS // 8 :]) for text in (prompt_text, answer_text) if text])
        rows = db.execute("SELECT id, bytes FROM texts WHERE name = ? ORDER BY id", [_SESSION]).fetchall()
        if sum(size for _, size in rows) > MAX_SESSIONS:
            # A quarter, because an index can only grow: it is rebuilt whenever a text is deleted.
            gone = _oldest(rows, MAX_SESSIONS * 3 // 4)
            db.executemany("DELETE FROM texts WHERE id = ?", [(id_,) for id_ in gone])


def _ids() -> list[int]:
    with _database() as db:
        return [id_ for (id_,) in db.execute("SELECT id FROM texts ORDER BY id")]


def _keys(ids: Sequence[int]) -> list[bytes]:
    """Return the keys of indexes built from the first text, from the first two, and so on."""
    digest = hashlib.sha256()
    keys = []
    for id_ in ids:
        digest.update(b"%d " % id_)
        keys.append(digest.digest())
    return keys


def _updated(index: Corpus | None, ids: list[int], vocab: Tokenizer, note: Callable[[str], None]) -> Corpus:
    """Return `index` with the texts it lacks, or a new one if it is not built from the first of `ids`."""
    from edgespec.corpus import MAX_TOKENS, Corpus, build

    keys = _keys(ids)
    if index is not None and index.key in keys:
        new = ids[keys.index(index.key) + 1 :]
        with suppress(ValueError):  # it is full
            return index.extended((_tokens(vocab, text, MAX_TOKENS) for text in _texts(new)), key=keys[-1])
    room = MAX_TOKENS * 15 // 16  # if it were full, the next session would make it start over
    documents: list[list[int]] = []
    for text in _texts(ids[::-1]):
        document = _tokens(vocab, text, room)
        if len(document) == room:
            if documents:
                break
            note(f"the newest text in the corpus is used only up to its token {room - 1:,}")
            document.pop()
        documents.append(document)
        room -= len(document) + 1
    if left_out := len(ids) - len(documents):
        note(f"the corpus exceeds {MAX_TOKENS:,} tokens: its {left_out} oldest texts are not used")
    return Corpus(*build(documents[::-1]), key=keys[-1])


def _texts(ids: Sequence[int]) -> Iterator[str]:
    with _database() as db:
        for id_ in ids:
            yield from (
                text for (text,) in db.execute("SELECT text FROM texts WHERE id = ?", [id_]).fetchall()
            )


def _tokens(vocab: Tokenizer, text: str, room: int) -> list[int]:
    """Return at most `room` tokens. Split at line ends, as tokenizing takes memory for the whole input."""
    tokens: list[int] = []
    start = 0
    while start < len(text) and len(tokens) < room:
        stop = start + _CHUNK
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        tokens += vocab.tokenize(text[start:stop])
        start = stop
    return tokens[:room]


def _tidy() -> None:
    """Delete all but the newest indexes, and parts of any whose build was killed. Called under the lock."""
    indexes = sorted(corpus_folder().glob("*.index"), key=lambda path: path.stat().st_mtime)
    for path in [*indexes[:-_INDEXES_KEPT], *corpus_folder().glob(".*.index.*")]:
        path.unlink(missing_ok=True)


# --- the store ---


def source_name(path: Path) -> str:
    """Return the name of a file's text: its full path, links resolved."""
    return os.fsencode(os.path.realpath(path)).decode("utf-8", "replace")


def add(texts: Mapping[str, str]) -> Added:
    """Store texts by name, each replacing the one of that name; above MAX_TEXT the oldest are deleted.

    Raises EdgespecError.
    """
    with _lock(), _database() as db:
        known = {name for (name,) in db.execute("SELECT name FROM texts")}
        same = "SELECT 1 FROM texts WHERE name = ? AND text = ?"
        new = {name: text for name, text in texts.items() if not db.execute(same, [name, text]).fetchone()}
        _delete(db, [name for name in new if name in known])
        _insert(db, new.items())
        rows = db.execute("SELECT name, bytes FROM texts WHERE name != ? ORDER BY id", [_SESSION]).fetchall()
        dropped = _oldest(rows, MAX_TEXT)
        _delete(db, dropped)
    return Added(len(new), len(texts) - len(new), tuple(dropped))


def sources() -> list[TextSource]:
    """Return the named texts, oldest first."""
    if not _database_path().exists():
        return []
    query = "SELECT name, bytes, added FROM texts WHERE name != ? ORDER BY id"
    with _database() as db:
        return [TextSource(*row) for row in db.execute(query, [_SESSION])]


def sessions() -> Sessions:
    """Return what is remembered of past sessions."""
    if not _database_path().exists():
        return Sessions(False, 0, 0)
    query = "SELECT count(*), coalesce(sum(bytes), 0) FROM texts WHERE name = ?"
    with _database() as db:
        return Sessions(_remembers(db), *db.execute(query, [_SESSION]).fetchone())


def remove(wanted: str) -> list[str]:
    """Delete a text by path or unambiguous file name, or all texts in a folder; return their names.

    Raises EdgespecError if there is none.
    """
    names = [source.name for source in sources()]
    full = source_name(Path(wanted))
    found = [name for name in names if name == full or Path(full) in Path(name).parents]
    if not found:
        found = [name for name in names if Path(name).name == wanted]
        if len(found) > 1:
            raise EdgespecError(f"{len(found)} texts match {printable(wanted)}: give the whole path")
    if not found:
        raise EdgespecError(f"no text matches {printable(wanted)}: run `edgespec corpus list`")
    with _lock(), _database() as db:
        _delete(db, found)
    return found


def set_remember(on: bool) -> None:
    """Switch `remember` on or off. Off deletes what it stored."""
    if not on and not _database_path().exists():
        return
    with _lock(), _database() as db:
        db.execute("INSERT OR REPLACE INTO settings VALUES ('remember', ?)", ["on" if on else "off"])
        if not on:
            _delete(db, [_SESSION])


def clear() -> int:
    """Delete all texts, indexes and settings, damaged or not; return the bytes freed.

    Raises EdgespecError.
    """
    folder = corpus_folder()
    if not folder.is_dir():
        return 0
    freed = 0
    with _lock():
        for path in [*_index_files(), *folder.glob(f"{_database_path().name}*")]:
            freed += path.lstat().st_size
            path.unlink()
    return freed


def _database_path() -> Path:
    return corpus_folder() / "texts.sqlite"


@contextmanager
def _database() -> Iterator[Connection]:
    """Open one transaction, under the lock if the store may not exist yet. Raises EdgespecError."""
    import sqlite3

    path = _database_path()
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(path)) as db, db:
            db.executescript(_SCHEMA)
            yield db
    except OSError as error:
        raise EdgespecError(f"cannot use the corpus {printable(path)}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise EdgespecError(
            f"cannot use the corpus {printable(path)} ({error}): if damaged, run `edgespec corpus clear`"
        ) from None


class _BusyError(EdgespecError):
    pass


@contextmanager
def _lock(seconds: float = 30) -> Iterator[None]:
    """Hold the lock for building indexes and deleting texts, so that no deleted text remains in an index."""
    from filelock import FileLock, Timeout

    folder = corpus_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = FileLock(folder / ".lock", mode=0o600).acquire(seconds)
    except Timeout:
        raise _BusyError("another process is changing the corpus: try again when it is done") from None
    except OSError as error:
        raise EdgespecError(f"cannot write in {printable(folder)}: {error.strerror}") from None
    with held:
        yield


def _remembers(db: Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM settings WHERE name = 'remember' AND value = 'on'").fetchone())


def _insert(db: Connection, texts: Iterable[tuple[str, str]]) -> None:
    now = int(time.time())
    rows = ((name, text.encode("utf-8", "replace"), now) for name, text in texts)
    db.executemany(
        "INSERT INTO texts (name, text, bytes, added) VALUES (?, ?, ?, ?)",
        ((name, data.decode(), len(data), now) for name, data, now in rows),
    )


def _delete(db: Connection, names: Sequence[str]) -> None:
    """Delete texts, and the indexes built from them before that. Called under the lock."""
    if names:
        for path in _index_files():
            path.unlink()
        db.executemany("DELETE FROM texts WHERE name = ?", [(name,) for name in names])


def _index_files() -> list[Path]:
    folder = corpus_folder()
    return [*folder.glob("*.index"), *folder.glob(".*.index.*")]


def _oldest(rows: Sequence[tuple[T, int]], limit: int) -> list[T]:
    """Return the first of (item, bytes) to delete so that at most `limit` bytes remain."""
    total = sum(size for _, size in rows)
    gone = []
    for what, size in rows:
        if total <= limit:
            break
        gone.append(what)
        total -= size
    return gone
