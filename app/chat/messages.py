"""The values a chat is made of: messages as they are shown, and what happens to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these import numpy
    from edgespec.app.engine.request import GenerationStats
    from edgespec.app.history.rows import Conversation, MessageRole, MessageState, Sources, StoredMessage

SINCE = "since"  # in a conversation's settings: the first message the model is told
_FIGURES = (
    "tokens_per_second", "seconds_to_first_token", "tokens_per_round", "drafted", "accepted", "rounds",
    "stop_reason", "prompt_tokens", "cached_tokens",
)  # fmt: skip


@dataclass(slots=True, eq=False)
class BranchMessage:
    """A message of the branch shown, the `place`-th of `places` that stand beside each other."""

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
    kept: int = 0
    """Characters of `text` that the history holds."""


class Chat:
    """The conversation shown. `about` is None until its first message is kept."""

    def __init__(self, number: int | None = None, system: str = "", persona: str = "") -> None:
        self.number = number  # set in the history's thread
        self.about: Conversation | None = None
        self.items: list[BranchMessage] = []
        self.system, self.persona = system, persona

    @property
    def title(self) -> str:
        return self.about.title if self.about is not None else ""

    @property
    def since(self) -> int:
        """The first message that the model is told."""
        since = self.about.sampling.get(SINCE, 0) if self.about is not None else 0
        return since if isinstance(since, int) else 0


def figures(result: GenerationStats) -> dict[str, Any]:
    """What the history keeps of how an answer was written."""
    return {key: value for key, value in result.as_json().items() if key in _FIGURES}


def merged(
    before: Sequence[BranchMessage], branch: Sequence[StoredMessage]
) -> tuple[list[BranchMessage], int]:
    """The items of `branch`, the known ones as they are, and how many leading ones need no new drawing."""
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
                stats=message.stats, sources=message.sources, kept=len(message.text),
            )  # fmt: skip
        item.parent, item.place, item.places = parent, message.place, message.places
        items.append(item)
        if same and keep == i and i < len(before) and before[i] is item:
            keep += 1
    return items, keep


def told(last: BranchMessage | None, system: str, since: int = 0) -> list[dict[str, str]]:
    """The conversation up to `last` as a model gets it, without messages whose id is below `since`.

    A question without a word of answer is left out, unless it is the last message.
    """
    messages: list[dict[str, str]] = []
    item, follower = last, True
    while item is not None and item.id >= since:
        if item.role == "assistant":
            follower = bool(item.text) or item is last
            if item.text:
                messages.append({"role": "assistant", "content": item.text})
        elif item.role != "user" or follower:
            messages.append({"role": item.role, "content": item.text})
            follower = False
        item = item.parent
    while messages and messages[-1]["role"] == "assistant":  # begins with what nobody asked
        messages.pop()
    if system:
        messages.append({"role": "system", "content": system})
    return messages[::-1]


@dataclass(frozen=True, slots=True)
class Loading:
    share: float


@dataclass(frozen=True, slots=True)
class Loaded:
    context: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadFailed:
    error: str


@dataclass(frozen=True, slots=True)
class TextAppended:
    item: BranchMessage
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is over: with a result, with an error, or withdrawn before it began."""

    item: BranchMessage
    result: GenerationStats | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """Another branch or conversation is shown: all but the first `keep` items are to be drawn again.

    `at` is the message to be looked at, None for the end.
    """

    keep: int
    at: int | None = None


@dataclass(frozen=True, slots=True)
class TrimOption:
    """Leave out what stands before message `since`: then the prompt has `tokens`."""

    since: int
    dropped: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ContextOverflow:
    """The conversation does not fit into the context, and the answer waits for what to leave out."""

    item: BranchMessage
    tokens: int
    offers: tuple[TrimOption, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """Something for the user to read. `text` is what was typed and could not be kept."""

    note: str
    bad: bool = False
    text: str = ""


ChatEvent = Loading | Loaded | LoadFailed | TextAppended | Ended | Changed | ContextOverflow | Notice


def joined(events: Sequence[ChatEvent]) -> list[ChatEvent]:
    """The text of a burst in one piece."""
    news: list[ChatEvent] = []
    for event in events:
        last = news[-1] if news else None
        if isinstance(event, TextAppended) and isinstance(last, TextAppended) and last.item is event.item:
            news[-1] = TextAppended(event.item, last.text + event.text)
        else:
            news.append(event)
    return news
