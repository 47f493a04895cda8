"""Where a prompt should leave checkpoints, for models whose state cannot be cut at any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

_NEAR = 8  # tokens between control tokens that belong together: the end of a message and the next beginning
_SHORT = 32  # tokens: a shorter prefix is evaluated again as quickly
_FIRST_DISTANCE = 512  # tokens before the end of the prompt; then twice as many, and so on


def marks(prompt: Sequence[int], is_control: Callable[[int], bool]) -> list[int]:
    """Return the lengths, ascending, at which a later prompt is likely to leave `prompt`.

    Chat templates separate messages by control tokens. The end of the first message is that of the system
    prompt, which other conversations share. The end of the last one, before the answer: templates that drop
    earlier reasoning leave the text there; without control tokens, the end of the prompt. Further ones lie at
    doubling distances from the end of the prompt.
    """
    control = {token for token in set(prompt) if is_control(token)}
    places = [i for i, token in enumerate(prompt) if token in control]
    ends = [i for i, after in pairwise([*places, len(prompt) + _NEAR]) if after - i >= _NEAR]
    ends = [end for end in ends or [len(prompt) - 1] if end >= _SHORT]
    found = {*ends[:1], *ends[-1:]}
    distance = _FIRST_DISTANCE
    while (limit := len(prompt) - distance) >= _SHORT:
        found.add(max((end for end in ends if end <= limit), default=limit))
        distance *= 2
    return sorted(found)
