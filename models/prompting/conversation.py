"""Conversations in the roles and the order that a model's chat template can show.

Clients put system messages anywhere and several messages of one role in a row. Some templates refuse that or
leave messages out without a word, so each template is tried with short conversations when that matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise, takewhile

from edgespec.core import EdgespecError
from edgespec.models.prompting.chat_template import ChatTemplate, Message, fold_system

_FREE = ("system", "system", "user", "assistant", "system", "user", "system")
_FIRST = ("system", "user", "assistant", "user")
_IN_A_ROW = ("user", "user", "assistant", "assistant", "user")


class TemplateFit:
    """What one template can show, found by trying when it is needed. Belongs to one thread at a time."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def fitted(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` so that the template shows all of them.

        Where system messages may only be the first one, those that begin the conversation become one, and
        later ones messages of the user. Without a system role, they are folded into the first message of the
        user. Where roles must alternate, messages in a row are joined. Contents must be strings.
        """
        found = list(messages)
        if any(message["role"] == "system" for message in found) and not self._system_anywhere:
            found = self._with_system_first(found)
        in_a_row = any(_joinable(one, other) for one, other in pairwise(found))
        return list(_joined(found)) if in_a_row and not self._roles_in_a_row else found

    @cached_property
    def _system_anywhere(self) -> bool:
        return self._shows(_FREE)

    @cached_property
    def _system_first(self) -> bool:
        return self._shows(_FIRST)

    @cached_property
    def _roles_in_a_row(self) -> bool:
        return self._shows(_IN_A_ROW)

    def _with_system_first(self, messages: Sequence[Message]) -> list[Message]:
        lead = list(takewhile(lambda message: message["role"] == "system", messages))
        rest: list[Message] = [
            {"role": "user", "content": message["content"]} if message["role"] == "system" else message
            for message in messages[len(lead) :]
        ]
        if not lead:
            return rest
        if self._system_first:
            return [{"role": "system", "content": "\n\n".join(one["content"] for one in lead)}, *rest]
        return fold_system([*lead, *rest])

    def _shows(self, roles: Sequence[str]) -> bool:
        """Whether the output contains every message of a conversation in these roles."""
        texts = [f"probe{i}end" for i in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            output = "".join(self._template.render(messages))
        except EdgespecError:
            return False
        return all(text in output for text in texts)


def _joinable(one: Message, other: Message) -> bool:
    """Whether two messages in a row can become one: text of the same side."""
    return one["role"] == other["role"] in ("user", "assistant") and "tool_calls" not in one


def _joined(messages: Sequence[Message]) -> Iterator[Message]:
    last: Message | None = None
    for message in messages:
        if last is not None and _joinable(last, message):
            text = "\n\n".join(one for one in (last["content"], message["content"]) if one)
            last = {**last, **message, "content": text}
            continue
        if last is not None:
            yield last
        last = message
    if last is not None:
        yield last
