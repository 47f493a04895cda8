"""How a model of any kind is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True, slots=True)
class Options:
    """What all runtimes have in common. Zero leaves the choice to the machine or the model.

    Each of `sequences` holds `context` tokens. `max_rows` bounds the logits of one forward pass: its buffer
    costs max_rows * vocabulary * 4 bytes (19 MB for 32 rows of 151,936). `batch` tokens of a prompt are
    evaluated at once: more cost memory (68 MB for 512 with the 1.5B) and gain nothing on two cores.
    """

    context: int = 4096
    threads: int = 0
    sequences: int = 1
    max_rows: int = 32
    batch: int = 128

    @property
    def engine(self) -> str:
        """What computes, by name."""
        raise NotImplementedError

    def thread_counts(self, cores: int) -> tuple[int, int]:
        """Threads for passes of one row and of several, on a machine of so many `cores`."""
        return self.threads or cores, self.threads or cores

    def with_threads(self, one_row: int, many_rows: int) -> Self:
        """The same with threads for passes of one row and of several, where these can differ."""
        return replace(self, threads=one_row)
