"""Slots of a model's KV cache, and the choice of a slot for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgespec.core import common_prefix
from edgespec.models.runtime import ModelSequence

WORTH_SHARING = 16  # tokens


@dataclass(slots=True, eq=False)
class Slot:
    """Room for one conversation: a sequence of the target and one of the draft model, with their caches."""

    sequence: ModelSequence
    drafting: ModelSequence | None = None
    used: float = 0.0  # when last, on a monotonic clock

    def forget(self) -> None:
        self.sequence.rollback(0)
        if self.drafting is not None:
            self.drafting.rollback(0)


class Snapshots(Protocol):
    """Storage for conversations that lose their slot."""

    def swap(self, slot: Slot, prompt: Sequence[int], held: int) -> int:
        """Keep what `slot` loses for `prompt`, of which it holds `held` tokens, and load a better snapshot.

        Returns how many tokens it holds then.
        """

    def close(self) -> None: ...


class SlotPool:
    """The slots of one model. `snapshots` may be set later, by programs that answer several conversations."""

    def __init__(self, slots: Sequence[Slot], snapshots: Snapshots | None = None) -> None:
        self.slots, self.snapshots = slots, snapshots

    def place(self, prompt: Sequence[int], free: Sequence[Slot] | None = None) -> tuple[Slot, int]:
        """Return the slot for `prompt` among the `free` ones, and how many of its tokens that slot holds.

        It is the slot that `prompt` continues, else an empty one, else the least recently used. A slot that
        shares little more than the beginning of its text with `prompt` belongs to another conversation with
        the same system prompt.
        """
        common = {slot: common_prefix(slot.sequence.tokens, prompt) for slot in self.slots}

        def rank(slot: Slot) -> tuple[int, bool, float]:
            held = slot.sequence.tokens
            return common[slot] if 2 * common[slot] > len(held) else 0, not held, -slot.used

        slot = max(self.slots if free is None else free, key=rank)
        held = slot.sequence.reachable(common[slot])
        if self.snapshots is not None:
            held = self.snapshots.swap(slot, prompt, held)
        return slot, self.share(slot, prompt, held)

    def share(self, slot: Slot, prompt: Sequence[int], held: int) -> int:
        """Copy to `slot` what another one holds of `prompt`, if that is more; return what it holds then."""
        for other in self.slots:
            common = common_prefix(other.sequence.tokens, prompt) if other is not slot else 0
            common = other.sequence.reachable(common)
            if common >= held + WORTH_SHARING and slot.sequence.share(other.sequence, common):
                held = common
        return held

    def forget(self) -> None:
        """Empty all slots."""
        for slot in self.slots:
            slot.forget()

    def close(self) -> None:
        if self.snapshots is not None:
            self.snapshots.close()
