"""Loading options shared by all runtimes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Options:
    """Options of any runtime. Zero leaves the choice to the machine or the model.

    Each of `sequences` holds `context` tokens; where memory is short, that is halved down to `least_context`,
    0: never. `max_rows` limits the rows of logits of one forward pass: the
    buffer takes max_rows * vocabulary * 4 bytes (19 MB for 32 rows of 151,936). `batch` is the number of
    prompt tokens evaluated at once: a larger one takes more memory (68 MB for 512 with the 1.5B model) and
    is no faster on two cores.
    """

    context: int = 4096
    least_context: int = 0
    threads: int = 0
    sequences: int = 1
    max_rows: int = 32
    batch: int = 128

    def smaller_contexts(self) -> Iterator[Self]:
        """Yield these options, then those with less context that may be used where memory is short."""
        yield self
        context = self.context // 2
        while 0 < self.least_context <= context:
            yield replace(self, context=context)
            context //= 2

    @property
    def engine(self) -> str:
        """Name of the inference engine."""
        raise NotImplementedError

    def thread_counts(self, cores: int) -> tuple[int, int]:
        """Return the thread counts for passes of one row and of several, on a machine with `cores` cores."""
        return self.threads or cores, self.threads or cores

    def with_threads(self, one_row: int, many_rows: int) -> Self:
        """Return a copy with these threads for passes of one row and of several, where they can differ."""
        return replace(self, threads=one_row)
