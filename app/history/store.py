"""The conversations of the terminal chat, kept on this machine.

A conversation's messages form a tree: an answer written again and a question asked differently stand
beside the first one. Its *head* is the last message of the branch that is shown. Text is kept as it was
written and must be cleaned where it is shown.
"""

# ruff: noqa: S608 - all names put into statements are this file's own

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from edgespec.app.history.db import Database, gone, settle, sound
from edgespec.app.history.rows import (
    CONVERSATIONS,
    MESSAGES,
    PATH,
    Conversation,
    MessageRole,
    MessageState,
    Sources,
    StoredMessage,
    conversation_of,
    dumped,
    insert_conversation,
    insert_message,
    leaf_below,
    message_of,
    show,
    title_of,
)
from edgespec.app.history.search import Hit, search
from edgespec.machine.paths import user_folder

KEPT = 30 * 86400.0
"""Seconds for which a deleted conversation can be brought back."""


def data_folder() -> Path:
    """EDGESPEC_DATA, or the user's data folder for Edgespec. May not exist yet."""
    return user_folder("data", "EDGESPEC_DATA")


def history_path() -> Path:
    """Where the history is kept. Its folder is its own, so that only the user may read it."""
    return data_folder() / "history" / "history.db"


class History:
    """All conversations, in one SQLite file that several chats may use at once, one History a thread.

    What a method wrote has survived a kill when it returns, and a power failure except for `append_text`.
    Every method raises EdgespecError when the file cannot be read or written, after at most `wait` seconds if
    another holds it, and for a conversation or message that is not there. `note` is a sentence that the user
    must read, empty unless a damaged file was set aside.
    """

    def __init__(
        self, path: Path | None = None, *, wait: float = 5.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        self._file = Database(path or history_path(), wait)
        self.note = self._file.note
        try:
            self._purge("deleted_at < ?", clock() - KEPT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def snapshot(self) -> AbstractContextManager[object]:
        """While it lasts, reads see one moment, whatever other chats write. Nothing may be written inside."""
        return self._file.reading()

    # --- conversations ---

    def new(
        self,
        title: str = "",
        *,
        system: str = "",
        persona: str = "",
        model: str = "",
        sampling: Mapping[str, Any] | None = None,
    ) -> Conversation:
        """Begin a conversation. Without a title it gets the first line of its first question."""
        now = self._clock()
        made = Conversation(
            created=now, updated=now, title=title_of(title), model=model, persona=persona,
            sampling=sampling or {}, system=system,
        )  # fmt: skip
        with self._file.writing() as db:
            number = insert_conversation(db, made)
        return self.conversation(number)

    def conversation(self, conversation: int) -> Conversation:
        with self._file.reading() as db:
            row = db.execute(f"{CONVERSATIONS} WHERE id = ?", (conversation,)).fetchone()
        if row is None:
            raise gone()
        return conversation_of(row)

    def conversations(self, limit: int = 50, offset: int = 0, *, deleted: bool = False) -> list[Conversation]:
        """A page of those there are: pinned first, then the last written to. Or the deleted, last first."""
        chosen = "deleted_at IS NULL ORDER BY pinned DESC, updated DESC, id DESC"
        if deleted:
            chosen = "deleted_at IS NOT NULL ORDER BY deleted_at DESC, id DESC"
        with self._file.reading() as db:
            rows = db.execute(f"{CONVERSATIONS} WHERE {chosen} LIMIT ? OFFSET ?", (limit, offset))
            return [conversation_of(row) for row in rows]

    def rename(self, conversation: int, title: str) -> None:
        """Give it the first line of `title`, cut at 80 characters."""
        self._change(conversation, title=title_of(title))

    def pin(self, conversation: int, pinned: bool = True) -> None:
        self._change(conversation, pinned=int(pinned))

    def configure(
        self,
        conversation: int,
        *,
        system: str | None = None,
        persona: str | None = None,
        model: str | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        """Change the settings that are given."""
        settings = {"system": system, "persona": persona, "model": model}
        changes = {name: sound(value) for name, value in settings.items() if value is not None}
        if sampling is not None:
            changes["sampling"] = dumped(sampling)
        if changes:
            self._change(conversation, **changes)

    def delete(self, conversation: int) -> None:
        """Hide it from lists and searches. `restore` brings it back within 30 days."""
        self._change(conversation, deleted_at=self._clock())

    def restore(self, conversation: int) -> None:
        self._change(conversation, deleted_at=None)

    def purge(self, conversation: int) -> None:
        """Remove it for good."""
        self._purge("id = ?", conversation)

    def _change(self, conversation: int, **columns: object) -> None:
        names = ", ".join(f"{name} = ?" for name in columns)
        with self._file.writing() as db:
            changed = db.execute(
                f"UPDATE conversations SET {names} WHERE id = ?", (*columns.values(), conversation)
            )
            if not changed.rowcount:
                raise gone()

    def _purge(self, which: str, value: float) -> None:
        with self._file.reading() as db:
            numbers = db.execute(f"SELECT id FROM conversations WHERE {which}", (value,)).fetchall()
        for number in numbers:
            with self._file.writing() as db:
                of = "SELECT id FROM messages WHERE conversation = ?"
                db.execute(f"DELETE FROM pieces WHERE message IN ({of})", number)
                db.execute("DELETE FROM messages WHERE conversation = ?", number)
                db.execute("DELETE FROM conversations WHERE id = ?", number)

    # --- messages ---

    def branch(self, conversation: int) -> list[StoredMessage]:
        """The messages shown, from the first to the head."""
        return self._messages(
            f"""WITH RECURSIVE {PATH}
            {MESSAGES} WHERE m.id IN (SELECT id FROM path) ORDER BY m.id""",
            self.conversation(conversation).head,
        )

    def messages(self, conversation: int) -> list[StoredMessage]:
        """All messages of all branches; a parent stands before its children."""
        return self._messages(f"{MESSAGES} WHERE m.conversation = ? ORDER BY m.id", conversation)

    def message(self, message: int) -> StoredMessage:
        found = self._messages(f"{MESSAGES} WHERE m.id = ?", message)
        if not found:
            raise gone()
        return found[0]

    def siblings(self, message: int) -> list[int]:
        """The messages under the same parent, in the order they were made, itself among them."""
        of = self.message(message)
        with self._file.reading() as db:
            rows = db.execute(
                "SELECT id FROM messages WHERE conversation = ? AND parent IS ? ORDER BY id",
                (of.conversation, of.parent),
            )
            return [number for (number,) in rows]

    def append(
        self,
        conversation: int,
        role: MessageRole,
        text: str = "",
        *,
        parent: int | Literal["head"] | None = "head",
        state: MessageState = "complete",
        stats: Mapping[str, Any] | None = None,
        sources: Sources = (),
    ) -> StoredMessage:
        """Add a message under the head and make it the head.

        With the `parent` of an earlier message it becomes that one's sibling: another answer, or the question
        put differently. An answer that is about to be written is `partial`: see `append_text`, `finish`.
        """
        text, now = sound(text), self._clock()
        with self._file.writing() as db:
            row = db.execute(
                "SELECT head, title FROM conversations WHERE id = ? AND deleted_at IS NULL", (conversation,)
            ).fetchone()
            if row is None:
                raise gone()
            head, title = row
            under = head if parent == "head" else parent
            of = db.execute("SELECT conversation FROM messages WHERE id = ?", (under,)).fetchone()
            if under is not None and of != (conversation,):
                raise gone()
            made = StoredMessage(0, conversation, under, role, state, now, stats or {}, text, sources)
            number = insert_message(db, made)
            show(db, number)
            db.execute("UPDATE conversations SET updated = ? WHERE id = ?", (now, conversation))
            if role == "user" and not title:
                db.execute("UPDATE conversations SET title = ? WHERE id = ?", (title_of(text), conversation))
        return self.message(number)

    def append_text(self, message: int, more: str) -> None:
        """Add to a message that is being written, a few times a second; costs what `more` is long.

        One that was finished is taken up again.
        """
        with self._file.writing(durable=False) as db:
            db.execute(
                "UPDATE messages SET state = 'partial' WHERE id = ? AND state <> 'partial'", (message,)
            )
            db.execute("INSERT INTO pieces (message, text) VALUES (?, ?)", (message, sound(more)))

    def finish(
        self,
        message: int,
        state: Literal["complete", "stopped"] = "complete",
        *,
        stats: Mapping[str, Any] | None = None,
        sources: Sources | None = None,
    ) -> None:
        """No more text follows for now. What is not given of `stats` and `sources` stays as it was."""
        with self._file.writing() as db:
            settle(db, message, state)
            for name, value in (("stats", stats), ("sources", sources)):
                if value is not None:
                    db.execute(f"UPDATE messages SET {name} = ? WHERE id = ?", (dumped(value), message))
            changed = db.execute(
                """UPDATE conversations SET updated = ?
                WHERE id = (SELECT conversation FROM messages WHERE id = ?)""",
                (self._clock(), message),
            )
            if not changed.rowcount:
                raise gone()

    def switch(self, message: int) -> None:
        """Show the branch that `message` is on, and below it what was last shown there."""
        with self._file.writing() as db:
            if not db.execute("SELECT 1 FROM messages WHERE id = ?", (message,)).fetchone():
                raise gone()
            show(db, leaf_below(db, message))

    def _messages(self, statement: str, value: int | None) -> list[StoredMessage]:
        with self._file.reading() as db:
            return [message_of(row) for row in db.execute(statement, (value,))]

    # --- everything ---

    def search(self, query: str, limit: int = 50) -> list[Hit]:
        """Where `query` is found: see `history_search.search`. Not in what is just being written."""
        with self._file.reading() as db:
            return search(db, query, limit)

    def add(self, conversations: Iterable[tuple[Conversation, Sequence[StoredMessage]]]) -> list[int]:
        """Add whole conversations, all or none. Returns their numbers.

        The numbers given need be right only within each conversation, where parents stand before children.
        """
        added = []
        with self._file.writing() as db:
            for conversation, messages in conversations:
                number = insert_conversation(db, conversation)
                numbers: dict[int | None, int | None] = {None: None}
                for message in messages:
                    made = replace(message, conversation=number, parent=numbers[message.parent])
                    numbers[message.id] = insert_message(db, made)
                db.execute(
                    """UPDATE messages SET chosen =
                    (SELECT max(c.id) FROM messages c WHERE c.parent = messages.id) WHERE conversation = ?""",
                    (number,),
                )
                if (head := numbers[conversation.head]) is not None:
                    show(db, leaf_below(db, head))
                added.append(number)
        return added
