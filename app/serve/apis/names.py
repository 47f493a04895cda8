"""The names under which the model is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

DEFAULT_ALIASES = ("claude-*", "codex-*", "gpt-*-codex*", "gpt-5.*")
"""Names that Claude Code and Codex send on their own, for titles, summaries and reviews."""

_SIZED = re.compile(r"(?P<base>.+?)-(?P<size>\d+(?:\.\d+)?[bBmM])(?:-(?P<rest>.+))?")


class ModelNames:
    """The names of one model: those that are listed, and patterns (`claude-*`) that match others."""

    def __init__(self, names: Sequence[str], defaults: Sequence[str] = DEFAULT_ALIASES) -> None:
        """`names` may contain patterns; the first one must be a name. `defaults` are more patterns."""
        self.listed = [name for name in dict.fromkeys(names) if not _is_pattern(name)]
        self._patterns = [name for name in names if _is_pattern(name)]
        self._patterns += [*defaults, *(one for name in self.listed for one in _ollama_names(name))]

    def resolve(self, name: str) -> str | None:
        """Return the name to answer with, None if it is that of another model. "" is the first name."""
        if not name:
            return self.listed[0]
        if name in self.listed:
            return name
        lower = name.lower()
        matches = (fnmatchcase(lower, pattern.lower()) for pattern in [*self.listed, *self._patterns])
        return name if any(matches) else None


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _ollama_names(name: str) -> list[str]:
    """Return the spellings of a name in Ollama: `qwen2.5-coder:0.5b` for qwen2.5-coder-0.5b."""
    found = [f"{name}:latest"]
    if sized := _SIZED.fullmatch(name):
        base, size, rest = sized["base"], sized["size"], sized["rest"]
        found.append(f"{base}:{size}")
        if rest:
            found.append(f"{base}:{size}-{rest}")
    return found
