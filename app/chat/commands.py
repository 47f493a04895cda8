"""What the chat can be told to do: one table for keys, slash commands, the command palette and help."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.command import DiscoveryHit, Hit, Hits, Provider

from edgespec.app.chat.attachments import path_of, unfolded_question
from edgespec.app.chat.history_worker import delete_conversation
from edgespec.app.chat.widgets.dialogs import ChoiceDialog, HelpScreen, TextDialog
from edgespec.app.chat.widgets.markdown import code_blocks

if TYPE_CHECKING:
    from edgespec.app.chat.actions import ChatActions
    from edgespec.app.chat.messages import ContextOverflow, TrimOption
    from edgespec.app.history.store import History

CommandFunction = Callable[["ChatActions", str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    about: str
    run: CommandFunction
    key: str = ""
    argument: str = ""


TABLE: dict[str, Command] = {}


def _command(
    name: str, about: str, key: str = "", argument: str = ""
) -> Callable[[CommandFunction], CommandFunction]:
    def add(run: CommandFunction) -> CommandFunction:
        TABLE[name] = Command(name, about, run, key, argument)
        return run

    return add


@_command("new", "Begin a conversation", "ctrl+l")
async def _new(app: ChatActions, _: str) -> None:
    app.session.new()


@_command("stop", "Stop the answer", "escape")
async def _stop(app: ChatActions, _: str) -> None:
    if not app.leave():
        app.session.stop()


@_command("regenerate", "Write the last answer again, on a branch of its own", "ctrl+r")
async def _regenerate(app: ChatActions, _: str) -> None:
    if not app.session.regenerate():
        app.say("There is no answer yet to write again.")


@_command("continue", "Go on with a stopped answer", "ctrl+t")
async def _continue(app: ChatActions, _: str) -> None:
    if not app.session.resume():
        app.say("There is no stopped answer at the end of this conversation.")


@_command("edit", "Ask the last question differently, on a branch of its own", "f2")
async def _edit(app: ChatActions, _: str) -> None:
    if (item := app.session.last("user")) is not None:
        app.begin_edit(item, unfolded_question(item.text))


@_command("previous", "Show the branch before", "alt+left")
async def _previous(app: ChatActions, _: str) -> None:
    _switch(app, -1)


@_command("next", "Show the branch after", "alt+right")
async def _next(app: ChatActions, _: str) -> None:
    _switch(app, 1)


def _switch(app: ChatActions, step: int) -> None:
    forked = [item for item in app.session.items if item.places > 1]
    if not forked:
        app.say("This conversation has one branch: edit a question or regenerate an answer for another.")
    elif not app.session.switch(forked[-1], step):
        app.say("There is no other branch.")


@_command("copy", "Copy the last answer", "ctrl+y")
async def _copy(app: ChatActions, _: str) -> None:
    if (item := app.session.last("assistant")) is not None and item.text:
        app.copy(item.text, "The answer")
    else:
        app.say("There is no answer yet to copy.")


@_command("code", "Copy a code block, the last one without a number", "f5", "NUMBER")
async def _code(app: ChatActions, argument: str) -> None:
    blocks = [b for item in app.session.items if item.role == "assistant" for b in code_blocks(item.text)]
    try:
        chosen = blocks[int(argument) - 1 if argument else -1]
    except (ValueError, IndexError):
        app.say(f"There are {len(blocks)} code blocks here: /code 1 copies the first.")
        return
    app.copy(chosen, "The code block")


@_command("sidebar", "Show or hide the conversations, and search them", "ctrl+b")
async def _sidebar(app: ChatActions, _: str) -> None:
    app.show_sidebar(not app.sidebar.display)


@_command("search", "Search all conversations", "ctrl+f", "WORDS")
async def _search(app: ChatActions, argument: str) -> None:
    app.show_sidebar(True, argument)


@_command("rename", "Rename the conversation", argument="TITLE")
async def _rename(app: ChatActions, argument: str) -> None:
    if (number := app.session.chat.number) is not None:
        await rename(app, number, argument)


async def rename(app: ChatActions, number: int, title: str = "") -> None:
    if not title:
        before = await app.kept(lambda history: history.conversation(number).title)
        answer = await app.push_screen_wait(TextDialog("Title of the conversation", before or ""))
        title = (answer or "").strip()
    if title:
        await app.kept(lambda history: history.rename(number, title))


@_command("pin", "Keep the conversation at the top, or let it go")
async def _pin(app: ChatActions, _: str) -> None:
    if (number := app.session.chat.number) is not None:
        await pin(app, number)


async def pin(app: ChatActions, number: int) -> None:
    await app.kept(lambda history: history.pin(number, not history.conversation(number).pinned))


@_command("delete", "Delete the conversation; /undo brings it back")
async def _delete(app: ChatActions, _: str) -> None:
    if (number := app.session.chat.number) is not None:
        await delete(app, number)


async def delete(app: ChatActions, number: int) -> None:
    if app.session.chat.number == number:
        app.session.new()

    if messages := await app.kept(lambda history: delete_conversation(history, number)):
        app.session.forget(messages)
    app.say("Deleted: /undo, or Ctrl+Z in the list, brings it back within 30 days.")


@_command("undo", "Bring back the conversation deleted last")
async def _undo(app: ChatActions, _: str) -> None:
    await undo(app)


async def undo(app: ChatActions, _: int = 0) -> None:
    def job(history: History) -> int | None:
        deleted = history.conversations(1, deleted=True)
        if deleted:
            history.restore(deleted[0].id)
        return deleted[0].id if deleted else None

    number = await app.kept(job)
    if number is None:
        app.say("Nothing was deleted.")
    else:
        app.session.open(number)


@_command("export", "Write the conversation to a .md or .json file", argument="FILE")
async def _export(app: ChatActions, argument: str) -> None:
    if (number := app.session.chat.number) is None:
        app.say("There is nothing to export yet.")
    else:
        await export(app, number, argument)


async def export(app: ChatActions, number: int, name: str = "") -> None:
    name = name or await app.push_screen_wait(TextDialog("File to export to (.md or .json)")) or ""
    if not name:
        return
    path = path_of(name)

    def job(history: History) -> bool:
        from edgespec.app.history import io as history_io

        if path.suffix == ".json":
            history_io.write(path, history_io.to_json(history, [number]))
        else:
            history_io.write(path, history_io.to_markdown(history, number))
        return True

    if await app.kept(job):
        app.say(f"Written to {path}.")


@_command("import", "Add the conversations of a .json export", argument="FILE")
async def _import(app: ChatActions, argument: str) -> None:
    name = argument or await app.push_screen_wait(TextDialog("File to import (.json)")) or ""
    if not name:
        return

    def job(history: History) -> list[int]:
        from edgespec.app.history import io as history_io

        return history_io.from_json(history, history_io.read(path_of(name)))

    if numbers := await app.kept(job):
        app.say(f"Imported: {len(numbers)}.")
        app.session.open(numbers[-1])


@_command("model", "Choose another model, or fetch one", "f4", "NAME")
async def _model(app: ChatActions, argument: str) -> None:

    name = argument
    from edgespec.models.hub.selection import choices

    if app.opener is None:
        app.say("This chat has the server's model: start it again with another --model.")
        return
    if not name:
        found = await asyncio.to_thread(choices)
        mark = {app.title: " · in use"}
        options = [(one.name, one.name + mark.get(one.name, ""), one.about) for one in found]
        title = "Choose a model" if app.title else "No model on this machine yet: choose one to fetch"
        name = await app.push_screen_wait(ChoiceDialog(title, options)) or ""
        if name and not next(one.here for one in found if one.name == name):
            app.fetch(name)
            return
    if name:
        app.use(name)


@_command("persona", "Choose who answers: a system prompt by name", "f7", "NAME")
async def _persona(app: ChatActions, argument: str) -> None:
    personas = app.settings.personas
    options = [("", "none", "no system prompt"), *((name, name, text) for name, text in personas.items())]
    question = "Persona of this conversation: add yours under [personas] in the config file"
    name = argument or await app.push_screen_wait(ChoiceDialog(question, options))
    if name is not None:
        text = app.settings.prompt_of(name) if name else ""
        app.session.configure(system=text, persona=name)
        app.say(f"Persona: {name or 'none'}.")


@_command("system", "Set the system prompt of this conversation", argument="TEXT")
async def _system(app: ChatActions, argument: str) -> None:
    text = argument or await app.push_screen_wait(TextDialog("System prompt", app.session.chat.system))
    if text is not None:
        app.session.configure(system=text, persona="")
        app.say("The system prompt holds from the next answer on.")


@_command("drop", "Choose what the model is no longer told; /drop none tells it all again", argument="none")
async def _drop(app: ChatActions, argument: str) -> None:
    if argument == "none":
        app.session.drop(None)
        app.say("The model is told the whole conversation again.")
    elif not app.session.offer():
        app.say("There is nothing that could be left out.")


@_command("settings", "Change the settings", "f6")
async def _settings(app: ChatActions, _: str) -> None:
    from edgespec.app.chat.widgets.settings_screen import SettingsScreen

    if (settings := await app.push_screen_wait(SettingsScreen(app.settings))) is not None:
        app.apply(settings)


@_command("mode", "Go on to the next mode: auto, performance, balanced, saver", "f3")
async def _mode(app: ChatActions, _: str) -> None:
    app.session.next_mode()


@_command("theme", "Dark, light or high contrast", "f8", "NAME")
async def _theme(app: ChatActions, argument: str) -> None:
    from edgespec.app import settings

    names = list(settings.WORDS["theme"])
    name = argument or names[(names.index(app.settings.theme) + 1) % len(names)]
    app.apply(settings.changed(app.settings, "theme", name))


@_command("engine", "Show or hide what the engine does", "ctrl+g")
async def _engine(app: ChatActions, _: str) -> None:
    app.panel.display = not app.panel.display
    app.panel.draw(anew=True)


@_command("messages", "Go from message to message", "ctrl+up")
async def _messages(app: ChatActions, _: str) -> None:
    app.view.pick(-1)


@_command("help", "Keys and commands", "f1")
async def _help(app: ChatActions, _: str) -> None:
    app.push_screen(HelpScreen("Help", help_text()))


@_command("quit", "Leave", "ctrl+q")
async def _quit(app: ChatActions, _: str) -> None:
    await app.action_quit()


async def offer(app: ChatActions, event: ContextOverflow) -> None:
    """Ask what the model may forget."""
    question = f"This conversation has {event.tokens:,} tokens, the context holds {app.session.context:,}."
    options: list[tuple[TrimOption | None, str, str]] = [
        (one, f"the first {one.dropped:,} questions and answers", f"{one.tokens:,} tokens remain")
        for one in event.offers
    ]
    chosen = await app.push_screen_wait(ChoiceDialog(f"{question} What may the model forget?", options))
    if chosen is None:
        app.say("Nothing is left out: /drop offers it again.")
    else:
        app.session.drop(chosen)
        app.say(f"The model is no longer told the first {chosen.dropped:,} questions and answers.")


TO_CONVERSATION: dict[str, Callable[[ChatActions, int], Awaitable[None]]] = {
    "rename": rename,
    "pin": pin,
    "delete": delete,
    "undo": undo,
}


_KEYS = """\
Enter sends, Ctrl+J makes a new line, Up brings back what was sent. @path attaches a text file, Tab \
completes it. Page up and Page down scroll. Ctrl+Up goes to the messages: there e edits, r writes \
again, c copies, Left and Right switch branches. A message that begins with // begins with a slash.
"""


def help_text() -> RenderableType:
    """Every key and command."""
    table = Table.grid(padding=(0, 2))
    for whole in (True, True, False):
        table.add_column(no_wrap=whole)
    for one in TABLE.values():
        key = one.key.title().replace("Escape", "Esc")
        table.add_row(Text(key, "bold"), f"/{one.name} {one.argument}", one.about)
    table.add_row(Text("Ctrl+P", "bold"), "", "The same as a palette")
    return Group(_KEYS, table)


class CommandPalette(Provider):
    """The same commands in Textual's palette."""

    async def discover(self) -> Hits:
        for one in TABLE.values():
            yield DiscoveryHit(one.name, self._run(one), help=one.about)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for one in TABLE.values():
            if (score := matcher.match(f"{one.name} {one.about}")) > 0:
                yield Hit(score, matcher.highlight(one.name), self._run(one), help=one.about)

    def _run(self, one: Command) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self.app.run_action(f"command({one.name!r})")

        return run
