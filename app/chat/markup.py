"""Markdown as text: a parser whose output is clean, and where a growing text is split. Free of Textual."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token

from edgespec.app.terminal import clean, one_line

SECTION_LINES = 60  # of a text, from which on it is split
_BLOCKS = 20  # of a section
_FENCE = re.compile(r"^[ \t>*+\-\d.)]*(?:`{3,}|~{3,})", re.MULTILINE)  # in lists and quotes, too


def parser() -> MarkdownIt:
    """A parser with clean output: a Markdown entity like `&#x202e;` yields a character not in the source."""

    def scrub(state: StateCore) -> None:
        def walk(tokens: list[Token]) -> None:
            for token in tokens:
                token.content = clean(token.content)
                token.attrs = {k: one_line(v) if isinstance(v, str) else v for k, v in token.attrs.items()}
                walk(token.children or [])
                if token.type in ("fence", "code_block"):
                    # Detecting the language at every new piece is far too slow.
                    token.info = one_line(token.info) or "text"

        walk(state.tokens)

    # Without HTML: with it, `<int>` and `<think>` would not be shown.
    made = MarkdownIt("gfm-like", {"html": False})
    made.core.ruler.push("scrub", scrub)
    return made


def is_complete(text: str) -> bool:
    """Whether the text after `text` starts a new block in any case."""
    tokens = parser().parse(text) if text.endswith("\n\n") else []
    if not tokens or tokens[-1].type not in (
        "paragraph_close",
        "heading_close",
        "table_close",
        "hr",
        "fence",
    ):
        return False
    return tokens[-1].type != "fence" or _is_closed(text, tokens[-1])


def _is_closed(text: str, fence: Token) -> bool:
    lines = text.split("\n")[slice(*fence.map or (0, 0))]
    return len(lines) > 1 and _ends_fence(lines[-1].lstrip(" >"), fence.markup)


def _ends_fence(line: str, markup: str) -> bool:
    line = line.strip()
    return line.startswith(markup) and not line.strip(markup[0])


def has_fence(text: str) -> bool:
    """Whether a line of `text` may open or close a code block."""
    return _FENCE.search(text) is not None


@dataclass(frozen=True, slots=True)
class OpenFence:
    """A code block that is not closed at the end of a text.

    `prefix` is the indentation or quote mark before its lines, `gap` the white space at its end, which the
    parser's code block drops.
    """

    markup: str
    prefix: str
    gap: str

    def split(self, more: str) -> tuple[str, str]:
        """Split the text that follows into the code of the block, without prefixes, and the rest."""
        lines = more.split("\n")
        for number, line in enumerate(lines):
            lines[number] = line = self._without_prefix(line)
            if _ends_fence(line, self.markup):
                return "\n".join(lines[:number]), "\n".join(more.split("\n")[number + 1 :])
        return "\n".join(lines), ""

    def _without_prefix(self, line: str) -> str:
        at = 0
        for character in self.prefix:
            at += line[at : at + 1] == character
        return line[at:]


def open_fence(text: str) -> OpenFence | None:
    """The code block that is open at the end of `text`, if there is one."""
    fences = [token for token in parser().parse(text) if token.type == "fence"] if has_fence(text) else []
    if not fences or fences[-1].map is None or _is_closed(text, fences[-1]):
        return None
    (start, end), lines = fences[-1].map, text.split("\n")
    if end < len(lines) - (not lines[-1]):
        return None  # something follows, as in the next item of a list
    code, markup = fences[-1].content, fences[-1].markup
    prefix = re.sub("[^>]", " ", lines[start][: lines[start].index(markup)])
    return OpenFence(markup, prefix, code[len(code.rstrip()) :])


def split_sections(text: str) -> list[str]:
    """Split `text` into sections of about `_BLOCKS` blocks or list items.

    A long code block is split, too: each new line would highlight all of it again.
    """
    if text.count("\n") <= SECTION_LINES:
        return [text]
    lines = text.split("\n")
    cuts: list[tuple[int, str, str]] = []  # line, end of the section before it, start of the next
    blocks = last = 0
    for token in parser().parse(text):
        item = token.level == 1 and token.type == "list_item_open"
        if token.map is None or not (token.level == 0 or item):
            continue
        start, end = token.map
        blocks += 1
        if blocks > _BLOCKS or start - last > SECTION_LINES:
            blocks, last = 1, start
            cuts.append((start, "", ""))
        if token.type == "fence":
            inside = range(start + 1 + SECTION_LINES, end - 1, SECTION_LINES)
            last = max((last, *inside))
            cuts += [(at, f"{token.markup}\n", f"{lines[start]}\n") for at in inside]
    parts, begin, opening = [], 0, ""
    for at, closing, reopening in cuts:
        parts.append(opening + "".join(f"{line}\n" for line in lines[begin:at]) + closing)
        begin, opening = at, reopening
    return [*parts, opening + "\n".join(lines[begin:])]


def code_blocks(text: str) -> list[str]:
    """The code blocks of a Markdown text, in order."""
    return [token.content for token in parser().parse(text) if token.type in ("fence", "code_block")]
