"""A conversation's messages: as they are shown, as the history stores them, as a model gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgespec.app.chat.thoughts import parts

if TYPE_CHECKING:  # these import numpy
    from edgespec.app.engine.request import GenerationStats
    from edgespec.app.history.rows import Conversation, MessageRole, MessageState, Sources, StoredMessage

SINCE = "since"  # in the settings of a conversation: the first message of the prompt
_FIGURES = (
    "tokens_per_second", "seconds_to_first_token", "tokens_per_round", "drafted", "accepted", "rounds",
    "stop_reason", "prompt_tokens", "cached_tokens",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class BranchMessage:
    """A message of the branch shown, the `place`-th of `places` siblings."""

    id: int
    role: MessageRole
    text: str
    state: MessageState
    parent: BranchMessage | None = None
    place: int = 1
    places: int = 1
    stats: Mapping[str, Any] = field(default_factory=dict)
    sources: Sources = ()
    error: str = ""
    stored: int = 0
    """Characters of `text` that are in the history."""


class Chat:
    """The conversation shown. `about` is None until its first message is stored."""

    def __init__(self, number: int | None = None, system: str = "", persona: str = "") -> None:
        self.number = number  # set in the thread of the history
        self.about: Conversation | None = None
        self.items: list[BranchMessage] = []
        self.system, self.persona = system, persona

    @property
    def title(self) -> str:
        return self.about.title if self.about is not None else ""

    @property
    def since(self) -> int:
        """The first message that is part of the prompt."""
        since = self.about.sampling.get(SINCE, 0) if self.about is not None else 0
        return since if isinstance(since, int) else 0


def stored_stats(result: GenerationStats) -> dict[str, Any]:
    """The statistics of an answer that the history stores."""
    return {key: value for key, value in result.as_json().items() if key in _FIGURES}


def merge_branch(
    before: Sequence[BranchMessage], branch: Sequence[StoredMessage]
) -> tuple[list[BranchMessage], int]:
    """The messages of `branch`, with the objects of `before` reused.

    Returns them with the number of leading ones that need not be drawn again.
    """
    known = {item.id: item for item in before}
    items: list[BranchMessage] = []
    keep = 0
    for i, message in enumerate(branch):
        parent = items[-1] if items else None
        item = known.get(message.id)
        same = item is not None and (item.place, item.places) == (message.place, message.places)
        if item is None:
            item = BranchMessage(
                message.id, message.role, message.text, message.state, parent,
                stats=message.stats, sources=message.sources, stored=len(message.text),
            )  # fmt: skip
        item.parent, item.place, item.places = parent, message.place, message.places
        items.append(item)
        if same and keep == i and i < len(before) and before[i] is item:
            keep += 1
    return items, keep


def model_messages(last: BranchMessage | None, system: str, since: int = 0) -> list[dict[str, str]]:
    """The conversation up to `last` as a model gets it, without messages whose id is below `since`.

    A question whose answer is empty is left out, unless it is the last one; and so is the reasoning of all
    answers but `last`.
    """
    messages: list[dict[str, str]] = []
    item, follower = last, True
    while item is not None and item.id >= since:
        if item.role == "assistant":
            follower = bool(item.text) or item is last
            if text := item.text if item is last else parts(item.text)[1]:
                messages.append({"role": "assistant", "content": text})
        elif item.role != "user" or follower:
            messages.append({"role": item.role, "content": item.text})
            follower = False
        item = item.parent
    while messages and messages[-1]["role"] == "assistant":  # an answer without its question
        messages.pop()
    if system:
        messages.append({"role": "system", "content": system})
    return messages[::-1]
