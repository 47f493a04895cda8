"""The conversation on the screen: its last messages, each a widget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, TypeVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.reactive import Reactive
from textual.widget import Widget
from textual.widgets import Label, Static

from edgespec.app.chat.attachments import folded
from edgespec.app.chat.events import Ended
from edgespec.app.chat.messages import BranchMessage
from edgespec.app.chat.thoughts import parts, summary
from edgespec.app.chat.widgets.markdown import MarkdownAnswer, Section
from edgespec.app.terminal import clean, one_line

T = TypeVar("T")
_PAGE = 30  # messages that are mounted at a time
_LINES = 20  # of a question, until it is unfolded
_EMPTY = """\
Ask anything.

@path   attaches a text file, Tab completes it
/       lists the commands, F1 all keys
Ctrl+F  searches all conversations
Ctrl+G  shows the engine panel
F4      chooses a model
F6      changes the settings"""


class MessageView(Vertical, can_focus=True):
    """A message, its place among its siblings, and how it ended. Reasoning is a line until it is unfolded."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "app.message('edit')", "Edit and branch"),
        Binding("r", "app.message('regenerate')", "Regenerate"),
        Binding("c,y", "app.message('copy')", "Copy"),
        Binding("left", "app.message('previous')", "Other branch"),
        Binding("right", "app.message('next')", "Other branch"),
        Binding("enter,space", "unfold", "Unfold"),
    ]

    def __init__(self, item: BranchMessage) -> None:
        super().__init__(classes=item.role)
        self.item = item
        answer = parts(item.text)[1] if item.role == "assistant" else ""
        self._drawn = len(answer)
        self._folded = True
        # Attributes, not queries: the last events may come when the app closes and the children are gone.
        self._branch = Label("", classes="branch", markup=False)
        self._question = Static("", classes="question", markup=False)
        self._thought = Static("", classes="thought", markup=False)
        self.answer = MarkdownAnswer(answer)
        self._outcome = Static("", classes="outcome", markup=False)

    def compose(self) -> ComposeResult:
        yield self._branch
        if self.item.role == "assistant":
            yield self._thought
            yield self.answer
        else:
            yield self._question
        yield self._outcome

    def on_mount(self) -> None:
        item = self.item
        self._show_folded()
        self._branch.update(f"branch {item.place} of {item.places}: Alt+← Alt+→ switch")
        self._branch.display = item.places > 1
        if item.role == "assistant" and item.state == "stopped" and not item.error:
            self._show_outcome("stopped: Ctrl+T continues")
        elif item.error:
            self._show_outcome(item.error, error=True)

    def write(self) -> None:
        """Draw the text of the message that is not drawn yet."""
        if self.item.text.startswith("<") and (not self._drawn or not self._folded):
            self._show_folded()
        new = parts(self.item.text)[1][self._drawn :]
        self._drawn += len(new)
        if self._outcome.has_class("-shown"):
            self._show_outcome("")
        self.answer.write(new)

    async def end(self, event: Ended) -> None:
        reason = event.result.stop_reason if event.result is not None else "cancelled"
        endings = {
            "cancelled": "stopped: Ctrl+T continues" if self.item.text else "stopped",
            "context": "context full: /drop lists what can be left out, Ctrl+L starts a new conversation",
            "length": "",
        }
        self._show_folded()
        self._show_outcome(clean(event.error) or endings.get(reason, ""), error=bool(event.error))
        await self.answer.end()

    def action_unfold(self) -> None:
        self._folded = not self._folded
        self._show_folded()

    def _show_folded(self) -> None:
        if self.item.role == "assistant":
            self._show_thought()
        else:
            self._show_question()

    def _show_thought(self) -> None:
        thought, answer = parts(self.item.text)
        self._thought.display = bool(thought)
        line = summary(thought, not answer and self.item.state == "partial")
        text = f"▸ {line}: Enter shows it" if self._folded else f"▾ {line}\n{thought}"
        self._thought.update(clean(text) if thought else "")

    def _show_question(self) -> None:
        text = self.item.text
        if self._folded:
            lines = folded(text).splitlines()
            more = len(lines) - _LINES
            cut = [line[:1000] for line in lines[:_LINES]]
            text = "\n".join([*cut, *([f"… {more:,} more lines: Enter shows them"] if more > 0 else [])])
        self._question.update(clean(text))

    def _show_outcome(self, text: str, error: bool = False) -> None:
        self._outcome.update(text)
        self._outcome.set_class(bool(text), "-shown").set_class(error, "-error")


