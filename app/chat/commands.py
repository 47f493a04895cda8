"""The chat's commands. `command_table` registers them; docs/add-a-chat-command.md shows how to add one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from edgespec.app.chat.actions import ChatActions, ScreenActions
from edgespec.app.chat.attachments import attach, path_of
from edgespec.app.chat.command_table import command, help_text, screen_command
from edgespec.app.chat.history_worker import delete_conversation
from edgespec.app.chat.thoughts import parts

if TYPE_CHECKING:  # these import SQLite, among others
    from edgespec.app.chat.events import ContextOverflow, TrimOption
    from edgespec.app.history.rows import Conversation
    from edgespec.app.history.store import History

_NOTHING_STORED = "this conversation is empty: send a message first"


# --- the answer ---


@command("new", "Start a new conversation", key="ctrl+l")
async def _new(chat: ChatActions, _: str) -> None:
    chat.session.new()


@screen_command("stop", "Stop the answer", key="escape")
async def _stop(chat: ScreenActions, _: str) -> None:
    if not chat.leave():
        chat.session.stop()


@command("regenerate", "Regenerate the last answer", key="ctrl+r")
async def _regenerate(chat: ChatActions, _: str) -> None:
    if not chat.session.regenerate():
        chat.note("no answer to regenerate: send a message first")


@command("continue", "Continue a stopped answer", key="ctrl+t")
async def _continue(chat: ChatActions, _: str) -> None:
    if not chat.session.resume():
        chat.note("no stopped answer at the end of this conversation")


@command("edit", "Edit the last question", key="f2", argument="TEXT")
async def _edit(chat: ChatActions, argument: str) -> None:
    if (question := chat.session.last("user")) is None:
        chat.note("no question to edit: send a message first")
    elif argument:
        text, _ = await asyncio.to_thread(attach, argument)
        chat.session.edit(question, text)
    else:
        chat.begin_edit(question)


@command("previous", "Show the previous branch", key="alt+left")
async def _previous(chat: ChatActions, _: str) -> None:
    _switch(chat, -1)


@command("next", "Show the next branch", key="alt+right")
async def _next(chat: ChatActions, _: str) -> None:
    _switch(chat, 1)


def _switch(chat: ChatActions, step: int) -> None:
    forked = [item for item in chat.session.items if item.places > 1]
    if not forked or not chat.session.switch(forked[-1], step):
        chat.note("only one branch: /edit a question or /regenerate an answer to create another")


@screen_command("copy", "Copy the last answer", key="ctrl+y")
async def _copy(chat: ScreenActions, _: str) -> None:
    if (answer := chat.session.last("assistant")) is not None and answer.text:
        chat.copy(parts(answer.text)[1], "the answer")
    else:
        chat.note("no answer to copy: send a message first")


@screen_command("code", "Copy a code block (default: the last)", key="f5", argument="NUMBER")
async def _code(chat: ScreenActions, argument: str) -> None:
    from edgespec.app.chat.markup import code_blocks

    answers = [item.text for item in chat.session.items if item.role == "assistant"]
    blocks = [block for text in answers for block in code_blocks(text)]
    number = int(argument) if argument.isdecimal() else 0 if argument else len(blocks)
    if 1 <= number <= len(blocks):
        chat.copy(blocks[number - 1], "the code block")
    else:
        chat.note(f"no such code block: this conversation has {len(blocks)}, /code 1 copies the first")


# --- conversations ---


@screen_command("sidebar", "Show or hide the conversations", key="ctrl+b")
async def _sidebar(chat: ScreenActions, _: str) -> None:
    chat.toggle_sidebar()


@command("search", "Search or list all conversations", key="ctrl+f", argument="WORDS")
async def _search(chat: ChatActions, argument: str) -> None:
    chat.show_conversations(argument)


@command("open", "Open a conversation (or /open last)", argument="NUMBER")
async def _open(chat: ChatActions, argument: str) -> None:
    if argument == "last":
        chat.session.new()
        chat.session.open_last()
    elif argument.isdecimal():
        chat.session.open(int(argument))
    else:
        chat.show_conversations()


@command("rename", "Rename the conversation", argument="TITLE")
async def _rename(chat: ChatActions, argument: str) -> None:
    if (number := _number(chat)) is not None:
        await rename(chat, number, argument)


async def rename(chat: ChatActions, number: int, title: str = "") -> None:
    if not title:
        before = await chat.ask_history(lambda history: history.conversation(number).title)
        title = (await chat.ask_text("Title of the conversation", before) or "").strip()
    if title:
        await chat.ask_history(lambda history: history.rename(number, title))


@command("pin", "Pin the conversation, or unpin it")
async def _pin(chat: ChatActions, _: str) -> None:
    if (number := _number(chat)) is not None:
        await pin(chat, number)


async def pin(chat: ChatActions, number: int) -> None:
    def job(history: History) -> bool:
        pinned = not history.conversation(number).pinned
        history.pin(number, pinned)
        return pinned

    chat.note("pinned" if await chat.ask_history(job) else "no longer pinned")


@command("delete", "Delete the conversation (see /undo)")
async def _delete(chat: ChatActions, _: str) -> None:
    if (number := _number(chat)) is not None:
        await delete(chat, number)


async def delete(chat: ChatActions, number: int) -> None:
    if chat.session.chat.number == number:
        chat.session.new()
    messages = await chat.ask_history(lambda history: delete_conversation(history, number))
    chat.session.forget(messages)
    chat.note("deleted: /undo restores it within 30 days")


@command("undo", "Restore the conversation deleted last")
async def _undo(chat: ChatActions, _: str) -> None:
    await undo(chat)


async def undo(chat: ChatActions, _: int = 0) -> None:
    def job(history: History) -> int | None:
        deleted: list[Conversation] = history.conversations(1, deleted=True)
        if deleted:
            history.restore(deleted[0].id)
        return deleted[0].id if deleted else None

    number = await chat.ask_history(job)
    if number is None:
        chat.note("no deleted conversation to restore")
    else:
        chat.session.open(number)


@command("export", "Export the conversation to .md or .json", argument="FILE")
async def _export(chat: ChatActions, argument: str) -> None:
    if (number := _number(chat)) is None:
        return
    name = argument or await chat.ask_text("File to export to (.md or .json)")
    if not name:
        return
    path = path_of(name)

    def job(history: History) -> None:
        from edgespec.app.history import io as history_io

        if path.suffix == ".json":
            history_io.write(path, history_io.to_json(history, [number]))
        else:
            history_io.write(path, history_io.to_markdown(history, number))

    await chat.ask_history(job)
    chat.note(f"exported to {path}")


@command("import", "Add the conversations of a .json export", argument="FILE")
async def _import(chat: ChatActions, argument: str) -> None:
    name = argument or await chat.ask_text("File to import (.json)")
    if not name:
        return

    def job(history: History) -> list[int]:
        from edgespec.app.history import io as history_io

        return history_io.from_json(history, history_io.read(path_of(name)))

    if numbers := await chat.ask_history(job):
        chat.note(f"imported {len(numbers)} conversation{'s' * (len(numbers) > 1)}")
        chat.session.open(numbers[-1])


def _number(chat: ChatActions) -> int | None:
    """The number of the conversation shown. None, after a note, before its first message."""
    if chat.session.chat.number is None:
        chat.note(_NOTHING_STORED)
    return chat.session.chat.number


CONVERSATION_COMMANDS: dict[str, Callable[[ChatActions, int], Awaitable[None]]] = {
    "rename": rename,
    "pin": pin,
    "delete": delete,
    "undo": undo,
}
"""The commands of the list of conversations, which are given a conversation's number."""


