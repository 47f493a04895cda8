"""How much memory a model takes, and whether there is as much: asked before native code takes it.

Beyond the limit of a control group the process ends without a message, and beyond the machine's memory the
system ends other programs first, or swaps until nothing responds.

Figures are the least that a model can do with: what would fit is never refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgespec.core import EdgespecError
from edgespec.machine.sensors import memory_available

SWITCH = "EDGESPEC_NO_MEMORY_CHECK"
"""The environment variable that, set to anything but 0, turns the check off."""

_BUFFERS = 16 << 20  # bytes that any model takes besides weights, caches and logits, and any further context


class TooLargeError(EdgespecError):
    """A model needs more memory than is free."""


def require_memory(name: str, weights: int, caches: int, logits: int, contexts: int = 0) -> None:
    """Raise TooLargeError unless there is room for so many bytes of each, logits twice, and for buffers.

    An engine holds logits in its graph and once more where they are read. `contexts`: how many there are with
    buffers of their own.
    """
    if os.environ.get(SWITCH, "") not in ("", "0"):
        return
    needed = weights + caches + 2 * logits + (1 + contexts) * _BUFFERS
    free = memory_available()
    if needed > free:
        raise TooLargeError(
            f"{name} needs about {_rounded(needed, up=True)} of memory and {_rounded(free)} are free: "
            f"choose a smaller model or context, or set {SWITCH}=1 to load it all the same."
        )


@contextmanager
def unless_too_large(say: Callable[[str], None]) -> Iterator[None]:
    """For loading a draft model, without which the target answers, too: `say` hears why it is left out."""
    try:
        yield
    except TooLargeError as error:
        say(f"Decoding without a draft model: {error}")


def _rounded(count: int, up: bool = False) -> str:
    """Bytes in words, rounded so that of two different counts the larger one never looks smaller."""
    unit, name, digits = (10**9, "GB", 1) if count >= 10**9 else (10**6, "MB", 0)
    step = unit // 10**digits
    steps = -(-count // step) if up else count // step
    return f"{steps / 10**digits:,.{digits}f} {name}"
