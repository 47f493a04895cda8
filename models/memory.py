"""A check that a model's memory is available, before native code allocates it.

Beyond the limit of a control group the process is killed without a message; beyond the machine's memory the
system kills other programs first, or swaps until nothing responds.

The figures are lower bounds: a model that would fit is never refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from edgespec.core import EdgespecError
from edgespec.machine.sensors import memory_available

T = TypeVar("T")
SWITCH = "EDGESPEC_NO_MEMORY_CHECK"
"""Environment variable that disables the check unless it is empty or 0."""

_BUFFERS = 16 << 20  # bytes of a model in addition to weights, caches and logits, and of each further context


class TooLargeError(EdgespecError):
    """Not enough free memory for a model."""


def require_memory(name: str, weights: int, caches: int, logits: int, contexts: int = 0) -> None:
    """Raise TooLargeError unless there is memory for `weights`, `caches`, twice `logits` (bytes) and buffers.

    An engine holds logits in its graph and again in an output buffer. `contexts`: number of contexts with
    buffers of their own.
    """
    if os.environ.get(SWITCH, "") not in ("", "0"):
        return
    needed = weights + caches + 2 * logits + (1 + contexts) * _BUFFERS
    free = memory_available()
    if needed > free:
        raise TooLargeError(
            f"{name} needs about {_rounded(needed, up=True)} of memory and {_rounded(free)} are free: "
            f"choose a smaller model or context, or set {SWITCH}=1 to load it anyway"
        )


def first_that_fits(candidates: Iterable[T], require: Callable[[T], None]) -> T:
    """Return the first of `candidates` that `require` accepts. Raises its TooLargeError for the first."""
    errors: list[TooLargeError] = []
    for candidate in candidates:
        try:
            require(candidate)
        except TooLargeError as error:
            errors.append(error)
        else:
            return candidate
    raise errors[0]


def shorter(name: str, wanted: int, context: int) -> str:
    """Return the note that a model has a context of fewer tokens than `wanted`."""
    return (
        f"memory is short: {name} has a context of {context:,} instead of {wanted:,} tokens "
        f"(--context {wanted} refuses that)"
    )


@contextmanager
def unless_too_large(note: Callable[[str], None]) -> Iterator[None]:
    """Report a TooLargeError to `note` and continue: for a draft model, which the target can do without."""
    try:
        yield
    except TooLargeError as error:
        note(f"decoding without a draft model: {error}")


def _rounded(count: int, up: bool = False) -> str:
    """Format `count` bytes, rounded up or down, so that the larger of two counts never looks smaller."""
    unit, name, digits = (10**9, "GB", 1) if count >= 10**9 else (10**6, "MB", 0)
    step = unit // 10**digits
    steps = -(-count // step) if up else count // step
    return f"{steps / 10**digits:,.{digits}f} {name}"
