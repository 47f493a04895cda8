"""The terminal chat's screen. Draws a `Session`, whose news it asks for 20 times a second; knows no models.

Nothing heavy is imported before the screen is there. Everything shown is cleaned; what the model reads is
what was written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar, TypeVar

from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.theme import Theme
from textual.widgets import Label, ProgressBar, TextArea

from edgespec.app import settings as settings_file
from edgespec.app.chat import commands
from edgespec.app.chat import model_picker as chat_models
from edgespec.app.chat.attachments import find, unfolded_question, with_files
from edgespec.app.chat.commands import TABLE
from edgespec.app.chat.messages import (
    BranchMessage,
    Changed,
    ChatEvent,
    ContextOverflow,
    Ended,
    Loaded,
    LoadFailed,
    Notice,
    TextAppended,
)
from edgespec.app.chat.model_worker import ModelLoader, explain
from edgespec.app.chat.session import Session
from edgespec.app.chat.widgets.hint import Hint, completions
from edgespec.app.chat.widgets.input import MessageInput
from edgespec.app.chat.widgets.panel import EnginePanel
from edgespec.app.chat.widgets.sidebar import Sidebar
from edgespec.app.chat.widgets.status import figures, machine
from edgespec.app.chat.widgets.view import ConversationView
from edgespec.app.terminal import clean, one_line

if TYPE_CHECKING:  # these import llama.cpp or SQLite
    from edgespec.app.chat.history_worker import HistoryWorker
    from edgespec.app.history.store import History
    from edgespec.machine.governor import Mode
    from edgespec.sampling import Sampling

T = TypeVar("T")
_FRAMES_PER_SECOND = 20
_THEMES = {"dark": "textual-dark", "light": "textual-light", "contrast": "contrast"}
_CONTRAST = Theme(
    "contrast", primary="#ffff00", secondary="#00ffff", foreground="#ffffff", background="#000000",
    surface="#000000", panel="#000000", boost="#202020", success="#00ff00", warning="#ffff00",
    error="#ff8080", accent="#00ffff", dark=True, variables={"text-muted": "#ffffff"},
)  # fmt: skip


class ChatApp(App[int]):
    """The chat screen. `load` is called in the engine's thread; `run()` returns the exit code.

    `opener` gives what loads another model by its name. `reopen` is a conversation's number, 0 the last one.
    """

    CSS_PATH = "chat.tcss"
    AUTO_FOCUS = "#input"
    COMMANDS = {commands.CommandPalette}  # noqa: RUF012 - as in Textual
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(one.key, f"command('{one.name}')", one.about, priority=True, show=False)
            for one in TABLE.values()
            if one.key
        ),
        Binding("ctrl+down", "pick(1)", "Next message", priority=True, show=False),
        Binding("pageup", "page(-1)", "Back", priority=True, show=False),
        Binding("pagedown", "page(1)", "Forth", priority=True, show=False),
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
        settings: settings_file.Settings | None = None,
        opener: Callable[[str], ModelLoader] | None = None,
        reopen: int | None = None,
        store: HistoryWorker | None = None,
    ) -> None:
        super().__init__()
        self.title = one_line(title)
        self.settings = settings or settings_file.Settings()
        self.session = Session(
            load, title, system=system, persona=persona, sampling=sampling, max_tokens=max_tokens,
            mode=mode, store=store,
        )  # fmt: skip
        self.opener, self._reopen = opener, reopen
        self._editing: BranchMessage | None = None
        self._fetching = ""

    def compose(self) -> ComposeResult:
        self.sidebar = Sidebar(self.session.store)
        self.view = ConversationView()
        self.panel = EnginePanel(self.session)
        self._input = MessageInput(
            partial(completions, TABLE), placeholder="Enter sends · Ctrl+J new line · F1 help"
        )
        self._hint = Hint(self.session, TABLE)
        self._head, self._machine = Label("", id="head", markup=False), Label("", id="machine", markup=False)
        self._bar = ProgressBar(total=1.0, show_percentage=False, show_eta=False, id="loading")
        self._model = Label(self.title, id="name", markup=False)
        self._figures = Label("", id="state", markup=False)
        with Horizontal(id="header"):
            yield self._head
            yield self._machine
        with Horizontal(id="middle"):
            yield self.sidebar
            with Vertical():
                yield self.view
                yield self.panel
        yield self._input
        yield self._hint
        with Horizontal(id="status"):
            yield self._model
            yield self._bar
            yield self._figures

    def on_mount(self) -> None:
        self.register_theme(_CONTRAST)
        self.theme = self._theme()
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

    # --- what the user does ---

    async def on_message_input_sent(self, message: MessageInput.Sent) -> None:
        text = message.text
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text[1:].partition(" ")
            if name in TABLE:
                self.run_command(name, argument.strip())
            else:
                self._input.put(text)
                self.say(f"There is no command /{name}: F1 lists them, // sends a slash.", bad=True)
            return
        text = text.removeprefix("/")
        files = await asyncio.to_thread(find, text) if "@" in text else []
        if wrong := [one for one in files if one.error]:
            self._input.put(message.text)
            self.say(f"@{wrong[0].name} {wrong[0].error}.", bad=True)
            return
        text = with_files(text, files)
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
        await commands.TO_CONVERSATION[what](self, number)
        self.sidebar.refill()
        self._wake()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """With a screen over the chat, keys are for that screen, but for Ctrl+Q."""
        if action in ("command", "pick", "page") and len(self.screen_stack) > 1:
            return parameters == ("quit",)
        if action == "command" and parameters == ("edit",) and self.sidebar.has_focus_within:
            return False  # F2 renames there
        return super().check_action(action, parameters)

    def action_command(self, name: str) -> None:
        self.run_command(name)

    @work
    async def run_command(self, name: str, argument: str = "") -> None:
        """Do what `name` in the table of commands says."""
        try:
            await TABLE[name].run(self, argument)
        except Exception as error:  # noqa: BLE001 - a chat of hours must not end for it
            self.say(explain(error), bad=True)
        if self.is_running:
            self.sidebar.refill()
            self._wake()

    def action_message(self, what: str) -> None:
        """Do something to the focused message."""
        item = self.view.focused_item
        if item is None:
            return
        if what == "copy":
            self.copy(item.text, "The message")
        elif what in ("previous", "next"):
            self.session.switch(item, 1 if what == "next" else -1)
        elif what == "edit" and item.role == "user":
            self.begin_edit(item, unfolded_question(item.text))
        elif what == "regenerate" and item.role == "assistant":
            self.session.regenerate(item)
        self._wake()

    async def action_page(self, direction: int) -> None:
        await self.view.page(direction)

    def action_pick(self, step: int) -> None:
        self.view.pick(step)

    async def action_quit(self) -> None:
        self.session.stop()
        self.exit(0)

    def leave(self) -> bool:
        """Go back to the input from wherever the focus is, or give up editing. False if nothing was to do."""
        if self._editing is not None:
            self._editing, self._input.border_title = None, ""
            self._input.put("")
            return True
        if self._input.has_focus:
            return False
        self._input.focus()
        return True

    def begin_edit(self, item: BranchMessage, text: str) -> None:
        self._editing = item
        self._input.border_title = "asked differently: Enter branches, Esc leaves it"
        self._input.put(text)
        self._input.focus()

    def copy(self, text: str, what: str) -> None:
        self.copy_to_clipboard(clean(text))
        self.say(f"{what} is in the clipboard.")

    def say(self, note: str, bad: bool = False) -> None:
        self.notify(one_line(note), severity="error" if bad else "information", markup=False)

    def show_sidebar(self, shown: bool, query: str | None = None) -> None:
        self.sidebar.display = shown
        if shown:
            self.sidebar.begin(query)
        else:
            self._input.focus()

    async def kept(self, job: Callable[[History], T]) -> T | None:
        """What `job` found in the history; None if that failed, which the user is told."""
        try:
            return await asyncio.wrap_future(self.session.store.do(job))
        except Exception as error:  # noqa: BLE001 - a chat of hours must not end for it
            self.say(explain(error), bad=True)
            return None

    def apply(self, settings: settings_file.Settings) -> None:
        """Let changed settings hold from now on."""
        self.settings = settings
        self.theme = self._theme()
        self.session.apply(settings)

    def _theme(self) -> str:
        """The theme of the settings. Of the dark one's colours too little would be left without colour."""
        chosen = _THEMES[self.settings.theme]
        return "contrast" if self.no_color and chosen == _THEMES["dark"] else chosen

    def fetch(self, name: str) -> None:
        """Load a model as soon as it is fetched."""

        def tell(what: Callable[..., None], *values: object) -> None:
            if self.is_running:
                self.call_from_thread(what, *values)

        self._fetching = name
        chat_models.fetch(
            name,
            lambda share: tell(self._show_fetched, share),
            lambda error: tell(self._fetched, name, error),
        )

    def _show_fetched(self, share: float) -> None:
        self._bar.display = True
        self._bar.update(progress=share)
        self._figures.update(one_line(f"fetching {self._fetching} {share:.0%}"))

    def _fetched(self, name: str, error: str) -> None:
        self._fetching = ""
        if error:
            self.say(error, bad=True)
        else:
            self.use(name)

    def use(self, name: str) -> None:
        """Go on with another model."""
        assert self.opener is not None
        self.title = one_line(name)
        self._model.update(self.title)
        self.session.reload(self.opener(name), name)
        self._wake()

    # --- what happens ---

    def _wake(self) -> None:
        self._show_status()
        self._clock.resume()

    async def _tick(self) -> None:
        news = self.session.poll()
        for event in news:
            await self._show(event)
        if any(not isinstance(event, TextAppended) for event in news):
            self._show_status()  # else twice a second: each change has the screen composed anew
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
                    await self.view.tell(note)
            case LoadFailed(error):
                await self.view.tell(
                    f"{error} Nothing can be answered: F4 chooses a model, Ctrl+Q quits.", bad=True
                )
            case ContextOverflow():
                self._offer(event)
            case Notice(note, bad, text):
                await self.view.tell(note, bad)
                if text and not self._input.text:
                    self._input.put(text)

    @work
    async def _offer(self, event: ContextOverflow) -> None:
        await commands.offer(self, event)
        self._wake()

    def _show_status(self) -> None:
        session = self.session
        if self._fetching:
            return
        loading = session.state == "loading" and bool(self.title)
        if loading or self._bar.display:
            self._bar.display = loading
            self._bar.update(progress=session.share)
        width = self.size.width
        _say(
            self._figures,
            figures(session, max(20, width - min(len(self.title), width // 3) - 22 * loading - 5)),
        )
        _say(self._machine, machine(session, max(20, width - 28)))
        persona = f"[{one_line(session.chat.persona)}] " if session.chat.persona else ""
        _say(self._head, persona + (one_line(session.chat.title) or "New conversation"))


def _say(label: Label, text: str) -> None:
    """Change a label if it changes: its room is what it is, and a layout of the screen takes time."""
    if label.content != text:
        label.update(text, layout=label.styles.width is not None and label.styles.width.is_auto)
