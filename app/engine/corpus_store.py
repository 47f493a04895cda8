"""Texts the user lends for guessing ahead: where they are kept, and their indexes.

They are kept as text, in one SQLite file, because every vocabulary cuts text differently. An index is made of
them for each tokenizer when a model asks for it. What was said in past sessions is private: it is kept only
after `edgespec corpus remember on`, at most the last megabyte, and `remember off` deletes it again.
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

if TYPE_CHECKING:  # these cost the command line its quick start
    from sqlite3 import Connection

    from edgespec.corpus import Corpus

MAX_TEXT = 32_000_000
MAX_SESSIONS = 1_000_000
"""Bytes of UTF-8 kept at most: of all named texts, and of past sessions."""

T = TypeVar("T")

_SESSION = ""  # the name of what past sessions said: no file has it
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
# AUTOINCREMENT: an id is never used again, so the list of ids says exactly what an index was made of.


class Tokenizer(Protocol):
    """What an index needs of a models.vocab.Vocab."""

    @property
    def size(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...


class TextSource(NamedTuple):
    """A named text: `name` is the file's whole path, `added` in seconds since 1970."""

    name: str
    bytes: int
    added: int


class Sessions(NamedTuple):
    """Whether questions and answers are remembered; how many are, and their bytes."""

    remember: bool
    texts: int
    bytes: int


class Added(NamedTuple):
    """How many texts are new or changed, how many were there already, and which had to go for them."""

    added: int
    unchanged: int
    dropped: tuple[str, ...]


def corpus_folder() -> Path:
    """EDGESPEC_CORPUS, or `edgespec/corpus` in the user's data folder. May not exist yet."""
    return user_folder("data", "EDGESPEC_CORPUS", "corpus")


# --- for whoever runs a model ---


def index_for(vocab: Tokenizer, digest: str, say: Callable[[str], None] | None = None) -> Corpus | None:
    """The index of all texts for the tokenizer with this digest (of a GgufSummary); None without texts.

    Where it is not up to date it is brought up to date now, at about 4 µs a token of new text. While another
    process does that, what there is serves. `say` hears what is left out. Raises EdgespecError if the store
    cannot be used.
    """
    if not _database_path().exists():
        return None
    from edgespec.corpus import Corpus

    path = corpus_folder() / f"{digest}.index"

    def stored() -> Corpus | None:
        with suppress(EdgespecError):  # not there, or damaged: the texts are, so it can be made again
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
                index = _updated(index, ids, vocab, say or (lambda _: None))
                index.save(path)
                _tidy()
    except _BusyError:
        pass
    return index if ids else None