# --- the model and what it gets ---


@command("model", "Choose another model, or download one", key="f4", argument="NAME")
async def _model(chat: ChatActions, argument: str) -> None:
    from edgespec.models.hub.selection import choices

    if chat.opener is None:
        chat.note("the server chooses the model: start the chat again with another --model")
        return
    name: str | None = argument
    if not name:
        found = await asyncio.to_thread(choices)
        current = chat.session.name
        options = [
            (one.name, f"{one.name} · in use" if one.name == current else one.name, one.about)
            for one in found
        ]
        question = "Choose a model" if current else "No model on this machine: choose one to download"
        name = await chat.choose(question, options)
        if name and not next(one.here for one in found if one.name == name):
            chat.fetch(name)
            return
    if name:
        chat.use(name)


@command("persona", "Choose a persona: a named system prompt", key="f7", argument="NAME")
async def _persona(chat: ChatActions, argument: str) -> None:
    personas = chat.settings.personas
    options = [("", "none", "no system prompt"), *((name, name, text) for name, text in personas.items())]
    question = "Persona of this conversation (defined under [personas] in the settings file)"
    name = argument or await chat.choose(question, options)
    if name is not None:
        text = chat.settings.prompt_of(name) if name else ""
        chat.session.configure(system=text, persona=name)
        chat.note(f"persona: {name or 'none'}")


