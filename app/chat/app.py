"""The terminal chat's screen. Draws a `Session`, which it polls 20 times a second; knows no models.

Nothing heavy is imported before the first frame. Everything shown is cleaned; the model gets what was typed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import TextArea

from edgespec.app.chat import command_table, commands, model_picker
from edgespec.app.chat.actions import ScreenActions
from edgespec.app.chat.attachments import attach, unfolded_question
from edgespec.app.chat.events import (
    Changed,
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Notice,
    TextAppended,
)
from edgespec.app.chat.messages import BranchMessage
from edgespec.app.chat.model_worker import ModelLoader, explain
from edgespec.app.chat.session import Session
from edgespec.app.chat.thoughts import parts
from edgespec.app.chat.widgets.dialogs import ChoiceDialog, HelpScreen, TextDialog
from edgespec.app.chat.widgets.hint import Hint, completions
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.chat.widgets.palette import CommandPalette
from edgespec.app.chat.widgets.panel import EnginePanel
from edgespec.app.chat.widgets.sidebar import Sidebar
from edgespec.app.chat.widgets.status import Header, StatusBar
from edgespec.app.chat.widgets.themes import CONTRAST, theme_name
from edgespec.app.chat.widgets.view import ConversationView
from edgespec.app.settings import Settings
from edgespec.app.terminal import clean, one_line
from edgespec.core import EdgespecError

if TYPE_CHECKING:  # these import llama.cpp or SQLite
    from edgespec.app.chat.history_worker import HistoryWorker
    from edgespec.app.history.store import History
    from edgespec.machine.governor import Mode
    from edgespec.sampling import Sampling

T = TypeVar("T")
_FRAMES_PER_SECOND = 20


class ChatApp(App[int]):
    """The chat screen, and the `ScreenActions` of its commands. `run()` returns the exit code.

    `load` is called in the model's thread. `opener` returns the loader of another model by its name. `reopen`
    is the number of a conversation, 0 for the last one.
    """

    plain = False

    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "#input"
    COMMANDS = {CommandPalette}  # noqa: RUF012 - as in Textual
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(one.key, f"command('{one.name}')", one.help, priority=True, show=False)
            for one in command_table.COMMANDS.values()
            if one.key
        ),
        Binding("ctrl+down", "pick(1)", "Next message", priority=True, show=False),
        Binding("pageup", "page(-1)", "Scroll up", priority=True, show=False),
        Binding("pagedown", "page(1)", "Scroll down", priority=True, show=False),
    ]

    def __init__(
        self,
        load: ModelLoader,
        title: str,
        *,
        system: str = "",
        persona: str = "",
        sampling: Sampling | None = None,
        max_tokens: int = 0,
        mode: Mode = "auto",
        settings: Settings | None = None,
        opener: Callable[[str], ModelLoader] | None = None,
        reopen: int | None = None,
        history: HistoryWorker | None = None,
    ) -> None:
        super().__init__()
        self.title = one_line(title)
        self.settings = settings or Settings()
        self.session = Session(
            load, title, system=system, persona=persona, sampling=sampling, max_tokens=max_tokens,
            mode=mode, history=history,
        )  # fmt: skip
        self.opener, self._reopen = opener, reopen
        self._editing: BranchMessage | None = None
        self._downloading = ""

    def compose(self) -> ComposeResult:
        self.sidebar = Sidebar(self.session.history)
        self.view = ConversationView()
        self.panel = EnginePanel(self.session)
        self._input = MessageInput(completions, placeholder="Enter sends · Ctrl+J new line · F1 help")
        self._hint = Hint(self.session)
        self._header, self._status = Header(self.session), StatusBar(self.session)
        yield self._header
        with Horizontal(id="middle"):
            yield self.sidebar
            with Vertical():
                yield self.view
                yield self.panel
        yield self._input
        yield self._hint
        yield self._status

    def on_mount(self) -> None:
        self.register_theme(CONTRAST)
        self.theme = theme_name(self.settings.theme, self.no_color)
        self.sidebar.display = self.panel.display = False
        self._show_status()
        self._clock = self.set_interval(1 / _FRAMES_PER_SECOND, self._tick)
        self.set_interval(0.5, self._show_status)
        # Imports hold the interpreter, so they wait until the first frame is written.
        self.call_after_refresh(lambda: self.set_timer(0.05, self._start))

    def _start(self) -> None:
        self.session.start(load=bool(self.title))
        if not self.title:
            self.run_command("model")
        if self._reopen:
            self.session.open(self._reopen)
        elif self._reopen == 0:
            self.session.open_last()

    async def on_unmount(self) -> None:
        self._clock.stop()
        await asyncio.to_thread(self.session.close)

    # --- input ---

    async def on_message_input_sent(self, message: MessageInput.Sent) -> None:
        if command_table.is_command(message.text):
            try:
                command, argument = command_table.parse(message.text)
            except EdgespecError as error:
                self._input.put(message.text)
                self.note(str(error), error=True)
            else:
                self.run_command(command.name, argument)
            return
        try:
            text, _ = await asyncio.to_thread(attach, message.text.removeprefix("/"))
        except EdgespecError as error:
            self._input.put(message.text)
            self.note(str(error), error=True)
            return
        if self._editing is not None:
            item, self._editing = self._editing, None
            self._input.border_title = ""
            self.session.edit(item, text)
        else:
            self.session.send(text)
        self._wake()

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        if event.text_area is self._input:
            self._hint.look_at(self._input.text)

    def on_sidebar_opened(self, event: Sidebar.Opened) -> None:
        self.session.open(event.conversation, event.message)
        if event.message is None:
            self._input.focus()
        self._wake()

    def on_sidebar_wanted(self, event: Sidebar.Wanted) -> None:
        self._to_conversation(event.what, event.conversation)

    @work
    async def _to_conversation(self, what: str, number: int) -> None:
        await self._guarded(commands.CONVERSATION_COMMANDS[what](self, number))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable the keys of the chat while a dialog is open, except Ctrl+Q."""
        if action in ("command", "pick", "page") and len(self.screen_stack) > 1:
            return parameters == ("quit",)
        if action == "command" and parameters == ("edit",) and self.sidebar.has_focus_within:
            return False  # there F2 renames
        return super().check_action(action, parameters)

    def action_command(self, name: str) -> None:
        self.run_command(name)

    @work
    async def run_command(self, name: str, argument: str = "") -> None:
        actions: ScreenActions = self
        await self._guarded(command_table.COMMANDS[name].run(actions, argument))

    async def _guarded(self, command: Awaitable[None]) -> None:
        try:
            await command
        except Exception as error:  # noqa: BLE001 - must not end a chat of hours
            self.note(explain(error), error=True)
        if self.is_running:
            self.sidebar.refill()
            self._wake()

    def action_message(self, what: str) -> None:
        """Run a key of the focused message."""
        item = self.view.focused_item
        if item is None:
            return
        if what == "copy":
            self.copy(parts(item.text)[1], "the message")
        elif what in ("previous", "next"):
            self.session.switch(item, 1 if what == "next" else -1)
        elif what == "edit" and item.role == "user":
            self.begin_edit(item)
        elif what == "regenerate" and item.role == "assistant":
            self.session.regenerate(item)
        self._wake()

    async def action_page(self, direction: int) -> None:
        await self.view.page(direction)

    def action_pick(self, step: int) -> None:
        self.view.pick(step)

    async def action_quit(self) -> None:
        self.quit()

    # --- what commands may do: see `actions.ScreenActions` ---

    def quit(self) -> None:
        self.session.stop()
        self.exit(0)

    def leave(self) -> bool:
        if self._editing is not None:
            self._editing, self._input.border_title = None, ""
            self._input.put("")
            return True
        if self._input.has_focus:
            return False
        self._input.focus()
        return True

    def begin_edit(self, question: BranchMessage) -> None:
        self._editing = question
        self._input.border_title = "Edit the question: Enter sends it on a new branch, Esc leaves"
        self._input.put(unfolded_question(question.text))
        self._input.focus()

    def copy(self, text: str, what: str) -> None:
        self.copy_to_clipboard(clean(text))
        self.note(f"copied {what}")

    def note(self, text: str, error: bool = False) -> None:
        self.notify(one_line(text), severity="error" if error else "information", markup=False)

    def show(self, title: str, text: str) -> None:
        self.push_screen(HelpScreen(title, text))

    async def ask_text(self, question: str, value: str = "") -> str | None:
        return await self.push_screen_wait(TextDialog(question, value))

    async def choose(self, question: str, options: Sequence[tuple[T, str, str]]) -> T | None:
        return await self.push_screen_wait(ChoiceDialog(question, options))

    async def edit_settings(self) -> Settings | None:
        from edgespec.app.chat.widgets.settings_screen import SettingsScreen

        return await self.push_screen_wait(SettingsScreen(self.settings))

    async def ask_history(self, job: Callable[[History], T]) -> T:
        return await asyncio.wrap_future(self.session.history.do(job))

    def toggle_sidebar(self) -> None:
        if self.sidebar.display:
            self.sidebar.display = False
            self._input.focus()
        else:
            self._show_sidebar(None)

    def show_conversations(self, words: str = "") -> None:
        self._show_sidebar(words)

    def _show_sidebar(self, words: str | None) -> None:
        self.sidebar.display = True
        self.sidebar.begin(words)

    def toggle_panel(self) -> None:
        self.panel.display = not self.panel.display
        self.panel.draw(force=True)

    def focus_message(self, step: int) -> None:
        self.view.pick(step)

    def apply(self, settings: Settings) -> None:
        self.settings = settings
        self.theme = theme_name(settings.theme, self.no_color)
        self.session.apply(settings)

    def fetch(self, name: str) -> None:
        def call(method: Callable[..., None], *values: object) -> None:
            if self.is_running:
                self.call_from_thread(method, *values)

        self._downloading = name
        model_picker.fetch(
            name,
            lambda share: call(self._status.draw_download, name, share),
            lambda error: call(self._end_download, name, error),
        )

    def _end_download(self, name: str, error: str) -> None:
        self._downloading = ""
        if error:
            self.note(error, error=True)
        else:
            self.use(name)

    def use(self, name: str) -> None:
        assert self.opener is not None
        self.title = one_line(name)
        self.session.reload(self.opener(name), name)
        self._wake()

    # --- events ---

    def _wake(self) -> None:
        self._show_status()
        self._clock.resume()

    async def _tick(self) -> None:
        events = self.session.poll()
        for event in events:
            await self._show(event)
        if any(not isinstance(event, TextAppended) for event in events):
            self._show_status()  # else twice per second: every change composes the screen again
        if self.session.quiet:
            self._clock.pause()

    async def _show(self, event: ChatEvent) -> None:
        match event:
            case Changed(keep, at):
                await self.view.show(self.session.items, keep, at)
                if not keep:
                    self._input.remember([i.text for i in self.session.items if i.role == "user"])
                self.sidebar.refill()
            case TextAppended(item):
                self.view.write(item)
            case Ended():
                await self.view.end(event)
                self.sidebar.refill()
            case Loaded(notes=notes):
                for note in notes:
                    await self.view.add_note(note)
            case LoadFailed(error):
                await self.view.add_note(f"{error} (F4 chooses another model, Ctrl+Q quits)", error=True)
            case ContextOverflow():
                self._offer(event)
            case Notice(note, error, text):
                await self.view.add_note(note, error)
                if text and not self._input.text:
                    self._input.put(text)

    @work
    async def _offer(self, event: ContextOverflow) -> None:
        await self._guarded(commands.offer(self, event))

    def _show_status(self) -> None:
        if not self._downloading:
            self._status.draw()
            self._header.draw()
