"""The history: conversations, branches, streaming, several chats at once."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from histories import storable, talk, texts, written
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgespec.app.history.io import from_json, to_json
from edgespec.app.history.rows import StoredMessage
from edgespec.app.history.store import KEPT, History, data_folder, history_path
from edgespec.core import EdgespecError

posix = pytest.mark.skipif(sys.platform == "win32", reason="modes, locks and pipes of POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History(path) as history:
        yield history


# --- the file ---


def test_the_folder_is_that_of_the_platform_unless_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGESPEC_DATA", str(tmp_path / "mine"))
    assert history_path() == tmp_path / "mine" / "history" / "history.db"
    monkeypatch.delenv("EDGESPEC_DATA")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
        assert data_folder() == tmp_path / "xdg" / "edgespec"


@posix
def test_only_the_user_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        with History(path) as history:
            talk(history, "secret")
            files = sorted(path.parent.iterdir())
            assert {file.name for file in files} == {
                f"history.db{end}" for end in ("", "-wal", "-shm", ".lock")
            }
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        with History(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)


# --- conversations ---


def test_a_title_is_the_first_line_of_the_first_question(history: History) -> None:
    first, *_ = talk(history, "\n \n  How   do\tI?\nMore.", "So.", "Another question")
    assert history.conversation(first.conversation).title == "How do I?"
    long, *_ = talk(history, "x" * 500)
    assert history.conversation(long.conversation).title == "x" * 79 + "…"
    named = history.new("Mine")
    history.append(named.id, "user", "What?")
    assert history.conversation(named.id).title == "Mine"
    history.rename(named.id, "Yours\nand mine")
    assert history.conversation(named.id).title == "Yours"


def test_the_last_changed_comes_first_after_the_pinned(path: Path) -> None:
    times = iter(range(1, 100))
    with History(path, clock=lambda: next(times)) as history:
        made = [history.new(str(now)).id for now in range(1, 8)]
        history.append(made[2], "user", "again")
        history.pin(made[0])
        history.delete(made[5])
        order = [made[n] for n in (0, 2, 6, 4, 3, 1)]
        assert [about.id for about in history.conversations()] == order
        assert [about.id for about in history.conversations(2, 1)] == order[1:3]
        assert [about.id for about in history.conversations(deleted=True)] == [made[5]]
        history.pin(made[0], False)
        history.restore(made[5])
        assert [about.id for about in history.conversations()] == [made[n] for n in (2, 6, 5, 4, 3, 1, 0)]


def test_settings_are_stored(path: Path) -> None:
    with History(path) as history:
        about = history.new(system="Be brief.", persona="terse", model="qwen", sampling={"temperature": 0.5})
        history.configure(about.id, model="smol", sampling={"stop": ["a", "b"], "seed": None})
        history.configure(about.id)
    with History(path) as history:
        kept = history.conversation(about.id)
        assert (kept.system, kept.persona, kept.model) == ("Be brief.", "terse", "smol")
        assert kept.sampling == {"stop": ["a", "b"], "seed": None}


def test_unknown_ids_are_reported(history: History) -> None:
    (message,) = talk(history, "x")
    other = history.new()
    calls: list[Callable[[], object]] = [
        lambda: history.conversation(99),
        lambda: history.rename(99, "x"),
        lambda: history.append(99, "user", "x"),
        lambda: history.append(other.id, "user", "x", parent=message.id),
        lambda: history.append(other.id, "user", "x", parent=99),
        lambda: history.append_text(99, "x"),
        lambda: history.finish(99),
        lambda: history.switch(99),
        lambda: history.message(99),
        lambda: history.siblings(99),
        lambda: history.branch(99),
    ]
    for call in calls:
        with pytest.raises(EdgespecError, match="no such conversation"):
            call()
    assert history.messages(other.id) == []


def test_deleted_conversations_can_be_restored_until_they_are_purged(path: Path) -> None:
    now = 1e9
    with History(path, clock=lambda: now) as history:
        first, second = (talk(history, "some words of a secret", "answer")[0].conversation for _ in range(2))
        history.delete(first)
        with pytest.raises(EdgespecError):
            history.append(first, "user", "into the void")
        history.restore(first)
        assert texts(history.branch(first)) == ["some words of a secret", "answer"]
        history.delete(first)
        history.delete(second)
        history.restore(second)
    now += KEPT - 1
    with History(path, clock=lambda: now) as history:
        assert [about.id for about in history.conversations(deleted=True)] == [first]
    now += 2
    with History(path, clock=lambda: now) as history:
        assert history.conversations(deleted=True) == []
        assert [about.id for about in history.conversations()] == [second]
        assert history.messages(first) == []
        answer = history.append(second, "assistant", state="partial")
        history.append_text(answer.id, "more")
        history.purge(second)
        history.purge(second)
        assert history.conversations() == history.search("secret") == []
    assert b"words of" not in path.read_bytes()


# --- messages ---


def test_branches_are_stored_and_shown_again_as_they_were_left(history: History) -> None:
    question, answer, second, _ = talk(history, "q", "a", "q2", "a2")
    number = question.conversation
    again = history.append(number, "assistant", "a'", parent=question.id)
    assert texts(history.branch(number)) == ["q", "a'"]
    assert (again.place, again.places) == (2, 2)
    assert history.siblings(answer.id) == history.siblings(again.id) == [answer.id, again.id]
    history.append(number, "user", "q3")
    history.switch(answer.id)
    assert texts(history.branch(number)) == ["q", "a", "q2", "a2"]
    edited = history.append(number, "user", "q2'", parent=second.parent)
    history.switch(second.id)
    history.switch(edited.id)
    history.switch(again.id)
    assert texts(history.branch(number)) == ["q", "a'", "q3"]
    history.switch(answer.id)
    assert texts(history.branch(number)) == ["q", "a", "q2'"]
    first = history.append(number, "user", "Q", parent=None)
    assert (texts(history.branch(number)), first.places) == (["Q"], 2)
    history.switch(question.id)
    assert texts(history.branch(number)) == ["q", "a", "q2'"]
    assert len(history.messages(number)) == 8


def test_a_search_may_lead_to_a_branch_that_is_not_shown(history: History) -> None:
    question, *_ = talk(history, "q", "hidden", "deeper needle", "end")
    history.append(question.conversation, "user", "other", parent=None)
    (hit,) = history.search("needle")
    assert hit.message is not None
    history.switch(hit.message)
    assert texts(history.branch(question.conversation)) == ["q", "hidden", "deeper needle", "end"]


def test_an_answer_can_be_read_while_it_is_generated(path: Path, history: History) -> None:
    (question,) = talk(history, "q")
    answer = history.append(question.conversation, "assistant", state="partial")
    with History(path) as other:
        for more in ("One ", "two\0", "\ud800"):
            history.append_text(answer.id, more)
        seen = other.branch(question.conversation)[-1]
        assert (seen.text, seen.state) == ("One two\0\ufffd", "partial")
        history.finish(
            answer.id, "stopped", stats={"rate": 2.5, "odd": float("nan")}, sources=[("draft", [4, 4])]
        )
        seen = other.message(answer.id)
        assert (seen.text, seen.state) == ("One two\0\ufffd", "stopped")
        assert (seen.stats, seen.sources) == ({"rate": 2.5, "odd": None}, (("draft", (4, 4)),))
        history.append_text(answer.id, "three")  # a stopped answer is continued
        assert other.message(answer.id).state == "partial"
        history.finish(answer.id)
        seen = other.message(answer.id)
        assert (seen.text, seen.state, seen.stats["rate"]) == ("One two\0\ufffdthree", "complete", 2.5)


def test_appending_costs_time_proportional_to_the_text(path: Path, history: History) -> None:
    (question,) = talk(history, "q")
    answer = history.append(question.conversation, "assistant", "x" * 1_000_000, state="partial")
    history.append_text(answer.id, "x")
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for _ in range(20):
        history.append_text(answer.id, "word ")
    assert path.with_name("history.db-wal").stat().st_size < 1_000_000


def test_an_answer_without_a_writer_is_stopped_when_the_next_chat_starts(path: Path) -> None:
    with History(path) as history:
        (question,) = talk(history, "q")
        answer = history.append(question.conversation, "assistant", "a", state="partial")
        history.append_text(answer.id, "b lost")
    with History(path) as history:
        kept = history.message(answer.id)
        assert (kept.text, kept.state) == ("ab lost", "stopped")
        assert [hit.message for hit in history.search("lost")] == [answer.id]


class Branches(RuleBasedStateMachine):
    """The history compared with a tree in memory that records the child of each message shown last."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "history.db"
        self.history = History(self.path)
        self.number = self.history.new().id
        self.parents: dict[int, int | None] = {}
        self.text: dict[int, str] = {}
        self.shown: dict[int | None, int] = {}

    def teardown(self) -> None:
        self.history.close()
        self.folder.cleanup()

    def children(self, parent: int | None) -> list[int]:
        return sorted(number for number, of in self.parents.items() if of == parent)

    def way(self) -> list[int]:
        way: list[int] = []
        while (last := self.shown.get(way[-1] if way else None)) is not None:
            way.append(last)
        return way

    def show(self, number: int | None) -> None:
        while number is not None:
            self.shown[self.parents[number]] = number
            number = self.parents[number]

    def added(self, parent: int | None, message: StoredMessage, text: str) -> None:
        self.parents[message.id], self.text[message.id] = parent, storable(text)
        self.show(message.id)

    @rule(text=written)
    def ask(self, text: str) -> None:
        parent = self.way()[-1] if self.parents else None
        self.added(parent, self.history.append(self.number, "user", text), text)

    @rule(text=written, data=st.data())
    @precondition(lambda self: self.parents)
    def branch(self, text: str, data: st.DataObject) -> None:
        of = data.draw(st.sampled_from([None, *self.parents]))
        self.added(of, self.history.append(self.number, "assistant", text, parent=of), text)

    @rule(pieces=st.lists(written, max_size=4), done=st.booleans(), data=st.data())
    @precondition(lambda self: self.parents)
    def stream(self, pieces: list[str], done: bool, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.parents)))
        for piece in pieces:
            self.history.append_text(number, piece)
            self.text[number] += storable(piece)
        if done:
            self.history.finish(number)

    @rule(data=st.data())
    @precondition(lambda self: self.parents)
    def switch(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.parents)))
        self.history.switch(number)
        self.show(number)

    @rule()
    def reopen(self) -> None:
        self.history.close()
        self.history = History(self.path)

    @rule()
    def carry_over(self) -> None:
        """An export that is imported has the same tree and shows the same branch."""
        (copy,) = from_json(self.history, to_json(self.history, [self.number]))
        assert texts(self.history.branch(copy)) == [self.text[number] for number in self.way()]
        there = self.history.messages(copy)
        numbers = dict(zip((message.id for message in there), sorted(self.parents), strict=True))
        assert [(numbers[m.id], numbers[m.parent] if m.parent else None, m.text) for m in there] == [
            (number, self.parents[number], self.text[number]) for number in sorted(self.parents)
        ]
        self.history.purge(copy)

    @invariant()
    def same(self) -> None:
        branch = self.history.branch(self.number)
        assert [message.id for message in branch] == self.way()
        for message in branch:
            siblings = self.children(message.parent)
            assert message.parent == self.parents[message.id]
            assert message.text == self.text[message.id]
            assert (message.place, message.places) == (siblings.index(message.id) + 1, len(siblings))
            assert self.history.siblings(message.id) == siblings
        assert {m.id: m.text for m in self.history.messages(self.number)} == self.text
        if branch:
            assert self.history.conversation(self.number).head == branch[-1].id