@command("system", "Set the system prompt", argument="TEXT")
async def _system(chat: ChatActions, argument: str) -> None:
    text = argument or await chat.ask_text("System prompt", chat.session.chat.system)
    if text is not None:
        chat.session.configure(system=text, persona="")
        chat.note("the system prompt is used from the next answer on")


@command(
    "drop",
    "Leave messages out (/drop none: undo)",
    argument="NUMBER",
)
async def _drop(chat: ChatActions, argument: str) -> None:
    session = chat.session
    options = session.overflow.options if session.overflow is not None else ()
    if argument == "none":
        session.drop(None)
        chat.note("the prompt includes the whole conversation again")
    elif argument.isdecimal() and 1 <= int(argument) <= len(options):
        drop(chat, options[int(argument) - 1])
    elif argument:
        chat.note("no such option: /drop lists what can be left out")
    elif not session.offer():
        chat.note("nothing to leave out: the conversation has one question")


def drop(chat: ChatActions, option: TrimOption) -> None:
    chat.session.drop(option)
    chat.note(f"the prompt no longer includes {trim_text(option)}")


async def offer(chat: ChatActions, event: ContextOverflow) -> None:
    """Ask what the prompt may leave out."""
    options = [(one, trim_text(one), f"{one.tokens:,} tokens remain") for one in event.options]
    question = f"{overflow_text(chat, event)}: choose what to leave out of the prompt"
    option = await chat.choose(question[0].upper() + question[1:], options)
    if option is None:
        chat.note("nothing is left out: /drop offers it again")
    else:
        drop(chat, option)


def overflow_text(chat: ChatActions, event: ContextOverflow) -> str:
    return f"the conversation has {event.tokens:,} tokens, the context {chat.session.context:,}"


def trim_text(option: TrimOption) -> str:
    if option.dropped == 1:
        return "the first question and its answer"
    return f"the first {option.dropped:,} questions and answers"


@command("mode", "Switch to the next performance mode", key="f3")
async def _mode(chat: ChatActions, _: str) -> None:
    chat.note(f"mode: {chat.session.mode}" if chat.session.next_mode() else "this model has no modes")


# --- the screen ---


@screen_command("settings", "Change the settings", key="f6")
async def _settings(chat: ScreenActions, _: str) -> None:
    if (settings := await chat.edit_settings()) is not None:
        chat.apply(settings)


@screen_command("theme", "Switch to dark, light or high contrast", key="f8", argument="NAME")
async def _theme(chat: ScreenActions, argument: str) -> None:
    from edgespec.app import settings

    names = list(settings.WORDS["theme"])
    name = argument or names[(names.index(chat.settings.theme) + 1) % len(names)]
    chat.apply(settings.changed(chat.settings, "theme", name))


@screen_command("engine", "Show or hide the engine panel", key="ctrl+g")
async def _engine(chat: ScreenActions, _: str) -> None:
    chat.toggle_panel()


@screen_command("messages", "Move from message to message", key="ctrl+up")
async def _messages(chat: ScreenActions, _: str) -> None:
    chat.focus_message(-1)


@command("help", "Show keys and commands", key="f1")
async def _help(chat: ChatActions, _: str) -> None:
    chat.show("Help", help_text(plain=chat.plain))


@command("quit", "Leave the chat", key="ctrl+q")
async def _quit(chat: ChatActions, _: str) -> None:
    chat.quit()
