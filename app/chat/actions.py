"""What a chat command may do: the interface between commands and the screen that runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from textual.screen import Screen

from edgespec.app.chat.messages import BranchMessage
from edgespec.app.chat.model_worker import ModelLoader
from edgespec.app.chat.session import Session
from edgespec.app.chat.widgets.panel import EnginePanel
from edgespec.app.chat.widgets.sidebar import Sidebar
from edgespec.app.chat.widgets.view import ConversationView
from edgespec.app.history.store import History
from edgespec.app.settings import Settings

T = TypeVar("T")


class ChatActions(Protocol):
    """`opener` loads a model by name; None where the server has it."""

    session: Session
    settings: Settings
    title: Any
    opener: Callable[[str], ModelLoader] | None
    sidebar: Sidebar
    view: ConversationView
    panel: EnginePanel

    def say(self, note: str, bad: bool = False) -> None: ...
    def leave(self) -> bool: ...
    def begin_edit(self, item: BranchMessage, text: str) -> None: ...
    def copy(self, text: str, what: str) -> None: ...
    def show_sidebar(self, shown: bool, query: str | None = None) -> None: ...
    def fetch(self, name: str) -> None: ...
    def use(self, name: str) -> None: ...
    def apply(self, settings: Settings) -> None: ...
    def push_screen(self, screen: Screen[Any]) -> Any: ...
    async def push_screen_wait(self, screen: Screen[T]) -> T | None: ...
    async def kept(self, job: Callable[[History], T]) -> T | None: ...
    async def action_quit(self) -> None: ...
