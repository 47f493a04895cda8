"""The history: the conversations of the terminal chat, stored on this machine.

The messages of a conversation form a tree: a regenerated answer and an edited question are siblings of the
original. The *head* is the last message of the branch that is shown. Text is stored as it was generated or
typed, and must be cleaned where it is shown.
"""

# ruff: noqa: S608 - every name that is put into a statement is defined in this file

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
"""Seconds for which a deleted conversation can be restored."""


def data_folder() -> Path:
    """EDGESPEC_DATA, or the user's data folder for Edgespec. It may not exist yet."""
    return user_folder("data", "EDGESPEC_DATA")


def history_path() -> Path:
    """The path of the history, in a separate folder that only the user may read."""
    return data_folder() / "history" / "history.db"


class History:
    """All conversations, in one SQLite file. Several processes may use it; each thread needs its own History.

    When a method returns, its changes survive a kill, and except for `append_text` a power failure. Every
    method raises EdgespecError if the file cannot be read or written (after at most `wait` seconds if another
    process holds it) and if a conversation or message does not exist. `note` is a message for the user, empty
    unless a damaged file was set aside.
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
        """A context for reads that all see the same state, whatever other processes write."""
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
        """Create a conversation. Without a title it gets the first line of its first question."""
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
        """A page of the conversations, pinned first, then last changed first; or of the deleted."""
        chosen = "deleted_at IS NULL ORDER BY pinned DESC, updated DESC, id DESC"
        if deleted:
            chosen = "deleted_at IS NOT NULL ORDER BY deleted_at DESC, id DESC"
        with self._file.reading() as db:
            rows = db.execute(f"{CONVERSATIONS} WHERE {chosen} LIMIT ? OFFSET ?", (limit, offset))
            return [conversation_of(row) for row in rows]

    def rename(self, conversation: int, title: str) -> None:
        """Set the title to the first line of `title`, truncated to 80 characters."""
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
        """Change the settings that are not None."""
        settings = {"system": system, "persona": persona, "model": model}
        changes = {name: sound(value) for name, value in settings.items() if value is not None}
        if sampling is not None:
            changes["sampling"] = dumped(sampling)
        if changes:
            self._change(conversation, **changes)

    def delete(self, conversation: int) -> None:
        """Hide a conversation from lists and searches. `restore` undoes it within 30 days."""
        self._change(conversation, deleted_at=self._clock())

    def restore(self, conversation: int) -> None:
        self._change(conversation, deleted_at=None)

    def purge(self, conversation: int) -> None:
        """Delete a conversation permanently."""
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
        """All messages of all branches; a parent precedes its children."""
        return self._messages(f"{MESSAGES} WHERE m.conversation = ? ORDER BY m.id", conversation)

    def message(self, message: int) -> StoredMessage:
        found = self._messages(f"{MESSAGES} WHERE m.id = ?", message)
        if not found:
            raise gone()
        return found[0]

    def siblings(self, message: int) -> list[int]:
        """The children of the same parent, oldest first, with the message itself."""
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
        """Add a message below the head and make it the head.

        With the `parent` of an earlier message it becomes a sibling of that one: another answer, or an edited
        question. An answer that is to be generated is `partial`: see `append_text` and `finish`.
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
        """Append to a message that is being generated, in time proportional to `more`.

        A finished message becomes `partial` again.
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
        """End the generation of a message. `stats` and `sources` stay as they are if None."""
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
        """Show the branch of `message`, and below it the branch last shown there."""
        with self._file.writing() as db:
            if not db.execute("SELECT 1 FROM messages WHERE id = ?", (message,)).fetchone():
                raise gone()
            show(db, leaf_below(db, message))

    def _messages(self, statement: str, value: int | None) -> list[StoredMessage]:
        with self._file.reading() as db:
            return [message_of(row) for row in db.execute(statement, (value,))]

    # --- everything ---

    def search(self, query: str, limit: int = 50) -> list[Hit]:
        """Search titles and messages: see `search.search`. Text that is being appended is not found yet."""
        with self._file.reading() as db:
            return search(db, query, limit)

    def add(self, conversations: Iterable[tuple[Conversation, Sequence[StoredMessage]]]) -> list[int]:
        """Add conversations with their messages, all or none. Returns their numbers.

        Ids need to be consistent only within each conversation, where parents precede children.
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