Branches.TestCase.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
test_branches = Branches.TestCase


# --- concurrency ---


def test_two_chats_at_once(path: Path) -> None:
    made: list[list[StoredMessage]] = [[], []]

    def chat(mine: list[StoredMessage]) -> None:
        with History(path) as history:
            about = history.new()
            for n in range(40):
                mine.append(history.append(about.id, "user", f"message {n}"))
                history.append_text(mine[-1].id, "!")

    threads = [threading.Thread(target=chat, args=(mine,)) for mine in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with History(path) as history:
        for mine in made:
            assert len(mine) == 40
            assert [m.id for m in history.branch(mine[0].conversation)] == [m.id for m in mine]
            assert {m.text[-1] for m in history.branch(mine[0].conversation)} == {"!"}


def test_reads_in_a_snapshot_see_the_same_state(path: Path, history: History) -> None:
    (first,) = talk(history, "one")
    with History(path) as other, other.snapshot():
        assert len(other.messages(first.conversation)) == 1
        history.append(first.conversation, "user", "two")
        assert len(other.messages(first.conversation)) == 1
    assert len(history.messages(first.conversation)) == 2


def test_only_appended_text_may_be_lost_in_a_power_failure(history: History) -> None:
    for durable, level in ((True, 2), (False, 1), (True, 2)):
        with history._file.writing(durable) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (level,)
