"""The interface between chat commands and the chat. Free of Textual: `--plain` has no screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:  # these import SQLite, among others
    from edgespec.app.chat.messages import BranchMessage
    from edgespec.app.chat.model_worker import ModelLoader
    from edgespec.app.chat.session import Session
    from edgespec.app.history.store import History
    from edgespec.app.settings import Settings

T = TypeVar("T")


class ChatActions(Protocol):
    """The actions of both front ends, the screen (`app.ChatApp`) and lines (`plain.PlainChat`).

    `opener` returns the loader of a model by its name; it is None where a server chooses the model.
    An exception of a command is shown as a note.
    """

    plain: bool  # line by line, without a screen
    session: Session
    settings: Settings
    opener: Callable[[str], ModelLoader] | None

    def note(self, text: str, error: bool = False) -> None:
        """Show one line, in addition to the conversation."""

    def show(self, title: str, text: str) -> None:
        """Show lines to read."""

    async def ask_text(self, question: str, value: str = "") -> str | None:
        """Ask for a line of text, with `value` as the default. None if the user leaves the question."""

    async def choose(self, question: str, options: Sequence[tuple[T, str, str]]) -> T | None:
        """Ask for one of `options` (value, name, description). None if the user leaves the question."""

    async def ask_history(self, job: Callable[[History], T]) -> T:
        """Run `job` in the history's thread. Raises EdgespecError as the history does."""

    def begin_edit(self, question: BranchMessage) -> None:
        """Let the user change a question of the conversation."""

    def show_conversations(self, words: str = "") -> None:
        """List the conversations that contain `words`, all of them without words."""

    def fetch(self, name: str) -> None:
        """Download the model `name`, then load it."""

    def use(self, name: str) -> None:
        """Load another model, which answers from then on."""

    def apply(self, settings: Settings) -> None:
        """Use changed settings from now on."""

    def quit(self) -> None: ...


class ScreenActions(ChatActions, Protocol):
    """The actions of the screen alone."""

    def leave(self) -> bool:
        """Move the focus back to the input, or end an edit. False if there is nothing to leave."""

    def copy(self, text: str, what: str) -> None:
        """Put `text` on the clipboard; `what` names it in a note."""

    def toggle_sidebar(self) -> None: ...
    def toggle_panel(self) -> None: ...
    def focus_message(self, step: int) -> None:
        """Focus the message `step` after the focused one; the last one if none is focused."""

    async def edit_settings(self) -> Settings | None:
        """Show the settings as a form and save them. None if the user leaves it."""