class ConversationView(VerticalScroll, can_focus=False):
    """The last messages of a conversation, and a page more when scrolled to the top."""

    def __init__(self) -> None:
        super().__init__(id="conversation")
        self._views: dict[BranchMessage, MessageView] = {}
        self._hidden: list[BranchMessage] = []
        self._revealed: object = None
        self._earlier = Label("", id="earlier", markup=False)
        self._empty = Static(_EMPTY, id="empty", markup=False)

    def compose(self) -> ComposeResult:
        yield self._empty
        yield self._earlier

    def on_mount(self) -> None:
        self._earlier.display = False
        self.anchor()
        self.set_interval(0.1, self._reveal)

    async def _reveal(self) -> None:
        """Draw the sections of answers that are in view, and one screen above and below."""
        state = (self.scroll_y, self.virtual_size, self.size)
        if state == self._revealed:
            return
        view, settled = self.region, True
        reach, unmeasured = view.height, None
        for message in self._views.values():
            *sections, last = message.answer.sections
            for section in (*sections, last) if message.item.state != "partial" else sections:
                place = section.region
                near = place.bottom > view.y - reach and place.y < view.bottom + reach
                if near == section.shown or not place:
                    settled = settled and bool(place)
                    unmeasured = section if not section.measured else unmeasured
                    continue
                settled = False
                await self._show(section, near)
        if unmeasured is not None:  # one at a time, so that keys are handled in between
            settled = False
            await self._show(unmeasured, True)
        if settled:
            self._revealed = state

    async def _show(self, section: Section, near: bool) -> None:
        place = section.region
        await section.reveal(near)
        if near and place.y < self.region.y:
            self.call_after_refresh(self._shifted, section, place.height)

    def _shifted(self, section: Section, before: int) -> None:
        """Keep the visible lines in place when the height of a section above them changes."""
        more = section.region.height - before if section.region else 0
        if more and self.scroll_y < self.max_scroll_y:  # the anchor follows the end in any case
            self.scroll_relative(y=more, animate=False, force=True, immediate=True)

    def set_reactive(self, reactive: Reactive[T], value: T) -> None:
        """As in Textual, whose anchor scrolls a short conversation to a negative position."""
        if reactive in (Widget.scroll_y, Widget.scroll_target_y) and isinstance(value, int) and value < 0:
            value = 0  # type: ignore[assignment]
        super().set_reactive(reactive, value)

    @property
    def focused_item(self) -> BranchMessage | None:
        focused = self.screen.focused
        return focused.item if isinstance(focused, MessageView) else None

    async def show(self, items: Sequence[BranchMessage], keep: int, at: int | None = None) -> None:
        """Show `items`, of which the first `keep` are drawn; scroll to message `at`, or to the end."""
        if any(item.id == at for item in self._hidden):
            keep = 0
        kept = set(items[:keep])
        if not keep:
            if self._views:  # notes before the first message stay
                await self.query(".note").remove()
            self._hidden = []
        stale = [view for item, view in self._views.items() if item not in kept]
        self._views = {item: view for item, view in self._views.items() if item in kept}
        new = list(items[keep:])
        first = max(0, len(new) - _PAGE)
        if at is not None:
            first = min([first, *(max(0, i - 2) for i, item in enumerate(new) if item.id == at)])
        if not keep:
            self._hidden, new = new[:first], new[first:]
        views = [MessageView(item) for item in new]
        lost = any(view.has_focus for view in stale)
        with self.app.batch_update():
            for view in stale:
                await view.remove()
            await self.mount_all(views)
        self._views |= dict(zip(new, views, strict=True))
        self._empty.display = not self._views
        self._show_earlier()
        found = next((view for item, view in self._views.items() if item.id == at), None)
        if found is None:
            if lost and views and keep:  # the branching point, so that its keys still work
                self.screen.set_focus(views[0], scroll_visible=False)
            self.anchor()
        else:
            self.release_anchor()
            self.screen.set_focus(found, scroll_visible=False)
            self.call_after_refresh(self.scroll_to_widget, found, animate=False, top=True)

    async def add_note(self, note: str, error: bool = False) -> None:
        await self.mount(Static(one_line(note), classes="note -error" if error else "note", markup=False))

    def write(self, item: BranchMessage) -> None:
        if item in self._views:
            self._views[item].write()

    async def end(self, event: Ended) -> None:
        if event.item in self._views:
            await self._views[event.item].end(event)

    async def page(self, direction: int) -> None:
        if direction < 0 and self.scroll_y <= 0 and self._hidden:
            await self._more()
        to = max(0, self.scroll_y + direction * self.scrollable_content_region.height)
        if to >= self.max_scroll_y:
            self.anchor()  # scrolling would not, if it is at the end already
        else:
            self.scroll_to(y=to, animate=False, immediate=True)
        self.call_after_refresh(self._reveal)

    def pick(self, step: int) -> None:
        """Focus the message before or after the focused one; the last one if none is."""
        items = list(self._views)
        here = self.focused_item
        at = items.index(here) + step if here in self._views and here is not None else len(items) - 1
        if items and 0 <= at < len(items):
            self.screen.set_focus(self._views[items[at]])  # at once: keys may follow quickly

    async def _more(self) -> None:
        new, self._hidden = self._hidden[-_PAGE:], self._hidden[:-_PAGE]
        views = [MessageView(item) for item in new]
        height = self.virtual_size.height
        await self.mount_all(views, after=self._earlier)
        self._views = dict(zip(new, views, strict=True)) | self._views
        self._show_earlier()
        self.call_after_refresh(
            lambda: self.scroll_to(y=self.virtual_size.height - height, animate=False, force=True)
        )

    def _show_earlier(self) -> None:
        self._earlier.update(f"▲ {len(self._hidden):,} earlier messages: Page up")
        self._earlier.display = bool(self._hidden)