def remember(prompt_text: str, answer_text: str) -> None:
    """Keep what was asked and answered, if the user has switched that on.

    When MAX_SESSIONS bytes are exceeded, the oldest quarter is deleted. Raises EdgespecError.
    """
    if not _database_path().exists():
        return
    with _database() as db:
        if not _remembers(db):
            return
        _insert(db, [(_SESSION, text[-MAX_SESSIONS // 8 :]) for text in (prompt_text, answer_text) if text])
        rows = db.execute("SELECT id, bytes FROM texts WHERE name = ? ORDER BY id", [_SESSION]).fetchall()
        if sum(size for _, size in rows) > MAX_SESSIONS:
            # A quarter, because an index can only grow: for every text that goes it is made anew.
            gone = _oldest(rows, MAX_SESSIONS * 3 // 4)
            db.executemany("DELETE FROM texts WHERE id = ?", [(id_,) for id_ in gone])


def _ids() -> list[int]:
    with _database() as db:
        return [id_ for (id_,) in db.execute("SELECT id FROM texts ORDER BY id")]


def _keys(ids: Sequence[int]) -> list[bytes]:
    """What says that an index was made of the first text, of the first two, and so on."""
    digest = hashlib.sha256()
    keys = []
    for id_ in ids:
        digest.update(b"%d " % id_)
        keys.append(digest.digest())
    return keys


def _updated(index: Corpus | None, ids: list[int], vocab: Tokenizer, say: Callable[[str], None]) -> Corpus:
    """`index` and the texts it lacks, or a new one if it was not made of the first of `ids`."""
    from edgespec.corpus import MAX_TOKENS, Corpus, build

    keys = _keys(ids)
    if index is not None and index.key in keys:
        new = ids[keys.index(index.key) + 1 :]
        with suppress(ValueError):  # it is full
            return index.extended((_tokens(vocab, text, MAX_TOKENS) for text in _texts(new)), key=keys[-1])
    room = MAX_TOKENS * 15 // 16  # if it were full, the next session would be a reason to start over
    documents: list[list[int]] = []
    for text in _texts(ids[::-1]):
        document = _tokens(vocab, text, room)
        if len(document) == room:
            if documents:
                break
            say(f"The newest text in the corpus is used up to its token {room - 1:,} only.")
            document.pop()
        documents.append(document)
        room -= len(document) + 1
    if left_out := len(ids) - len(documents):
        say(f"The corpus exceeds {MAX_TOKENS:,} tokens: its {left_out} oldest texts are not used.")
    return Corpus(*build(documents[::-1]), key=keys[-1])


def _texts(ids: Sequence[int]) -> Iterator[str]:
    with _database() as db:
        for id_ in ids:
            yield from (
                text for (text,) in db.execute("SELECT text FROM texts WHERE id = ?", [id_]).fetchall()
            )


def _tokens(vocab: Tokenizer, text: str, room: int) -> list[int]:
    """At most `room` tokens. Cut at ends of lines: a tokenizer takes memory for its whole input at once."""
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
    """Leave the indexes made last, and nothing of one whose making was killed. Under the lock."""
    indexes = sorted(corpus_folder().glob("*.index"), key=lambda path: path.stat().st_mtime)
    for path in [*indexes[:-_INDEXES_KEPT], *corpus_folder().glob(".*.index.*")]:
        path.unlink(missing_ok=True)


# --- the store ---


def source_name(path: Path) -> str:
    """The name a file's text has: its whole path, links resolved."""
    return os.fsencode(os.path.realpath(path)).decode("utf-8", "replace")


def add(texts: Mapping[str, str]) -> Added:
    """Keep texts by name, each in place of the one of that name; beyond MAX_TEXT the oldest go.

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
    """The named texts, oldest first."""
    if not _database_path().exists():
        return []
    query = "SELECT name, bytes, added FROM texts WHERE name != ? ORDER BY id"
    with _database() as db:
        return [TextSource(*row) for row in db.execute(query, [_SESSION])]


def sessions() -> Sessions:
    """What is remembered of past sessions."""
    if not _database_path().exists():
        return Sessions(False, 0, 0)
    query = "SELECT count(*), coalesce(sum(bytes), 0) FROM texts WHERE name = ?"
    with _database() as db:
        return Sessions(_remembers(db), *db.execute(query, [_SESSION]).fetchone())


def remove(wanted: str) -> list[str]:
    """Forget a text, by its path or by a file name that no other has, or all texts in a folder; their names.

    Raises EdgespecError if there is none.
    """
    names = [source.name for source in sources()]
    full = source_name(Path(wanted))
    found = [name for name in names if name == full or Path(full) in Path(name).parents]
    if not found:
        found = [name for name in names if Path(name).name == wanted]
        if len(found) > 1:
            raise EdgespecError(f"{len(found)} texts are called {printable(wanted)}: give the whole path")
    if not found:
        raise EdgespecError(f"no text is called {printable(wanted)}: `edgespec corpus list` shows them")
    with _lock(), _database() as db:
        _delete(db, found)
    return found


def set_remember(on: bool) -> None:
    """Whether `remember` keeps anything. Off deletes what it kept."""
    if not on and not _database_path().exists():
        return
    with _lock(), _database() as db:
        db.execute("INSERT OR REPLACE INTO settings VALUES ('remember', ?)", ["on" if on else "off"])
        if not on:
            _delete(db, [_SESSION])


def clear() -> int:
    """Delete all texts, indexes and settings, also damaged ones; the bytes freed. Raises EdgespecError."""
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
    """One transaction; where there may be no store yet, under the lock. Raises EdgespecError."""
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
            f"cannot use the corpus {printable(path)}: {error}; if it is damaged, `edgespec corpus clear` "
            f"starts anew"
        ) from None


class _BusyError(EdgespecError):
    pass


@contextmanager
def _lock(seconds: float = 30) -> Iterator[None]:
    """Held by whoever makes an index or deletes text, so that no deleted text survives in an index."""
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
    """Delete texts, and the indexes made of them before them. Under the lock."""
    if names:
        for path in _index_files():
            path.unlink()
        db.executemany("DELETE FROM texts WHERE name = ?", [(name,) for name in names])


def _index_files() -> list[Path]:
    folder = corpus_folder()
    return [*folder.glob("*.index"), *folder.glob(".*.index.*")]


def _oldest(rows: Sequence[tuple[T, int]], limit: int) -> list[T]:
    """The first of (what, bytes) that have to go so that at most `limit` bytes stay."""
    total = sum(size for _, size in rows)
    gone = []
    for what, size in rows:
        if total <= limit:
            break
        gone.append(what)
        total -= size
    return gone
